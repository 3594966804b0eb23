"""Far more than a server can do, from openai-python clients with their default retries.

Run: python -m tests.soak.overload [--seconds 20] [--backend fake|openvino]
     [--tokens-per-s 20000]

Requests arrive at 1, 2, 5 and 20 times the capacity that is measured first, *seconds* each, whatever
becomes of those before. Goodput is what is answered 200 while they arrive. Refusals are timed by one
lean client in a process of its own: the official ones queue in their own event loop. With the fake
backend the device uses no core; with the real one clients, server and engine share them all.
"""

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from multiprocessing import get_context
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from pathlib import Path
from urllib.parse import urlsplit

import httpx2 as httpx  # what the official client is built on
import openai
from benchmarks.figures import percentile
from benchmarks.texts import sentences
from tests.soak.drain import start
from tests.soak.report import Report, command
from tests.soak.service import MODEL
from tests.soak.stands import ACCESS, KEY, body_of, stand

TIMES = (1, 2, 5, 20)
TEXTS = 64
WORDS = 80.0  # about 100 tokens a text
IN_FLIGHT = 6  # of the closed loop that measures capacity
CAPACITY_S = 8.0
BACK_S_MAX = 10.0
BACK_RATIO_MAX = 1.5
CONNECTIONS = 900
PROBES = 5
PROBE_EVERY_S = 0.1
LINE_S_MAX = 2.0  # of work in line: short, so that a form of seconds reaches the end of it
ENVIRON = {
    "TRIVEC_QUEUE__WAIT_S_MAX": str(LINE_S_MAX),
    "TRIVEC_QUEUE__ALWAYS_REQUESTS": "1",  # nor is a short queue let grow past it
    "TRIVEC_QUEUE__ALWAYS_TOKENS": "1",
}


@dataclass(slots=True)
class Attempts(httpx.AsyncBaseTransport):
    """What every attempt below a client's retries came to."""

    inner: httpx.AsyncBaseTransport
    refused: int = 0
    unexplained: int = 0  # 503 without Retry-After
    others: dict[int, int] = field(default_factory=dict)  # by status

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await self.inner.handle_async_request(request)
        if response.status_code == 503:
            self.refused += 1
            self.unexplained += "retry-after" not in response.headers
        else:
            self.others[response.status_code] = self.others.get(response.status_code, 0) + 1
        return response

    async def aclose(self) -> None:
        await self.inner.aclose()


@dataclass(slots=True)
class Crowd:
    """Clients of one server and their texts."""

    client: openai.AsyncOpenAI
    attempts: Attempts
    texts: list[str]
    good: list[tuple[float, int]] = field(default_factory=list)  # when answered, tokens
    given_up: int = 0
    broken: int = 0
    sent: int = 0

    async def ask(self, count: int = TEXTS) -> None:
        self.sent += 1
        begin = self.sent * 7 % (len(self.texts) - count)
        try:
            answer = await self.client.embeddings.create(
                model=MODEL, input=self.texts[begin : begin + count]
            )
        except openai.APIStatusError:
            self.given_up += 1
        except openai.APIConnectionError:
            self.broken += 1
        else:
            self.good.append((time.perf_counter(), answer.usage.total_tokens))

    def goodput(self, began_s: float, until_s: float) -> float:
        """Tokens a second that were answered between the two."""
        tokens = sum(count for at_s, count in self.good if began_s <= at_s < until_s)
        return tokens / (until_s - began_s)


async def closed_loop(crowd: Crowd, duration_s: float) -> tuple[float, float]:
    """Requests and tokens a second, with as many in flight as keep the device busy."""
    began_s = time.perf_counter()
    count_before = len(crowd.good)

    async def one() -> None:
        while time.perf_counter() - began_s < duration_s:
            await crowd.ask()

    await asyncio.gather(*[one() for _ in range(IN_FLIGHT)])
    ended_s = time.perf_counter()
    rate = (len(crowd.good) - count_before) / (ended_s - began_s)
    return rate, crowd.goodput(began_s, ended_s)


async def flood(crowd: Crowd, rate: float, duration_s: float) -> float:
    """Requests arrive at *rate* a second; tokens a second answered, as late as the line is long."""
    began_s = time.perf_counter()
    asking = []
    for count in range(round(rate * duration_s)):
        await asyncio.sleep(max(0.0, began_s + count / rate - time.perf_counter()))
        asking.append(asyncio.create_task(crowd.ask()))
    ended_s = time.perf_counter() + LINE_S_MAX
    await asyncio.sleep(LINE_S_MAX)
    goodput = crowd.goodput(began_s + LINE_S_MAX, ended_s)
    for one in asking:
        one.cancel()
    await asyncio.wait(asking)
    return goodput


def probe(url: str, body: bytes, over: Event, result: "Queue[list[float]]") -> None:
    """Ask for what does not fit, again and again, and put how long each refusal took, in seconds."""
    address = urlsplit(url)
    refusals_s = []

    def knock() -> None:
        connection = HTTPConnection(address.hostname or "", address.port, timeout=60)
        while not over.is_set():
            began_s = time.perf_counter()
            connection.request("POST", "/v1/embeddings", body, ACCESS)
            answer = connection.getresponse()
            if b'"overloaded"' in answer.read():
                refusals_s.append(time.perf_counter() - began_s)
            over.wait(PROBE_EVERY_S)

    threads = start([knock] * PROBES)  # several, since one that is admitted waits its turn
    for thread in threads:
        thread.join()
    result.put(refusals_s)


@contextmanager
def probing(url: str, texts: list[str]) -> Iterator[list[float]]:
    """A probe beside the block; the list is filled at its end."""
    processes = get_context("spawn")
    over, result = processes.Event(), processes.Queue()
    process = processes.Process(target=probe, args=(url, body_of(*texts), over, result))
    process.start()
    refusals_s: list[float] = []
    try:
        yield refusals_s
    finally:
        over.set()
        refusals_s += result.get(timeout=90)
        process.join()


async def lone_s(crowd: Crowd) -> float:
    """How long one short question takes."""
    began_s = time.perf_counter()
    await crowd.ask(1)
    return time.perf_counter() - began_s


async def seconds_until_back(crowd: Crowd, usual_s: float) -> float:
    began_s = time.perf_counter()
    while time.perf_counter() - began_s < 3 * BACK_S_MAX:
        latest = [await lone_s(crowd) for _ in range(5)]
        if percentile(latest, 0.5) <= BACK_RATIO_MAX * usual_s:
            break
    return time.perf_counter() - began_s


def run(seconds: float = 20.0, backend: str = "fake", tokens_per_s: float = 20_000.0) -> Report:
    options = ("--backend", backend, "--tokens-per-s", str(tokens_per_s))
    with (
        tempfile.TemporaryDirectory() as folder,
        stand(Path(folder), *options, environ=ENVIRON) as server,
    ):
        return asyncio.run(_run(server.url, seconds, is_fake=backend == "fake"))


@asynccontextmanager
async def crowd_of(url: str) -> AsyncIterator[Crowd]:
    limits = httpx.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS)
    attempts = Attempts(httpx.AsyncHTTPTransport(limits=limits))
    http = httpx.AsyncClient(transport=attempts, timeout=60)
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, http_client=http) as client:
        yield Crowd(client, attempts, sentences(400, words_median=WORDS))


async def _run(url: str, seconds: float, *, is_fake: bool) -> Report:
    report = Report()
    goodputs: dict[str, float] = {}
    async with crowd_of(url) as crowd:
        await closed_loop(crowd, CAPACITY_S / 4)
        usual_s = percentile([await lone_s(crowd) for _ in range(9)], 0.5)
        rate, capacity = await closed_loop(crowd, min(CAPACITY_S, seconds))
        for times in TIMES:
            with probing(url, crowd.texts[:TEXTS]) as refusals_s:
                goodputs[f"{times}x"] = await flood(crowd, times * rate, seconds)
            back_s = await seconds_until_back(crowd, usual_s)
        attempts = crowd.attempts
        peak = max(*goodputs.values(), capacity)
        report.at_least("goodput at 20x, of the peak", goodputs["20x"] / peak, 0.9)
        report.at_most("refusals without Retry-After", attempts.unexplained, 0)
        report.at_least("refusals that were timed", len(refusals_s), 10)
        report.at_most("answers but 200 and 503", len(set(attempts.others) - {200}), 0)
        report.at_most("connections that broke", crowd.broken, 0)
        report.at_most("seconds until back to the usual latency", back_s, BACK_S_MAX)
        if is_fake and refusals_s:
            p99_ms = percentile(refusals_s, 0.99) * 1e3
            report.at_most("p99 of a refusal, in ms", p99_ms, 50)
        report.figures.update(
            capacity_requests_per_s=round(rate, 2),
            capacity_tokens_per_s=round(capacity),
            goodput_tokens_per_s={times: round(one) for times, one in goodputs.items()},
            refusal_ms={
                share: round(percentile(refusals_s, share) * 1e3, 1)
                for share in (0.5, 0.99)
                if refusals_s
            },
            refused=attempts.refused,
            usual_ms=round(usual_s * 1e3, 1),
            requests=crowd.sent,
            given_up=crowd.given_up,
        )
    return report


if __name__ == "__main__":
    command("overload", __doc__, run, seconds=20.0, backend="fake", tokens_per_s=20_000.0)
