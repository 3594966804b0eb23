"""What a server's processes hold, and how long they take to be ready, cold and from a warm cache.

Run: python -m benchmarks.memory [--model ID|DIR] [--name NAME]

Memory is Pss over all of its processes, and the peak until it is ready that of the first: shared pages count once, and a mapped file counts where it is
resident. Read when ready, after texts of every length up to the largest, and again after as many
more: it has to stay flat. Cold is a fresh data folder (hashes, conversion, certificate); the files
themselves are in the page cache either way. The last line is JSON.
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.figures import Provenance, keep, parser
from benchmarks.harness import Shape, Target, measure, own_server
from benchmarks.texts import sentences

MEBIBYTE = 1024 * 1024


def pss_mib(pid: int) -> float:
    """Proportional set size of *pid* and all its descendants."""
    total_kib = sum(_pss_kib(one) for one in (pid, *_descendants(pid)))
    return round(total_kib * 1024 / MEBIBYTE, 1)


def peak_mib(pid: int) -> float:
    """The most that was ever resident of *pid*, mapped files included."""
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    return round(int(status["VmHWM"].split()[0]) * 1024 / MEBIBYTE, 1)


def _pss_kib(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1])
    return 0


def _descendants(pid: int) -> list[int]:
    children = [
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]
    return children + [deeper for child in children for deeper in _descendants(child)]


def texts_of_every_length(words_max: int) -> list[str]:
    """From a few words to *words_max*, doubling, then mixed: what makes every shape appear."""
    words = (" ".join(sentences(words_max // 4 + 1)).split() * 2)[:words_max]
    lengths = [4 * 2**power for power in range(20) if 4 * 2**power < words_max] + [words_max]
    return [" ".join(words[:length]) for length in lengths] + sentences(
        32, words_median=words_max / 8, words_max=words_max
    )


def embed_once(target: Target, texts: list[str]) -> None:
    measure(target, Shape(1, len(texts)), texts, duration_s=0.001)


def started(given: Any, data_dir: Path, words_max: int) -> dict[str, Any]:
    """One life of a server: when it was ready, what it held."""
    started_s = time.perf_counter()
    arguments = ["--precision", given.precision]
    with own_server(given.model, data_dir=data_dir, arguments=arguments) as target:
        ready_s = time.perf_counter() - started_s
        assert target.pid is not None
        figures = {
            "ready_s": round(ready_s, 2),
            "peak_mib": peak_mib(target.pid),
            "pss_ready_mib": pss_mib(target.pid),
        }
        texts = texts_of_every_length(words_max)
        for name in ("pss_warm_mib", "pss_later_mib"):
            embed_once(target, texts)
            figures[name] = pss_mib(target.pid)
    return figures


def main() -> None:
    arguments = parser(
        __doc__, model="all-minilm-l6-v2", name="all-minilm-l6-v2", precision="int8", words_max=120
    )
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory(prefix="trivec-bench-") as folder:
        lives = {name: started(given, Path(folder), given.words_max) for name in ("cold", "cached")}
    for name, figures in lives.items():
        print(f"{name}: {figures}", file=sys.stderr)
    result = {
        "benchmark": "memory",
        "model": given.name,
        "precision": given.precision,
        "lives": lives,
        "provenance": Provenance.now("openvino").as_dict(),
    }
    keep(f"memory-{given.name}-{given.precision}", result, record=given.record)


if __name__ == "__main__":
    main()
