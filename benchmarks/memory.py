"""What a server's processes hold, and how long they take to be ready, cold and from a warm cache.

Run: python -m benchmarks.memory [--model ID|DIR] [--name NAME]

Memory is Pss: shared pages count once, and a mapped file counts where it is resident; the peak is of
all that was resident until it was ready. It is read when ready, after texts of every length up to the
largest, and again after as many more: it has to stay flat. Cold is a fresh data folder (hashes,
conversion, certificate); the files are in the page cache either way. The last line is JSON.
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.figures import keep, parser, provenance
from benchmarks.harness import Shape, measure, own_server
from benchmarks.texts import sentences


def memory_mib(pid: int, file: str, field: str) -> float:
    """*field* of one of a process' files in /proc: `Pss`, or `VmHWM`, the most that was resident."""
    lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    found = dict(line.split(":", 1) for line in lines if ":" in line)
    return round(int(found[field].split()[0]) / 1024, 1)


def texts_of_every_length(words_max: int) -> list[str]:
    """From a few words to *words_max*, doubling, then mixed: what makes every shape appear."""
    words = (" ".join(sentences(words_max // 4 + 1)).split() * 2)[:words_max]
    lengths = [4 * 2**power for power in range(20) if 4 * 2**power < words_max] + [words_max]
    return [" ".join(words[:length]) for length in lengths] + sentences(
        32, words_median=words_max / 8, words_max=words_max
    )


def started(given: Any, data_dir: Path, words_max: int) -> dict[str, Any]:
    """One life of a server: when it was ready, what it held."""
    started_s = time.perf_counter()
    arguments = ["--precision", given.precision]
    with own_server(given.model, data_dir=data_dir, arguments=arguments) as target:
        ready_s = time.perf_counter() - started_s
        assert target.pid is not None
        figures = {
            "ready_s": round(ready_s, 2),
            "peak_mib": memory_mib(target.pid, "status", "VmHWM"),
            "pss_ready_mib": memory_mib(target.pid, "smaps_rollup", "Pss"),
        }
        texts = texts_of_every_length(words_max)
        for name in ("pss_warm_mib", "pss_later_mib"):
            measure(target, Shape(1, len(texts)), texts, duration_s=0.001)  # each once
            figures[name] = memory_mib(target.pid, "smaps_rollup", "Pss")
    return figures


def main() -> None:
    given = parser(
        __doc__, model="all-minilm-l6-v2", name="all-minilm-l6-v2", precision="int8", words_max=120
    ).parse_args()
    with tempfile.TemporaryDirectory(prefix="trivec-bench-") as folder:
        lives = {name: started(given, Path(folder), given.words_max) for name in ("cold", "cached")}
    for name, figures in lives.items():
        print(f"{name}: {figures}", file=sys.stderr)
    result = {
        "benchmark": "memory",
        "model": given.name,
        "precision": given.precision,
        "lives": lives,
        "provenance": provenance("openvino"),
    }
    keep(f"memory-{given.name}-{given.precision}", result, record=given.record)


if __name__ == "__main__":
    main()
