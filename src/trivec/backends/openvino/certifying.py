"""Finds the fastest arithmetic that keeps a model's vectors, by trying the ladder from its foot.

The fp32 encoder runs once over the probes and is then let go; each rung is quantised, compiled,
run over the same probes and compared. At most half a minute for BGE-M3, once; then it is on disk.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from trivec.backends.openvino.attention import bf16_pays
from trivec.backends.openvino.certificate import Agreement, Certificate, Comparison, compare
from trivec.backends.openvino.encoding import BatchEncoder
from trivec.backends.openvino.graph import Extra
from trivec.backends.openvino.packing import RowInputs, pack_row
from trivec.backends.openvino.probes import as_batch, make_probes, read_sentences
from trivec.backends.openvino.quantise import ChannelRanges, Ranges, int8_tensors
from trivec.backends.openvino.recipe import FP32, INT8_GROUPS_32, Recipe, int8_ladder
from trivec.backends.openvino.rows import plan_rows
from trivec.backends.openvino.session import Session
from trivec.backends.openvino.witness import NothingComputed, Plan, open_session
from trivec.checkpoints.checkpoint import Checkpoint
from trivec.core.types import Float32Array, Int32Array, Output, Sequences, Vectors
from trivec.models.pooling import Readout
from trivec.models.registry import plan_of, tensor_shapes

EXACT_SHARE = 0.25  # of the layers, on the last rung

NO_AGREEMENT = Comparison(Agreement(-1.0, -1.0), None, None)  # of what computes nothing


@dataclass(frozen=True, slots=True)
class Reference:
    """What fp32 says of the probes."""

    vectors: Vectors  # of the judgement set
    ranges: Ranges  # of the calibration set


@dataclass(frozen=True, slots=True)
class Candidate:
    """One rung of the ladder, tried."""

    recipe: Recipe
    certificate: Certificate
    tensors: Mapping[str, NDArray[np.generic]]
    computes: bool = True  # False: what was compiled gives no vectors at all on this machine


def readout_of(checkpoint: Checkpoint) -> Readout:
    return Readout(checkpoint.pooling, checkpoint.normalize, checkpoint.heads)


def fp32_tensors(checkpoint: Checkpoint) -> dict[str, NDArray[np.generic]]:
    """The encoder's own weights, most of them views of the checkpoint's mapped files."""
    with checkpoint.weights() as weights:
        tensors: dict[str, NDArray[np.generic]] = {
            name: weights.take(name) for name in tensor_shapes(checkpoint.config)
        }
        weights.finish()
    return tensors


def best_int8(checkpoint: Checkpoint, *, slot_count: int) -> Candidate:
    """The first rung that passes, or the last one that computes, whose certificate then says so."""
    trial = Trial(checkpoint, slot_count=slot_count)
    best: Candidate | None = None
    refused: list[str] = []
    for recipe in trial.rungs():
        candidate = trial.attempt(recipe, refused=tuple(refused))
        if best is None or candidate.computes:
            best = candidate
        if candidate.certificate.passes:
            break
        refused.append(recipe.name)
    assert best is not None, "the ladder has rungs"
    return best


class Trial:
    """One model, its probes, and what fp32 made of them."""

    def __init__(self, checkpoint: Checkpoint, *, slot_count: int) -> None:
        self._checkpoint = checkpoint
        self._slot_count = slot_count
        self._probes = make_probes(checkpoint)
        self._reference = self._measure_fp32()

    def rungs(self) -> Iterator[Recipe]:
        """From the fastest arithmetic on; the last one is worked out only when it is reached."""
        spec = plan_of(self._checkpoint.config).attention[0]
        yield from int8_ladder(bf16_pays=bf16_pays(spec))
        try:
            layers = self._most_sensitive_layers(INT8_GROUPS_32)
        except NothingComputed:
            return  # with some layers in fp32 it would compute as little
        yield replace(INT8_GROUPS_32, exact_layers=layers)

    def attempt(self, recipe: Recipe, *, refused: tuple[str, ...]) -> Candidate:
        """Quantise, compile, run the probes, compare; what computes nothing does not pass."""
        tensors = self.tensors(recipe)
        computes, found = True, NO_AGREEMENT
        try:
            session = self._open(tensors, recipe)
        except NothingComputed:
            computes = False
        else:
            found = compare(self._reference.vectors, self._vectors(session))
        certificate = Certificate(
            recipe=recipe.name,
            dense=found.dense,
            sparse=found.sparse,
            multi=found.multi,
            probe_count=len(self._probes.judgement),
            script_count=len(read_sentences()),
            refused=refused,
        )
        return Candidate(recipe, certificate, tensors, computes)

    def _measure_fp32(self) -> Reference:
        tensors = fp32_tensors(self._checkpoint)
        session = self._open(tensors, FP32, Extra.RANGES)
        vectors = self._vectors(session)
        found = [
            session.extras(inputs, slot=0)
            for inputs in self._rows(session, self._probes.calibration)
        ]
        return Reference(vectors, self._ranges(found))

    def _ranges(self, rows: Sequence[Sequence[Float32Array]]) -> Ranges:
        """Over all *rows*, what each yielded for `Extra.RANGES`."""
        names = [group.names[0] for group in plan_of(self._checkpoint.config).linears]
        by_tap = [np.array(values) for values in zip(*rows, strict=True)]  # [rows, in] each
        return {
            name: ChannelRanges(
                largest=by_tap[2 * i].max(axis=0), mean=by_tap[2 * i + 1].mean(axis=0)
            )
            for i, name in enumerate(names)
        }

    def _most_sensitive_layers(self, recipe: Recipe) -> frozenset[int]:
        """The quarter of the layers that add most error to their own output, by its square."""
        exact = self._layer_outputs(fp32_tensors(self._checkpoint), FP32)
        int8 = self._layer_outputs(self.tensors(recipe), recipe)
        errors = [
            float(np.mean(((a - b) ** 2).sum(axis=1) / (a**2).sum(axis=1)))
            for a, b in zip(exact, int8, strict=True)
        ]
        added = np.diff(np.array(errors), prepend=0)
        count = math.ceil(len(added) * EXACT_SHARE)
        return frozenset(np.argsort(-added, kind="stable")[:count].tolist())

    def _layer_outputs(
        self, tensors: Mapping[str, NDArray[np.generic]], recipe: Recipe
    ) -> Sequence[Float32Array]:
        """Hidden states `[tokens, hidden]` after each layer, for one row of the probes."""
        session = self._open(tensors, recipe, Extra.LAYERS)
        return session.extras(next(self._rows(session, self._probes.calibration)), slot=0)

    def tensors(self, recipe: Recipe) -> dict[str, NDArray[np.generic]]:
        """The model quantised for *recipe*."""
        with self._checkpoint.weights() as weights:
            tensors = int8_tensors(
                weights.take, self._checkpoint.config, recipe, self._reference.ranges
            )
            weights.finish()
        return tensors

    def _open(
        self,
        tensors: Mapping[str, NDArray[np.generic]],
        recipe: Recipe,
        extra: Extra = Extra.NOTHING,
    ) -> Session:
        plan = Plan(self._checkpoint.config, tensors, recipe, extra)
        return open_session(plan, slot_count=self._slot_count, must_agree=recipe is FP32)

    def _rows(self, session: Session, sequences: Sequences) -> Iterator[RowInputs]:
        """The inputs of each row of *sequences*, packed one at a time."""
        batch = as_batch(sequences, Output.DENSE)
        for row in plan_rows(sequences.lengths()):
            yield pack_row(
                batch,
                row,
                whole=np.zeros(len(batch), np.bool_),
                position_offset=self._checkpoint.config.position_offset,
                buffers=session.buffers(0),
            ).inputs

    def _vectors(self, session: Session) -> Vectors:
        """Every kind of vector of the judgement set, computed on all slots at once."""
        encoder = BatchEncoder(
            session,
            readout_of(self._checkpoint),
            position_offset=self._checkpoint.config.position_offset,
        )
        ids = _unpack(self._probes.judgement)
        batches = [
            as_batch(Sequences.pack(ids[slot :: self._slot_count]), self._checkpoint.outputs)
            for slot in range(self._slot_count)
        ]
        with ThreadPoolExecutor(self._slot_count, "trivec-certify") as pool:
            parts = list(
                pool.map(
                    lambda slot: encoder.run(batches[slot], slot=slot), range(self._slot_count)
                )
            )
        return Vectors.of(
            dense=np.concatenate([part.dense for part in parts]),
            sparse=tuple(one for part in parts for one in part.sparse),
            multi=tuple(one for part in parts for one in part.multi),
        )


def _unpack(sequences: Sequences) -> list[Int32Array]:
    return np.split(sequences.token_ids, sequences.cu_seqlens[1:-1])
