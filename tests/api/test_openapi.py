"""`/openapi.json` describes what is served, and what is served is what it describes."""

import asyncio
import re
from collections.abc import Iterator
from typing import Any

import pytest
from tests.api.house import House
from tests.api.test_access import EXPECTED

from trivec.api.schemas import EmbeddingsRequest

METHODS = {"get", "post"}


@pytest.fixture(scope="module")
def document(shared_house: House) -> Any:
    async def read() -> Any:
        async with shared_house.client() as client:
            return (await client.get("http://house/openapi.json")).json()

    return asyncio.run(read())


def nodes(tree: Any) -> Iterator[Any]:
    yield tree
    inner = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    for one in inner:
        yield from nodes(one)


def test_it_is_openapi_3_1(document: Any) -> None:
    assert document["openapi"] == "3.1.0"
    assert {"title", "version"} <= set(document["info"])
    assert {"paths", "components"} <= set(document)


def test_it_lists_every_route_but_itself(document: Any) -> None:
    found = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    served = {(method, path.replace(":path", "")) for method, path in EXPECTED}
    assert found == served - {("GET", "/openapi.json")}


def test_it_says_which_routes_need_a_key(document: Any) -> None:
    for (method, path), access in EXPECTED.items():
        if path != "/openapi.json":
            operation = document["paths"][path.replace(":path", "")][method.lower()]
            assert operation["security"] == ([] if access == "open" else [{"key": []}])


def test_every_reference_leads_somewhere(document: Any) -> None:
    schemas = document["components"]["schemas"]
    references = [
        node["$ref"] for node in nodes(document) if isinstance(node, dict) and "$ref" in node
    ]
    assert references
    for reference in references:
        assert reference.removeprefix("#/components/schemas/") in schemas


def test_every_operation_has_its_own_id_its_parameters_and_its_failures(document: Any) -> None:
    ids = []
    for path, item in document["paths"].items():
        for operation in item.values():
            ids.append(operation["operationId"])
            named = {one["name"] for one in operation.get("parameters", []) if one["in"] == "path"}
            assert named == set(re.findall(r"\{(\w+)\}", path))
            assert "200" in operation["responses"]
            assert all(answer["description"] for answer in operation["responses"].values())
    assert len(ids) == len(set(ids))


def test_probes_say_what_they_answer_when_it_is_not_well(document: Any) -> None:
    answers = document["paths"]["/readyz"]["get"]["responses"]
    assert answers["503"]["content"] == answers["200"]["content"]


def test_requests_are_described_by_the_type_that_parses_them(document: Any) -> None:
    schema = document["components"]["schemas"]["EmbeddingsRequest"]
    assert set(schema["properties"]) == set(EmbeddingsRequest.__struct_fields__)
    assert schema["required"] == ["model", "input"]
    assert schema["additionalProperties"] is False
    body = document["paths"]["/v1/embeddings"]["post"]["requestBody"]["content"]
    assert body["application/json"]["schema"]["$ref"].endswith("/EmbeddingsRequest")
