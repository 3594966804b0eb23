"""Does the time of a refusal tell a near miss from a stranger? Welch's t over interleaved samples.

`python -m benchmarks.key_timing [--samples N]`: bearers that share their first 8 to 48 characters
with a real key, against well-formed strangers. |t| below 4.5 is dudect's line for "no difference".
The slowest tenth is left out on both sides alike, as dudect does: it is the machine's, not ours.
"""

import argparse
import asyncio
import gc
import json
import math
import random
import statistics
import tempfile
import time
from pathlib import Path

from trivec.accounts import KeyPlan, keys
from trivec.accounts.stores import open_accounts
from trivec.core.clock import SystemClock
from trivec.core.errors import KeyInvalid
from trivec.settings import Settings

T_MAX = 4.5
KEPT = 0.9


async def sample(folder: Path, count: int) -> tuple[list[int], list[int]]:
    """Nanoseconds of *count* refusals of strangers, and of near misses, in random order."""
    accounts = open_accounts(Settings(data_dir=folder), clock=SystemClock())
    accounts.start()
    plain = (await accounts.create_key(KeyPlan("t"))).plain
    took: tuple[list[int], list[int]] = ([], [])
    bearers = shuffled(plain, count)
    gc.disable()
    for is_near, bearer in bearers:
        start_ns = time.perf_counter_ns()
        try:
            await accounts.identify(bearer)
        except KeyInvalid:
            took[is_near].append(time.perf_counter_ns() - start_ns)
    gc.enable()
    await asyncio.to_thread(accounts.stop)
    return took


def shuffled(plain: str, count: int) -> list[tuple[bool, str]]:
    """Near misses of *plain* and strangers, built alike beforehand so that no cache tells them."""
    dice = random.Random(5)
    bearers = []
    for is_near in [False, True] * count:
        head, tail = plain if is_near else keys.new_plain_key(), keys.new_plain_key()
        shared = dice.randrange(8, 49)
        bearers.append((is_near, head[:shared] + tail[shared:]))
    dice.shuffle(bearers)
    return bearers


def welch_t(one: list[int], other: list[int]) -> float:
    """Welch's t statistic of two samples of unequal variance."""
    spread = statistics.variance(one) / len(one) + statistics.variance(other) / len(other)
    return (statistics.fmean(one) - statistics.fmean(other)) / math.sqrt(spread)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=100_000)
    count = parser.parse_args().samples
    with tempfile.TemporaryDirectory() as folder:
        strangers, near = asyncio.run(sample(Path(folder), count))
    limit = statistics.quantiles(strangers + near, n=100)[round(KEPT * 100) - 1]
    kept = [[ns for ns in side if ns <= limit] for side in (strangers, near)]
    t = welch_t(*kept)
    figures = {"benchmark": "key_timing", "samples": [len(side) for side in kept]}
    medians = [statistics.median(side) for side in kept]
    print(json.dumps({**figures, "median_ns": medians, "t": round(t, 2), "ok": abs(t) < T_MAX}))


if __name__ == "__main__":
    main()
