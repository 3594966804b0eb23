"""What `trivec serve` says once it is ready: what runs, where, why, and a line to try it with."""

import json
import shlex
from collections.abc import Callable

from trivec import __version__
from trivec.accounts import NewKey
from trivec.assemble import Running, Served
from trivec.settings import Settings


class Greeting:
    """What a server tells its operator: the first key where one is made, then that it is ready."""

    def __init__(self, settings: Settings, *, port: int, say: Callable[[str], None]) -> None:
        self._settings = settings
        self._url = base_url(settings, port)
        self._say = say
        self._new_key: NewKey | None = None

    def key(self, new_key: NewKey) -> None:
        """At once: whatever happens next, it is never shown again."""
        self._new_key = new_key
        self._say(_fact("key", new_key.plain))
        self._say(_fact("", "shown only now; more with: trivec keys create --name NAME"))

    def ready(self, models: Running) -> None:
        for line in lines(self._settings, models, self._new_key, url=self._url):
            self._say(line)


def base_url(settings: Settings, port: int) -> str:
    """Where this server is reached from this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)  # noqa: S104
    bracketed = f"[{host}]" if ":" in host else host
    return f"{'https' if settings.tls_cert else 'http'}://{bracketed}:{port}"


def lines(settings: Settings, models: Running, new_key: NewKey | None, *, url: str) -> list[str]:
    """The announcement."""
    choice = models.choice
    workers = f"{models.slot_count} worker{'s' if models.slot_count > 1 else ''}"
    facts = [fact for model in models.loaded for fact in _about(model)]
    facts += [
        ("device", f"{choice.device} with {choice.backend}, {workers}"),
        ("", choice.reason),
        ("listening", url),
    ]
    return [
        f"Trivec {__version__} is ready.",
        *(_fact(name, value) for name, value in facts),
        "",
        "Try it:",
        "  " + curl_line(settings, models, new_key, url=url),
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


def curl_line(settings: Settings, models: Running, new_key: NewKey | None, *, url: str) -> str:
    """One line to paste; the key itself is in it only where it was just made."""
    body = json.dumps({"model": models.loaded[0].card.id, "input": "Hello, world"})
    words = ["curl", "-s", f"{url}/v1/embeddings", "-H", "Content-Type: application/json"]
    command = shlex.join(words)
    if not settings.no_auth:
        key = new_key.plain if new_key else "$TRIVEC_API_KEY" if settings.api_key else "YOUR_KEY"
        command += f' -H "Authorization: Bearer {key}"'
    return f"{command} -d {shlex.quote(body)}"
