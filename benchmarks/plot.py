"""Horizontal bars as SVG, for the page; longest first, ours in the strong colour."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 760
LABEL_WIDTH = 190
VALUE_WIDTH = 70
BAR = 18
GAP = 5
TITLE = 34
OURS = "#1f6f54"
THEIRS = "#b8c4be"


@dataclass(frozen=True, slots=True)
class Bars:
    """One group: a title and a value a name."""

    title: str
    values: Mapping[str, float]

    @property
    def height(self) -> int:
        return TITLE + len(self.values) * (BAR + GAP)


def draw(groups: Sequence[Bars]) -> str:
    """Every group under the one before it, each on a scale of its own."""
    height = sum(group.height for group in groups) + GAP
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    top = 0
    for group in groups:
        lines.append(f'<text x="8" y="{top + 22}" font-weight="bold">{escape(group.title)}</text>')
        ordered = sorted(group.values.items(), key=lambda item: -item[1])
        largest = max(group.values.values())
        for place, (name, value) in enumerate(ordered):
            lines += _bar(name, value, value / largest, top + TITLE + place * (BAR + GAP))
        top += group.height
    return "\n".join([*lines, "</svg>", ""])


def _bar(name: str, value: float, share: float, top: int) -> list[str]:
    length = max(1, round(share * (WIDTH - LABEL_WIDTH - VALUE_WIDTH)))
    colour = OURS if name.startswith("trivec") else THEIRS
    text_top = top + BAR - 5
    return [
        f'<text x="{LABEL_WIDTH - 8}" y="{text_top}" text-anchor="end">{escape(name)}</text>',
        f'<rect x="{LABEL_WIDTH}" y="{top}" width="{length}" height="{BAR}" fill="{colour}"/>',
        f'<text x="{LABEL_WIDTH + length + 6}" y="{text_top}">{value:,.0f}</text>',
    ]
