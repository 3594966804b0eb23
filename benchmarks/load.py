"""What the load generator itself costs, against a server that computes nothing.

Run: python -m benchmarks.load [--seconds S]

The null server is a process of its own that answers every request with one fixed body. If the
generator's CPU a request is small beside what the real server spends on one, it measures the server.
"""

import argparse
import asyncio
import json
import multiprocessing
import re
from multiprocessing.connection import Connection

from trivec.cli.bench.figures import Provenance
from trivec.cli.bench.load import Load, run_load

LENGTH = re.compile(rb"content-length: (\d+)")
BODY = json.dumps({"object": "list", "data": [{"embedding": "A" * 2048}]}).encode()
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(BODY), BODY)


class NullServer(asyncio.Protocol):
    """Answers as soon as a request is whole."""

    def __init__(self) -> None:
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, blank, body = self._received.partition(b"\r\n\r\n")
        length = LENGTH.search(head)
        if blank and length and len(body) >= int(length[1]):
            self._received = b""
            self._transport.write(ANSWER)


def serve_nothing(port_to: Connection) -> None:
    async def serve() -> None:
        server = await asyncio.get_running_loop().create_server(NullServer, "127.0.0.1", 0)
        port_to.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(serve())


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--seconds", type=float, default=3.0)
    seconds = arguments.parse_args().seconds
    here, there = multiprocessing.Pipe()
    process = multiprocessing.Process(target=serve_nothing, args=(there,), daemon=True)
    process.start()
    url = f"http://127.0.0.1:{here.recv()}/v1/embeddings"
    body = json.dumps({"model": "none", "input": ["a short question about nothing"]}).encode()
    shapes = {}
    for client_count in (1, 16, 64):
        answers = run_load(Load(url, [body], client_count, seconds))
        count = len(answers.latencies_s)
        shapes[f"{client_count} clients"] = {
            "answers_a_second": round(answers.rate),
            "p50_us": round(answers.latency_s(0.5) * 1e6),
            "generator_us_an_answer": round(answers.client_cpu_s / count * 1e6, 1),
        }
    process.terminate()
    process.join(10)
    provenance = Provenance.now().as_dict()
    print(json.dumps({"benchmark": "load", "shapes": shapes, "provenance": provenance}))


if __name__ == "__main__":
    main()
