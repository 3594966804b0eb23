"""Launches: streams to a device, encoder passes captured as CUDA graphs, and compiled blocks.

Graphs and compiled blocks are compared at start with the plain encoder, on the device itself.
"""

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trivec.backends.torch.attention import REFUSALS, ReferenceAttention, fault_of, summary_of
from trivec.backends.torch.ops import (
    BatchShape,
    Block,
    Encoder,
    PackedBatch,
    RunBlock,
    Weights,
    pack,
    run_block,
)
from trivec.core.types import Batch, Int32Array, Output

GRAPH_TOKENS_MAX = 2_048  # beyond it the launches of a batch take less time than its arithmetic
# Few: attention starts a block of threads for every 128 tokens of every sequence and head, and an
# empty sequence's blocks end at once but are not free.
GRAPH_SEQUENCE_COUNTS = (256, 32, 2)
COMPILE_CHECK_TOKENS = (64, 300, 1000)  # the second shows whether the count is a variable


class HostStream:
    """Copies and waits of the CPU, where every tensor is on the host already."""

    is_cuda = False

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Make the device and its stream this thread's own for a while."""
        with torch.inference_mode():
            yield

    def upload(self, array: Int32Array) -> torch.Tensor:
        """A copy of *array* on the device; the caller does not touch *array* again."""
        return torch.from_numpy(array)

    def overwrite(self, tensor: torch.Tensor, array: Int32Array) -> None:
        """Copy *array* over *tensor*, in the stream's order."""
        tensor.copy_(torch.from_numpy(array))

    def download(
        self, tensors: Mapping[str, torch.Tensor]
    ) -> Callable[[], dict[str, NDArray[Any]]]:
        """Start copies to the host. The function returned blocks until they are there."""
        return lambda: {name: tensor.numpy() for name, tensor in tensors.items()}

    def synchronize(self) -> None:
        """Wait for all work of the device. Raises `RuntimeError` when it is lost."""

    def free_bytes(self) -> int | None:
        """Memory left on the device; None where that is unknown."""
        return None

    def trim(self) -> None:
        """Give cached memory back to the device."""


class CudaStream(HostStream):
    """Pinned, asynchronous copies of one CUDA device.

    Launches go to one stream, in the order in which they are made; results travel on a second one,
    so that a large one does not hold up the next batch. Host memory comes from torch's cache of
    pinned blocks, which waits for the copies that use a block before it lends the block again.
    """

    is_cuda = True

    def __init__(self, index: int) -> None:
        self.device = torch.device("cuda", index)
        self.launches = torch.cuda.Stream(self.device)
        self._results = torch.cuda.Stream(self.device)

    @contextmanager
    def entered(self) -> Iterator[None]:
        with (
            torch.inference_mode(),
            torch.cuda.device(self.device),
            torch.cuda.stream(self.launches),
        ):
            yield

    def upload(self, array: Int32Array) -> torch.Tensor:
        return torch.from_numpy(array).pin_memory().to(self.device, non_blocking=True)

    def overwrite(self, tensor: torch.Tensor, array: Int32Array) -> None:
        tensor.copy_(torch.from_numpy(array).pin_memory(), non_blocking=True)

    def download(
        self, tensors: Mapping[str, torch.Tensor]
    ) -> Callable[[], dict[str, NDArray[Any]]]:
        self._results.wait_stream(self.launches)
        hosted = {}
        with torch.cuda.stream(self._results):
            for name, tensor in tensors.items():
                hosted[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                hosted[name].copy_(tensor, non_blocking=True)
                tensor.record_stream(self._results)
            # A blocking event lets the thread sleep: spinning would take a core from tokenisers.
            arrived = torch.cuda.Event(blocking=True)
            arrived.record()

        def wait() -> dict[str, NDArray[Any]]:
            arrived.synchronize()
            return {name: tensor.numpy() for name, tensor in hosted.items()}

        return wait

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def free_bytes(self) -> int | None:
        return int(torch.cuda.mem_get_info(self.device)[0])

    def trim(self) -> None:
        torch.cuda.empty_cache()


def round_tokens(tokens: int) -> int:
    """The token count a graph is captured for: filler at most 1/4 above 256, doubling below.

    Below some 500 tokens a Hopper spends its time on reading weights and on launches, so that
    filler costs next to nothing there.
    """
    doubled = 1 << (tokens - 1).bit_length()
    if tokens <= 256:
        return max(32, doubled)
    step = max(doubled // 8, 64)
    return -(-tokens // step) * step


def graph_shapes(tokens_max: int) -> list[BatchShape]:
    """Every shape to capture, largest first, so that the later ones fit in the first one's memory."""
    rounded = {round_tokens(tokens) for tokens in range(1, tokens_max + 1)}
    return [
        BatchShape(token_count, sequence_count)
        for token_count in sorted(rounded, reverse=True)
        for sequence_count in GRAPH_SEQUENCE_COUNTS
        if token_count <= tokens_max and sequence_count <= token_count // 2
    ]


@dataclass(frozen=True, slots=True)
class CapturedPass:
    graph: torch.cuda.CUDAGraph
    buffer: torch.Tensor  # int32, what the graph reads
    packed: PackedBatch  # views of it
    hidden: torch.Tensor  # [tokens, hidden], what the graph writes; whole until the next replay


class CudaGraphs:
    """Encoder passes of small shapes, each captured once and replayed as one launch.

    A small batch's kernels are shorter than their launches. Used by one thread at a time, on the
    launches' stream.
    """

    def __init__(self, encoder: Encoder, shapes: list[BatchShape], stream: CudaStream) -> None:
        """Capture *encoder* at each of *shapes*, largest first, while nothing else uses the device.
        Raises what torch raises where a kernel cannot be captured.
        """
        self._stream = stream
        self._captured: dict[BatchShape, CapturedPass] = {}
        pool = None
        for shape in shapes:
            # Kernels take the longest length as a plain number: one sequence is the worst case.
            words, lengths = dummy_batch(shape, sequence_count=1)
            buffer = stream.upload(words)
            packed = PackedBatch.view(buffer, lengths)
            encoder(packed)  # libraries pick kernels and reserve memory on first use
            stream.launches.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream.launches):
                hidden = encoder(packed)
            # One pool for all: they run one after the other, and each hidden is kept alive.
            pool = graph.pool()
            self._captured[shape] = CapturedPass(graph, buffer, packed, hidden)

    @property
    def shapes(self) -> list[BatchShape]:
        return list(self._captured)

    def shape_for(self, token_count: int, sequence_count: int) -> BatchShape | None:
        """The captured shape that wastes least on a batch; None when none holds it."""
        fitting = [
            shape
            for shape in self._captured
            if shape.token_count >= token_count
            and shape.sequence_count >= sequence_count + (shape.token_count > token_count)
        ]
        return min(fitting, key=lambda one: (one.token_count, one.sequence_count), default=None)

    def replay(self, shape: BatchShape, words: Int32Array) -> tuple[PackedBatch, torch.Tensor]:
        """The batch that was packed to *shape*, on the device, and its hidden states."""
        captured = self._captured[shape]
        self._stream.overwrite(captured.buffer, words)
        captured.graph.replay()
        return captured.packed, captured.hidden


def capture_graphs(
    encoder: Encoder, stream: HostStream, *, tokens_max: int | None
) -> tuple[CudaGraphs | None, str]:
    """Graphs of batches up to *tokens_max*, compared with the plain encoder; or None, and why."""
    if not isinstance(stream, CudaStream):
        return None, "no: not on a CUDA device"
    if not encoder.attention.is_capturable:
        return None, f"no: {encoder.attention.name} attention prepares each batch on the host"
    tokens_max = GRAPH_TOKENS_MAX if tokens_max is None else tokens_max
    if tokens_max == 0:
        return None, "no: not asked for"
    try:
        graphs = CudaGraphs(encoder, graph_shapes(tokens_max), stream)
    except REFUSALS as error:
        return None, f"no: {summary_of(error)}"
    smallest = graphs.shapes[-1]
    words, lengths = dummy_batch(smallest, sequence_count=2)
    packed = PackedBatch.view(stream.upload(words), lengths)
    fault = fault_of(lambda: graphs.replay(smallest, words)[1], lambda: encoder(packed))
    if fault is not None:
        return None, f"no: {fault}"
    return graphs, f"{len(graphs.shapes)} shapes, up to {tokens_max} tokens"


def compile_blocks(
    encoder: Encoder, stream: HostStream, *, asked: bool | None
) -> tuple[RunBlock, str]:
    """How blocks run, compiled where that is *asked* for or wins; and why."""
    if asked is False:
        return run_block, "no: not asked for"
    if asked is None and not stream.is_cuda:
        return run_block, "no: on CPUs the matrix products leave nothing to win"
    if stream.is_cuda and importlib.util.find_spec("triton") is None:
        return run_block, "no: triton is not installed"
    # The token count is the only variable. With `dynamic=True` the weights' sizes, and LayerNorm's
    # eps, would be as well: kernels could not know how long the rows are that they sum.
    compiled = torch.compile(run_block)

    def run_compiled(
        function: Block, weights: Weights, dtype: torch.dtype, *values: object
    ) -> torch.Tensor:
        for value in values:
            if isinstance(value, torch.Tensor):
                torch._dynamo.maybe_mark_dynamic(value, 0)
        return compiled(function, weights, dtype, *values)

    plain = replace(encoder, attention=ReferenceAttention())
    fast = replace(plain, run_block=run_compiled)
    token_count_max = encoder.config.token_count_max
    for count in sorted({min(count, token_count_max) for count in COMPILE_CHECK_TOKENS}):
        words, lengths = dummy_batch(BatchShape(count, 1), sequence_count=1)
        packed = PackedBatch.view(stream.upload(words), lengths)
        fault = fault_of(lambda: fast(packed), lambda: plain(packed))  # noqa: B023 - called at once
        if fault is not None:
            return run_block, f"no: {fault}"
    return run_compiled, "yes"


def dummy_batch(shape: BatchShape, *, sequence_count: int) -> tuple[Int32Array, tuple[int, ...]]:
    """A packed batch of *shape* without filler: sequences of about one length, small ids.

    All positions are 0, since a shape may have more tokens than the model has positions.
    """
    cu_seqlens = np.linspace(0, shape.token_count, sequence_count + 1).astype(np.int32)
    token_ids = np.arange(shape.token_count, dtype=np.int32) % 5
    batch = Batch(token_ids, cu_seqlens, np.full(sequence_count, Output.DENSE, np.uint8))
    words, lengths = pack(batch, position_offset=0, shape=shape)
    words[shape.token_count : 2 * shape.token_count] = 0
    return words, lengths
