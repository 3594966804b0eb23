"""Processes that serve, over HTTP or as the engine of several: from the first signal to the exit code.

Each loads its models, serves, drains and leaves.
"""

import asyncio
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping
from contextlib import suppress
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec

import numpy as np

from trivec.accounts import NewKey
from trivec.build import (
    ENGINE,
    Models,
    Parts,
    ServerParts,
    open_parts,
    open_server_parts,
    served,
)
from trivec.core.errors import BusyError, SettingInvalid, StoreUnavailable
from trivec.core.events import PhaseChanged
from trivec.core.health import HEALTHY, Health, Phase
from trivec.core.ports import Embedder
from trivec.core.types import Float32Array, LongText, Output, SparseVector
from trivec.server.granian_server import GranianServer, SwappableApp, probes_only
from trivec.server.machine import (
    check_certificate,
    freeze_garbage_collector,
    listen,
    tell_watchdog_forever,
    usable_memory_bytes,
)
from trivec.server.processes import BROKEN, IGNORED, INTERRUPTED, SAME_REQUEST_S, STOPS
from trivec.settings import Settings

if TYPE_CHECKING:
    from trivec.ipc.folder import SharedFolder

PROBE_CONNECTIONS_MAX = 64
PROBE_IDLE_S_MAX = 5
REFUSAL_S_MAX = 2.0  # for answering 503 to all that still wait, before leaving all the same
ENGINE_REFUSAL_S = 0.5  # of that, for the engine's own refusals to be recorded and sent
LEAVE_S_MAX = 5.0  # for the ledger and the workers to end, before leaving all the same

SELF_TEST = "The canary sings the same three notes every half minute: 一、二、三 · один, два, три."
SELF_TEST_COSINE_MIN = 0.9999

SELF_TEST_S_MAX = 60.0  # for waiting in a busy queue, and computing
START_RETRY_S_MAX = 5.0
STOPPING: Mapping[Phase | None, str] = {
    "draining": "draining: asked to stop",
    "stopped": "draining: about to leave",
}

P = ParamSpec("P")

_log = logging.getLogger("trivec.server")


class SelfTest:
    """A fixed text embedded again and again, whose vector must stay the same for each model."""

    def __init__(self, embedders: Iterable[Embedder]) -> None:
        by_id = {embedder.card.id: embedder for embedder in embedders}  # an alias is the same model
        self._embedders = tuple(by_id.values())
        self._first: dict[str, Float32Array] = {}  # by model, [dimensions]
        self._problems: dict[str, str] = {}

    @property
    def problems(self) -> tuple[str, ...]:
        """What the last check found wrong, a sentence a model."""
        return tuple(self._problems.values())

    async def start(self) -> None:
        """Keep each model's first vector; this warms the models up, too."""
        for embedder in self._embedders:
            while embedder.card.id not in self._first:
                try:
                    self._first[embedder.card.id] = await self._embed(embedder)
                except BusyError as busy:  # of an engine process that serves others already
                    await asyncio.sleep(min(busy.retry_after_s, START_RETRY_S_MAX))

    async def check(self) -> None:
        """Embed the text again and compare. A full queue proves nothing and changes nothing."""
        for embedder in self._embedders:
            model = embedder.card.id
            try:
                async with asyncio.timeout(SELF_TEST_S_MAX):
                    now, first = await self._embed(embedder), self._first[model]
            except BusyError:
                continue
            except TimeoutError:
                self._problems[model] = f"the self-test of {model} has not come back"
                continue
            except Exception as fault:  # whatever it is, the model does not serve
                self._problems[model] = f"the self-test of {model} failed: {fault}"
                continue
            with np.errstate(invalid="ignore", divide="ignore"):  # NaN is below every bound
                norms = np.linalg.norm(now) * np.linalg.norm(first)
                cosine = np.dot(now, first) / norms if now.shape == first.shape else 0.0
            if cosine >= SELF_TEST_COSINE_MIN:
                self._problems.pop(model, None)
            else:
                self._problems[model] = (
                    f"the self-test of {model} changed: cosine {cosine:.6f} to its first vector, "
                    f"at least {SELF_TEST_COSINE_MIN} expected"
                )

    async def _embed(self, embedder: Embedder) -> Float32Array:
        sequences = await embedder.tokenizer.tokenize([SELF_TEST], long_text=LongText.CUT_END)
        output = embedder.card.main_output
        row = (await embedder.embed(sequences, output)).vectors[output][0]
        assert row is not None, "what was asked for is there"
        numbers = row.weights if isinstance(row, SparseVector) else row.reshape(-1)
        # A score may be one number, of which a cosine would tell the sign only.
        return np.append(numbers, np.float32(1.0)) if output is Output.SCORE else numbers


class HttpServer:
    """One life of the process, from its first connection to its exit code, on one event loop."""

    def __init__(
        self,
        settings: Settings,
        listener: socket.socket,
        *,
        load: Callable[[ServerParts], Models],
        on_first_key: Callable[[NewKey], None],
        on_ready: Callable[[Models], None],
    ) -> None:
        self._settings = settings
        self._load = load
        self._on_first_key = on_first_key
        self._on_ready = on_ready
        self._parts = open_server_parts(settings, machine_bytes=usable_memory_bytes())
        self._phase: Phase | None = None
        self._models: Models | None = None
        self._self_test = SelfTest(())
        self._tasks: set[asyncio.Task[str | None]] = set()  # cancelled at the end

        loop = asyncio.get_running_loop()
        self._stop_asked: asyncio.Future[None] = loop.create_future()
        self._stop_asked_again: asyncio.Future[None] = loop.create_future()
        self._lost: asyncio.Future[str] = loop.create_future()  # why nothing can be served any more
        self._closed: asyncio.Future[None] = loop.create_future()  # the last connection is closed
        self._last_signal_s = float("-inf")
        self._was_interrupted = False
        self._skips_grace = False

        self._app = SwappableApp(self._parts.app({}, self.health))
        self._listener = listener
        self._is_listening = True
        self._granian: GranianServer
        self._granian_tasks: set[asyncio.Task[None]] = set()

    def _start_granian(self) -> None:
        """Serve what connects from now on, with the certificate as its files are."""
        cert, key = self._settings.tls_cert, self._settings.tls_key
        tls = (cert, key) if cert and key else None
        # With TLS the next one, for a new certificate, takes the same socket.
        listener = self._listener.dup() if tls else self._listener
        granian = GranianServer(self._app, listener, limits=self._settings.http, tls=tls)
        self._granian = granian
        task = asyncio.create_task(granian.serve(), name="granian")
        self._granian_tasks.add(task)

        def ended(task: "asyncio.Task[None]") -> None:
            self._granian_tasks.discard(task)
            if granian is not self._granian:
                _log.warning("the certificate was read again")
                return
            if self._is_listening:
                self._lose("the HTTP server ended by itself")
            self._closed.set_result(None)

        task.add_done_callback(ended)

    def _stop_listening(self) -> None:
        self._is_listening = False
        self._granian.stop()
        self._listener.close()

    def health(self) -> Health:
        """What probes and every request see; reads results and computes nothing."""
        is_lost = self._lost.done()
        reasons = [self._lost.result()] if is_lost else []
        if self._phase == "loading":
            reasons.append(f"loading: {', '.join(self._settings.models) or 'the default model'}")
        elif self._phase in STOPPING:
            reasons.append(STOPPING[self._phase])
        reasons += self._self_test.problems
        if not self._parts.accounts.health().writable:
            # Probes need no key, and the store's own words name hosts: those are in the log.
            reasons.append("the store cannot be written; the log says why")
        if self._models is not None:
            reasons += self._models.problems()
        if not reasons:
            return HEALTHY
        return Health(
            self._phase or "loading", alive=not is_lost, ready=False, reason="; ".join(reasons)
        )

    async def run(self) -> int:
        """Serve until the end; the exit code. Raises what loading raised."""
        loop, settings, probes = asyncio.get_running_loop(), self._settings, None
        if settings.probe_port is not None:  # clients cannot use its connections up
            several = settings.api_processes > 1
            listener = listen(
                settings.host, settings.probe_port, shared=several, flag="--probe-port"
            )
            limits = settings.http.model_copy(
                update={"connections_max": PROBE_CONNECTIONS_MAX, "idle_s_max": PROBE_IDLE_S_MAX}
            )
            probes = GranianServer(probes_only(self._app), listener, limits=limits, tls=None)
        for number in STOPS:
            loop.add_signal_handler(number, self._stop_signal, number)
        for number in IGNORED:
            loop.add_signal_handler(number, _log.warning, "%s is ignored", number.name)
        loop.add_signal_handler(signal.SIGHUP, self._reload_certificate)
        self._parts.accounts.start()
        self._start(self._parts.accounts.lost(), "watch ledger")
        self._start(tell_watchdog_forever(), "watchdog")
        self._enter("loading")
        self._start_granian()
        if probes is not None:
            self._start(probes.serve(), "probes")
        loading = asyncio.create_task(self._load_models(), name="loading")
        try:
            await _first(loading, self._stop_asked, self._lost)
            if loading.done() and not self._lost.done():
                await self._serve_and_drain(loading.result())
            exit_code = 0
            if self._lost.done():
                exit_code, reason = BROKEN, self._lost.result()
                _log.critical("cannot go on: %s; leaving with exit code %d", reason, exit_code)
            self._enter("stopped")
            return exit_code
        finally:
            await self._leave()

    async def _load_models(self) -> Models:
        began_s = time.monotonic()
        models = await asyncio.to_thread(self._load, self._parts)
        models.workers.start()
        self._start(models.workers.lost(), "watch workers")
        self._self_test = SelfTest(models.embedders.values())
        await self._self_test.start()
        if models.leads:
            with suppress(StoreUnavailable):  # another start will make it
                new_key = await self._parts.accounts.create_first_key()
                if new_key is not None:
                    self._on_first_key(new_key)
        for event in models.loaded_events(load_s=time.monotonic() - began_s):
            self._parts.observer.observe(event)
        self._models = models
        self._app.app = self._parts.app(
            models.embedders, self.health, metrics_page=models.metrics_page
        )
        self._start(self._self_test_forever(), "self-test")
        return models

    async def _self_test_forever(self) -> None:
        while True:
            await asyncio.sleep(self._settings.life.self_test_every_s)
            await self._self_test.check()

    async def _serve_and_drain(self, models: Models) -> None:
        life = self._settings.life
        freeze_garbage_collector()
        self._enter("ready")
        self._on_ready(models)
        runner = self._parts.batch_runner(models.embedders) if models.leads else None
        batches = None if runner is None else self._start(runner.run(), "batches")
        await _first(self._stop_asked, self._lost)
        if batches is not None:
            batches.cancel()  # what it is at is free for another server, or for the next start

        hurries = (self._stop_asked_again, self._lost, self._closed)
        if not self._lost.done():
            self._enter("draining")
            if not self._skips_grace:
                await _first(*hurries, timeout_s=life.drain_grace_s)
        if not any(one.done() for one in hurries):
            self._stop_listening()
            await _first(*hurries, timeout_s=life.drain_s_max)

        if not self._closed.done():  # every request still in flight is answered 503
            self._enter("stopped")
            self._stop_listening()
            self._start(self._app.cancel_requests(after_s=ENGINE_REFUSAL_S), "cancel requests")
            if not self._lost.done():
                self._start(models.workers.stop(0), "stop workers")
            await _first(self._closed, timeout_s=REFUSAL_S_MAX)

    async def _leave(self) -> None:
        """Stop the background tasks, then let the ledger finish its writes."""
        for task in self._tasks:
            task.cancel()
        self._stop_listening()
        if self._granian_tasks:
            await asyncio.wait(self._granian_tasks, timeout=REFUSAL_S_MAX)
        if self._models is not None and not self._lost.done():
            with suppress(TimeoutError):
                async with asyncio.timeout(LEAVE_S_MAX):
                    await self._models.workers.stop(0)
        with suppress(TimeoutError):
            async with asyncio.timeout(LEAVE_S_MAX):
                await asyncio.to_thread(self._parts.close)

    def _enter(self, phase: Phase) -> None:
        if phase != self._phase:
            self._phase = phase
            self._parts.observer.observe(PhaseChanged(phase, self.health().reason))

    def _lose(self, reason: str) -> None:
        if not self._lost.done():
            self._lost.set_result(reason)

    def _start(
        self, work: Coroutine[None, None, str | None], name: str
    ) -> "asyncio.Task[str | None]":
        """Let *work* run in the background; why we are lost, where it fails or returns a reason."""

        def ended(task: "asyncio.Task[str | None]") -> None:
            self._tasks.discard(task)
            if not task.cancelled():
                fault = task.exception()
                reason = f"the task {name!r} failed: {fault!r}" if fault else task.result()
                if reason is not None:
                    self._lose(reason)

        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(ended)
        return task

    def _stop_signal(self, number: signal.Signals) -> None:
        """Drain; a second signal cuts that short, a second Ctrl-C ends the process at once."""
        now_s = time.monotonic()
        if now_s - self._last_signal_s < SAME_REQUEST_S:
            return
        self._last_signal_s = now_s
        if number is signal.SIGINT:
            if self._was_interrupted:  # every answered request is in the ledger
                os._exit(INTERRUPTED)
            self._was_interrupted = True
            self._skips_grace = self._phase == "ready" and self._app.is_idle
        if not self._stop_asked.done():
            self._stop_asked.set_result(None)
        elif not self._stop_asked_again.done():
            self._stop_asked_again.set_result(None)

    def _reload_certificate(self) -> None:
        """Take new connections with the certificate as its files are now; finish the old ones."""
        cert, key = self._settings.tls_cert, self._settings.tls_key
        if not (cert and key) or self._phase not in ("loading", "ready"):
            _log.warning("SIGHUP is ignored: there is no certificate to read again")
            return
        former = self._granian
        try:
            check_certificate(cert, key)
            self._start_granian()
        except (SettingInvalid, OSError) as fault:
            _log.error("the certificate is still the old one: %s", fault)
        else:
            former.stop()


async def _first(*futures: "asyncio.Future[Any]", timeout_s: float | None = None) -> None:
    """Wait until one of *futures* is done, at most *timeout_s*."""
    await asyncio.wait(futures, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)


def on_own_loop(main: Callable[P, Coroutine[None, None, int]]) -> Callable[P, int]:
    """Let *main* run on an event loop of its own, until it returns."""

    @wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        # Not asyncio.run: it would wait for the thread that loads a model, and we leave the process.
        return asyncio.new_event_loop().run_until_complete(main(*args, **kwargs))

    return run


@on_own_loop
async def serve_http(
    settings: Settings,
    listener: socket.socket,
    *,
    load: Callable[[ServerParts], Models],
    on_first_key: Callable[[NewKey], None],
    on_ready: Callable[[Models], None],
) -> int:
    """Serve until the end; the exit code. Raises `StartError` where serving cannot begin.

    *load* loads the models in a thread, while the server already listens and answers 503;
    *on_first_key* gets the key that a new store begins with, which is never shown again.
    """
    server = HttpServer(settings, listener, load=load, on_first_key=on_first_key, on_ready=on_ready)
    return await server.run()


@on_own_loop
async def serve_engine(
    settings: Settings, folder: "SharedFolder", *, load: Callable[[Parts], Models]
) -> int:
    """Load the models and answer API processes until told to stop; the exit code.

    The engine process speaks no HTTP and keeps no accounts. Raises what *load* raises.
    """
    from trivec.ipc.server import EngineServer

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
    await _first(loading, stopping)
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
    await _first(*lost, stopping)
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
