"""The real clock. Tests move one by hand instead; nothing else asks for the time."""

import time


class SystemClock:
    """`Clock` by the operating system."""

    def now_s(self) -> float:
        return time.monotonic()

    def wall_s(self) -> float:
        return time.time()
