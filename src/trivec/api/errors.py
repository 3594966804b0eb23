"""The one table from our errors to HTTP: status, OpenAI's `type`, and `code`.

Every answer that is not a success is made here, in one shape with all four keys. It knows no
route; what an error means is its own docstring's business.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from types import MappingProxyType

from trivec.api.answers import Answer, json_answer
from trivec.api.presence import ClientGone
from trivec.api.schemas import ErrorAnswer, Problem
from trivec.core import errors as e
from trivec.core.errors import RequestError, ServiceError, is_panic

CLIENT_GONE = 499  # what log and ledger say of a client that left before its answer
RETRY_AFTER_S_MAX = 60  # official clients give up at once when told to wait for more than 120 s


@dataclass(frozen=True, slots=True)
class Row:
    """How one kind of error looks to a client."""

    status: int
    code: str | None = None
    type: str = "invalid_request_error"


TABLE: Mapping[type[ServiceError], Row] = MappingProxyType(
    {
        e.MalformedBody: Row(400),
        e.FieldInvalid: Row(400),
        e.TokenIdUnknown: Row(400),
        e.TokenIdsForeign: Row(400, "token_ids_foreign"),
        e.TextTooLong: Row(400, "context_length_exceeded"),
        e.RequestTooLarge: Row(400, "max_tokens_per_request", "max_tokens_per_request"),
        e.AnswerTooLarge: Row(400, "answer_too_large"),
        e.KeyMissing: Row(401),
        e.KeyInvalid: Row(401, "invalid_api_key"),
        e.ModelDenied: Row(403, "model_access_denied"),
        e.ScopeMissing: Row(403, "insufficient_scope"),
        e.GrantDenied: Row(403, "insufficient_scope"),
        e.ModelUnknown: Row(404, "model_not_found"),
        e.RouteUnknown: Row(404),
        e.ResourceUnknown: Row(404),
        e.MethodNotAllowed: Row(405),
        e.BodyTooSlow: Row(408),
        e.BodyTooLarge: Row(413),
        e.MediaTypeUnsupported: Row(415),
        e.RateLimitExceeded: Row(429, "rate_limit_exceeded", "tokens"),  # or "requests"
        e.EngineFault: Row(500, "internal_error", "server_error"),
        e.Overloaded: Row(503, "overloaded", "server_error"),
        e.Draining: Row(503, "draining", "server_error"),
        e.Loading: Row(503, "loading", "server_error"),
        e.DeadlineExceeded: Row(503, "deadline_exceeded", "server_error"),
        e.StoreUnavailable: Row(503, "store_unavailable", "server_error"),
    }
)


def status_of(error: BaseException) -> int:
    """The status *error* is answered with, or would be if the client were still there."""
    if isinstance(error, ServiceError):
        return TABLE[type(error)].status
    is_cancelled = not isinstance(error, Exception) and not is_panic(error)
    return CLIENT_GONE if is_cancelled or isinstance(error, ClientGone) else 500


def problem_of(error: ServiceError, *, request_id: str) -> Problem:
    """What the client reads; an `EngineFault`'s own message stays in the log."""
    row = TABLE[type(error)]
    message = str(error)
    if isinstance(error, e.EngineFault):
        message = (
            "The server had an error while processing your request. Sorry about that! "
            f"Tell whoever runs it the request id {request_id}."
        )
    return Problem(
        message=message,
        type=error.kind if isinstance(error, e.RateLimitExceeded) else row.type,
        param=_param_of(error),
        code=row.code,
    )


def answer_to(error: ServiceError, *, request_id: str) -> Answer:
    """The whole answer: body, and the headers that tell a client what it may do next."""
    headers: list[tuple[bytes, bytes]] = []
    retry_after_s = getattr(error, "retry_after_s", None)
    if retry_after_s is not None:
        headers += _retry_headers(retry_after_s)
    if isinstance(error, e.MethodNotAllowed):
        headers.append((b"allow", ", ".join(error.allowed).encode()))
    if isinstance(error, (e.KeyMissing, e.KeyInvalid)):
        headers.append((b"www-authenticate", b"Bearer"))
    if isinstance(error, (e.BodyTooLarge, e.BodyTooSlow)):
        headers.append((b"connection", b"close"))  # what is left of the body is not read
    return json_answer(
        ErrorAnswer(problem_of(error, request_id=request_id)),
        status=TABLE[type(error)].status,
        headers=tuple(headers),
    )


def _param_of(error: ServiceError) -> str | None:
    if isinstance(error, RequestError | e.GrantDenied):
        return error.param
    return "model" if isinstance(error, e.ModelDenied) else None


def _retry_headers(retry_after_s: float) -> list[tuple[bytes, bytes]]:
    wait_ms = min(max(ceil(retry_after_s * 1000), 1), RETRY_AFTER_S_MAX * 1000)
    return [
        (b"retry-after", b"%d" % ceil(wait_ms / 1000)),
        (b"retry-after-ms", b"%d" % wait_ms),
    ]
