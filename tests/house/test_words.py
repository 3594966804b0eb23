"""The words of the code: a short glossary, and one meaning for each class name."""

import ast
import re
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SRC = ROOT / "src" / "trivec"
NOUNS_MAX = 40
# Of the first edition: each had a word of the field.
PRIVATE_WORDS = re.compile(
    r"\b(desk|lane|waiter|visit|shelf|patience|crew|herald|witness|tally|outlet|guess|bury|leash|"
    r"errand|keyring|heartbeat|canary)\b",
    re.IGNORECASE,
)
QUOTED = re.compile(r'"[^"]+"')  # names in stores and settings files, which outlive the code's


def glossary() -> list[str]:
    page = (ROOT / "docs" / "glossary.md").read_text("utf-8")
    return re.findall(r"^\| ([a-z][\w -]*?) \|", page, re.MULTILINE)[1:]


def classes() -> dict[str, list[str]]:
    """Where each class name is defined at the top of a module."""
    found = defaultdict(list)
    for module in sorted(SRC.rglob("*.py")):
        for node in ast.parse(module.read_text("utf-8")).body:
            if isinstance(node, ast.ClassDef):
                found[node.name].append(str(module.relative_to(SRC)))
    return found


def test_the_glossary_is_short_and_names_each_noun_once() -> None:
    nouns = glossary()
    assert 0 < len(nouns) <= NOUNS_MAX
    assert len(set(nouns)) == len(nouns)


def test_no_two_classes_share_a_name() -> None:
    assert {name: where for name, where in classes().items() if len(where) > 1} == {}


def test_no_private_word_of_the_first_edition_is_left() -> None:
    found = [
        f"{module.relative_to(SRC)}:{number} {word}"
        for module in sorted(SRC.rglob("*.py"))
        if "migrations" not in module.parts  # written once, and never changed
        for number, line in enumerate(module.read_text("utf-8").splitlines(), 1)
        for word in re.findall(r"[A-Za-z][a-z]*|[A-Z]+", QUOTED.sub("", line))
        if PRIVATE_WORDS.fullmatch(word)
    ]
    assert found == []
