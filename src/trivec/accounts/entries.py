"""What is handed to a store to be written, and what comes back. Frozen values.

Everything in one group is decided and committed together, in order: see `page`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from trivec.accounts.allowance import NOTHING, Cost
from trivec.accounts.types import RateLimits, RateLimitState
from trivec.core.errors import RateLimitError


class ClaimName(NamedTuple):
    """One `Idempotency-Key` of one API key."""

    key_id: str
    digest: bytes  # 16 bytes that stand for what the client sent


@dataclass(frozen=True, slots=True)
class Claim:
    """A request that an `Idempotency-Key` stands for: running, or done and billed.

    A running claim is held by its process until *held_until_us*, and renewed while the process
    lives; afterwards whoever repeats the request takes it over.
    """

    body_digest: bytes
    owner: str  # the process that runs it
    held_until_us: int
    expires_us: int
    done: bool = False
    token_count: int = 0


@dataclass(frozen=True, slots=True)
class ClaimRequest:
    """A wish to be the one request of this name."""

    name: ClaimName
    body_digest: bytes
    owner: str


@dataclass(frozen=True, slots=True)
class Reserve:
    """Take *cost* out of a key's allowance, and the claim, or refuse both."""

    key_id: str
    allowance: RateLimits | None
    cost: Cost
    claim: ClaimRequest | None = None


@dataclass(frozen=True, slots=True)
class LedgerRow:
    """One authenticated request, until it is archived."""

    time_us: int  # wall clock, microseconds since the epoch
    request_id: str
    key_id: str
    model: str | None
    input_count: int
    token_count: int  # billed
    status: int
    duration_us: int
    user_digest: str | None
    replayed: bool

    @property
    def is_counted(self) -> bool:
        """Whether it is one in a count and no row: it cost no tokens, and bills nothing again."""
        return self.token_count == 0 and not self.replayed


class Count(NamedTuple):
    """What requests that cost no tokens have in common: they are counted together."""

    key_id: str
    model: str | None
    status: int
    minute: int  # since the epoch


@dataclass(frozen=True, slots=True)
class Settle:
    """Write a request down, give back what it did not use, and finish or drop its claim."""

    row: LedgerRow
    allowance: RateLimits | None = None
    unused: Cost = NOTHING
    claim: ClaimRequest | None = None


@dataclass(frozen=True, slots=True)
class Upkeep:
    """A sign of life: hold on to the running claims of *owner*, forget claims that have expired.

    It always writes, so that an idle process learns whether it could.
    """

    owner: str
    boot_id: str


Entry: TypeAlias = Reserve | Settle | Upkeep


@dataclass(frozen=True, slots=True)
class Granted:
    """What was asked for is written."""

    state: RateLimitState | None = None
    replayed: bool = False  # this request was already billed under its idempotency key


Outcome: TypeAlias = Granted | RateLimitError


@dataclass(frozen=True, slots=True)
class Committed:
    """One outcome an entry, in their order, and the instant at which they were decided."""

    outcomes: Sequence[Outcome]
    now_us: int
