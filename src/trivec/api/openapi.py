"""`/openapi.json`: OpenAPI 3.1, made from the endpoints and the very types that parse requests."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from trivec import __version__
from trivec.api.access import Access
from trivec.api.errors import TABLE
from trivec.api.routing import Endpoint
from trivec.api.schemas import ErrorAnswer, Probe

Json = dict[str, Any]

_REF = "#/components/schemas/{name}"
_PARAMETER = re.compile(r"\{(\w+)(?::path)?\}")
_ALWAYS = {404, 405, 500}
_WITH_KEY = {401, 403, 503}


def openapi_document(endpoints: Sequence[Endpoint]) -> bytes:
    """The whole description of *endpoints*, as JSON."""
    types: set[type] = {ErrorAnswer}
    for endpoint in endpoints:
        types |= {one for one in (endpoint.reads, endpoint.answers) if one is not None}
    ordered = sorted(types, key=lambda one: one.__name__)
    schemas, components = msgspec.json.schema_components(ordered, ref_template=_REF)
    schema_of = dict(zip(ordered, schemas, strict=True))
    paths: dict[str, Json] = {}
    for endpoint in endpoints:
        for path in endpoint.paths:
            operations = paths.setdefault(_PARAMETER.sub(r"{\1}", path), {})
            operations[endpoint.method.lower()] = _operation(endpoint, path, schema_of)
    document = {
        "openapi": "3.1.0",
        "info": {
            "title": "Trivec",
            "version": __version__,
            "summary": "Text embeddings behind the API that OpenAI and Novita clients speak.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }
    return msgspec.json.encode(document)


def _operation(endpoint: Endpoint, path: str, schema_of: Mapping[type, Json]) -> Json:
    operation: Json = {
        "operationId": _operation_id(endpoint.method, path),
        "summary": endpoint.summary,
        "security": [] if endpoint.access is Access.OPEN else [{"key": []}],
        "responses": _responses(endpoint, schema_of),
    }
    parameters = [_parameter(name, "path") for name in _PARAMETER.findall(path)]
    parameters += [_parameter(name, "query") for name in endpoint.query]
    if parameters:
        operation["parameters"] = parameters
    if endpoint.reads is not None:
        content = {"application/json": {"schema": schema_of[endpoint.reads]}}
        operation["requestBody"] = {"required": endpoint.must_have_body, "content": content}
    return operation


def _responses(endpoint: Endpoint, schema_of: Mapping[type, Json]) -> Json:
    ok: Json = {"description": "Success"}
    if endpoint.answers is not None:
        ok["content"] = {"application/json": {"schema": schema_of[endpoint.answers]}}
    if endpoint.answers is Probe:  # the same words when it is not well
        return {"200": ok, "503": ok | {"description": "Not well, and why"}}
    error = {"application/json": {"schema": schema_of[ErrorAnswer]}}
    return {"200": ok} | {
        str(status): {"description": _meaning(status), "content": error}
        for status in sorted(_statuses(endpoint))
    }


def _statuses(endpoint: Endpoint) -> set[int]:
    """Which failures an endpoint can answer with."""
    if endpoint.access is Access.OPEN:
        return _ALWAYS
    if endpoint.reads is None:
        return _ALWAYS | _WITH_KEY | {400}
    return {row.status for row in TABLE.values()}


def _meaning(status: int) -> str:
    """The errors that have this status, in the words of their docstrings."""
    sayings = [(kind.__doc__ or "").partition("\n")[0] for kind in TABLE]
    return " · ".join(
        saying for saying, row in zip(sayings, TABLE.values(), strict=True) if row.status == status
    )


def _parameter(name: str, place: str) -> Json:
    return {"name": name, "in": place, "required": place == "path", "schema": {"type": "string"}}


def _operation_id(method: str, path: str) -> str:
    return "_".join([method.lower(), *re.findall(r"\w+", path.replace(":path", ""))])
