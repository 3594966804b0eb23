"""Launches: streams to a device, encoder passes captured as CUDA graphs, and compiled blocks.

Graphs and compiled blocks are compared at start with the plain encoder, on the device itself.
"""

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trivec.backends.torch.attention import REFERENCE, REFUSALS, fault_of, summary_of
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


class DeviceStream:
    """Launches and copies of one device: asynchronous on CUDA; on a CPU there is nothing to do.

    Launches go to one stream, in the order in which they are made; results travel on a second one,
    so that a large one does not hold up the next batch. Host memory comes from torch's cache of
    pinned blocks, which waits for the copies that use a block before it lends the block again.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_cuda = device.type == "cuda"
        if self.is_cuda:
            self.launches = torch.cuda.Stream(device)
            self._results = torch.cuda.Stream(device)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Make the device and its stream this thread's own for a while."""
        with torch.inference_mode(), ExitStack() as stack:
            if self.is_cuda:
                stack.enter_context(torch.cuda.device(self.device))
                stack.enter_context(torch.cuda.stream(self.launches))
            yield

    def upload(self, array: Int32Array) -> Tensor:
        """*array* on the device; the caller does not touch *array* again."""
        tensor = torch.from_numpy(array)
        if self.is_cuda:
            tensor = tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor

    def overwrite(self, tensor: Tensor, array: Int32Array) -> None:
        """Copy *array* over *tensor*, in the order of the launches."""
        tensor.copy_(torch.from_numpy(array).pin_memory(), non_blocking=True)

    def download(self, tensors: Mapping[str, Tensor]) -> Callable[[], dict[str, NDArray[Any]]]:
        """Start copies to the host. The function returned blocks until they are there."""
        if not self.is_cuda:
            arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
            return lambda: arrays
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
        """Wait for all work of the device. Raises `RuntimeError` when it is lost."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def free_bytes(self) -> int | None:
        """Memory left on the device; None where that is unknown."""
        return int(torch.cuda.mem_get_info(self.device)[0]) if self.is_cuda else None

    def trim(self) -> None:
        """Give cached memory back to the device."""
        if self.is_cuda:
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


def choose_shape(
    token_count: int, sequence_count: int, shapes: Iterable[BatchShape]
) -> BatchShape | None:
    """The one of *shapes* that wastes least on a batch; None when none holds it."""
    fitting = [
        shape
        for shape in shapes
        if shape.token_count >= token_count
        and shape.sequence_count >= sequence_count + (shape.token_count > token_count)
    ]
    return min(fitting, key=lambda one: (one.token_count, one.sequence_count), default=None)


@dataclass(frozen=True, slots=True)
class CapturedPass:
    graph: torch.cuda.CUDAGraph
    buffer: Tensor  # int32, what the graph reads
    packed: PackedBatch  # views of it
    hidden: Tensor  # [tokens, hidden], what the graph writes; whole until the next replay


class CudaGraphs:
    """Encoder passes of small shapes, each captured once and replayed as one launch.

    A small batch's kernels are shorter than their launches. Used by one thread at a time, on the
    launches' stream.
    """

    def __init__(self, encoder: Encoder, shapes: list[BatchShape], stream: DeviceStream) -> None:
        """Capture *encoder* at each of *shapes*, largest first, while nothing else uses the device.
        Raises what torch raises where a kernel cannot be captured.
        """
        self._stream = stream
        self.captured: dict[BatchShape, CapturedPass] = {}
        pool = None
        for shape in shapes:
            # Kernels take the longest length as a plain number: one sequence is the worst case.
            buffer, lengths = dummy_batch(shape, sequence_count=1)
            on_device = stream.upload(buffer)
            packed = PackedBatch.view(on_device, lengths)
            encoder(packed)  # libraries pick kernels and reserve memory on first use
            stream.launches.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream.launches):
                hidden = encoder(packed)
            # One pool for all: they run one after the other, and each hidden is kept alive.
            pool = graph.pool()
            self.captured[shape] = CapturedPass(graph, on_device, packed, hidden)

    def replay(self, shape: BatchShape, buffer: Int32Array) -> tuple[PackedBatch, Tensor]:
        """The batch that was packed to *shape*, on the device, and its hidden states."""
        captured = self.captured[shape]
        self._stream.overwrite(captured.buffer, buffer)
        captured.graph.replay()
        return captured.packed, captured.hidden


def capture_graphs(
    encoder: Encoder, stream: DeviceStream, *, tokens_max: int | None
) -> tuple[CudaGraphs | None, str]:
    """Graphs of batches up to *tokens_max*, compared with the plain encoder; or None, and why."""
    if not stream.is_cuda:
        return None, "no: not on a CUDA device"
    if not encoder.attention.is_capturable:
        return None, f"no: {encoder.attention.name} attention lays each batch out anew on the host"
    tokens_max = GRAPH_TOKENS_MAX if tokens_max is None else tokens_max
    if tokens_max == 0:
        return None, "no: not asked for"
    try:
        graphs = CudaGraphs(encoder, graph_shapes(tokens_max), stream)
    except REFUSALS as error:
        return None, f"no: {summary_of(error)}"
    *_, smallest = graphs.captured
    buffer, lengths = dummy_batch(smallest, sequence_count=2)
    packed = PackedBatch.view(stream.upload(buffer), lengths)
    fault = fault_of(lambda: graphs.replay(smallest, buffer)[1], lambda: encoder(packed))
    if fault is not None:
        return None, f"no: {fault}"
    return graphs, f"{len(graphs.captured)} shapes, up to {tokens_max} tokens"


def compile_blocks(
    encoder: Encoder, stream: DeviceStream, *, asked: bool | None
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
    ) -> Tensor:
        for value in values:
            if isinstance(value, Tensor):
                torch._dynamo.maybe_mark_dynamic(value, 0)
        return compiled(function, weights, dtype, *values)

    plain = replace(encoder, attention=REFERENCE)
    fast = replace(plain, run_block=run_compiled)
    token_count_max = encoder.config.token_count_max
    for count in sorted({min(count, token_count_max) for count in COMPILE_CHECK_TOKENS}):
        buffer, lengths = dummy_batch(BatchShape(count, 1), sequence_count=1)
        packed = PackedBatch.view(stream.upload(buffer), lengths)
        fault = fault_of(partial(fast, packed), partial(plain, packed))
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
    buffer, lengths = pack(batch, position_offset=0, shape=shape)
    buffer[shape.token_count : 2 * shape.token_count] = 0
    return buffer, lengths
