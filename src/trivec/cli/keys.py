"""`trivec keys`: create, list, show, rotate and revoke API keys."""

import sys
import time
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import typer
from rich.console import Console
from typer import Option

from trivec.accounts import Key, KeyPlan, NewKey, RateLimits, Scope, Secret
from trivec.accounts.utc import moment
from trivec.cli.common import (
    AsJson,
    ConfigFile,
    DataDir,
    Row,
    administration,
    instant,
    print_json,
    print_table,
    say,
    settings_of,
    styled,
)

app = typer.Typer(
    help="Create, list, rotate and revoke API keys.", no_args_is_help=True, add_completion=False
)

ISO = "%Y-%m-%dT%H:%M:%SZ"  # instants in JSON
FOLDED = ("NAME", "MODELS")
SPARE = ("CREATED (UTC)", "KEY", "ID", "ENDS (UTC)", "TPM", "RPM", "MODELS")  # the first goes first

KeyReference: TypeAlias = Annotated[
    str, typer.Argument(metavar="KEY", help="Its name, its id, or the key itself.")
]
Truncate: TypeAlias = Literal["none", "end", "start"]


@app.command()
def create(
    name: Annotated[str, Option("--name", "-n", help="What the key is called.")],
    scope: Annotated[list[Scope] | None, Option(help="embed by default. Repeatable.")] = None,
    model: Annotated[
        list[str] | None, Option(help="Model it may use, else all. Repeatable.")
    ] = None,
    rpm: Annotated[int | None, Option(help="Requests a minute; no limit without it.")] = None,
    tpm: Annotated[int | None, Option(help="Tokens a minute; no limit without it.")] = None,
    expires: Annotated[str | None, Option(help="Date, instant, or span such as 30d.")] = None,
    truncate: Annotated[Truncate | None, Option(help="Which end of long texts is cut.")] = None,
    new_store: Annotated[bool, Option("--create", help="Make a store if there is none.")] = False,
    data_dir: DataDir = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Make a key and print it; it is never shown again."""
    from trivec.accounts.stores import sqlite_file
    from trivec.checkpoints.catalogue import CATALOGUE

    plan = KeyPlan(
        name,
        scopes=frozenset(scope or [Scope.EMBED]),
        models=frozenset(model) if model else None,
        limits=RateLimits(rpm, tpm),
        expires_us=None if expires is None else instant(expires, option="--expires", ahead=True),
        truncate=truncate,
    )
    settings = settings_of(data_dir, config)
    references = [one.partition("=") for one in settings.models]
    served = {name if given else Path(name).name for name, given, _ in references}
    for model_id in model or ():
        if model_id not in CATALOGUE and model_id not in served:
            say(
                f"warning: no model called {model_id} is known here (trivec models list shows "
                "those that are); the key opens it once a server serves it under that name"
            )
    file = sqlite_file(settings)
    if not new_store and file is not None and not file.exists() and sys.stdin.isatty():
        question = f"There is no store in {settings.data_dir}. Make one?"
        new_store = typer.confirm(question, default=False, err=True, abort=True)
    with administration(settings, creates=new_store) as books:
        new = books.create_key(plan)
    _print_secret(new, as_json=as_json)
    say(f"This is the only time the key {new.key.name} ({new.key.id}) is shown; keep it safe.")


@app.command("list")
def list_(
    everything: Annotated[bool, Option("--all", help="Revoked ones too.")] = False,
    data_dir: DataDir = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """List the keys, oldest first."""
    with administration(settings_of(data_dir, config)) as books:
        keys = [key for key in books.list_keys() if everything or key.revoked_us is None]
    if as_json:
        print_json([_as_json(key) for key in keys])
        return
    if not keys:
        say("There are no keys yet; make one with: trivec keys create --name NAME")
        return
    now_us = time.time_ns() // 1000
    rows: list[Row] = [
        {
            "NAME": styled(key.name, "bold"),
            "ID": styled(key.id, "dim"),
            "KEY": "\n".join(_hint(one) for one in key.secrets if one.is_live(now_us)),
            "SCOPES": "\n".join(sorted(key.scopes)),
            "MODELS": _models(key, "\n"),
            "RPM": key.limits.requests_per_minute or "[dim]∞[/]",
            "TPM": key.limits.tokens_per_minute or "[dim]∞[/]",
            "CREATED (UTC)": _shown(key.created_us),
            "STATE": _state(key),
            "ENDS (UTC)": _shown(key.revoked_us or key.expires_us),
        }
        for key in keys
    ]
    print_table(rows, folded=FOLDED, spare=SPARE)


@app.command()
def show(
    key: KeyReference, data_dir: DataDir = None, config: ConfigFile = None, as_json: AsJson = False
) -> None:
    """Show one key: everything about it but the key itself."""
    with administration(settings_of(data_dir, config)) as books:
        found = books.show_key(key)
    if as_json:
        print_json(_as_json(found))
        return
    ends_us = found.revoked_us or found.expires_us
    facts = [
        ("name", styled(found.name, "bold")),
        ("id", found.id),
        ("state", _state(found)),
        ("ends", f"{_shown(ends_us)} UTC" if ends_us else "never"),
        ("scopes", " ".join(sorted(found.scopes))),
        ("models", _models(found, ", ")),
        ("requests a minute", _limit(found.limits.requests_per_minute)),
        ("tokens a minute", _limit(found.limits.tokens_per_minute)),
        ("long texts", f"truncate: {found.truncate}" if found.truncate else "as the server does"),
        ("created", f"{_shown(found.created_us)} UTC"),
    ]
    for secret in found.secrets:
        until = f", until {_shown(secret.expires_us)} UTC" if secret.expires_us else ""
        since = f"since {_shown(secret.created_us)} UTC"
        facts.append(("key", f"{_hint(secret)} {since}{until}"))
    console = Console(highlight=False)
    for name, value in facts:
        console.print(f"[dim]{name:<20}[/]{value}", soft_wrap=True)


@app.command()
def revoke(
    key: KeyReference, data_dir: DataDir = None, config: ConfigFile = None, as_json: AsJson = False
) -> None:
    """Close a key for ever; every running server refuses it within a second."""
    with administration(settings_of(data_dir, config)) as books:
        found = books.revoke_key(key)
    if as_json:
        print_json(_as_json(found))
    say(f"The key {found.name} ({found.id}) opens nothing any more.")


@app.command()
def rotate(
    key: KeyReference,
    overlap: Annotated[str, Option(help="How long the old key works, as 24h or 0m.")] = "24h",
    data_dir: DataDir = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Print a new key for the same name, limits and usage; the old one goes on for a while."""
    until_s = instant(overlap, option="--overlap", ahead=True) / 1_000_000
    with administration(settings_of(data_dir, config)) as books:
        new = books.rotate_key(key, overlap_s=max(0.0, until_s - time.time()))
    _print_secret(new, as_json=as_json)
    say(f"The old key of {new.key.name} works until {_shown(new.key.secrets[0].expires_us)} UTC.")


def _as_json(key: Key) -> dict[str, object]:
    """All that is known of a key; instants in UTC, null where there is none."""
    return {
        "id": key.id,
        "name": key.name,
        "scopes": sorted(key.scopes),
        "models": None if key.models is None else sorted(key.models),
        "requests_per_minute": key.limits.requests_per_minute,
        "tokens_per_minute": key.limits.tokens_per_minute,
        **_times(key),
        "revoked": _shown(key.revoked_us, ISO) or None,
        "truncate": key.truncate,
        "secrets": [{"first": one.first, "last": one.last, **_times(one)} for one in key.secrets],
    }


def _times(one: Key | Secret) -> dict[str, str | None]:
    return {"created": _shown(one.created_us, ISO), "expires": _shown(one.expires_us, ISO) or None}


def _hint(secret: Secret) -> str:
    return f"{secret.first}…{secret.last}"


def _print_secret(new: NewKey, *, as_json: bool) -> None:
    """Print the plain key alone, so that a shell can catch it."""
    if as_json:
        print_json({"id": new.key.id, "name": new.key.name, "key": new.plain})
    else:
        print(new.plain)


def _state(key: Key) -> str:
    if key.revoked_us is not None:
        return "[red]revoked[/]"
    return "[green]live[/]" if key.is_live(time.time_ns() // 1000) else "[red]expired[/]"


def _models(key: Key, separator: str) -> str:
    return "[dim]all[/]" if key.models is None else styled(separator.join(sorted(key.models)))


def _limit(number: int | None) -> str:
    return "no limit" if number is None else f"{number:,}"


def _shown(time_us: int | None, form: str = "%Y-%m-%d %H:%M") -> str:
    """An instant in UTC; nothing where there is none."""
    return "" if time_us is None else f"{moment(time_us):{form}}"
