"""`trivec keys`: make, list, show, revoke and rotate the keys that open this server."""

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from trivec.cli.store import (
    AsJson,
    ConfigFile,
    DataDir,
    Json,
    administration,
    columns_to_fill,
    counted,
    instant,
    iso,
    print_json,
    print_table,
    say,
    settings_of,
    shown,
    styled,
    table,
)
from trivec.core.errors import SettingInvalid, StoreRefused

if TYPE_CHECKING:
    from trivec.accounts import Key, NewKey, Scope, Secret

keys_app = typer.Typer(help="Make, list, show, revoke and rotate API keys.", no_args_is_help=True)

WIDE = ("NAME", "ID", "KEY", "SCOPES", "MODELS", "RPM", "TPM", "CREATED (UTC)", "STATE")
NARROW = ("NAME", "SCOPES", "MODELS", "RPM", "TPM", "STATE")  # 80 columns hold them
WIDE_COLUMNS_MIN = 130
SPARE = ("CREATED (UTC)", "ID", "TPM", "RPM", "MODELS")  # left out where even less fits

Reference: TypeAlias = Annotated[
    str, typer.Argument(metavar="KEY", help="Its name, its id, or the key itself.")
]


@keys_app.command()
def create(
    name: Annotated[str, typer.Option("--name", "-n", help="What the key is called.")],
    scopes: Annotated[
        list[str] | None, typer.Option("--scope", help="embed (default) or admin. Repeatable.")
    ] = None,
    models: Annotated[
        list[str] | None,
        typer.Option("--model", help="Model the key may use; all without it. Repeatable."),
    ] = None,
    requests_per_minute: Annotated[
        int | None, typer.Option("--rpm", help="Requests a minute; no limit without it.")
    ] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option("--tpm", help="Tokens a minute; no limit without it.")
    ] = None,
    expires: Annotated[
        str | None, typer.Option("--expires", help="A date, an instant, or a span such as 30d.")
    ] = None,
    truncate: Annotated[
        str | None,
        typer.Option("--truncate", help="none, end or start, where its requests do not say."),
    ] = None,
    new_store: Annotated[
        bool, typer.Option("--create", help="Make a store where the data folder has none.")
    ] = False,
    data_dir: DataDir = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Make a key and print it; it is never shown again."""
    from trivec.accounts import KeyPlan, RateLimits

    plan = KeyPlan(
        name,
        scopes=_scopes(scopes or ["embed"]),
        models=frozenset(models) if models else None,
        allowance=RateLimits(requests_per_minute, tokens_per_minute),
        expires_us=instant(expires, option="--expires", ahead=True),
        truncate=_truncate(truncate),
    )
    for warning in _unknown_models(models or [], data_dir, config):
        say(warning)
    creates = new_store or _may_make_store(data_dir, config)
    with administration(data_dir, config, creates=creates) as books:
        new = books.create_key(plan)
    _print_new(new, as_json=as_json)
    say(f"This is the only time the key {new.key.name} ({new.key.id}) is shown; keep it safe.")


def _truncate(word: str | None) -> str | None:
    if word not in (None, "none", "end", "start"):
        raise SettingInvalid(f"--truncate is {word}; it is none, end or start")
    return word


def _may_make_store(data_dir: str | None, config: str | None) -> bool:
    """Ask, where somebody is there to answer and there is no store yet."""
    from trivec.accounts.stores import sqlite_file

    settings = settings_of(data_dir, config)
    file = sqlite_file(settings)
    if file is None or file.exists():
        return False
    if not sys.stdin.isatty():
        raise StoreRefused(
            f"there is no store in {settings.data_dir}; name the server's own data folder with "
            "--data-dir, or make a store there with --create"
        )
    question = f"There is no store in {settings.data_dir}. Make one?"
    return typer.confirm(question, default=False, err=True, abort=True)


@keys_app.command("list")
def list_(
    everything: Annotated[bool, typer.Option("--all", help="Revoked ones too.")] = False,
    data_dir: DataDir = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """List the keys, oldest first."""
    with administration(data_dir, config) as books:
        keys = [key for key in books.list_keys() if everything or key.revoked_us is None]
    if as_json:
        print_json([key_json(key) for key in keys])
    elif not keys:
        say("There are no keys yet; make one with: trivec keys create --name NAME")
    else:
        _print_keys(keys)


@keys_app.command()
def show(
    key: Reference,
    data_dir: DataDir = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Show one key: everything about it but the key itself."""
    with administration(data_dir, config) as books:
        found = books.show_key(key)
    if as_json:
        print_json(key_json(found))
        return
    rows = table(["", ""])
    rows.show_header = False
    for label, value in _facts(found):
        rows.add_row(f"[dim]{label}[/dim]", value)
    print_table(rows)


@keys_app.command()
def revoke(
    key: Reference,
    data_dir: DataDir = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Close a key for ever; every running server refuses it within a second."""
    with administration(data_dir, config) as books:
        found = books.revoke_key(key)
    if as_json:
        print_json(key_json(found))
    say(f"The key {found.name} ({found.id}) opens nothing any more.")


@keys_app.command()
def rotate(
    key: Reference,
    overlap: Annotated[
        str, typer.Option("--overlap", help="How long the old key still works, as 24h or 0m.")
    ] = "24h",
    data_dir: DataDir = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Print a new key for the same name, limits and usage; the old one goes on for a while."""
    until_us = instant(overlap, option="--overlap", ahead=True)
    assert until_us is not None
    overlap_s = max(0.0, until_us / 1_000_000 - time.time())
    with administration(data_dir, config) as books:
        new = books.rotate_key(key, overlap_s=overlap_s)
    _print_new(new, as_json=as_json)
    say(f"The old key of {new.key.name} works until {shown(new.key.secrets[0].expires_us)} UTC.")


def key_json(key: "Key") -> Json:
    """All that is known of a key; instants in UTC, null where there is none."""
    return {
        "id": key.id,
        "name": key.name,
        "scopes": sorted(key.scopes),
        "models": None if key.models is None else sorted(key.models),
        "requests_per_minute": key.allowance.requests_per_minute,
        "tokens_per_minute": key.allowance.tokens_per_minute,
        "created": iso(key.created_us),
        "expires": iso(key.expires_us),
        "revoked": iso(key.revoked_us),
        "truncate": key.truncate,
        "secrets": [
            {
                "first": secret.first,
                "last": secret.last,
                "created": iso(secret.created_us),
                "expires": iso(secret.expires_us),
            }
            for secret in key.secrets
        ],
    }


def _print_new(new: "NewKey", *, as_json: bool) -> None:
    """The plain key alone, so that a shell can catch it."""
    if as_json:
        print_json({"id": new.key.id, "name": new.key.name, "key": new.plain})
    else:
        print(new.plain)


def _print_keys(keys: "list[Key]") -> None:
    """What a narrow terminal has no room for, `trivec keys show` tells."""
    columns = WIDE if columns_to_fill() >= WIDE_COLUMNS_MIN else NARROW
    rows = table(columns, numbers=["RPM", "TPM"])
    for key in keys:
        cells = {
            "NAME": styled(key.name, "bold"),
            "ID": styled(key.id, "dim"),
            "KEY": "\n".join(_masked(secret) for secret in _live(key)),
            "SCOPES": (" " if columns is WIDE else "\n").join(sorted(key.scopes)),
            "MODELS": _models(key, "\n"),
            "RPM": counted(key.allowance.requests_per_minute) or "[dim]∞[/dim]",
            "TPM": counted(key.allowance.tokens_per_minute) or "[dim]∞[/dim]",
            "CREATED (UTC)": shown(key.created_us),
            "STATE": _state(key) if columns is WIDE else _state(key).partition("[/")[0] + "[/]",
        }
        rows.add_row(*(cells[column] for column in columns))
    print_table(rows, spare=SPARE)


def _facts(key: "Key") -> list["tuple[str, str]"]:
    facts = [
        ("name", styled(key.name, "bold")),
        ("id", key.id),
        ("state", _state(key)),
        ("scopes", " ".join(sorted(key.scopes))),
        ("models", _models(key, ", ")),
        ("requests a minute", counted(key.allowance.requests_per_minute) or "no limit"),
        ("tokens a minute", counted(key.allowance.tokens_per_minute) or "no limit"),
        ("long texts", f"truncate: {key.truncate}" if key.truncate else "as the server does"),
        ("created", f"{shown(key.created_us)} UTC"),
    ]
    for secret in key.secrets:
        until = f", until {shown(secret.expires_us)} UTC" if secret.expires_us else ""
        facts.append(("key", f"{_masked(secret)} since {shown(secret.created_us)} UTC{until}"))
    return facts


def _models(key: "Key", between: str) -> str:
    return "[dim]all[/dim]" if key.models is None else styled(between.join(sorted(key.models)))


def _state(key: "Key") -> str:
    now_us = time.time_ns() // 1000
    if key.revoked_us is not None:
        return f"[red]revoked[/red] {shown(key.revoked_us)}"
    if not key.is_live(now_us):
        return f"[red]expired[/red] {shown(key.expires_us)}"
    if key.expires_us is not None:
        return f"[green]live[/green] until {shown(key.expires_us)}"
    return "[green]live[/green]"


def _live(key: "Key") -> "list[Secret]":
    now_us = time.time_ns() // 1000
    return [secret for secret in key.secrets if secret.is_live(now_us)]


def _masked(secret: "Secret") -> str:
    return f"{secret.first}…{secret.last}"


def _unknown_models(names: list[str], data_dir: str | None, config: str | None) -> list[str]:
    """A warning for each name that neither the catalogue nor the settings have."""
    from trivec.checkpoints.catalogue import CATALOGUE
    from trivec.settings import load_settings

    flags = {"data_dir": data_dir, "config": config}
    served = [one.partition("=") for one in load_settings(flags, os.environ).models]
    known = {*CATALOGUE, *(name if given else Path(name).name for name, given, _ in served)}
    return [
        f"warning: no model called {name} is known here (trivec models list shows those that are); "
        "the key opens it once a server serves it under that name"
        for name in names
        if name not in known
    ]


def _scopes(names: list[str]) -> "frozenset[Scope]":
    from trivec.accounts import Scope

    unknown = sorted(set(names) - set(Scope))
    if unknown:
        raise SettingInvalid(f"--scope is {unknown[0]}; it is embed or admin")
    return frozenset(Scope(name) for name in names)
