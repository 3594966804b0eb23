"""The real clock. Tests move one by hand instead; nothing else asks for the time."""

import time


class SystemClock:
    """`Clock` by the operating system."""

    now_s = staticmethod(time.monotonic)
    wall_s = staticmethod(time.time)
