"""The torch backend: models on their devices, memory that ran out, devices that are lost."""

import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trivec.backends.torch.attention import REFERENCE, choose_attention
from trivec.backends.torch.device import (
    TorchOptions,
    choose_device,
    choose_precision,
    find_devices,
    token_budget,
)
from trivec.backends.torch.graphs import (
    CudaGraphs,
    DeviceStream,
    capture_graphs,
    choose_shape,
    compile_blocks,
)
from trivec.backends.torch.heads import DeviceHeads
from trivec.backends.torch.ops import DTYPES, Encoder, PackedBatch, load_encoder, pack, run_block
from trivec.checkpoints.checkpoint import Checkpoint
from trivec.core.errors import DeviceLost, SettingInvalid
from trivec.core.types import Batch, BatchBudget, Vectors
from trivec.models.registry import plan_of

AUTOMATIC = TorchOptions()
CPU = torch.device("cpu")
# cudaErrorMemoryAllocation, as cuBLAS and the driver word it when they, not torch, ran out.
OUT_OF_MEMORY_WORDS = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory")


class DeviceModel:
    """A model on one device: a batch goes up, is launched without waiting, comes back as vectors.

    Several threads may call `run`. Their launches take turns under a lock and go to one stream, so
    the next batch is packed and queued while the device still works on the one before it.
    """

    def __init__(
        self,
        encoder: Encoder,
        heads: DeviceHeads,
        stream: DeviceStream,
        *,
        graphs: CudaGraphs | None = None,
        notes: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.encoder = encoder
        self.stream = stream
        self.graphs = graphs
        self.notes = notes  # which fast paths run, and why not the others
        self._heads = heads
        self._launch_lock = threading.Lock()

    @classmethod
    def load(
        cls, checkpoint: Checkpoint, stream: DeviceStream, *, precision: str, options: TorchOptions
    ) -> "DeviceModel":
        """Load *checkpoint* and check every fast path. Raises `CheckpointRefused`."""
        dtype = DTYPES[precision]
        with stream.entered():
            encoder = load_encoder(checkpoint, device=stream.device, dtype=dtype)
            attention, attention_note = choose_attention(
                options.attention,
                plan_of(checkpoint.config).attention,
                like=torch.empty(0, dtype=dtype, device=stream.device),
                has_packed=stream.is_cuda and precision != "fp32",
            )
            blocks, blocks_note = compile_blocks(encoder, stream, asked=options.compiled)
            encoder = replace(encoder, attention=attention, run_block=blocks)
            heads = DeviceHeads(checkpoint, stream.device)
            graphs, graphs_note = capture_graphs(
                encoder, stream, tokens_max=options.graph_tokens_max
            )
        notes = {"attention": attention_note, "compiled": blocks_note, "cuda_graphs": graphs_note}
        return cls(encoder, heads, stream, graphs=graphs, notes=notes)

    def load_exact(self, checkpoint: Checkpoint) -> "DeviceModel":
        """The model in fp32 by the plain paths: on its device, or on the CPU for want of memory.

        Shares the weights where they are fp32 already.
        """
        if self.encoder.dtype is torch.float32:
            plain = replace(self.encoder, attention=REFERENCE, run_block=run_block)
            return DeviceModel(plain, self._heads, self.stream)
        self.stream.trim()  # what is cached for batches counts as taken otherwise
        free_bytes = self.stream.free_bytes()
        fp32_bytes = sum(4 * int(tensor.numel()) for tensor in self.encoder.weights.values())
        has_room = free_bytes is not None and 2 * fp32_bytes < free_bytes
        stream = self.stream if has_room else DeviceStream(CPU)
        with stream.entered():
            plain = load_encoder(checkpoint, device=stream.device, dtype=torch.float32)
            return DeviceModel(plain, DeviceHeads(checkpoint, stream.device), stream)

    def run(self, batch: Batch) -> Vectors:
        """Vectors of *batch*; blocks until they are on the host. Raises what torch raises."""
        config = self.encoder.config
        # Only a mistake of ours sends these down, and one bad index takes a CUDA device with it.
        assert np.diff(batch.cu_seqlens).max() <= config.token_count_max, "a text is too long"
        assert batch.token_ids.min() >= 0, "a token id is below the vocabulary"
        assert batch.token_ids.max() < config.vocab_size, "a token id is beyond it"
        with self._launch_lock, self.stream.entered():
            wait = self._launch(batch)
        return self._heads.vectors(wait(), batch)

    def _launch(self, batch: Batch) -> Callable[[], Mapping[str, NDArray[Any]]]:
        """Launch all work of *batch*. The function returned blocks until its results are here.

        It holds no memory of the device: the stream's next batch may have it at once.
        """
        seen_lengths = self._heads.seen_lengths(batch)
        captured = () if self.graphs is None or seen_lengths else self.graphs.captured
        shape = choose_shape(batch.token_count, len(batch), captured)
        position_offset = self.encoder.config.position_offset
        buffer, lengths = pack(batch, position_offset=position_offset, shape=shape)
        if self.graphs is not None and shape is not None:
            packed, hidden = self.graphs.replay(shape, buffer)
        else:
            packed = PackedBatch.view(self.stream.upload(buffer), lengths, seen_lengths)
            hidden = self.encoder(packed)
        return self.stream.download(self._heads.launch(hidden, packed, batch, self.stream.upload))


class TorchBackend:
    """A `core.ports.Backend` on CUDA devices or the CPU.

    Slots go round the devices: with two devices, slots 0 and 2 are on the first. Two slots of a
    device share its stream: while one batch runs, the next is packed and its launches queue behind
    it, so that the device does not wait for the host. `notes` says what was chosen and why.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        models: Sequence[DeviceModel],
        *,
        slots_per_device: int,
        budget: BatchBudget,
        precision: str,
        notes: Mapping[str, str],
    ) -> None:
        self.precision = precision
        self.notes = notes
        self._checkpoint = checkpoint
        self._models = list(models)
        self._slots_per_device = slots_per_device
        self._budget = budget
        self._exact: dict[int, DeviceModel] = {}  # by index into _models
        self._loading_exact = threading.Lock()
        self._lost: dict[torch.device, str] = {}

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        *,
        precision: str,
        device: str,
        options: TorchOptions = AUTOMATIC,
    ) -> "TorchBackend":
        """Load *checkpoint*: *precision* "auto", "fp32", "bf16" or "fp16"; *device* "auto", "cpu",
        "cuda" (all of them) or "cuda:N". Raises `SettingInvalid`, `CheckpointRefused`.
        """
        hardware = find_devices()
        chosen = choose_device(device, hardware)
        asked, fp32_reason = precision, checkpoint.config.fp32_reason
        precision, precision_reason = choose_precision(asked, chosen, hardware)
        if asked == "auto" and precision != "fp32" and fp32_reason is not None:
            precision, precision_reason = "fp32", f"auto: fp32, since {fp32_reason}"
        # These are the process's own: fp32 means fp32, and sums of half-precision products are
        # never rounded in between.
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False

        on_cuda = chosen.device == "cuda"
        devices = [torch.device("cuda", index) for index in chosen.indices] or [CPU]
        models = [
            DeviceModel.load(checkpoint, DeviceStream(one), precision=precision, options=options)
            for one in devices
        ]
        budgets = (
            token_budget(
                checkpoint.config,
                tokens_max=options.tokens_max,
                cuda=on_cuda,
                free_bytes=model.stream.free_bytes(),
            )
            for model in models
        )
        backend = cls(
            checkpoint,
            models,
            slots_per_device=options.slots_per_device or (2 if on_cuda else 1),
            budget=min(budgets, key=lambda budget: budget.tokens_max),
            precision=precision,
            notes={"device": chosen.reason, "precision": precision_reason, **models[0].notes},
        )
        # What costs more the first time is run now, and a budget that does not fit is learned.
        longest = checkpoint.token_count_max
        for model in models:
            for length in (longest, 512, 16) if on_cuda else (16,):
                backend._warm_up(model, min(length, longest))
        return backend

    @property
    def slot_count(self) -> int:
        return len(self._models) * self._slots_per_device

    @property
    def budget(self) -> BatchBudget:
        return self._budget

    def run(self, batch: Batch, *, slot: int) -> Vectors:
        """See `core.ports.Backend`. Raises `MemoryError` for a batch that does not fit, after which
        a smaller one may; `DeviceLost` when no batch will, and from then on always.
        """
        model = self._models[slot % len(self._models)]
        with self._translating(model):
            return model.run(batch)

    def run_exact(self, batch: Batch, *, slot: int) -> Vectors:
        """`run` in fp32 by the plain paths. The first call reads the weights again."""
        index = slot % len(self._models)
        with self._loading_exact:
            if index not in self._exact:
                with self._translating(self._models[index]):
                    self._exact[index] = self._models[index].load_exact(self._checkpoint)
        with self._translating(self._exact[index]):
            return self._exact[index].run(batch)

    def close(self) -> None:
        streams = [model.stream for model in self._models]
        self._models.clear()
        self._exact.clear()
        for stream in streams:
            stream.trim()

    def _warm_up(self, model: DeviceModel, length: int) -> None:
        """Run a full batch of sequences of *length*, halving the budget until one fits."""
        while True:
            budget = self._budget
            count = max(min(budget.tokens_max // length, budget.sequences_max), 1)
            batch = Batch(
                token_ids=np.zeros(count * length, np.int32),
                cu_seqlens=np.arange(count + 1, dtype=np.int32) * length,
                outputs=np.full(count, self._checkpoint.outputs, np.uint8),
            )
            try:
                with self._translating(model):
                    model.run(batch)
            except MemoryError as error:
                if count == 1:
                    raise SettingInvalid(
                        f"{model.stream.device} has no memory for one text of {length} tokens; "
                        "free some, or use another --device"
                    ) from error
                tokens_max = min(budget.tokens_max, batch.token_count // 2)
                self._budget = replace(budget, tokens_max=tokens_max)
            else:
                return

    @contextmanager
    def _translating(self, model: DeviceModel) -> Iterator[None]:
        """Turn what the driver raises into `MemoryError` and `DeviceLost`."""
        device = model.stream.device
        if device in self._lost:
            raise DeviceLost(self._lost[device])
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or any(
                words in str(error) for words in OUT_OF_MEMORY_WORDS
            ):
                # Its frames hold the batch's tensors: kept, they would starve the halves as well.
                traceback.clear_frames(error.__traceback__)
                raise MemoryError(f"{device} is out of memory") from error
            # A device-side assert, an illegal address or an uncorrectable memory error stays with
            # the process: every later call fails with it. So the device is asked, rather than the
            # many codes and wordings matched.
            try:
                model.stream.synchronize()
            except RuntimeError as lasting:
                first_line = str(lasting).partition("\n")[0]
                self._lost[device] = f"the device {device} is lost: {first_line}"
                raise DeviceLost(self._lost[device]) from error
            raise
