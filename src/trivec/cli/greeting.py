"""What `trivec serve` says once it is ready: what runs, where, why, and a line to try it with."""

import json
import shlex
from collections.abc import Callable

from trivec import __version__
from trivec.accounts import NewKey
from trivec.assemble import LoadedModel, Models
from trivec.settings import Settings


def greeting(
    settings: Settings, *, port: int, say: Callable[[str], None]
) -> Callable[[Models, NewKey | None], None]:
    """A function that announces the models, and the first key where one was just made."""
    url = base_url(settings, port)

    def announce(models: Models, new_key: NewKey | None) -> None:
        for line in lines(settings, models, new_key, url=url):
            say(line)

    return announce


def base_url(settings: Settings, port: int) -> str:
    """Where this server is reached from this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)  # noqa: S104
    bracketed = f"[{host}]" if ":" in host else host
    return f"{'https' if settings.tls_cert else 'http'}://{bracketed}:{port}"


def lines(settings: Settings, models: Models, new_key: NewKey | None, *, url: str) -> list[str]:
    """The announcement."""
    told = [f"Trivec {__version__} is ready."]
    for model in models.loaded:
        told += _about(model)
    choice = models.choice
    slots = f"{models.slot_count} worker{'s' if models.slot_count > 1 else ''}"
    told.append(f"  device     {choice.device} with {choice.backend}, {slots} ({choice.reason})")
    told.append(f"  listening  {url}")
    if new_key is not None:
        told.append(f"  key        {new_key.plain}")
        told.append("             shown only now; more with: trivec keys create --name NAME")
    told += ["", "Try it:", "  " + curl_line(settings, models, new_key, url=url), ""]
    return told


def _about(model: LoadedModel) -> list[str]:
    card = model.card
    verified = "files verified" if card.verified else "files NOT verified against the catalogue"
    precision = card.precision
    if model.certificate is not None:
        precision += f" ({model.certificate.summary})"
    return [
        f"  model      {card.id}: {card.dimensions} dimensions, at most {card.token_count_max} "
        f"tokens a text, {verified}",
        f"  precision  {precision}",
    ]


def curl_line(settings: Settings, models: Models, new_key: NewKey | None, *, url: str) -> str:
    """One line to paste; the key itself is in it only where it was just made."""
    body = json.dumps({"model": models.loaded[0].card.id, "input": "Hello, world"})
    words = ["curl", "-s", f"{url}/v1/embeddings", "-H", "Content-Type: application/json"]
    command = shlex.join(words)
    if not settings.no_auth:
        key = new_key.plain if new_key else "$TRIVEC_API_KEY" if settings.api_key else "YOUR_KEY"
        command += f' -H "Authorization: Bearer {key}"'
    return f"{command} -d {shlex.quote(body)}"
