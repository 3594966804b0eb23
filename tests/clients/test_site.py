"""The site of docs/ is built without a warning, asks nothing of any other address, and is searched offline."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.clients.test_page import CHROMIUM, FLAGS, need

ROOT = Path(__file__).resolve().parents[2]
MKDOCS = ROOT / ".venv-docs" / "bin" / "mkdocs"
# What a page loads by itself, and not when it is clicked.
LOADED = re.compile(
    r'<(?:script|img|iframe|source|link)\b[^>]*\b(?:src|href)="((?:https?:)?//[^"]*)"'
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as CI builds it: links and anchors that lead nowhere stop it."""
    need(MKDOCS.exists(), "the environment comes with: make docs")
    folder = tmp_path_factory.mktemp("site")
    run = subprocess.run(
        [str(MKDOCS), "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return folder


@pytest.fixture(scope="module")
def tab(site: Path) -> Iterator[Any]:
    need(CHROMIUM, "there is no Chromium: apt-get install chromium")
    api = pytest.importorskip(
        "playwright.sync_api", reason="playwright comes with: make test-clients"
    )
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser.new_page()
        browser.close()


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 40
    loaded = {
        str(page.relative_to(site)): found
        for page in pages
        if (found := LOADED.findall(page.read_text("utf-8")))
    }
    assert loaded == {}
    styles = " ".join(file.read_text("utf-8") for file in site.rglob("*.css"))
    assert re.findall(r"(?:url\(|@import)\s*['\"]?(?:https?:)?//", styles) == []


def test_a_reader_finds_a_word_without_a_server_and_without_a_network(site: Path, tab: Any) -> None:
    asked: list[str] = []
    faults: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("pageerror", lambda fault: faults.append(str(fault)))
    tab.goto((site / "index.html").as_uri())
    tab.wait_for_function("window.component$ !== undefined")  # the theme has begun to listen
    tab.locator(".md-search__input").press_sequentially("qdrant")
    tab.locator(".md-search-result__item a").first.click()
    tab.wait_for_url("**/use/qdrant.html*")
    assert [url for url in asked if not url.startswith("file:")] == []
    assert faults == []
