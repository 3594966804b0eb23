"""Playground: the pages at `/`, `/usage` and `/docs`, static files that use nothing but the public API.

`static/` holds all of them; `scripts/vendor` adds Swagger UI as `static/vendor/`, which the wheel
carries and a checkout may lack: docs/pages.md.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from starlette.responses import Response

from trivec.api.context import RequestContext
from trivec.api.openapi import Operation
from trivec.api.schemas import shown
from trivec.core.errors import RouteUnknown

STATIC = Path(__file__).with_name("static")
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
HEADERS = {
    # Nothing from elsewhere, nothing inline; pictures as data: are Swagger UI's.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "vary": "accept",  # Ollama's clients get another answer at /
    "cache-control": "no-cache",  # kept, and asked for again: its ETag changes with the version
}
WITH_KEYS, WITHOUT_KEYS = b'data-keys="yes"', b'data-keys="no"'


@dataclass(frozen=True, slots=True)
class StaticFile:
    """A file as it is sent."""

    content: bytes
    media_type: str
    etag: str

    def response(self, context: RequestContext) -> Response:
        """The file, or 304 where the client has it."""
        headers = HEADERS | {"etag": self.etag}
        known = context.headers.get(b"if-none-match", b"").decode("latin-1")
        if self.etag in (one.strip().removeprefix("W/") for one in known.split(",")):
            return Response(status_code=304, headers=headers)
        return Response(self.content, headers=headers, media_type=self.media_type)


@cache
def static_files(*, has_keys: bool) -> Mapping[str, StaticFile]:
    """All files by name, read once. *has_keys*: whether a visitor must paste a key."""
    files = {}
    for path in sorted(STATIC.rglob("*.*")):
        if media_type := MEDIA_TYPES.get(path.suffix):
            content = path.read_bytes()
            if path.suffix == ".html" and not has_keys:
                content = content.replace(WITH_KEYS, WITHOUT_KEYS)
            etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
            files[path.name] = StaticFile(content, media_type, etag)
    return files


def page_operations(*, has_keys: bool) -> tuple[Operation, ...]:
    """The routes of the pages, open to anyone. A name that is no file of ours is a 404."""
    files = static_files(has_keys=has_keys)
    docs = "swagger.html" if "swagger-ui-bundle.js" in files else "docs.html"

    async def send(name: str, context: RequestContext) -> Response:
        if name not in files:
            raise RouteUnknown(f"The pages have no file {shown(name)}; they begin at /.")
        return files[name].response(context)

    async def send_named(context: RequestContext) -> Response:
        return await send(context.path_params["name"], context)

    pages = {"/": "index.html", "/usage": "usage.html", "/docs": docs}
    return (
        *(Operation("GET", path, partial(send, name), None, None) for path, name in pages.items()),
        Operation("GET", "/page/{name}", send_named, None, None),
    )
