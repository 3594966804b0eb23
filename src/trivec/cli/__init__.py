"""The command `trivec`: arguments in, data on standard output, messages on standard error, exit codes.

Heavy packages are imported by the commands that need them, so that asking for help is quick.
"""

import sys
from typing import Annotated

import typer

from trivec import __version__
from trivec.cli.bench import bench
from trivec.cli.db import db_app
from trivec.cli.keys import keys_app
from trivec.cli.models import models_app
from trivec.cli.serve import ServeCommand, serve
from trivec.cli.usage import usage
from trivec.core.errors import TrivecError

REFUSED_EXIT_CODE = 2

app = typer.Typer(
    name="trivec",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(cls=ServeCommand)(serve)
app.add_typer(models_app, name="models")
app.add_typer(keys_app, name="keys")
app.command()(usage)
app.add_typer(db_app, name="db")
app.command()(bench)


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
