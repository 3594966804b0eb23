"""From the files in `benchmarks/results` to `docs/performance.md`.

Run: python -m benchmarks.report

Nothing is typed by hand: a figure that is not in a file is not on the page. Each table names the CPU's
instructions, and each section the machine, the commit and the day of its file.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks.figures import RESULTS

DOCS = Path(__file__).parents[1] / "docs"

OPENING = """# Performance

<!-- Made by `python -m benchmarks.report` from `benchmarks/results/*.json`; edit those, not this. -->

Machines drift and have neighbours, so what is compared was measured turn and turn about in one run, and
ratios were taken round by round. Figures are medians, with the lowest and highest in brackets. "Ours over
it" is our rate divided by that of the line, "4x64" four clients that each send 64 texts a request, and a
model called `-dummy` the shape of the named one with random weights, which `benchmarks.dummy` makes. How
each figure was taken is in the first lines of its script. To repeat one, in a checkout, with the Python of `.venv` (`--record` keeps it for this page, and
without it a result goes to `benchmarks/local`, which git ignores):

<!-- not run: measures for minutes to hours -->
```sh
python -m benchmarks.roster                       # the peers' environments
python -m benchmarks.compare                      # beside the peers' libraries
python -m benchmarks.compare --http               # beside the peers' servers, and our own engine
python -m benchmarks.engine --name all-minilm-l6-v2
python -m benchmarks.engine --profile             # where the time goes, kernel by kernel
python -m benchmarks.memory
```
"""

Result: TypeAlias = Mapping[str, Any]
Columns: TypeAlias = Mapping[str, tuple[str, int]]  # by head: the figure, and its digits
ENGINE: Columns = {
    "tokens/s": ("tokens_a_second", 3),
    "texts/s": ("texts_a_second", 3),
    "of the limit of the matrix products": ("share_of_onednn", 2),
    "of the limit with attention at the fp32 rate": ("share_of_arithmetic", 2),
}
AGAINST: Columns = {
    "texts/s": ("texts_a_second", 3),
    "ours over it": ("ours_over_it", 2),
    "cosine to ours, worst of a few": ("cosine_min", 4),
}
OVER_HTTP: Columns = {
    "texts/s": ("texts_a_second", 3),
    "ours over it": ("ours_over_it", 2),
    "p50, ms": ("p50_ms", 3),
    "p99, ms": ("p99_ms", 3),
}
MEMORY: Columns = {
    "ready after, s": ("ready_s", 3),
    "peak until then, MiB": ("peak_mib", 3),
    "Pss when ready, MiB": ("pss_ready_mib", 3),
    "after every length": ("pss_warm_mib", 3),
    "after more": ("pss_later_mib", 3),
}


def load_results() -> dict[str, Result]:
    """Every kept result by its file's name."""
    return {file.stem: json.loads(file.read_text()) for file in sorted(RESULTS.glob("*.json"))}


def number(spread: Mapping[str, float], *, digits: int = 3) -> str:
    """`1,430 (1,390 to 1,460)`; one repeat has no ends."""
    shown = [f"{short(spread[name], digits)}" for name in ("median", "lowest", "highest")]
    return shown[0] if spread["repeats"] == 1 else f"{shown[0]} ({shown[1]} to {shown[2]})"


def short(value: float, digits: int = 3) -> str:
    """*value* with *digits* that mean something, never in powers of ten."""
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 10 ** (digits - 1) else f"{rounded:g}"


def instructions(result: Result) -> str:
    """What decides how fast int8 is on the CPU of *result*."""
    if result["provenance"].get("masked"):
        return "AVX2 (masked)"
    has = result["provenance"]["instructions"].split()
    for name, words in (
        ("amx_int8", "AMX"),
        ("avx512_vnni", "AVX-512 VNNI"),
        ("avx_vnni", "AVX-VNNI"),
        ("avx512f", "AVX-512 without VNNI"),
        ("avx2", "AVX2 without VNNI"),
    ):
        if name in has:
            return words
    return result["provenance"]["cpu"] or "unknown instructions"


def table(result: Result, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Its first column's head names the CPU's instructions."""
    named = [f"{head[0]}, {instructions(result)}", *head[1:]]
    lines = ["| " + " | ".join(named) + " |", "|---|" + "--:|" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def source(result: Result) -> str:
    said = result["provenance"]
    masked = ", masked to AVX2" if said.get("masked") else ""
    return (
        f"{said['cpu']}, {said['core_count']} cores ({said['instructions']}{masked}), "
        f"{said['date'][:10]}, commit {said['commit']}. Other work took "
        f"{said['others_busy'] or 0:.0%} of the machine."
    )


def tabled(result: Result, rows: Mapping[str, Any], *, first: str, columns: Columns) -> str:
    """A row for each of *rows*, by their rate where they have one; what failed says why."""
    shown = []
    for name, row in sorted(rows.items(), key=_rate, reverse=True):
        cells = [_cell(row.get(key), digits) for key, digits in columns.values()]
        shown.append((name, row["failed"], *cells[1:]) if "failed" in row else (name, *cells))
    return table(result, (first, *columns), shown)


def _cell(figure: float | Mapping[str, float] | None, digits: int) -> str:
    if isinstance(figure, Mapping):
        return number(figure, digits=digits)
    return "" if figure is None else short(figure, digits)


def _rate(row: tuple[str, Mapping[str, Any]]) -> float:
    return float(row[1].get("ours_over_it", {"median": 0.0})["median"]) * -1


def engine_section(result: Result) -> str:
    body = tabled(result, result["workloads"], first="text length in tokens", columns=ENGINE)
    return f"## Engine: {result['model']}, {result['precision']}\n\n{body}"


def against_section(result: Result) -> str:
    tables = [
        tabled(result, rows, first=f"{kind} texts", columns=AGAINST)
        for kind, rows in result["workloads"].items()
    ]
    return "\n".join([f"## Beside the peers: {result['model']}\n", *tables])


def over_http_section(result: Result) -> str:
    tables = []
    for shape, rows in result["shapes"].items():
        named = {
            name if name == "trivec" or "p50_ms" in row else f"{name}, without HTTP": row
            for name, row in rows.items()
        }
        tables.append(tabled(result, named, first=f"{shape} clients x texts", columns=OVER_HTTP))
    return "\n".join([f"## Over HTTP: {result['model']}\n", *tables])


def memory_section(result: Result) -> str:
    body = tabled(result, result["lives"], first="start", columns=MEMORY)
    return f"## Memory: {result['model']}, {result['precision']}\n\n{body}"


def profile_section(result: Result) -> str:
    lengths = " + ".join(map(str, result["lengths"]))
    rows = [(name, f"{share:.1%}") for name, share in result["shares"].items()]
    title = f"## Where the time goes: {result['model']}, {result['recipe']}, {lengths} tokens"
    return f"{title}\n\n{table(result, ('kind of node and kernel', 'of one slot'), rows)}"


SECTIONS = {
    "over_http": over_http_section,
    "against": against_section,
    "engine": engine_section,
    "memory": memory_section,
    "profile": profile_section,
}


def page(results: Mapping[str, Result]) -> str:
    """The whole of `docs/performance.md`."""
    parts = [OPENING]
    for kind, section in SECTIONS.items():
        headed: dict[str, list[str]] = {}  # what several runs found of one thing
        for result in results.values():
            if result.get("benchmark") == kind:
                heading, _, body = section(result).partition("\n\n")
                headed.setdefault(heading, []).append(f"{body}\n{source(result)}\n")
        parts += ["\n".join([heading + "\n", *bodies]) for heading, bodies in headed.items()]
    return "\n".join(parts)


def main() -> None:
    (DOCS / "performance.md").write_text(page(load_results()))


if __name__ == "__main__":
    main()
