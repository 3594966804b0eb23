"""How far one request walks: the functions and files of ours that it enters, on all threads.

Counted as the review of the first edition did, which found 169 functions in 59 files with OpenVINO
and SQLite; by this test, with a fake device and a store in memory, that edition had 178 in 45.
"""

import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import httpx
import pytest
from tests.api.house import READY, Heard
from tests.contract.test_embedder import local_engine
from tests.engine.rig import ALL
from tests.support.memory_store import MemoryStore

from trivec.accounts import Accounts, KeyPlan
from trivec.api import ByteBudget, build_app
from trivec.backends.fake import FakeBackend
from trivec.core.clock import SystemClock
from trivec.settings import HttpLimits

SRC = Path(__file__).resolve().parents[2] / "src"
FUNCTIONS_MAX, FILES_MAX = 67, 23  # the aim is 60 in 25: a number here may only go down


class Walk:
    """What was entered while `is_armed`."""

    def __init__(self) -> None:
        self.entered: set[CodeType] = set()
        self.is_armed = False
        self.apart: set[int | None] = set()  # threads that work whether there is a request or not

    def profile(self, frame: FrameType, event: str, arg: Any) -> None:
        if self.is_armed and event == "call" and threading.get_ident() not in self.apart:
            self.entered.add(frame.f_code)

    def functions(self) -> set[tuple[str, str]]:
        """File and name of each that counts."""
        return {
            (str(Path(code.co_filename).relative_to(SRC)), code.co_qualname)
            for code in self.entered
            if code.co_filename.startswith(str(SRC / "trivec")) and counts(code)
        }


def counts(code: CodeType) -> bool:
    """Not comprehensions, lambdas and properties, nor what a value's class does when it is made."""
    name = code.co_name
    if name.startswith("<") or (name.startswith("__") and name != "__call__"):
        return False
    parts = Path(code.co_filename).relative_to(SRC).with_suffix("").parts
    found: Any = sys.modules[".".join(parts).removesuffix(".__init__")]
    for part in code.co_qualname.split("."):
        if part == "<locals>":
            return True
        found = inspect.getattr_static(found, part)
    return not isinstance(found, (property, cached_property))


@contextmanager
def profiled(profile: Callable[[FrameType, str, Any], None]) -> Iterator[None]:
    """Let this thread, and every one that starts in the block, report what it calls."""
    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


async def test_one_request_walks_few_functions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A loaded machine may take long: nobody looks meanwhile whether the client has left.
    monkeypatch.setattr("trivec.api.context.WATCH_AFTER_S", 60.0)
    walk, clock = Walk(), SystemClock()
    backend = FakeBackend(dimensions=8, outputs=ALL, slot_count=2)
    with profiled(walk.profile):
        accounts = Accounts(MemoryStore(), clock=clock, secret=b"s" * 32)
        others = set(threading.enumerate())
        accounts.start()
        threads = set(threading.enumerate()) - others
        walk.apart = {one.ident for one in threads if one.name == "trivec-store-watch"}
        assert len(walk.apart) == 1
        key = (await accounts.create_key(KeyPlan("walker"))).plain
        async with local_engine(tmp_path, backend) as engine:
            app = build_app(
                embedders={engine.card.id: engine},
                accounts=accounts,
                observer=Heard(),
                clock=clock,
                limits=HttpLimits(),
                health=lambda: READY,
                metrics=None,
                metrics_open=False,
                memory=ByteBudget(),
            )
            async with httpx.AsyncClient(
                transport=httpx.ASGITransport(app),
                base_url="http://test",
                headers={"Authorization": f"Bearer {key}"},
            ) as client:
                body = {"model": engine.card.id, "input": ["w1 w2", "w3"]}
                for is_armed in (False, True):  # the first makes what is made on first use
                    walk.is_armed = is_armed
                    answer = await client.post("/v1/embeddings", json=body)
                    assert answer.status_code == 200, answer.text
                walk.is_armed = False
        accounts.stop()
    functions = walk.functions()
    files = {file for file, _ in functions}
    listing = "\n".join(f"{file}: {name}" for file, name in sorted(functions))
    assert len(functions) <= FUNCTIONS_MAX, (
        f"{len(functions)} functions in {len(files)} files:\n{listing}"
    )
    assert len(files) <= FILES_MAX, "\n".join(sorted(files))
