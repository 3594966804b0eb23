"""Access and usage: each route's key and scope, and what the ledger gets of each keyed request."""

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from trivec.accounts import Caller, RequestMeta, RequestUsage
from trivec.api.context import CONTEXT, RequestContext
from trivec.api.errors import status_of
from trivec.api.openapi import Operation
from trivec.core.errors import Draining, Loading, RateLimitExceeded

LOADING_RETRY_S = 5.0
DRAINING_RETRY_S = 1.0  # another replica, or this one started again


class Endpoint:
    """ASGI app of one operation: asks for its key, bounds its time, writes its usage, answers."""

    def __init__(self, operation: Operation, unpaid: "UnpaidRate") -> None:
        self._operation = operation
        self._unpaid = unpaid

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        context: RequestContext = scope[CONTEXT]
        request = Request(scope, receive, send)
        if self._operation.scope is not None:
            context.caller = await identify(context)
        if context.caller is not None and self._operation.is_metered:
            response = await self._metered(request, context, context.caller)
        else:
            response = await self._handled(request, context)
        await response(scope, receive, send)

    async def _handled(self, request: Request, context: RequestContext) -> Response:
        with context.timeout:
            if context.caller is not None and self._operation.scope is not None:
                context.caller.require(self._operation.scope)
            return await self._operation.handler(request)

    async def _metered(self, request: Request, context: RequestContext, caller: Caller) -> Response:
        """The handler's response, once the request is in the ledger: as a row, or counted where it is free.

        Every request of a known key is, whatever its status. One that fails costs no tokens;
        one that ends before it was reserved, as with a malformed body, costs its key nothing. Raises
        `StoreUnavailable` rather than lose a success. Cancelling it while it writes does not undo
        the row: the accounts package sees to that.
        """
        try:
            self._unpaid.check(caller, now_s=context.app.clock.now_s())
            response = await self._handled(request, context)
        except BaseException as error:
            await self._write_usage(context, caller, status_of(error))
            raise
        await self._write_usage(context, caller, response.status_code)
        return response

    async def _write_usage(self, context: RequestContext, caller: Caller, status: int) -> None:
        if context.reservation is None:
            meta = RequestMeta(request_id=context.request_id, model=context.model)
            context.reservation = context.app.accounts.reserve(caller, meta)
        now_s = context.app.clock.now_s()
        token_count = context.token_count if status < 400 else 0
        # Our own faults are not held against a key, nor is what a rate limit bounds already.
        if token_count == 0 and status < 500 and status != 429:
            self._unpaid.charge(caller, now_s=now_s)
        await context.reservation.close(
            RequestUsage(
                status=status,
                input_count=context.input_count,
                token_count=token_count,
                duration_s=now_s - context.started_s,
                user=context.user,
            )
        )
        context.rate_limits = context.reservation.state


async def identify(context: RequestContext) -> Caller:
    """The caller. Raises `Loading`, `Draining`, `KeyMissing`, `KeyInvalid`.

    A process that is still loading or that has stopped refuses first: it is the cheapest.
    """
    phase = context.app.health().phase
    if phase == "loading" or not context.app.embedders:
        raise Loading(
            "The model is still loading. Please try again shortly.", retry_after_s=LOADING_RETRY_S
        )
    if phase == "stopped":
        raise Draining(
            "This server is about to stop. Please try again.", retry_after_s=DRAINING_RETRY_S
        )
    header = context.headers.get(b"authorization", b"").decode("latin-1")
    scheme, _, credential = header.strip().partition(" ")
    return await context.app.accounts.identify(
        credential.strip() if scheme.lower() == "bearer" else None
    )


async def reserve(context: RequestContext, *, tokens_follow: bool = False) -> None:
    """Take one request out of the key's rate limits. Raises `RateLimitExceeded`, `StoreUnavailable`.

    *tokens_follow*: `reserve_tokens` is called next, and may be what takes it.
    """
    meta = RequestMeta(request_id=context.request_id, model=context.model)
    context.reservation = context.app.accounts.reserve(context.known_caller, meta)
    await context.reservation.acquire(tokens_follow=tokens_follow)


class UnpaidRate:
    """Rate limit of the requests that cost no tokens: so many a minute for each key, in this process.

    A request is charged when it is over, and refused while the key's minute is used up: before that
    its cost is not known. The burst is one minute's worth. Keys are few, so none is dropped.
    """

    def __init__(self, requests_per_minute: int) -> None:
        self._limit = requests_per_minute
        self._debts: dict[str, tuple[float, float]] = {}  # by key: requests owed, as of when

    def check(self, caller: Caller, *, now_s: float) -> None:
        """Raise `RateLimitExceeded` while *caller* has used up its minute."""
        excess = self._debt(caller, now_s) + 1 - self._limit
        if excess > 0:
            raise RateLimitExceeded(
                kind="requests",
                limit=self._limit,
                requested=1,
                retry_after_s=excess * 60 / self._limit,
                what="requests that cost no tokens",
            )

    def charge(self, caller: Caller, *, now_s: float) -> None:
        self._debts[caller.key_id] = (min(self._debt(caller, now_s) + 1, self._limit), now_s)

    def _debt(self, caller: Caller, now_s: float) -> float:
        debt, at_s = self._debts.get(caller.key_id, (0.0, now_s))
        return max(0.0, debt - (now_s - at_s) * self._limit / 60)
