"""`trivec serve` with several API processes: who is in the crew, and what each of them does."""

import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from trivec.cli.outermost import whole_life
from trivec.core.errors import SettingInvalid
from trivec.server.crew import Crew, Post
from trivec.server.listening import listen_shared, listen_unix
from trivec.server.supervisor import Heart
from trivec.settings import Settings


def run_crew(settings: Settings, *, say: Callable[[str], None]) -> int:
    """Listen, then serve: one engine process, and `api_processes` before it."""
    with _own_folder() as folder:
        roles = Roles(settings, folder / "engine", say)
        calls = listen_unix(roles.path)
        listeners = listen_shared(settings.host, settings.port, count=settings.api_processes)
        crew = Crew(
            [
                Post(f"api-{number}", partial(roles.speak_http, number, listener), listener)
                for number, listener in enumerate(listeners, start=1)
            ],
            engine=Post("engine", partial(roles.drive, calls), calls),
            heartbeat_s_max=settings.life.heartbeat_s_max,
            say=say,
        )
        return crew.run()


@contextmanager
def _own_folder() -> Iterator[Path]:
    """A folder that nobody else may look into. Raises `SettingInvalid`."""
    try:
        made = tempfile.TemporaryDirectory(prefix="trivec-")
    except OSError as fault:
        raise SettingInvalid(
            f"cannot make a folder for temporary files: {fault}. "
            "Set TMPDIR to a folder that can be written."
        ) from fault
    with made as folder:
        yield Path(folder)


@dataclass(frozen=True, slots=True)
class Roles:
    """What the processes do, each once it is born."""

    settings: Settings
    path: Path  # of the socket on which the engine process is called
    say: Callable[[str], None]

    def drive(self, calls: socket.socket, heart: Heart) -> int:
        """Be the engine process."""

        def life() -> int:
            from trivec.build import check_models, load_models
            from trivec.server.engine_process import live_as_engine
            from trivec.server.machine import usable_cores

            check_models(self.settings)
            load = partial(load_models, self.settings, cores=usable_cores(), hears_text=False)
            return live_as_engine(self.settings, calls, load=load, heart=heart)

        return whole_life(self.settings, life, say=self.say, process="engine")

    def speak_http(self, number: int, listener: socket.socket, heart: Heart) -> int:
        """Be an API process."""

        def life() -> int:
            from trivec.build import Running
            from trivec.build_several import DistantModels, call_engine
            from trivec.cli.greeting import Greeting
            from trivec.server.machine import usable_cores
            from trivec.server.serving import live

            class GreetingForAll(Greeting):
                """Of a key at once, since a process may die before all of them are ready."""

                def ready(self, models: Running) -> None:
                    assert isinstance(models, DistantModels)
                    greets = partial(super().ready, models)
                    models.link.serving(greets if models.makes_first_key else lambda: None)

            cores = max(1, usable_cores() // self.settings.api_processes)
            return live(
                self.settings,
                listener,
                load=partial(call_engine, path=self.path, number=number, cores=cores),
                heart=heart,
                herald=GreetingForAll(self.settings, port=listener.getsockname()[1], say=self.say),
            )

        return whole_life(self.settings, life, say=self.say, process=f"api-{number}")
