"""What holds for every face: its switch, its error shape, and that the ledger says what answers say."""

import importlib.util
import os
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, get_args

import httpx
import msgspec
import pytest
from tests.accounts.requests import statuses
from tests.api.house import CLASSIFIER, MODEL, PLAIN_MODEL, RERANKER, House

from trivec.api.app import FACES, all_operations
from trivec.core.errors import EngineFault, Overloaded
from trivec.core.types import Output
from trivec.settings import FaceName, load_settings
from trivec.telemetry.metrics import ROUTES_MAX, TIMED_ROUTES_MAX, route_label

# A good body of every route that computes something.
BODIES: dict[str, dict[str, Any]] = {
    "/v1/embeddings": {"model": MODEL, "input": ["hello", "a"]},
    "/v1/rerank": {"model": RERANKER, "query": "hello", "documents": ["a", "bb"]},
    "/v2/rerank": {"model": RERANKER, "query": "hello", "documents": ["a", "bb"], "top_n": 1},
    "/v2/embed": {"model": MODEL, "texts": ["hello", "a"], "input_type": "search_query"},
    "/v1/embed": {"model": MODEL, "texts": ["hello"], "truncate": "END"},
    "/v1/score": {"model": RERANKER, "text_1": "hello", "text_2": ["a", "bb"]},
    "/score": {"model": MODEL, "queries": ["hello", "b"], "documents": ["a", "bb"]},
    "/embed": {"inputs": ["hello", "a"], "truncate": False},
    "/embed_sparse": {"inputs": "hello"},
    "/embed_all": {"inputs": "hello", "truncation_direction": "Left"},
    "/rerank": {"query": "hello", "texts": ["a", "bb"], "raw_scores": True, "return_text": True},
    "/predict": {"inputs": [["hello", "a"], ["a", "bb"]], "model": CLASSIFIER},
    "/similarity": {"inputs": {"source_sentence": "hello", "sentences": ["a", "bb"]}},
    "/": {"inputs": ["hello"]},
    "/api/embed": {"model": MODEL, "input": ["hello", "a"], "keep_alive": "5m", "options": {}},
    "/api/embeddings": {"model": MODEL, "prompt": "hello"},
}
FREE: dict[str, dict[str, Any]] = {
    "/tokenize": {"inputs": ["hello", "a"]},
    "/decode": {"ids": [5, 6]},
    "/api/show": {"model": MODEL},
}
EVERY = BODIES | FREE
OPERATIONS = {one.path: one for one in all_operations(False, metrics_open=False) if one.body_type}
FIELDS = [
    (path, name)
    for path in EVERY
    for name in msgspec.structs.fields(OPERATIONS[path].body_type)  # type: ignore[arg-type]
]


@pytest.fixture(scope="module")
def house() -> Iterator[House]:
    house = House(has_rerankers=True)
    yield house
    house.close()


@pytest.fixture
def fresh() -> Iterator[House]:
    """A house of a test's own."""
    house = House(has_rerankers=True)
    yield house
    house.close()


async def post(house: House, path: str, body: object) -> httpx.Response:
    async with house.client() as client:
        return await client.post(f"http://house{path}", json=body)


def assert_is_error(path: str, answer: httpx.Response) -> None:
    """In the shape that the face's clients read."""
    shape = OPERATIONS[path].error_shape
    kind: Any = shape.response_type
    msgspec.convert(answer.json(), kind, strict=True)
    assert set(answer.json()) == set(kind.__struct_fields__)


def test_every_face_has_a_switch_and_every_switch_a_face() -> None:
    assert set(get_args(FaceName)) == {"openai", *FACES}
    assert set(load_settings({}, {}).faces) == set(FACES)
    assert load_settings({}, {"TRIVEC_FACES": "tei,ollama"}).faces == ("tei", "ollama")


@pytest.mark.parametrize("face", FACES)
async def test_a_face_that_is_left_out_is_not_served(face: str, fresh: House) -> None:
    fresh.faces = tuple(name for name in FACES if name != face)
    fresh.serve()
    kept = {
        (one.method, one.path)
        for one in all_operations(False, metrics_open=False, faces=fresh.faces)
    }
    gone = [one for one in FACES[face] if (one.method, one.path) not in kept]
    assert gone
    async with fresh.client() as client:
        for one in gone:
            answer = await client.request(one.method, f"http://house{one.path}", json={})
            assert answer.status_code in (404, 405)
        described = (await client.get("http://house/openapi.json")).json()["paths"]
    assert not {(one.method, one.path) for one in gone} & {
        (method.upper(), path) for path, item in described.items() for method in item
    }


@pytest.mark.parametrize("faces", [("ollama",), ("openai",), ("vllm",), ("tei", "vllm")])
async def test_rerank_without_a_prefix_is_served_whichever_faces_are(
    fresh: House, faces: tuple[str, ...]
) -> None:
    """LiteLLM's `jina_ai/` asks for it, and vLLM's clients."""
    fresh.faces = faces
    fresh.serve()
    answer = await post(fresh, "/rerank", {"model": MODEL, "query": "a", "documents": ["b"]})
    assert answer.json()["results"][0]["document"] == {"text": "b"}


async def test_a_route_of_another_face_is_not_counted_with_its_namesake(fresh: House) -> None:
    """Cohere's `/v1/embed` has no prefix to leave out, and TEI's is `/embed`."""
    for path in ("/v1/embed", "/embed", "/openai/v1/embeddings", "/nowhere"):
        await post(fresh, path, EVERY.get(path, EVERY["/v1/embeddings"]))
    labels = [route_label(one.route, one.prefix) for one in fresh.heard.served]
    assert labels == ["/v1/embed", "/embed", "/embeddings", "other"]


def test_metrics_have_room_for_every_route_that_is_served() -> None:
    """With a third to spare, so that a face that is added shows up."""
    served = all_operations(True, metrics_open=False)
    labels = {(one.method, route_label(one.path, one.prefix)) for one in served}
    timed = {label for method, label in labels if method == "POST" and "/admin/" not in label}
    assert len(labels) <= ROUTES_MAX * 2 / 3
    assert len(timed) <= TIMED_ROUTES_MAX * 2 / 3


@pytest.mark.parametrize("path", EVERY)
async def test_an_answer_has_the_type_that_is_described(house: House, path: str) -> None:
    answer = await post(house, path, EVERY[path])
    assert answer.status_code == 200, answer.text
    kind: Any = OPERATIONS[path].response_type
    msgspec.convert(answer.json(), kind, strict=True)


@pytest.mark.parametrize(("path", "field"), FIELDS, ids=lambda one: getattr(one, "name", one))
async def test_a_bad_field_is_refused_in_the_faces_shape_and_costs_nothing(
    house: House, path: str, field: Any
) -> None:
    before = len(house.store.rows)
    for value in ({"$ne": None}, [[[1]]], -7.5, [], "", "\u0000" * 3, [None], 10**30):
        answer = await post(house, path, EVERY[path] | {field.encode_name: value})
        if answer.status_code == 200:  # some fields take anything
            before = len(house.store.rows)
            continue
        assert 400 <= answer.status_code < 500, answer.text
        assert_is_error(path, answer)
    assert len(house.store.rows) == before


async def test_a_model_without_dense_vectors_is_refused_where_only_those_have_a_place(
    fresh: House,
) -> None:
    fresh.model.card = replace(fresh.model.card, outputs=Output.SPARSE)
    for path in ("/v2/embed", "/v1/embed", "/embed", "/api/embed", "/api/embeddings"):
        answer = await post(fresh, path, EVERY[path] | {"model": MODEL})
        assert answer.status_code in (400, 422), (path, answer.text)
        assert "no dense output" in answer.text
    assert not fresh.model.embedded


async def test_texts_are_ranked_by_the_first_reranker_and_by_no_classifier(fresh: House) -> None:
    fresh.reranker.card = replace(fresh.reranker.card, labels=3)  # which is served first
    fresh.classifier.card = replace(fresh.classifier.card, labels=1)
    for path, body in (
        ("/rerank", {"query": "hello", "texts": ["a", "bb"]}),
        ("/", {"query": "hello", "texts": ["a", "bb"]}),
        ("/score", {"text_1": "hello", "text_2": ["a", "bb"]}),
    ):
        answer = await post(fresh, path, body)
        assert answer.status_code == 200, (path, answer.text)
    assert len(fresh.classifier.embedded) == 3


async def test_a_text_in_several_strings_counts_as_one_in_a_large_body_too(house: House) -> None:
    long = {"text": "a" * 20, "title": "b" * 300, "url": "c" * 200}
    ranked = {"model": MODEL, "query": "hello", "documents": [long] * 800}
    parts = [{"content": [{"type": "text", "text": "a" * 20}, {"type": "text", "text": "b"}]}]
    embedded = {"model": MODEL, "inputs": parts * 2000, "priority": None, "x" * 200_000: None}
    for path, body in (("/v1/rerank", ranked), ("/v2/embed", embedded)):
        answer = await post(house, path, body)
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("path", "field"), [("/v1/rerank", "documents"), ("/v2/embed", "texts"), ("/embed", "inputs")]
)
async def test_too_many_texts_are_refused_by_the_faces_own_field(
    house: House, path: str, field: str
) -> None:
    answer = await post(house, path, EVERY[path] | {field: ["a" * 200] * 2500})
    assert f"'{field}'" in answer.text
    assert_is_error(path, answer)


BAD_BODIES = [
    pytest.param(lambda body: {}, id="empty"),
    pytest.param(lambda body: [], id="no-object"),
    pytest.param(lambda body: body | {"nonsense": 1}, id="an-unknown-field"),
    *(
        pytest.param(lambda body, value=value: swap_texts(body, value), id=name)
        for name, value in {
            "no-texts": [],
            "an-empty-text": ["a", ""],
            "mixed": ["a", [5]],
            "too-many-texts": ["a"] * 2049,
            "a-thousand-and-one": ["a"] * 1001,
        }.items()
    ),
]


def swap_texts(body: dict[str, Any], value: list[Any]) -> dict[str, Any]:
    """*body* with *value* in place of its list of texts, or of its one text."""
    for name in ("texts", "documents", "text_2", "input", "inputs", "prompt", "ids", "model"):
        if name == "inputs" and isinstance(body.get(name), dict):
            return body | {name: body[name] | {"sentences": value}}
        if name in body:
            return body | {name: value}
    raise AssertionError(body)


@pytest.mark.parametrize("path", EVERY)
@pytest.mark.parametrize("change", BAD_BODIES)
async def test_a_bad_body_is_refused_in_the_faces_shape_and_costs_nothing(
    house: House, path: str, change: Any
) -> None:
    before = len(house.store.rows)
    answer = await post(house, path, change(EVERY[path]))
    if answer.status_code == 200:  # a thousand and one texts are no fault of embeddings
        return
    assert 400 <= answer.status_code < 500, answer.text
    assert_is_error(path, answer)
    assert len(house.store.rows) == before


@pytest.mark.parametrize(
    ("path", "change"),
    [
        pytest.param(
            "/v2/embed",
            {"texts": None, "inputs": [{"content": [{"type": "image_url", "text": "a"}]}]},
            id="a-part-that-is-no-text",
        ),
        pytest.param("/v2/embed", {"texts": None, "inputs": [{"content": []}]}, id="no-parts"),
        pytest.param("/v2/embed", {"inputs": []}, id="texts-twice"),
        pytest.param("/similarity", {"parameters": {"truncation_direction": "up"}}, id="a-word"),
        pytest.param("/similarity", {"inputs": {"sentences": ["a"]}}, id="no-source"),
        pytest.param("/predict", {"inputs": [["a", "b", "c"]]}, id="three-of-a-pair"),
        pytest.param("/v1/rerank", {"documents": [{"txt": "a"}]}, id="a-document-without-text"),
        pytest.param("/v1/rerank", {"weights": {"dense": -1}}, id="a-negative-weight"),
        pytest.param("/decode", {"ids": [[10**9]]}, id="an-unknown-id"),
    ],
)
async def test_what_is_wrong_deep_inside_is_refused_too(
    house: House, path: str, change: dict[str, Any]
) -> None:
    before = len(house.store.rows)
    answer = await post(house, path, EVERY[path] | change)
    assert 400 <= answer.status_code < 500, answer.text
    assert_is_error(path, answer)
    assert len(house.store.rows) == before


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("fault", "status"),
    [
        pytest.param(EngineFault("lost in layer 7"), 500, id="our-fault"),
        pytest.param(Overloaded("The queue is full.", retry_after_s=2), 503, id="a-full-queue"),
    ],
)
async def test_our_failures_have_the_faces_shape_too(
    path: str, fault: Exception, status: int, fresh: House
) -> None:
    house = fresh
    for model in (house.model, house.plain_model, house.reranker, house.classifier):
        model.fault = fault
    answer = await post(house, path, BODIES[path])
    assert (answer.status_code, statuses(house.store)) == (status, [status])
    assert_is_error(path, answer)
    assert "layer" not in answer.text
    assert ("retry-after" in answer.headers) == (status == 503)


@pytest.mark.parametrize("path", [path for path, one in OPERATIONS.items() if path in EVERY])
async def test_a_wrong_method_is_told_in_the_faces_shape(house: House, path: str) -> None:
    async with house.client() as client:
        answer = await client.delete(f"http://house{path}")
    assert answer.status_code == 405
    assert_is_error(path, answer)


def tokens_said(answer: Any) -> int | None:
    """What an answer says that it cost; None where its face has no word for it."""
    if not isinstance(answer, dict):
        return None
    if "prompt_eval_count" in answer:
        return int(answer["prompt_eval_count"])
    if "meta" in answer:
        return int(answer["meta"]["tokens"]["input_tokens"])
    return int(answer["usage"]["total_tokens"]) if "usage" in answer else None


IDS = [9906, 11, 1917]  # cl100k_base's of "Hello, world"
VARIANTS: list[tuple[str, dict[str, Any]]] = [  # beside EVERY
    *(("/v1/embeddings", {"output_dtype": one}) for one in ("int8", "uint8", "binary", "ubinary")),
    ("/v1/embeddings", {"output_dtype": "int8", "encoding_format": "base64"}),
    ("/v1/embeddings", {"output_type": "dense&sparse&multi", "return_tokens": True}),
    ("/v1/embeddings", {"input": ["first ", "second"], "late_chunking": True}),
    ("/v1/embeddings", {"input": ["abcdefg", "hi"], "chunk_size": 3}),
    ("/v1/embeddings", {"input": [[12, 13], [7]]}),
    ("/v1/embeddings", {"input": "x" * 100, "truncate": "start", "user": "someone"}),
    ("/v1/embeddings", {"input": ["x" * 50], "truncate_prompt_tokens": 9, "truncation": True}),
    ("/openai/v1/embeddings", {"model": PLAIN_MODEL, "dimensions": 4, "input_type": "query"}),
    ("/v3/openai/embeddings", {"output_dimension": 8}),
    ("/v1/rerank", {"model": MODEL, "weights": {"dense": 1, "multi": 1}}),
    ("/openai/v1/rerank", {"model": PLAIN_MODEL, "truncation": True, "top_k": 1}),
    (
        "/v3/openai/rerank",
        {"raw_scores": True, "documents": [{"text": "a"}, "b" * 100], "truncate": True},
    ),
    ("/v2/rerank", {"model": MODEL, "max_tokens_per_doc": 5, "documents": ["abcdefgh"]}),
    ("/v2/embed", {"embedding_types": ["float", "int8", "ubinary", "base64"], "max_tokens": 4}),
    ("/v2/embed", {"texts": None, "inputs": [{"content": [{"type": "text", "text": "a"}]}]}),
    ("/embed", {"inputs": [[12, 13], [7]], "normalize": True}),
    ("/predict", {"inputs": "hello", "truncate": True}),
    (
        "/rerank",
        {
            "texts": None,
            "raw_scores": None,
            "return_text": None,
            "model": MODEL,
            "documents": ["a"],
        },
    ),
    ("/", {"inputs": {"source_sentence": "hello", "sentences": ["a"]}}),
    ("/", {"inputs": None, "query": "hello", "texts": ["a", "bb"]}),
]
if importlib.util.find_spec("bpe_openai") is not None:
    VARIANTS.append(("/v1/embeddings", {"input": [IDS], "token_encoding": "cl100k_base"}))
MIXED_REQUESTS = int(os.environ.get("MIXED_REQUESTS", "400"))  # 10,000 take a minute


async def test_the_ledger_says_what_the_answers_say_over_a_mixed_run(fresh: House) -> None:
    """Good and bad requests of every face, by chance: one row for each good one, with its tokens."""
    house, draw = fresh, random.Random(14)
    house.model.card = replace(house.model.card, late_chunking=True)
    models = (house.model, house.plain_model, house.reranker, house.classifier)
    said: dict[str, int] = {}
    refused = 0
    async with house.client() as client:
        for _ in range(MIXED_REQUESTS):
            path, changes = draw.choice([*((path, {}) for path in EVERY), *VARIANTS])
            face = path.replace("/openai/v1", "/v1").replace("/v3/openai", "/v1")
            body = {**EVERY[face], **changes}
            body = {name: value for name, value in body.items() if value is not None}
            is_bad = draw.random() < 0.2
            if is_bad:
                body["nonsense"] = 1
            elif not changes and path in ("/v1/embeddings", "/v2/embed", "/api/embed"):
                name = "texts" if path == "/v2/embed" else "input"
                body["model"] = draw.choice([MODEL, PLAIN_MODEL])
                body[name] = ["x" * draw.randint(1, 60) for _ in range(draw.randint(1, 9))]
            for model in models:
                model.embedded.clear()
            answer = await client.post(f"http://house{path}", json=body)
            assert answer.is_success != is_bad, (path, body, answer.text)
            refused += is_bad
            if not is_bad and face in BODIES:
                computed = sum(one.token_count for model in models for one, _, _ in model.embedded)
                said[answer.headers["x-request-id"]] = computed
                assert tokens_said(answer.json()) in (None, computed)
    rows = {row.request_id: row.token_count for row in house.store.rows}
    assert rows == said
    assert sum(status >= 400 for status in statuses(house.store)) == refused
