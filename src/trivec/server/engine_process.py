"""The engine process: loads the models, answers API processes over a socket, and leaves when told.

It speaks no HTTP and keeps no books. Whoever supervises it starts it again when its device is lost.
"""

import asyncio
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress

from trivec.build import Models, loaded_event
from trivec.build_several import Backroom, engine_end, open_backroom
from trivec.core.events import PhaseChanged
from trivec.core.health import Phase
from trivec.server.collecting import spare_what_stays
from trivec.server.crew import IGNORED, STOPS
from trivec.server.life import BROKEN_EXIT_CODE, REFUSAL_S_MAX
from trivec.server.supervisor import BEAT_EVERY_S, Heart
from trivec.settings import Settings

LEAVE_S_MAX = 5.0  # for the workers to end, before leaving all the same


class EngineProcess:
    """One life of it. Born inside the event loop."""

    def __init__(
        self,
        settings: Settings,
        listener: socket.socket,
        *,
        load: Callable[[Backroom], Models],
        heart: Heart,
    ) -> None:
        self._settings = settings
        self._listener = listener
        self._load = load
        self._heart = heart
        self._room = open_backroom(settings)
        self._asked = asyncio.Event()
        self._is_ready = False

    async def run(self) -> int:
        """Live until the end; the exit code to leave with. Raises what loading raised."""
        loop = asyncio.get_running_loop()
        for number in STOPS:
            loop.add_signal_handler(number, self._asked.set)
        for number in (signal.SIGHUP, *IGNORED):
            signal.signal(number, signal.SIG_IGN)
        self._report("loading", "loading")
        self._heart.tie()
        beating = asyncio.create_task(self._beat(), name="heartbeat")
        began_s = time.monotonic()
        loading = asyncio.create_task(asyncio.to_thread(self._load, self._room), name="loading")
        asked = asyncio.create_task(self._asked.wait(), name="asked")
        try:
            await asyncio.wait((loading, asked), return_when=asyncio.FIRST_COMPLETED)
            if not loading.done():
                return 0
            models = loading.result()
            for model in models.loaded:
                load_s = time.monotonic() - began_s
                self._room.observer.observe(loaded_event(model, load_s=load_s))
            return await self._serve(models, asked)
        finally:
            beating.cancel()
            asked.cancel()

    async def _serve(self, models: Models, asked: "asyncio.Task[bool]") -> int:
        end = engine_end(self._room, models)
        models.workers.start()
        end.start(self._listener)
        spare_what_stays()
        self._is_ready = True
        self._heart.beat(ready=True)
        self._report("ready", "ok")
        lost = asyncio.create_task(models.workers.lost(), name="watch")
        await asyncio.wait((lost, asked), return_when=asyncio.FIRST_COMPLETED)
        self._is_ready = False
        if lost.done():
            self._report("stopped", lost.result())
            await end.stop(REFUSAL_S_MAX)  # everyone has been refused by now, and reads so
            return BROKEN_EXIT_CODE
        lost.cancel()
        self._report("stopped", "asked to stop")
        with suppress(TimeoutError):
            async with asyncio.timeout(LEAVE_S_MAX):
                await models.workers.stop(0)
        await end.stop(REFUSAL_S_MAX)
        return 0

    def _report(self, phase: Phase, reason: str) -> None:
        self._room.observer.observe(PhaseChanged(phase, reason))

    async def _beat(self) -> None:
        while True:
            self._heart.beat(ready=self._is_ready)
            await asyncio.sleep(BEAT_EVERY_S)


def live_as_engine(
    settings: Settings,
    listener: socket.socket,
    *,
    load: Callable[[Backroom], Models],
    heart: Heart,
) -> int:
    """Serve API processes until the end; the exit code. Raises `StartError`."""

    async def life() -> int:
        return await EngineProcess(settings, listener, load=load, heart=heart).run()

    # Not asyncio.run: it would wait for the thread that loads a model, and we leave the process.
    return asyncio.new_event_loop().run_until_complete(life())
