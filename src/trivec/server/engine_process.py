"""The engine process of several: loads the models, answers API processes, and leaves when told.

It speaks no HTTP and keeps no accounts.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress

from trivec.build import ENGINE, Models, Parts, open_parts, served
from trivec.core.events import PhaseChanged
from trivec.core.health import Phase
from trivec.ipc.folder import SharedFolder
from trivec.ipc.server import EngineServer
from trivec.server.machine import freeze_garbage_collector
from trivec.server.processes import BROKEN, STOPS
from trivec.settings import Settings

REFUSAL_S_MAX = 2.0  # for sending what was answered, before leaving all the same
LEAVE_S_MAX = 5.0  # for the workers to end, before leaving all the same

_log = logging.getLogger("trivec.server")


def run_engine(settings: Settings, folder: SharedFolder, *, load: Callable[[Parts], Models]) -> int:
    """Load and serve until told to stop; the exit code. Raises what *load* raises."""
    # Not asyncio.run: it would wait for the thread that loads a model, and we leave the process.
    return asyncio.new_event_loop().run_until_complete(_run(settings, folder, load))


async def _run(settings: Settings, folder: SharedFolder, load: Callable[[Parts], Models]) -> int:
    parts = open_parts(settings)
    told = asyncio.Event()
    for number in STOPS:
        asyncio.get_running_loop().add_signal_handler(number, told.set)

    def report(phase: Phase, reason: str) -> None:
        parts.observer.observe(PhaseChanged(phase, reason))

    report("loading", "loading")
    began_s = time.monotonic()
    stopping = asyncio.create_task(told.wait())
    loading = asyncio.create_task(asyncio.to_thread(load, parts))
    await asyncio.wait((loading, stopping), return_when=asyncio.FIRST_COMPLETED)
    if not loading.done():
        return 0
    models = loading.result()
    for event in models.loaded_events(load_s=time.monotonic() - began_s):
        parts.observer.observe(event)
    freeze_garbage_collector()
    models.workers.start()
    server = EngineServer([models.embedders[model.card.id] for model in models.loaded])
    folder.write_served(served(models))
    server.start(folder.endpoint)
    report("ready", "ok")
    writing = asyncio.create_task(folder.write_metrics_forever(ENGINE, parts.metrics.page))
    lost = [asyncio.create_task(one) for one in (models.workers.lost(), server.lost())]
    await asyncio.wait((*lost, stopping), return_when=asyncio.FIRST_COMPLETED)
    writing.cancel()
    reason = next((one.result() for one in lost if one.done()), None)
    if reason is not None:
        _log.critical("cannot go on: %s; leaving with exit code %d", reason, BROKEN)
        report("stopped", reason)
        await server.stop(REFUSAL_S_MAX)  # every request has been refused by now, and reads so
        return BROKEN
    report("stopped", "asked to stop")
    with suppress(TimeoutError):
        async with asyncio.timeout(LEAVE_S_MAX):
            await models.workers.stop(0)
    await server.stop(REFUSAL_S_MAX)
    return 0
