"""`trivec keys`: create, list, show, rotate and revoke API keys."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

import typer
from typer import Option

from trivec.cli.common import (
    AsJson,
    ConfigFile,
    DataDir,
    administration,
    counted,
    instant,
    print_json,
    print_table,
    say,
    settings_of,
    styled,
)
from trivec.core.errors import SettingInvalid, StoreRefused

if TYPE_CHECKING:
    from trivec.accounts import Key

keys_app = typer.Typer(help="Create, list, rotate and revoke API keys.", no_args_is_help=True)

ISO = "%Y-%m-%dT%H:%M:%SZ"  # instants in JSON
NUMBERS = ("RPM", "TPM")
WHOLE = ("ID", "KEY", "SCOPES", "CREATED (UTC)", "STATE", "ENDS (UTC)")
SPARE = ("CREATED (UTC)", "KEY", "ID", "ENDS (UTC)", "TPM", "RPM", "MODELS")  # the first goes first

KeyReference: TypeAlias = Annotated[
    str, typer.Argument(metavar="KEY", help="Its name, its id, or the key itself.")
]
Truncate: TypeAlias = Literal["none", "end", "start"]


@keys_app.command()
def create(
    name: Annotated[str, Option("--name", "-n", help="What the key is called.")],
    scope: Annotated[list[str] | None, Option(help="embed (default) or admin. Repeatable.")] = None,
    model: Annotated[
        list[str] | None, Option(help="Model it may use; all without. Repeatable.")
    ] = None,
    rpm: Annotated[int | None, Option(help="Requests a minute; no limit without it.")] = None,
    tpm: Annotated[int | None, Option(help="Tokens a minute; no limit without it.")] = None,
    expires: Annotated[
        str | None, Option(help="A date, an instant, or a span such as 30d.")
    ] = None,
    truncate: Annotated[
        Truncate | None, Option(help="Of long texts, where requests do not say.")
    ] = None,
    new_store: Annotated[
        bool, Option("--create", help="Make a store where there is none.")
    ] = False,
    data_dir: DataDir = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Make a key and print it; it is never shown again."""
    from trivec.accounts import KeyPlan, RateLimits, Scope
    from trivec.accounts.stores import sqlite_file
    from trivec.checkpoints.catalogue import CATALOGUE

    if unknown := sorted(set(scope or ()) - set(Scope)):
        raise SettingInvalid(f"--scope is {unknown[0]}; it is embed or admin")
    plan = KeyPlan(
        name,
        scopes=frozenset(map(Scope, scope or [Scope.EMBED])),
        models=frozenset(model) if model else None,
        allowance=RateLimits(rpm, tpm),
        expires_us=instant(expires, option="--expires", ahead=True),
        truncate=truncate,
    )
    settings = settings_of(data_dir, config)
    references = [one.partition("=") for one in settings.models]
    served = {name if given else Path(name).name for name, given, _ in references}
    for model_id in model or ():
        if model_id not in CATALOGUE and model_id not in served:
            say(
                f"warning: no model called {model_id} is known here (trivec models list shows those "
                "that are); the key opens it once a server serves it under that name"
            )
    file = sqlite_file(settings)
    if not new_store and file is not None and not file.exists():
        if not sys.stdin.isatty():
            raise StoreRefused(
                f"there is no store in {settings.data_dir}; name the server's own data folder with "
                "--data-dir, or make a store there with --create"
            )
        question = f"There is no store in {settings.data_dir}. Make one?"
        new_store = typer.confirm(question, default=False, err=True, abort=True)
    with administration(settings, creates=new_store) as books:
        new = books.create_key(plan)
    _print_secret(new.key, new.plain, as_json=as_json)
    say(f"This is the only time the key {new.key.name} ({new.key.id}) is shown; keep it safe.")


@keys_app.command("list")
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
        print_json([key_json(key) for key in keys])
        return
    if not keys:
        say("There are no keys yet; make one with: trivec keys create --name NAME")
        return
    now_us = time.time_ns() // 1000
    rows = [
        {
            "NAME": styled(key.name, "bold"),
            "ID": styled(key.id, "dim"),
            "KEY": "\n".join(
                f"{one.first}…{one.last}" for one in key.secrets if one.is_live(now_us)
            ),
            "SCOPES": "\n".join(sorted(key.scopes)),
            "MODELS": "[dim]all[/]"
            if key.models is None
            else styled("\n".join(sorted(key.models))),
            "RPM": counted(key.allowance.requests_per_minute) or "[dim]∞[/]",
            "TPM": counted(key.allowance.tokens_per_minute) or "[dim]∞[/]",
            "CREATED (UTC)": shown(key.created_us),
            "STATE": state(key),
            "ENDS (UTC)": shown(key.revoked_us or key.expires_us),
        }
        for key in keys
    ]
    print_table(rows, numbers=NUMBERS, whole=WHOLE, spare=SPARE)


@keys_app.command()
def show(
    key: KeyReference, data_dir: DataDir = None, config: ConfigFile = None, as_json: AsJson = False
) -> None:
    """Show one key: everything about it but the key itself."""
    from rich.console import Console

    with administration(settings_of(data_dir, config)) as books:
        found = books.show_key(key)
    if as_json:
        print_json(key_json(found))
        return
    ends = shown(found.revoked_us or found.expires_us)
    facts = [
        ("name", styled(found.name, "bold")),
        ("id", found.id),
        ("state", state(found)),
        ("ends", f"{ends} UTC" if ends else "never"),
        ("scopes", " ".join(sorted(found.scopes))),
        ("models", "all" if found.models is None else styled(", ".join(sorted(found.models)))),
        ("requests a minute", counted(found.allowance.requests_per_minute) or "no limit"),
        ("tokens a minute", counted(found.allowance.tokens_per_minute) or "no limit"),
        ("long texts", f"truncate: {found.truncate}" if found.truncate else "as the server does"),
        ("created", f"{shown(found.created_us)} UTC"),
    ]
    for secret in found.secrets:
        until = f", until {shown(secret.expires_us)} UTC" if secret.expires_us else ""
        made = f"since {shown(secret.created_us)} UTC"
        facts.append(("key", f"{secret.first}…{secret.last} {made}{until}"))
    console = Console(highlight=False)
    for name, value in facts:
        console.print(f"[dim]{name:<20}[/]{value}", soft_wrap=True)


@keys_app.command()
def revoke(
    key: KeyReference, data_dir: DataDir = None, config: ConfigFile = None, as_json: AsJson = False
) -> None:
    """Close a key for ever; every running server refuses it within a second."""
    with administration(settings_of(data_dir, config)) as books:
        found = books.revoke_key(key)
    if as_json:
        print_json(key_json(found))
    say(f"The key {found.name} ({found.id}) opens nothing any more.")


@keys_app.command()
def rotate(
    key: KeyReference,
    overlap: Annotated[str, Option(help="How long the old key works, as 24h or 0m.")] = "24h",
    data_dir: DataDir = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Print a new key for the same name, limits and usage; the old one goes on for a while."""
    until_us = instant(overlap, option="--overlap", ahead=True)
    assert until_us is not None
    overlap_s = max(0.0, until_us / 1_000_000 - time.time())
    with administration(settings_of(data_dir, config)) as books:
        new = books.rotate_key(key, overlap_s=overlap_s)
    _print_secret(new.key, new.plain, as_json=as_json)
    say(f"The old key of {new.key.name} works until {shown(new.key.secrets[0].expires_us)} UTC.")


def key_json(key: "Key") -> dict[str, object]:
    """All that is known of a key; instants in UTC, null where there is none."""
    return {
        "id": key.id,
        "name": key.name,
        "scopes": sorted(key.scopes),
        "models": None if key.models is None else sorted(key.models),
        "requests_per_minute": key.allowance.requests_per_minute,
        "tokens_per_minute": key.allowance.tokens_per_minute,
        "created": shown(key.created_us, ISO),
        "expires": shown(key.expires_us, ISO) or None,
        "revoked": shown(key.revoked_us, ISO) or None,
        "truncate": key.truncate,
        "secrets": [
            {
                "first": secret.first,
                "last": secret.last,
                "created": shown(secret.created_us, ISO),
                "expires": shown(secret.expires_us, ISO) or None,
            }
            for secret in key.secrets
        ],
    }


def _print_secret(key: "Key", plain: str, *, as_json: bool) -> None:
    """Print the plain key alone, so that a shell can catch it."""
    if as_json:
        print_json({"id": key.id, "name": key.name, "key": plain})
    else:
        print(plain)


def state(key: "Key") -> str:
    if key.revoked_us is not None:
        return "[red]revoked[/]"
    return "[green]live[/]" if key.is_live(time.time_ns() // 1000) else "[red]expired[/]"


def shown(time_us: int | None, form: str = "%Y-%m-%d %H:%M") -> str:
    """An instant in UTC; nothing where there is none."""
    from trivec.accounts.utc import moment

    return "" if time_us is None else f"{moment(time_us):{form}}"
