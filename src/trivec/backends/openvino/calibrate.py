"""Calibration: finds the fastest int8 scheme that keeps a model's vectors, and certifies it.

The fp32 encoder runs once over the probe texts and is then let go; each scheme is quantised, compiled,
run over the same probes and compared. At most half a minute for BGE-M3, once; then it is on disk, and
the session that was judged is the one that serves.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib import resources
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from trivec.backends.openvino.packing import as_batch
from trivec.backends.openvino.quantise import (
    FP32,
    INT8_CONV,
    INT8_GROUPS_32,
    INT8_GROUPS_128,
    INT8_ROWS,
    INT8_ROWS_BF16,
    ActivationStatistics,
    Float16Array,
    QuantScheme,
    Tensors,
    make_tensors,
)
from trivec.backends.openvino.session import (
    Session,
    WrongOutputShape,
    mappings_of,
    open_session,
    release_memory,
    released_meanwhile,
    self_test_ids,
)
from trivec.backends.openvino.trial import ProductTrial, bf16_pays, try_products
from trivec.checkpoints.checkpoint import Checkpoint
from trivec.core.ports import OnProgress, no_progress
from trivec.core.types import Float32Array, Output, Sequences, Vectors
from trivec.models.registry import plan_of

COSINE_MIN = 0.99
COSINE_MEAN = 0.998
# Kendall's tau over all probes; who ranks by scores cares for their order alone. Within one query,
# where they lie closer, it was up to 0.006 less, and 0.98 is held (test_rank_agreement.py).
RANK_AGREEMENT_MIN = 0.987

PAIRED = 4  # documents of each query among the probes of a reranker
LENGTHS_MADE = (3, 4, 6, 9, 64, 128, 256, 512)  # beside the sentences' own, special tokens included

EXACT_SHARE = 0.25  # of the layers, in the last scheme

SAMPLE_BYTES_MAX = 256 << 20  # of inputs of linear layers: of MiniLM all, of BGE-M3 half the tokens
HALF_MAX = 65504.0  # the largest float16

Keep: TypeAlias = Callable[[Tensors], Tensors]  # puts tensors where they take no memory


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
    product: ProductTrial | None = None  # what this machine makes of it; None where never tried

    @property
    def main(self) -> CosineStatistics:
        """Of dense vectors, or of what the model yields instead."""
        return next(iter(self.cosines.values()))

    @property
    def passes(self) -> bool:
        """Whether every output is within the thresholds, and no sum beyond its type.

        What saturates does so with some texts and not with others: no probes can vouch for it.
        """
        if self.product is not None and not self.product.is_exact:
            return False
        agrees = self.rank_agreement is None or self.rank_agreement >= RANK_AGREEMENT_MIN
        return agrees and all(one.passes for one in self.cosines.values())

    @property
    def is_faster(self) -> bool:
        """Whether `auto` takes it: for its speed, and not for its memory alone."""
        return self.product is None or self.product.is_faster

    @property
    def summary(self) -> str:
        """One line for model lists and logs."""
        shown = ", ".join(f"{name} {one}" for name, one in self.cosines.items())
        if self.rank_agreement is not None:
            shown += f", rank agreement {self.rank_agreement:.4f}"
        verdict = "passes" if self.passes else "FAILS"
        refused = f"; refused before: {', '.join(self.refused)}" if self.refused else ""
        tried = "" if self.product is None else f"; {self.product}"
        return (
            f"{self.scheme} {verdict} against fp32: cosine {shown}; {self.probe_count} probes "
            f"in {self.script_count} scripts and languages{tried}{refused}"
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
    # The session that was judged; None where it failed, or was judged at an earlier start.
    session: Session | None = field(default=None, compare=False)


def best_int8(
    checkpoint: Checkpoint,
    *,
    slot_count: int,
    keep: Keep = dict,
    on_progress: OnProgress = no_progress,
) -> QuantisedModel:
    """The fastest scheme that passes, or the last that runs, whose certificate then says so.

    What *keep* was given last are the tensors of the one returned.
    """
    calibration = Calibration(checkpoint, slot_count=slot_count, keep=keep, on_progress=on_progress)
    best: QuantisedModel | None = None
    refused: list[str] = []
    for scheme in calibration.candidates():
        tried = calibration.attempt(scheme, refused=tuple(refused))
        if tried.certificate.passes:
            return tried
        refused.append(scheme.name)
        tried = replace(tried, session=None)  # its memory is the next one's
        if best is None or scheme.name in tried.references:
            best = tried
    assert best is not None, "there are candidates"
    return best if best is tried else replace(best, tensors=keep(best.tensors))


class Calibration:
    """One model, its probes, and what fp32 makes of them: vectors, statistics, hidden states."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        slot_count: int,
        keep: Keep = dict,
        on_progress: OnProgress = no_progress,
    ) -> None:
        self._checkpoint = checkpoint
        self._slot_count = slot_count
        self._keep = keep
        self._on_progress = on_progress
        self._products = try_products(
            checkpoint.config.hidden_size, checkpoint.config.intermediate_size
        )
        self._tell("compiling fp32, to compare int8 with")
        calibration, self._evaluation = make_probes(checkpoint)
        release_memory(())  # its tokenizer takes 0.2 GB of BGE-M3
        self._calibration = as_batch(calibration, next(iter(checkpoint.outputs)))
        self._self_test_ids = self_test_ids(checkpoint.config)
        self._samples: dict[str, Float16Array] = {}  # until a scheme needs them
        self._layer_outputs: list[Float32Array] = []  # of one micro-batch, each [tokens, hidden]
        tensors = make_tensors(checkpoint, FP32)
        # On large folios a row of a table that is read brings 2 MB of its file into memory.
        with released_meanwhile(mappings_of(tensors.values())):
            first = open_session(
                checkpoint, tensors, FP32, slot_count=slot_count, with_statistics=True
            )
            self._reference = first.hidden(self._self_test_ids, slot=0)
            self._tell("running the probes in fp32")
            groups = plan_of(checkpoint.config).linears
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
            # Two compiles must agree before anything is compared with them: see `open_session`.
            session = open_session(
                checkpoint, tensors, FP32, slot_count=slot_count, reference=self._reference
            )
            self._exact = self._vectors(session)

    def candidates(self) -> Iterator[QuantScheme]:
        """From the fastest on; those with exact layers are worked out only when they are reached.

        Where the plugin quantises nothing in groups but their weights, these come last: they take
        fp32's time.
        """
        tried = self._products
        rows, convolution, groups = (
            tried[form] for form in (INT8_ROWS, INT8_CONV, INT8_GROUPS_128)
        )
        ours = INT8_CONV if convolution.pays_beside(rows) else INT8_ROWS
        ours = replace(ours, weight_bits=tried[ours].exact_bits or 8)
        attention = plan_of(self._checkpoint.config).attention
        if ours == INT8_ROWS and attention and bf16_pays(attention[0]):
            yield INT8_ROWS_BF16
        yield ours
        careful = ours if groups.weights_only else INT8_GROUPS_32
        if not groups.weights_only:
            yield from (INT8_GROUPS_128, INT8_GROUPS_32)
        with suppress(WrongOutputShape):  # with some layers in fp32 it would not run either
            yield replace(careful, exact_layers=self._most_sensitive_layers(careful))
        if groups.weights_only:
            yield INT8_GROUPS_128

    def attempt(self, scheme: QuantScheme, *, refused: tuple[str, ...] = ()) -> QuantisedModel:
        """Quantise, compile, run the probes, compare; a scheme that does not run here fails.

        One that fails is compiled once more: the choice is kept, and the compile may be at fault.
        """
        self._tell(f"quantising, {scheme.name}")
        tensors = self._keep(self.tensors(scheme))
        release_memory(mappings_of(tensors.values()))
        self._tell(f"comparing {scheme.name} with fp32")
        for _ in range(2):
            session: Session | None = None
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
                session.release_memory()
            counts = len(self._evaluation), len(read_sentences())
            product = self._product(scheme)
            certificate = Certificate(scheme.name, cosines, *counts, refused, agreement, product)
            if certificate.passes:
                break
        return QuantisedModel(scheme, certificate, tensors, references, session)

    def tensors(self, scheme: QuantScheme) -> dict[str, NDArray[np.generic]]:
        """The model quantised for *scheme*."""
        statistics = self._statistics
        if scheme.weight_bits < 8:
            self._samples = self._samples or self._sampled()
            statistics = {
                name: replace(one, sample=self._samples[name]) for name, one in statistics.items()
            }
        return make_tensors(self._checkpoint, scheme, statistics)

    def _product(self, scheme: QuantScheme) -> ProductTrial:
        """What was found of the product that *scheme* multiplies with."""
        group_size = None if scheme.group_size is None else INT8_GROUPS_128.group_size
        form = QuantScheme(group_size=group_size, convolution=scheme.convolution)
        tried = self._products[form]
        return replace(tried, is_exact=scheme.weight_bits <= tried.exact_bits)

    def _sampled(self) -> dict[str, Float16Array]:
        """Some tokens' inputs of each `LinearGroup`, by its first name: each `[tokens, in]`."""
        session = open_session(
            self._checkpoint,
            make_tensors(self._checkpoint, FP32),
            FP32,
            slot_count=1,
            reference=self._reference,
            with_inputs=True,
        )
        plan = plan_of(self._checkpoint.config)
        names = [group.names[0] for group in plan.linears]
        token_bytes = sum(2 * plan.shapes[f"{name}.weight"][1] for name in names)
        step = math.ceil(len(self._calibration.token_ids) * token_bytes / SAMPLE_BYTES_MAX)
        parts = [
            [np.clip(one, -HALF_MAX, HALF_MAX).astype(np.float16) for one in part]
            for part in session.inputs(self._calibration, step=step)
        ]
        joined = (np.concatenate(group) for group in zip(*parts, strict=True))
        return dict(zip(names, joined, strict=True))

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
