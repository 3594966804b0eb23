"""Our torch files beside torch itself: it reads what we write, and we read what it writes."""

from pathlib import Path

import numpy as np
import pytest
from tests.checkpoints.changing import take_all
from tests.checkpoints.tiny import write_tiny

from trivec.checkpoints import open_checkpoint
from trivec.checkpoints.tensor_files import open_tensor_file

torch = pytest.importorskip("torch", reason="torch is for the reference suite only")
transformers = pytest.importorskip("transformers", reason="for the reference suite only")

pytestmark = pytest.mark.reference


@pytest.mark.parametrize("stored_type", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("is_mapped", [False, True], ids=["read", "mapped"])
def test_torch_reads_what_we_write(stored_type: str, is_mapped: bool, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "tiny", torch_files=True, stored_type=stored_type)
    theirs = torch.load(folder / "pytorch_model.bin", weights_only=True, mmap=is_mapped)
    ours = open_tensor_file(folder / "pytorch_model.bin")
    assert set(theirs) == set(ours.tensors)
    for name, tensor in theirs.items():
        assert np.array_equal(tensor.float().numpy(), ours.float32(name))


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta"])
def test_transformers_loads_the_dummy_whole(family: str, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "tiny", family=family, torch_files=True)
    model, report = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    taken = take_all(open_checkpoint(str(folder), cache_dir=tmp_path / "cache"))
    theirs = model.state_dict()
    assert all(np.array_equal(theirs[name].numpy(), array) for name, array in taken.items())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer("the first boat")["input_ids"][0] == tokenizer.cls_token_id


@pytest.mark.parametrize("kind", ["state-dict", "parameters", "half", "shared"])
def test_we_read_what_torch_writes(kind: str, tmp_path: Path) -> None:
    linear = torch.nn.Linear(5, 3)
    saved = {
        "state-dict": linear.state_dict(),
        "parameters": {"weight": linear.weight, "bias": linear.bias},
        "half": linear.half().state_dict() if kind == "half" else {},
        "shared": {"weight": linear.weight.data, "bias": linear.weight.data[1]},
    }[kind]
    torch.save(saved, tmp_path / "head.pt")
    ours = open_tensor_file(tmp_path / "head.pt")
    for name, tensor in saved.items():
        assert np.array_equal(ours.float32(name), tensor.detach().float().numpy())
