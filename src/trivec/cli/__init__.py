"""The command `trivec`: data goes to standard output, messages to standard error."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand
from typer.main import get_command

from trivec import __version__
from trivec.core.errors import TrivecError

if TYPE_CHECKING:
    from typer._click.core import Command, Context

REFUSED_EXIT_CODE = 2
COMMANDS = {  # name: its line in `trivec --help`
    "serve": "Serve embeddings over HTTP until told to stop.",
    "embed": "Embed a corpus: from files of texts to a file of vectors.",
    "models": "List, pull and verify models.",
    "keys": "Create, list, rotate and revoke API keys.",
    "usage": "Sum what was used, by key, model or day: requests and the tokens they were billed.",
    "db": "Look after the store of keys and usage.",
    "bench": "Measure how fast a model is, in this process or, with --url, on a running server.",
}
# Where it is, as MODULE:VARIABLE, if not in `app` of the module of its name.
PLACES = {"keys": "store:keys_app", "usage": "store:usage_app", "db": "store:db_app"}


class LazyCommand(TyperCommand):
    """Command whose module is imported when it is called, so that `trivec --help` is quick."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: "Context | None" = None, **extra: Any
    ) -> "Context":
        return load_command(str(self.name)).make_context(info_name, args, parent, **extra)


def load_command(name: str) -> "Command":
    """The command *name*, with all that it imports."""
    module, _, variable = PLACES.get(name, f"{name}:app").partition(":")
    return get_command(getattr(import_module(f"trivec.cli.{module}"), variable))


app = typer.Typer(
    name="trivec",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for name, summary in COMMANDS.items():
    app.command(name, cls=LazyCommand, help=summary)(lambda: None)


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
        sys.exit(app(standalone_mode=False))  # standalone, Typer draws boxes around refusals
    except TrivecError as refusal:
        line = str(refusal)
    except (
        typer.TyperException
    ) as refusal:  # empty where no argument was given: that prints the help
        line = refusal.format_message().replace("Value error, ", "")
        if line and (context := getattr(refusal, "ctx", None)):
            line = f"{line.rstrip('.')}; see {context.command_path} --help"
    except typer.Abort:
        sys.exit("Aborted.")
    if line:
        print(f"trivec: {line}", file=sys.stderr)
    sys.exit(REFUSED_EXIT_CODE)
