"""Malicious and damaged files: each is refused by name, and none of their code runs."""

import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.checkpoints.archives import Archive, number, pickle_of, text

from trivec.checkpoints.tensor_files import open_tensor_file
from trivec.core.errors import CheckpointRefused

FLOATS = np.arange(6, dtype="<f4")


class Canary:
    """What a code-executing pickle would do here: leave a file behind."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mkdir, (str(self.file),)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "code-ran"


def _refused(file: Path, reason: str) -> None:
    with pytest.raises(CheckpointRefused, match=reason) as refusal:
        open_tensor_file(file)
    assert str(file) in str(refusal.value)


# Each takes the canary's path and gives a pickle that would make that folder if it were run.
CODE: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "reduce-calls-a-function-of-os": (
        lambda canary: pickle.dumps({"a": Canary(canary)}, protocol=2),
        "'posix.mkdir'",
    ),
    "reduce-calls-eval": (
        lambda canary: (
            b"\x80\x02cbuiltins\neval\n" + text(f"__import__('os').mkdir('{canary}')") + b"\x85R."
        ),
        "'builtins.eval'",
    ),
    "old-name-of-builtins": (
        lambda canary: (
            b"\x80\x02c__builtin__\nexec\n" + text(f"import os; os.mkdir('{canary}')") + b"\x85R."
        ),
        "'__builtin__.exec'",
    ),
    "stack-global-of-a-later-protocol": (
        lambda canary: pickle.dumps({"a": Canary(canary)}, protocol=4),
        "protocol 4",
    ),
    "stack-global-under-a-false-protocol": (
        lambda canary: (
            b"\x80\x02" + text("os") + text("mkdir") + b"\x93" + text(str(canary)) + b"\x85R."
        ),
        "opcode STACK_GLOBAL",
    ),
    "inst": (
        lambda canary: b"\x80\x02(" + text(str(canary)) + b"ios\nmkdir\n.",
        "opcode INST",
    ),
    "obj": (
        lambda canary: b"\x80\x02(cos\nmkdir\n" + text(str(canary)) + b"o.",
        "'os.mkdir'",
    ),
    "newobj": (
        lambda canary: b"\x80\x02ccollections\nOrderedDict\n)\x81.",
        "opcode NEWOBJ",
    ),
    "extension-registry": (lambda canary: b"\x80\x02\x82\x01.", "opcode EXT1"),
    "text-persistent-id": (lambda canary: b"\x80\x02Pstorage\n.", "opcode PERSID"),
    "a-storage-type-called": (
        lambda canary: b"\x80\x02ctorch\nFloatStorage\n)R.",
        "'str' object is not callable",
    ),
    "a-global-of-torch-itself": (
        lambda canary: b"\x80\x02ctorch.serialization\nload\n" + text(str(canary)) + b"\x85R.",
        "'torch.serialization.load'",
    ),
    "a-dotted-name-in-an-allowed-module": (
        lambda canary: b"\x80\x02ctorch._utils\n_rebuild_tensor_v2.__globals__\n.",
        "'torch._utils._rebuild_tensor_v2.__globals__'",
    ),
    "attributes-set-on-a-dict": (
        lambda canary: (
            b"\x80\x02ccollections\nOrderedDict\n)R}" + text("__class__") + number(1) + b"sb."
        ),
        "sets attributes",
    ),
    "arguments-to-an-ordered-dict": (
        lambda canary: b"\x80\x02ccollections\nOrderedDict\n" + text("a") + b"\x85R.",
        "takes 1 positional argument",
    ),
    "a-dict-called": (lambda canary: b"\x80\x02})R.", "object is not callable"),
    "attributes-set-on-a-function": (
        lambda canary: (
            b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}" + text("__doc__") + number(1) + b"sb."
        ),
        "sets attributes of function",
    ),
    "attributes-set-through-slots": (
        lambda canary: (
            b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}"
            + text("__doc__")
            + number(1)
            + b"s\x86b."
        ),
        "sets attributes of function",
    ),
}


@pytest.mark.parametrize(("build", "reason"), CODE.values(), ids=CODE.keys())
def test_a_pickle_that_does_more_than_a_state_dict_is_refused(
    build: Callable[[Path], bytes], reason: str, canary: Path, tmp_path: Path
) -> None:
    file = Archive(pickled=build(canary)).write(tmp_path / "model.bin")
    _refused(file, reason)
    assert not canary.exists()


def test_the_canary_would_sing(canary: Path) -> None:
    """The pickles above do run code where they are unpickled."""
    pickle.loads(CODE["reduce-calls-a-function-of-os"][0](canary))
    assert canary.exists()


def test_a_legacy_pickle_is_refused_before_it_is_read(canary: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    file.write_bytes(pickle.dumps(Canary(canary), protocol=2))
    _refused(file, "legacy format")
    assert not canary.exists()


PICKLES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "no complete"),
    "cut-off": (pickle_of({"a": (6,)})[:-20], "no complete"),
    "no-dict": (b"\x80\x02" + number(1) + b".", "int 1 where a state dict"),
    "two-values": (b"\x80\x02}}.", "does not end in one value"),
    "names-that-are-numbers": (b"\x80\x02}" + number(1) + number(2) + b"s.", "for a name"),
    "a-value-that-is-no-tensor": (b"\x80\x02}" + text("a") + number(2) + b"s.", "not a name to a"),
    "the-same-name-twice": (pickle_of([("a", (6,)), ("a", (6,))], key="0"), "names 'a' twice"),
    "recalls-what-was-never-made": (b"\x80\x02h\x07.", "Memo value not found at index 7"),
    "pops-an-empty-stack": (b"\x80\x02\x85.", "is damaged"),
    "no-mark": (b"\x80\x02}t.", "is damaged"),
    "negative-strides": (pickle_of({"a": (6,)}, strides=(-1,)), "strides"),
    "transposed": (pickle_of({"a": (2, 3)}, strides=(1, 2)), "not row-major"),
    "overlapping-rows": (pickle_of({"a": (2, 3)}, strides=(1, 1)), "not row-major"),
    "repeated-by-a-zero-stride": (
        pickle_of({"a": (1000,)}, strides=(0,), element_count=6),
        "not row-major",
    ),
    "strides-of-another-rank": (pickle_of({"a": (6,)}, strides=(3, 1)), "strides"),
    "a-negative-offset": (pickle_of({"a": (6,)}, offset=-1), "impossible offset"),
    "a-bit-that-negates-a-tensor": (
        pickle_of({"a": (6,)}).replace(b")RtR", b")R}" + text("neg") + b"\x88stR"),
        "takes 6 positional arguments but 7 were given",
    ),
    "outside-its-storage": (pickle_of({"a": (6,)}, offset=1), "outside its storage"),
    "a-huge-shape": (pickle_of({"a": (2**30, 2**30)}, element_count=6), "outside its storage"),
    "an-impossible-shape": (pickle_of({"a": (-6,)}, element_count=6), "impossible shape"),
    "a-storage-that-is-not-there": (pickle_of({"a": (6,)}, key="7"), "storage '7'"),
    "a-storage-elsewhere": (pickle_of({"a": (6,)}, key="../../etc/passwd"), "which is not there"),
    "an-element-count-that-lies": (pickle_of({"a": (6,)}, element_count=7), "its pickle says 28"),
    "nested-without-end": (
        b"\x80\x02}" + text("a") + b")" + b"\x85" * 100_000 + b"s.",
        "not a name to a tensor",
    ),
    "nested-without-end-for-a-name": (
        b"\x80\x02})" + b"\x85" * 300_000 + b"Ns.",  # whose hash would end the process
        "for a name",
    ),
    "half-a-surrogate-pair-for-a-name": (
        b"\x80\x02}X\x03\x00\x00\x00\xed\xa0\x80Ns.",
        "for a name",
    ),
    "a-list": (b"\x80\x02].", "opcode EMPTY_LIST"),
    "bytes-nobody-names": (b"\x80\x02\xff.", "opcode 0xff"),
    "a-tuple-doubled-forty-times": (
        b"\x80\x02}"
        + text("a")
        + text("lol")
        + b"".join(b"q\x00h\x00\x86" for _ in range(40))
        + b"s.",
        "not a name to a tensor",
    ),
}


@pytest.mark.parametrize(("pickled", "reason"), PICKLES.values(), ids=PICKLES.keys())
def test_a_pickle_that_lies_is_refused(pickled: bytes, reason: str, tmp_path: Path) -> None:
    _refused(Archive(pickled=pickled).write(tmp_path / "model.bin"), reason)


ARCHIVES: dict[str, tuple[Archive, str]] = {
    "compressed-zip-bomb": (
        Archive(storages={"0": b"\0" * 10_000_000}, compressed={"data/0"}),
        "data/0' is compressed",
    ),
    "compressed-pickle": (Archive(compressed={"data.pkl"}), "data.pkl' is compressed"),
    "no-pickle": (Archive(pickled=None), "holds no data.pkl"),
    "two-top-folders": (Archive(more={"other/data/1": b""}), "in one folder"),
    "a-name-that-climbs-out": (Archive(more={"archive/../../x": b""}), "none of a state dict's"),
    "an-absolute-name": (Archive(more={"/etc/passwd": b""}), "none of a state dict's"),
    "a-name-with-a-backslash": (Archive(more={"archive\\data\\1": b""}), "none of a state dict's"),
    "torchscript-code": (Archive(more={"archive/code/m.py": b""}), "none of a state dict's"),
    "torchscript-constants": (Archive(more={"archive/constants.pkl": b""}), "none of a state"),
    "the-same-entry-twice": (Archive(doubled="data/0"), "is there twice"),
    "big-endian": (Archive(byte_order=b"big"), "byte order is b'big'"),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")  # from the writer, which is the attacker here
@pytest.mark.parametrize(("archive", "reason"), ARCHIVES.values(), ids=ARCHIVES.keys())
def test_an_archive_that_torch_would_not_write_is_refused(
    archive: Archive, reason: str, tmp_path: Path
) -> None:
    _refused(archive.write(tmp_path / "model.bin"), reason)


def _patched(content: bytes, old: bytes, new: bytes) -> bytes:
    assert content.count(old) >= 1
    return content.replace(old, new)


def _directory_at(content: bytes) -> int:
    """Where the last directory entry of an archive begins."""
    return content.rindex(b"PK\x01\x02")


def _set(content: bytes, at: int, form: str, value: int) -> bytes:
    patched = bytearray(content)
    struct.pack_into(form, patched, at, value)
    return bytes(patched)


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "a-flipped-bit": (lambda c: _patched(c, FLOATS.tobytes(), FLOATS[::-1].tobytes()), "damaged"),
    "cut-in-half": (lambda c: c[: len(c) // 2], "not a zip file"),
    "a-byte-cut-off": (lambda c: c[:-1], "refused"),
    "nothing-left": (lambda c: b"", "cannot be read"),
    "another-format": (lambda c: b"GGUF" + c[4:], "not a zip archive"),
    "encrypted": (lambda c: _set(c, _directory_at(c) + 8, "<H", 1), "is encrypted"),
    "a-size-past-the-end": (
        lambda c: _set(
            _set(c, _directory_at(c) + 20, "<I", 2**30), _directory_at(c) + 24, "<I", 2**30
        ),
        "ends outside the file|overlap",
    ),
    "two-entries-over-each-other": (
        lambda c: _set(c, _directory_at(c) + 42, "<I", 0),
        "disagree|[Oo]verlap",
    ),
    "a-directory-that-claims-gigabytes": (
        lambda c: _set(c, c.rindex(b"PK\x05\x06") + 12, "<I", 2**31),
        "refused",
    ),
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_archive_is_refused(
    damage: Callable[[bytes], bytes], reason: str, tmp_path: Path
) -> None:
    file = Archive().write(tmp_path / "model.bin")
    assert open_tensor_file(file).float32("a").tolist() == FLOATS.tolist()
    file.write_bytes(damage(file.read_bytes()))
    _refused(file, reason)


def test_tensors_that_share_a_storage_a_thousand_times_are_refused(tmp_path: Path) -> None:
    """A small file must not become a large one when it is converted."""
    many = pickle_of([(f"t{i}", (6,)) for i in range(1000)], key="0")
    _refused(Archive(pickled=many).write(tmp_path / "model.bin"), "share their storage")
