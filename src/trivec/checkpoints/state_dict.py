"""The pickle inside a torch file, interpreted without ever unpickling.

A pickle is a program for a stack machine that may import and call anything. A state dict needs
two dozen of its opcodes and three constructors; this machine has those and no others, so there
is nothing in it that could run code. The opcodes are read with `pickletools`, which only parses.
What each does: the comments of Python's own Lib/pickletools.py.
"""

import pickletools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from reprlib import Repr
from typing import TypeGuard

from trivec.checkpoints.tensors import StoredType

STORAGE_TYPES = {
    "torch DoubleStorage": StoredType.F64,
    "torch FloatStorage": StoredType.F32,
    "torch HalfStorage": StoredType.F16,
    "torch BFloat16Storage": StoredType.BF16,
    "torch LongStorage": StoredType.I64,
    "torch IntStorage": StoredType.I32,
    "torch ShortStorage": StoredType.I16,
    "torch CharStorage": StoredType.I8,
    "torch ByteStorage": StoredType.U8,
    "torch BoolStorage": StoredType.BOOL,
}
ORDERED_DICT = "collections OrderedDict"
REBUILD_TENSOR = "torch._utils _rebuild_tensor_v2"
REBUILD_PARAMETER = "torch._utils _rebuild_parameter"
DIMENSIONS_MAX = 8
GLOBALS = frozenset({ORDERED_DICT, REBUILD_TENSOR, REBUILD_PARAMETER, *STORAGE_TYPES})

_BRIEF = Repr()
_BRIEF.maxlevel = 2


@dataclass(frozen=True, slots=True)
class Storage:
    """A run of elements, kept in the archive under `data/KEY`."""

    dtype: StoredType
    key: str
    element_count: int


@dataclass(frozen=True, slots=True)
class StorageSlice:
    """A tensor: a row-major part of a storage."""

    storage: Storage
    offset: int  # in elements
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Global:
    """A name the pickle asked for; never looked up, only compared."""

    name: str


class _Mark: ...


def read_state_dict(pickled: bytes) -> dict[str, StorageSlice]:
    """Name to tensor, as *pickled* says. Nothing of it is executed.

    Raises `ValueError`, which names the opcode, global or value that a state dict does not have.
    """
    found = _Machine().run(pickled)
    if not isinstance(found, dict):
        raise _wrong(f"holds {_described(found)} where a state dict is expected")
    tensors: dict[str, StorageSlice] = {}
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, StorageSlice):
            raise _wrong(f"maps {_described(name)} to {_described(tensor)}, not a name to a tensor")
        tensors[name] = tensor
    return tensors


def _operations(pickled: bytes) -> Iterator[tuple[str, object]]:
    try:
        for opcode, argument, _ in pickletools.genops(pickled):
            yield opcode.name, argument
    except (ValueError, UnicodeDecodeError, IndexError) as error:
        raise ValueError(f"is no complete pickle ({error})") from error


class _Machine:
    """The stack, the memo, and one method for each group of opcodes."""

    def __init__(self) -> None:
        self._stack: list[object] = []
        self._memo: dict[object, object] = {}
        self._steps: dict[str, Callable[[object], None]] = {
            "PROTO": self._protocol,
            "GLOBAL": self._global,
            "MARK": lambda _: self._push(_Mark()),
            "NONE": lambda _: self._push(None),
            "NEWTRUE": lambda _: self._push(True),
            "NEWFALSE": lambda _: self._push(False),
            "EMPTY_DICT": lambda _: self._push({}),
            "EMPTY_TUPLE": lambda _: self._push(()),
            "TUPLE": lambda _: self._push(tuple(self._pop_to_mark())),
            "TUPLE1": lambda _: self._tuple(1),
            "TUPLE2": lambda _: self._tuple(2),
            "TUPLE3": lambda _: self._tuple(3),
            "SETITEM": lambda _: self._set_items([self._pop(), self._pop()][::-1]),
            "SETITEMS": lambda _: self._set_items(self._pop_to_mark()),
            "REDUCE": lambda _: self._reduce(),
            "BUILD": lambda _: self._build(),
            "BINPERSID": lambda _: self._push(_storage(self._pop())),
        }
        for name in ("BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE"):
            self._steps[name] = self._push
        for name in ("BINPUT", "LONG_BINPUT"):
            self._steps[name] = self._remember
        for name in ("BINGET", "LONG_BINGET"):
            self._steps[name] = self._recall

    def run(self, pickled: bytes) -> object:
        """What the pickle describes, or `ValueError`."""
        for name, argument in _operations(pickled):
            if name == "STOP":
                break
            step = self._steps.get(name)
            if step is None:
                raise _wrong(f"uses the opcode {name}, which a state dict does not need")
            step(argument)
        if len(self._stack) != 1:
            raise _wrong("does not end in one value")
        return self._pop()

    def _push(self, value: object) -> None:
        self._stack.append(value)

    def _pop(self) -> object:
        if not self._stack or isinstance(self._stack[-1], _Mark):
            raise _wrong("takes a value from an empty stack")
        return self._stack.pop()

    def _pop_to_mark(self) -> list[object]:
        values: list[object] = []
        while self._stack:
            value = self._stack.pop()
            if isinstance(value, _Mark):
                return values[::-1]
            values.append(value)
        raise _wrong("has no mark where one is needed")

    def _tuple(self, count: int) -> None:
        self._push(tuple([self._pop() for _ in range(count)][::-1]))

    def _protocol(self, version: object) -> None:
        if version != 2:
            raise _wrong(f"is of pickle protocol {version}; torch writes 2")

    def _global(self, name: object) -> None:
        if name not in GLOBALS:
            raise _wrong(
                f"asks for {str(name).replace(' ', '.')!r}, which a state dict does not need"
            )
        self._push(_Global(str(name)))

    def _remember(self, slot: object) -> None:
        if not self._stack:
            raise _wrong("remembers a value of an empty stack")
        self._memo[slot] = self._stack[-1]

    def _recall(self, slot: object) -> None:
        if slot not in self._memo:
            raise _wrong(f"recalls value {slot}, which it never made")
        self._push(self._memo[slot])

    def _set_items(self, flat: list[object]) -> None:
        held = self._stack[-1] if self._stack else None
        if not isinstance(held, dict) or len(flat) % 2:
            raise _wrong("sets items of something that is no dict")
        for key, value in zip(flat[::2], flat[1::2], strict=True):
            if not isinstance(key, str):
                raise _wrong(f"has {_described(key)} for a name")
            if key in held:
                raise _wrong(f"names {key!r} twice")
            held[key] = value

    def _reduce(self) -> None:
        arguments, called = self._pop(), self._pop()
        name = called.name if isinstance(called, _Global) else None
        if name == ORDERED_DICT and arguments == ():
            self._push({})
        elif name == REBUILD_TENSOR and isinstance(arguments, tuple):
            self._push(_tensor(arguments))
        elif name == REBUILD_PARAMETER and isinstance(arguments, tuple) and len(arguments) == 3:
            self._push(arguments[0])
        else:
            raise _wrong(f"calls {_described(called)} with {_described(arguments)}")

    def _build(self) -> None:
        """Modules leave version numbers on their state dict, as its attribute `_metadata`."""
        state = self._pop()
        held = self._stack[-1] if self._stack else None
        if not (isinstance(held, dict) and isinstance(state, dict) and set(state) == {"_metadata"}):
            raise _wrong(f"sets attributes of {_described(held)}")


def _storage(description: object) -> Storage:
    """What a persistent id stands for: ("storage", type, key, device, element count)."""
    if isinstance(description, tuple) and len(description) == 5:
        word, kind, key, _, count = description
        dtype = STORAGE_TYPES.get(kind.name) if isinstance(kind, _Global) else None
        if word == "storage" and dtype is not None and isinstance(key, str) and _is_count(count):
            return Storage(dtype, key, count)
    raise _wrong(f"refers to {_described(description)}, which is no storage")


def _tensor(arguments: tuple[object, ...]) -> StorageSlice:
    """`_rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, hooks)`, row-major only."""
    if len(arguments) != 6:
        raise _wrong(f"rebuilds a tensor from {len(arguments)} values, not 6")
    storage, offset, shape, strides = arguments[:4]
    if not isinstance(storage, Storage):
        raise _wrong(f"rebuilds a tensor from {_described(storage)}")
    if not isinstance(shape, tuple) or not _is_shape(shape):
        raise _wrong(f"has a tensor of the impossible shape {_BRIEF.repr(shape)}")
    if not isinstance(strides, tuple) or not _is_row_major(shape, strides):
        raise _wrong(
            f"has a tensor of shape {_BRIEF.repr(shape)} with strides {_BRIEF.repr(strides)}, not row-major"
        )
    if not _is_count(offset):
        raise _wrong(f"has a tensor at the impossible offset {_BRIEF.repr(offset)}")
    return StorageSlice(storage, offset, shape)


def _is_row_major(shape: tuple[int, ...], strides: tuple[object, ...]) -> bool:
    """Whether elements follow each other; the stride of an axis of length one says nothing."""
    if len(shape) != len(strides) or not _is_shape(strides):
        return False
    expected = 1
    for size, stride in zip(shape[::-1], strides[::-1], strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _is_shape(sizes: tuple[object, ...]) -> TypeGuard[tuple[int, ...]]:
    return len(sizes) <= DIMENSIONS_MAX and all(_is_count(size) for size in sizes)


def _is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 2**48


def _described(value: object) -> str:
    """A value of the pickle's in few words, for an error.

    Never its whole `repr`: a small pickle can nest one tuple into an endless one.
    """
    if isinstance(value, _Global):
        return value.name.replace(" ", ".")
    return f"{type(value).__name__.strip('_').lower()} {_BRIEF.repr(value)}"


def _wrong(reason: str) -> ValueError:
    return ValueError(f"its pickle {reason}")
