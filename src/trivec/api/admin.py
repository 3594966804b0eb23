"""The admin API: keys and usage, for a key with the scope `admin`."""

from datetime import datetime
from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType
from msgspec.structs import replace
from starlette.responses import Response

from trivec.accounts import FIXED, Key, KeyPlan, RateLimits, Scope, UsageBy, UsageQuery
from trivec.accounts.utc import microseconds, moment
from trivec.api.context import RequestContext
from trivec.api.inference import read_query
from trivec.api.openapi import Operation
from trivec.api.responses import NO_STORE, json_response
from trivec.api.schemas import Truncate, decoder_of, doc, shown
from trivec.core.errors import FieldInvalid

RATE_MAX = 1_000_000_000  # a minute, of what accounts can count exactly
NAME_CHARS_MAX = 64
MODELS_MAX = 100
OVERLAP_S_MAX = 30 * 24 * 3600.0

Limit = Annotated[int, Meta(ge=1, le=RATE_MAX)]


class CreateKeyRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """Body of `POST /admin/v1/keys`; null means unset."""

    name: Annotated[str, Meta(min_length=1, max_length=NAME_CHARS_MAX)]
    scopes: Annotated[list[Literal["embed", "admin"]] | None, doc("The default is embed.")] = None
    models: Annotated[
        Annotated[list[str], Meta(max_length=MODELS_MAX)] | None,
        doc("Ids or aliases of the models that the key may use; unset: every model."),
    ] = None
    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None
    expires: Annotated[datetime | None, doc("An instant in RFC 3339, as 2027-01-31T00:00:00Z.")] = (
        None
    )
    truncate: Annotated[Truncate | None, doc("Of its requests that do not say.")] = None


class RotateKeyRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """Body of `POST /admin/v1/keys/{id}/rotate`; an empty object is enough."""

    overlap_s: Annotated[
        Annotated[float, Meta(ge=0, le=OVERLAP_S_MAX)] | None,
        doc("How long the key of before still works; the default is a day."),
    ] = None


class KeyShown(Struct, frozen=True, kw_only=True):
    """A key, as far as anybody may see it."""

    object: Literal["key"] = "key"
    id: str
    name: str
    hints: Annotated[list[str], doc("First and last characters of each of its plain keys.")]
    scopes: list[str]
    models: list[str] | None
    requests_per_minute: int | None
    tokens_per_minute: int | None
    created: datetime
    expires: datetime | None
    revoked: datetime | None
    truncate: str | None
    key: Annotated[str | UnsetType, doc("The plain key: shown once, when it is made.")] = UNSET
    warnings: Annotated[list[str] | UnsetType, doc("Models that are not served here.")] = UNSET


class KeyList(Struct, frozen=True, kw_only=True):
    """Response of `GET /admin/v1/keys`, oldest first."""

    object: Literal["list"] = "list"
    data: list[KeyShown]


class UsageShown(Struct, frozen=True, kw_only=True):
    """One sum over the ledger: by `key`, by `model` or by `day`, as was asked."""

    key: str | UnsetType = UNSET
    name: str | UnsetType | None = UNSET
    model: str | UnsetType | None = UNSET
    day: str | UnsetType = UNSET
    requests: int
    failed: int
    tokens: int


class UsageList(Struct, frozen=True, kw_only=True):
    """Response of `GET /admin/v1/usage`."""

    object: Literal["list"] = "list"
    by: Literal["key", "model", "day"]
    data: list[UsageShown]


class UsageParameters(Struct, frozen=True, forbid_unknown_fields=True):
    """Query of `GET /admin/v1/usage`."""

    by: UsageBy = UsageBy.KEY
    since: str | None = None
    until: str | None = None
    key: str | None = None


async def create_key(context: RequestContext) -> Response:
    """Make a key; the response shows it once."""
    asked = decoder_of(CreateKeyRequest).decode(await context.read_body())
    try:
        expires_us = None if asked.expires is None else microseconds(asked.expires)
    except ValueError as unfit:
        raise FieldInvalid(f"Invalid value for 'expires': {unfit}.", param="expires") from None
    plan = KeyPlan(
        name=asked.name,
        scopes=frozenset(Scope(word) for word in asked.scopes or ["embed"]),
        models=None if asked.models is None else frozenset(asked.models),
        limits=RateLimits(asked.requests_per_minute, asked.tokens_per_minute),
        expires_us=expires_us,
        truncate=asked.truncate,
    )
    context.known_caller.require_no_more(plan)
    new = await context.app.accounts.create_key(plan)
    embedders = context.app.embedders
    served = ", ".join({one.card.id: None for one in embedders.values()})
    warnings = [
        f"No model called {shown(name)} is served here (served: {served}); the key opens it "
        "once one is."
        for name in sorted(plan.models or ())
        if name not in embedders
    ]
    return _key_response(new.key, plain=new.plain, warnings=warnings or UNSET)


async def list_keys(context: RequestContext) -> Response:
    """List all keys."""
    keys = await context.app.accounts.list_keys()
    return json_response(KeyList(data=[_key_shown(key) for key in keys]), headers=NO_STORE)


async def show_key(context: RequestContext) -> Response:
    """Show a key, by name or id."""
    return _key_response(await context.app.accounts.show_key(context.path_params["id"]))


async def revoke_key(context: RequestContext) -> Response:
    """Revoke a key for good."""
    return _key_response(await context.app.accounts.revoke_key(await _changeable_id(context)))


async def rotate_key(context: RequestContext) -> Response:
    """Give a key a second secret."""
    body = await context.read_body(is_optional=True)
    overlap_s = decoder_of(RotateKeyRequest).decode(body).overlap_s if body else None
    key_id = await _changeable_id(context)
    given = {} if overlap_s is None else {"overlap_s": overlap_s}
    new = await context.app.accounts.rotate_key(key_id, **given)
    return _key_response(new.key, plain=new.plain)


async def _changeable_id(context: RequestContext) -> str:
    """The id of the key in the path, which may do no more than the caller's own."""
    key = await context.app.accounts.show_key(context.path_params["id"])
    context.known_caller.require_no_more(key)
    return key.id


async def usage(context: RequestContext) -> Response:
    """Sum the ledger by key, model or day."""
    asked = read_query(UsageParameters, context)
    by, key_id = asked.by, asked.key
    if key_id is not None and key_id != FIXED.id:  # the environment's key is in no store
        key_id = (await context.app.accounts.show_key(key_id)).id
    since_us, until_us = _instant_us("since", asked.since), _instant_us("until", asked.until)
    query = UsageQuery(by=by, since_us=since_us, until_us=until_us, key_id=key_id)
    data = [
        UsageShown(
            key=(line.group or UNSET) if by is UsageBy.KEY else UNSET,
            name=line.name if by is UsageBy.KEY else UNSET,
            model=line.group if by is UsageBy.MODEL else UNSET,
            day=(line.group or UNSET) if by is UsageBy.DAY else UNSET,
            requests=line.requests,
            failed=line.failed,
            tokens=line.tokens,
        )
        for line in await context.app.accounts.usage(query)
    ]
    return json_response(UsageList(by=by.value, data=data), headers=NO_STORE)


def _instant_us(param: str, text: str | None) -> int | None:
    try:
        return None if text is None else microseconds(datetime.fromisoformat(text))
    except ValueError:
        raise FieldInvalid(
            f"Invalid value for '{param}' = {shown(text or '')}. "
            "Send a day or an instant, as 2026-11-22 or 2026-11-22T17:00:00Z.",
            param=param,
        ) from None


def _key_response(
    key: Key, *, plain: str | UnsetType = UNSET, warnings: list[str] | UnsetType = UNSET
) -> Response:
    """Never to be stored: a plain key is in some of these responses."""
    key_shown = replace(_key_shown(key), key=plain, warnings=warnings)
    return json_response(key_shown, headers=NO_STORE)


def _key_shown(key: Key) -> KeyShown:
    return KeyShown(
        id=key.id,
        name=key.name,
        hints=[f"{secret.first}…{secret.last}" for secret in key.secrets],
        scopes=sorted(key.scopes),
        models=None if key.models is None else sorted(key.models),
        requests_per_minute=key.limits.requests_per_minute,
        tokens_per_minute=key.limits.tokens_per_minute,
        created=moment(key.created_us),
        expires=None if key.expires_us is None else moment(key.expires_us),
        revoked=None if key.revoked_us is None else moment(key.revoked_us),
        truncate=key.truncate,
    )


KEYS, KEY, ADMIN = "/admin/v1/keys", "/admin/v1/keys/{id}", Scope.ADMIN
OPERATIONS = (
    Operation("GET", KEYS, list_keys, ADMIN, KeyList),
    Operation("POST", KEYS, create_key, ADMIN, KeyShown, CreateKeyRequest),
    Operation("GET", KEY, show_key, ADMIN, KeyShown),
    Operation("POST", KEY + "/revoke", revoke_key, ADMIN, KeyShown),
    Operation(
        "POST", KEY + "/rotate", rotate_key, ADMIN, KeyShown, RotateKeyRequest, must_have_body=False
    ),
    Operation("GET", "/admin/v1/usage", usage, ADMIN, UsageList, query_type=UsageParameters),
)
