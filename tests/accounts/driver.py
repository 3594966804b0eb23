"""A small server process without HTTP, to be killed, locked out and filled up.

`python -m tests.accounts.driver FOLDER DATABASE_URL|- load SEED`: serves requests without end, 8 at
a time, and writes `REQUEST_ID TOKENS` for each that a client would have seen a 200 for.
`... ask`: serves one request for each line on standard input and writes its status.
"""

import asyncio
import os
import random
import sys
from pathlib import Path

from pydantic import SecretStr
from tests.accounts.requests import acquire, record

from trivec.accounts import FIXED, Accounts, RequestMeta, RequestUsage
from trivec.accounts.stores import open_accounts
from trivec.core.clock import SystemClock
from trivec.core.errors import StoreUnavailable
from trivec.settings import Settings

AT_ONCE = 8
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


async def load(accounts: Accounts, seed: str) -> None:
    """Answers as fast as it can; a line a 200, each in one write."""
    dice = random.Random(seed)

    async def connection(number: int) -> None:
        for count in range(10**9):
            request_id, tokens = f"{seed}-{number}-{count}", dice.randrange(1, 500)
            if await serve_one(accounts, request_id, tokens) == 200:
                os.write(1, f"{request_id} {tokens}\n".encode())

    await asyncio.gather(*map(connection, range(AT_ONCE)))


async def ask(accounts: Accounts) -> None:
    """One request a line; says its status, and whether the ledger can be written."""
    for count, _ in enumerate(iter(sys.stdin.readline, "")):
        status = await serve_one(accounts, f"ask-{os.getpid()}-{count}", 7)
        os.write(1, f"{status} {'writable' if accounts.writable() else 'not-writable'}\n".encode())


def main(folder: str, database_url: str, command: str, *arguments: str) -> None:
    settings = Settings(
        data_dir=Path(folder),
        database_url=None if database_url == "-" else SecretStr(database_url),
        api_key=SecretStr(FIXED_KEY),
    )
    accounts = open_accounts(settings, clock=SystemClock())
    accounts.start()
    os.write(1, b"started\n")
    asyncio.run(load(accounts, *arguments) if command == "load" else ask(accounts))
    accounts.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
