"""Simulation of many nodes: rate limits, queues, node losses and a bulk job, with the code that serves.

`python -m benchmarks.simulation [--nodes 64] [--keys 10000] [--seconds 150] [--seed 1]`

The scheduler, its fair queue, the leases and the arithmetic of the store's buckets are the real ones,
on one clock that this moves by hand from event to event. What is made up: a batch takes its tokens
over `TOKENS_PER_S`, the store answers at once, and a balancer gives each request to any node that
lives. Ten hot keys ask for twice what they may have, on all nodes; the others for less than they
may. Every node also works on a bulk job. Some nodes die, with their leases and queues, and come back.

* limits: what the hot keys were let in over what they may have, after the burst; the worst of them.
* starvation: what a key within its limit was refused, and how long requests waited for a batch.
* bulk: documents a second and node, on 1 node and on all: their ratio is how linear it is. Then a job
  of 10**9 documents in shards that free nodes take, and the most nodes that are within 5 %.

The last line is JSON.
"""

import argparse
import asyncio
import heapq
import json
import random
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
from tests.hand_clock import HandClock

from trivec.accounts.leases import Leases
from trivec.accounts.ledger import Answer, Reserve, Transaction
from trivec.accounts.rate_limits import Bucket, Cost, Grant
from trivec.accounts.types import RateLimits
from trivec.backends.fake import FakeBackend
from trivec.core.errors import RateLimitExceeded, ServiceError
from trivec.core.events import BatchRan
from trivec.core.types import BatchBudget, Output, Sequences, Vectors
from trivec.engine.request import Request
from trivec.engine.scheduler import ModelQueue, ScheduledBatch, Scheduler
from trivec.settings import QueueLimits

TOKENS_PER_S = 100_000.0  # a node's device
CALL_S = 0.0005  # of each batch, whatever is in it
BUDGET = BatchBudget(8_192, 256)
HOT_KEYS, HOT = 10, RateLimits(6_000, 3_000_000)
USUAL = RateLimits(60, 60_000)
USUAL_PER_S = 0.1  # requests of each other key
BULK_TEXTS, BULK_TOKENS, BULK_AT_ONCE = 64, 256, 2
SWEEP_S = 0.5  # as `Accounts` looks for leases that are over
LOST_SHARE, LOST_S, BACK_S = 1 / 16, 90.0, 110.0
DOCUMENTS, SHARD_DOCUMENTS = 10**9, 16_384
SHARD_SPREAD = 0.2  # shards take longer or shorter by up to this
LOSSES_A_DAY = 1.0  # of each node: its shard is done again


class Buckets:
    """The store: the real transaction over buckets in memory, committed at once."""

    def __init__(self) -> None:
        self.statements = 0
        self._buckets: dict[str, Bucket] = {}

    def commit(self, entry: Reserve, now_us: int) -> Answer:
        self.statements += 1
        found = {entry.key_id: self._buckets.get(entry.key_id, Bucket())}
        done = Transaction([entry], now_us=now_us, buckets=found)
        self._buckets.update(done.buckets)
        return done.committed.outcomes[0]


@dataclass(eq=False)
class Node:
    """One server: its leases, its queue and its one slot."""

    clock: HandClock
    leases: Leases = field(default_factory=Leases)
    is_alive: bool = True
    bulk: set[Request] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(1, coalesces=False, clock=self.clock)
        self.queue = ModelQueue("m", FakeBackend(dimensions=1), QueueLimits(), BUDGET)
        self.scheduler.add_queue(self.queue)
        self.running: ScheduledBatch | None = None

    def submit(self, sequences: Sequences) -> Request:
        request = self.scheduler.submit(self.queue, sequences, Output.DENSE, wait_s=300.0)
        request.future.add_done_callback(asyncio.Future.exception)
        return request


class Simulation:
    """Events in order of time, each a call."""

    def __init__(self, *, nodes: int, keys: int, hot: int, seconds: float, seed: int) -> None:
        self.dice = random.Random(seed)
        self.clock = HandClock(now_s=0.0, wall_s=1.7e9)
        self.store = Buckets()
        self.nodes = [Node(self.clock) for _ in range(nodes)]
        self.seconds = seconds
        self.keys, self.hot = keys, hot
        self.let_in: Counter[tuple[str, int]] = Counter()  # requests by hot key and second
        self.asked = self.refused = 0  # of keys within their limits
        self.waited: list[float] = []
        self.documents = 0
        self._texts = {n: Sequences.pack([np.zeros(n, np.int32)]) for n in range(32, 992, 32)}
        self._bulk = Sequences.pack([np.zeros(BULK_TOKENS, np.int32)] * BULK_TEXTS)
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._numbers = count()

    def at(self, time_s: float, call: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self._events, (time_s, next(self._numbers), call, arguments))

    async def run(self) -> None:
        for node in self.nodes:
            self.feed(node)
            self.at(self.dice.random() * SWEEP_S, self.sweep, node)
        for key in range(self.keys):
            self.at(self.dice.random(), self.ask, key)
        for node in self.nodes[: int(len(self.nodes) * LOST_SHARE)]:
            self.at(LOST_S, self.lose, node)
        while self._events:
            time_s, number, call, arguments = heapq.heappop(self._events)
            if time_s > self.seconds:
                return
            self.clock.move(max(0.0, time_s - self.clock.now_s()))
            call(*arguments)
            if number % 1_000 == 0:
                await asyncio.sleep(0)  # the futures that were resolved

    def ask(self, key: int) -> None:
        is_hot = key < self.hot
        limits = HOT if is_hot else USUAL
        per_s = 2 * (HOT.requests_per_minute or 0) / 60 if is_hot else USUAL_PER_S
        self.at(self.clock.now_s() + self.dice.expovariate(per_s), self.ask, key)
        node = self.dice.choice([one for one in self.nodes if one.is_alive])
        tokens = self.dice.choice(list(self._texts))
        now_us = round(self.clock.now_s() * 1e6) + 10**15
        granted = self.reserve(node, Reserve(f"key_{key}", limits, Cost(1, tokens)), now_us)
        if granted and is_hot:
            self.let_in[f"key_{key}", int(self.clock.now_s())] += 1
        if not is_hot:
            self.asked += 1
            self.refused += not granted
        if granted:
            try:
                node.submit(self._texts[tokens])
            except ServiceError:
                self.refused += not is_hot
            self.work(node)

    def reserve(self, node: Node, wanted: Reserve, now_us: int) -> bool:
        asked = node.leases.take(wanted, now_us=now_us)
        if not isinstance(asked, Reserve):
            return asked is None
        outcome = self.store.commit(asked, now_us)
        grant = outcome if isinstance(outcome, Grant) else None
        node.leases.put(asked, grant)
        if grant is not None:
            node.leases.see(asked.key_id, grant.bucket, now_us=now_us)
        elif isinstance(outcome, RateLimitExceeded):  # its refusal is recorded, and the bucket seen
            seen = self.store.commit(Reserve(asked.key_id, asked.limits, Cost()), now_us)
            assert isinstance(seen, Grant)
            node.leases.see(asked.key_id, seen.bucket, now_us=now_us)
        return grant is not None

    def sweep(self, node: Node) -> None:
        if node.is_alive:
            now_us = round(self.clock.now_s() * 1e6) + 10**15
            for unused in node.leases.expire(now_us=now_us):
                self.store.commit(unused, now_us)
            self.at(self.clock.now_s() + SWEEP_S, self.sweep, node)

    def feed(self, node: Node) -> None:
        """Keep `BULK_AT_ONCE` requests of the bulk job at a node."""
        with suppress(ServiceError):  # there is no room just now
            while len(node.bulk) < BULK_AT_ONCE:
                node.bulk.add(node.submit(self._bulk))
        self.work(node)

    def work(self, node: Node) -> None:
        if node.is_alive and node.running is None and node.queue.requests:
            batch = node.running = node.scheduler.next_batch(finished=None)
            assert batch is not None
            now_s = self.clock.now_s()
            tokens = 0
            for request, indices in batch.items:
                lengths = request.lengths[request.taken - len(indices) : request.taken]
                tokens += sum(lengths)
                if request.started_s == now_s and request not in node.bulk:
                    self.waited.append(now_s - request.submitted_s)
            duration_s = CALL_S + tokens / TOKENS_PER_S
            self.at(now_s + duration_s, self.finish, node, batch, tokens, duration_s)

    def finish(self, node: Node, batch: ScheduledBatch, tokens: int, duration_s: float) -> None:
        if not node.is_alive or node.running is not batch:
            return
        rows = [
            (item, Vectors.of(np.zeros((len(item.indices), 1), np.float32))) for item in batch.items
        ]
        sequences = sum(len(item.indices) for item, _ in rows)
        ran = BatchRan("m", 0, sequences, tokens, BUDGET.tokens_max, duration_s, failed=False)
        node.scheduler.complete(node.queue, rows, ran, float(tokens))
        node.scheduler._running.remove(batch)  # as `next_batch` does, which would wait for work
        node.running = None
        for request in [one for one in node.bulk if not one.is_open]:
            node.bulk.remove(request)
            self.documents += BULK_TEXTS
        self.feed(node)

    def lose(self, node: Node) -> None:
        """With its leases and all that waits; another takes its place a while later."""
        node.is_alive = False
        fresh = Node(self.clock)
        self.nodes.append(fresh)
        fresh.is_alive = False
        self.at(BACK_S, self.begin, fresh)

    def begin(self, node: Node) -> None:
        node.is_alive = True
        self.feed(node)
        self.sweep(node)


def makespan_s(nodes: int, shard_s: float, *, seed: int) -> float:
    """How long the big job takes: free nodes take the next shard; one that was lost is done again."""
    dice = random.Random(seed)
    free = [0.0] * nodes
    last = 0.0
    lost = LOSSES_A_DAY * shard_s / 86_400
    for _ in range(-(-DOCUMENTS // SHARD_DOCUMENTS)):
        took = shard_s * (1 + SHARD_SPREAD * (2 * dice.random() - 1))
        if dice.random() < lost:
            took += shard_s * dice.random()
        end = heapq.heappushpop(free, free[0] + took) + took
        last = max(last, end)
    return last


def run(given: argparse.Namespace) -> dict[str, object]:
    per_node = {}
    # Alone, a node has as many requests a second as each of many, of keys that ask for less.
    hot_per_s = HOT_KEYS * (HOT.requests_per_minute or 0) / 60
    alone = round((hot_per_s / USUAL_PER_S + given.keys - HOT_KEYS) / given.nodes)
    for nodes, keys, hot in ((1, alone, 0), (given.nodes, given.keys, HOT_KEYS)):
        simulation = Simulation(
            nodes=nodes, keys=keys, hot=hot, seconds=given.seconds, seed=given.seed
        )
        asyncio.run(simulation.run())
        node_s = nodes * given.seconds - int(nodes * LOST_SHARE) * (BACK_S - LOST_S)
        per_node[nodes] = simulation.documents / node_s
        print(f"{nodes} nodes: {per_node[nodes]:.0f} documents/s and node", file=sys.stderr)
    first = 75  # the burst is spent by then: a minute's worth, at twice the limit
    allowed = (HOT.requests_per_minute or 0) / 60 * (int(given.seconds) - first)
    shares = [
        sum(simulation.let_in[f"key_{key}", at] for at in range(first, int(given.seconds)))
        / allowed
        for key in range(HOT_KEYS)
    ]
    waited = sorted(simulation.waited)
    return {
        "hot_share": [round(min(shares), 4), round(max(shares), 4)],
        "store_statements_per_s": round(simulation.store.statements / given.seconds),
        "usual_refused": simulation.refused,
        "usual_asked": simulation.asked,
        "waited_p50_ms": round(waited[len(waited) // 2] * 1e3, 1),
        "waited_p99_ms": round(waited[len(waited) * 99 // 100] * 1e3, 1),
        "waited_max_ms": round(waited[-1] * 1e3, 1),
        "bulk_per_node": {str(nodes): round(rate) for nodes, rate in per_node.items()},
        "let_in_per_s": round(len(waited) / given.seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=64)
    parser.add_argument("--keys", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=150.0)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    figures = run(given)
    shard_s = SHARD_DOCUMENTS * BULK_TOKENS / TOKENS_PER_S
    alone_s = makespan_s(1, shard_s, seed=given.seed)
    linear = {
        n: alone_s / n / makespan_s(n, shard_s, seed=given.seed)
        for n in (8, 64, 512, 1_024, 2_048, 4_096)
    }
    figures["job"] = {str(n): round(share, 4) for n, share in linear.items()}
    print(json.dumps({"benchmark": "simulation", "nodes": given.nodes, **figures}))


if __name__ == "__main__":
    main()
