"""`trivec serve`: flags to settings, settings to a supervised server process."""

import os
import select
import socket
import sys
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal, TextIO, get_args, get_origin

import typer
from typer.core import TyperCommand

from trivec.cli.outermost import whole_life
from trivec.server.processes import ignore_early_signals
from trivec.server.supervisor import Heart
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
    _leave(run(settings))


def run(settings: Settings) -> int:
    """Listen, then serve, in a supervised child unless the settings say otherwise."""
    from trivec.cli.several import serve_several
    from trivec.server.listening import check_certificate, listen
    from trivec.server.machine import raise_file_limit

    ignore_early_signals()
    raise_file_limit()

    if settings.tls_cert and settings.tls_key:
        check_certificate(settings.tls_cert, settings.tls_key)
    if settings.api_processes > 1:
        return serve_several(settings, say=_say)
    listener = listen(settings.host, settings.port)
    return _live(settings, listener, None)


def _live(settings: Settings, listener: socket.socket, heart: Heart | None) -> int:
    """The serving process, whole."""

    def life() -> int:
        from trivec.build import check_models, load_models
        from trivec.cli.greeting import Greeting
        from trivec.server.machine import usable_cores
        from trivec.server.serving import live

        check_models(settings)
        load = partial(load_models, settings, cores=usable_cores())
        herald = Greeting(settings, port=listener.getsockname()[1], say=_say)
        return live(settings, listener, load=load, heart=heart, herald=herald)

    return whole_life(settings, life, say=_say)


def _say(line: str) -> None:
    """To standard error, unless whoever reads it is stuck: the parent must go on."""
    if _takes_a_line(sys.stderr):
        print(line, file=sys.stderr, flush=True)


def _takes_a_line(stream: TextIO) -> bool:
    try:
        return bool(select.select((), (stream,), (), 0)[1])
    except (OSError, ValueError):  # no file of the system's, as under a test's runner
        return True


def _leave(exit_code: int) -> None:
    """End now: granian's own threads do not survive the interpreter's orderly end (they abort)."""
    sys.stdout.flush()
    if _takes_a_line(sys.stderr):  # else the log's thread is stuck in it, and holds its lock
        sys.stderr.flush()
    os._exit(exit_code)
