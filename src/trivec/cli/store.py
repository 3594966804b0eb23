"""`trivec keys`, `trivec usage` and `trivec db`: what the store holds, without a server."""

import csv
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias
from urllib.parse import urlsplit

import typer
from rich.console import Console
from rich.text import Text
from typer import Option

from trivec.accounts import Key, KeyPlan, NewKey, RateLimits, Scope, Secret, UsageBy, UsageQuery
from trivec.accounts.utc import EPOCH, microseconds, moment
from trivec.cli.common import (
    AsJson,
    ConfigFile,
    DataDir,
    Row,
    instant,
    print_json,
    print_table,
    say,
    settings_of,
)
from trivec.core.errors import SettingInvalid, StoreRefused, StoreUnavailable
from trivec.settings import Settings

if TYPE_CHECKING:
    from trivec.accounts.administration import Administration

ISO = "%Y-%m-%dT%H:%M:%SZ"  # instants in JSON
NOT_SET = {  # what null means in a key
    "models": "all",
    "requests_per_minute": "no limit",
    "tokens_per_minute": "no limit",
    "expires": "never",
    "revoked": "never",
    "truncate": "as the server does",
}
STATE_STYLES = {"live": "green", "revoked": "red", "expired": "red"}

KeyReference: TypeAlias = Annotated[
    str, typer.Argument(metavar="KEY", help="Its name, its id, or the key itself.")
]

keys_app = typer.Typer(
    help="Create, list, rotate and revoke API keys.", no_args_is_help=True, add_completion=False
)
usage_app = typer.Typer(add_completion=False)
db_app = typer.Typer(
    help="Look after the store of keys and usage.", no_args_is_help=True, add_completion=False
)


@contextmanager
def administration(settings: Settings, *, creates: bool = False) -> "Iterator[Administration]":
    """The store's keys and usage, until the block ends. Raises `StoreRefused` in one line."""
    from trivec.accounts.stores import open_administration
    from trivec.core.clock import SystemClock

    with (
        store_refusals(settings, creates=creates),
        open_administration(settings, clock=SystemClock()) as books,
    ):
        yield books


@contextmanager
def store_refusals(settings: Settings, *, creates: bool = False) -> Iterator[None]:
    """Turn a store that is missing or away into `StoreRefused`: one line with the next step.

    An SQLite store is made only where *creates*: a second one beside the server's own would hold
    keys that open nothing.
    """
    from trivec.accounts.stores import sqlite_file

    file = sqlite_file(settings)
    if not creates and file is not None and not file.exists():
        raise StoreRefused(
            f"there is no store in {settings.data_dir}; name the server's own data folder with "
            "--data-dir, or make a store with: trivec serve, or trivec keys create --create"
        )
    try:
        yield
    except StoreUnavailable as fault:
        where, next_step = str(settings.data_dir), "try again"
        if settings.database_url is not None:
            address = urlsplit(settings.database_url.get_secret_value())
            where = f"{address.hostname}:{address.port or 5432}"
            next_step = "is it running, and may this machine reach it?"
        cause = " ".join(str(fault.__cause__ or fault).split())
        raise StoreRefused(f"the store at {where} cannot be used: {cause}; {next_step}") from fault


@keys_app.command()
def create(
    name: Annotated[str, Option("--name", "-n", help="What the key is called.")],
    scope: Annotated[list[Scope] | None, Option(help="embed by default. Repeatable.")] = None,
    model: Annotated[
        list[str] | None, Option(help="Model it may use, else all. Repeatable.")
    ] = None,
    rpm: Annotated[int | None, Option(help="Requests a minute; no limit without it.")] = None,
    tpm: Annotated[int | None, Option(help="Tokens a minute; no limit without it.")] = None,
    expires: Annotated[str | None, Option(help="Date, instant, or span such as 30d.")] = None,
    truncate: Annotated[
        Literal["none", "end", "start"] | None, Option(help="Which end of long texts is cut.")
    ] = None,
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
        print_json([_as_json(key) for key in keys])
        return
    if not keys:
        say("There are no keys yet; make one with: trivec keys create --name NAME")
        return
    now_us = time.time_ns() // 1000
    rows: list[Row] = [
        {
            "NAME": key.name,
            "ID": key.id,
            "KEY": "\n".join(_hint(one) for one in key.secrets if one.is_live(now_us)),
            "SCOPES": "\n".join(sorted(key.scopes)),
            "MODELS": "all" if key.models is None else "\n".join(sorted(key.models)),
            "RPM": key.limits.requests_per_minute or "∞",
            "TPM": key.limits.tokens_per_minute or "∞",
            "CREATED (UTC)": _shown(key.created_us),
            "STATE": _state(key),
            "ENDS (UTC)": _shown(key.revoked_us or key.expires_us),
        }
        for key in keys
    ]
    print_table(
        rows,
        styles={"NAME": "bold", "ID": "dim"},
        folded=("NAME", "MODELS"),
        spare=("CREATED (UTC)", "KEY", "ID", "ENDS (UTC)", "TPM", "RPM", "MODELS"),
    )


@keys_app.command()
def show(
    key: KeyReference, data_dir: DataDir = None, config: ConfigFile = None, as_json: AsJson = False
) -> None:
    """Show one key: everything about it but the key itself."""
    with administration(settings_of(data_dir, config)) as books:
        found = books.show_key(key)
    if as_json:
        print_json(_as_json(found))
        return
    facts: dict[str, object] = {"state": _state(found), **_as_json(found)}
    for n, secret in enumerate(found.secrets, 1):
        ends = f", until {_shown(secret.expires_us)}" if secret.expires_us else ""
        facts[f"key {n}"] = f"{_hint(secret)} since {_shown(secret.created_us)}{ends}"
    del facts["secrets"]
    for name, value in facts.items():
        shown = ", ".join(value) if isinstance(value, list) else value
        print(f"{name.replace('_', ' '):<20} {NOT_SET[name] if shown is None else shown}")


@keys_app.command()
def revoke(
    key: KeyReference, data_dir: DataDir = None, config: ConfigFile = None, as_json: AsJson = False
) -> None:
    """Close a key for ever; every running server refuses it within a second."""
    with administration(settings_of(data_dir, config)) as books:
        found = books.revoke_key(key)
    if as_json:
        print_json(_as_json(found))
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
    until_s = instant(overlap, option="--overlap", ahead=True) / 1_000_000
    with administration(settings_of(data_dir, config)) as books:
        new = books.rotate_key(key, overlap_s=max(0.0, until_s - time.time()))
    _print_secret(new, as_json=as_json)
    say(f"The old key of {new.key.name} works until {_shown(new.key.secrets[0].expires_us)} UTC.")


def _as_json(key: Key) -> dict[str, object]:
    """All that is known of a key; instants in UTC, null where there is none."""

    def times(one: Key | Secret) -> dict[str, str | None]:
        return {
            "created": _shown(one.created_us, ISO),
            "expires": _shown(one.expires_us, ISO) or None,
        }

    return {
        "id": key.id,
        "name": key.name,
        "scopes": sorted(key.scopes),
        "models": None if key.models is None else sorted(key.models),
        "requests_per_minute": key.limits.requests_per_minute,
        "tokens_per_minute": key.limits.tokens_per_minute,
        **times(key),
        "revoked": _shown(key.revoked_us, ISO) or None,
        "truncate": key.truncate,
        "secrets": [{"first": one.first, "last": one.last, **times(one)} for one in key.secrets],
    }


def _hint(secret: Secret) -> str:
    return f"{secret.first}…{secret.last}"


def _print_secret(new: NewKey, *, as_json: bool) -> None:
    """Print the plain key alone, so that a shell can catch it."""
    if as_json:
        print_json({"id": new.key.id, "name": new.key.name, "key": new.plain})
    else:
        print(new.plain)


def _state(key: Key) -> Text:
    state = "live" if key.is_live(time.time_ns() // 1000) else "expired"
    if key.revoked_us is not None:
        state = "revoked"
    return Text(state, STATE_STYLES[state])


def _shown(time_us: int | None, form: str = "%Y-%m-%d %H:%M") -> str:
    """An instant in UTC; nothing where there is none."""
    return "" if time_us is None else f"{moment(time_us):{form}}"


@usage_app.command()
def usage(
    by: Annotated[UsageBy, Option(help="What is summed; a day is UTC's.")] = UsageBy.KEY,
    since: Annotated[str | None, Option(help="From this date, instant, or span as 7d ago.")] = None,
    until: Annotated[str | None, Option(help="Up to this date or instant, not included.")] = None,
    key: Annotated[str | None, Option(help="Only this key, by name or id.")] = None,
    data_dir: DataDir = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
    as_csv: Annotated[bool, Option("--csv", help="Print CSV instead of a table.")] = False,
) -> None:
    """Sum what was used, by key, model or day: requests and the tokens they were billed."""
    if as_json and as_csv:
        raise SettingInvalid("--json and --csv exclude each other; give one")
    since_us = None if since is None else instant(since, option="--since", ahead=False)
    until_us = None if until is None else instant(until, option="--until", ahead=False)
    with administration(settings_of(data_dir, config)) as books:
        key_id = None if key is None else books.key_id(key)
        lines = books.usage(UsageQuery(by, since_us=since_us, until_us=until_us, key_id=key_id))
    if by is not UsageBy.DAY:
        lines.sort(key=lambda line: -line.tokens)
    total = sum(line.tokens for line in lines)
    named = by is UsageBy.KEY
    columns = [*(["name"] if named else []), by.value, "requests", "failed", "tokens", "share"]
    rows: list[Row] = [
        {
            **({"name": line.name} if named else {}),
            by.value: line.group,
            "requests": line.requests,
            "failed": line.failed,
            "tokens": line.tokens,
            "share": round(line.tokens / total, 6) if total else 0.0,
        }
        for line in lines
    ]
    if as_json:
        print_json(rows)
    elif as_csv:
        writer = csv.DictWriter(sys.stdout, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    elif not rows:
        say("Nothing was used in that time.")
    else:
        if len(rows) > 1:
            sums: Row = {
                "requests": sum(line.requests for line in lines),
                "failed": sum(line.failed for line in lines),
                "tokens": total,
            }
            rows.append({columns[0]: "total", **sums})
        cells: list[Row] = [
            {
                **{name.upper(): row.get(name) for name in columns},
                "SHARE": f"{row['share']:.1%}" if "share" in row else None,
            }
            for row in rows
        ]
        print_table(
            cells,
            styles={"KEY": "dim", columns[0].upper(): "bold"},
            folded=("NAME", "KEY", "MODEL"),
            spare=("KEY", "SHARE", "FAILED", "REQUESTS"),
        )


@db_app.command()
def upgrade(data_dir: DataDir = None, config: ConfigFile = None) -> None:
    """Bring the schema to the one this version reads; needed on Postgres, automatic on SQLite."""
    from trivec.accounts.stores import open_store

    settings = settings_of(data_dir, config)
    with store_refusals(settings), closing(open_store(settings)) as store:
        before = store.revision()
        store.upgrade()
        after = store.revision()
    if before == after:
        say(f"The schema is up to date, at revision {after}.")
    else:
        say(f"The schema went from {before or 'nothing'} to revision {after}.")


@db_app.command()
def archive(
    before: Annotated[str, Option(help="Move the rows before this UTC day, as 2026-11-01.")],
    to: Annotated[Path | None, Option(help="The file, by default in the data folder.")] = None,
    data_dir: DataDir = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Move old ledger rows into a gzip file of JSON lines; the totals of their days stay."""
    from trivec.accounts.archive import ArchiveRun
    from trivec.accounts.stores import open_store

    now = datetime.now(UTC)
    day: datetime | None = None
    with suppress(ValueError):
        day = datetime.strptime(before, "%Y-%m-%d").replace(tzinfo=UTC)
    if day is None or not EPOCH <= day <= now:  # the rows of later days are still being written
        raise SettingInvalid(
            f"--before is {before!r}; give a day from 1970 to today, {now:%Y-%m-%d} in UTC"
        )
    settings = settings_of(data_dir, config)
    file = to or settings.data_dir / f"ledger-until-{day:%Y-%m-%d}.jsonl.gz"
    with (
        store_refusals(settings),
        closing(open_store(settings)) as store,
        Console(stderr=True).status("") as status,  # silent where that is no terminal
    ):
        done = ArchiveRun(
            store,
            microseconds(day),
            file,
            settings.data_dir,
            told=lambda rows: status.update(f"{rows:,} rows moved"),
        ).run()
    if as_json:
        moved = {"rows": done.rows, "bytes": done.byte_count, "file": done.file and str(done.file)}
        print_json({"before": f"{day:%Y-%m-%d}", **moved})
    elif done.file is None and done.rows == 0:
        say(f"There is no ledger row before {before} to move.")
    else:
        where = "" if done.file is None else f" into {done.file} ({done.byte_count:,} bytes)"
        say(f"Moved {done.rows:,} ledger rows from before {before}{where}.")
