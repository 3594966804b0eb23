"""Ours beside the peers: the same weights, the same texts, turn and turn about, in one run.

Run: python -m benchmarks.against.compare --model-dir DIR --pooling cls|mean [--peers NAME ...]

The texts are short (questions), mixed (log-normal, up to what the model reads) and long. Every peer's
first vectors are compared with ours, so that a fast wrong answer does not count. The last line is JSON.
"""

import argparse
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.against.environments import ENVS
from benchmarks.against.peer import Peer, Timed
from benchmarks.against.roster import ROSTER, Stage
from benchmarks.figures import Provenance, Spread, interleaved, ratio
from benchmarks.keeping import keep
from benchmarks.texts import sentences

from trivec.core.types import Float32Array

OURS = "trivec-int8"
CLS_ONLY = {"flagembedding"}  # takes the first token's state, whatever the model was trained for


def workloads(words_max: int, seconds: float) -> dict[str, list[str]]:
    """Short, mixed and long texts of at most *words_max* words; counts scale with *seconds*."""
    count = max(2, int(32 * seconds))
    return {
        "short": sentences(count * 4),
        "mixed": sentences(count, words_median=min(60.0, words_max / 3), words_max=words_max),
        "long": [
            " ".join((text * words_max).split()[:words_max])
            for text in sentences(max(2, int(4 * seconds)))
        ],
    }


def cosine_min(ours: Float32Array, theirs: Float32Array) -> float:
    """The worst agreement of the vectors looked at, `[a few texts, dimensions]` each."""
    lengths = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    return float((np.einsum("td,td->t", ours, theirs) / lengths).min())


def compare(peers: dict[str, Peer], texts: list[str], repeats: int) -> dict[str, Any]:
    """Texts a second of each, ours over theirs round by round, and how far they agree."""
    first: dict[str, Timed] = {name: peer.embed(texts) for name, peer in peers.items()}  # warm-up

    def timing(peer: Peer) -> Callable[[], float]:
        return lambda: len(texts) / peer.embed(texts).seconds

    rates = interleaved({name: timing(peer) for name, peer in peers.items()}, repeats=repeats)
    figures = {}
    for name, many in rates.items():
        figures[name] = {
            "texts_a_second": asdict(Spread.of(many)),
            "ours_over_it": asdict(ratio(rates[OURS], many)),
            "cosine_min": cosine_min(first[OURS].vectors, first[name].vectors),
        }
        print(
            f"{name:>24} {Spread.of(many)} texts/s, ours {ratio(rates[OURS], many)} times that, "
            f"cosine {figures[name]['cosine_min']:.4f}",
            file=sys.stderr,
        )
    return figures


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--model-dir", type=Path, required=True)
    arguments.add_argument("--pooling", choices=["cls", "mean"], required=True)
    arguments.add_argument("--name", required=True, help="what the result is filed under")
    arguments.add_argument("--words-max", type=int, default=120, help="longest text, in words")
    arguments.add_argument(
        "--peers", nargs="+", choices=list(ROSTER), help="all that can, unless said"
    )
    arguments.add_argument("--envs", type=Path, default=ENVS)
    arguments.add_argument("--work-dir", type=Path, default=ENVS.parent / "work")
    arguments.add_argument("--seconds", type=float, default=2.0, help="scales the texts")
    arguments.add_argument("--repeats", type=int, default=5)
    given = arguments.parse_args()
    stage = Stage(given.model_dir.resolve(), given.pooling, given.work_dir / given.name, given.envs)
    able = [name for name in ROSTER if given.pooling == "cls" or name not in CLS_ONLY]
    names = [OURS, *(name for name in given.peers or able if name != OURS)]
    figures = {}
    with ExitStack() as open_peers:
        peers = {name: open_peers.enter_context(ROSTER[name].start(name, stage)) for name in names}
        for kind, texts in workloads(given.words_max, given.seconds).items():
            print(f"{kind}: {len(texts)} texts", file=sys.stderr)
            figures[kind] = compare(peers, texts, given.repeats)
    result = {
        "benchmark": "against",
        "model": given.name,
        "workloads": figures,
        "provenance": Provenance.now("openvino").as_dict(),
    }
    keep(f"against-{given.name}", result)


if __name__ == "__main__":
    main()
