"""From the files in `benchmarks/results` to `docs/performance.md` and its plot.

Run: python -m benchmarks.report

Nothing is typed by hand: a figure that is not in a file is not on the page, and each table names the
machine, the commit and the day of its file.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.keeping import RESULTS
from benchmarks.plot import Bars, draw

DOCS = Path(__file__).parents[1] / "docs"

OPENING = """# Performance

Made by `python -m benchmarks.report` from `benchmarks/results/*.json`; edit those, not this.

Machines drift and have neighbours, so what is compared was measured turn and turn about in one run, and
ratios were taken round by round. Figures are medians, with the lowest and highest in brackets. How each
was taken is in the first lines of the script that `benchmarks/` has under the same name; to repeat one,
run it: `python -m benchmarks.engine --name all-minilm-l6-v2`.
"""

Result = Mapping[str, Any]


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


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---|" + "--:|" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def source(result: Result) -> str:
    said = result["provenance"]
    busy = said.get("others_busy")
    company = (
        "How busy the machine was with other work was not recorded: repeat it before quoting it."
        if busy is None
        else f"Other work took {busy:.0%} of the machine."
    )
    return (
        f"{said['cpu']}, {said['core_count']} cores ({said['instructions']}), "
        f"{said['date'][:10]}, commit {said['commit']}. {company}"
    )


def engine_section(result: Result) -> str:
    rows: list[tuple[str, ...]] = []
    for name, figures in result["workloads"].items():
        share = figures.get("share_of_onednn") or figures.get("share_of_openvino")
        products = figures.get("share_of_openvino")
        rows.append(
            (
                name,
                number(figures["tokens_a_second"]),
                number(figures["texts_a_second"]),
                number(share, digits=2) if share else "",
                number(products, digits=2) if products else "",
            )
        )
    head = [
        "text length in tokens", "tokens/s", "texts/s",
        "of the limit of the matrix products", "of OpenVINO's own products",
    ]  # fmt: skip
    arithmetic = [one.get("share_of_arithmetic") for one in result["workloads"].values()]
    if any(arithmetic):  # results from before it was measured have four columns
        head.append("of the limit with attention at the fp32 rate")
        shown = [number(one, digits=2) if one else "" for one in arithmetic]
        rows = [(*row, one) for row, one in zip(rows, shown, strict=True)]
    return f"## Engine: {result['model']}, {result['precision']}\n\n{table(head, rows)}\n"


def server_section(result: Result) -> str:
    rows = [
        (
            shape,
            number(figures["texts_a_second"]),
            number(figures["share_of_engine"], digits=2),
            number(figures["p50_ms"]),
            number(figures["p99_ms"]),
            number(figures["p50_beside_compute_ms"]) if "p50_beside_compute_ms" in figures else "",
        )
        for shape, figures in result["shapes"].items()
    ]
    head = (
        "clients x texts", "texts/s", "of the engine's own rate", "p50, ms", "p99, ms",
        "p50 beside compute, ms",
    )  # fmt: skip
    return f"## Over HTTP: {result['model']}, {result['precision']}\n\n{table(head, rows)}\n"


def against_section(result: Result) -> str:
    parts = [f"## Beside the peers: {result['model']}\n"]
    for kind, figures in result["workloads"].items():
        rows = [
            (
                name,
                number(one["texts_a_second"]),
                number(one["ours_over_it"], digits=2),
                f"{one['cosine_min']:.4f}",
            )
            for name, one in sorted(
                figures.items(), key=lambda item: -item[1]["texts_a_second"]["median"]
            )
        ]
        head = (f"{kind} texts", "texts/s", "ours over it", "cosine to ours, worst of a few")
        parts.append(table(head, rows) + "\n")
    return "\n".join(parts)


def over_http_section(result: Result) -> str:
    rows = []
    for shape, servers in result["shapes"].items():
        ours, theirs = servers["trivec"], servers["infinity"]
        rows.append(
            (
                shape,
                number(ours["texts_a_second"]),
                number(theirs["texts_a_second"]),
                number(theirs["ours_over_it"], digits=2),
                number(ours["p50_ms"]),
                number(theirs["p50_ms"]),
            )
        )
    head = (
        "clients x texts", "Trivec, texts/s", "Infinity, texts/s", "ours over it",
        "our p50, ms", "its p50, ms",
    )  # fmt: skip
    alone = result["sentence-transformers without HTTP"]
    words = (
        "sentence-transformers without HTTP, in the same run: "
        f"{number(alone['texts_a_second'])} texts/s; our server at 4x64 is "
        f"{number(alone['ours_over_it'], digits=2)} times that."
    )
    return f"## Over HTTP beside Infinity: {result['model']}\n\n{table(head, rows)}\n\n{words}\n"


def fairness_section(result: Result) -> str:
    figures = result["figures"]
    return (
        f"## Fairness: {result['model']}, {result['precision']}\n\n"
        f"A lone query's p99 is {short(figures['p99_alone_ms'])} ms alone and "
        f"{short(figures['p99_beside_ms'])} ms beside one huge request, where one batch takes "
        f"{short(figures['batch_ms'])} ms and {short(figures['p99_allowed_ms'])} ms are allowed. "
        f"The huge request keeps {short(figures['huge_rate_kept'], 2)} of its rate.\n"
    )


def memory_section(result: Result) -> str:
    rows = [
        (
            name,
            short(life["ready_s"]),
            short(life["pss_ready_mib"]),
            short(life["pss_warm_mib"]),
            short(life["pss_later_mib"]),
        )
        for name, life in result["lives"].items()
    ]
    head = ("start", "ready after, s", "Pss when ready, MiB", "after every length", "after more")
    return f"## Memory: {result['model']}, {result['precision']}\n\n{table(head, rows)}\n"


def invariance_section(result: Result) -> str:
    found = ", ".join(f"{name} {one['largest']:g}" for name, one in result["differences"].items())
    return (
        f"## Same text, same bits: {result['model']}\n\nLargest difference of any number, "
        f"{result['texts']} texts alone and in random company: {found}.\n"
    )


def profile_section(result: Result) -> str:
    lengths = " + ".join(map(str, result["lengths"]))
    rows = [(name, f"{share:.1%}") for name, share in result["shares"].items()]
    title = f"## Where the time goes: {result['model']}, {result['recipe']}, {lengths} tokens"
    return f"{title}\n\n{table(('kind of node and kernel', 'of one slot'), rows)}\n"


SECTIONS = {
    "over_http": over_http_section,
    "against": against_section,
    "engine": engine_section,
    "server": server_section,
    "fairness": fairness_section,
    "memory": memory_section,
    "invariance": invariance_section,
    "profile": profile_section,
}


def page(results: Mapping[str, Result]) -> str:
    """The whole of `docs/performance.md`."""
    parts = [OPENING]
    if plots(results):
        parts.append("![Texts a second, ours and the peers'](performance.svg)\n")
    for kind, section in SECTIONS.items():
        of_kind = [result for result in results.values() if result.get("benchmark") == kind]
        parts += [f"{section(result)}\n{source(result)}\n" for result in of_kind]
    return "\n".join(parts)


def plots(results: Mapping[str, Result]) -> list[Bars]:
    """One group of bars for each comparison with peers."""
    groups = []
    for result in results.values():
        if result.get("benchmark") == "against":
            for kind, figures in result["workloads"].items():
                rates = {name: one["texts_a_second"]["median"] for name, one in figures.items()}
                groups.append(Bars(f"{result['model']}, {kind} texts: texts a second", rates))
        if result.get("benchmark") == "over_http":
            for shape, servers in result["shapes"].items():
                rates = {name: one["texts_a_second"]["median"] for name, one in servers.items()}
                groups.append(Bars(f"{result['model']} over HTTP, {shape}: texts a second", rates))
    return groups


def main() -> None:
    results = load_results()
    (DOCS / "performance.md").write_text(page(results))
    (DOCS / "performance.svg").write_text(draw(plots(results)))


if __name__ == "__main__":
    main()
