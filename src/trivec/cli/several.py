"""`trivec serve` with `api_processes` above 1: one engine process, and those before it."""

import asyncio
import os
import socket
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from trivec.core.errors import SettingInvalid
from trivec.ipc.folder import SharedFolder
from trivec.server.machine import listen_shared, usable_cores
from trivec.server.processes import ChildProcess, Processes, exit_code_of
from trivec.settings import Settings

SOCKET_PATH_MAX = 100  # bytes of a Unix socket's path that every system takes, less its name


def serve_several(settings: Settings, *, say: Callable[[str], None]) -> int:
    """Listen, then serve until the end; the exit code. Raises `SettingInvalid`."""
    try:
        made = tempfile.TemporaryDirectory(prefix="trivec-")  # that nobody else may look into
    except OSError as fault:
        raise SettingInvalid(
            f"cannot make a folder for temporary files: {fault}. "
            "Set TMPDIR to a folder that can be written."
        ) from fault
    with made as path:
        if len(os.fsencode(path)) > SOCKET_PATH_MAX - len("/engine"):
            raise SettingInvalid(
                f"cannot make a socket at {path}: its path is too long. "
                "Set TMPDIR to a folder with a short path that can be written."
            )
        folder = SharedFolder(Path(path))
        listeners = listen_shared(settings.host, settings.port, count=settings.api_processes)
        api = [
            ChildProcess(
                f"api-{number}",
                partial(_serve_api, settings, folder, f"api-{number}", listener, say),
                listener,
            )
            for number, listener in enumerate(listeners, start=1)
        ]
        engine = ChildProcess("engine", partial(_serve_engine, settings, folder, say), None)
        return Processes(api, engine, say=say).run()


def _serve_engine(settings: Settings, folder: SharedFolder, say: Callable[[str], None]) -> int:
    def life() -> int:
        from trivec.build import check_models, load_models
        from trivec.server.engine_process import run_engine

        check_models(settings)
        load = partial(load_models, settings, cores=usable_cores(), takes_text=False)
        return run_engine(settings, folder, load=load)

    return exit_code_of(life, settings, say=say, process="engine")


def _serve_api(
    settings: Settings,
    folder: SharedFolder,
    name: str,
    listener: socket.socket,
    say: Callable[[str], None],
) -> int:
    def life() -> int:
        from trivec.build import Models
        from trivec.build_several import connect_models
        from trivec.cli.greeting import Greeting
        from trivec.server.server import serve_http

        greeting = Greeting(settings, port=listener.getsockname()[1], say=say)
        tasks = set[asyncio.Task[None]]()

        async def greet_when_all_serve(models: Models) -> None:
            """The key was shown before: a process may die before all of them are ready."""
            await folder.all_serving(name, count=settings.api_processes)
            if models.makes_first_key:
                greeting.ready(models)

        cores = max(1, usable_cores() // settings.api_processes)
        return serve_http(
            settings,
            listener,
            load=partial(connect_models, folder=folder, name=name, cores=cores),
            on_first_key=greeting.first_key,
            on_ready=lambda models: tasks.add(asyncio.create_task(greet_when_all_serve(models))),
        )

    return exit_code_of(life, settings, say=say, process=name)
