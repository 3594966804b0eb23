"""The pages in a real browser: what a visitor sees, does, and must never be able to do.

Every visit ends in three questions, asked by the fixture: did the console complain, did a request
leave the server, did a text become markup?
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from tests.api.house import MODEL, PLAIN_MODEL, House
from tests.process.server import Server, running
from tests.support.dummy import blueprint_of, write_dummy
from tests.support.heads import write_classifier

from trivec import playground
from trivec.playground import STATIC, page_operations, static_files

AXE = Path(__file__).resolve().parents[1] / "node" / "node_modules" / "axe-core" / "axe.min.js"
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
# A new profile that looks nothing up, and no sandbox, which root may not have.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
CROSS_ENCODER = "cross-encoder"
TWO = ["hello world", "hello there"]
HOSTILE = [
    "<script>document.title='taken'</script>",
    '"><img src=x onerror="document.title=\'taken\'">',
    "\u202eright to left \u0645\u0631\u062d\u0628\u0627",
    "{{7*7}} ${7*7} </textarea><b>bold</b>",
    "\U0001f469\u200d\U0001f680 \U0001f1e9\U0001f1ea",
    "a" * 10_000,
]
METRICS = b"""\
trivec_queue_requests{model="a"} 3.0
trivec_queue_requests{model="b"} 2.0
trivec_queue_tokens{model="a"} 1234.0
trivec_phase{phase="ready"} 1.0
trivec_phase{phase="loading"} 0.0
trivec_request_duration_seconds_bucket{le="0.01",route="/embeddings",status="2xx"} 50.0
trivec_request_duration_seconds_bucket{le="0.1",route="/embeddings",status="2xx"} 90.0
trivec_request_duration_seconds_bucket{le="1.0",route="/embeddings",status="2xx"} 100.0
trivec_request_duration_seconds_bucket{le="+Inf",route="/embeddings",status="2xx"} 100.0
trivec_request_duration_seconds_bucket{le="0.01",route="/tokenize",status="2xx"} 999.0
trivec_request_duration_seconds_bucket{le="+Inf",route="/tokenize",status="2xx"} 999.0
"""


def need(what: object, reason: str) -> None:
    """Skip where *what* is absent; in CI, which installs it, fail."""
    if not what:
        assert "CI" not in os.environ, reason
        pytest.skip(reason)


@pytest.fixture(scope="module")
def house() -> Iterator[House]:
    house = House()
    house.serve(pages=page_operations(has_keys=True), metrics=lambda: METRICS)
    yield house
    house.close()


@pytest.fixture(scope="module")
def address(house: House) -> Iterator[str]:
    with house.listening() as address:
        yield address


@pytest.fixture(scope="module")
def dummy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real server with all three vectors, and a cross-encoder, of random weights."""
    folder = tmp_path_factory.mktemp("dummy")
    write_dummy(folder / "model", blueprint_of(MODEL).with_layers(1))
    write_classifier(folder / "head")
    models = [f"{MODEL}={folder / 'model'}", f"{CROSS_ENCODER}={folder / 'head'}"]
    flags = [part for one in models for part in ("--model", one)]
    with running(folder, *flags, "--precision", "fp32") as server:
        assert server.url
        yield server


@pytest.fixture(scope="module")
def browser(address: str, server: Server) -> Iterator[Any]:
    """Chromium, started after the servers: they run loops of their own to begin with."""
    need(CHROMIUM, "there is no Chromium: apt-get install chromium")
    api = pytest.importorskip(
        "playwright.sync_api", reason="playwright comes with: make test-clients"
    )
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@dataclass
class Visit:
    """One visitor's tab, and what must stay empty in it."""

    page: Any
    address: str
    complaints: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("console", self.hear)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        self.page.on("request", self.look_at)

    def hear(self, said: Any) -> None:
        if said.type in ("error", "warning"):
            self.complaints.append(said.text)

    def look_at(self, request: Any) -> None:
        if not request.url.startswith((self.address, "data:")):
            self.foreign.append(request.url)

    def open(self, path: str, key: str | None) -> None:
        self.page.goto(self.address + path)
        if key is not None:
            self.page.get_by_label("Key", exact=True).fill(key)
            self.page.get_by_role("button", name="Connect").click()

    def embed(self, texts: list[str], model: str = MODEL) -> None:
        self.page.locator("#embed:enabled").wait_for()
        self.page.get_by_label("Model", exact=True).select_option(model)
        self.page.get_by_label("Texts, one a line").fill("\n".join(texts))
        self.page.get_by_role("button", name="Embed").click()
        self.page.locator("#heat table").wait_for()

    def matrix(self, size: int) -> NDArray[np.float64]:
        """The heat map's numbers, to more decimals than its cells have room for: `[texts, texts]`."""
        cells = self.page.locator("#heat td[data-at]").evaluate_all(
            "cells => cells.map((cell) => Number(cell.title.split(': ')[1]))"
        )
        return np.array(cells).reshape(size, size)


@pytest.fixture
def visits(browser: Any) -> Iterator[Callable[..., Visit]]:
    """Opens tabs, each with a session storage of its own, and asks the three questions at the end."""
    opened: list[Visit] = []

    def visit(address: str, **options: Any) -> Visit:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | options)
        context.set_default_timeout(120_000)  # a wait ends when its event comes; machines are slow
        opened.append(Visit(context.new_page(), address))
        return opened[-1]

    yield visit
    for one in opened:
        assert one.complaints == []
        assert one.foreign == []
        assert "taken" not in one.page.title()
        one.page.context.close()


@pytest.fixture
def visit(visits: Callable[..., Visit], house: House, address: str) -> Visit:
    """The playground, with a key pasted."""
    one = visits(address)
    one.open("/", house.key)
    return one


def new_key(address: str, house: House, name: str) -> str:
    headers = {"authorization": f"Bearer {house.key}"}
    made = httpx.post(f"{address}/admin/v1/keys", json={"name": name}, headers=headers, timeout=60)
    return str(made.json()["key"])


def vectors_of(address: str, key: str, model: str, texts: list[str]) -> list[dict[str, Any]]:
    """What the API answers: the ground for all that the page shows."""
    kinds = ["dense", "sparse", "multi"] if model == MODEL else ["dense"]
    answer = httpx.post(
        f"{address}/v1/embeddings",
        json={"model": model, "input": texts, "output_type": kinds},
        headers={"authorization": f"Bearer {key}"},
        timeout=60,
    )
    return list(answer.json()["data"])


def similarities(items: list[dict[str, Any]], kind: str) -> NDArray[np.float64]:
    if kind == "dense":
        rows = np.array([one["embedding"] for one in items])
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        return np.asarray(rows @ rows.T)
    if kind == "sparse":
        words = [one["sparse_embedding"] for one in items]
        by_id = [dict(zip(one["indices"], one["values"], strict=True)) for one in words]
        return np.array(
            [[sum(w * b.get(i, 0) for i, w in a.items()) for b in by_id] for a in by_id]
        )
    tokens = [np.array(one["multi_embedding"]["data"]) for one in items]
    return np.array([[(a @ b.T).max(axis=1).mean() for b in tokens] for a in tokens])


def check_heat_maps(visit: Visit, key: str) -> None:
    """Embed two texts, and compare every map with numpy's from the API's own vectors."""
    visit.embed(TWO)
    items = vectors_of(visit.address, key, MODEL, TWO)
    wanted = {kind: similarities(items, kind) for kind in ("dense", "sparse", "multi")}
    summed = wanted["dense"] + 0.3 * wanted["sparse"] + wanted["multi"]
    wanted["fused"] = summed / 2.3
    for kind, expected in wanted.items():
        visit.page.get_by_role("radio", name=kind).check()
        np.testing.assert_allclose(visit.matrix(2), expected, atol=0.00051)


def test_the_heat_maps_are_what_the_api_answers(visit: Visit, house: House) -> None:
    check_heat_maps(visit, house.key)


def test_three_vectors_of_a_real_server(visits: Callable[..., Visit], dummy: Server) -> None:
    visit = visits(dummy.url)
    visit.open("/", dummy.key)
    check_heat_maps(visit, dummy.key)
    assert visit.page.locator("#alignment path").count() > 0
    assert visit.page.locator("#sparse .token small").count() > 0


def test_the_weights_of_the_fused_map_can_be_moved(
    visit: Visit, house: House, address: str
) -> None:
    visit.embed(TWO)
    visit.page.get_by_role("radio", name="fused").check()
    for name, weight in (("dense", "1"), ("sparse", "0"), ("multi", "0")):
        visit.page.get_by_role("slider", name=name).fill(weight)
    expected = similarities(vectors_of(address, house.key, MODEL, TWO), "dense")
    np.testing.assert_allclose(visit.matrix(2), expected, atol=0.00051)


def test_a_real_model_end_to_end(visits: Callable[..., Visit], server: Server) -> None:
    visit = visits(server.url)
    visit.open("/", server.key)
    texts = ["Reset my password", "I forgot my login", "A cat sleeps on the sofa"]
    visit.embed(texts, PLAIN_MODEL)
    found = visit.matrix(3)
    items = vectors_of(server.url, server.key, PLAIN_MODEL, texts)
    np.testing.assert_allclose(found, similarities(items, "dense"), atol=0.00051)
    assert found[0, 1] > found[0, 2]
    assert "verified against the catalogue" in visit.page.locator("#card").inner_text()
    legend = visit.page.locator("#timing").inner_text()
    for name in ("tokenize", "queue", "compute", "encode", "network and page", "total"):
        assert name in legend


def test_tokens_are_counted_while_they_are_typed(visit: Visit) -> None:
    visit.page.get_by_label("Texts, one a line").fill("abc\nde")
    count = visit.page.locator("#count")
    count.get_by_text("2 texts, 9 tokens").wait_for()  # a byte is a token here, between two more
    visit.page.get_by_label("Texts, one a line").press_sequentially("fg")
    count.get_by_text("2 texts, 11 tokens").wait_for()
    assert visit.page.locator("#tokens li").first.locator(".token").count() == 5
    visit.page.get_by_label("Texts, one a line").fill("a" * 63)
    visit.page.get_by_text("65 · too long").wait_for()


def test_a_text_that_is_too_long_is_refused_in_the_apis_words_and_cut_when_asked(
    visit: Visit,
) -> None:
    visit.page.locator("#embed:enabled").wait_for()
    visit.page.get_by_label("Texts, one a line").fill("a" * 100 + "\nshort")
    visit.page.get_by_role("button", name="Embed").click()
    visit.page.get_by_role("alert").get_by_text("maximum context length is 64 tokens").wait_for()
    visit.complaints.clear()  # the browser's own line of a 400
    visit.page.get_by_label("Cut texts that are too long").check()
    visit.page.get_by_role("button", name="Embed").click()
    visit.page.locator("#heat table").wait_for()
    assert not visit.page.get_by_role("alert").is_visible()


def test_counting_tokens_does_not_clear_what_was_said_of_a_request(visit: Visit) -> None:
    """They are counted a moment after the typing, which may be after the request was refused."""
    visit.page.locator("#embed:enabled").wait_for()
    alert = visit.page.get_by_role("alert")
    visit.page.get_by_label("Texts, one a line").fill("a" * 100)
    visit.page.get_by_role("button", name="Embed").click()
    alert.get_by_text("maximum context length is 64 tokens").wait_for()
    visit.complaints.clear()
    visit.page.get_by_label("Texts, one a line").fill("a" * 70)
    visit.page.get_by_text("72 · too long").wait_for()
    assert alert.is_visible()


def test_a_key_that_no_header_can_hold_is_refused_in_plain_words(
    visits: Callable[..., Visit], address: str
) -> None:
    visit = visits(address)
    visit.open("/", "ключ")
    visit.page.get_by_role("alert").get_by_text("A key has no such characters").wait_for()


def test_hostile_texts_are_shown_as_texts(visit: Visit) -> None:
    visit.page.get_by_label("Cut texts that are too long").check()
    visit.embed(HOSTILE)
    rows = visit.page.locator("#heat th[scope=row] bdi").all_text_contents()
    assert rows == [text.strip() for text in HOSTILE]
    visit.page.locator("#heat td[data-at='0,1']").click()
    visit.page.locator(".map").focus()
    for _ in HOSTILE:
        visit.page.keyboard.press("ArrowRight")
    assert visit.page.locator("main :is(img, script, b, iframe)").count() == 0
    for language in ("Python", "JavaScript", "curl"):
        visit.page.get_by_role("radio", name=language).check()
        assert "<script>" in visit.page.locator("#code code").text_content()


def test_weights_of_words_and_meetings_of_tokens_are_the_apis(
    visit: Visit, house: House, address: str
) -> None:
    visit.embed(TWO)
    first, second = vectors_of(address, house.key, MODEL, TWO)
    sparse = first["sparse_embedding"]
    by_token = {f"‹{i}›": w for i, w in zip(sparse["indices"], sparse["values"], strict=True)}
    shown = (
        visit.page.locator("#sparse li")
        .first.locator(".token")
        .evaluate_all(
            "tokens => tokens.map((one) => [one.title, one.querySelector('small').textContent])"
        )
    )
    assert len(shown) == len(TWO[0]) + 2
    for token, weight in shown:
        assert weight == (f"{by_token[token]:.2f}" if token in by_token else "")
    query, passage = (np.array(one["multi_embedding"]["data"]) for one in (first, second))
    scores = query @ passage.T
    labels = visit.page.locator("#alignment button").evaluate_all(
        "buttons => buttons.map((one) => one.title)"
    )
    ids = [f"‹{byte + 4}›" for byte in TWO[1].encode()] + ["‹2›"]
    for row, label in zip(scores, labels, strict=True):
        decimals = f"{row.max():.3f}"
        assert label.endswith(f"met {ids[int(row.argmax())]}, {decimals}")


def test_the_map_is_the_plane_of_principal_components(
    visit: Visit, house: House, address: str
) -> None:
    texts = [f"text number {i * i} of {i}" for i in range(60)]
    visit.page.locator("#embed:enabled").wait_for()
    visit.page.get_by_label("Open a file").set_input_files(
        {"name": "texts.txt", "mimeType": "text/plain", "buffer": "\n".join(texts).encode()}
    )
    visit.page.locator("#count").get_by_text("60 texts").wait_for()
    visit.page.get_by_role("button", name="Embed").click()
    visit.page.locator(".map").wait_for()
    found = np.array(
        visit.page.locator(".map circle:not(.ring)").evaluate_all(
            "circles => circles.map((one) => [one.getAttribute('cx'), one.getAttribute('cy')].map(Number))"
        )
    )
    items = vectors_of(address, house.key, MODEL, texts)
    rows = np.array([one["embedding"] for one in items])
    rows -= rows.mean(axis=0)
    plane = np.linalg.svd(rows, full_matrices=False)[2][:2]
    expected = rows @ plane.T
    for axis in range(2):
        assert abs(np.corrcoef(found[:, axis], expected[:, axis])[0, 1]) > 0.999
    visit.page.locator(".map").focus()
    visit.page.keyboard.press("ArrowRight")
    leftmost = int(found[:, 0].argmin())
    assert visit.page.locator(".tip").inner_text() == f"{leftmost + 1} · {texts[leftmost]}"


@pytest.mark.parametrize("language", ["curl", "Python", "JavaScript"])
def test_the_code_that_is_copied_runs(
    visit: Visit, house: House, language: str, tmp_path: Path
) -> None:
    visit.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    texts = ['it\'s "quoted" \\ $HOME `id`', "zweite Zeile — 🚀"]
    visit.embed(texts)
    visit.page.get_by_role("radio", name=language).check()
    visit.page.locator("#code").get_by_role("button", name="Copy").click()
    visit.page.get_by_role("button", name="Copied").wait_for()
    code = visit.page.evaluate("navigator.clipboard.readText()")
    assert house.key not in code
    program = {"curl": ["bash"], "Python": [sys.executable], "JavaScript": ["node"]}[language]
    need(shutil.which(program[0]), f"{program[0]} is not installed")
    file = tmp_path / ("code.mjs" if language == "JavaScript" else "code")
    file.write_text(code, "utf-8")
    ran = subprocess.run(
        [*program, str(file)],
        env={**os.environ, "TRIVEC_API_KEY": house.key},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    sequences, _, _ = house.model.embedded[-1]
    assert sequences.lengths().tolist() == [len(text.encode()) + 2 for text in texts]
    assert "embedding" in ran.stdout


def test_by_keyboard_alone(visits: Callable[..., Visit], house: House, address: str) -> None:
    visit = visits(address)
    visit.open("/", None)
    keyboard = visit.page.keyboard
    keyboard.type(house.key)  # the field of the key has the focus
    keyboard.press("Enter")
    visit.page.locator("#embed:enabled").wait_for()

    def tab_to(selector: str) -> None:
        for _ in range(60):
            if visit.page.evaluate("wanted => document.activeElement.matches(wanted)", selector):
                return
            keyboard.press("Tab")
        raise AssertionError(f"no number of tabs leads to {selector}")

    tab_to("#model")
    tab_to("#texts")
    keyboard.press("Control+A")
    keyboard.type("one\ntwo\nthree")
    keyboard.press("Control+Enter")
    visit.page.locator("#heat table").wait_for()
    tab_to("#kinds input")
    keyboard.press("ArrowDown")
    assert visit.page.locator("#kinds input:checked").get_attribute("value") == "sparse"
    tab_to("#heat td")
    keyboard.press("ArrowRight")
    keyboard.press("ArrowDown")
    assert visit.page.evaluate("document.activeElement.dataset.at") == "1,1"
    assert "is 2 “two” with 2 “two”" in visit.page.locator("#pair").inner_text()
    tab_to("#alignment button")
    assert visit.page.locator("#alignment path.on").count() == 1
    tab_to(".map")
    keyboard.press("ArrowRight")
    assert visit.page.locator(".tip").is_visible()
    tab_to("#languages input")
    tab_to("#code pre")


def test_without_a_key_nothing_is_asked(
    visits: Callable[..., Visit], house: House, address: str
) -> None:
    visit = visits(address)
    asked: list[str] = []
    visit.page.on("request", lambda one: asked.append(one.url))
    visit.open("/", None)
    visit.open("/usage", None)
    assert not [url for url in asked if "/v1/" in url or "/admin/" in url]
    visit.open("/", "tv_wrong")
    visit.page.get_by_role("alert").get_by_text("API key").wait_for()
    visit.complaints.clear()  # the browser's own line of a 401


def test_a_key_is_kept_in_its_tab_alone(visit: Visit, house: House, address: str) -> None:
    visit.page.locator("#embed:enabled").wait_for()
    kept = visit.page.evaluate("[sessionStorage.length, localStorage.length, document.cookie]")
    assert kept == [1, 0, ""]
    visit.page.reload()
    visit.page.locator("#embed:enabled").wait_for()
    other = visit.page.context.new_page()
    other.goto(address)
    assert other.get_by_label("Key", exact=True).input_value() == ""


def test_documents_are_reranked_beside_their_embeddings(
    visit: Visit, house: House, address: str
) -> None:
    check_reranking(visit, MODEL, house.key)


def test_a_real_cross_encoder_reranks(visits: Callable[..., Visit], dummy: Server) -> None:
    visit = visits(dummy.url)
    visit.open("/", dummy.key)
    check_reranking(visit, CROSS_ENCODER, dummy.key)


def check_reranking(visit: Visit, reranker: str, key: str) -> None:
    """The panel shows what the API says of the same texts, and the model's cosines beside it."""
    documents = ["a world of words", *TWO]
    visit.page.locator("#rerank").wait_for()
    visit.page.get_by_label("Texts, one a line").fill("\n".join(documents))
    visit.page.get_by_label("Reranker").select_option(reranker)
    visit.page.get_by_label("Query").fill("hello")
    visit.page.get_by_role("button", name="Rerank").click()
    table = visit.page.get_by_role("table", name="By the reranker")
    table.wait_for()
    answer = httpx.post(
        f"{visit.address}/v1/rerank",
        json={"model": reranker, "query": "hello", "documents": documents},
        headers={"authorization": f"Bearer {key}"},
        timeout=60,
    )
    ranked = answer.json()["results"]
    assert len({one["relevance_score"] for one in ranked}) == len(documents)
    names = [f"{one['index'] + 1} {documents[one['index']]}" for one in ranked]
    assert table.locator("th").all_text_contents() == names
    scores = [f"{one['relevance_score']:.3f}" for one in ranked]
    assert table.locator(".figure").all_text_contents() == scores
    beside = visit.page.get_by_role("table", name="By the embeddings").locator(".figure")
    items = vectors_of(visit.address, key, MODEL, ["hello", *documents])
    cosines = sorted(similarities(items, "dense")[0, 1:], reverse=True)
    assert beside.all_text_contents() == [f"{one:.3f}" for one in cosines]


def test_rerankers_come_first_and_without_their_route_there_is_no_panel(visit: Visit) -> None:
    def with_reranker(route: Any) -> None:
        models = route.fetch().json()
        models["data"].append({**models["data"][0], "id": "reranker", "output_types": ["score"]})
        route.fulfill(json=models)

    def without_route(route: Any) -> None:
        document = route.fetch().json()
        del document["paths"]["/v1/rerank"]
        route.fulfill(json=document)

    visit.page.locator("#rerank").wait_for()
    visit.page.route("**/v1/models", with_reranker)
    visit.page.route("**/openapi.json", without_route)
    visit.page.reload()
    visit.page.locator("#tokens li").first.wait_for()
    assert not visit.page.locator("#rerank").is_visible()
    names = visit.page.locator("#reranker option").all_text_contents()
    assert names == ["reranker", MODEL, PLAIN_MODEL]
    assert "reranker" not in visit.page.locator("#model option").all_text_contents()


def test_usage_shows_the_ledgers_figures_and_the_metrics(
    visits: Callable[..., Visit], house: House, address: str
) -> None:
    key = new_key(address, house, "heavy <b>user</b>")
    vectors_of(address, key, MODEL, TWO)
    visit = visits(address)
    visit.open("/usage", house.key)
    visit.page.locator("#now").wait_for()
    visit.page.get_by_label("Since").select_option("since the beginning")  # the clock is a test's
    visit.page.locator("#by-key tr", has_text="heavy <b>user</b>").wait_for()
    headers = {"authorization": f"Bearer {house.key}"}
    for by in ("key", "model"):
        table = visit.page.locator(f"#by-{by} tr")
        shown = {
            row.locator("th").text_content(): row.locator(".figure").text_content().replace(",", "")
            for row in table.all()
        }
        answer = httpx.get(f"{address}/admin/v1/usage?by={by}", headers=headers, timeout=60).json()
        named = {line.get("name") or line.get("model"): line["tokens"] for line in answer["data"]}
        assert {name: int(shown[name]) for name in named if name} == {
            name: tokens for name, tokens in named.items() if name
        }
    visit.page.get_by_role("radio", name="requests", exact=True).check()
    visit.page.locator("#by-key tr", has_text="heavy <b>user</b>").get_by_text(
        "1", exact=True
    ).wait_for()
    tiles = visit.page.locator("#tiles div").all_inner_texts()
    facts = dict(one.split("\n")[:2] for one in tiles)
    assert facts["phase"] == "ready"
    assert facts["requests in the queue"] == "5"
    assert facts["tokens in the queue"] == "1,234"
    assert facts["half are answered within"] == "10.0 ms"
    assert facts["95 of 100 within"] == "550.0 ms"
    assert facts["99 of 100 within"] == "910.0 ms"


def test_a_key_is_made_shown_once_rotated_and_revoked(
    visits: Callable[..., Visit], house: House, address: str
) -> None:
    visit = visits(address)
    visit.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    visit.open("/usage", house.key)

    def status(key: str) -> int:
        headers = {"authorization": f"Bearer {key}"}
        return httpx.get(f"{address}/v1/models", headers=headers, timeout=60).status_code

    def copied() -> str:
        visit.page.get_by_role("dialog").get_by_role("button", name="Copy").click()
        visit.page.get_by_role("button", name="Copied").wait_for()
        key: str = visit.page.evaluate("navigator.clipboard.readText()")
        assert key in visit.page.locator("dialog pre").inner_text()
        visit.page.get_by_role("button", name="Done").click()
        visit.page.locator("dialog pre").wait_for(state="detached")
        assert key not in visit.page.content()
        return key

    visit.page.get_by_role("button", name="Create a key").click()
    visit.page.get_by_label("Name").fill("<i>new</i>")
    visit.page.get_by_label("Requests a minute").fill("120")
    visit.page.get_by_role("button", name="Create", exact=True).click()
    first = copied()
    row = visit.page.get_by_role("row", name="<i>new</i>")
    assert "120" in row.inner_text()
    assert status(first) == 200

    row.get_by_role("button", name="Rotate").click()
    visit.page.get_by_role("dialog").get_by_role("button", name="Rotate").click()
    second = copied()
    assert second != first
    assert (status(first), status(second)) == (200, 200)

    row.get_by_role("button", name="Revoke").click()
    assert visit.page.evaluate("document.activeElement.textContent") == "Cancel"
    visit.page.keyboard.press("Enter")
    assert status(second) == 200
    row.get_by_role("button", name="Revoke").click()
    visit.page.get_by_role("dialog").get_by_role("button", name="Revoke").click()
    row.get_by_text("revoked").wait_for()
    assert (status(first), status(second)) == (401, 401)
    assert row.get_by_role("button").count() == 0


def test_a_key_without_the_scope_admin_is_told_so(
    visits: Callable[..., Visit], house: House, address: str
) -> None:
    visit = visits(address)
    visit.open("/usage", new_key(address, house, "reader"))
    visit.page.get_by_role("alert").get_by_text("scope").wait_for()
    assert not visit.page.locator("#keys").is_visible()
    visit.complaints.clear()  # the browser's own line of a 403


@pytest.mark.parametrize("has_swagger", [True, False], ids=["swagger-ui", "ours"])
def test_docs_list_every_operation(
    visits: Callable[..., Visit],
    house: House,
    address: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    has_swagger: bool,
) -> None:
    if has_swagger:
        need((STATIC / "vendor").is_dir(), "Swagger UI is absent: scripts/vendor")
    else:
        bare = shutil.copytree(STATIC, tmp_path / "static", ignore=shutil.ignore_patterns("vendor"))
        monkeypatch.setattr(playground, "STATIC", bare)
        static_files.cache_clear()
    house.serve(pages=page_operations(has_keys=True))
    static_files.cache_clear()
    with house.listening() as served:
        visit = visits(served)
        visit.open("/docs", None)
        visit.page.get_by_text("Turn texts into vectors").first.wait_for()
        paths = httpx.get(f"{served}/openapi.json", timeout=60).json()["paths"]
        text = visit.page.locator("body").inner_text().replace("\u200b", "")
        assert [path for path in paths if path not in text] == []
        visit.page.get_by_text("Turn texts into vectors").first.click()
        visit.page.get_by_text("encoding_format").first.wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("path", ["/", "/usage"])
def test_axe_finds_nothing_serious_and_nothing_runs_off_the_side(
    visits: Callable[..., Visit], house: House, address: str, path: str, width: int, scheme: str
) -> None:
    need(AXE.is_file(), f"axe-core is absent: npm ci in {AXE.parents[2]}")
    visit = visits(address, viewport={"width": width, "height": 900}, color_scheme=scheme)
    visit.open(path, house.key)
    if path == "/":
        visit.embed(["one text", "another text", "a third"])
        visit.page.get_by_role("radio", name="fused").check()
    else:
        visit.page.locator("#now").wait_for()
    visit.page.evaluate(AXE.read_text("utf-8"))
    found = visit.page.evaluate("axe.run()")["violations"]
    serious = [
        (one["id"], [node["html"] for node in one["nodes"]][:3])
        for one in found
        if one["impact"] in ("serious", "critical")
    ]
    assert serious == []
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
