"""`trivec serve`: flags to settings, settings to one process or several, and what it prints."""

import asyncio
import json
import math
import os
import select
import shlex
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TextIO, get_args, get_origin

import typer
from typer.core import TyperCommand
from typer.models import OptionInfo

from trivec import __version__
from trivec.cli.common import ConfigFile, shown_progress
from trivec.core.errors import SettingInvalid
from trivec.server import machine
from trivec.server.processes import (
    STOPS,
    ChildProcess,
    Processes,
    exit_code_of,
    ignore_early_signals,
)
from trivec.settings import BatchLimits, HttpLimits, Settings, load_settings

if TYPE_CHECKING:
    from typer._click.core import Context

    from trivec.accounts import NewKey
    from trivec.build import Models, Parts
    from trivec.ipc.folder import SharedFolder

FIELDS = {**BatchLimits.model_fields, **HttpLimits.model_fields, **Settings.model_fields}
FIRST_KEY_FILE = "first-key"  # in the data folder
SOCKET_PATH_MAX = 100  # bytes of a Unix socket's path that every system takes

app = typer.Typer(add_completion=False)


def _flag(name: str, *spellings: str, metavar: str | None = None) -> OptionInfo:
    """Option for the setting *name*, whose help is written once, where the setting is."""
    field = FIELDS[name]
    inner = get_args(field.annotation)
    kind = inner[0] if inner[1:] == (type(None),) else field.annotation
    words = get_args(kind) if get_origin(kind) is Literal else ()
    metavar = "NUMBER" if kind is int else metavar
    notes = [" | ".join(words)] if words and all(isinstance(one, str) for one in words) else []
    if field.default not in (None, (), False):
        default = field.default
        notes.append(f"default: {', '.join(default) if isinstance(default, tuple) else default}")
    help_text = f"{field.description}" + "".join(f" [dim]\\[{note}][/]" for note in notes)
    info: OptionInfo = typer.Option(*spellings, metavar=metavar, help=help_text, show_default=False)
    return info


class ServeCommand(TyperCommand):
    """Takes `--no-auth` and `--no-auth=anywhere`: Typer has no options with an optional value."""

    def parse_args(self, ctx: "Context", args: list[str]) -> list[str]:
        return super().parse_args(
            ctx, ["--no-auth=true" if one == "--no-auth" else one for one in args]
        )


@app.command(cls=ServeCommand)
def serve(
    models: Annotated[list[str] | None, _flag("models", "--model", "-m")] = None,
    aliases: Annotated[list[str] | None, _flag("aliases", "--alias", metavar="NAME=ID")] = None,
    faces: Annotated[list[str] | None, _flag("faces", "--face")] = None,
    host: Annotated[str | None, _flag("host")] = None,
    port: Annotated[str | None, _flag("port", "--port", "-p")] = None,
    probe_port: Annotated[str | None, _flag("probe_port")] = None,
    tls_cert: Annotated[str | None, _flag("tls_cert")] = None,
    tls_key: Annotated[str | None, _flag("tls_key")] = None,
    precision: Annotated[str | None, _flag("precision")] = None,
    device: Annotated[str | None, _flag("device")] = None,
    backend: Annotated[str | None, _flag("backend")] = None,
    data_dir: Annotated[str | None, _flag("data_dir")] = None,
    config: ConfigFile = None,
    truncate: Annotated[str | None, _flag("truncate")] = None,
    token_encoding: Annotated[str | None, _flag("token_encoding")] = None,
    rerank_answer: Annotated[str | None, _flag("rerank_answer")] = None,
    cors_origins: Annotated[list[str] | None, _flag("cors_origins", "--cors-origin")] = None,
    page: Annotated[bool | None, _flag("page", "--page/--no-page")] = None,
    tokens_per_day: Annotated[str | None, _flag("tokens_per_day", "--batch-tpd")] = None,
    no_auth: Annotated[str | None, _flag("no_auth", metavar="[=anywhere]")] = None,
) -> None:
    """Serve embeddings over HTTP until told to stop.

    Every option is also a variable, --port as TRIVEC_PORT; all settings are in
    docs/configuration.md.
    """
    flags = locals()
    flags["http"] = {
        name: flags.pop(name)
        for name in ("truncate", "token_encoding", "rerank_answer", "cors_origins", "page")
    }
    flags["batch"] = {"tokens_per_day": flags.pop("tokens_per_day")}
    exit_code = run(load_settings(flags, os.environ, warn=_say))
    # At an orderly exit of the interpreter granian's threads abort the process.
    sys.stdout.flush()
    if _takes_a_line(sys.stderr):  # otherwise the log's thread is stuck in it, and holds its lock
        sys.stderr.flush()
        if sys.stderr.isatty():  # a bar may be there, of a load that was stopped
            os.write(sys.stderr.fileno(), b"\r\x1b[K")
    os._exit(exit_code)


def run(settings: Settings) -> int:
    """Listen, then serve until the end; the exit code. Raises `SettingInvalid`."""
    ignore_early_signals()
    for number in STOPS:  # nothing is accepted until there are others; PID 1 has no default one
        signal.signal(number, lambda _number, _frame: os._exit(0))
    machine.raise_file_limit()
    if settings.tls_cert and settings.tls_key:
        machine.check_certificate(settings.tls_cert, settings.tls_key)
    if settings.api_processes > 1:
        return _serve_several(settings)
    listener = machine.listen(settings.host, settings.port)
    return exit_code_of(partial(_serve_alone, settings, listener), settings, say=_say)


def _serve_alone(settings: Settings, listener: socket.socket) -> int:
    from trivec.build import check_models
    from trivec.server.server import serve_http

    check_models(settings)
    greeting = Greeting(settings, port=listener.getsockname()[1], say=_say)
    return serve_http(
        settings,
        listener,
        load=partial(_load, settings),
        on_first_key=greeting.first_key,
        on_ready=greeting.ready,
    )


def _serve_several(settings: Settings) -> int:
    """One engine process, and before it `api_processes` that share the port."""
    from trivec.ipc.folder import SharedFolder

    def child(
        name: str, serve: Callable[[], int], listener: socket.socket | None = None
    ) -> ChildProcess:
        whole = partial(exit_code_of, serve, settings, say=_say, process=name)
        return ChildProcess(name, whole, listener)

    try:
        made = tempfile.TemporaryDirectory(prefix="trivec-")  # readable by this user only
    except OSError as fault:
        raise SettingInvalid(
            f"cannot make a folder for temporary files: {fault}. "
            "Set TMPDIR to a folder that can be written."
        ) from fault
    with made as path:
        if len(os.fsencode(f"{path}/engine")) > SOCKET_PATH_MAX:
            raise SettingInvalid(
                f"cannot make a socket at {path}: its path is too long. "
                "Set TMPDIR to a folder with a short path that can be written."
            )
        folder = SharedFolder(Path(path))
        count = settings.api_processes
        listeners = machine.listen_shared(settings.host, settings.port, count=count)
        api = []
        for number, listener in enumerate(listeners, start=1):
            name = f"api-{number}"
            serve_api = partial(_serve_api, settings, folder, name, listener)
            api.append(child(name, serve_api, listener))
        engine = child("engine", partial(_serve_engine, settings, folder))
        return Processes(api, engine, say=_say).run()


def _serve_engine(settings: Settings, folder: "SharedFolder") -> int:
    from trivec.build import check_models
    from trivec.server.server import serve_engine

    check_models(settings)
    return serve_engine(settings, folder, load=partial(_load, settings, takes_text=False))


def _load(settings: Settings, parts: "Parts", *, takes_text: bool = True) -> "Models":
    """Load every model, with a bar on a terminal; elsewhere standard error is the log's alone."""
    from trivec.build import load_models

    with shown_progress(first_line_s=math.inf) as on_progress:
        cores = machine.usable_cores()
        return load_models(
            settings, parts, cores=cores, takes_text=takes_text, on_progress=on_progress
        )


def _serve_api(
    settings: Settings, folder: "SharedFolder", name: str, listener: socket.socket
) -> int:
    from trivec.build import connect_models
    from trivec.server.server import serve_http

    greeting = Greeting(settings, port=listener.getsockname()[1], say=_say)
    tasks = set[asyncio.Task[None]]()

    async def greet_when_all_serve(models: "Models") -> None:
        """The key is shown earlier: a process may die before all of them are ready."""
        await folder.all_serving(name, count=settings.api_processes)
        if models.leads:
            greeting.ready(models)

    cores = max(1, machine.usable_cores() // settings.api_processes)
    return serve_http(
        settings,
        listener,
        load=partial(connect_models, folder=folder, name=name, cores=cores),
        on_first_key=greeting.first_key,
        on_ready=lambda models: tasks.add(asyncio.create_task(greet_when_all_serve(models))),
    )


class Greeting:
    """The lines for the operator of one server: `first_key` where one is made, then `ready`."""

    def __init__(self, settings: Settings, *, port: int, say: Callable[[str], None]) -> None:
        self._settings = settings
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)  # noqa: S104
        bracketed = f"[{host}]" if ":" in host else host
        self._url = f"{'https' if settings.tls_cert else 'http'}://{bracketed}:{port}"
        self._say = say
        self._bearer: str | None = None  # of the curl line: a new key, or what prints it

    def first_key(self, new_key: "NewKey") -> None:
        """Show a new store's key at once: whatever happens next, it is never shown again.

        On a terminal as it is. Elsewhere stderr is a log that others read, so a file gets it.
        """
        if sys.stderr.isatty():
            self._bearer = new_key.plain
            self._say_fact("key", new_key.plain)
            self._say_fact("", "shown only now; more with: trivec keys create --name NAME")
            return
        from trivec.accounts.keys import write_whole

        file = self._settings.data_dir.absolute() / FIRST_KEY_FILE
        try:
            write_whole(file, f"{new_key.plain}\n".encode(), replaces=True)
        except OSError as fault:
            reason = fault.strerror or fault
            self._say_fact("key", f"made, but {file} cannot be written: {reason}")
            self._say_fact("", f"make it anew with: trivec keys rotate {new_key.key.name}")
            return
        self._bearer = f"$(cat {shlex.quote(str(file))})"
        self._say_fact("key", f"in {file}")
        self._say_fact("", "that only this user can read; keep the key and remove the file")

    def ready(self, models: "Models") -> None:
        settings, choice = self._settings, models.choice
        self._say(f"Trivec {__version__} is ready.")
        for card in models.cards:
            state = "verified" if card.verified else "NOT verified against the catalogue"
            row = f"{card.dimensions} dimensions"
            if card.labels:
                row = "reranker" if card.labels == 1 else f"classifier of {card.labels} classes"
            sizes = f"{row}, {card.token_count_max} tokens a text"
            self._say_fact("model", card.id)
            self._say_fact("", f"{sizes}, files {state}")
            self._say_fact("precision", card.precision)
            if card.id in models.certificates:
                self._say_fact("", models.certificates[card.id].summary)
        workers = f"{models.slot_count} worker{'s' if models.slot_count > 1 else ''}"
        self._say_fact("device", f"{choice.device} with {choice.backend}, {workers}")
        self._say_fact("", choice.reason)
        self._say_fact("listening", self._url)
        if settings.http.page:
            self._say_fact("page", f"{self._url}/")
        if settings.no_auth:
            anywhere = settings.no_auth == "anywhere"
            reach = f"reaches {settings.host}" if anywhere else "is on this machine"
            self._say_fact("keys", f"none: whoever {reach} may use and administer it")

        example: dict[str, object] = {"input": "Hello, world"}
        url = f"{self._url}/v1/embeddings"
        if models.cards[0].labels:
            example = {"query": "a greeting", "documents": ["Hello, world", "Goodbye"]}
            url = f"{self._url}/v1/rerank"
        curl = shlex.join(["curl", "-s", url, "-H", "Content-Type: application/json"])
        if not settings.no_auth:  # the key itself only where it was just made
            bearer = self._bearer or ("$TRIVEC_API_KEY" if settings.api_key else "YOUR_KEY")
            curl += f' -H "Authorization: Bearer {bearer}"'
        body = json.dumps({"model": models.cards[0].id, **example})
        for line in ("", "Try it:", f"  {curl} -d {shlex.quote(body)}", ""):
            self._say(line)

    def _say_fact(self, name: str, value: str) -> None:
        self._say(f"  {name:<10} {value}")


def _say(line: str) -> None:
    """Print to standard error, unless its reader is stuck: serving must go on."""
    if _takes_a_line(sys.stderr):
        sys.stderr.write(f"{line}\n")  # one write: the log's thread has none between line and end
        sys.stderr.flush()


def _takes_a_line(stream: TextIO) -> bool:
    try:
        return bool(select.select((), (stream,), (), 0)[1])
    except (OSError, ValueError):  # no file of the system's, as under a test's runner
        return True
