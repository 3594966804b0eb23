"""Between rows of the tables and the room's nouns."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from operator import itemgetter
from typing import Any

from sqlalchemy import Row

from trivec.accounts.allowance import Bucket
from trivec.accounts.entries import Claim, ClaimName, Count, LedgerRow
from trivec.accounts.page import DayOf, Total
from trivec.accounts.types import Key, RateLimits, Scope, Secret

Values = dict[str, Any]  # the columns of one row, by name


def key_values(key: Key, *, revision: int) -> Values:
    return {
        "id": key.id,
        "name": key.name,
        "scopes": " ".join(sorted(key.scopes)),
        "models": None if key.models is None else json.dumps(sorted(key.models)),
        "requests_per_minute": key.allowance.requests_per_minute,
        "tokens_per_minute": key.allowance.tokens_per_minute,
        "created_us": key.created_us,
        "expires_us": key.expires_us,
        "revoked_us": key.revoked_us,
        "revision": revision,
        "truncate": key.truncate,
    }


def secret_values(key: Key) -> list[Values]:
    return [
        {
            "digest": secret.digest,
            "key_id": key.id,
            "first": secret.first,
            "last": secret.last,
            "created_us": secret.created_us,
            "expires_us": secret.expires_us,
        }
        for secret in key.secrets
    ]


def key_of(row: Row[Any], secrets: Iterable[Row[Any]]) -> Key:
    return Key(
        row.id,
        row.name,
        frozenset(Scope(scope) for scope in row.scopes.split()),
        None if row.models is None else frozenset(json.loads(row.models)),
        RateLimits(row.requests_per_minute, row.tokens_per_minute),
        row.created_us,
        row.expires_us,
        row.revoked_us,
        tuple(
            Secret(bytes(s.digest), s.first, s.last, s.created_us, s.expires_us)
            for s in sorted(secrets, key=lambda s: s.created_us)
        ),
        row.truncate,
    )


def bucket_values(key_id: str, bucket: Bucket) -> Values:
    return {
        "key_id": key_id,
        "requests_debt": bucket.requests_debt,
        "tokens_debt": bucket.tokens_debt,
        "at_us": bucket.at_us,
    }


LEDGER_NAMES = tuple(field.name for field in fields(LedgerRow))  # and so are the columns


def ledger_values(row: LedgerRow) -> Values:
    return {name: getattr(row, name) for name in LEDGER_NAMES}


of_count = itemgetter("key_id", "model", "status", "minute")  # its place among the counts
of_total = itemgetter("key_id", "model", "day")


def count_values(count: Count, requests: int) -> Values:
    return count._asdict() | {"model": count.model or "", "requests": requests}


def total_values(day: DayOf, total: Total) -> Values:
    return day._asdict() | {"model": day.model or ""} | asdict(total)


def claim_values(name: ClaimName, claim: Claim) -> Values:
    return {
        "key_id": name.key_id,
        "digest": name.digest,
        "body_digest": claim.body_digest,
        "owner": claim.owner,
        "held_until_us": claim.held_until_us,
        "expires_us": claim.expires_us,
        "done": claim.done,
        "token_count": claim.token_count,
    }


def claim_of(row: Sequence[Any]) -> Claim:
    """From a driver's own row: the columns of a claim in the order of its fields."""
    body_digest, owner, held_until_us, expires_us, done, token_count = row
    return Claim(bytes(body_digest), owner, held_until_us, expires_us, bool(done), token_count)
