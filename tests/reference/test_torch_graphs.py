# ruff: noqa: E402 - what is imported below needs what is asked for above it
"""What a CUDA device would run, on the CPU: capture and replay in their order, kernels by their twins.

A captured pass is stood in for by the encoder itself, run again at every replay into the memory
that was captured. Streams and pinned memory are CUDA's own, and are tested where there is a GPU.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the torch backend needs torch")
pytest.importorskip("transformers", reason="the reference is transformers")

from tests.reference.torch_checkpoint import (
    ALL,
    XLM_ROBERTA,
    Tiny,
    random_batch,
    varlen_on_cpu,
    write_tiny,
)

from trivec.backends.torch import attention as attention_module
from trivec.backends.torch import backend as backend_module
from trivec.backends.torch.attention import PLAIN_KERNELS, packed_attention
from trivec.backends.torch.backend import TorchBackend
from trivec.backends.torch.device import CudaDevice, Hardware, TorchOptions
from trivec.backends.torch.graphs import DeviceStream, choose_shape, graph_shapes, round_tokens
from trivec.backends.torch.ops import BatchShape, Encoder, PackedBatch, pack
from trivec.core.types import Output, Vectors

pytestmark = pytest.mark.reference

H200 = Hardware((CudaDevice("NVIDIA H200", (9, 0)),))
OPTIONS = TorchOptions(tokens_max=1_024, graph_tokens_max=256)
CONFIG = replace(XLM_ROBERTA, max_position_embeddings=514)  # the longest text is warmed up with


class FakeStream(DeviceStream):
    """The stream of a CUDA device that is the CPU: each copy is one, and nothing is asynchronous."""

    def __init__(self, device: object) -> None:
        super().__init__(torch.device("cpu"))
        self.is_cuda = device != self.device
        self.launches = self
        self.is_trimmed = False

    def entered(self) -> Any:
        return torch.inference_mode()

    def upload(self, array: Any) -> Any:
        return torch.tensor(array)

    def overwrite(self, tensor: Any, array: Any) -> None:
        tensor.copy_(torch.from_numpy(array))

    def download(self, tensors: Any) -> Any:
        arrays = {name: tensor.numpy().copy() for name, tensor in tensors.items()}
        return lambda: arrays

    def synchronize(self) -> None:
        return

    def free_bytes(self) -> int | None:
        """What is left beside weights; caches of batches count as taken until they are trimmed."""
        return (100 << 30) if self.is_trimmed else 0

    def trim(self) -> None:
        self.is_trimmed = True


class Captures:
    """Stands in for `torch.cuda.CUDAGraph` and `torch.cuda.graph`."""

    def __init__(self) -> None:
        self.under_way: Graph | None = None
        self.made: list[Graph] = []
        self.spoil: Callable[[Any], None] = lambda hidden: None

    def graph(self) -> "Graph":
        return Graph(self)

    @contextmanager
    def capturing(self, graph: "Graph", *, pool: object, stream: object) -> Iterator[None]:
        assert isinstance(stream, FakeStream), "on the device's own stream"
        assert pool is (self if self.made else None), "one pool for all"
        self.under_way = graph
        yield
        self.under_way = None
        self.made.append(graph)

    def encode(self, plain: Callable[[Encoder, PackedBatch], Any]) -> Callable[..., Any]:
        def encode(encoder: Encoder, packed: PackedBatch) -> Any:
            hidden = plain(encoder, packed)
            if self.under_way is not None:
                self.under_way.record(lambda: plain(encoder, packed), hidden)
            return hidden

        return encode


class Graph:
    def __init__(self, captures: Captures) -> None:
        self._captures = captures
        self.replays = 0

    def record(self, again: Callable[[], Any], hidden: Any) -> None:
        self._again, self._hidden = again, hidden

    def pool(self) -> Captures:
        return self._captures

    def replay(self) -> None:
        self.replays += 1
        for other in self._captures.made:  # which share the memory: theirs is gone
            if other is not self:
                other._hidden.fill_(torch.nan)
        self._hidden.copy_(self._again())
        self._captures.spoil(self._hidden)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return write_tiny(tmp_path_factory.mktemp("tiny"), CONFIG)


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Captures:
    made = Captures()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", made.graph)
    monkeypatch.setattr(torch.cuda, "graph", made.capturing)
    monkeypatch.setattr(Encoder, "__call__", made.encode(Encoder.__call__))
    monkeypatch.setattr(backend_module, "DeviceStream", FakeStream)
    monkeypatch.setattr(backend_module, "find_devices", lambda: H200)
    kernels = {
        "varlen": (packed_attention("varlen", varlen_on_cpu, num_splits=1),),
        "grouped": (PLAIN_KERNELS["grouped"],),
    }
    monkeypatch.setattr(attention_module, "kernels_named", lambda name: kernels.get(name, ()))
    return made


def loaded(tiny: Tiny, options: TorchOptions = OPTIONS) -> TorchBackend:
    return TorchBackend.load(tiny.checkpoint, precision="auto", device="cuda:0", options=options)


def assert_near(found: Vectors, expected: Vectors) -> None:
    assert ((found.dense * expected.dense).sum(1) >= 0.9995).all()
    for rows, their_rows in zip(found.multi, expected.multi, strict=True):
        assert rows is not None
        assert their_rows is not None
        assert ((rows * their_rows).sum(1) >= 0.9995).all()
    for one, other in zip(found.sparse, expected.sparse, strict=True):
        assert one is not None
        assert other is not None
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
        np.testing.assert_allclose(one.weights, other.weights, atol=0.05)


def test_replayed_batches_have_the_vectors_of_the_plain_path(
    tiny: Tiny, captures: Captures
) -> None:
    replayed, plain = loaded(tiny), loaded(tiny, TorchOptions(tokens_max=1_024, graph_tokens_max=0))
    assert replayed.notes["attention"].startswith("varlen")
    assert replayed.notes["cuda_graphs"] == f"{len(captures.made)} shapes, up to 256 tokens"
    assert plain.notes["cuda_graphs"] == "no: not asked for"
    before = sum(graph.replays for graph in captures.made)
    batches = [[3], [5, 9, 30], [200, 30], [7] * 30, [31], [32], [128, 128], [255], [256], [100, 2]]
    for i, lengths in enumerate(batches):
        batch = random_batch(lengths, CONFIG, ALL, seed=i)
        assert_near(replayed.run(batch, slot=i % 2), plain.run(batch, slot=i % 2))
    assert sum(graph.replays for graph in captures.made) == before + len(batches)


def test_a_batch_beyond_every_graph_runs_by_itself(tiny: Tiny, captures: Captures) -> None:
    backend = loaded(tiny)
    before = sum(graph.replays for graph in captures.made)
    for lengths in ([257], [1] * 256):
        assert len(backend.run(random_batch(lengths, CONFIG), slot=0)) == len(lengths)
    assert sum(graph.replays for graph in captures.made) == before


def test_each_shape_is_captured_once_the_largest_first(tiny: Tiny, captures: Captures) -> None:
    backend = loaded(tiny)
    graphs = backend._models[0].graphs
    assert graphs is not None
    sizes = [shape.token_count for shape in graphs.captured]
    assert sizes == sorted(sizes, reverse=True)
    assert list(graphs.captured) == graph_shapes(256)
    assert len(graphs.captured) == len(captures.made)


def test_a_kernel_that_cannot_be_captured_leaves_the_plain_path(
    tiny: Tiny, captures: Captures, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: object, **__: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "graph", refuses)
    backend = loaded(tiny)
    assert backend.notes["cuda_graphs"].startswith("no: it raised RuntimeError: operation not")
    assert len(backend.run(random_batch([5], CONFIG), slot=0)) == 1


def test_a_replay_with_other_numbers_is_not_used(tiny: Tiny, captures: Captures) -> None:
    captures.spoil = lambda hidden: hidden[1].neg_()
    backend = loaded(tiny)
    assert "its rows differ from the plain form's" in backend.notes["cuda_graphs"]
    assert backend._models[0].graphs is None


def test_a_row_that_leaves_a_graph_not_finite_is_mended_in_fp32(
    tiny: Tiny, captures: Captures
) -> None:
    backend = loaded(tiny)
    captures.spoil = lambda hidden: hidden[2].fill_(torch.inf)
    batch = random_batch([2, 7], CONFIG, Output.DENSE)
    assert np.isfinite(backend.run(batch, slot=0).dense).all(axis=1).tolist() == [True, False]
    assert np.isfinite(backend.run_exact(batch, slot=0).dense).all()
    assert backend._exact[0].stream is backend._models[0].stream, (
        "the device has room for fp32 weights"
    )


def test_fp32_weights_without_room_on_the_device_go_to_the_cpu(
    tiny: Tiny, captures: Captures, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeStream, "trim", lambda _: None)
    backend = loaded(tiny)
    batch = random_batch([2, 7], CONFIG, ALL)
    assert_near(backend.run_exact(batch, slot=0), backend.run(batch, slot=0))
    assert not backend._exact[0].stream.is_cuda


def test_rounded_tokens_hold_the_batch_with_little_filler() -> None:
    for tokens in range(1, 2049):
        rounded = round_tokens(tokens)
        assert tokens <= rounded <= max(32, 2 * tokens)
        assert tokens <= 256 or rounded - tokens < rounded / 4


def test_a_shape_fits_every_small_batch_and_no_large_one() -> None:
    shapes = graph_shapes(512)
    assert shapes[0].token_count == 512
    assert choose_shape(12, 1, shapes) == BatchShape(32, 2)
    assert choose_shape(512, 2, shapes) == BatchShape(512, 2)
    assert choose_shape(511, 2, shapes) == BatchShape(512, 32), "filler is a sequence of its own"
    assert choose_shape(513, 1, shapes) is None
    assert choose_shape(512, 257, shapes) is None


def test_a_packed_batch_counts_positions_from_the_offset_in_every_sequence() -> None:
    batch = random_batch([2, 3], CONFIG)
    buffer, lengths = pack(batch, position_offset=2, shape=BatchShape(8, 4))
    packed = PackedBatch.view(torch.from_numpy(buffer), lengths)
    assert packed.token_ids.tolist() == [*batch.token_ids.tolist(), 0, 0, 0]
    assert packed.positions.tolist() == [2, 3, 2, 3, 4, 0, 0, 0]
    assert packed.token_types.tolist() == [0] * 8
    assert packed.sequence_ids.tolist() == [0, 0, 1, 1, 1, 2, 2, 2]
    assert packed.cu_seqlens.tolist() == [0, 2, 5, 8, 8]
    assert packed.lengths == (2, 3, 3, 0)
