"""The torch backend: slots on devices, memory that ran out, devices that are lost.

It knows one model and its devices; not who asks, what waits, or the time.
"""

import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from trivec.backends.torch.building import Built, build, build_exact
from trivec.backends.torch.device import choose_device, choose_precision, find_devices
from trivec.backends.torch.faults import is_out_of_memory, why_lost
from trivec.backends.torch.layout import uniform_batch
from trivec.backends.torch.model import DeviceModel
from trivec.backends.torch.tuning import Tuning, smaller, token_budget
from trivec.checkpoints.checkpoint import Checkpoint
from trivec.core.errors import DeviceLost, SettingInvalid
from trivec.core.types import Batch, BatchBudget, Vectors

AUTOMATIC = Tuning()


class TorchBackend:
    """A `core.ports.Backend` on CUDA devices or the CPU.

    Slots go round the devices: with two devices, slots 0 and 2 are on the first. `notes` says what
    was chosen and why, by subject.
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
        tuning: Tuning = AUTOMATIC,
    ) -> "TorchBackend":
        """Load *checkpoint*: *precision* "auto", "fp32", "bf16" or "fp16"; *device* "auto", "cpu",
        "cuda" (all of them) or "cuda:N". Raises `SettingInvalid`, `CheckpointRefused`.
        """
        found = find_devices()
        where = choose_device(device, found)
        arithmetic = choose_precision(precision, where, found)
        # Both are the process's own: fp32 means fp32, and sums of half-precision products are
        # never rounded in between.
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False

        built = [
            build(checkpoint, precision=arithmetic.precision, cuda_index=index, tuning=tuning)
            for index in where.indices or (None,)
        ]
        on_cuda = where.device == "cuda"
        backend = cls(
            checkpoint,
            [one.model for one in built],
            slots_per_device=tuning.slots_per_device or (2 if on_cuda else 1),
            budget=_least_budget(built, checkpoint, tuning, cuda=on_cuda),
            precision=arithmetic.precision,
            notes={"device": where.reason, "precision": arithmetic.reason, **built[0].notes},
        )
        backend._warm_up()
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
        return self._run(batch, self._models[slot % len(self._models)])

    def run_exact(self, batch: Batch, *, slot: int) -> Vectors:
        """`run` in fp32 by the plain paths. The first call reads the weights again."""
        which = slot % len(self._models)
        with self._loading_exact:
            if which not in self._exact:
                with self._translating(self._models[which]):
                    self._exact[which] = build_exact(self._checkpoint, self._models[which])
        return self._run(batch, self._exact[which])

    def close(self) -> None:
        links = [model.link for model in self._models]
        self._models.clear()
        self._exact.clear()
        for link in links:
            link.trim()

    def _warm_up(self) -> None:
        """Run what costs more the first time, and learn now if the budget does not fit."""
        for model in self._models:
            length_max = self._checkpoint.token_count_max
            on_cuda = model.link.device.type == "cuda"
            for length in (length_max, 512, 16) if on_cuda else (16,):
                self._warm_with(min(length, length_max), model)

    def _warm_with(self, length: int, model: DeviceModel) -> None:
        """Run a full batch of sequences of *length*, halving the budget until one fits."""
        while True:
            batch = uniform_batch(length, self._budget, self._checkpoint.outputs)
            try:
                self._run(batch, model)
            except MemoryError as error:
                if len(batch) == 1:
                    raise SettingInvalid(
                        f"{model.link.device} has no memory for one text of {length} tokens; "
                        "free some, or use another --device"
                    ) from error
                self._budget = smaller(self._budget, batch.token_count)
            else:
                return

    def _run(self, batch: Batch, model: DeviceModel) -> Vectors:
        with self._translating(model):
            return model.run(batch)

    @contextmanager
    def _translating(self, model: DeviceModel) -> Iterator[None]:
        """Turn what the driver raises into `MemoryError` and `DeviceLost`."""
        device = model.link.device
        if device in self._lost:
            raise DeviceLost(self._lost[device])
        try:
            yield
        except RuntimeError as error:
            if is_out_of_memory(error):
                # Its frames hold the batch's tensors: kept, they would starve the halves as well.
                traceback.clear_frames(error.__traceback__)
                raise MemoryError(f"{device} is out of memory") from error
            said = why_lost(error, probe=model.link.probe)
            if said is None:
                raise
            self._lost[device] = f"the device {device} is lost: {said}"
            raise DeviceLost(self._lost[device]) from error


def _least_budget(
    built: Sequence[Built], checkpoint: Checkpoint, tuning: Tuning, *, cuda: bool
) -> BatchBudget:
    """The budget that every one of the devices can hold."""
    budgets = [
        token_budget(tuning, checkpoint.config, cuda=cuda, free_bytes=one.model.link.free_bytes())
        for one in built
    ]
    return min(budgets, key=lambda budget: budget.tokens_max)
