"""What accounts cost a real server: one with keys on SQLite beside one without, in turns.

`python -m benchmarks.accounts_served [--model ID|DIR] [--data-dir DIR] [--seconds S] [--rounds N]`

Both have the model loaded; only one is asked at a time, by many clients with one text a request.
`kept` is throughput with accounts over throughput without; `kept_cpu` the same by processor time of
the server's processes a request, which neighbours on the machine disturb less. `added_ms` is what a
lone client's median grows by. A key with both limits does the most work there is. The last line is
JSON.
"""

import argparse
import json
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks.figures import Provenance, Spread, ratio
from benchmarks.harness import Shape, Target, measure, own_server
from benchmarks.texts import sentences

from trivec.accounts import KeyPlan, RateLimits
from trivec.accounts.stores import open_administration
from trivec.core.clock import SystemClock
from trivec.settings import Settings

PLENTY = 1_000_000_000
CROWD = Shape(client_count=48, text_count=1)
LONE = Shape(client_count=1, text_count=1)
WITHOUT = "without"
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Turn:
    """One server asked for a while."""

    rate: float  # requests a second
    cpu_s: float  # the server's, a request
    p50_ms: float


def take_turn(target: Target, shape: Shape, *, seconds: float) -> Turn:
    assert target.pid is not None
    before_s = tree_cpu_s(target.pid)
    answers = measure(target, shape, sentences(512), duration_s=seconds)
    used_s = tree_cpu_s(target.pid) - before_s
    return Turn(answers.rate, used_s / len(answers.latencies_s), answers.latency_s(0.5) * 1000)


def tree_cpu_s(pid: int) -> float:
    """Processor time of a process and of all below it that still run."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return (int(fields[11]) + int(fields[12])) / TICKS + sum(tree_cpu_s(int(c)) for c in children)


@contextmanager
def targets(model: str, folder: Path) -> Iterator[dict[str, Target]]:
    """A server without accounts, and two keys of one with them."""
    keys = {"free": RateLimits(), "limited": RateLimits(PLENTY, PLENTY)}
    with open_administration(Settings(data_dir=folder), clock=SystemClock()) as books:
        plain = {
            name: books.create_key(KeyPlan(name, limits=allowance)).plain
            for name, allowance in keys.items()
        }
    with (
        own_server(model, data_dir=folder / "without", arguments=["--no-auth"]) as without,
        own_server(model, data_dir=folder) as keyed,
    ):
        yield {WITHOUT: without} | {name: replace(keyed, key=key) for name, key in plain.items()}


def run(model: str, folder: Path, *, seconds: float, rounds: int) -> dict[str, object]:
    crowd: dict[str, list[Turn]] = defaultdict(list)
    lone: dict[str, list[Turn]] = defaultdict(list)
    with targets(model, folder) as asked:
        for target in asked.values():
            take_turn(target, CROWD, seconds=1)
        for _ in range(rounds):
            for name, target in asked.items():
                lone[name].append(take_turn(target, LONE, seconds=seconds / 3))
                crowd[name].append(take_turn(target, CROWD, seconds=seconds))
    figures: dict[str, object] = {}
    for name in asked:
        rates, cpu = [t.rate for t in crowd[name]], [t.cpu_s for t in crowd[name]]
        added = [
            one.p50_ms - base.p50_ms for one, base in zip(lone[name], lone[WITHOUT], strict=True)
        ]
        figures[name] = {
            "requests_a_second": round(sum(rates) / rounds),
            "cpu_us_a_request": round(sum(cpu) / rounds * 1e6),
            "kept": asdict(ratio(rates, [t.rate for t in crowd[WITHOUT]])),
            "kept_cpu": asdict(ratio([t.cpu_s for t in crowd[WITHOUT]], cpu)),
            "added_ms": asdict(Spread.of(added)),
        }
        print(f"{name}: {json.dumps(figures[name])}", file=sys.stderr)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="all-minilm-l6-v2")
    parser.add_argument("--folder", type=Path, help="where the SQLite file goes")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=4)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        figures = run(given.model, Path(folder), seconds=given.seconds, rounds=given.rounds)
    provenance = Provenance.now("openvino", "granian").as_dict()
    print(json.dumps({"benchmark": "accounts_served", **figures, "provenance": provenance}))


if __name__ == "__main__":
    main()
