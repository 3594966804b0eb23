"""Ray Serve application: `app` builds it of an ingress deployment and one deployment for each model.

The ingress is our ASGI app with its accounts, its tokenizers and an engine a model. The engine's
backend is a handle: requests are joined into batches of tokens before they cross the network, as
arrays and not as texts, and come back as float32. A model's deployment only runs batches, so that
each scales by the tokens that wait for it, on devices of its own.
"""

import asyncio
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import numpy as np
from pydantic import Field
from ray import serve
from ray.exceptions import ActorDiedError, RayError, RayTaskError
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from trivec.build import (
    DEFAULT_MODEL,
    LoadedModel,
    by_name,
    check_models,
    load_models,
    open_parts,
    open_server_parts,
    served,
    tokenizer_factory,
    with_aliases,
)
from trivec.core.errors import DeviceLost, Draining, SettingInvalid
from trivec.core.events import ModelLoaded, PhaseChanged
from trivec.core.health import HEALTHY, Health
from trivec.core.ports import Backend
from trivec.core.types import Batch, BatchBudget, Sequences, Vectors
from trivec.engine import Engine, Workers
from trivec.ipc.folder import Served
from trivec.server.machine import freeze_garbage_collector, usable_memory_bytes
from trivec.server.server import SelfTest
from trivec.settings import Models, Section, Settings, load_settings
from trivec.telemetry import configure_log

RETURN_S = 10.0  # after which a client should find a replica started again
DEATHS_MAX = 3  # of replicas under one batch: it may be what they die of
PAUSE_S_MIN, PAUSE_S_MAX = 0.05, 1.0  # between two tries, while Ray finds out who has died
BUSY_TARGET = 0.8  # share of a replica's time that it should compute
SIGNAL_S = 10.0  # after which an ingress that sends nothing is taken to have nothing
RATE_WINDOW_S = 30.0  # of computing, after which a measurement counts for half
CONNECTIONS = 4096  # requests at a time in one ingress; its own limits are below that
# Batches at a time in one replica, where they wait for a slot: with fewer, Ray's router would come
# back only after a pause, and find a slot that had nothing to do.
CALLS_MAX = 256
END_S_MAX = 5.0  # for the tasks of an ingress to end
# A call of 64 texts costs 7 to 8 ms in Ray, so that one of a quick model's batches is too little.
CALL_S, CALL_TOKENS_MAX = 0.1, 2_048
SAMPLE_TOKENS = 32
# Of our replicas' own processes, where each call pays for what is switched off (docs/ray.md).
CHEAP_CALLS = {
    "env_vars": {
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",  # each call would wake two more threads
        "RAY_event_stats": "0",  # of Ray's own loops
        "RAY_task_events_report_interval_ms": "0",  # a record a call, where we have one a request
        "RAY_max_direct_call_object_size": str(4 << 20),  # vectors need no object store
    }
}
QUIET = {"enable_access_log": False}  # a line a call, where we have one a request


class ServeArguments(Section):
    """What `app` can be told: `args` in a Serve config file."""

    models: Models = (DEFAULT_MODEL,)
    """Models to serve, each a deployment: catalogue IDs, folders that every node has, or ID=FOLDER."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings as in a settings file; TRIVEC_* of each node's environment fill in the rest."""
    replicas_min: int = Field(1, ge=1)
    """Replicas of each model at least."""
    replicas_max: int = Field(1, ge=1)
    """Replicas of each model at most."""
    queue_s_target: float = Field(1.0, gt=0)
    """Seconds of work that may wait: with more, replicas are added."""
    autoscaling: dict[str, Any] = Field(default_factory=dict)
    """More of Ray Serve's AutoscalingConfig, as upscale_delay_s."""
    cpus: int = Field(1, ge=1)
    """CPUs of a model's replica: on a CPU as many batches at a time."""
    gpus: float = Field(0.0, ge=0)
    """GPUs of a model's replica."""
    ingress_replicas: int = Field(1, ge=1)
    """Replicas of the ingress, on as many nodes; above 1 the accounts need a Postgres."""
    ingress_cpus: float = Field(1.0, ge=0)
    """CPUs of an ingress replica: for HTTP and tokenizers."""
    call_s_max: float = Field(120.0, gt=0)
    """Seconds a batch may take, with waiting for a replica that is started again."""

    def read(self, *models: str) -> Settings:
        """The settings on this node, for *models*. Raises `SettingInvalid`."""
        return load_settings({**self.settings, "models": models}, os.environ)


def app(args: ServeArguments) -> Application:
    """The application: `serve run trivec.cluster.serve:app models=baai/bge-m3`. Raises `StartError`."""
    settings = args.read(*args.models)
    check_models(settings)
    if args.ingress_replicas > 1 and not (settings.database_url or settings.no_auth):
        raise SettingInvalid(
            f"ingress_replicas is {args.ingress_replicas}, and they share keys and usage by a "
            "Postgres alone; set database_url"
        )
    scaling = AutoscalingConfig(
        min_replicas=args.replicas_min,
        max_replicas=args.replicas_max,
        policy=AutoscalingPolicy(
            policy_function=QueuePolicy,
            policy_kwargs={"queue_s_target": args.queue_s_target, "busy_target": BUSY_TARGET},
        ),
        **args.autoscaling,
    )
    replicas = [
        serve.deployment(ModelReplica)
        .options(
            name=f"model-{i}-{re.sub('[^a-z0-9]+', '-', reference.partition('=')[0].lower())}",
            autoscaling_config=scaling,
            max_ongoing_requests=CALLS_MAX,
            ray_actor_options={
                "num_cpus": args.cpus,
                "num_gpus": args.gpus,
                "runtime_env": CHEAP_CALLS,
            },
            health_check_period_s=2,
            graceful_shutdown_timeout_s=args.call_s_max,
            logging_config=QUIET,
        )
        .bind(reference, args)
        for i, reference in enumerate(args.models)
    ]
    ingress = serve.deployment(serve.ingress()(Ingress)).options(
        name="ingress",
        num_replicas=args.ingress_replicas,
        max_replicas_per_node=1,
        max_ongoing_requests=CONNECTIONS,
        graceful_shutdown_timeout_s=settings.life.drain_s_max,
        ray_actor_options={"num_cpus": args.ingress_cpus, "runtime_env": CHEAP_CALLS},
        logging_config=QUIET,
    )
    return ingress.bind(args, *replicas)


@dataclass(frozen=True, slots=True)
class Description:
    """What the ingress must know of a model's replicas."""

    served: bytes  # a `Served` of one model
    tokenizer: bytes  # its file, which the ingress's node may not have
    slot_count: int
    budget: BatchBudget


@dataclass(frozen=True, slots=True)
class Call:
    """A batch on its way to a replica: one object, since Ray packs every argument apart."""

    batch: Batch
    exact: bool  # `Backend.run_exact`, not `run`
    ingress: str
    open_tokens: int  # all that this ingress has asked of the model or will


class BackendReplica:
    """A backend behind a handle: each of its slots runs one batch at a time, in its own thread."""

    def __init__(self, backend: Backend, *, call_s_max: float) -> None:
        self._backend = backend
        self._call_s_max = call_s_max
        slots = range(backend.slot_count)
        self._threads = [ThreadPoolExecutor(1, thread_name_prefix=f"slot-{i}") for i in slots]
        self._free: asyncio.Queue[int] = asyncio.Queue()
        for slot in slots:
            self._free.put_nowait(slot)
        self._started_s: dict[int, float] = {}  # by slot: when the batch that runs there began
        self._lost: str | None = None
        self._lock = threading.Lock()  # guards all below, of which Ray asks in a thread of its own
        self._open_tokens: dict[str, tuple[float, int]] = {}  # by ingress: when it said so
        self._tokens = self._seconds = self._busy_s = 0.0
        self._reported_s = time.monotonic()

    async def run(self, call: Call) -> Vectors:
        """The rows of its batch."""
        with self._lock:
            self._open_tokens[call.ingress] = (time.monotonic(), call.open_tokens)
        slot = await self._free.get()
        running = asyncio.get_running_loop().run_in_executor(
            self._threads[slot], self._run, call.batch, slot, call.exact
        )
        running.add_done_callback(lambda _: self._free.put_nowait(slot))
        return await asyncio.shield(running)  # a caller that leaves frees no slot that computes

    def _run(self, batch: Batch, slot: int, exact: bool) -> Vectors:
        self._started_s[slot] = started_s = time.monotonic()
        try:
            return (self._backend.run_exact if exact else self._backend.run)(batch, slot=slot)
        except DeviceLost as exc:
            self._lost = str(exc)
            raise
        finally:
            del self._started_s[slot]
            took_s = time.monotonic() - started_s
            with self._lock:
                kept = 2.0 ** (-took_s / RATE_WINDOW_S)
                self._tokens = self._tokens * kept + batch.token_count
                self._seconds = self._seconds * kept + took_s
                self._busy_s += took_s

    def record_autoscaling_stats(self) -> dict[str, float]:
        """For `QueuePolicy`: tokens that wait or run in all of the cluster, and our own speed."""
        now_s, slot_count = time.monotonic(), len(self._threads)
        with self._lock:
            recent = {
                who: one for who, one in self._open_tokens.items() if now_s - one[0] < SIGNAL_S
            }
            self._open_tokens = recent
            busy, self._busy_s = self._busy_s / slot_count / (now_s - self._reported_s), 0.0
            self._reported_s = now_s
            rate = slot_count * self._tokens / self._seconds if self._seconds else 0.0
        open_tokens = sum(tokens for _, tokens in recent.values())
        return {"open_tokens": float(open_tokens), "tokens_per_s": rate, "busy": min(busy, 1.0)}

    def check_health(self) -> None:
        """Raise where only another process can help; Ray then starts one."""
        now_s = time.monotonic()
        if self._lost is not None:
            raise DeviceLost(self._lost)
        if any(now_s - started_s > self._call_s_max for started_s in [*self._started_s.values()]):
            raise DeviceLost(f"a batch has been running for more than {self._call_s_max:g} s")


class ModelReplica(BackendReplica):
    """One model on one device of the cluster."""

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self, reference: str, arguments: ServeArguments
    ) -> None:
        settings = arguments.read(reference).model_copy(update={"aliases": ()})
        models = await asyncio.to_thread(
            load_models, settings, open_parts(settings), cores=arguments.cpus, takes_text=False
        )
        model = models.loaded[0]
        budget = model.backend.budget
        # OpenVINO's backend cuts what it is given; torch runs it whole, in memory for one batch.
        if models.choice.backend == "openvino":
            budget = call_budget(budget, await asyncio.to_thread(full_batch_s, model))
        self._description = Description(
            served(models).encode(),
            model.checkpoint.tokenizer_file.read_bytes(),
            model.backend.slot_count,
            budget,
        )
        super().__init__(model.backend, call_s_max=arguments.call_s_max)

    def describe(self) -> Description:
        return self._description


def full_batch_s(model: LoadedModel) -> float:
    """Seconds that a full batch of short texts takes."""
    budget = model.backend.budget
    length = min(SAMPLE_TOKENS, model.card.token_count_max, budget.tokens_max)
    sample = Sequences.pack([[0] * length] * (budget.tokens_max // length))
    outputs = np.full(len(sample), int(model.card.main_output), np.uint8)
    batch = Batch(sample.token_ids, sample.cu_seqlens, outputs, sample.token_types)
    model.backend.run(batch, slot=0)  # the first may have to compile
    started_s = time.monotonic()
    model.backend.run(batch, slot=0)
    return time.monotonic() - started_s


def call_budget(budget: BatchBudget, batch_s: float) -> BatchBudget:
    """What a call may hold of a model whose full batch takes *batch_s*: several, where it is quick.

    A long batch stays alone, for the sake of those that wait for it.
    """
    times = max(1, min(CALL_TOKENS_MAX // budget.tokens_max, int(CALL_S / batch_s)))
    return BatchBudget(times * budget.tokens_max, times * budget.sequences_max)


class HandleBackend:
    """`core.ports.Backend` over a handle: a slot is a batch on its way to any of the replicas."""

    def __init__(
        self,
        handle: DeploymentHandle[Any],
        *,
        ingress: str,
        slot_count: int,
        budget: BatchBudget,
        call_s_max: float,
    ) -> None:
        self.slot_count = slot_count
        self.budget = budget
        self.queued_tokens: Callable[[], int] = lambda: 0
        """What waits at this ingress, in no batch yet."""
        self.away = f"No replica of {handle.deployment_name} answers at the moment"
        self.is_away = False  # as the last call found that has ended
        self._handle = handle
        self._ingress = ingress
        self._call_s_max = call_s_max
        self._calls = [0] * slot_count  # tokens of each slot's batch

    def run(self, batch: Batch, *, slot: int) -> Vectors:
        return self._run(batch, slot, exact=False)

    def run_exact(self, batch: Batch, *, slot: int) -> Vectors:
        return self._run(batch, slot, exact=True)

    def close(self) -> None:
        """The replicas are Ray's to stop."""

    def _run(self, batch: Batch, slot: int, *, exact: bool) -> Vectors:
        """Raises `Draining` where no replica answers in time, and what the replica's backend raised."""
        self._calls[slot] = batch.token_count
        try:
            vectors = self._answer(batch, exact=exact)
        finally:
            self._calls[slot] = 0
        self.is_away = vectors is None
        if vectors is None:
            raise Draining(f"{self.away}. Please try again.", retry_after_s=RETURN_S)
        return vectors

    def _answer(self, batch: Batch, *, exact: bool) -> Vectors | None:
        """Ask a replica, and another where it dies: a batch may be computed twice. None: in vain."""
        deadline_s = time.monotonic() + self._call_s_max
        deaths, pause_s = 0, PAUSE_S_MIN
        while deaths < DEATHS_MAX:
            open_tokens = self.queued_tokens() + sum(self._calls)
            response = self._handle.run.remote(Call(batch, exact, self._ingress, open_tokens))
            try:
                left_s = max(0.0, deadline_s - time.monotonic())
                return cast(Vectors, response.result(timeout_s=left_s))
            except TimeoutError:
                response.cancel()
                return None
            except (RayError, DeviceLost, DeploymentUnavailableError) as fault:
                if isinstance(fault, RayTaskError) and not isinstance(fault, DeviceLost):
                    self.is_away = False
                    raise  # the backend's own
                deaths += isinstance(fault, ActorDiedError | DeviceLost)
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, PAUSE_S_MAX)
        return None


class Ingress:
    """HTTP: the ASGI app, its accounts, and an engine for each model's handle."""

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self, arguments: ServeArguments, *handles: DeploymentHandle[Any]
    ) -> None:
        settings = arguments.read(*arguments.models)
        configure_log(settings.telemetry.log_format, level=settings.log_level)
        self._parts = parts = open_server_parts(settings, machine_bytes=usable_memory_bytes())
        described = await asyncio.gather(*(handle.describe.remote() for handle in handles))
        served_models = [Served.decode(one.served).models[0] for one in described]
        cards = with_aliases([one.card for one in served_models], settings.aliases)
        make_tokenizer = tokenizer_factory(settings, max(1, int(arguments.ingress_cpus)))
        self._backends: list[HandleBackend] = []
        self._workers: list[Workers] = []
        engines: list[Engine] = []
        for handle, one, model, card in zip(handles, described, served_models, cards, strict=True):
            backend = HandleBackend(
                handle,
                ingress=serve.get_replica_context().replica_id.unique_id,
                slot_count=arguments.replicas_max * (one.slot_count + 1),
                budget=one.budget,
                call_s_max=arguments.call_s_max,
            )
            workers = Workers(
                backend.slot_count,
                clock=parts.clock,
                observer=parts.observer,
                call_s_min=2 * arguments.call_s_max,  # the backend gives up by itself
            )
            with tempfile.NamedTemporaryFile(suffix=".json") as file:
                file.write(one.tokenizer)
                file.flush()
                tokenizer = make_tokenizer(Path(file.name), card, card.vocabulary_size, model.rules)
            engine = Engine(
                card,
                tokenizer=tokenizer,
                backend=backend,
                workers=workers,
                limits=settings.queue,
            )
            backend.queued_tokens = partial(getattr, engine, "queued_tokens")
            parts.observer.observe(ModelLoaded(card, 0.0, model.certificate))
            self._backends.append(backend)
            self._workers.append(workers)
            engines.append(engine)
        parts.metrics.watch(lambda: [one for w in self._workers for one in w.scheduler.loads()])
        self._embedders = by_name(engines)
        self._self_test = SelfTest(engines)
        self._tasks: set[asyncio.Task[str | None]] = set()
        self._lost: list[str] = []  # why nothing can be served any more
        parts.accounts.start()
        self._start(parts.accounts.lost())
        for workers in self._workers:
            workers.start()
            self._start(workers.lost())
        await self._self_test.start()
        self._start(self._self_test_forever(settings.life.self_test_every_s))
        if runner := parts.batch_runner(self._embedders):
            self._start(runner.run())
        freeze_garbage_collector()
        parts.observer.observe(PhaseChanged("ready", "ok"))

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self._parts.app(self._embedders, self.health)

    def health(self) -> Health:
        """What probes and every request see."""
        reasons = [*self._lost, *self._self_test.problems]
        reasons += [one.away for one in self._backends if one.is_away]
        if not self._parts.accounts.health().writable:
            reasons.append("the store cannot be written; the log says why")
        if not reasons:
            return HEALTHY
        return Health("ready", alive=not self._lost, ready=False, reason="; ".join(reasons))

    def check_health(self) -> None:
        """Raise where only another process can help; Ray then starts one."""
        if self._lost:
            raise DeviceLost(self._lost[0])

    async def __del__(self) -> None:
        """What was accepted is answered by now: Ray has waited for it."""
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks, timeout=END_S_MAX)  # batch jobs give back what they hold
        for workers in self._workers:
            await workers.stop(0)
        await asyncio.to_thread(self._parts.close)

    async def _self_test_forever(self, every_s: float) -> None:
        while True:
            await asyncio.sleep(every_s)
            await self._self_test.check()

    def _start(self, work: Coroutine[None, None, str | None]) -> None:
        """Let *work* run; when it ends by itself, it says why this process is of no use."""

        def ended(task: "asyncio.Task[str | None]") -> None:
            if not task.cancelled():
                fault = task.exception()
                self._lost.append(repr(fault) if fault else str(task.result()))

        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(ended)


class QueuePolicy:
    """How many replicas a model should have: Ray Serve calls it every few seconds.

    As Kubernetes' autoscaler does, it takes the larger of two proportions: seconds of work that
    waits to its target, and time that replicas compute to theirs. Bounds, delays and factors are
    those of the deployment's `AutoscalingConfig`.
    """

    def __init__(self, *, queue_s_target: float, busy_target: float) -> None:
        self._queue_s_target = queue_s_target
        self._busy_target = busy_target

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        """Replicas that are wanted, and no state."""
        means = context.aggregated_metrics or {}  # by name and replica, over the look-back period
        rates = [rate for rate in means.get("tokens_per_s", {}).values() if rate]
        if not rates:  # nothing was ever computed
            return context.target_num_replicas, {}
        busy = means["busy"].values()
        # Each replica hears of all that waits, some of them later than others.
        # One that has just started has no rate yet, and will have that of the others.
        queue_s = max(means["open_tokens"].values()) / (fmean(rates) * context.current_num_replicas)
        share = max(queue_s / self._queue_s_target, fmean(busy) / self._busy_target)
        return context.current_num_replicas * share, {}
