"""Admission: whether a request may join a model's queue. Pure; it knows tokens and seconds."""

from dataclasses import dataclass

from trivec.settings import QueueLimits


@dataclass(frozen=True, slots=True)
class LineLoad:
    """What a new request finds."""

    requests_waiting: int
    tokens_waiting: int  # of all requests in the queue, and of those on their way into it
    tokens_before: int  # that fair turns serve before the new request is through
    tokens_per_s: float  # of the whole device, as measured


@dataclass(frozen=True, slots=True)
class Full:
    """Why a request may not join: *reason*, and after how many seconds it might."""

    reason: str
    room_in_s: float


def refusal(token_count: int, load: LineLoad, bound: QueueLimits) -> Full | None:
    """Why a request of *token_count* may not join; None when it may.

    A short queue admits everything however slow the device is: a client that waits a minute is
    better served than one that is sent away and gives up. Beyond that the bounds are seconds of
    work, and tokens, which bound memory; an empty queue admits any legal request.
    """
    few = load.requests_waiting < bound.always_requests
    if few and load.tokens_waiting < bound.always_tokens:
        return None
    wait_s = load.tokens_before / load.tokens_per_s
    if wait_s > bound.wait_s_max:
        return Full(
            f"this request would wait about {wait_s:.0f} s, more than queue.wait_s_max, "
            f"{bound.wait_s_max:g} s",
            max(wait_s - bound.wait_s_max, _token_room_in_s(token_count, load, bound)),
        )
    room_in_s = _token_room_in_s(token_count, load, bound)
    if room_in_s > 0:
        return Full(
            f"with this request's {token_count} they would be more than queue.tokens_max, "
            f"{bound.tokens_max}; there is room in about {room_in_s:.0f} s",
            room_in_s,
        )
    return None


def _token_room_in_s(token_count: int, load: LineLoad, bound: QueueLimits) -> float:
    """Seconds until the queue's tokens leave room for *token_count*; at most 0 when they do."""
    if load.requests_waiting == 0:
        return 0.0
    return (load.tokens_waiting + token_count - bound.tokens_max) / load.tokens_per_s
