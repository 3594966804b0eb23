"""Who may call, how much, and what it came to: keys, allowances and an append-only ledger.

Knows nothing of HTTP, of models, or of what an embedding is. Plain keys are never stored;
usage is appended, never edited.
"""

from trivec.accounts.accounts import ANONYMOUS, FIXED, Accounts
from trivec.accounts.booking import Reservation
from trivec.accounts.types import (
    Caller,
    Key,
    KeyPlan,
    NewKey,
    RateLimits,
    RateLimitState,
    RequestMeta,
    RequestUsage,
    Scope,
    Secret,
    StoreHealth,
    UsageBy,
    UsageLine,
    UsageQuery,
)

__all__ = [
    "ANONYMOUS",
    "FIXED",
    "Accounts",
    "Caller",
    "Key",
    "KeyPlan",
    "NewKey",
    "RateLimitState",
    "RateLimits",
    "RequestMeta",
    "RequestUsage",
    "Reservation",
    "Scope",
    "Secret",
    "StoreHealth",
    "UsageBy",
    "UsageLine",
    "UsageQuery",
]
