"""A small server process without HTTP, to be locked out and filled up.

`python -m tests.accounts.driver FOLDER`: serves one request for each line on standard input, and
writes the status that a client would see, and whether the ledger can be written.
"""

import asyncio
import os
import sys
from pathlib import Path

from pydantic import SecretStr
from tests.accounts.requests import acquire, record

from trivec.accounts import FIXED, Accounts, RequestMeta, RequestUsage
from trivec.accounts.stores import open_accounts
from trivec.core.clock import SystemClock
from trivec.core.errors import StoreUnavailable
from trivec.settings import Settings

FIXED_KEY = "a-fixed-key-of-the-tests"


async def serve_one(accounts: Accounts, request_id: str, tokens: int) -> int:
    """The status a client would see."""
    closing = RequestUsage(200, 1, tokens, duration_s=0.001)
    try:
        caller = await accounts.identify(FIXED_KEY)
        booking = await acquire(accounts, caller, RequestMeta(request_id, "m"))
        await booking.reserve_tokens(tokens)
        await booking.close(closing)
    except StoreUnavailable:
        await record(accounts, FIXED, RequestMeta(f"{request_id}-503", "m"), refused())
        return 503
    return 200


def refused() -> RequestUsage:
    return RequestUsage(503, 1, 0, duration_s=0.001)


async def ask(accounts: Accounts) -> None:
    for count, _ in enumerate(iter(sys.stdin.readline, "")):
        status = await serve_one(accounts, f"ask-{os.getpid()}-{count}", 7)
        os.write(1, f"{status} {'writable' if accounts.writable() else 'not-writable'}\n".encode())


def main(folder: str) -> None:
    settings = Settings(data_dir=Path(folder), api_key=SecretStr(FIXED_KEY))
    accounts = open_accounts(settings, clock=SystemClock())
    accounts.start()
    os.write(1, b"started\n")
    asyncio.run(ask(accounts))
    accounts.stop()


if __name__ == "__main__":
    main(sys.argv[1])
