"""Dummy checkpoints: complete, seeded, streamed, and scaled so that vectors mean something."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tests.checkpoints.changing import take_all
from tests.checkpoints.tiny import write_tiny
from tests.support.dummy import blueprint_of, write_dummy
from tests.support.dummy.weights import RandomWeights

from trivec.checkpoints import open_checkpoint
from trivec.core.errors import CheckpointRefused
from trivec.models.registry import tensor_shapes


def _hash_all(folder: Path) -> dict[str, str]:
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file()
    }


@pytest.mark.parametrize("torch_files", [False, True], ids=["safetensors", "torch-files"])
def test_the_same_seed_gives_the_same_bytes(torch_files: bool, tmp_path: Path) -> None:
    one, same, other = (
        _hash_all(write_tiny(tmp_path / name, seed=seed, torch_files=torch_files))
        for name, seed in (("one", 5), ("same", 5), ("other", 6))
    )
    assert one == same
    assert one != other


@pytest.mark.parametrize(
    ("torch_files", "recorded"),
    [
        pytest.param(
            False,
            "c5b2fe9287b00a5426c7ee4b1d004117759157d754aa11281aa53f8faea8abba",
            id="safetensors",
        ),
        pytest.param(
            True,
            "980746c3bffc562b85879cc56bdc287d5039eafa6eebf4e3d7cf80930f972d54",
            id="torch-files",
        ),
    ],
)
def test_the_bytes_are_those_that_were_recorded(
    torch_files: bool, recorded: str, tmp_path: Path
) -> None:
    """Without `tokenizer.json`, whose form is its library's. Figures of the past stay comparable."""
    folder = write_tiny(
        tmp_path / "tiny",
        hidden=16,
        vocabulary_size=300,
        position_count=20,
        torch_files=torch_files,
        stored_type="F16",
        seed=5,
    )
    hashes = _hash_all(folder)
    del hashes["tokenizer.json"]
    lines = sorted(f"{sha256} {name}\n" for name, sha256 in hashes.items())
    assert hashlib.sha256("".join(lines).encode()).hexdigest() == recorded


def test_the_command_writes_as_many_layers_as_were_asked_for(tmp_path: Path) -> None:
    folder = tmp_path / "dummy"
    done = _run("all-minilm-l6-v2", str(folder), "--layers", "1")
    assert (done.returncode, done.stdout.strip()) == (0, str(folder))
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 1
    again = _run("all-minilm-l6-v2", str(folder))
    assert again.returncode == 1
    assert "is not empty" in again.stderr


def _run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.dummy", *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_it_has_the_hubs_own_files(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "tiny", torch_files=True)
    assert set(_hash_all(folder)) == {
        "1_Pooling/config.json",
        "colbert_linear.pt",
        "config.json",
        "modules.json",
        "pytorch_model.bin",
        "sentence_bert_config.json",
        "sparse_linear.pt",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_the_blueprint_of_bge_m3_is_the_hubs_checkpoint(shared_data: Path) -> None:
    """Names and shapes of all 391 tensors, from the header of the published file."""
    header = json.loads((shared_data / "bge-m3" / "bge_m3_safetensors_header.json").read_text())
    published = {name: tuple(entry["shape"]) for name, entry in header.items() if "shape" in entry}
    ours = tensor_shapes(blueprint_of("baai/bge-m3").config)
    assert set(published) - set(ours) == {"pooler.dense.weight", "pooler.dense.bias"}
    assert all(published[name] == shape for name, shape in ours.items())


def test_a_folder_with_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("keep")
    with pytest.raises(CheckpointRefused, match="is not empty"):
        write_dummy(tmp_path, blueprint_of("baai/bge-m3"))
    assert (tmp_path / "mine").read_text() == "keep"


def test_an_unknown_model_says_which_there_are() -> None:
    with pytest.raises(CheckpointRefused, match=r"there are dummies of baai/bge-m3"):
        blueprint_of("gpt-2")


def test_memory_stays_far_below_what_is_written(tmp_path: Path) -> None:
    """Two layers of the full width: 1.1 GB in one table, written by a process of its own."""
    script = (
        "import resource, sys; from pathlib import Path\n"
        "from tests.support.dummy import blueprint_of, write_dummy\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "before = peak()\n"
        "write_dummy(Path(sys.argv[1]), blueprint_of('all-minilm-l6-v2'))\n"
        "print(peak() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "dummy")],
        env={"PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    written_bytes = (tmp_path / "dummy" / "model.safetensors").stat().st_size
    assert written_bytes > 90_000_000
    assert int(done.stdout) < written_bytes / 2


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta"])
@pytest.mark.parametrize("vocabulary_size", [300, 2000, 60_000])
def test_the_tiny_tokenizer_stays_within_the_vocabulary(
    family: str, vocabulary_size: int, tmp_path: Path
) -> None:
    folder = write_tiny(
        tmp_path / "tiny", family=family, vocabulary_size=vocabulary_size, hidden=8, heads=False
    )
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.get_vocab_size() <= vocabulary_size
    encoding = tokenizer.encode("The rain, 42 cafés and вечером.")
    assert max(encoding.ids) < vocabulary_size
    opening, closing = ("[CLS]", "[SEP]") if family == "bert" else ("<s>", "</s>")
    assert (encoding.tokens[0], encoding.tokens[-1]) == (opening, closing)
    assert len(set(encoding.ids)) > 8, "it tells words and letters apart"


def test_special_ids_are_those_of_xlm_roberta(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "tiny")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = [tokenizer.token_to_id(token) for token in ("<s>", "<pad>", "</s>", "<unk>")]
    assert ids == [0, 1, 2, 3]


def test_a_given_tokenizer_is_taken(tmp_path: Path) -> None:
    theirs = write_tiny(tmp_path / "other", vocabulary_size=500) / "tokenizer.json"
    blueprint = blueprint_of("all-minilm-l6-v2").with_layers(1)
    write_dummy(tmp_path / "dummy", blueprint, tokenizer_file=theirs)
    assert (tmp_path / "dummy" / "tokenizer.json").read_bytes() == theirs.read_bytes()


def test_no_tensor_depends_on_the_pieces_it_is_written_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = take_all(open_checkpoint(str(write_tiny(tmp_path / "one")), cache_dir=tmp_path / "c"))
    expected = {name: array.copy() for name, array in whole.items()}
    monkeypatch.setattr("tests.support.dummy.weights.PIECE_ELEMENTS", 100)
    again = take_all(open_checkpoint(str(write_tiny(tmp_path / "two")), cache_dir=tmp_path / "c"))
    assert all(np.array_equal(again[name], expected[name]) for name in expected)


def test_six_channels_of_1024_are_outliers_from_the_second_layer_up() -> None:
    weights = RandomWeights(blueprint_of("baai/bge-m3").with_layers(3).config, seed=0)
    assert len(weights.outliers) == 6

    def vector(name: str) -> np.ndarray:
        (piece,) = weights.pieces(name, (1024,), stored_type="F32")
        return np.frombuffer(piece, "<f4")

    for layer, has_outliers in ((0, False), (1, True), (2, True)):
        bias = np.abs(vector(f"encoder.layer.{layer}.output.LayerNorm.bias"))
        assert (bias[weights.outliers] > 10).all() == has_outliers
        assert np.delete(bias, weights.outliers).max() == 0
