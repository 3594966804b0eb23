"""What a package says of itself, and the bill of materials of what it is tested with."""

import json
import re
import runpy
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def test_an_index_gets_a_page_whose_links_work_there() -> None:
    text = (ROOT / PROJECT["project"]["readme"]).read_text("utf-8")
    assert re.findall(r"\]\((?!https://)[^)]*\)|!\[", text) == [], "it has no folder to link into"


@pytest.mark.parametrize("name", ["README.md", "docs/index.md", "deploy/package.md"])
def test_every_extra_that_a_page_names_exists(name: str) -> None:
    text = (ROOT / name).read_text("utf-8")
    named = set(re.findall(r"trivec\[([a-z-]+)\]", text))
    assert named <= set(PROJECT["project"]["optional-dependencies"])


def test_the_extras_are_there() -> None:
    extras = set(PROJECT["project"]["optional-dependencies"])
    assert {"gpu", "postgres", "tracing", "bulk", "cluster"} <= extras


def test_the_wheel_carries_the_package_the_man_page_and_nothing_of_the_site() -> None:
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["packages"] == ["src/trivec"]
    assert list(wheel["shared-data"]) == ["deploy/trivec.1"]


class TestBillOfMaterials:
    def read(self) -> list[dict[str, Any]]:
        text = (ROOT / "requirements" / "sbom.json").read_text("utf-8")
        return list(json.loads(text)["components"])

    def test_it_has_every_pin_with_its_hashes(self) -> None:
        pins = runpy.run_path(str(ROOT / "scripts" / "sbom.py"))["pins"]()
        found = [
            (one["name"], one["version"], tuple(hash_["content"] for hash_ in one["hashes"]))
            for one in self.read()
        ]
        assert found == pins, "run: make generated"

    def test_it_has_a_licence_for_each_and_so_has_the_list(self) -> None:
        rows = re.findall(
            r"^\| ([\w.-]+) \| (\S+) \| (\S.*) \|$",
            (ROOT / "requirements" / "licences.md").read_text("utf-8"),
            re.M,
        )[1:]
        expected = [
            (one["name"], one["version"], one["licenses"][0]["expression"]) for one in self.read()
        ]
        assert rows == expected
        assert all(licence not in ("", "None", "UNKNOWN") for *_, licence in rows)
