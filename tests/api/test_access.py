"""Deny by default: the route table is walked with every kind of key."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace

import httpx
import pytest
from tests.api.house import MODEL, House

from trivec.accounts import Scope
from trivec.api.app import all_operations

# "scrape" asks for the scope admin and is not written down.
SCOPES = {"open": None, "embed": Scope.EMBED, "admin": Scope.ADMIN, "scrape": Scope.ADMIN}
# What each route asks for, written down a second time on purpose: a change must be made twice.
EXPECTED = {
    ("POST", "/v1/embeddings"): "embed",
    ("POST", "/v1/tokenize"): "embed",
    ("POST", "/v1/rerank"): "embed",
    ("GET", "/v1/files"): "embed",
    ("POST", "/v1/files"): "embed",
    ("GET", "/v1/files/{id}"): "embed",
    ("DELETE", "/v1/files/{id}"): "embed",
    ("GET", "/v1/files/{id}/content"): "embed",
    ("GET", "/v1/batches"): "embed",
    ("POST", "/v1/batches"): "embed",
    ("GET", "/v1/batches/{id}"): "embed",
    ("POST", "/v1/batches/{id}/cancel"): "embed",
    ("GET", "/v1/models"): "embed",
    ("GET", "/v1/models/{id:path}"): "embed",
    ("GET", "/admin/v1/keys"): "admin",
    ("POST", "/admin/v1/keys"): "admin",
    ("GET", "/admin/v1/keys/{id}"): "admin",
    ("POST", "/admin/v1/keys/{id}/revoke"): "admin",
    ("POST", "/admin/v1/keys/{id}/rotate"): "admin",
    ("GET", "/admin/v1/usage"): "admin",
    ("GET", "/livez"): "open",
    ("GET", "/readyz"): "open",
    ("GET", "/health"): "open",
    ("GET", "/openapi.json"): "open",
    ("GET", "/metrics"): "scrape",
}
TEI_ROUTES = (
    *("embed", "embed_sparse", "embed_all", "rerank", "predict", "similarity", "tokenize"),
    *("decode", ""),
)
OF_FACES = {
    ("POST", "/v2/rerank"): "embed",
    ("POST", "/v1/embed"): "embed",
    ("POST", "/v2/embed"): "embed",
    ("GET", "/info"): "embed",
    **{("POST", f"/{name}"): "embed" for name in TEI_ROUTES},
    ("POST", "/v1/score"): "embed",
    ("POST", "/score"): "embed",
    ("POST", "/api/embed"): "embed",
    ("POST", "/api/embeddings"): "embed",
    ("POST", "/api/show"): "embed",
    ("GET", "/api/tags"): "embed",
    ("GET", "/api/version"): "open",
    ("GET", "/"): "open",
}
for (_method, _path), _access in list(EXPECTED.items()):
    if _path.startswith("/v1/"):
        EXPECTED[_method, "/openai" + _path] = _access
        EXPECTED[_method, _path.replace("/v1/", "/v3/openai/")] = _access

EXPECTED |= OF_FACES
OPEN = sorted(route for route, access in EXPECTED.items() if access == "open")
KEYED = sorted(route for route, access in EXPECTED.items() if access != "open")
NAMING_A_MODEL = [
    route
    for route in KEYED
    if EXPECTED[route] == "embed"
    and not route[1].endswith(("/models", "/api/tags"))
    and not {"files", "batches"} & set(route[1].split("/"))
]
RERANK = {"model": MODEL, "query": "hello", "documents": ["a"]}
BODIES = {
    "embeddings": {"model": MODEL, "input": "hello"},
    "tokenize": {"model": MODEL, "input": "hello"},
    "rerank": RERANK,
    "/v2/rerank": RERANK,
    "/v1/embed": {"model": MODEL, "texts": ["hello"]},
    "/v2/embed": {"model": MODEL, "texts": ["hello"]},
    "/embed": {"inputs": "hello"},
    "/embed_sparse": {"inputs": "hello"},
    "/embed_all": {"inputs": "hello"},
    "/rerank": {"query": "hello", "texts": ["a"]},
    "/predict": {"inputs": ["hello", "a"]},
    "/similarity": {"inputs": {"source_sentence": "hello", "sentences": ["a"]}},
    "/tokenize": {"inputs": "hello"},
    "/decode": {"ids": [5]},
    "/": {"inputs": "hello"},
    "/v1/score": {"text_1": "hello", "text_2": "a"},
    "/score": {"text_1": "hello", "text_2": "a"},
    "/api/embed": {"model": MODEL, "input": "hello"},
    "/api/embeddings": {"model": MODEL, "prompt": "hello"},
    "/api/show": {"model": MODEL},
    "batches": {
        "input_file_id": "file-1",
        "endpoint": "/v1/embeddings",
        "completion_window": "24h",
    },
    "keys": {"name": "another"},
    "rotate": {},
    "revoke": {},
}


def test_the_route_table_is_what_the_contract_says() -> None:
    operations = all_operations(has_metrics=True, metrics_open=False)
    found = {(one.method, one.path): (one.scope, one.is_metered) for one in operations}
    assert found == {
        route: (SCOPES[access], access != "scrape")
        for route, access in EXPECTED.items()
        if route != ("GET", "/openapi.json")
    }


@pytest.fixture(scope="module")
def gate_house() -> Iterator[House]:
    house = House()
    yield house
    house.close()


@pytest.fixture(scope="module")
def gate_address(gate_house: House) -> Iterator[str]:
    with gate_house.listening() as address:
        yield address


@pytest.fixture(scope="module")
def revoked(gate_house: House, gate_address: str) -> str:
    key = gate_house.new_key("revoked", scopes=frozenset(Scope))
    admin = {"authorization": f"Bearer {gate_house.key}"}
    answer = httpx.post(f"{gate_address}/admin/v1/keys/revoked/revoke", headers=admin, timeout=60)
    assert answer.status_code == 200
    return key


def ask(address: str, route: tuple[str, str], headers: dict[str, str]) -> httpx.Response:
    method, path = route
    path = path.replace("{id:path}", MODEL).replace("{id}", "some-key")
    body = BODIES.get(path) or BODIES.get(path.rpartition("/")[2]) if method == "POST" else None
    # Not to verify saves reading the authorities' certificates, 40 ms, for each of 500 requests.
    return httpx.request(
        method, address + path, json=body, headers=headers, timeout=60, verify=False
    )


def assert_says(response: httpx.Response, code: str, words: str) -> None:
    """In the words of every face, and with OpenAI's code where that is its shape."""
    assert words in response.text
    error = response.json().get("error")
    assert not isinstance(error, dict) or error["code"] == code


@pytest.mark.parametrize("route", KEYED, ids=" ".join)
@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer tv_unknown",
        "Basic dXNlcjpwYXNz",
        "Bearer ' OR 1=1 --",
        "Bearer " + "k" * 20_000,
    ],
    ids=["none", "empty", "no-credential", "unknown", "not-bearer", "sql", "very-long"],
)
def test_no_keyed_route_opens_without_a_good_key(
    gate_address: str, route: tuple[str, str], header: str | None
) -> None:
    response = ask(gate_address, route, {} if header is None else {"authorization": header})
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("header", ["Bearer", "bearer"])
def test_a_credential_that_is_empty_is_no_key_and_not_a_wrong_one(
    gate_address: str, header: str
) -> None:
    """As `Bearer $KEY` is, of a variable that is not set."""
    response = ask(gate_address, ("GET", "/v1/models"), {"authorization": header})
    assert (response.status_code, response.json()["error"]["code"]) == (401, None)
    assert "You didn't provide an API key" in response.text


@pytest.mark.parametrize("route", KEYED, ids=" ".join)
def test_no_keyed_route_opens_to_a_revoked_key(
    gate_address: str, revoked: str, route: tuple[str, str]
) -> None:
    response = ask(gate_address, route, {"authorization": f"Bearer {revoked}"})
    assert response.status_code == 401
    assert_says(response, "invalid_api_key", "Incorrect API key")


@pytest.fixture(scope="module")
def expired(gate_house: House) -> str:
    plain = gate_house.new_key("expired", scopes=frozenset(Scope))
    key = asyncio.run(gate_house.accounts.show_key("expired"))
    gate_house.store.change_key(key.id, lambda key: replace(key, expires_us=1))
    return plain


@pytest.mark.parametrize("route", KEYED, ids=" ".join)
def test_no_keyed_route_opens_to_an_expired_key(
    gate_address: str, expired: str, route: tuple[str, str]
) -> None:
    response = ask(gate_address, route, {"authorization": f"Bearer {expired}"})
    assert response.status_code == 401
    assert_says(response, "invalid_api_key", "Incorrect API key")


@pytest.fixture(scope="module")
def elsewhere(gate_house: House) -> str:
    return gate_house.new_key("elsewhere", models=frozenset({"another-model"}))


@pytest.mark.parametrize("route", NAMING_A_MODEL, ids=" ".join)
def test_no_route_that_names_a_model_opens_to_a_key_for_another(
    gate_address: str, elsewhere: str, route: tuple[str, str]
) -> None:
    response = ask(gate_address, route, {"authorization": f"Bearer {elsewhere}"})
    assert response.status_code == 403
    assert_says(response, "model_access_denied", "may not use the model")


@pytest.mark.parametrize("route", KEYED, ids=" ".join)
def test_no_keyed_route_opens_to_the_wrong_scope(
    gate_house: House, gate_address: str, route: tuple[str, str]
) -> None:
    wrong = Scope.ADMIN if EXPECTED[route] == "embed" else Scope.EMBED
    key = gate_house.new_key(f"wrong {' '.join(route)}"[-60:].strip(), scopes=frozenset({wrong}))
    response = ask(gate_address, route, {"authorization": f"Bearer {key}"})
    assert response.status_code == 403
    lacked = "admin" if wrong is Scope.EMBED else "embed"
    assert_says(response, "insufficient_scope", f"lacks the scope `{lacked}`")


@pytest.mark.parametrize("route", OPEN, ids=" ".join)
def test_an_open_route_asks_for_nothing(gate_address: str, route: tuple[str, str]) -> None:
    assert ask(gate_address, route, {}).status_code == 200


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_the_scheme_is_read_in_any_case(gate_house: House, gate_address: str, scheme: str) -> None:
    headers = {"authorization": f"{scheme} {gate_house.key}"}
    assert ask(gate_address, ("GET", "/v1/models"), headers).status_code == 200


def test_without_keys_everyone_may_do_everything() -> None:
    house = House(no_auth=True)
    with house.listening() as address:
        for route in KEYED:
            # An upload is a form, and none of ours.
            fits = {200, 404, 422} if route[1].rpartition("/")[2] != "files" else {200, 415}
            assert ask(address, route, {}).status_code in fits, route
    house.close()


def test_a_refused_key_is_never_repeated_in_the_answer(gate_address: str) -> None:
    response = ask(gate_address, ("GET", "/v1/models"), {"authorization": "Bearer sesame-17"})
    assert "sesame" not in response.text
