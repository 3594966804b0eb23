"""`/openapi.json`: OpenAPI 3.1, made from the operations and the very types that parse requests."""

import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import msgspec
from starlette.responses import Response

from trivec import __version__
from trivec.accounts import Scope
from trivec.api.context import RequestContext
from trivec.api.errors import OPENAI, TABLE, ErrorShape
from trivec.api.schemas import Probe

Json: TypeAlias = dict[str, Any]

_REF = "#/components/schemas/{name}"
_PARAMETER = re.compile(r"\{(\w+)(?::path)?\}")
_ALWAYS = {404, 405, 500}
_WITH_KEY = {401, 403, 503}


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one path. The first line of its handler's docstring is its summary."""

    method: str
    path: str
    handler: Callable[[RequestContext], Awaitable[Response]]
    scope: Scope | None  # of the key that it asks for; None: open to anyone
    response_type: type | None  # None: not JSON of ours
    body_type: type | None = None
    must_have_body: bool = True  # where it reads one
    error_shape: ErrorShape = OPENAI
    query_type: type[msgspec.Struct] | None = None
    media_type: str = "application/json"  # of the body
    is_metered: bool = True  # with a row in the ledger, where it asks for a key
    prefix: str = ""  # of several that its API is served under, the one that the path begins with


def keyed(
    path: str,
    handler: Callable[[RequestContext], Awaitable[Response]],
    response_type: type,
    body_type: type | None = None,
    error_shape: ErrorShape = OPENAI,
) -> Operation:
    """An operation for keys that may embed: POST where it reads a body, else GET."""
    method = "GET" if body_type is None else "POST"
    return Operation(
        method, path, handler, Scope.EMBED, response_type, body_type, error_shape=error_shape
    )


def openapi_document(operations: Sequence[Operation]) -> bytes:
    """The whole description of *operations*, as JSON."""
    types: set[type] = set()
    for one in operations:
        given = (one.body_type, one.response_type, one.error_shape.response_type)
        types |= {kind for kind in given if kind is not None}
    ordered = sorted(types, key=str)
    schemas, components = msgspec.json.schema_components(ordered, ref_template=_REF)
    schema_of = dict(zip(ordered, schemas, strict=True))
    paths: dict[str, Json] = {}
    for one in operations:
        path = _PARAMETER.sub(r"{\1}", one.path)
        places = [(name, "path") for name in _PARAMETER.findall(path)]
        places += [(name, "query") for name in getattr(one.query_type, "__struct_fields__", ())]
        described: Json = {
            "operationId": "_".join([one.method.lower(), *re.findall(r"\w+", path)]),
            "summary": _first_line(one.handler).rstrip("."),
            "security": [] if one.scope is None else [{"key": []}],
            "responses": _responses(one, schema_of),
        }
        if places:
            described["parameters"] = [
                {"name": name, "in": at, "required": at == "path", "schema": {"type": "string"}}
                for name, at in places
            ]
        if one.body_type is not None:
            content = {one.media_type: {"schema": schema_of[one.body_type]}}
            described["requestBody"] = {"required": one.must_have_body, "content": content}
        paths.setdefault(path, {})[one.method.lower()] = described
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


def _responses(operation: Operation, schema_of: dict[type, Json]) -> Json:
    """By status. What an error's status means is said in the first lines of the errors' docstrings."""
    ok: Json = {"description": "Success"}
    if operation.response_type is not None:
        ok["content"] = {"application/json": {"schema": schema_of[operation.response_type]}}
    if operation.response_type is Probe:  # the same structure when it is not well
        return {"200": ok, "503": ok | {"description": "Not well, and why"}}
    if operation.scope is None:
        statuses = _ALWAYS
    elif operation.body_type is None:
        statuses = _ALWAYS | _WITH_KEY | {400}
    else:
        statuses = {row.status for row in TABLE.values()}
    responses = {"200": ok}
    shape = operation.error_shape
    for status in sorted({shape.statuses.get(status, status) for status in statuses}):
        kinds = [
            kind
            for kind, row in TABLE.items()
            if shape.status(kind) == status and row.status in statuses
        ]
        responses[str(status)] = {
            "description": " · ".join(map(_first_line, kinds)),
            "content": {"application/json": {"schema": schema_of[shape.response_type]}},
        }
    return responses


def _first_line(documented: object) -> str:
    return (documented.__doc__ or "").partition("\n")[0]
