"""The fenced blocks of README and docs, each with its language and whether it is to be run."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"(?:^<!-- not run: (.+?) -->\n)?^```(\S*)\n(.*?)^```$", re.M | re.S)


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block."""

    place: str  # as docs/api.md:33
    language: str
    text: str
    reason: str  # why it is not run; empty where it is

    @property
    def page(self) -> str:
        return self.place.partition(":")[0]


def blocks(*languages: str) -> list[Block]:
    """Those of *languages*, or all."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    found = []
    for page in pages:
        text = page.read_text("utf-8")
        for match in FENCE.finditer(text):
            line = text.count("\n", 0, match.start(2)) + 1
            place = f"{page.relative_to(ROOT)}:{line}"
            found.append(Block(place, match[2], match[3], match[1] or ""))
    return [one for one in found if not languages or one.language in languages]
