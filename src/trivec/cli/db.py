"""`trivec db`: the schema of the store."""

from contextlib import closing

import typer

from trivec.cli.store import ConfigFile, DataDir, say, settings_of, telling_what_is_away

db_app = typer.Typer(help="Look after the store's schema.", no_args_is_help=True)


@db_app.callback()
def _group() -> None:
    """Keeps `upgrade` a sub-command while it is the only one."""


@db_app.command()
def upgrade(data_dir: DataDir = None, config: ConfigFile = None) -> None:
    """Bring the schema to the one this version reads; needed on Postgres, automatic on SQLite."""
    from trivec.accounts.stores import open_store

    settings = settings_of(data_dir, config)
    with telling_what_is_away(settings), closing(open_store(settings)) as store:
        before = store.revision()
        store.upgrade()
        after = store.revision()
    if before == after:
        say(f"The schema is up to date, at revision {after}.")
    else:
        say(f"The schema went from {before or 'nothing'} to revision {after}.")
