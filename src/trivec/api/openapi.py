"""`/openapi.json`: OpenAPI 3.1, made from the operations and the very types that parse requests."""

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from trivec import __version__
from trivec.accounts import Scope
from trivec.api.errors import TABLE
from trivec.api.schemas import ErrorAnswer, Probe

Json: TypeAlias = dict[str, Any]

_REF = "#/components/schemas/{name}"
_PARAMETER = re.compile(r"\{(\w+)(?::path)?\}")
_ALWAYS = {404, 405, 500}
_WITH_KEY = {401, 403, 503}


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one path: its handler, the key it asks for, and what it reads and answers."""

    method: str
    path: str
    handler: Callable[[Request], Awaitable[Response]]
    summary: str
    answers: type | None  # the structure of its JSON answer; None: not JSON of ours
    reads: type | None = None  # the structure of its JSON body
    must_have_body: bool = True  # where it reads one
    query: Sequence[str] = ()
    scope: Scope | None = None  # of the key that it asks for; None: open to anyone
    is_metered: bool = True  # with a row in the ledger and a bound on its time, where it has a key


def openapi_document(operations: Sequence[Operation]) -> bytes:
    """The whole description of *operations*, as JSON."""
    types: set[type] = {ErrorAnswer}
    for one in operations:
        types |= {kind for kind in (one.reads, one.answers) if kind is not None}
    ordered = sorted(types, key=lambda kind: kind.__name__)
    schemas, components = msgspec.json.schema_components(ordered, ref_template=_REF)
    schema_of = dict(zip(ordered, schemas, strict=True))
    paths: dict[str, Json] = {}
    for one in operations:
        path = _PARAMETER.sub(r"{\1}", one.path)
        paths.setdefault(path, {})[one.method.lower()] = _described(one, path, schema_of)
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


def _described(operation: Operation, path: str, schema_of: Mapping[type, Json]) -> Json:
    described: Json = {
        "operationId": "_".join([operation.method.lower(), *re.findall(r"\w+", path)]),
        "summary": operation.summary,
        "security": [] if operation.scope is None else [{"key": []}],
        "responses": _responses(operation, schema_of),
    }
    places = [(name, "path") for name in _PARAMETER.findall(path)]
    places += [(name, "query") for name in operation.query]
    if places:
        described["parameters"] = [
            {"name": name, "in": place, "required": place == "path", "schema": {"type": "string"}}
            for name, place in places
        ]
    if operation.reads is not None:
        content = {"application/json": {"schema": schema_of[operation.reads]}}
        described["requestBody"] = {"required": operation.must_have_body, "content": content}
    return described


def _responses(operation: Operation, schema_of: Mapping[type, Json]) -> Json:
    ok: Json = {"description": "Success"}
    if operation.answers is not None:
        ok["content"] = {"application/json": {"schema": schema_of[operation.answers]}}
    if operation.answers is Probe:  # the same structure when it is not well
        return {"200": ok, "503": ok | {"description": "Not well, and why"}}
    if operation.scope is None:
        statuses = _ALWAYS
    elif operation.reads is None:
        statuses = _ALWAYS | _WITH_KEY | {400}
    else:
        statuses = {row.status for row in TABLE.values()}
    error = {"application/json": {"schema": schema_of[ErrorAnswer]}}
    return {"200": ok} | {
        str(status): {"description": _meaning(status), "content": error}
        for status in sorted(statuses)
    }


def _meaning(status: int) -> str:
    """The errors that have this status, in the words of their docstrings."""
    kinds = [kind for kind, row in TABLE.items() if row.status == status]
    return " · ".join((kind.__doc__ or "").partition("\n")[0] for kind in kinds)
