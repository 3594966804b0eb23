"""The headers of every answer, well or badly: who it was, how long it took, what is left."""

from math import ceil

from trivec.accounts import RateLimitState
from trivec.api.visit import Timings, Visit

HeaderList = list[tuple[bytes, bytes]]


def answer_headers(visit: Visit, *, elapsed_s: float, closes: bool) -> HeaderList:
    """What goes onto the answer to *visit*; *closes*: the connection ends with it."""
    headers: HeaderList = [
        (b"x-request-id", visit.request_id.encode()),
        (b"openai-processing-ms", b"%d" % round(elapsed_s * 1000)),
        (b"server-timing", server_timing(visit.timings)),
    ]
    if visit.allowance is not None:
        headers += ratelimit_headers(visit.allowance)
    if closes:
        headers.append((b"connection", b"close"))
    return headers


def server_timing(timings: Timings) -> bytes:
    """The four parts of the walk in milliseconds."""
    return b"tokenize;dur=%.3f, queue;dur=%.3f, compute;dur=%.3f, encode;dur=%.3f" % (
        timings.tokenize_s * 1e3,
        timings.queue_s * 1e3,
        timings.compute_s * 1e3,
        timings.encode_s * 1e3,
    )


def ratelimit_headers(state: RateLimitState) -> HeaderList:
    """OpenAI's six, of which those without a limit are left out."""
    headers: HeaderList = []
    for kind, limit, remaining, reset_s in (
        (b"requests", state.limit_requests, state.remaining_requests, state.reset_requests_s),
        (b"tokens", state.limit_tokens, state.remaining_tokens, state.reset_tokens_s),
    ):
        if limit is not None:
            headers += [
                (b"x-ratelimit-limit-" + kind, b"%d" % limit),
                (b"x-ratelimit-remaining-" + kind, b"%d" % (remaining or 0)),
                (b"x-ratelimit-reset-" + kind, duration(reset_s or 0.0)),
            ]
    return headers


def duration(seconds: float) -> bytes:
    """*seconds* as OpenAI writes them, rounded up: `0ms`, `12ms`, `7s`, `1m3s`, `1h0m5s`."""
    if seconds < 1:
        return b"%dms" % min(ceil(max(seconds, 0.0) * 1000), 999)
    minutes, rest_s = divmod(ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return b"%dh%dm%ds" % (hours, minutes, rest_s)
    return b"%dm%ds" % (minutes, rest_s) if minutes else b"%ds" % rest_s
