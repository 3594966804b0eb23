"""Backend for CPUs: one model, loaded in the precision asked for, run on slots of one thread each."""

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from trivec.backends.openvino import cache
from trivec.backends.openvino.calibrate import (
    COSINE_MEAN,
    COSINE_MIN,
    Calibration,
    QuantisedModel,
    best_int8,
)
from trivec.backends.openvino.packing import MICRO_BATCH_BUDGET, as_batch
from trivec.backends.openvino.quantise import FP32, INT8_SCHEMES, QuantScheme, make_tensors
from trivec.backends.openvino.session import Session, mappings_of, open_session, release_memory
from trivec.backends.openvino.trial import has_bf16
from trivec.checkpoints.checkpoint import Checkpoint
from trivec.core.errors import SettingInvalid
from trivec.core.ports import OnProgress, no_progress
from trivec.core.types import Batch, Sequences, Vectors

WARM_LENGTHS = (16, 32, 64, 128)
"""Tokens of the texts each slot runs before it is offered; other sizes cost 0.5 ms a layer once."""


class OpenVinoBackend:
    """A `core.ports.Backend` for CPUs."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        session: Session,
        scheme: QuantScheme,
        quantised: QuantisedModel | None,
    ) -> None:
        self.precision = scheme.precision
        """`fp32` or `int8`."""
        self.recipe = scheme.name
        """The exact name of the quantisation scheme, which `load` takes as its precision."""
        self.certificate = None if quantised is None else quantised.certificate
        """How near int8 is to fp32 for this model; None where int8 was never considered."""
        self.slot_count = session.slot_count
        self.budget = MICRO_BATCH_BUDGET
        self._checkpoint = checkpoint
        self._session: Session | None = session
        self._fp32_reference = None if quantised is None else quantised.references[FP32.name]
        self._exact_lock = threading.Lock()

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        *,
        precision: str,
        cores: int,
        cache_dir: Path,
        on_progress: OnProgress = no_progress,
    ) -> "OpenVinoBackend":
        """Read, quantise if asked, compile and warm up; blocks for seconds.

        *precision*: `fp32`, `int8`, `auto`, which takes int8 where it is faster and its certificate
        passes, or the name of an int8 scheme, which is refused where its certificate fails. The quantised model
        is kept under *cache_dir*. Raises `CheckpointRefused`, `SettingInvalid`.
        """
        quantised = None
        if precision != "fp32":
            quantised = _quantised(
                checkpoint,
                precision,
                slot_count=cores,
                cache_dir=cache_dir,
                on_progress=on_progress,
            )
        if quantised is not None and (
            precision != "auto"
            or (quantised.certificate.passes and quantised.certificate.is_faster)
        ):
            scheme, tensors, session = quantised.scheme, quantised.tensors, quantised.session
        else:
            quantised = quantised and replace(quantised, session=None)
            scheme, tensors, session = FP32, make_tensors(checkpoint, FP32), None
        if session is None:
            on_progress(f"{checkpoint.id}: compiling", None)
            reference = None if quantised is None else quantised.references.get(scheme.name)
            session = open_session(
                checkpoint, tensors, scheme, slot_count=cores, reference=reference
            )
        backend = cls(checkpoint, session, scheme, quantised)
        on_progress(f"{checkpoint.id}: warming up", None)
        backend._warm()
        release_memory(mappings_of(tensors.values()))
        return backend

    def run(self, batch: Batch, *, slot: int) -> Vectors:
        """See `core.ports.Backend`. A sequence's bits do not depend on its neighbours or place."""
        assert self._session is not None, "a batch after close"
        return self._session.run(batch, slot=slot)

    def run_exact(self, batch: Batch, *, slot: int) -> Vectors:
        """*batch* in fp32, from the checkpoint's files; seconds for a large model, one at a time.

        It is for the rare vector that was not finite, so no fp32 copy is kept for it.
        """
        if self.precision == "fp32":
            return self.run(batch, slot=slot)
        with self._exact_lock:
            tensors, reference = make_tensors(self._checkpoint, FP32), self._fp32_reference
            vectors = open_session(
                self._checkpoint, tensors, FP32, slot_count=1, reference=reference
            ).run(batch, slot=0)
            release_memory(())  # or malloc would keep 1.2 GB of BGE-M3
            return vectors

    def close(self) -> None:
        self._session = None

    def _warm(self) -> None:
        """Run one text of each of `WARM_LENGTHS` on every slot at once."""
        limit = self._checkpoint.token_count_max
        wanted = next(iter(self._checkpoint.outputs))

        def warm(slot: int) -> None:
            for length in sorted({min(length, limit) for length in WARM_LENGTHS}):
                self.run(as_batch(Sequences.pack([[0] * length]), wanted), slot=slot)

        with ThreadPoolExecutor(self.slot_count, "trivec-warm") as pool:
            list(pool.map(warm, range(self.slot_count)))


def _quantised(
    checkpoint: Checkpoint,
    precision: str,
    *,
    slot_count: int,
    cache_dir: Path,
    on_progress: OnProgress,
) -> QuantisedModel:
    """*checkpoint* in int8, from the cache or made now and put there.

    It is in the scheme called *precision*, or for `auto` and `int8` in the fastest that passes. What
    is kept for one never answers for the other. Raises `SettingInvalid` for a scheme that there is
    not, or whose certificate fails.
    """
    pinned = None if precision in ("auto", "int8") else _pinned(checkpoint, precision)
    name = "int8" if pinned is None else pinned.name
    folder = cache.cache_folder(checkpoint, precision=name, cache_dir=cache_dir)
    if (kept := cache.load(folder, on_progress)) is not None:
        return kept
    writer = cache.CacheWriter(folder)
    if pinned is None:
        made = best_int8(
            checkpoint, slot_count=slot_count, keep=writer.keep, on_progress=on_progress
        )
    else:
        calibration = Calibration(
            checkpoint, slot_count=slot_count, keep=writer.keep, on_progress=on_progress
        )
        made = calibration.attempt(pinned)
    if pinned is None or made.certificate.passes:
        writer.save(made)
        return made
    shutil.rmtree(folder, ignore_errors=True)  # another start may find otherwise
    raise SettingInvalid(
        f"{checkpoint.id} is not served in {pinned.name}: {made.certificate.summary}. "
        f"It needs {COSINE_MIN} min and {COSINE_MEAN} mean; choose auto, fp32 or a more "
        "careful recipe"
    )


def _pinned(checkpoint: Checkpoint, name: str) -> QuantScheme:
    """The scheme called *name*. Raises `SettingInvalid` where there is none, or not here."""
    scheme = QuantScheme.of_name(name)
    if scheme is None:
        raise SettingInvalid(
            f"precision {name} is not for CPUs; choose auto, fp32, int8 or one of the recipes "
            f"{', '.join(one.name for one in INT8_SCHEMES)}, each also with -exact- and the "
            "numbers of layers to keep in fp32, as -exact-0-11"
        )
    layer_count = checkpoint.config.num_hidden_layers
    if scheme.exact_layers and max(scheme.exact_layers) >= layer_count:
        raise SettingInvalid(
            f"precision {name} names layer {max(scheme.exact_layers)}, and the layers of "
            f"{checkpoint.id} are 0 to {layer_count - 1}"
        )
    if scheme.bf16_attention and not has_bf16():
        raise SettingInvalid(
            f"precision {name} needs a CPU with bf16 products, which this one has not; choose "
            f"{name.replace('-bf16', '')} for the whole fleet, or auto"
        )
    return scheme
