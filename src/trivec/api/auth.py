"""Access and usage: each operation's key and scope, and the ledger row of each keyed request."""

from starlette.types import Receive, Scope, Send

from trivec.accounts import Key, RequestUsage
from trivec.api.context import CONTEXT, RequestContext
from trivec.api.errors import status_of
from trivec.api.openapi import Operation
from trivec.core.errors import Draining, Loading, RateLimitExceeded, ScopeMissing

LOADING_RETRY_S = 5.0
DRAINING_RETRY_S = 1.0  # another replica, or this one started again
MINUTE_S = 60.0


class Endpoint:
    """ASGI app of one operation: checks its key, bounds its time, records its usage, responds.

    Every request of a known key is in the ledger before its response leaves, whatever its status:
    as a row, or counted where it is free. One that fails costs no tokens; one that ends before it
    was reserved, as with a malformed body, costs its key nothing. Raises `Loading`, `Draining`,
    `KeyMissing`, `KeyInvalid`, and `StoreUnavailable` rather than lose a success. Cancelling it
    while it writes does not undo the row.
    """

    def __init__(self, operation: Operation, unpaid: "UnpaidRate") -> None:
        self.operation = operation
        self._unpaid = unpaid

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        operation = self.operation
        context: RequestContext = scope[CONTEXT]
        context.path_params, context.prefix = scope["path_params"], operation.prefix
        needed, app = operation.scope, context.app
        if needed is not None:
            phase = app.health().phase
            if phase == "loading" or not app.embedders:
                raise Loading(
                    "The model is still loading. Please try again shortly.",
                    retry_after_s=LOADING_RETRY_S,
                )
            if phase == "stopped":
                raise Draining(
                    "This server is about to stop. Please try again.",
                    retry_after_s=DRAINING_RETRY_S,
                )
            header = context.headers.get(b"authorization", b"").decode("latin-1")
            scheme, _, credential = header.strip().partition(" ")
            bearer = credential.strip() if scheme.lower() == "bearer" else None
            context.caller = await app.accounts.identify(bearer)
        metered = context.caller if operation.is_metered else None
        try:
            if metered is not None:
                self._unpaid.check(metered, now_s=app.clock.now_s())
            with context.timeout:
                if needed is not None and needed not in context.known_caller.scopes:
                    raise ScopeMissing(scope=needed)
                response = await operation.handler(context)
            status = response.status_code
        except BaseException as error:
            status = status_of(error, operation.error_shape)
            raise
        finally:
            if metered is not None:
                now_s = app.clock.now_s()
                token_count = context.token_count if status < 400 else 0
                # Our own faults are not held against a key, nor is what a rate limit bounds already.
                if token_count == 0 and status < 500 and status != 429:
                    self._unpaid.charge(metered, now_s=now_s)
                usage = RequestUsage(
                    status=status,
                    input_count=context.input_count,
                    token_count=token_count,
                    duration_s=now_s - context.started_s,
                    user=context.user,
                )
                await context.reservation.close(usage)
                context.rate_limits = context.reservation.state
        await response(scope, receive, send)


class UnpaidRate:
    """Rate limit of the requests that cost no tokens: so many a minute for each key and process.

    A leaky bucket that holds a minute's worth. A request's cost is known only when it is over: it is
    charged then, and refused while its key's bucket is full. Keys are few, so none is dropped.
    """

    def __init__(self, requests_per_minute: int) -> None:
        self._limit = requests_per_minute
        self._interval_s = MINUTE_S / requests_per_minute
        self._empty_at_s: dict[str, float] = {}  # by key: when its bucket will have run empty

    def check(self, caller: Key, *, now_s: float) -> None:
        """Raise `RateLimitExceeded` while the bucket of *caller* has no room for one more."""
        filled_s = max(0.0, self._empty_at_s.get(caller.id, now_s) - now_s)
        excess_s = filled_s + self._interval_s - MINUTE_S
        if excess_s > 1e-6:  # less is rounding
            raise RateLimitExceeded(
                kind="requests",
                limit=self._limit,
                requested=1,
                retry_after_s=excess_s,
                subject="requests per minute that cost no tokens",
            )

    def charge(self, caller: Key, *, now_s: float) -> None:
        empty_at_s = max(now_s, self._empty_at_s.get(caller.id, now_s)) + self._interval_s
        self._empty_at_s[caller.id] = min(empty_at_s, now_s + MINUTE_S)
