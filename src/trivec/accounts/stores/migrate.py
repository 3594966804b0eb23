"""Brings a database's schema to the one this version reads, inside the caller's transaction."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

from trivec.core.errors import StoreRefused

LATEST = "head"
ONE_AT_A_TIME = 7_472_697_665  # any number of ours: Postgres' advisory lock for upgrades


def revision(connection: Connection) -> str | None:
    """The schema's present revision; None for an empty database."""
    return MigrationContext.configure(connection).get_current_revision()


def is_latest(connection: Connection) -> bool:
    return revision(connection) == _scripts().get_current_head()


def upgrade(connection: Connection, target: str = LATEST) -> None:
    """Run the steps that are missing; none when there are none. Raises `StoreRefused`."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": ONE_AT_A_TIME})
    _check_known(revision(connection))
    config = _config()
    config.attributes["connection"] = connection
    command.upgrade(config, target)


def check(connection: Connection) -> None:
    """Raise `StoreRefused` unless the schema is the one this version reads."""
    found = revision(connection)
    _check_known(found)
    if not is_latest(connection):
        raise StoreRefused(
            f"the database's schema is {'absent' if found is None else f'of revision {found}'}, "
            "older than this version reads; run: trivec db upgrade"
        )


def _check_known(found: str | None) -> None:
    known = {script.revision for script in _scripts().walk_revisions()}
    if found is not None and found not in known:
        raise StoreRefused(
            f"the database's schema is of revision {found}, newer than this version of trivec "
            "reads; upgrade trivec, or restore an older copy of the database"
        )


def _scripts() -> ScriptDirectory:
    return ScriptDirectory.from_config(_config())


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    return config
