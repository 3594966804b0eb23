"""The command `trivec`: its sub-commands, each imported when it is called, and not before."""

import importlib
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer
from typer.core import TyperCommand, TyperGroup

from trivec import __version__
from trivec.core.errors import TrivecError

if TYPE_CHECKING:
    from typer._click.core import Command, Context

REFUSED_EXIT_CODE = 2


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a sub-command lives, and the line `trivec --help` has for it."""

    module: str
    name: str  # of a Typer app, or of a function that is a command by itself
    summary: str


ENTRIES = {
    "serve": Entry("serve", "serve", "Serve embeddings over HTTP until told to stop."),
    "models": Entry("models", "models_app", "Pull, list and check models, or write a dummy one."),
    "keys": Entry("keys", "keys_app", "Create, list, rotate and revoke API keys."),
    "usage": Entry("usage", "usage", "Sum what was used, by key, model or day."),
    "db": Entry("db", "db_app", "Look after the store of keys and usage."),
    "bench": Entry("bench", "bench_app", "Measure how fast this machine is."),
}


class Commands(TyperGroup):
    """Lists the sub-commands without importing any; imports the one that is called."""

    def list_commands(self, ctx: "Context") -> list[str]:
        return list(ENTRIES)

    def get_command(self, ctx: "Context", cmd_name: str) -> "Command | None":
        """A stand-in that only has a name and a summary: all that the help page asks for."""
        entry = ENTRIES.get(cmd_name)
        return None if entry is None else TyperCommand(cmd_name, help=entry.summary)

    def resolve_command(
        self, ctx: "Context", args: list[str]
    ) -> "tuple[str | None, Command | None, list[str]]":
        """The real command of the first argument; an unknown one is refused above us."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, command and load(name or ""), rest


def load(name: str) -> "Command":
    """Import the sub-command *name*."""
    entry = ENTRIES[name]
    module = importlib.import_module(f"trivec.cli.{entry.module}")
    found = getattr(module, entry.name)
    mount = typer.Typer(add_completion=False)
    mount.callback()(lambda: None)  # or a lone command would take the mount's place
    if isinstance(found, typer.Typer):
        mount.add_typer(found, name=name)
    else:
        mount.command(name, cls=getattr(module, "ServeCommand", None))(found)
    group = typer.main.get_command(mount)
    assert isinstance(group, TyperGroup)
    return group.commands[name]


app = typer.Typer(
    cls=Commands,
    name="trivec",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(f"trivec {__version__}")
        raise typer.Exit


@app.callback()
def _trivec(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and leave."
        ),
    ] = False,
) -> None:
    """Self-hosted text embeddings behind the OpenAI API."""


def main() -> None:
    """Run the command that the arguments name; one line and exit code 2 for what is refused."""
    try:
        app()
    except TrivecError as refusal:
        print(f"trivec: {refusal}", file=sys.stderr)
        sys.exit(REFUSED_EXIT_CODE)
