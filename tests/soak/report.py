"""What a form found, held to its pass lines, and the command line that all forms share."""

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.figures import keep, parser, provenance


@dataclass(frozen=True, slots=True)
class Check:
    """One sentence of what must show, with the figure and whether it holds."""

    says: str
    figure: float
    holds: bool


@dataclass(slots=True)
class Report:
    """Checks in the order they were made, and figures beside them."""

    checks: list[Check] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def at_most(self, says: str, figure: float, bound: float) -> None:
        self.checks.append(Check(f"{says}: at most {bound:g}", round(figure, 4), figure <= bound))

    def at_least(self, says: str, figure: float, bound: float) -> None:
        self.checks.append(Check(f"{says}: at least {bound:g}", round(figure, 4), figure >= bound))

    @property
    def failures(self) -> list[Check]:
        return [check for check in self.checks if not check.holds]


def command(name: str, about: str | None, run: Callable[..., Report], **defaults: Any) -> None:
    """Run a form whose options are *defaults*, keep its report and leave with what it came to."""
    given = vars(parser(about, **defaults).parse_args())
    record = given.pop("record")
    logging.disable(logging.CRITICAL)  # the service says at length what we do to it
    report = run(**given)
    for check in report.checks:
        print(f"{'ok  ' if check.holds else 'FAIL'} {check.figure:>12g}  {check.says}")
    keep(
        f"soak-{name}",
        {
            "benchmark": f"soak.{name}",
            "asked": given,
            "passed": not report.failures,
            "checks": {check.says: check.figure for check in report.checks},
            **report.figures,
            "provenance": provenance("granian", "openvino", "openai"),
        },
        record=record,
    )
    sys.exit(1 if report.failures else 0)
