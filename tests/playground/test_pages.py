"""The pages at `/`: what is sent, under which policy, to whom, and what it may not hold."""

import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tests.api.house import House

from trivec.build import open_server_parts
from trivec.core.health import Health
from trivec.playground import MEDIA_TYPES, STATIC, page_operations
from trivec.settings import load_settings

ROOT = Path(__file__).resolve().parents[2]
# Without what scripts/vendor fetches, which a checkout may lack.
OURS = sorted(file for file in STATIC.iterdir() if file.is_file())
LINES_MAX, BYTES_MAX = 1_210, 200_000
PAGES = ["/", "/usage", "/docs"]


@pytest.fixture
def house() -> Iterator[House]:
    house = House()
    house.serve(pages=page_operations(has_keys=True))
    yield house
    house.close()


async def get(house: House, path: str, method: str = "GET", **headers: str) -> httpx.Response:
    transport = httpx.ASGITransport(house.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://house") as client:
        named = {"accept": "text/html,*/*"}
        named |= {name.replace("_", "-"): value for name, value in headers.items()}
        return await client.request(method, path, headers=named)


@pytest.mark.parametrize("path", PAGES)
async def test_a_page_needs_no_key_and_allows_nothing_inline_or_from_elsewhere(
    house: House, path: str
) -> None:
    answer = await get(house, path)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    policy = dict(
        part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";")
    )
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize("path", PAGES)
async def test_all_that_a_page_names_is_served_with_its_type(house: House, path: str) -> None:
    text = (await get(house, path)).text
    named = re.findall(r'(?:src|href)="(page/[^"]+)"', text)
    assert named
    for name in named:
        answer = await get(house, "/" + name)
        assert answer.status_code == 200, name
        assert answer.headers["content-type"] == MEDIA_TYPES[Path(name).suffix], name


async def test_every_module_that_is_imported_is_served(house: House) -> None:
    for file in OURS:
        for name in re.findall(r'from "\./([^"]+)"', file.read_text("utf-8")):
            assert (await get(house, f"/page/{name}")).status_code == 200, (file.name, name)


async def test_head_says_what_get_would(house: House) -> None:
    got, asked = await get(house, "/"), await get(house, "/", "HEAD")
    assert (asked.status_code, asked.content) == (200, b"")
    for name in ("content-type", "content-length", "etag", "content-security-policy"):
        assert asked.headers[name] == got.headers[name]


async def test_a_file_that_the_client_has_is_not_sent_again(house: House) -> None:
    etag = (await get(house, "/page/style.css")).headers["etag"]
    for known in (etag, f"W/{etag}", f'"another", {etag}'):
        again = await get(house, "/page/style.css", if_none_match=known)
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == etag
    assert (await get(house, "/page/style.css", if_none_match='"another"')).status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/page/none.js",
        "/page/__init__.py",
        "/page/..%2f__init__.py",
        "/page/vendor/swagger-ui.css",
        "/page/",
        "/index.html",
    ],
)
async def test_what_is_no_file_of_ours_is_a_404_in_the_usual_shape(house: House, path: str) -> None:
    answer = await get(house, path)
    assert answer.status_code == 404
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


async def test_a_page_cannot_be_written_to(house: House) -> None:
    answer = await get(house, "/usage", "POST")
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")


async def test_the_pages_hide_nothing_of_the_api_and_open_nothing(house: House) -> None:
    described = (await get(house, "/openapi.json")).json()["paths"]
    assert "/v1/embeddings" in described
    assert not {"/usage", "/docs", "/page/{name}"} & set(described)
    for path in ("/v1/models", "/admin/v1/usage", "/admin/v1/keys", "/metrics"):
        assert (await get(house, path)).status_code == 401, path


async def test_the_pages_are_there_while_the_models_load(house: House) -> None:
    house.is_loading, house.health = True, Health("loading", alive=True, ready=False, reason="")
    house.serve(pages=page_operations(has_keys=True))
    assert (await get(house, "/")).status_code == 200
    assert (await get(house, "/v1/models")).status_code == 503


@pytest.mark.parametrize("has_keys", [True, False])
async def test_a_page_says_whether_it_needs_a_key(house: House, has_keys: bool) -> None:
    house.serve(pages=page_operations(has_keys=has_keys))
    assert ('data-keys="yes"' in (await get(house, "/")).text) == has_keys


@pytest.mark.parametrize(("page", "status"), [("true", 200), ("false", 404)])
async def test_a_setting_takes_them_away(tmp_path: Path, page: str, status: int) -> None:
    environ = {"TRIVEC_DATA_DIR": str(tmp_path), "TRIVEC_HTTP__PAGE": page}
    parts = open_server_parts(load_settings({}, environ))
    parts.accounts.start()
    app = parts.app({}, lambda: Health("loading", alive=True, ready=False, reason=""))
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://house") as client:
        for path in (*PAGES[1:], "/page/style.css"):
            assert (await client.get(path)).status_code == status
        home = await client.get("/", headers={"accept": "text/html"})
        assert home.headers["content-type"].startswith("text/html") == (status == 200)
    parts.close()


def test_no_file_names_an_outside_address() -> None:
    namespace = "http://www.w3.org/2000/svg"  # a name, which nobody fetches
    for file in OURS:
        text = file.read_text("utf-8").replace(namespace, "")
        assert not re.findall(r"(?:https?:)?//[\w.-]+\.\w", text), file.name


def test_every_address_is_relative_so_that_a_proxy_may_serve_below_a_path() -> None:
    absolute = r"""(?:src|href)="/|(?:call|request|fetch|URL|url:)[( ]+["'`]/"""
    for file in OURS:
        assert not re.findall(absolute, file.read_text("utf-8")), file.name


def test_no_file_writes_markup_or_runs_text() -> None:
    forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function"
    inline = r"\sstyle=|\son\w+=\"|<style|<script(?![^>]* src=)"
    for file in OURS:
        text = file.read_text("utf-8")
        assert not re.findall(forbidden, text), file.name
        assert file.suffix != ".html" or not re.findall(inline, text), file.name


def test_the_pages_stay_small() -> None:
    written = [file for file in OURS if file.suffix in (".html", ".css", ".js")]
    assert sum(len(file.read_text("utf-8").splitlines()) for file in written) <= LINES_MAX
    assert sum(file.stat().st_size for file in OURS) <= BYTES_MAX


def test_the_wheel_takes_what_git_does_not() -> None:
    """Swagger UI is fetched by scripts/vendor before a wheel is built, and ignored by git."""
    vendor = "src/trivec/playground/static/vendor/"
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["hatch"]["build"]
    assert wheel["targets"]["wheel"]["artifacts"] == [vendor + "*"]
    ignored = subprocess.run(
        ["git", "check-ignore", vendor + "swagger-ui.css"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    assert ignored.returncode in (0, 128)  # 128: this tree is no git checkout


async def test_who_asks_for_no_html_gets_what_the_face_answers_there(house: House) -> None:
    answer = await get(house, "/", accept="*/*")
    assert (answer.status_code, answer.text) == (200, "Trivec is running")
