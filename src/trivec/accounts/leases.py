"""Leases: tokens and requests that this node has reserved of a key's bucket ahead of their use.

Several nodes share the buckets of one store. A node that asked it for every request would wait for
it each time, and all nodes would queue for the bucket of a busy key; so a node reserves what the
key is about to use, and lets requests in from that. What is leased is out of the bucket, so the
nodes together never let in more than the limit. What is not used within `LEASE_US` is given back;
a node that dies takes its leases with it, and they count as used. A limit refills by less than 1 %
in that time, which bounds the error either way, however many the nodes. Pure: no clock, no store.
"""

from trivec.accounts import rate_limits
from trivec.accounts.ledger import Reserve
from trivec.accounts.rate_limits import NOTHING, Bucket, Cost, Grant
from trivec.accounts.types import RateLimits, RateLimitState
from trivec.accounts.utc import SECOND_US
from trivec.core.errors import RateLimitExceeded

LEASE_US = SECOND_US // 2
AHEAD_US = LEASE_US // 2  # of use is leased at once: a busy key's lease is used before it ends
GROWTH_MAX = 2  # times what was used: what was used in a moment says little of the next


class Lease:
    """One key's lease, and its bucket as this node saw it last."""

    def __init__(self, now_us: int) -> None:
        self.limits = RateLimits()
        self.bucket = Bucket()
        self.seen_us: int | None = None  # when the bucket was seen
        self.left = NOTHING
        self.ends_us = now_us
        self.asked: Reserve | None = None  # for the next lease; the answer is on its way
        self.used = NOTHING  # since `since_us`
        self.since_us = now_us - LEASE_US

    def own(self, now_us: int) -> Bucket:
        """The bucket as if what is left were still in it: what this node may use of it."""
        return rate_limits.give_back(self.bucket, self.limits, self.left, now_us=now_us)

    def holds(self, cost: Cost, now_us: int) -> bool:
        limits = self.limits
        return (
            now_us < self.ends_us
            and (limits.requests_per_minute is None or cost.requests <= self.left.requests)
            and (limits.tokens_per_minute is None or cost.tokens <= self.left.tokens)
        )

    def refusal(self, cost: Cost, now_us: int) -> RateLimitExceeded | None:
        """Why *cost* is refused without asking the store, which has just told of the bucket."""
        if self.seen_us is None or now_us - self.seen_us >= AHEAD_US:
            return None
        after = rate_limits.reserve(self.own(now_us), self.limits, cost, now_us=now_us)
        return after if isinstance(after, RateLimitExceeded) else None

    def expected(self, now_us: int) -> Cost:
        """What the key will use in `AHEAD_US` if it goes on as it does."""
        elapsed_us = now_us - self.since_us
        if elapsed_us >= LEASE_US:  # a lease for a key so seldom used would only be given back
            self.since_us, self.used = now_us, NOTHING
            return NOTHING
        expected = [
            min(GROWTH_MAX * count, count * AHEAD_US // max(1, elapsed_us)) for count in self.used
        ]
        if elapsed_us >= AHEAD_US:  # half of the time and of its use are forgotten
            self.since_us += elapsed_us // 2
            self.used = Cost(*(count // 2 for count in self.used))
        return Cost(*expected)


class Leases:
    """The leases of one node, by key id; used on its event loop."""

    def __init__(self) -> None:
        self._leases: dict[str, Lease] = {}

    def take(self, wanted: Reserve, *, now_us: int) -> Reserve | RateLimitExceeded | None:
        """Take the cost of *wanted* out of the lease of its key: then None.

        Otherwise what to ask the store for instead, whose answer goes to `put`, or an error.
        """
        lease = self._leases.get(wanted.key_id)
        if lease is None:
            lease = self._leases[wanted.key_id] = Lease(now_us)
        lease.limits = wanted.limits
        is_held = lease.holds(wanted.cost, now_us)
        if not is_held and (refused := lease.refusal(wanted.cost, now_us)) is not None:
            return refused
        if is_held:
            lease.left = lease.left.minus(wanted.cost)
        elif lease.asked is None:
            ahead, unused = lease.expected(now_us), lease.left
            wanted = Reserve(wanted.key_id, wanted.limits, wanted.cost, ahead, unused)
            lease.asked, lease.left, lease.ends_us = wanted, NOTHING, now_us + LEASE_US
        lease.used = lease.used.plus(wanted.cost)
        return None if is_held else wanted

    def put(self, asked: Reserve, grant: Grant | None) -> None:
        """Note the store's answer to *asked*; None where it granted nothing."""
        lease = self._leases.get(asked.key_id)
        if lease is not None and lease.asked is asked:
            lease.asked = None
            lease.left = NOTHING if grant is None else grant.ahead

    def see(self, key_id: str, bucket: Bucket, *, now_us: int) -> RateLimitState | None:
        """Note what the store tells of a bucket: the `state` of the key."""
        if (lease := self._leases.get(key_id)) is not None:
            lease.bucket, lease.seen_us = bucket, now_us
        return self.state(key_id, now_us=now_us)

    def state(self, key_id: str, *, now_us: int) -> RateLimitState | None:
        """What the key has left as far as this node knows; None where it knows nothing."""
        lease = self._leases.get(key_id)
        if lease is None or lease.seen_us is None:
            return None
        return rate_limits.state(lease.own(now_us), lease.limits)

    def expire(self, *, now_us: int) -> list[Reserve]:
        """End the leases that are over: what gives back what was left of them."""
        over = [
            (key_id, lease)
            for key_id, lease in self._leases.items()
            if lease.asked is None and now_us >= lease.ends_us
        ]
        for key_id, _ in over:
            del self._leases[key_id]
        return [
            Reserve(key_id, lease.limits, NOTHING, unused=lease.left)
            for key_id, lease in over
            if lease.left != NOTHING
        ]

    def __len__(self) -> int:
        return len(self._leases)
