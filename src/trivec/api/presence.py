"""That a client has left: how it is noticed, and what is raised instead of an answer."""

from starlette.types import Receive


class ClientGone(Exception):
    """The client left, or stopped reading, before its answer was out: there is nobody to tell."""


async def departure(receive: Receive) -> None:
    """Return when the client has left. Its body must have been read: what still comes is dropped."""
    while (await receive())["type"] != "http.disconnect":
        pass
