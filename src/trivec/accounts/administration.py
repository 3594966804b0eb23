"""Administration of keys, and usage sums. Blocking; every change is one transaction.

The command line uses it directly; `Accounts` runs it off the event loop.
"""

from collections.abc import Callable
from dataclasses import asdict, replace

from trivec.accounts import keys
from trivec.accounts.ledger import Store
from trivec.accounts.rate_limits import LIMIT_MAX
from trivec.accounts.types import Key, KeyPlan, NewKey, Scope, Secret, UsageLine, UsageQuery
from trivec.core.errors import FieldInvalid, ResourceUnknown, StoreRefused
from trivec.core.ports import Clock

FIXED_KEY_ID = "TRIVEC_API_KEY"  # the id and name of the key that the environment gives
FIRST_KEY_NAME = "first"
NAME_CHARS_MAX = 64
KEYS_MAX = 100_000  # live ones: every process holds them all in memory
OVERLAP_S = 24 * 3600.0  # how long a rotated key's old secret still opens it


class Administration:
    """Operations on the store. Keys are addressed by name, by id, or by the plain key."""

    def __init__(self, store: Store, *, clock: Clock, secret: bytes) -> None:
        self._store = store
        self._clock = clock
        self._secret = secret

    def create_key(self, plan: KeyPlan) -> NewKey:
        """Raises `FieldInvalid` for a taken or invalid name, limits out of range, a past expiry."""
        check_plan(plan)
        if self._store.count_live_keys() >= KEYS_MAX:
            raise FieldInvalid(f"There are {KEYS_MAX} keys already; revoke some.", param="name")
        now_us = self._now_us()
        if plan.expires_us is not None and plan.expires_us <= now_us:
            raise FieldInvalid(
                "expires is in the past: the key would have expired. Give a time to come.",
                param="expires",
            )
        secret, plain = self._new_secret(now_us)
        key = Key(
            keys.new_key_id(),
            plan.name,
            plan.scopes,
            plan.models,
            plan.limits,
            created_us=now_us,
            expires_us=plan.expires_us,
            secrets=(secret,),
            truncate=plan.truncate,
        )
        self._store.add_key(key)
        return NewKey(key, plain)

    def create_first_key(self) -> NewKey | None:
        """A key with every scope, if there has never been one; None otherwise."""
        if self._store.keys_since(0).keys:
            return None
        try:
            return self.create_key(KeyPlan(FIRST_KEY_NAME, scopes=frozenset(Scope)))
        except FieldInvalid:  # another process was quicker
            return None

    def list_keys(self) -> list[Key]:
        """All of them, revoked ones too, oldest first."""
        return sorted(self._store.keys_since(0).keys, key=lambda key: (key.created_us, key.id))

    def show_key(self, reference: str) -> Key:
        """Raises `ResourceUnknown`."""
        digest = keys.digest(reference, secret=self._secret)
        # Postgres looks for no text with a NUL in it, and no name has one.
        found = [] if "\0" in reference else self._store.find_keys(reference, digest)
        if not found:
            hint = "trivec keys list shows them."
            if reference.startswith(keys.PREFIX) and not keys.is_well_formed(reference):
                hint = "What looks like a key has a typo in it: its checksum does not fit."
            is_long = len(reference) > NAME_CHARS_MAX
            shown = f"{reference[: keys.FIRST_CHARS]}…" if is_long else reference
            raise ResourceUnknown(f"There is no key {shown}. {hint}")
        # Names may be used again after a revocation: a live key comes before revoked ones.
        return max(found, key=lambda key: (key.revoked_us is None, key.created_us))

    def key_id(self, reference: str) -> str:
        """The id for *reference*, also of the environment's key. Raises `ResourceUnknown`."""
        return reference if reference == FIXED_KEY_ID else self.show_key(reference).id

    def revoke_key(self, reference: str) -> Key:
        """The key is refused by every process within a second. Cannot be undone."""
        now_us = self._now_us()
        return self._change(
            reference,
            lambda key: key if key.revoked_us is not None else replace(key, revoked_us=now_us),
        )

    def rotate_key(self, reference: str, *, overlap_s: float = OVERLAP_S) -> NewKey:
        """A second plain key for the same key; the one before it expires after *overlap_s*.

        Usage and limits go on as they were. Raises `FieldInvalid` for a revoked key.
        """
        now_us = self._now_us()
        secret, plain = self._new_secret(now_us)
        until_us = now_us + round(overlap_s * 1_000_000)

        def rotated(key: Key) -> Key:
            if not key.is_live(now_us):
                raise FieldInvalid(f"The key {key.name} is revoked or expired; create another.")
            *_, newest = key.secrets
            newest = replace(newest, expires_us=min(until_us, newest.expires_us or until_us))
            return replace(key, secrets=(newest, secret))

        return NewKey(self._change(reference, rotated), plain)

    def usage(self, query: UsageQuery) -> list[UsageLine]:
        return self._store.usage(query)

    def _change(self, reference: str, change: Callable[[Key], Key]) -> Key:
        return self._store.change_key(self.show_key(reference).id, change)

    def _new_secret(self, now_us: int) -> "tuple[Secret, str]":
        plain = keys.new_plain_key()
        digest = keys.digest(plain, secret=self._secret)
        first, last = plain[: keys.FIRST_CHARS], plain[-keys.LAST_CHARS :]
        return Secret(digest, first, last, created_us=now_us), plain

    def _now_us(self) -> int:
        return int(self._clock.wall_s() * 1e6)


def check_secret(store: Store, secret: bytes) -> None:
    """Raise `StoreRefused` when the store's keys were made under another secret."""
    proposed = keys.pseudonym("", secret=secret, purpose="check")
    if store.agree_secret_check(proposed) != proposed:
        raise StoreRefused(
            "the keys in this store were made with another secret, so none of them would be known; "
            "restore the file `secret` of its data folder, or set TRIVEC_SECRET to what it was"
        )


def check_plan(plan: KeyPlan) -> None:
    """Raise `FieldInvalid` for a name, scopes or limits that no key may have."""
    if not (0 < len(plan.name) <= NAME_CHARS_MAX and plan.name.isprintable()) or (
        plan.name != plan.name.strip() or plan.name.startswith((keys.PREFIX, "key_", "-"))
    ):
        raise FieldInvalid(
            f"A key's name has 1 to {NAME_CHARS_MAX} printable characters, no blank at its ends, "
            "and does not begin with tv_, key_ or a dash.",
            param="name",
        )
    if plan.name == FIXED_KEY_ID:
        raise FieldInvalid(f"{FIXED_KEY_ID} names the key of the environment.", param="name")
    if not plan.scopes:
        raise FieldInvalid("A key needs a scope: embed, admin or both.", param="scopes")
    for name, limit in asdict(plan.limits).items():
        if limit is not None and not 1 <= limit <= LIMIT_MAX:
            raise FieldInvalid(f"{name} is {limit}; it is 1 to {LIMIT_MAX}, or unset.", param=name)
