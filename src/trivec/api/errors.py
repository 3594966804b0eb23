"""The one table from our errors to HTTP: status, OpenAI's `type`, and `code`.

Every response that is not a success is made here: OpenAI's shape with all four keys, or that of the
API whose route it is.
"""

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import ceil
from typing import NamedTuple

from starlette.responses import Response

from trivec.api.context import ClientDisconnected
from trivec.api.responses import json_response
from trivec.api.schemas import ErrorObject, ErrorResponse
from trivec.core import errors as e
from trivec.core.errors import ServiceError, is_panic

CLIENT_GONE = 499  # in log and ledger: the client left before its response
RETRY_AFTER_S_MAX = 60  # official clients give up at once when told to wait for more than 120 s


class HttpError(NamedTuple):
    """How one kind of error looks to a client."""

    status: int
    code: str | None = None
    type: str = "invalid_request_error"


TABLE: Mapping[type[ServiceError], HttpError] = {
    e.MalformedBody: HttpError(400),
    e.FieldInvalid: HttpError(400),
    e.TokenIdUnknown: HttpError(400),
    e.TokenIdsForeign: HttpError(400, "token_ids_foreign"),
    e.TextTooLong: HttpError(400, "context_length_exceeded"),
    e.RequestTooLarge: HttpError(400, "max_tokens_per_request", "max_tokens_per_request"),
    e.AnswerTooLarge: HttpError(400, "answer_too_large"),
    e.KeyMissing: HttpError(401),
    e.KeyInvalid: HttpError(401, "invalid_api_key"),
    e.ModelDenied: HttpError(403, "model_access_denied"),
    e.ScopeMissing: HttpError(403, "insufficient_scope"),
    e.GrantDenied: HttpError(403, "insufficient_scope"),
    e.ModelUnknown: HttpError(404, "model_not_found"),
    e.RouteUnknown: HttpError(404),
    e.ResourceUnknown: HttpError(404),
    e.MethodNotAllowed: HttpError(405),
    e.BodyTooSlow: HttpError(408),
    e.BodyTooLarge: HttpError(413),
    e.MediaTypeUnsupported: HttpError(415),
    e.RateLimitExceeded: HttpError(429, "rate_limit_exceeded", "tokens"),  # or "requests"
    e.EngineFault: HttpError(500, "internal_error", "server_error"),
    e.Overloaded: HttpError(503, "overloaded", "server_error"),
    e.Draining: HttpError(503, "draining", "server_error"),
    e.Loading: HttpError(503, "loading", "server_error"),
    e.DeadlineExceeded: HttpError(503, "deadline_exceeded", "server_error"),
    e.StoreUnavailable: HttpError(503, "store_unavailable", "server_error"),
}


@dataclass(frozen=True, slots=True)
class ErrorShape:
    """How the clients of one API read a failure."""

    response_type: type
    response: Callable[[ErrorObject, str], object]  # of the error and the request's id
    statuses: Mapping[int, int] = field(default_factory=dict)  # its own in place of ours

    def status(self, kind: type[ServiceError]) -> int:
        status = TABLE[kind].status
        return self.statuses.get(status, status)


OPENAI = ErrorShape(ErrorResponse, lambda error, request_id: ErrorResponse(error))


def status_of(error: BaseException, shape: ErrorShape) -> int:
    """The status *error* is answered with, or would be if the client were still there."""
    if isinstance(error, ServiceError):
        return shape.status(type(error))
    is_cancelled = not isinstance(error, Exception) and not is_panic(error)
    return CLIENT_GONE if is_cancelled or isinstance(error, ClientDisconnected) else 500


def fault_of(raised: BaseException) -> e.EngineFault:
    """Where *raised* comes from, and not what it says: that may hold a client's text."""
    frames = "".join(traceback.format_tb(raised.__traceback__))
    return e.EngineFault(f"{type(raised).__name__}\n{frames}")


def error_response(error: ServiceError, *, request_id: str, shape: ErrorShape = OPENAI) -> Response:
    """The whole response: body, and the headers that tell a client what it may do next."""
    row, message = TABLE[type(error)], str(error)
    if isinstance(error, e.EngineFault):  # its own message is for the log
        message = (
            "The server had an error while processing your request. Sorry about that! "
            f"Tell whoever runs it the request id {request_id}."
        )
    shown = ErrorObject(
        message=message,
        type=error.kind if isinstance(error, e.RateLimitExceeded) else row.type,
        param="model" if isinstance(error, e.ModelDenied) else getattr(error, "param", None),
        code=row.code,
    )
    headers: dict[str, str] = {}
    if isinstance(error, (e.BusyError, e.RateLimitExceeded)):
        wait_ms = min(max(ceil(error.retry_after_s * 1000), 1), RETRY_AFTER_S_MAX * 1000)
        headers = {"retry-after": str(ceil(wait_ms / 1000)), "retry-after-ms": str(wait_ms)}
    elif isinstance(error, e.MethodNotAllowed):
        headers["allow"] = ", ".join(error.allowed)
    elif isinstance(error, (e.KeyMissing, e.KeyInvalid)):
        headers["www-authenticate"] = "Bearer"
    elif isinstance(error, (e.BodyTooLarge, e.BodyTooSlow)):
        headers["connection"] = "close"  # what is left of the body is not read
    body = shape.response(shown, request_id)
    return json_response(body, status=shape.status(type(error)), headers=headers)
