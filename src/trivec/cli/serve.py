"""`trivec serve`: flags to settings, settings to a server process."""

import os
import select
import signal
import sys
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal, TextIO, get_args, get_origin

import typer
from typer.core import TyperCommand

from trivec.cli.greeting import Greeting
from trivec.server.machine import check_certificate, listen, raise_file_limit, usable_cores
from trivec.server.processes import STOPS, exit_code_of, ignore_early_signals
from trivec.settings import HttpLimits, Settings, load_settings

if TYPE_CHECKING:
    from typer._click.core import Context


def _help(name: str) -> str:
    """A setting's help is written once, where the setting is."""
    field = Settings.model_fields[name]
    words = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    notes = [" | ".join(words)] if words and all(isinstance(one, str) for one in words) else []
    if field.default not in (None, (), False):
        notes.append(f"default: {field.default}")
    return f"{field.description}" + "".join(f" [dim]\\[{note}][/dim]" for note in notes)


def _flag(name: str, *spellings: str) -> typer.models.OptionInfo:
    info = typer.Option(*spellings, help=_help(name), show_default=False)
    assert isinstance(info, typer.models.OptionInfo)
    return info


class ServeCommand(TyperCommand):
    """Takes `--no-auth` and `--no-auth=anywhere`; Typer has no option with a value that may lack."""

    def parse_args(self, ctx: "Context", args: list[str]) -> list[str]:
        return super().parse_args(
            ctx, ["--no-auth=true" if one == "--no-auth" else one for one in args]
        )


def serve(
    models: Annotated[list[str] | None, _flag("models", "--model", "-m")] = None,
    host: Annotated[str | None, _flag("host", "--host")] = None,
    port: Annotated[str | None, _flag("port", "--port", "-p")] = None,
    probe_port: Annotated[str | None, _flag("probe_port", "--probe-port")] = None,
    tls_cert: Annotated[str | None, _flag("tls_cert", "--tls-cert")] = None,
    tls_key: Annotated[str | None, _flag("tls_key", "--tls-key")] = None,
    precision: Annotated[str | None, _flag("precision", "--precision")] = None,
    device: Annotated[str | None, _flag("device", "--device")] = None,
    backend: Annotated[str | None, _flag("backend", "--backend")] = None,
    data_dir: Annotated[str | None, _flag("data_dir", "--data-dir")] = None,
    config: Annotated[
        str | None, typer.Option("--config", help="TOML file with any of the settings.")
    ] = None,
    truncate: Annotated[
        str | None,
        typer.Option(
            "--truncate",
            metavar="none|end|start",
            help=HttpLimits.model_fields["truncate"].description,
        ),
    ] = None,
    no_auth: Annotated[
        str | None,
        typer.Option("--no-auth", metavar="[=anywhere]", help=_help("no_auth"), show_default=False),
    ] = None,
) -> None:
    """Serve embeddings over HTTP until told to stop.

    Every option is also a variable, --port as TRIVEC_PORT; all settings are in
    docs/configuration.md.
    """
    flags = {name: value for name, value in locals().items() if value is not None}
    flags["http"] = {"truncate": flags.pop("truncate", None)}
    settings = load_settings(flags, os.environ, warn=_say)
    exit_code = run(settings)
    # At the interpreter's orderly end granian's own threads abort the process.
    sys.stdout.flush()
    if _takes_a_line(sys.stderr):  # else the log's thread is stuck in it, and holds its lock
        sys.stderr.flush()
    os._exit(exit_code)


def run(settings: Settings) -> int:
    """Listen, then serve until the end; the exit code. Raises `SettingInvalid`."""
    ignore_early_signals()
    for number in STOPS:  # until there are other handlers nothing was accepted; PID 1 needs one
        signal.signal(number, lambda _number, _frame: os._exit(0))
    raise_file_limit()

    if settings.tls_cert and settings.tls_key:
        check_certificate(settings.tls_cert, settings.tls_key)
    if settings.api_processes > 1:
        from trivec.cli.several import serve_several

        return serve_several(settings, say=_say)
    listener = listen(settings.host, settings.port)

    def main() -> int:
        from trivec.build import check_models, load_models
        from trivec.server.server import serve_http

        check_models(settings)
        greeting = Greeting(settings, port=listener.getsockname()[1], say=_say)
        return serve_http(
            settings,
            listener,
            load=partial(load_models, settings, cores=usable_cores()),
            on_first_key=greeting.first_key,
            on_ready=greeting.ready,
        )

    return exit_code_of(main, settings, say=_say)


def _say(line: str) -> None:
    """Print to standard error, unless its reader is stuck: serving must go on."""
    if _takes_a_line(sys.stderr):
        print(line, file=sys.stderr, flush=True)


def _takes_a_line(stream: TextIO) -> bool:
    try:
        return bool(select.select((), (stream,), (), 0)[1])
    except (OSError, ValueError):  # no file of the system's, as under a test's runner
        return True
