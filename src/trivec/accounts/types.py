"""Keys, callers, rate limits and usage, as frozen values.

Nothing here depends on HTTP, on SQL, or on what an embedding is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from trivec.accounts.utc import moment
from trivec.core.errors import GrantDenied


class Scope(StrEnum):
    """What a key gives access to."""

    EMBED = "embed"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class RateLimits:
    """Requests and tokens a minute, refilled continuously; the burst is one minute's worth."""

    requests_per_minute: int | None = None  # None: no limit
    tokens_per_minute: int | None = None


@dataclass(frozen=True, slots=True)
class RateLimitState:
    """Values of the `x-ratelimit-*` headers. Each is None where the key has no such limit."""

    limit_requests: int | None
    remaining_requests: int | None
    reset_requests_s: float | None  # until the bucket is full again
    limit_tokens: int | None
    remaining_tokens: int | None
    reset_tokens_s: float | None


@dataclass(frozen=True, slots=True)
class RequestMeta:
    """A request, before any work is done for it."""

    request_id: str  # made by us, unique for ever
    model: str | None  # a served id


@dataclass(frozen=True, slots=True)
class RequestUsage:
    """The outcome of a request."""

    status: int  # of the HTTP response; below 400 is a success
    input_count: int
    token_count: int  # computed, special tokens included
    duration_s: float
    user: str | None = None  # as sent by the client; hashed before it is stored


@dataclass(frozen=True, slots=True)
class Secret:
    """The stored form of a plain key. A key has at most two, so that it can be rotated."""

    digest: bytes  # HMAC-SHA256 of the plain key under the server's secret, 32 bytes
    first: str  # its first 8 characters
    last: str  # its last 4 characters
    created_us: int  # microseconds since the epoch, here and below
    expires_us: int | None = None

    def is_live(self, now_us: int) -> bool:
        return self.expires_us is None or now_us < self.expires_us


@dataclass(frozen=True, slots=True)
class Key:
    """A caller: one name, one rate limit and one line in the usage, whatever its secrets."""

    id: str
    name: str
    scopes: frozenset[Scope]
    models: frozenset[str] | None
    limits: RateLimits
    created_us: int
    expires_us: int | None = None
    revoked_us: int | None = None
    secrets: tuple[Secret, ...] = ()  # oldest first
    truncate: str | None = None  # default of its requests: none, end or start

    def is_live(self, now_us: int) -> bool:
        return self.revoked_us is None and (self.expires_us is None or now_us < self.expires_us)

    def may_use(self, names: Sequence[str]) -> bool:
        """Whether it may use a model that has *names*, its id and aliases."""
        return self.models is None or not self.models.isdisjoint(names)

    def require_no_more(self, other: "Key | KeyPlan") -> None:
        """Raise `GrantDenied` where *other* may do more than this key.

        Scopes are not compared: a key with `admin` alone exists to make others.
        """
        if self.models is not None and not (
            other.models is not None and other.models <= self.models
        ):
            raise GrantDenied(param="models", most=", ".join(sorted(self.models)))
        for param in ("requests_per_minute", "tokens_per_minute"):
            most, asked = getattr(self.limits, param), getattr(other.limits, param)
            if most is not None and (asked is None or asked > most):
                raise GrantDenied(param=param, most=f"{most}")
        if self.expires_us is not None and not (
            other.expires_us is not None and other.expires_us <= self.expires_us
        ):
            raise GrantDenied(param="expires", most=moment(self.expires_us).isoformat())


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key and the plain secret that was just made, to be shown once."""

    key: Key
    plain: str


@dataclass(frozen=True, slots=True)
class KeyPlan:
    """The properties of a key to be made."""

    name: str
    scopes: frozenset[Scope] = frozenset({Scope.EMBED})
    models: frozenset[str] | None = None
    limits: RateLimits = RateLimits()
    expires_us: int | None = None
    truncate: str | None = None


class UsageBy(StrEnum):
    """How usage is grouped."""

    KEY = "key"
    MODEL = "model"
    DAY = "day"


@dataclass(frozen=True, slots=True)
class UsageQuery:
    """The part of the ledger to sum, and the grouping. Times are microseconds since the epoch."""

    by: UsageBy
    since_us: int | None = None  # included
    until_us: int | None = None  # excluded
    key_id: str | None = None


@dataclass(frozen=True, slots=True)
class UsageLine:
    """One sum over the ledger."""

    group: str | None  # a key's id, a model's id, or a day such as 2026-11-22; None: no model
    name: str | None  # the key's name; None unless summed by key
    requests: int
    failed: int  # requests answered with 400 or above
    tokens: int


@dataclass(frozen=True, slots=True)
class StoreHealth:
    """Whether the ledger can be written, as of the last try."""

    writable: bool
    reason: str  # for the operator; "ok" when writable
