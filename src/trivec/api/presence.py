"""Watching whether the client is still there, so that nothing is computed for nobody."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.types import Receive


class ClientGone(Exception):
    """The client left, or stopped reading, before its answer was out: there is nobody to tell."""


@asynccontextmanager
async def present(receive: Receive) -> AsyncIterator[None]:
    """Cancel the body of the `async with` when the client leaves, and raise `ClientGone`.

    Enter it once the request's body is read. The cancellation is this block's own and ends here,
    as with `asyncio.timeout`.
    """
    task = asyncio.current_task()
    assert task is not None
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        task.cancel()

    watcher = asyncio.create_task(watch(), name="client-watch")
    try:
        yield
    except asyncio.CancelledError:
        if gone and task.uncancel() == 0:
            raise ClientGone from None
        raise
    finally:
        watcher.cancel()
