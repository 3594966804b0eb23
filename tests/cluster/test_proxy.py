"""What Ray Serve's proxy answers where no ingress does; without a cluster."""

from collections.abc import Awaitable, Callable

import httpx
import pytest
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from trivec.cluster.proxy import middlewares


async def unanswered(scope: Scope, receive: Receive, send: Send) -> None:
    """Ray's proxy, whose ingress died."""


async def none_there(scope: Scope, receive: Receive, send: Send) -> None:
    """Ray's proxy, which has no ingress."""
    await Response("No replica is available.", 503)(scope, receive, send)


async def busy(scope: Scope, receive: Receive, send: Send) -> None:
    """Our own refusal."""
    await Response("{}", 503, {"retry-after": "7"})(scope, receive, send)


async def named_twice(scope: Scope, receive: Receive, send: Send) -> None:
    answer = Response("{}")
    answer.raw_headers += [(b"x-request-id", b"req_ours"), (b"x-request-id", b"ray's")]
    await answer(scope, receive, send)


async def got(app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> httpx.Response:
    wrapped: ASGIApp = app
    for one in middlewares():
        wrapped = one.cls(wrapped, *one.args, **one.kwargs)
    transport = httpx.ASGITransport(wrapped)
    async with httpx.AsyncClient(transport=transport, base_url="http://proxy") as client:
        return await client.get("/v1/models")


@pytest.mark.parametrize(
    ("app", "retry_after"),
    [
        pytest.param(unanswered, "10", id="an-ingress-that-died"),
        pytest.param(none_there, "10", id="no-ingress"),
        pytest.param(busy, "7", id="our-own-time-is-kept"),
    ],
)
async def test_what_no_ingress_answers_is_refused_with_a_time_to_return(
    app: ASGIApp, retry_after: str
) -> None:
    answer = await got(app)
    assert answer.status_code == 503
    assert answer.headers.get_list("retry-after") == [retry_after]


async def test_an_answer_passes_under_the_ledgers_name_alone() -> None:
    answer = await got(named_twice)
    assert (answer.status_code, answer.text) == (200, "{}")
    assert answer.headers.get_list("x-request-id") == ["req_ours"]
