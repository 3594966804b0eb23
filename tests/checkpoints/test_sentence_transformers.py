"""Folders as sentence-transformers 5.7 and 6.2 save them: every key in them is one we know."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.checkpoints.tiny import write_tiny

from trivec.checkpoints import open_checkpoint
from trivec.core.errors import CheckpointRefused
from trivec.models.pooling import Pooling

NO_LIMIT = 10**30  # as transformers writes it: int(1e30), 1000000000000000019884624838656
POSITIONS = 130


def saved_by(version: str) -> dict[str, Any]:
    """What `SentenceTransformer.save` writes beside the weights and the config of the encoder."""
    is_6 = version == "6.2.0"
    modules = "sentence_transformers.sentence_transformer.modules"
    base = "sentence_transformers.base.modules"
    files: dict[str, Any] = {
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": f"{base}.transformer.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{modules}.pooling.Pooling"},
            {
                "idx": 2,
                "name": "2",
                "path": "2_Normalize",
                "type": f"{base if is_6 else modules}.normalize.Normalize",
            },
        ],
        "1_Pooling/config.json": {
            "embedding_dimension": 64,
            "pooling_mode": "mean",
            "include_prompt": True,
        },
        "config_sentence_transformers.json": {
            "__version__": {
                "pytorch": "2.13.0+cpu",
                "sentence_transformers": version,
                "transformers": "5.24.0",
            },
            "default_prompt_name": None,
            "model_type": "SentenceTransformer",
            "prompts": {"document": "", "query": ""},
            "similarity_fn_name": "cosine",
        },
        "sentence_bert_config.json": {
            "transformer_task": "feature-extraction",
            "modality_config": {
                "text": {"method": "forward", "method_output_name": "last_hidden_state"}
            },
            "module_output_name": "token_embeddings",
        },
        "tokenizer_config.json": {
            "backend": "tokenizers",
            "cls_token": "[CLS]",
            "do_basic_tokenize": True,
            "do_lower_case": True,
            "is_local": True,
            "local_files_only": False,
            "mask_token": "[MASK]",
            "max_length": 32,  # of an earlier call; nothing reads it
            "model_max_length": 64,
            "never_split": None,
            "pad_to_multiple_of": None,
            "pad_token": "[PAD]",
            "pad_token_type_id": 0,
            "padding_side": "right",
            "sep_token": "[SEP]",
            "stride": 0,
            "strip_accents": None,
            "tokenize_chinese_chars": True,
            "tokenizer_class": "BertTokenizer",
            "truncation_side": "right",
            "truncation_strategy": "longest_first",
            "unk_token": "[UNK]",
        },
    }
    if is_6:
        files["2_Normalize/config.json"] = {
            "module_input_name": "sentence_embedding",
            "module_output_name": "sentence_embedding",
        }
    return files


def write_saved(folder: Path, version: str) -> Path:
    write_tiny(folder, family="bert", position_count=POSITIONS, heads=False)
    for name, content in saved_by(version).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    change(folder, "tokenizer.json", normalizer={"type": "BertNormalizer", "lowercase": True})
    return folder


def change(folder: Path, name: str, **fields: object) -> None:
    content = json.loads((folder / name).read_text()) | fields
    (folder / name).write_text(json.dumps(content))


@pytest.fixture(params=["5.7.0", "6.2.0"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_saved(tmp_path / "saved", request.param)


def test_a_saved_fine_tune_is_understood_and_keeps_its_length(saved: Path, cache_dir: Path) -> None:
    checkpoint = open_checkpoint(str(saved), cache_dir=cache_dir)
    assert checkpoint.token_count_max == 64
    assert checkpoint.pooling == (Pooling.MEAN,)
    assert checkpoint.normalize


@pytest.mark.parametrize(
    ("module", "tokenizer", "length"),
    [
        pytest.param({"max_seq_length": 32}, {"model_max_length": 64}, 32, id="the-module's"),
        pytest.param({"max_seq_length": 100}, {"model_max_length": 64}, 64, id="the-tokenizer's"),
        pytest.param(
            {"max_seq_length": None}, {"model_max_length": 64}, 64, id="null-says-nothing"
        ),
        pytest.param({}, {"model_max_length": 500}, POSITIONS, id="no-more-than-the-positions"),
        pytest.param({}, {"model_max_length": None}, POSITIONS, id="null-of-the-tokenizer"),
        pytest.param({}, {"model_max_length": NO_LIMIT}, POSITIONS, id="no-limit"),
        pytest.param({}, {"model_max_length": 1e30}, POSITIONS, id="no-limit-as-a-float"),
        pytest.param({"max_seq_length": NO_LIMIT}, {"model_max_length": 9}, 9, id="no-limit-here"),
    ],
)
def test_the_shortest_length_that_says_something_counts(
    module: dict[str, object],
    tokenizer: dict[str, object],
    length: int,
    tmp_path: Path,
    cache_dir: Path,
) -> None:
    folder = write_saved(tmp_path / "saved", "5.7.0")
    change(folder, "sentence_bert_config.json", **module)
    change(folder, "tokenizer_config.json", **tokenizer)
    assert open_checkpoint(str(folder), cache_dir=cache_dir).token_count_max == length


@pytest.mark.parametrize("name", ["sentence_bert_config.json", "tokenizer_config.json"])
def test_a_file_that_is_absent_says_nothing(name: str, saved: Path, cache_dir: Path) -> None:
    change(saved, "sentence_bert_config.json", max_seq_length=64)
    (saved / name).unlink()
    assert open_checkpoint(str(saved), cache_dir=cache_dir).token_count_max == 64


def test_settings_that_change_no_vector_are_passed_over(saved: Path, cache_dir: Path) -> None:
    change(saved, "sentence_bert_config.json", unpad_inputs=True, query_length=None)
    change(saved, "config_sentence_transformers.json", truncate_dim=64, prompts={"query": "q: "})
    open_checkpoint(str(saved), cache_dir=cache_dir)


@pytest.mark.parametrize(
    ("name", "value"),
    [("do_lower_case", False), ("strip_accents", True), ("tokenize_chinese_chars", False)],
)
def test_a_setting_that_would_override_the_tokenizers_file_is_refused(
    name: str, value: bool, saved: Path, cache_dir: Path
) -> None:
    change(saved, "tokenizer_config.json", **{name: value})
    with pytest.raises(CheckpointRefused, match=rf"tokenizer_config.json: {name} = {value}, but"):
        open_checkpoint(str(saved), cache_dir=cache_dir)
