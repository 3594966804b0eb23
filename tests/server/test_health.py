"""What a probe says to those who have no key."""

from types import SimpleNamespace
from typing import Any, cast

from trivec.accounts.types import StoreHealth
from trivec.server.life import Happening, Life
from trivec.server.serving import Serving


def test_a_store_that_is_away_is_not_named_to_strangers() -> None:
    books = StoreHealth(writable=False, reason="could not connect to server db.internal:5432")
    process: Any = SimpleNamespace(
        _front=SimpleNamespace(accounts=SimpleNamespace(health=lambda: books)),
        _life=Life().after(Happening.LOADED),
        _settings=SimpleNamespace(models=()),
        _hung=None,
        _canary=SimpleNamespace(troubles=()),
        _models=None,
    )
    look = Serving.health(cast(Serving, process))
    assert not look.ready
    assert "the store cannot be written" in look.reason
    assert "db.internal" not in look.reason
