"""A hub on loopback: enough of its protocol for the real huggingface_hub client to pull from.

What it speaks: `GET /api/models/ID/revision/REV`, `HEAD` and `GET` of `/ID/resolve/REV/FILE` with
`x-repo-commit`, `etag`, `x-linked-etag` and byte ranges, and where *storage_host* is set a redirect to
`/storage/FILE` there. It counts what was asked of it.
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c0ffee" + "0" * 34


@dataclass
class Asked:
    """One request that reached the hub."""

    method: str
    path: str
    first_byte: int  # where a byte range began; 0 without one
    authorization: str | None = None


@dataclass
class Hub:
    """A model repository served from *folder* as *model_id*."""

    folder: Path
    model_id: str
    endpoint: str = ""
    asked: list[Asked] = field(default_factory=list)
    dies_after_bytes: int | None = None  # a longer body ends there, and nothing is answered after
    is_dead: bool = False
    storage_host: str | None = None  # another name of this machine, to which files are redirected

    def files(self) -> list[str]:
        """What the repository holds."""
        return sorted(
            file.relative_to(self.folder).as_posix()
            for file in self.folder.rglob("*")
            if file.is_file()
        )

    def downloads(self) -> list[Asked]:
        """The requests that asked for a file's bytes."""
        return [one for one in self.asked if one.method == "GET" and "/resolve/" in one.path]


@contextmanager
def serve_hub(folder: Path, *, model_id: str) -> Iterator[Hub]:
    """Serve *folder* on a free loopback port for as long as the context lasts."""
    hub = Hub(folder, model_id)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(hub))
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), name="hub", daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _handler_of(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def log_message(self, format: str, *args: object) -> None: ...

        def _answer(self, *, with_body: bool) -> None:
            first_byte = int(self.headers.get("range", "bytes=0-")[6:].split("-")[0])
            sent = self.headers.get("authorization")
            hub.asked.append(Asked(self.command, self.path, first_byte, sent))
            if hub.is_dead:
                self._send(410, b"", {})
                return
            before, _, name = self.path.partition(f"/{hub.model_id}/resolve/")
            if self.path.startswith(f"/api/models/{hub.model_id}"):
                siblings = [{"rfilename": name} for name in hub.files()]
                listing = {"id": hub.model_id, "sha": COMMIT, "siblings": siblings}
                self._send(200, json.dumps(listing).encode(), {"content-type": "application/json"})
            elif self.path.startswith("/storage/"):
                self._send_file(
                    self.path.removeprefix("/storage/"), first_byte, with_body=with_body
                )
            elif not before and name.partition("/")[2] in hub.files():
                self._send_file(name.partition("/")[2], first_byte, with_body=with_body)
            else:
                code = "EntryNotFound" if not before else "RepoNotFound"
                self._send(404, b"", {"x-error-code": code})

        def _send_file(self, name: str, first_byte: int, *, with_body: bool) -> None:
            content = (hub.folder / name).read_bytes()
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            headers = {"x-repo-commit": COMMIT, "etag": etag, "accept-ranges": "bytes"}
            if hub.storage_host and not self.path.startswith("/storage/"):
                port = hub.endpoint.rpartition(":")[2]
                headers["location"] = f"http://{hub.storage_host}:{port}/storage/{name}"
                linked = {"x-linked-etag": etag, "x-linked-size": str(len(content))}
                self._send(302, b"", headers | linked)
                return
            if first_byte:
                headers["content-range"] = f"bytes {first_byte}-{len(content) - 1}/{len(content)}"
            self._send(
                206 if first_byte else 200, content[first_byte:], headers, with_body=with_body
            )

        def _send(
            self, status: int, body: bytes, headers: dict[str, str], *, with_body: bool = True
        ) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            if not with_body:
                return
            cut = hub.dies_after_bytes
            if cut is not None and len(body) > cut:
                hub.is_dead = True
                self.wfile.write(body[:cut])
                self.close_connection = True
            else:
                self.wfile.write(body)

    return Handler
