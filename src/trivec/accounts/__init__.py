"""Who may call, how much, and what it came to: keys, allowances and an append-only ledger.

Knows nothing of HTTP, of models, or of what an embedding is. Plain keys are never stored;
usage is appended, never edited.
"""

from trivec.accounts.accounts import ANONYMOUS, FIXED, Accounts
from trivec.accounts.booking import Booking
from trivec.accounts.types import (
    Allowance,
    AllowanceState,
    Caller,
    Closing,
    Key,
    KeyPlan,
    NewKey,
    Opening,
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
    "Allowance",
    "AllowanceState",
    "Booking",
    "Caller",
    "Closing",
    "Key",
    "KeyPlan",
    "NewKey",
    "Opening",
    "Scope",
    "Secret",
    "StoreHealth",
    "UsageBy",
    "UsageLine",
    "UsageQuery",
]
