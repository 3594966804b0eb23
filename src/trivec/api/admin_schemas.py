"""The words of the admin routes: keys without their secrets, and sums over the ledger."""

from datetime import datetime
from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from trivec.accounts import LIMIT_MAX

NAME_CHARS_MAX = 64
MODELS_MAX = 100
OVERLAP_S_MAX = 30 * 24 * 3600.0

Limit = Annotated[int, Meta(ge=1, le=LIMIT_MAX)]


class CreateKeyRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """What `POST /admin/v1/keys` understands. Null means unset."""

    name: Annotated[str, Meta(min_length=1, max_length=NAME_CHARS_MAX)]
    scopes: Annotated[
        list[Literal["embed", "admin"]] | None, Meta(description="The default is embed alone.")
    ] = None
    models: Annotated[
        Annotated[list[str], Meta(max_length=MODELS_MAX)] | None,
        Meta(description="Ids or aliases of the models that the key may use; unset: every model."),
    ] = None
    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None
    expires: Annotated[
        datetime | None, Meta(description="When it stops to work, as 2027-01-31T00:00:00Z.")
    ] = None
    truncate: Annotated[
        Literal["none", "end", "start"] | None,
        Meta(description="What `truncate` is in its requests where they do not say."),
    ] = None


class RotateKeyRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """What `POST /admin/v1/keys/{id}/rotate` understands; an empty object is enough."""

    overlap_s: Annotated[
        Annotated[float, Meta(ge=0, le=OVERLAP_S_MAX)] | None,
        Meta(description="How long the key of before still works; the default is a day."),
    ] = None


class KeyShown(Struct, frozen=True, kw_only=True):
    """A key, as far as anybody may see it."""

    object: Literal["key"] = "key"
    id: str
    name: str
    hints: Annotated[
        list[str], Meta(description="First and last characters of each plain key that opens it.")
    ]
    scopes: list[str]
    models: list[str] | None
    requests_per_minute: int | None
    tokens_per_minute: int | None
    created: datetime
    expires: datetime | None
    revoked: datetime | None
    truncate: str | None
    key: Annotated[
        str | UnsetType, Meta(description="The plain key: shown once, when it is made.")
    ] = UNSET
    warnings: Annotated[
        list[str] | UnsetType,
        Meta(description="When it is made: each of `models` that is not served here."),
    ] = UNSET


class KeyList(Struct, frozen=True, kw_only=True):
    """What `GET /admin/v1/keys` answers, oldest first."""

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
    """What `GET /admin/v1/usage` answers."""

    object: Literal["list"] = "list"
    by: Literal["key", "model", "day"]
    data: list[UsageShown]
