"""What `trivec serve` says once it is ready: what runs, where, why, and a line to try it with."""

import json
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from trivec import __version__
from trivec.accounts import NewKey
from trivec.build import Running, Served
from trivec.settings import Settings

FIRST_KEY_FILE = "first-key"  # in the data folder


class Greeting:
    """What a server tells its operator: the first key where one is made, then that it is ready."""

    def __init__(self, settings: Settings, *, port: int, say: Callable[[str], None]) -> None:
        self._settings = settings
        self._url = base_url(settings, port)
        self._say = say
        self._bearer: str | None = None  # of the curl line: a new key, or what prints it

    def key(self, new_key: NewKey) -> None:
        """At once: whatever happens next, it is never shown again.

        On a terminal as it is; elsewhere stderr is a log that others read, so it goes to a file.
        """
        if sys.stderr.isatty():
            self._bearer = new_key.plain
            self._say(_fact("key", new_key.plain))
            self._say(_fact("", "shown only now; more with: trivec keys create --name NAME"))
            return
        file = self._settings.data_dir.absolute() / FIRST_KEY_FILE
        try:
            write_private(file, new_key.plain + "\n")
        except OSError as fault:
            self._say(
                _fact("key", f"made, but {file} cannot be written: {fault.strerror or fault}")
            )
            self._say(_fact("", f"make it anew with: trivec keys rotate {new_key.key.name}"))
            return
        self._bearer = f"$(cat {shlex.quote(str(file))})"
        self._say(_fact("key", f"in {file}"))
        self._say(_fact("", "that only this user can read; keep the key and remove the file"))

    def ready(self, models: Running) -> None:
        for line in lines(self._settings, models, self._bearer, url=self._url):
            self._say(line)


def write_private(file: Path, text: str) -> None:
    """Put *text* where only this user can read it, from the first byte on; a link is replaced."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fresh = file.with_name(f"{file.name}.{os.getpid()}")
    fresh.unlink(missing_ok=True)
    with open(
        os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8"
    ) as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    fresh.replace(file)


def base_url(settings: Settings, port: int) -> str:
    """Where this server is reached from this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)  # noqa: S104
    bracketed = f"[{host}]" if ":" in host else host
    return f"{'https' if settings.tls_cert else 'http'}://{bracketed}:{port}"


def lines(settings: Settings, models: Running, bearer: str | None, *, url: str) -> list[str]:
    """The announcement."""
    choice = models.choice
    workers = f"{models.slot_count} worker{'s' if models.slot_count > 1 else ''}"
    facts = [fact for model in models.loaded for fact in _about(model)]
    facts += [
        ("device", f"{choice.device} with {choice.backend}, {workers}"),
        ("", choice.reason),
        ("listening", url),
    ]
    if settings.no_auth:
        reach = (
            f"reaches {settings.host}" if settings.no_auth == "anywhere" else "is on this machine"
        )
        facts.append(("keys", f"none: whoever {reach} may use and administer it"))
    return [
        f"Trivec {__version__} is ready.",
        *(_fact(name, value) for name, value in facts),
        "",
        "Try it:",
        "  " + curl_line(settings, models, bearer, url=url),
        "",
    ]


def _fact(name: str, value: str) -> str:
    return f"  {name:<10} {value}"


def _about(model: Served) -> list[tuple[str, str]]:
    card = model.card
    verified = "files verified" if card.verified else "files NOT verified against the catalogue"
    facts = [
        ("model", card.id),
        ("", f"{card.dimensions} dimensions, {card.token_count_max} tokens a text, {verified}"),
        ("precision", card.precision),
    ]
    if model.certificate is not None:
        facts.append(("", model.certificate.summary))
    return facts


def curl_line(settings: Settings, models: Running, bearer: str | None, *, url: str) -> str:
    """One line to paste; the key itself is in it only where it was just made."""
    body = json.dumps({"model": models.loaded[0].card.id, "input": "Hello, world"})
    words = ["curl", "-s", f"{url}/v1/embeddings", "-H", "Content-Type: application/json"]
    command = shlex.join(words)
    if not settings.no_auth:
        key = bearer or ("$TRIVEC_API_KEY" if settings.api_key else "YOUR_KEY")
        command += f' -H "Authorization: Bearer {key}"'
    return f"{command} -d {shlex.quote(body)}"
