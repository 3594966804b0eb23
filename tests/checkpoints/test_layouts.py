"""Layouts of a folder: shards, no modules, prompts, and what stands there instead of a model."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tests.checkpoints.changing import take_all
from tests.checkpoints.tiny import write_tiny
from tests.support.heads import add_module, write_masked_lm

from trivec.checkpoints import open_checkpoint
from trivec.checkpoints.layout import INDEX_FILE, LFS_POINTER
from trivec.core.errors import CheckpointRefused
from trivec.core.types import Output
from trivec.models.pooling import Pooling


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A tiny BERT in the layout of sentence-transformers, mean pooling."""
    return write_tiny(tmp_path / "model", family="bert", pooling=Pooling.MEAN, heads=False)


def write_json(folder: Path, name: str, content: object) -> None:
    (folder / name).write_text(json.dumps(content))


def shard(folder: Path) -> list[str]:
    """Cut the weights of *folder* into two files and an index, as transformers does; their names."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    halves = [sorted(tensors)[:9], sorted(tensors)[9:]]
    for name, half in zip(names, halves, strict=True):
        save_file({tensor: tensors[tensor] for tensor in half}, folder / name)
    weight_map = {t: name for name, half in zip(names, halves, strict=True) for t in half}
    write_json(folder, INDEX_FILE, {"metadata": {"total_size": 1}, "weight_map": weight_map})
    return names


def test_shards_hold_the_weights_of_the_whole(plain: Path, cache_dir: Path) -> None:
    whole = take_all(open_checkpoint(str(plain), cache_dir=cache_dir))
    shard(plain)
    checkpoint = open_checkpoint(str(plain), cache_dir=cache_dir)
    assert len(checkpoint.weight_files) == 2
    found = take_all(checkpoint)
    assert found.keys() == whole.keys()
    assert all(np.array_equal(found[name], whole[name]) for name in whole)


def test_a_shard_that_is_missing_is_named(plain: Path, cache_dir: Path) -> None:
    first, _ = shard(plain)
    (plain / first).unlink()
    with pytest.raises(CheckpointRefused, match=f"does not list .*{first} is on one side only"):
        open_checkpoint(str(plain), cache_dir=cache_dir)


def test_a_tensor_in_two_shards_is_refused(plain: Path, cache_dir: Path) -> None:
    first, second = shard(plain)
    tensors = dict(load_file(plain / first))
    save_file(dict(load_file(plain / second)) | dict([tensors.popitem()]), plain / second)
    with (
        pytest.raises(CheckpointRefused, match="is there twice"),
        open_checkpoint(str(plain), cache_dir=cache_dir).weights(),
    ):
        pass


def test_without_modules_the_pooling_is_the_familys_and_said_aloud(
    plain: Path, cache_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (plain / "modules.json").unlink()
    with caplog.at_level(logging.WARNING, "trivec.checkpoints"):
        checkpoint = open_checkpoint(str(plain), cache_dir=cache_dir)
    assert checkpoint.pooling == (Pooling.MEAN,)
    assert not checkpoint.normalize
    assert checkpoint.assumed is not None
    assert checkpoint.assumed in caplog.text
    assert "mean pooling" in caplog.text


def test_a_masked_language_model_without_modules_is_taken_for_splade_and_said_aloud(
    tmp_path: Path, cache_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_masked_lm(tmp_path / "model")
    with caplog.at_level(logging.WARNING, "trivec.checkpoints"):
        checkpoint = open_checkpoint(str(folder), cache_dir=cache_dir)
    assert checkpoint.outputs is Output.SPARSE
    assert "SPLADE" in caplog.text


@pytest.mark.parametrize("twice", [False, True], ids=["relu", "log1p_relu"])
def test_a_splade_module_says_how_often_the_logarithm_is_taken(
    tmp_path: Path, cache_dir: Path, twice: bool
) -> None:
    folder = write_masked_lm(tmp_path / "model")
    (folder / "1_Pooling").rmdir()
    kind = "sentence_transformers.sparse_encoder.models.MLMTransformer"
    write_json(folder, "modules.json", [{"type": kind, "path": ""}])
    function = "log1p_relu" if twice else "relu"
    settings = {"pooling_strategy": "max", "activation_function": function}
    add_module(folder, "SpladePooling", settings)
    write_json(folder, "config_sentence_transformers.json", {"model_type": "SparseEncoder"})
    checkpoint = open_checkpoint(str(folder), cache_dir=cache_dir)
    assert checkpoint.outputs is Output.SPARSE
    assert checkpoint.assumed is None
    assert getattr(checkpoint.token_head, "takes_log_twice", None) is twice


def test_a_sum_of_splade_weights_is_refused(tmp_path: Path, cache_dir: Path) -> None:
    folder = write_masked_lm(tmp_path / "model")
    (folder / "1_Pooling").rmdir()
    kind = "sentence_transformers.models.Transformer"
    write_json(folder, "modules.json", [{"type": kind, "path": ""}])
    add_module(folder, "SpladePooling", {"pooling_strategy": "sum"})
    with pytest.raises(CheckpointRefused, match="pooling_strategy = 'sum' is not understood"):
        open_checkpoint(str(folder), cache_dir=cache_dir)


def test_a_norms_first_names_are_todays(plain: Path, cache_dir: Path) -> None:
    expected = take_all(open_checkpoint(str(plain), cache_dir=cache_dir))
    file = plain / "model.safetensors"
    parts = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = {
        name.replace(now, parts[now]): array
        for name, array in load_file(file).items()
        for now in [next((one for one in parts if name.endswith(one)), "LayerNorm.weight")]
    }
    assert sum(name.endswith(("gamma", "beta")) for name in tensors) == 10
    save_file(tensors, file)
    found = take_all(open_checkpoint(str(plain), cache_dir=cache_dir))
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_prompts_and_lengths_of_vectors_are_read(plain: Path, cache_dir: Path) -> None:
    settings = {
        "prompts": {"query": "q: ", "passage": ""},
        "default_prompt_name": "query",
        "truncate_dim": 16,
    }
    write_json(plain, "config_sentence_transformers.json", settings)
    pooling = {"pooling_mode": "mean", "include_prompt": False}
    write_json(plain, "1_Pooling/config.json", pooling)
    checkpoint = open_checkpoint(str(plain), cache_dir=cache_dir)
    assert checkpoint.prompts == settings["prompts"]
    assert checkpoint.default_prompt_name == "query"
    assert not checkpoint.include_prompt
    assert checkpoint.dimensions == 16


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        pytest.param({"use_residual": True}, "use_residual = True", id="a-residual"),
        pytest.param({"out_features": 9}, "are not 64 and 8", id="another-size"),
        pytest.param(
            {"activation_function": "torch.nn.modules.activation.Softplus"},
            "activation_function = .*Softplus",
            id="another-function",
        ),
        pytest.param(
            {"activation_function": "mine.Tanh"}, "'mine.Tanh' is not", id="a-function-of-its-own"
        ),
        pytest.param({"bias": True}, "expected are linear.bias, linear.weight", id="no-bias"),
        pytest.param(
            {"module_input_name": "token_embeddings"},
            "module_input_name = 'token_embeddings' is not",
            id="of-each-token",
        ),
    ],
)
def test_a_dense_module_that_is_not_understood_is_refused(
    settings: dict[str, object], reason: str, plain: Path, cache_dir: Path
) -> None:
    known = {
        "in_features": 64, "out_features": 8, "bias": False,
        "activation_function": "torch.nn.modules.linear.Identity",
    }  # fmt: skip
    modules = json.loads((plain / "modules.json").read_text())[:2]  # without Normalize
    write_json(plain, "modules.json", modules)
    add_module(plain, "Dense", known | settings, **{"linear.weight": np.ones((8, 64), np.float32)})
    with pytest.raises(CheckpointRefused, match=reason):
        open_checkpoint(str(plain), cache_dir=cache_dir)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("adapter_config.json", "holds an adapter, not merged"),
        ("model-q4_k_m.gguf", "holds a GGUF file"),
        ("onnx/model.onnx", "holds the model as ONNX only"),
    ],
)
def test_what_is_no_checkpoint_of_ours_has_its_own_sentence(
    name: str, reason: str, plain: Path, cache_dir: Path
) -> None:
    weights = (plain / "model.safetensors").rename(plain / "kept")
    (plain / name).parent.mkdir(exist_ok=True)
    (plain / name).write_bytes(b"")
    with pytest.raises(CheckpointRefused, match=reason):
        open_checkpoint(str(plain), cache_dir=cache_dir)
    weights.rename(plain / "model.safetensors")
    if name == "adapter_config.json":  # which would change the weights beside it
        with pytest.raises(CheckpointRefused, match=reason):
            open_checkpoint(str(plain), cache_dir=cache_dir)
    else:
        open_checkpoint(str(plain), cache_dir=cache_dir)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_git_lfs_pointer_is_named(name: str, plain: Path, cache_dir: Path) -> None:
    (plain / name).write_bytes(LFS_POINTER + b"v1\noid sha256:00\nsize 90868376\n")
    with pytest.raises(CheckpointRefused, match=f"{name}: is a git-lfs pointer"):
        open_checkpoint(str(plain), cache_dir=cache_dir)
