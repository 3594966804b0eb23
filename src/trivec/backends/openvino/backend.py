"""The CPU backend: one model, loaded in the precision asked for, run on slots of one thread each."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from trivec.backends.openvino.attention import has_bf16
from trivec.backends.openvino.certificate import COSINE_MEAN, COSINE_MIN, Certificate
from trivec.backends.openvino.certifying import Trial, best_int8, fp32_tensors, readout_of
from trivec.backends.openvino.encoding import BatchEncoder
from trivec.backends.openvino.linear import Tensors
from trivec.backends.openvino.pages import let_go, mappings_of, return_free
from trivec.backends.openvino.prepared import Prepared, load, prepared_folder, save
from trivec.backends.openvino.recipe import FP32, INT8_RECIPES, Form, Recipe, int8_named
from trivec.backends.openvino.rows import ROW_BUDGET
from trivec.backends.openvino.witness import Plan, open_session
from trivec.checkpoints.checkpoint import Checkpoint
from trivec.core.errors import SettingInvalid
from trivec.core.types import Batch, BatchBudget, Output, Vectors

WARM_LENGTHS = (16, 32, 64, 128, 512)
"""Tokens of the texts each slot runs before it is offered; other sizes cost 0.5 ms a layer once."""


class OpenVinoBackend:
    """A `core.ports.Backend` for CPUs."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        encoder: BatchEncoder,
        recipe: Recipe,
        certificate: Certificate | None,
    ) -> None:
        self.certificate = certificate
        """How near int8 is to fp32 for this model; None where int8 was never considered."""
        self._checkpoint = checkpoint
        self._encoder: BatchEncoder | None = encoder
        self._recipe = recipe
        self._slot_count = encoder.slot_count
        self._exact = threading.Lock()

    @classmethod
    def load(
        cls, checkpoint: Checkpoint, *, precision: str, cores: int, cache_dir: Path
    ) -> "OpenVinoBackend":
        """Read, quantise if asked, compile and warm up; blocks for seconds.

        *precision*: `fp32`, `int8`, `auto`, which takes int8 where its certificate passes, or the
        name of an int8 recipe, which is refused where its certificate fails. The quantised model
        is kept under *cache_dir*. Raises `CheckpointRefused`, `SettingInvalid`.
        """
        prepared = None
        if precision != "fp32":
            pinned = None if precision in ("auto", "int8") else _pinned(checkpoint, precision)
            prepared = _prepared(checkpoint, pinned, slot_count=cores, cache_dir=cache_dir)
            if pinned is not None:
                _refuse_unless_passed(checkpoint, prepared.certificate)
        certificate = None if prepared is None else prepared.certificate
        tensors: Tensors
        if prepared is not None and (precision == "int8" or prepared.certificate.passes):
            recipe, tensors = prepared.recipe, prepared.tensors
        else:
            recipe, tensors = FP32, fp32_tensors(checkpoint)
        vouched_for = certificate is None or certificate.passes or recipe is FP32
        encoder = _open(checkpoint, recipe, tensors, slot_count=cores, must_agree=vouched_for)
        backend = cls(checkpoint, encoder, recipe, certificate)
        backend._warm()
        let_go(mappings_of(tensors.values()))
        return_free()
        return backend

    @property
    def precision(self) -> str:
        """`fp32` or `int8`."""
        return self._recipe.precision

    @property
    def recipe(self) -> str:
        """The exact name of the arithmetic, which `load` takes as its precision."""
        return self._recipe.name

    @property
    def slot_count(self) -> int:
        return self._slot_count

    @property
    def budget(self) -> BatchBudget:
        return ROW_BUDGET

    def run(self, batch: Batch, *, slot: int) -> Vectors:
        """See `core.ports.Backend`. A sequence's bits do not depend on its neighbours or place."""
        assert self._encoder is not None, "a batch after close"
        return self._encoder.run(batch, slot=slot)

    def run_exact(self, batch: Batch, *, slot: int) -> Vectors:
        """*batch* in fp32, from the checkpoint's files; seconds for a large model, one at a time.

        It is for the rare row that was not finite, so no fp32 copy is kept for it.
        """
        if self._recipe.form is Form.FP32:
            return self.run(batch, slot=slot)
        with self._exact:
            tensors = fp32_tensors(self._checkpoint)
            encoder = _open(self._checkpoint, FP32, tensors, slot_count=1, must_agree=True)
            return encoder.run(batch, slot=0)

    def close(self) -> None:
        self._encoder = None

    def _warm(self) -> None:
        """Run one text of each of `WARM_LENGTHS` on every slot at once."""
        limit = self._checkpoint.token_count_max
        lengths = sorted({min(length, limit) for length in WARM_LENGTHS})
        with ThreadPoolExecutor(self._slot_count, "trivec-warm") as pool:
            list(pool.map(lambda slot: self._warm_slot(lengths, slot), range(self._slot_count)))

    def _warm_slot(self, lengths: list[int], slot: int) -> None:
        for length in lengths:
            ids = np.zeros(length, np.int32)
            starts = np.array([0, length], np.int32)
            self.run(Batch(ids, starts, np.array([Output.DENSE], np.uint8)), slot=slot)


def _pinned(checkpoint: Checkpoint, name: str) -> Recipe:
    """The recipe called *name*. Raises `SettingInvalid` where there is none, or not here."""
    recipe = int8_named(name)
    if recipe is None:
        raise SettingInvalid(
            f"precision {name} is not for CPUs; choose auto, fp32, int8 or one of the recipes "
            f"{', '.join(one.name for one in INT8_RECIPES)}, each also with -exact- and the "
            "numbers of layers to keep in fp32, as -exact-0-11"
        )
    layer_count = checkpoint.config.num_hidden_layers
    if recipe.exact_layers and max(recipe.exact_layers) >= layer_count:
        raise SettingInvalid(
            f"precision {name} names layer {max(recipe.exact_layers)}, and the layers of "
            f"{checkpoint.id} are 0 to {layer_count - 1}"
        )
    if recipe.bf16_attention and not has_bf16():
        raise SettingInvalid(
            f"precision {name} needs a CPU with bf16 products, which this one has not; choose "
            f"{name.replace('-bf16', '')} for the whole fleet, or auto"
        )
    return recipe


def _refuse_unless_passed(checkpoint: Checkpoint, certificate: Certificate) -> None:
    if not certificate.passes:
        raise SettingInvalid(
            f"{checkpoint.id} is not served in {certificate.recipe}: {certificate.summary}. It needs "
            f"{COSINE_MIN} min and {COSINE_MEAN} mean; choose auto, fp32 or a more careful recipe"
        )


def _prepared(
    checkpoint: Checkpoint, pinned: Recipe | None, *, slot_count: int, cache_dir: Path
) -> Prepared:
    """The int8 form of *checkpoint*, from the cache or made now and put there.

    It is in the recipe *pinned*, or in the fastest that passes. The two have a folder each: what
    is kept for one never answers for the other.
    """
    precision = "int8" if pinned is None else pinned.name
    folder = prepared_folder(checkpoint, precision=precision, cache_dir=cache_dir)
    kept = load(folder)
    if kept is None:
        if pinned is None:
            made = best_int8(checkpoint, slot_count=slot_count)
        else:
            made = Trial(checkpoint, slot_count=slot_count).attempt(pinned, refused=())
        try:
            save(folder, made.recipe, made.certificate, made.tensors)
        except OSError as error:
            raise SettingInvalid(
                f"the int8 form of {checkpoint.id} cannot be written to {folder}: {error}. Give the "
                "data folder space and permission, or serve with --precision fp32."
            ) from error
        del made
        kept = load(folder)
        assert kept is not None, "what was just written reads back"
    return kept


def _open(
    checkpoint: Checkpoint,
    recipe: Recipe,
    tensors: Tensors,
    *,
    slot_count: int,
    must_agree: bool,
) -> BatchEncoder:
    plan = Plan(checkpoint.config, tensors, recipe)
    session = open_session(plan, slot_count=slot_count, must_agree=must_agree)
    return BatchEncoder(
        session, readout_of(checkpoint), position_offset=checkpoint.config.position_offset
    )
