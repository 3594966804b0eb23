"""The app: routes behind a few small middleware, outermost first. It starts and owns nothing."""

from collections.abc import Callable, Mapping

from starlette.types import ASGIApp

from trivec.accounts import Accounts
from trivec.core.health import Health
from trivec.core.ports import Clock, Embedder, Observer
from trivec.settings import HttpLimits


def build_app(
    *,
    embedders: Mapping[str, Embedder],
    accounts: Accounts,
    observer: Observer,
    clock: Clock,
    limits: HttpLimits,
    health: Callable[[], Health],
    metrics: Callable[[], bytes] | None,
    metrics_open: bool,
) -> ASGIApp:
    """The whole HTTP surface as one plain ASGI app, for granian, uvicorn or Ray Serve.

    *embedders* maps every served id and alias; empty while loading. *metrics* None: not served.
    """
    raise NotImplementedError
