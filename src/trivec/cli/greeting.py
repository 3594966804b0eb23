"""What `trivec serve` prints: the first key, then what runs where and a line to try it with."""

import json
import os
import shlex
import sys
import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING

from trivec import __version__
from trivec.settings import Settings

if TYPE_CHECKING:
    from trivec.accounts import NewKey
    from trivec.build import Models

FIRST_KEY_FILE = "first-key"  # in the data folder


class Greeting:
    """The lines for the operator of one server: `first_key` where one is made, then `ready`."""

    def __init__(self, settings: Settings, *, port: int, say: Callable[[str], None]) -> None:
        self._settings = settings
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)  # noqa: S104
        bracketed = f"[{host}]" if ":" in host else host
        self._url = f"{'https' if settings.tls_cert else 'http'}://{bracketed}:{port}"
        self._say = say
        self._bearer: str | None = None  # of the curl line: a new key, or what prints it

    def first_key(self, new_key: "NewKey") -> None:
        """Show a new store's key at once: whatever happens next, it is never shown again.

        On a terminal as it is; elsewhere stderr is a log that others read, so it goes to a file.
        """
        if sys.stderr.isatty():
            self._bearer = new_key.plain
            self._say_fact("key", new_key.plain)
            self._say_fact("", "shown only now; more with: trivec keys create --name NAME")
            return
        file = self._settings.data_dir.absolute() / FIRST_KEY_FILE
        try:
            descriptor, draft = tempfile.mkstemp(dir=file.parent)  # that only this user can read
            with open(descriptor, "w", encoding="utf-8") as out:
                out.write(f"{new_key.plain}\n")
                out.flush()
                os.fsync(descriptor)
            os.replace(draft, file)  # a link that lies there is replaced, not followed
        except OSError as fault:
            reason = fault.strerror or fault
            self._say_fact("key", f"made, but {file} cannot be written: {reason}")
            self._say_fact("", f"make it anew with: trivec keys rotate {new_key.key.name}")
            return
        self._bearer = f"$(cat {shlex.quote(str(file))})"
        self._say_fact("key", f"in {file}")
        self._say_fact("", "that only this user can read; keep the key and remove the file")

    def ready(self, models: "Models") -> None:
        settings, choice = self._settings, models.choice
        self._say(f"Trivec {__version__} is ready.")
        for card in models.cards:
            state = "verified" if card.verified else "NOT verified against the catalogue"
            row = f"scores of {card.labels}" if card.labels else f"{card.dimensions} dimensions"
            sizes = f"{row}, {card.token_count_max} tokens a text"
            self._say_fact("model", card.id)
            self._say_fact("", f"{sizes}, files {state}")
            self._say_fact("precision", card.precision)
            if card.id in models.certificates:
                self._say_fact("", models.certificates[card.id].summary)
        workers = f"{models.slot_count} worker{'s' if models.slot_count > 1 else ''}"
        self._say_fact("device", f"{choice.device} with {choice.backend}, {workers}")
        self._say_fact("", choice.reason)
        self._say_fact("listening", self._url)
        if settings.no_auth:
            anywhere = settings.no_auth == "anywhere"
            reach = f"reaches {settings.host}" if anywhere else "is on this machine"
            self._say_fact("keys", f"none: whoever {reach} may use and administer it")

        url = f"{self._url}/v1/embeddings"
        curl = shlex.join(["curl", "-s", url, "-H", "Content-Type: application/json"])
        if not settings.no_auth:  # the key itself only where it was just made
            bearer = self._bearer or ("$TRIVEC_API_KEY" if settings.api_key else "YOUR_KEY")
            curl += f' -H "Authorization: Bearer {bearer}"'
        body = json.dumps({"model": models.cards[0].id, "input": "Hello, world"})
        for line in ("", "Try it:", f"  {curl} -d {shlex.quote(body)}", ""):
            self._say(line)

    def _say_fact(self, name: str, value: str) -> None:
        self._say(f"  {name:<10} {value}")
