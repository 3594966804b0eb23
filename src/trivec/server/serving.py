"""The serving process: listen, load, serve, drain, leave.

A thin loop around `life`: it waits for the next happening, asks what stage follows, and does what
entering that stage takes. It owns the event loop, the signals and every background task.
"""

import asyncio
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Protocol

from trivec.accounts import NewKey
from trivec.build import Front, Running, loaded_event, open_front
from trivec.core.errors import SettingInvalid, StoreUnavailable
from trivec.core.events import PhaseChanged
from trivec.core.health import Health
from trivec.server.canary import Canary
from trivec.server.carrier import Carrier
from trivec.server.collecting import spare_what_stays
from trivec.server.door import Door, ProbesOnly
from trivec.server.life import REFUSAL_S_MAX, Happening, Life, Stage, health, stage_s_max
from trivec.server.listening import check_certificate, listen
from trivec.server.machine import usable_memory_bytes
from trivec.server.processes import IGNORED, INTERRUPTED, STOPS
from trivec.server.supervisor import BEAT_EVERY_S, SAME_REQUEST_S, Heart
from trivec.settings import Settings

PROBE_CONNECTIONS_MAX = 64
PROBE_IDLE_S_MAX = 5
SEND_OUT_S = 0.5  # for the engine's own refusals to be written down and sent
LEAVE_S_MAX = 5.0  # for the ledger and the workers to end, before leaving all the same

_log = logging.getLogger("trivec.server")


class Herald(Protocol):
    """Who tells the operator."""

    def key(self, new_key: NewKey) -> None:
        """The first key of a new store was made, and nobody else ever hears of it."""

    def ready(self, models: Running) -> None:
        """Clients may come."""


class Serving:
    """One serving process, from its first listen to its exit code. Born inside the event loop."""

    def __init__(
        self,
        settings: Settings,
        listener: socket.socket,
        *,
        load: Callable[[Front], Running],
        heart: Heart | None,
        herald: Herald,
    ) -> None:
        self._settings = settings
        self._load_all = load
        self._heart = heart
        self._herald = herald
        self._life = Life()
        self._happenings: asyncio.Queue[Happening] = asyncio.Queue()
        self._asked_at_s = float("-inf")
        self._was_interrupted = False
        self._front: Front = open_front(settings, machine_bytes=usable_memory_bytes())
        self._models: Running | None = None
        self._hung: str | None = None
        self._canary = Canary(())
        self._tasks: set[asyncio.Task[None]] = set()
        self._door = Door(self._front.app({}, self.health))
        self._listener = listener
        self._former: set[asyncio.Task[None]] = set()  # finish what came by an older certificate
        self._carrier = self._new_carrier()
        self._probes = None if settings.probe_port is None else self._open_probes(settings)

    def _open_probes(self, settings: Settings) -> Carrier:
        """A few connections on a port of their own, so that clients cannot take them all.

        It answers until the process leaves, also while it drains.
        """
        assert settings.probe_port is not None
        several = settings.api_processes > 1
        listener = listen(settings.host, settings.probe_port, shared=several, flag="--probe-port")
        limits = settings.http.model_copy(
            update={"connections_max": PROBE_CONNECTIONS_MAX, "idle_s_max": PROBE_IDLE_S_MAX}
        )
        return Carrier(ProbesOnly(self._door), listener, limits=limits, tls=None)

    def _new_carrier(self) -> Carrier:
        cert, key = self._settings.tls_cert, self._settings.tls_key
        tls = (cert, key) if cert and key else None
        # With TLS there may be another after it, on the same socket.
        listener = self._listener.dup() if tls else self._listener
        return Carrier(self._door, listener, limits=self._settings.http, tls=tls)

    def _carry(self, carrier: Carrier) -> "asyncio.Task[None]":
        carrying = asyncio.create_task(carrier.serve(), name="carrier")
        carrying.add_done_callback(self._emptied)
        return carrying

    def _emptied(self, _: "asyncio.Task[None]") -> None:
        self._tell(Happening.EMPTY)

    def _stop_listening(self) -> None:
        self._carrier.stop()
        self._listener.close()

    def health(self) -> Health:
        """One look at the process; reads results and computes nothing."""
        books = self._front.accounts.health()
        # Probes need no key, and the store's own words name hosts: those are in the log.
        store = () if books.writable else ("the store cannot be written; the log says why",)
        return health(
            self._life,
            loading=", ".join(self._settings.models) or "the default model",
            hung=self._hung,
            troubles=(
                *self._canary.troubles,
                *store,
                *(self._models.troubles if self._models else ()),
            ),
        )

    async def run(self) -> int:
        """Live until the end; the exit code to leave with. Raises what loading raised."""
        loop = asyncio.get_running_loop()
        for number in STOPS:
            loop.add_signal_handler(number, self._ask, number)
        for number in IGNORED:
            loop.add_signal_handler(number, _log.warning, "%s is ignored", number.name)
        loop.add_signal_handler(signal.SIGHUP, self._reload_certificate)
        self._front.accounts.start()
        self._report_phase()
        self._carrying = self._carry(self._carrier)
        if self._probes is not None:
            self._start(self._probes.serve(), "probes")
        loading = asyncio.create_task(self._load(), name="loading")
        loading.add_done_callback(self._loaded)
        self._start(self._beat(), "heartbeat")
        try:
            while self._life.stage is not Stage.GONE:
                happening = await self._next_happening()
                before, self._life = self._life, self._life.after(happening)
                if self._life.stage is not before.stage:
                    self._enter(self._life.stage)
                if self._life.phase != before.phase and happening is not Happening.FAILED:
                    self._report_phase()
            if loading.done():
                loading.result()
            return self._life.exit_code
        finally:
            await self._leave()

    def _tell(self, happening: Happening) -> None:
        self._happenings.put_nowait(happening)

    def _ask(self, number: signal.Signals) -> None:
        now_s, before_s = time.monotonic(), self._asked_at_s
        if now_s - before_s < SAME_REQUEST_S:
            return
        self._asked_at_s = now_s
        if number is not signal.SIGINT:
            self._tell(Happening.ASKED)
        elif self._was_interrupted:  # all that was answered is in the ledger
            os._exit(INTERRUPTED)
        else:
            self._was_interrupted = True
            is_idle = self._life.stage is Stage.SERVING and self._door.is_idle
            self._tell(Happening.INTERRUPTED if is_idle else Happening.ASKED)

    def _reload_certificate(self) -> None:
        """Take new connections with the certificate as its files are now; finish the old ones."""
        cert, key = self._settings.tls_cert, self._settings.tls_key
        if not (cert and key) or self._life.stage not in (Stage.LOADING, Stage.SERVING):
            _log.warning("SIGHUP is ignored: there is no certificate to read again")
            return
        try:
            check_certificate(cert, key)
            carrier = self._new_carrier()
        except (SettingInvalid, OSError) as fault:
            _log.error("the certificate is still the old one: %s", fault)
            return
        before, self._carrier = self._carrier, carrier
        old, self._carrying = self._carrying, self._carry(carrier)
        old.remove_done_callback(self._emptied)
        self._former.add(old)
        old.add_done_callback(self._forget_former)
        before.stop()

    def _forget_former(self, old: "asyncio.Task[None]") -> None:
        """What came by the older certificate is through."""
        self._former.discard(old)
        _log.warning("the certificate was read again")

    async def _next_happening(self) -> Happening:
        stage_s = stage_s_max(self._life.stage, self._settings.life)
        try:
            return await asyncio.wait_for(self._happenings.get(), stage_s)
        except TimeoutError:
            return Happening.TIME_UP

    def _report_phase(self) -> None:
        look = self.health()
        self._front.observer.observe(PhaseChanged(look.phase, look.reason))

    def _enter(self, stage: Stage) -> None:
        if stage is Stage.SERVING:
            spare_what_stays()
            self._beat_once()  # whoever kills it now kills a process that had been ready
            assert self._models is not None
            self._herald.ready(self._models)
        elif stage is Stage.FINISHING:
            self._stop_listening()
        elif stage is Stage.REFUSING:
            self._stop_listening()
            self._start(self._door.send_out(after_s=SEND_OUT_S), "send-out")
            if self._models is not None and self._hung is None:
                self._start(self._models.workers.stop(0), "refuse")

    async def _load(self) -> None:
        began_s = time.monotonic()
        models = await asyncio.to_thread(self._load_all, self._front)
        models.workers.start()
        self._canary = Canary(models.embedders.values())
        await self._canary.learn()
        if models.makes_first_key:
            await self._make_first_key()
        for model in models.loaded:
            load_s = time.monotonic() - began_s
            self._front.observer.observe(loaded_event(model, load_s=load_s))
        self._models = models
        self._door.app = self._front.app(models.embedders, self.health, page=models.page)
        self._start(self._sing(), "canary")
        self._start(self._watch(models), "watch")

    async def _make_first_key(self) -> None:
        """The key of a new store; one that is away for now waits for another start."""
        try:
            new_key = await self._front.accounts.create_first_key()
        except StoreUnavailable:
            return
        if new_key is not None:
            self._herald.key(new_key)

    def _loaded(self, loading: "asyncio.Task[None]") -> None:
        failed = loading.cancelled() or loading.exception() is not None
        self._tell(Happening.FAILED if failed else Happening.LOADED)

    async def _sing(self) -> None:
        """Check the canary for ever."""
        while True:
            await asyncio.sleep(self._settings.life.canary_every_s)
            await self._canary.check()

    async def _watch(self, models: Running) -> None:
        """Leave, to be started again, when a worker hangs or its device is gone."""
        self._hung = await models.workers.lost()
        self._tell(Happening.HUNG)

    async def _beat(self) -> None:
        """Tell the supervisor, once a second, that the event loop turns."""
        if self._heart is None:
            return
        self._heart.tie()
        while True:
            self._beat_once()
            await asyncio.sleep(BEAT_EVERY_S)

    def _beat_once(self) -> None:
        if self._heart is not None:
            self._heart.beat(ready=self._life.stage is Stage.SERVING)

    def _start(self, work: Coroutine[None, None, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _leave(self) -> None:
        """Stop what runs in the background, then write down what is on its way to the ledger."""
        for task in self._tasks:
            task.cancel()
        self._stop_listening()
        await asyncio.wait([self._carrying], timeout=REFUSAL_S_MAX)
        with suppress(TimeoutError):
            async with asyncio.timeout(LEAVE_S_MAX):
                if self._models is not None and self._hung is None:
                    await self._models.workers.stop(0)
                await asyncio.to_thread(self._front.close)


def live(
    settings: Settings,
    listener: socket.socket,
    *,
    load: Callable[[Front], Running],
    heart: Heart | None,
    herald: Herald,
) -> int:
    """Serve until the end; the exit code. Raises `StartError` where serving cannot begin.

    *load* loads the models, in a thread of its own, while the server already listens; *herald*
    hears of the first key as soon as one was made, and that they are ready.
    """

    async def life() -> int:
        serving = Serving(settings, listener, load=load, heart=heart, herald=herald)
        return await serving.run()

    # Not asyncio.run: it would wait for the thread that loads a model, and we leave the process.
    return asyncio.new_event_loop().run_until_complete(life())
