"""Folders, configs and weights that are not understood: each refused by name."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tests.checkpoints.changing import rewrite, take_all

from trivec.checkpoints import open_checkpoint
from trivec.core.errors import CheckpointRefused
from trivec.models.registry import tensor_shapes


def _set_json(name: str, **fields: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) | fields
        (folder / name).write_text(json.dumps(content))

    return change


def _write(name: str, content: str | bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        raw = content.encode() if isinstance(content, str) else content
        (folder / name).write_bytes(raw)

    return change


def _make(name: str, content: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir()
        (folder / name).write_text(content)

    return change


def _delete(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _link(name: str, target: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder.parent / "secret").write_text("{}")
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return change


def _modules(*types: str) -> str:
    return json.dumps(
        [
            {"type": one, "path": "" if i == 0 else f"{i}_{one.split('.')[-1]}"}
            for i, one in enumerate(types)
        ]
    )


ST = "sentence_transformers.models."
FOLDERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "code-in-the-folder": (_write("modeling_tiny.py", "print()"), "modeling_tiny.py: is code"),
    "a-compiled-library": (_write("fast.so", b"\x7fELF"), "fast.so: is code"),
    "auto-map": (
        _set_json("config.json", auto_map={"AutoModel": "modeling.Model"}),
        "config.json: auto_map",
    ),
    "trust-remote-code": (_set_json("config.json", trust_remote_code=True), "trust_remote_code"),
    "a-module-of-its-own": (
        _write("modules.json", _modules(ST + "Transformer", "custom_st.Pooling")),
        "code of the model's own",
    ),
    "a-dense-module": (
        _write("modules.json", _modules(ST + "Transformer", ST + "Pooling", ST + "Dense")),
        "2_Dense/config.json: is missing",
    ),
    "a-router": (
        _write("modules.json", _modules(ST + "Router", ST + "Pooling")),
        "Router, Pooling; the first is no Transformer",
    ),
    "two-pooling-modules": (
        _write("modules.json", _modules(ST + "Transformer", ST + "Pooling", ST + "Pooling")),
        "2_Pooling/config.json: is missing",
    ),
    "no-pooling-module": (_write("modules.json", _modules(ST + "Transformer")), "modules.json"),
    "no-pooling-file": (_delete("1_Pooling/config.json"), "1_Pooling/config.json: is missing"),
    "no-tokenizer": (_delete("tokenizer.json"), "holds no tokenizer.json"),
    "no-weights": (_delete("model.safetensors"), "none of model.safetensors"),
    "no-config": (_delete("config.json"), "holds no config.json"),
    "one-head-of-two": (_delete("colbert_linear.safetensors"), "no colbert_linear"),
    "an-unknown-pooling": (
        _set_json("1_Pooling/config.json", pooling_mode="attention"),
        "pooling_mode = 'attention' is not understood",
    ),
    "no-pooling-mode": (
        _set_json("1_Pooling/config.json", pooling_mode_cls_token=False),
        "no pooling",
    ),
    "pooling-of-another-width": (
        _set_json("1_Pooling/config.json", word_embedding_dimension=32),
        "word_embedding_dimension = 32 is not the width",
    ),
    "lower-casing-before-the-tokenizer": (
        _set_json("sentence_bert_config.json", do_lower_case=True),
        "do_lower_case = True",
    ),
    "an-unknown-setting-of-the-transformer": (
        _set_json("sentence_bert_config.json", window=7),
        "window = 7 is not understood",
    ),
    "a-length-that-is-no-count": (
        _set_json("sentence_bert_config.json", max_seq_length="many"),
        "max_seq_length",
    ),
    "a-length-that-is-a-truth-value": (
        _set_json("sentence_bert_config.json", max_seq_length=True),
        "max_seq_length = True is not a count",
    ),
    "a-length-of-the-tokenizer-below-one": (
        _set_json("tokenizer_config.json", model_max_length=-1),
        "tokenizer_config.json: model_max_length = -1 is not a count",
    ),
    "settings-of-the-tokenizers-call": (
        _set_json("sentence_bert_config.json", processing_kwargs={"text": {"max_length": 64}}),
        "processing_kwargs = .* is not understood",
    ),
    "a-query-of-another-length": (
        _set_json("sentence_bert_config.json", query_length=32),
        "query_length = 32 is not understood",
    ),
    "vectors-that-are-cut-to-nothing": (
        _write("config_sentence_transformers.json", '{"truncate_dim": 0}'),
        "truncate_dim = 0 leaves nothing",
    ),
    "an-encoder-of-another-kind": (
        _write("config_sentence_transformers.json", '{"model_type": "AudioEncoder"}'),
        "model_type = 'AudioEncoder' is not understood",
    ),
    "an-unknown-setting-of-the-model": (
        _write("config_sentence_transformers.json", '{"window": 7}'),
        "config_sentence_transformers.json: window = 7 is not understood",
    ),
    "an-unknown-setting-of-a-module": (
        _write("modules.json", '[{"type": "a.B", "path": "", "kwargs": ["task"]}]'),
        "modules.json: .*`kwargs`",
    ),
    "an-unknown-setting-of-the-pooling": (
        _set_json("1_Pooling/config.json", window=7),
        "1_Pooling/config.json: window = 7 is not understood",
    ),
    "a-prompt-that-is-half-pooled": (
        _set_json("1_Pooling/config.json", include_prompt="half"),
        "include_prompt = 'half' is not understood",
    ),
    "a-pooling-that-is-a-number": (
        _write("1_Pooling/config.json", '{"pooling_mode": [7]}'),
        "pooling_mode = .7. is not understood",
    ),
    "token-vectors-that-are-normalised": (
        _make("2_Normalize/config.json", '{"module_input_name": "token_embeddings"}'),
        "2_Normalize/config.json: .*token_embeddings",
    ),
    "a-default-prompt-that-is-none": (
        _write("config_sentence_transformers.json", '{"default_prompt_name": "query"}'),
        "default_prompt_name = 'query' is none of its prompts",
    ),
    "prompts-that-are-no-texts": (
        _write("config_sentence_transformers.json", '{"prompts": {"query": 7}}'),
        "config_sentence_transformers.json: not understood: .*query|`str`",
    ),
    "another-family": (_set_json("config.json", model_type="t5"), "model_type is 't5'"),
    "another-activation": (_set_json("config.json", hidden_act="gelu_new"), "'gelu_new'"),
    "relative-positions": (
        _set_json("config.json", position_embedding_type="relative_key"),
        "'relative_key'",
    ),
    "a-decoder": (_set_json("config.json", is_decoder=True), "is_decoder"),
    "a-quantised-checkpoint": (
        _set_json("config.json", quantization_config={"bits": 4}),
        "quantization_config",
    ),
    "heads-that-do-not-divide": (_set_json("config.json", num_attention_heads=5), "no multiple"),
    "an-absurd-size": (_set_json("config.json", hidden_size=10**9), r"config.json.*hidden_size"),
    "a-size-that-is-text": (
        _set_json("config.json", vocab_size="2000"),
        r"config.json.*vocab_size",
    ),
    "no-size": (_write("config.json", '{"model_type": "bert"}'), "config.json.*hidden_size"),
    "a-config-that-is-no-json": (_write("config.json", "{"), "config.json: not understood"),
    "a-config-nested-without-end": (
        _write("config.json", "[" * 100_000),
        "config.json: not understood",
    ),
    "a-config-of-megabytes": (_write("config.json", " " * 2_000_000), "larger than"),
    "a-link-out-of-the-folder": (_link("model.safetensors", "../secret"), "leads out of"),
    "a-link-out-that-nothing-uses": (_link("notes.txt", "/etc/passwd"), "leads out of"),
    "a-link-to-a-folder-outside": (_link("onnx", ".."), "leads out of"),
    "a-broken-link": (_link("notes.txt", "nowhere"), "not an ordinary file"),
    "a-pipe": (lambda folder: os.mkfifo(folder / "notes.txt"), "not an ordinary file"),
    "a-special-token-that-is-none": (
        _set_json("special_tokens_map.json", unk_token="[UNKNOWN]"),
        "unk_token '.UNKNOWN.' is no added token",
    ),
}


@pytest.mark.parametrize(("change", "reason"), FOLDERS.values(), ids=FOLDERS.keys())
def test_a_folder_that_is_not_understood_is_refused(
    change: Callable[[Path], None], reason: str, folder: Path, cache_dir: Path
) -> None:
    change(folder)
    with pytest.raises(CheckpointRefused, match=reason):
        open_checkpoint(str(folder), cache_dir=cache_dir)


def _with(name: str, array: np.ndarray) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    return lambda tensors: tensors | {name: array}


def _not_finite(value: float) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    def change(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        tensors["encoder.layer.1.output.dense.weight"][3, 5] = value
        return tensors

    return change


LAYER = "encoder.layer.1.output.dense.weight"
WEIGHTS: dict[str, tuple[Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]], str]] = {
    "missing": (lambda t: {n: a for n, a in t.items() if n != LAYER}, f"lacks {LAYER}"),
    "extra": (_with("encoder.layer.2.output.dense.bias", np.zeros(64, np.float32)), "layer.2"),
    "a-stranger": (_with("adapter.weight", np.zeros(4, np.float32)), "holds adapter.weight"),
    "mis-shaped": (_with(LAYER, np.zeros((64, 255), np.float32)), r"shape \[64, 255\] where"),
    "transposed": (_with(LAYER, np.zeros((256, 64), np.float32)), r"shape \[256, 64\] where"),
    "not-a-number": (_not_finite(np.nan), f"{LAYER} holds a value that is not finite"),
    "infinite": (_not_finite(-np.inf), f"{LAYER} holds a value that is not finite"),
    "stored-as-integers": (_with(LAYER, np.zeros((64, 256), np.int8)), "stored as I8"),
    "stored-in-double": (_with(LAYER, np.zeros((64, 256))), "stored as F64"),
}


@pytest.mark.parametrize(("change", "reason"), WEIGHTS.values(), ids=WEIGHTS.keys())
def test_weights_that_are_not_the_encoders_are_refused(
    change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]],
    reason: str,
    folder: Path,
    cache_dir: Path,
) -> None:
    rewrite(folder, change)
    checkpoint = open_checkpoint(str(folder), cache_dir=cache_dir)
    with pytest.raises(CheckpointRefused, match=reason):
        take_all(checkpoint)


def test_a_weight_that_nobody_takes_is_named(folder: Path, cache_dir: Path) -> None:
    with open_checkpoint(str(folder), cache_dir=cache_dir).weights() as weights:
        for name in tensor_shapes(open_checkpoint(str(folder), cache_dir=cache_dir).config):
            if name != LAYER:
                weights.take(name)
        with pytest.raises(CheckpointRefused, match=f"nothing used {LAYER}"):
            weights.finish()


def test_a_large_finite_tensor_whose_sum_overflows_is_taken(folder: Path, cache_dir: Path) -> None:
    rewrite(folder, _with(LAYER, np.full((64, 256), 3e38, np.float32)))
    assert take_all(open_checkpoint(str(folder), cache_dir=cache_dir))[LAYER].max() > 2e38


def test_a_head_of_another_width_is_refused(folder: Path, cache_dir: Path) -> None:
    save_file(
        {"weight": np.zeros((1, 32), np.float16), "bias": np.zeros(1, np.float16)},
        folder / "sparse_linear.safetensors",
    )
    with pytest.raises(CheckpointRefused, match=r"sparse_linear.*shape \[1, 32\]"):
        open_checkpoint(str(folder), cache_dir=cache_dir)


def test_a_head_that_is_not_finite_is_refused(folder: Path, cache_dir: Path) -> None:
    save_file(
        {"weight": np.full((1, 64), np.inf, np.float16), "bias": np.zeros(1, np.float16)},
        folder / "sparse_linear.safetensors",
    )
    with pytest.raises(CheckpointRefused, match=r"sparse_linear.*not finite"):
        open_checkpoint(str(folder), cache_dir=cache_dir)


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        pytest.param("nothing-of-the-sort", "neither a folder nor a known model", id="unknown"),
        pytest.param("a b=.", "cannot be a model's id", id="a-blank-in-the-id"),
        pytest.param("=.", "cannot be a model's id", id="an-empty-id"),
        pytest.param("../x=.", "cannot be a model's id", id="an-id-that-climbs"),
        pytest.param("\0", "neither a folder nor a known model", id="a-nul"),
    ],
)
def test_a_reference_to_nothing_says_what_there_is(
    reference: str, reason: str, cache_dir: Path
) -> None:
    with pytest.raises(CheckpointRefused, match=reason):
        open_checkpoint(reference, cache_dir=cache_dir)
