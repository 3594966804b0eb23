"""Who may join the line. Pure; it knows tokens and seconds, not requests."""

from dataclasses import dataclass

from trivec.settings import LineBound


@dataclass(frozen=True, slots=True)
class LineLoad:
    """What a newcomer finds."""

    tokens_waiting: int  # of all requests in line
    tokens_before: int  # that fair turns serve before the newcomer is through
    tokens_per_s: float  # of the whole device, as measured


def room_in_s(token_count: int, load: LineLoad, bound: LineBound) -> float | None:
    """Seconds until a request of *token_count* may join; None when it may now.

    The line shortens at the measured pace, so both excesses are seconds of it. An empty line
    admits any legal request, or a request larger than the bound could never be served.
    """
    excess_s = load.tokens_before / load.tokens_per_s - bound.wait_s_max
    is_empty = load.tokens_waiting == 0
    excess_tokens = 0 if is_empty else load.tokens_waiting + token_count - bound.tokens_max
    wait_s = max(excess_s, excess_tokens / load.tokens_per_s)
    return wait_s if wait_s > 0 else None
