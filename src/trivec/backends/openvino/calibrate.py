"""Calibration: finds the fastest int8 scheme that keeps a model's vectors, and certifies it.

The fp32 encoder runs once over the probe texts and is then let go; each scheme is quantised, compiled,
run over the same probes and compared. At most half a minute for BGE-M3, once; then it is on disk.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import resources
from timeit import timeit

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset15 as op
from tokenizers import Tokenizer

from trivec.backends.openvino.graph import attend
from trivec.backends.openvino.packing import as_batch
from trivec.backends.openvino.quantise import (
    FP32,
    INT8_GROUPS_32,
    INT8_SCHEMES,
    ActivationStatistics,
    QuantScheme,
    Tensors,
    make_tensors,
)
from trivec.backends.openvino.session import (
    Session,
    WrongOutputShape,
    mappings_of,
    open_core,
    open_session,
    release_memory,
    self_test_ids,
)
from trivec.checkpoints.checkpoint import Checkpoint
from trivec.core.ports import OnProgress, no_progress
from trivec.core.types import Float32Array, Output, Sequences, Vectors
from trivec.models.ops import AttentionSpec
from trivec.models.registry import plan_of

COSINE_MIN = 0.99
COSINE_MEAN = 0.998
# Kendall's tau over all probes; who ranks by scores cares for their order alone. Within one query,
# where they lie closer, it was up to 0.006 less, and 0.98 is held (test_rank_agreement.py).
RANK_AGREEMENT_MIN = 0.987

PAIRED = 4  # documents of each query among the probes of a reranker
LENGTHS_MADE = (3, 4, 6, 9, 64, 128, 256, 512)  # beside the sentences' own, special tokens included

EXACT_SHARE = 0.25  # of the layers, in the last scheme

TRIAL_TOKENS = 512  # where attention is a quarter of the time of BGE-M3
TRIAL_REPEATS = 5
BF16_SHARE_MAX = 0.9  # of fp32's time; what is nearer is not worth fewer digits


@dataclass(frozen=True, slots=True)
class CosineStatistics:
    """Cosines between the vectors of two schemes."""

    minimum: float
    mean: float

    @property
    def passes(self) -> bool:
        return self.minimum >= COSINE_MIN and self.mean >= COSINE_MEAN

    def __str__(self) -> str:
        return f"{self.minimum:.4f} min {self.mean:.4f} mean"


NO_VECTORS = {"dense": CosineStatistics(-1.0, -1.0)}  # of a scheme that does not run here


@dataclass(frozen=True, slots=True)
class Certificate:
    """How near one scheme's vectors are to fp32's, on which probes."""

    scheme: str  # its name
    cosines: Mapping[str, CosineStatistics]  # of each output that there is
    probe_count: int
    script_count: int
    refused: tuple[str, ...]  # faster schemes that did not pass
    rank_agreement: float | None = None  # Kendall's tau of scores; None where there are none

    @property
    def main(self) -> CosineStatistics:
        """Of dense vectors, or of what the model yields instead."""
        return next(iter(self.cosines.values()))

    @property
    def passes(self) -> bool:
        """Whether every output is within the thresholds."""
        agrees = self.rank_agreement is None or self.rank_agreement >= RANK_AGREEMENT_MIN
        return agrees and all(one.passes for one in self.cosines.values())

    @property
    def summary(self) -> str:
        """One line for model lists and logs."""
        shown = ", ".join(f"{name} {one}" for name, one in self.cosines.items())
        if self.rank_agreement is not None:
            shown += f", rank agreement {self.rank_agreement:.4f}"
        verdict = "passes" if self.passes else "FAILS"
        refused = f"; refused before: {', '.join(self.refused)}" if self.refused else ""
        return (
            f"{self.scheme} {verdict} against fp32: cosine {shown}; {self.probe_count} probes "
            f"in {self.script_count} scripts and languages{refused}"
        )


def compare(exact: Vectors, other: Vectors) -> dict[str, CosineStatistics]:
    """Cosines of *other* with *exact*, sequence by sequence; rows of multi one by one.

    Of scores the correlation, label by label.
    """
    found: dict[str, list[NDArray[np.float64]]] = {"dense": [], "sparse": [], "multi": []}
    if Output.DENSE in exact.rows:
        found["dense"].append(_cosines(exact.dense, other.dense))
    if Output.SCORE in exact.rows:
        centred = (one.score - one.score.mean(axis=0) for one in (exact, other))
        found["score"] = [_cosines(*(scores.T for scores in centred))]
    for a, b in zip(exact.sparse, other.sparse, strict=True):
        if a and b and len(a.weights):
            _, in_a, in_b = np.intersect1d(a.token_ids, b.token_ids, return_indices=True)
            dot = float(a.weights[in_a].astype(np.float64) @ b.weights[in_b])
            norms = float(np.linalg.norm(a.weights)) * float(np.linalg.norm(b.weights))
            found["sparse"].append(np.array([dot / norms if norms > 0 else 0.0]))
    for x, y in zip(exact.multi, other.multi, strict=True):
        if x is not None and y is not None and len(x):
            found["multi"].append(_cosines(x, y))
    joined = {name: np.concatenate(cosines) for name, cosines in found.items() if cosines}
    return {
        name: CosineStatistics(float(cosines.min()), float(cosines.mean()))
        for name, cosines in joined.items()
    }


def _cosines(a: Float32Array, b: Float32Array) -> NDArray[np.float64]:
    """Row by row, float64 `[rows]`; -1 for a row that is not finite."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    cosines: NDArray[np.float64] = (x * y).sum(axis=1) / np.maximum(norms, 1e-30)
    cosines[~np.isfinite(cosines)] = -1.0
    return cosines


def rank_agreement(exact: Float32Array, other: Float32Array) -> float:
    """Kendall's tau of two `[sequences, labels]` of scores: the least of the labels'.

    Of all pairs of sequences, those in the same order less those in another, as a share.
    """
    ups, downs = np.triu_indices(len(exact), 1)
    signs = np.sign(exact[ups] - exact[downs]) * np.sign(other[ups] - other[downs])
    return float(np.nan_to_num(signs, nan=-1.0).mean(axis=0).min())


def read_sentences() -> dict[str, tuple[str, str]]:
    """Two sentences a script or language."""
    text = resources.files("trivec.backends.openvino").joinpath("probes.json").read_text("utf-8")
    return {script: (pair[0], pair[1]) for script, pair in json.loads(text).items()}


def make_probes(checkpoint: Checkpoint) -> tuple[Sequences, Sequences]:
    """Texts to calibrate on and others to evaluate on, of many scripts and lengths.

    Each are sentences, and sequences of `LENGTHS_MADE` tokens cut from these laid end to end, in
    *checkpoint*'s own token ids and none longer than it reads. A model that scores pairs gets pairs.
    """
    tokenizer = Tokenizer.from_file(str(checkpoint.tokenizer_file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    limit = checkpoint.token_count_max
    sets = []
    for sentences in zip(*read_sentences().values(), strict=True):
        if checkpoint.labels:
            sets.append(_pair_probes(tokenizer, sentences, limit))
            continue
        ids = [encoding.ids for encoding in tokenizer.encode_batch(list(sentences))]
        first, last = ids[0][0], ids[0][-1]
        bodies = [token for one in ids for token in one[1:-1]]
        made = [
            [first, *bodies[shift : shift + length - 2], last]
            for shift, length in enumerate(LENGTHS_MADE)
        ]
        sets.append(Sequences.pack([one for one in ids + made if len(one) <= limit]))
    calibration, evaluation = sets
    return calibration, evaluation


def _pair_probes(tokenizer: Tokenizer, sentences: Sequence[str], limit: int) -> Sequences:
    """Each sentence as a query, with the next few and with some laid end to end as documents."""
    documents = [[*sentences[i:], *sentences[:i]] for i in range(1, 1 + PAIRED)]
    pairs = [pair for others in documents for pair in zip(sentences, others, strict=True)]
    pairs += [(sentences[0], " ".join(sentences[1 : 1 + count])) for count in (4, 12)]
    encoded = [one for one in tokenizer.encode_batch(pairs) if len(one.ids) <= limit]
    types = np.concatenate([np.array(one.type_ids, np.int32) for one in encoded])
    return replace(Sequences.pack([one.ids for one in encoded]), token_types=types)


def has_bf16() -> bool:
    """Whether this machine can multiply in bf16 at all."""
    return "BF16" in open_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def bf16_pays(spec: AttentionSpec, *, tokens: int = TRIAL_TOKENS) -> bool:
    """Whether bf16 is clearly faster for a text of *tokens*: tried on this machine, for 0.2 s.

    Having the instructions says little: on AMD Zen 5 bf16 products are four times as fast as
    fp32's, on an Intel Xeon without AMX they were slower.
    """
    if not has_bf16():
        return False
    requests = [_attention_alone(spec, tokens, bf16=bf16) for bf16 in (False, True)]
    turns = [
        [timeit(request.infer, number=1) for request in requests] for _ in range(TRIAL_REPEATS)
    ]
    fp32_s, bf16_s = np.array(turns).min(axis=0).tolist()
    return bool(bf16_s <= BF16_SHARE_MAX * fp32_s)


def _attention_alone(spec: AttentionSpec, tokens: int, *, bf16: bool) -> ov.InferRequest:
    """One attention over a text of *tokens*, compiled for one thread and run once."""
    kv_size = spec.kv_heads * spec.head_dim
    q = op.parameter([-1, spec.size], np.float32)
    kv = op.parameter([-1, kv_size], np.float32)
    gather = op.parameter([-1, -1], np.int32)
    bias = op.parameter([-1, 1, 1, -1], np.float32)
    nodes = attend(q, kv, kv, spec=spec, gather=gather, bias=bias, mask=None, bf16=bf16)
    model = ov.Model([op.result(nodes)], [q, kv, gather, bias])
    properties = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1}
    request = open_core().compile_model(model, "CPU", properties).create_infer_request()
    states = (np.full((tokens, size), 0.01, np.float32) for size in (spec.size, kv_size))
    places = np.arange(tokens, dtype=np.int32)[None]
    request.infer([*states, places, np.zeros((1, 1, 1, tokens), np.float32)])
    return request


@dataclass(frozen=True, slots=True)
class QuantisedModel:
    """A model's tensors in one int8 scheme, ready to be compiled, and what proves each load sound.

    The certificate compares the scheme with fp32; a session compiled later in either is compared
    with the hidden states that the two sessions of the calibration computed for one text.
    """

    scheme: QuantScheme
    certificate: Certificate
    tensors: Tensors
    # Hidden states of `session.self_test_ids`, [tokens, hidden], by "fp32" and by the scheme's name;
    # without the latter it does not run here.
    references: Mapping[str, Float32Array]


def best_int8(
    checkpoint: Checkpoint, *, slot_count: int, on_progress: OnProgress = no_progress
) -> QuantisedModel:
    """The fastest scheme that passes, or the last that runs, whose certificate then says so."""
    calibration = Calibration(checkpoint, slot_count=slot_count, on_progress=on_progress)
    best: QuantisedModel | None = None
    refused: list[str] = []
    for scheme in calibration.candidates():
        tried = calibration.attempt(scheme, refused=tuple(refused))
        if best is None or scheme.name in tried.references:
            best = tried
        if tried.certificate.passes:
            break
        refused.append(scheme.name)
    assert best is not None, "there are candidates"
    return best


class Calibration:
    """One model, its probes, and what fp32 makes of them: vectors, statistics, hidden states."""

    def __init__(
        self, checkpoint: Checkpoint, *, slot_count: int, on_progress: OnProgress = no_progress
    ) -> None:
        self._checkpoint = checkpoint
        self._slot_count = slot_count
        self._on_progress = on_progress
        self._tell("compiling fp32, to compare int8 with")
        calibration, self._evaluation = make_probes(checkpoint)
        self._calibration = as_batch(calibration, next(iter(checkpoint.outputs)))
        self._self_test_ids = self_test_ids(checkpoint.config)
        tensors = make_tensors(checkpoint, FP32)
        first = open_session(checkpoint, tensors, FP32, slot_count=slot_count, with_statistics=True)
        self._reference = first.hidden(self._self_test_ids, slot=0)
        self._tell("running the probes in fp32")
        groups = plan_of(checkpoint.config).linears
        self._layer_outputs: list[Float32Array] = []  # of one micro-batch, each [tokens, hidden]
        parts = []
        for part in first.statistics(self._calibration):
            self._layer_outputs = self._layer_outputs or part[2 * len(groups) :]
            parts.append(part[: 2 * len(groups)])
        self._statistics = {
            group.names[0]: ActivationStatistics(
                largest=np.array([part[2 * i] for part in parts]).max(axis=0),
                mean=np.array([part[2 * i + 1] for part in parts]).mean(axis=0),
            )
            for i, group in enumerate(groups)
        }
        del first  # one fp32 session at a time: each is 1.2 GB of BGE-M3
        release_memory(())
        # Two compiles must agree before anything is compared with them, or kept: see `open_session`.
        session = open_session(
            checkpoint, tensors, FP32, slot_count=slot_count, reference=self._reference
        )
        self._exact = self._vectors(session)

    def candidates(self) -> Iterator[QuantScheme]:
        """From the fastest on; the last one is worked out only when it is reached."""
        attention = plan_of(self._checkpoint.config).attention
        pays = bool(attention) and bf16_pays(attention[0])
        yield from (scheme for scheme in INT8_SCHEMES if pays or not scheme.bf16_attention)
        try:
            layers = self._most_sensitive_layers(INT8_GROUPS_32)
        except WrongOutputShape:
            return  # with some layers in fp32 it would not run either
        yield replace(INT8_GROUPS_32, exact_layers=layers)

    def attempt(self, scheme: QuantScheme, *, refused: tuple[str, ...] = ()) -> QuantisedModel:
        """Quantise, compile, run the probes, compare; a scheme that does not run here fails.

        One that fails is compiled once more: the choice is kept, and the compile may be at fault.
        """
        self._tell(f"quantising, {scheme.name}")
        tensors = self.tensors(scheme)
        release_memory(mappings_of(tensors.values()))  # the fp32 weights that they were made from
        self._tell(f"comparing {scheme.name} with fp32")
        for _ in range(2):
            cosines, references = NO_VECTORS, {FP32.name: self._reference}
            agreement = None
            with suppress(WrongOutputShape):
                session = open_session(
                    self._checkpoint, tensors, scheme, slot_count=self._slot_count
                )
                vectors = self._vectors(session)
                cosines = compare(self._exact, vectors)
                if Output.SCORE in vectors.rows:
                    agreement = rank_agreement(self._exact.score, vectors.score)
                references[scheme.name] = session.hidden(self._self_test_ids, slot=0)
            counts = len(self._evaluation), len(read_sentences())
            certificate = Certificate(scheme.name, cosines, *counts, refused, agreement)
            if certificate.passes:
                break
        return QuantisedModel(scheme, certificate, tensors, references)

    def tensors(self, scheme: QuantScheme) -> dict[str, NDArray[np.generic]]:
        """The model quantised for *scheme*."""
        return make_tensors(self._checkpoint, scheme, self._statistics)

    def _tell(self, step: str) -> None:
        self._on_progress(f"{self._checkpoint.id}: {step}", None)

    def _most_sensitive_layers(self, scheme: QuantScheme) -> frozenset[int]:
        """The quarter of the layers that add most error to their own output, by its square."""
        session = open_session(
            self._checkpoint, self.tensors(scheme), scheme, slot_count=1, with_statistics=True
        )
        int8 = next(session.statistics(self._calibration))[-len(self._layer_outputs) :]
        errors = [
            float(np.mean(((a - b) ** 2).sum(axis=1) / np.maximum((a**2).sum(axis=1), 1e-30)))
            for a, b in zip(self._layer_outputs, int8, strict=True)
        ]
        added = np.diff(np.array(errors), prepend=0)
        count = math.ceil(len(added) * EXACT_SHARE)
        return frozenset(np.argsort(-added, kind="stable")[:count].tolist())

    def _vectors(self, session: Session) -> Vectors:
        """Every kind of vector of the evaluation set, computed on all slots at once."""
        batch = as_batch(self._evaluation, self._checkpoint.outputs)
        slots = min(self._slot_count, len(batch))
        owned = [np.arange(slot, len(batch), slots) for slot in range(slots)]

        def run(slot: int) -> Vectors:
            return session.run(batch.take(owned[slot]), slot=slot)

        with ThreadPoolExecutor(slots, "trivec-calibrate") as pool:
            parts = list(pool.map(run, range(slots)))
        return Vectors.join(parts, np.argsort(np.concatenate(owned)))
