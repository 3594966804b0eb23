"""Requests as the HTTP room would bring them."""

from itertools import count

from trivec.accounts import Closing, Opening

_numbers = count()


def opening(
    request_id: str | None = None, *, idempotency_key: str | None = None, body: bytes = b"body"
) -> Opening:
    """A request for the model `m`."""
    return Opening(request_id or f"req_{next(_numbers)}", "m", idempotency_key, body)


def closing(status: int = 200, tokens: int = 7, *, user: str | None = None) -> Closing:
    return Closing(status, input_count=1, token_count=tokens, duration_s=0.25, user=user)
