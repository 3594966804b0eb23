"""The admin routes: keys and usage for those who hold a key with the scope `admin`."""

from collections.abc import Sequence
from datetime import datetime
from urllib.parse import parse_qsl

from msgspec import UNSET, UnsetType, structs

from trivec.accounts import (
    FIXED,
    Accounts,
    Caller,
    Key,
    KeyPlan,
    NewKey,
    RateLimits,
    Scope,
    UsageBy,
    UsageLine,
    UsageQuery,
)
from trivec.accounts.utc import microseconds, moment
from trivec.api.admin_schemas import (
    CreateKeyRequest,
    KeyList,
    KeyShown,
    RotateKeyRequest,
    UsageList,
    UsageShown,
)
from trivec.api.answers import Answer, json_answer
from trivec.api.bodies import check_json_is_declared, read_body, read_json_body
from trivec.api.reading import reader, shown
from trivec.api.shelf import Shelf
from trivec.api.visit import Visit
from trivec.core.errors import FieldInvalid
from trivec.settings import HttpLimits

NO_STORE = ((b"cache-control", b"no-store"),)  # a plain key is in some of these answers
USAGE_PARAMETERS = ("by", "since", "until", "key")

_read_create = reader(CreateKeyRequest)
_read_rotate = reader(RotateKeyRequest)


class Admin:
    """Each method is one route: parse, ask, answer."""

    def __init__(self, accounts: Accounts, limits: HttpLimits, shelf: Shelf) -> None:
        self._accounts = accounts
        self._shelf = shelf
        self._limits = limits

    async def create_key(self, visit: Visit) -> Answer:
        asked = _read_create(await read_json_body(visit, self._limits))
        plan = KeyPlan(
            name=asked.name,
            scopes=frozenset(Scope(word) for word in asked.scopes or ["embed"]),
            models=None if asked.models is None else frozenset(asked.models),
            allowance=RateLimits(asked.requests_per_minute, asked.tokens_per_minute),
            expires_us=_expiry_us(asked.expires),
            truncate=asked.truncate,
        )
        _caller(visit).require_no_more(plan)
        new = await self._accounts.create_key(plan)
        return _new_key(new, warnings=self._shelf.warnings_of(plan.models or ()))

    async def list_keys(self, visit: Visit) -> Answer:
        keys = await self._accounts.list_keys()
        return json_answer(KeyList(data=[_shown(key) for key in keys]), headers=NO_STORE)

    async def show_key(self, visit: Visit) -> Answer:
        return json_answer(_shown(await self._accounts.show_key(visit.path_params["id"])))

    async def revoke_key(self, visit: Visit) -> Answer:
        return json_answer(_shown(await self._accounts.revoke_key(await self._grantable(visit))))

    async def rotate_key(self, visit: Visit) -> Answer:
        overlap_s = None
        if body := await read_body(visit, self._limits):
            check_json_is_declared(visit)
            overlap_s = _read_rotate(body).overlap_s
        reference = await self._grantable(visit)
        if overlap_s is None:
            return _new_key(await self._accounts.rotate_key(reference))
        return _new_key(await self._accounts.rotate_key(reference, overlap_s=overlap_s))

    async def _grantable(self, visit: Visit) -> str:
        """The id of the key in the path, which may do no more than the caller's own."""
        key = await self._accounts.show_key(visit.path_params["id"])
        _caller(visit).require_no_more(key)
        return key.id

    async def usage(self, visit: Visit) -> Answer:
        query = await self._query(visit)
        lines = await self._accounts.usage(query)
        data = [_usage(query.by, line) for line in lines]
        return json_answer(UsageList(by=query.by.value, data=data), headers=NO_STORE)

    async def _query(self, visit: Visit) -> UsageQuery:
        given = dict(parse_qsl(visit.query.decode("latin-1"), keep_blank_values=True))
        for name in given.keys() - set(USAGE_PARAMETERS):
            raise FieldInvalid(
                f"Unrecognized query parameter: {shown(name)}. "
                f"Known: {', '.join(USAGE_PARAMETERS)}.",
                param=shown(name),
            )
        key = given.get("key")
        return UsageQuery(
            by=_by(given.get("by", "key")),
            since_us=_instant_us("since", given.get("since")),
            until_us=_instant_us("until", given.get("until")),
            key_id=None if key is None else await self._key_id(key),
        )

    async def _key_id(self, reference: str) -> str:
        """Also of the environment's key, which is in no store."""
        if reference == FIXED.key_id:
            return reference
        return (await self._accounts.show_key(reference)).id


def _caller(visit: Visit) -> Caller:
    assert visit.caller is not None, "admin routes are mounted behind a key"
    return visit.caller


def _by(word: str) -> UsageBy:
    try:
        return UsageBy(word)
    except ValueError:
        raise FieldInvalid(
            f"Invalid value for 'by' = {shown(word)}. Supported values: "
            f"{[one.value for one in UsageBy]}.",
            param="by",
        ) from None


def _expiry_us(expires: datetime | None) -> int | None:
    try:
        return None if expires is None else microseconds(expires)
    except ValueError as unfit:
        raise FieldInvalid(f"Invalid value for 'expires': {unfit}.", param="expires") from None


def _instant_us(param: str, text: str | None) -> int | None:
    if text is None:
        return None
    try:
        return microseconds(datetime.fromisoformat(text))
    except ValueError:
        raise FieldInvalid(
            f"Invalid value for '{param}' = {shown(text)}. "
            "Send a day or an instant, as 2026-11-22 or 2026-11-22T17:00:00Z.",
            param=param,
        ) from None


def _new_key(new: NewKey, *, warnings: Sequence[str] = ()) -> Answer:
    shown_key = _shown(new.key, plain=new.plain)
    if warnings:
        shown_key = structs.replace(shown_key, warnings=list(warnings))
    return json_answer(shown_key, headers=NO_STORE)


def _shown(key: Key, *, plain: str | UnsetType = UNSET) -> KeyShown:
    return KeyShown(
        id=key.id,
        name=key.name,
        hints=[f"{secret.first}…{secret.last}" for secret in key.secrets],
        scopes=sorted(key.scopes),
        models=None if key.models is None else sorted(key.models),
        requests_per_minute=key.allowance.requests_per_minute,
        tokens_per_minute=key.allowance.tokens_per_minute,
        created=moment(key.created_us),
        expires=None if key.expires_us is None else moment(key.expires_us),
        revoked=None if key.revoked_us is None else moment(key.revoked_us),
        truncate=key.truncate,
        key=plain,
    )


def _usage(by: UsageBy, line: UsageLine) -> UsageShown:
    requests, failed, tokens = line.requests, line.failed, line.tokens
    match by:
        case UsageBy.KEY:
            assert line.group is not None, "every row has a key"
            return UsageShown(
                key=line.group, name=line.name, requests=requests, failed=failed, tokens=tokens
            )
        case UsageBy.MODEL:
            return UsageShown(model=line.group, requests=requests, failed=failed, tokens=tokens)
        case UsageBy.DAY:
            assert line.group is not None, "every row has a day"
            return UsageShown(day=line.group, requests=requests, failed=failed, tokens=tokens)
