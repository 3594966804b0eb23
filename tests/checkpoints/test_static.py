"""Static models' folders: as model2vec saves them, and as sentence-transformers does."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tests.checkpoints.tiny import write_tiny

from trivec.checkpoints import open_checkpoint
from trivec.checkpoints.checkpoint import Checkpoint
from trivec.core.errors import CheckpointRefused

ROWS, WIDTH = 2000, 16
TABLE = np.random.default_rng(1).standard_normal((ROWS, WIDTH)).astype(np.float32)
MODEL2VEC = "sentence_transformers.models.StaticEmbedding"


def write_static(folder: Path, tensors: dict[str, np.ndarray], *, at: str = "") -> Path:
    """A folder of *tensors*, in its part *at*, with the tokenizer of a tiny BERT."""
    write_tiny(folder, family="bert", heads=False)
    for file in [one for one in folder.rglob("*.*") if one.is_file()]:
        if file.name != "tokenizer.json":
            file.unlink()
    (folder / at).mkdir(exist_ok=True)
    (folder / "tokenizer.json").rename(folder / at / "tokenizer.json")
    save_file(tensors, folder / at / "model.safetensors")
    write(folder, "config_sentence_transformers.json", {"prompts": {"query": "q: "}})
    return folder


def write(folder: Path, name: str, content: object) -> None:
    (folder / name).write_text(json.dumps(content))


def modules(folder: Path, path: str, *, normalize: bool) -> None:
    listed = [{"idx": 0, "name": "0", "path": path, "type": MODEL2VEC}]
    if normalize:
        kind = "sentence_transformers.models.Normalize"
        listed.append({"idx": 1, "name": "1", "path": "1_Normalize", "type": kind})
    write(folder, "modules.json", listed)


def table_of(checkpoint: Checkpoint) -> np.ndarray:
    with checkpoint.weights() as weights:
        return weights.take("embeddings.weight")


@pytest.mark.parametrize("at", ["", "0_StaticEmbedding"], ids=["at-the-root", "in-a-part"])
def test_a_table_of_sentence_transformers_is_served_as_it_is(
    at: str, tmp_path: Path, cache_dir: Path
) -> None:
    folder = write_static(tmp_path / "model", {"embedding.weight": TABLE}, at=at)
    modules(folder, at, normalize=True)
    checkpoint = open_checkpoint(str(folder), cache_dir=cache_dir)
    assert checkpoint.normalize
    assert checkpoint.dimensions == WIDTH
    assert checkpoint.prompts == {"query": "q: "}
    assert checkpoint.rules.dropped_token_id is None
    assert not checkpoint.late_chunking, "a chunk's vector would be that of the chunk alone"
    np.testing.assert_array_equal(table_of(checkpoint), [*TABLE, np.zeros(WIDTH)])


@pytest.mark.parametrize("has_modules", [True, False])
def test_model2vec_says_in_its_config_what_is_normalised_and_how_long_texts_are(
    has_modules: bool, tmp_path: Path, cache_dir: Path
) -> None:
    folder = write_static(tmp_path / "model", {"embeddings": TABLE})
    config = {"model_type": "model2vec", "normalize": has_modules, "max_length": 100}
    write(folder, "config.json", config)
    if has_modules:
        modules(folder, ".", normalize=True)
    checkpoint = open_checkpoint(str(folder), cache_dir=cache_dir)
    assert checkpoint.normalize == has_modules
    assert checkpoint.token_count_max == 100
    assert checkpoint.assumed is None
    assert checkpoint.rules.dropped_token_id is not None
    assert checkpoint.rules.blank_token_id == ROWS


@pytest.mark.parametrize(("given", "read"), [({}, 512), ({"max_length": None}, 8192)])
def test_a_length_that_is_not_said_is_model2vec_s_own(
    given: dict[str, object], read: int, tmp_path: Path, cache_dir: Path
) -> None:
    folder = write_static(tmp_path / "model", {"embeddings": TABLE})
    write(folder, "config.json", {"model_type": "model2vec", **given})
    assert open_checkpoint(str(folder), cache_dir=cache_dir).token_count_max == read


@pytest.mark.parametrize("dtype", ["f8", "f4", "f2", "i1"])
def test_a_quantised_vocabulary_is_unfolded_whatever_its_type(
    dtype: str, tmp_path: Path, cache_dir: Path
) -> None:
    few = (8 * TABLE[:5]).astype(dtype)
    mapping = np.arange(ROWS) % 5
    shares = np.linspace(0, 1, ROWS)
    tensors = {"embeddings": few, "mapping": mapping, "weights": shares}
    folder = write_static(tmp_path / "model", tensors)
    write(folder, "config.json", {"model_type": "model2vec"})
    table = table_of(open_checkpoint(str(folder), cache_dir=cache_dir))
    np.testing.assert_allclose(table[:-1], few[mapping] * shares[:, None], rtol=1e-6)
    assert not table[-1].any()


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        pytest.param({"table": TABLE}, "a static model is a table", id="another-name"),
        pytest.param({"embeddings": TABLE[0]}, "a static model is", id="a-row"),
        pytest.param({"embeddings": TABLE, "bias": TABLE[0]}, "holds bias", id="one-more"),
        pytest.param(
            {"embeddings": TABLE, "weights": TABLE[:, 0][:9]}, "of one length", id="few-weights"
        ),
        pytest.param(
            {"embeddings": TABLE[:5], "mapping": np.full(ROWS, 5)}, "names rows", id="no-such-row"
        ),
        pytest.param({"embeddings": TABLE * np.nan}, "not finite", id="not-finite"),
    ],
)
def test_what_makes_no_table_is_refused(
    tensors: dict[str, np.ndarray], reason: str, tmp_path: Path, cache_dir: Path
) -> None:
    folder = write_static(tmp_path / "model", tensors)
    write(folder, "config.json", {"model_type": "model2vec"})
    with pytest.raises(CheckpointRefused, match=reason):
        table_of(open_checkpoint(str(folder), cache_dir=cache_dir))


def test_a_folder_without_config_that_is_no_static_model_is_refused(
    tmp_path: Path, cache_dir: Path
) -> None:
    folder = write_static(tmp_path / "model", {"embedding.weight": TABLE})
    kind = "sentence_transformers.models.Transformer"
    write(folder, "modules.json", [{"idx": 0, "name": "0", "path": "", "type": kind}])
    with pytest.raises(CheckpointRefused, match=r"config\.json"):
        open_checkpoint(str(folder), cache_dir=cache_dir)
