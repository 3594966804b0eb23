"""Who may come in: every endpoint names its access, and nothing is open that does not say so."""

from collections.abc import Callable
from enum import Enum

from trivec.accounts import Accounts, Caller, Scope
from trivec.api.visit import Visit
from trivec.core.errors import Draining, Loading
from trivec.core.health import Health

LOADING_RETRY_S = 5.0
DRAINING_RETRY_S = 1.0  # another replica, or this one started again


class Access(Enum):
    """What an endpoint asks of whoever calls it."""

    OPEN = "open"
    EMBED = "embed"  # a key with the scope `embed`; metered
    ADMIN = "admin"  # a key with the scope `admin`; written down
    SCRAPE = "scrape"  # a key with the scope `admin`; not written down, for it comes all day

    @property
    def is_recorded(self) -> bool:
        return self in (Access.EMBED, Access.ADMIN)

    @property
    def scope(self) -> Scope:
        return Scope.EMBED if self is Access.EMBED else Scope.ADMIN


class Gate:
    """Asks `Accounts` who a key is, unless the process cannot serve anyone just now."""

    def __init__(
        self, accounts: Accounts, health: Callable[[], Health], *, serves_models: bool
    ) -> None:
        self._accounts = accounts
        self._health = health
        self._serves_models = serves_models

    async def identify(self, visit: Visit) -> Caller:
        """The caller. Raises `Loading`, `Draining`, `KeyMissing`, `KeyInvalid`.

        A process that is still loading or that has stopped refuses first: it is the cheapest.
        """
        phase = self._health().phase
        if phase == "loading" or not self._serves_models:
            raise Loading(
                "The model is still loading. Please try again shortly.",
                retry_after_s=LOADING_RETRY_S,
            )
        if phase == "stopped":
            raise Draining(
                "This server is about to stop. Please try again.", retry_after_s=DRAINING_RETRY_S
            )
        return await self._accounts.identify(bearer_of(visit.header(b"authorization")))


def bearer_of(authorization: str | None) -> str | None:
    """The key of a Bearer header; None where there is no such header."""
    scheme, _, credential = (authorization or "").strip().partition(" ")
    return credential.strip() if scheme.lower() == "bearer" else None
