"""Accounts: API keys, rate limits, and an append-only usage ledger.

Nothing here depends on HTTP, on models, or on what an embedding is. Plain keys are never stored.
"""

from trivec.accounts.accounts import ANONYMOUS, FIXED, Accounts, Reservation
from trivec.accounts.rate_limits import LIMIT_MAX
from trivec.accounts.types import (
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
    "LIMIT_MAX",
    "Accounts",
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
