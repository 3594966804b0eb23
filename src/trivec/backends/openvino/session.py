"""Session: one compiled encoder and its slots, batches in, vectors out.

It knows the OpenVINO runtime: streams, requests, precision hints, and the memory the plugin keeps.
"""

import ctypes
import mmap
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from trivec.backends.openvino.graph import build_graph, build_head
from trivec.backends.openvino.packing import (
    MICRO_BATCH_BUDGET,
    MicroBatch,
    as_batch,
    pack_micro_batch,
    plan_micro_batches,
)
from trivec.backends.openvino.quantise import QuantScheme, Tensors
from trivec.checkpoints.checkpoint import Checkpoint
from trivec.core.errors import StartError
from trivec.core.types import Batch, Float32Array, Int32Array, Output, Sequences, Vectors
from trivec.models.ops import ModelConfig
from trivec.models.pooling import SPLADE_ROWS, HiddenRows, MultiHead, Pooling, SpladeHead
from trivec.models.registry import plan_of

LONG_TOKENS = 2 * MICRO_BATCH_BUDGET.tokens_max
"""Micro-batches above this leave 74 kB a token in the plugin, which is given back (BGE-M3: 0.6 GB)."""

COPIES_BYTES_MAX = 64 << 20
"""What the weights of a model may take again for all slots after the first: MiniLM, not BGE-M3."""

RELEASE_S = 0.02  # in which the plugin reads up to 0.1 GB of weights

SELF_TEST_TOKENS = 8
SELF_TEST_COPIES = 16  # in one micro-batch: eight rows say nothing of the kernels of many
COMPILES_MAX = 3
COSINE_MIN = 0.9999  # of the same scheme on the same CPU; wrong weights gave 0.70 to 0.87
STACK_T_BYTES = 64  # a `stack_t` of sigaltstack(2) takes 24


class WrongOutputShape(StartError):
    """A compiled model gives no hidden states of the text's shape: its scheme cannot run here."""


def open_core() -> ov.Core:
    """A core whose CPU plugin is loaded, the calling thread's signal stack left as it was.

    With each `ov.Core` the plugin (2026.4) gives the calling thread a signal stack of its own, and
    takes it back with the core. When cores do not end in the reverse order of their making, the thread
    is left with memory that is gone, and the next signal ends the process: a Ctrl-C as a segmentation
    fault.
    """
    libc, stack = ctypes.CDLL(None), ctypes.create_string_buffer(STACK_T_BYTES)
    libc.sigaltstack(None, stack)
    core = ov.Core()
    core.get_property("CPU", "FULL_DEVICE_NAME")  # the plugin is loaded at the first question
    libc.sigaltstack(stack, None)
    return core


def mappings_of(arrays: Iterable[NDArray[np.generic]]) -> set[mmap.mmap]:
    """Every mapped file behind *arrays*; memory of their own is left alone."""
    found: set[mmap.mmap] = set()
    for array in arrays:
        held: object = array
        while isinstance(held, np.ndarray | memoryview):
            held = held.base if isinstance(held, np.ndarray) else held.obj
        if isinstance(held, mmap.mmap):
            found.add(held)
    return found


def release_memory(mappings: Iterable[mmap.mmap]) -> None:
    """Drop the pages of *mappings* and what malloc holds free: some ms, not for every short text.

    A mapped page is read from its file again when it is needed. glibc keeps for a thread what it has
    freed; after loading, and after long texts, that is hundreds of MB. Other allocators have no such
    call.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))
    for mapping in mappings:
        mapping.madvise(mmap.MADV_DONTNEED)


@contextmanager
def released_meanwhile(mappings: Iterable[mmap.mmap]) -> Iterator[None]:
    """Drop the pages of *mappings* again and again while the block runs.

    The plugin reads every constant when it compiles, and it copies what it packs: without this fp32 of
    BGE-M3 is in memory once as its file and once packed.
    """
    ended = threading.Event()

    def release() -> None:
        while not ended.wait(RELEASE_S):
            for mapping in mappings:
                mapping.madvise(mmap.MADV_DONTNEED)

    thread = threading.Thread(target=release, name="trivec-release")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class Session:
    """A compiled encoder with one stream of one thread a slot.

    Two streams of one thread beat one stream of two by 10 to 25 % up to 512 tokens a micro-batch
    (decision 0001), and a slot's thread is then the same core's work from end to end.

    A model of one stream runs in the thread that asks, and one of several hands over to a thread
    of its own. So each slot compiles its own where the copies of the weights are small
    (decision 0001), and in grouped schemes always: there the plugin (2026.4) finds shared weights
    by the address of memory it has already given back, and a second model in the process may get
    those of the first (8 of 25 loads were wrong; decision 0001). Otherwise all slots share one.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        tensors: Tensors,
        scheme: QuantScheme,
        *,
        slot_count: int,
        with_statistics: bool = False,
        with_inputs: bool = False,
    ) -> None:
        model = build_graph(
            checkpoint.config,
            tensors,
            scheme,
            with_statistics=with_statistics,
            with_inputs=with_inputs,
        )
        weights_bytes = packed_bytes(checkpoint.config, tensors)
        streams = stream_count(scheme, weights_bytes, slot_count=slot_count)
        properties: dict[str, str | int | bool] = {
            # Where the CPU has avx512_bf16 the plugin would take bf16, which switches int8
            # activations off (decision 0003).
            "INFERENCE_PRECISION_HINT": "f32",
            "NUM_STREAMS": streams,
            "INFERENCE_NUM_THREADS": streams,
            # Pinned, every model of one stream takes the first core, and a stream waits for its own
            # core while the event loop is on it and another stands idle (decision 0001).
            "ENABLE_CPU_PINNING": False,
        }
        if scheme.group_size is not None:
            properties["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = scheme.group_size
        core = open_core()
        self.slot_count = slot_count
        self._mapped = mappings_of(tensors.values())  # tables are read from these as needed
        with released_meanwhile(self._mapped):
            self._compiled = [
                core.compile_model(model, "CPU", properties) for _ in range(slot_count // streams)
            ]
        self._requests = [
            self._compiled[slot // streams].create_infer_request() for slot in range(slot_count)
        ]
        self._pooler = checkpoint.pooler
        self._head_requests = []
        if isinstance(self._pooler.token_head, SpladeHead):
            head = build_head(self._pooler.token_head.layers, scheme, rows=SPLADE_ROWS)
            compiled = [
                core.compile_model(head, "CPU", properties) for _ in range(slot_count // streams)
            ]
            self._head_requests = [
                compiled[slot // streams].create_infer_request() for slot in range(slot_count)
            ]
        self._config = checkpoint.config
        windows = {spec.window for spec in plan_of(self._config).attention} - {None}
        assert len(windows) <= 1, "a micro-batch is packed for one window"
        self._window = next(iter(windows), None)
        del model
        release_memory(self._mapped)  # what was compiled has been read, and is not read again
        self._lock = threading.Lock()  # of the two below
        self._running = 0
        self._has_leftovers = False  # of a long micro-batch, in the plugin

    def run(self, batch: Batch, *, slot: int) -> Vectors:
        """Vectors of *batch*, one entry a sequence; on the thread that owns *slot*."""
        # With CLS and LAST pooling a dense vector needs one hidden state.
        whole = (batch.outputs & np.uint8(Output.SPARSE | Output.MULTI)) != 0
        whole |= self._pooler.token is None
        if batch.skip is not None:  # a first token that is not the sequence's first
            whole |= batch.skip > 0
        parts, members = list[Vectors](), list[Int32Array]()
        for packed in self._pack(batch, whole):
            hidden = self._infer(packed, slot)[-1].data  # [kept size, hidden]
            states = HiddenRows(
                hidden=hidden[: len(packed.kept_token_ids)],
                token_ids=packed.kept_token_ids,
                cu_seqlens=packed.kept_cu_seqlens,
                outputs=batch.outputs[packed.members],
                skip=None if batch.skip is None else batch.skip[packed.members],
                chunks=None if batch.chunks is None else [batch.chunks[i] for i in packed.members],
            )
            parts.append(self._pooler.vectors(states, partial(self._logits, slot)))
            members.append(packed.members)
        if len(batch) == 1:
            return parts[0]
        return Vectors.join(parts, np.argsort(np.concatenate(members)))

    def _logits(self, slot: int, hidden: Float32Array) -> Float32Array:
        """A `models.pooling.LogitsOf`: always of so many rows, so that one's bits are its own."""
        rows = np.zeros((SPLADE_ROWS, hidden.shape[1]), np.float32)
        rows[: len(hidden)] = hidden
        request = self._head_requests[slot]
        request.set_input_tensor(0, ov.Tensor(rows, shared_memory=True))
        request.infer(share_outputs=True)
        logits: Float32Array = request.get_output_tensor(0).data[: len(hidden)]
        return logits

    def hidden(self, token_ids: Int32Array, *, slot: int, copies: int = 1) -> Float32Array:
        """Last hidden states of a short text, *copies* times: a copy, `[copies * tokens, hidden]`."""
        batch = as_batch(Sequences.pack([token_ids] * copies), Output.DENSE)
        (packed,) = self._pack(batch, np.ones(copies, np.bool_))
        states: Float32Array = self._infer(packed, slot)[-1].data
        return states[: copies * len(token_ids)].copy()

    def self_test(self, slot: int) -> tuple[Float32Array, Float32Array]:
        """Hidden states of the self-test's text, and of `SELF_TEST_COPIES` of it at once."""
        ids = self_test_ids(self._config)
        return self.hidden(ids, slot=slot), self.hidden(ids, slot=slot, copies=SELF_TEST_COPIES)

    def statistics(self, batch: Batch) -> Iterator[list[Float32Array]]:
        """For each micro-batch of *batch*, copies of what `with_statistics` asked for; on all slots.

        One token a sequence passes the last layer, whatever the pooling.
        """
        parts, slots = list(self._pack(batch, np.zeros(len(batch), np.bool_))), self.slot_count

        def run(slot: int, packed: MicroBatch) -> list[Float32Array]:
            return [output.data.copy() for output in self._infer(packed, slot)[:-1]]

        with ThreadPoolExecutor(slots, "trivec-statistics") as pool:
            for at in range(0, len(parts), slots):  # some at a time: each is 50 MB of BGE-M3
                yield from pool.map(run, range(slots), parts[at : at + slots])
                release_memory(self._mapped)  # a row of a table is read with its neighbours

    def inputs(self, batch: Batch, *, step: int) -> Iterator[list[Float32Array]]:
        """For each micro-batch of *batch* what `with_inputs` asked for, of every *step*-th token."""
        for packed in self._pack(batch, np.ones(len(batch), np.bool_)):
            tokens = slice(0, len(packed.kept_token_ids), step)
            yield [output.data[tokens].copy() for output in self._infer(packed, 0)[:-1]]

    def _pack(self, batch: Batch, whole: NDArray[np.bool_]) -> Iterator[MicroBatch]:
        """The micro-batches of *batch*; *whole*: where every token's hidden state is wanted."""
        head, seen_lengths = self._pooler.token_head, None
        if isinstance(head, MultiHead) and head.unattended_token_id is not None:
            seen_lengths = head.seen_lengths(batch.token_ids, batch.cu_seqlens)
        for members in plan_micro_batches(np.diff(batch.cu_seqlens), window=self._window):
            yield pack_micro_batch(
                batch,
                members,
                whole=whole,
                keeps_last=self._pooler.token is Pooling.LAST,
                position_offset=self._config.position_offset,
                seen_lengths=seen_lengths,
                window=self._window,
            )

    def _infer(self, packed: MicroBatch, slot: int) -> Sequence[ov.Tensor]:
        """The graph's outputs, valid until the slot's next ones; after long texts frees memory."""
        request = self._requests[slot]
        arrays = (packed.tokens, packed.gather, packed.bias, packed.near, packed.near_bias)
        for i, array in enumerate((*arrays, packed.kept)):
            request.set_input_tensor(i, ov.Tensor(array, shared_memory=True))
        with self._lock:
            self._running += 1
        try:
            request.infer(share_outputs=True)  # or it would copy what is read in place
        finally:
            with self._lock:
                self._running -= 1
                self._has_leftovers |= packed.tokens.shape[1] > LONG_TOKENS
                if self._has_leftovers and not self._running:  # outputs stay valid
                    self.release_memory()  # a long text has read all over the table, too
                    self._has_leftovers = False
        outputs: Sequence[ov.Tensor] = request.output_tensors
        return outputs

    def release_memory(self) -> None:
        """Give back what the plugin keeps for the next run, and the tables' pages; nothing may run."""
        for compiled in self._compiled:
            compiled.release_memory()
        release_memory(self._mapped)


def stream_count(scheme: QuantScheme, weights_bytes: int, *, slot_count: int) -> int:
    """Streams of each compiled model: *slot_count* where all slots share one, else 1."""
    copies_bytes = (slot_count - 1) * weights_bytes
    is_shared = scheme.group_size is None and copies_bytes > COPIES_BYTES_MAX
    return slot_count if is_shared else 1


def packed_bytes(model: ModelConfig, tensors: Tensors) -> int:
    """What the plugin copies to pack it: matrices that are multiplied, not tables looked up in."""
    names = (name for group in plan_of(model).linears for name in group.names)
    return sum(tensors[f"{name}.weight"].nbytes for name in names)


def open_session(
    checkpoint: Checkpoint,
    tensors: Tensors,
    scheme: QuantScheme,
    *,
    slot_count: int,
    reference: Float32Array | None = None,
    with_statistics: bool = False,
    with_inputs: bool = False,
) -> Session:
    """A session that has passed its self-test, compiled `COMPILES_MAX` times at most.

    A plugin that gives a layer another layer's weights answers as quickly as ever, and wrongly
    (decision 0001). So one text of random tokens runs on every slot, alone and as many copies: the
    slots must agree to the bit, the copies with the text, and each token's hidden state with
    *reference*, those of *scheme* when the model was calibrated (`[tokens, hidden]`; None where it
    never was). A result of another shape, such as grouped int8 gives where oneDNN is kept from the
    CPU's instructions, agrees with nothing. Raises `StartError`, and of it `WrongOutputShape` where
    the shape was wrong to the last.
    """
    shape = (len(self_test_ids(checkpoint.config)), checkpoint.config.hidden_size)
    for _ in range(COMPILES_MAX):
        session = Session(
            checkpoint,
            tensors,
            scheme,
            slot_count=slot_count,
            with_statistics=with_statistics,
            with_inputs=with_inputs,
        )
        with ThreadPoolExecutor(slot_count, "trivec-self-test") as pool:
            found = list(pool.map(session.self_test, range(slot_count)))
        slots_agree = all(all(map(np.array_equal, one, found[0])) for one in found)
        alone, among = found[0]
        has_shape = alone.shape == shape and len(among) == SELF_TEST_COPIES * shape[0]
        expected = alone if reference is None else reference
        is_near = has_shape and all(
            cosine_min(rows, expected) >= COSINE_MIN
            for rows in (alone, *np.split(among, SELF_TEST_COPIES))
        )
        if slots_agree and is_near:
            session.release_memory()  # some weights are packed, and so read, when first used
            return session
    kind = StartError if has_shape else WrongOutputShape
    raise kind(
        f"The engine computes wrong vectors in {scheme.name}, {COMPILES_MAX} times in a row. "
        "Try --precision fp32, and report it with the CPU's name and the version of openvino."
    )


def self_test_ids(model: ModelConfig) -> Int32Array:
    """Token ids that no text needs to have: int32 `[tokens]`."""
    count = min(SELF_TEST_TOKENS, model.token_count_max)
    return np.random.default_rng(0).integers(0, model.vocab_size, count).astype(np.int32)


def cosine_min(found: Float32Array, expected: Float32Array) -> float:
    """The least cosine of two matrices' rows `[tokens, hidden]`, each taken from its own mean.

    Without its mean a row is not judged by the few large channels that every token shares.
    """
    a, b = found - expected.mean(axis=0), expected - expected.mean(axis=0)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(((a * b).sum(axis=1) / np.maximum(norms, 1e-12)).min())
