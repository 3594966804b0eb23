"""Batch jobs: files of requests, validated as a whole, then answered shard by shard to the end.

The lines of a shard are answered concurrently and kept in two part files, for successes and for
failures, under a name that only this lease has. Once these are on the disk, one transaction marks
the shard done and bills its lines. So a line is in the output exactly if it is in the ledger, a
crash costs the shard that it interrupted, and any server may go on.
"""

import asyncio
import logging
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import IO, Any, Protocol

import msgspec

from trivec.accounts import ANONYMOUS, Accounts, Key, RequestUsage
from trivec.accounts.ledger import ERROR_FROM, LedgerRow
from trivec.core.errors import FieldInvalid, ResourceUnknown, StoreUnavailable
from trivec.core.events import LinesWaiting, ShardFinished
from trivec.core.ports import Clock, Observer
from trivec.jobs.files import Files, FileWriter, NewFile, storage_faults
from trivec.jobs.records import FileRecord, JobPlan, JobRecord, JobStore, ShardRecord

ENDPOINTS = ("/v1/embeddings", "/v1/rerank")
LINES_MAX = INPUTS_MAX = 50_000
CUSTOM_ID_CHARS_MAX = 512
ERRORS_MAX = 100  # that are listed
# A shard ends with whichever comes first. On two cores it takes BGE-M3 a minute.
SHARD_LINES, SHARD_INPUTS, SHARD_BYTES = 500, 2_000, 256 * 1024
INPUTS_AT_ONCE = 512  # of the lines that are computed beside each other, or one larger line
POLL_S = 2.0  # for work that other servers were given
RENEW_S = 5.0
SWEEP_S = 60.0
RETRY_S = 5.0  # after the store or the disk failed
LOST = "Lines are missing: the server's storage of files has lost them."
_log = logging.getLogger("trivec.batches")
_encoder = msgspec.json.Encoder()


@dataclass(frozen=True, slots=True)
class LineAnswer:
    """What the API answers to one line."""

    body: msgspec.Raw
    usage: RequestUsage
    model: str | None  # a served id
    retry_after_s: float | None = None  # it is no answer: the line is to be sent again


class Answer(Protocol):
    """The API as it is used here. The memory of an answer is reserved while its context is open."""

    def __call__(
        self, key: Key, url: str, body: bytes, *, request_id: str
    ) -> AbstractAsyncContextManager[LineAnswer]: ...


class Line(msgspec.Struct, frozen=True):
    """One line of an input file."""

    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


class _Body(msgspec.Struct, frozen=True):
    """What is read of a request's body before it runs."""

    model: str
    input: str | list[Any] | None = None
    documents: list[Any] | None = None

    @property
    def input_count(self) -> int:
        given = self.documents if self.input is None else self.input
        is_one = not isinstance(given, list) or not given or isinstance(given[0], int)
        return 1 if is_one else len(given or ())


@dataclass(slots=True)
class Validation:
    """A whole input file, looked at line by line. Pure: no clock, no disk."""

    endpoint: str
    names: Mapping[str, Sequence[str]]  # of each served model, by any of them
    key: Key
    line_bytes_max: int
    model: str | None = None
    errors: list[dict[str, object]] = field(default_factory=list)
    shards: list[ShardRecord] = field(default_factory=list)
    _ids: set[str] = field(default_factory=set)
    _inputs: int = 0
    _shard_inputs: int = 0

    def read(self, lines: Iterator[bytes]) -> None:
        """Look at every line; blank ones count for nothing but their number."""
        start, count = 0, 0
        for number, raw in enumerate(lines, start=1):
            line = raw.removeprefix(BOM_UTF8) if number == 1 else raw
            start += len(raw) - len(line)
            if not line.strip():
                start += len(line)
                continue
            count += 1
            if len(line) > self.line_bytes_max:
                says = f"A line has over {self.line_bytes_max:,} bytes."
                self._add("line_too_long", says, number)
                return  # where it ends is not known
            if count > LINES_MAX:
                self._add("too_many_requests", f"At most {LINES_MAX:,} lines are read.", number)
                return
            inputs = self._check(line, number)
            self._assign(number, start, len(line), inputs)
            start += len(line)
            if len(self.errors) >= ERRORS_MAX:
                self._add("too_many_errors", "The lines after this one were not looked at.", number)
                return
        if not count:
            self._add("empty_file", "The file has no lines.", None)

    def _check(self, raw: bytes, number: int) -> int:
        """How many inputs a line has, whatever is wrong with it."""
        within = ""
        try:
            raw.decode()  # fields that are not read here must be UTF-8 too
            line = msgspec.json.decode(raw, type=Line)
            within = "body."
            body = msgspec.json.decode(line.body, type=_Body)
        except msgspec.ValidationError as lacking:
            param = _param(str(lacking))
            param = param and within + param
            self._add("missing_required_parameter", f"{lacking}.", number, param=param)
            return 0
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            self._add("invalid_json_line", "This line is not a JSON object in UTF-8.", number)
            return 0
        if not 1 <= len(line.custom_id) <= CUSTOM_ID_CHARS_MAX:
            says = f"A custom_id has 1 to {CUSTOM_ID_CHARS_MAX} characters."
            self._add("invalid_custom_id", says, number, param="custom_id")
        elif line.custom_id in self._ids:
            says = f"The custom_id '{line.custom_id[:64]}' is on an earlier line, too."
            self._add("duplicate_custom_id", says, number, param="custom_id")
        self._ids.add(line.custom_id)
        if line.method != "POST":
            self._add("invalid_method", "The method must be POST.", number, param="method")
        if line.url != self.endpoint:
            says = f"The url must be {self.endpoint}, the endpoint of the batch."
            self._add("invalid_url", says, number, param="url")
        self._check_model(body.model, number)
        self._inputs += body.input_count
        if self._inputs > INPUTS_MAX >= self._inputs - body.input_count:
            says = f"All lines together have more than {INPUTS_MAX:,} inputs."
            self._add("too_many_inputs", says, number)
        return body.input_count

    def _check_model(self, model: str, number: int) -> None:
        if self.model is None:
            self.model = model
            names = self.names.get(model)
            if names is None or not self.key.may_use(names):
                says = "No such model is served here, or this key may not use it."
                self._add("model_not_found", says, number, param="body.model")
        elif model != self.model:
            says = f"All lines must name the same model, here {self.model[:64]}."
            self._add("mismatched_model", says, number, param="body.model")

    def _assign(self, number: int, start: int, byte_count: int, inputs: int) -> None:
        """Put a line into the last shard, or a new one."""
        last = self.shards[-1] if self.shards else None
        end = start + byte_count
        self._shard_inputs += inputs
        if (
            last is None
            or last.line_count >= SHARD_LINES
            or self._shard_inputs > SHARD_INPUTS
            or end - last.byte_start > SHARD_BYTES  # blank lines between them included
        ):
            self._shard_inputs = inputs
            place = len(self.shards) + 1
            self.shards.append(ShardRecord(0, "", place, "run", number, 1, start, byte_count, None))
            return
        self.shards[-1] = replace(
            last, line_count=last.line_count + 1, byte_count=end - last.byte_start
        )

    def _add(self, code: str, message: str, line: int | None, *, param: str | None = None) -> None:
        self.errors.append(_error(code, message, line, param))


class Batches:
    """Batch jobs as clients use them; called on the event loop."""

    def __init__(self, store: JobStore, files: Files) -> None:
        self.store = store
        self.files = files
        self.changed = asyncio.Event()  # there may be something new to do

    async def create(self, key_id: str, plan: JobPlan) -> JobRecord:
        """See `JobStore.add_batch`."""
        made = await asyncio.to_thread(self.store.add_batch, key_id, plan)
        self.changed.set()
        return made

    async def cancel(self, key_id: str, batch_id: str) -> JobRecord:
        """See `JobStore.cancel_batch`."""
        cancelled = await asyncio.to_thread(self.store.cancel_batch, key_id, batch_id)
        self.changed.set()
        return cancelled


class JobRunner:
    """The batch work of one server: a step at a time, whichever is due. `run` is a task."""

    def __init__(
        self,
        batches: Batches,
        *,
        answer: Answer,
        names: Mapping[str, Sequence[str]],
        accounts: Accounts,
        line_bytes_max: int,
        clock: Clock,
        observer: Observer,
    ) -> None:
        """*names*: of each served model, by any of them."""
        self._store = batches.store
        self._files = batches.files
        self._wake = batches.changed
        self._answer = answer
        self._names = names
        self._accounts = accounts
        self._line_bytes_max = line_bytes_max
        self._clock = clock
        self._observer = observer
        self._swept_s = float("-inf")
        self._waiting: set[str] = set()  # batches that were logged as waiting for a file

    async def run(self) -> None:
        """Work until cancelled; what was begun is then free for other servers."""
        has_released, is_well = False, True
        while True:
            try:
                if not has_released:
                    await asyncio.to_thread(self._store.release_dead)
                    has_released = True
                is_done = await self._work_once()
                left = await asyncio.to_thread(self._store.lines_left)
                self._observer.observe(LinesWaiting(left))
            except Exception as fault:  # an outermost loop: whatever it is, it is tried again
                if is_well:
                    reason = fault.__cause__ or fault
                    expected = isinstance(fault, StoreUnavailable)
                    _log.error("batches wait: %s", reason, exc_info=None if expected else fault)
                is_well = False
                await asyncio.sleep(RETRY_S)
                continue
            if not is_well:
                _log.warning("batches go on")
            is_well = True
            if not is_done:
                await self._wait(within_s=POLL_S)

    async def _wait(self, *work: "asyncio.Task[None]", within_s: float = RENEW_S) -> bool:
        """Wait for *work*, at most so long or until a job has changed; whether it has ended."""
        waking = asyncio.create_task(self._wake.wait())
        try:
            await asyncio.wait((*work, waking), timeout=within_s, return_when="FIRST_COMPLETED")
        finally:
            waking.cancel()
        self._wake.clear()
        return all(one.done() for one in work)

    async def _work_once(self) -> bool:
        """Do the next step that is due; False where there is none."""
        if self._clock.now_s() - self._swept_s >= SWEEP_S:
            self._swept_s = self._clock.now_s()
            await self._files.sweep()
            for key_id, batch_id in await asyncio.to_thread(self._store.old_batches):
                with suppress(StoreUnavailable):  # the next sweep tries again
                    await asyncio.to_thread(self._files.storage.remove, key_id, batch_id)
                    await asyncio.to_thread(self._store.forget_shards, batch_id)
        await asyncio.to_thread(self._store.expire_batches)
        leased = await asyncio.to_thread(self._store.lease, list(self._names))
        if leased is None:
            return False
        shard, job = leased
        step = {"validate": self._validate, "run": self._run, "join": self._join}[shard.kind]
        work = asyncio.create_task(step(shard, job), name=f"batch {shard.kind}")
        is_released = True
        try:
            while not await self._wait(work):
                with suppress(StoreUnavailable):  # the lease may still be renewed in time
                    await asyncio.to_thread(self._store.expire_batches)
                    if not await asyncio.to_thread(self._store.renew, shard):
                        work.cancel()
            if not work.cancelled():
                work.result()
        except StoreUnavailable as fault:
            if not _is_gone(fault):
                raise
            if job.id not in self._waiting:
                _log.error("%s waits for what is gone: %s", job.id, fault.__cause__)
                self._waiting.add(job.id)
            is_released = False  # others have their turn until the lease is over
        finally:
            work.cancel()
            await asyncio.wait((work,))
            if is_released:
                with suppress(StoreUnavailable):
                    await asyncio.to_thread(self._store.release, shard)
        return True

    async def _owner(self, job: JobRecord) -> Key | None:
        """The key of *job*; None where it is no longer valid, and the job is cancelled."""
        try:
            key = await self._accounts.find_key(job.key_id)
            if key.is_live(self._store.now_us()):
                return key
        except ResourceUnknown:
            pass
        with suppress(FieldInvalid):  # it has ended meanwhile
            await asyncio.to_thread(self._store.cancel_batch, job.key_id, job.id)
        return None

    async def _validate(self, shard: ShardRecord, job: JobRecord) -> None:
        if (key := await self._owner(job)) is None:
            return
        validation = Validation(job.endpoint, self._names, key, self._line_bytes_max)

        def read() -> None:
            with self._files.storage.open(job.key_id, job.input_file_id) as file:
                validation.read(_lines(file, self._line_bytes_max))

        await asyncio.to_thread(read)
        await asyncio.to_thread(
            self._store.finish_validation,
            shard,
            model=validation.model,
            shards=validation.shards,
            errors=validation.errors,
        )

    async def _run(self, shard: ShardRecord, job: JobRecord) -> None:
        if (key := await self._owner(job)) is None:
            return
        lines = await asyncio.to_thread(self._read_lines, shard, job)
        storage, rows = self._files.storage, list[LedgerRow]()
        parts = {ok: FileWriter(storage, job.key_id, _part(shard, ok=ok)) for ok in (True, False)}
        places = asyncio.Semaphore(INPUTS_AT_ONCE)
        began_s = self._clock.now_s()

        async def run(number: int, line: Line, inputs: int) -> None:
            request_id = _request_id(job, number)
            while True:
                asked = self._answer(key, line.url, bytes(line.body), request_id=request_id)
                async with asked as answer:
                    if answer.retry_after_s is None:
                        usage, is_ok = answer.usage, answer.usage.status < ERROR_FROM
                        await parts[is_ok].write(_answered(request_id, line, answer))
                        break
                await asyncio.sleep(answer.retry_after_s)
            rows.append(
                LedgerRow(
                    time_us=self._store.now_us(),
                    request_id=request_id,
                    key_id=job.key_id,
                    model=answer.model,
                    input_count=usage.input_count,
                    token_count=usage.token_count,
                    status=usage.status,
                    duration_us=round(usage.duration_s * 1e6),
                    user_digest=self._accounts.pseudonym(usage.user),
                )
            )
            for _ in range(inputs):
                places.release()

        try:
            async with asyncio.TaskGroup() as group:
                for number, line, inputs in lines:
                    for _ in range(inputs):
                        await places.acquire()
                    group.create_task(run(number, line, inputs))
                    await asyncio.sleep(0)  # requests get a turn after every line
            for part in parts.values():
                if part.byte_count:
                    await part.close()
        except BaseException as fault:
            for part in parts.values():
                await part.abort()
            if isinstance(fault, ExceptionGroup):
                raise fault.exceptions[0] from None
            raise
        failed = sum(row.status >= ERROR_FROM for row in rows)
        counts = {
            "completed": len(rows) - failed,
            "failed": failed,
            "token_count": sum(row.token_count for row in rows),
        }
        billed = () if key is ANONYMOUS else rows
        if await self._finish(partial(self._store.finish_run, shard, billed, **counts)):
            model, duration_s = rows[0].model or "", self._clock.now_s() - began_s
            ran = ShardFinished(batch_id=job.id, model=model, duration_s=duration_s, **counts)
            self._observer.observe(ran)

    async def _join(self, shard: ShardRecord, job: JobRecord) -> None:
        """Make the output files of the shards' part files, and of the lines that never ran in time.

        A file that is missing from the storage may come back until the job's window is over; a job
        that was cancelled does not wait for it.
        """
        made: dict[bool, NewFile] = {}
        errors: list[dict[str, object]] = []

        async def write(content: bytes, *, ok: bool) -> None:
            if ok not in made:
                made[ok] = await self._files.begin(job.key_id, "batch_output")
            await made[ok].write(content)

        @contextmanager
        def while_there() -> Iterator[None]:
            try:
                yield
            except StoreUnavailable as fault:
                is_over = job.ends_as == "cancelled" or self._store.now_us() >= job.expires_us
                if not (_is_gone(fault) and is_over):
                    raise
                _log.error("%s ends without what is gone: %s", job.id, fault.__cause__)
                if not errors:
                    errors.append(_error("answers_lost", LOST, None))

        records: dict[bool, FileRecord] = {}
        try:
            for done in await asyncio.to_thread(self._store.run_shards, job.id, done=True):
                for ok, count in ((True, done.completed), (False, done.failed)):
                    if count:
                        with while_there():
                            async for piece in self._files.read(job.key_id, _part(done, ok=ok)):
                                await write(piece, ok=ok)
            if job.ends_as == "expired":
                for left in await asyncio.to_thread(self._store.run_shards, job.id, done=False):
                    with while_there():
                        for number, line, _ in await asyncio.to_thread(self._read_lines, left, job):
                            await write(_expired(_request_id(job, number), line), ok=False)
            for ok, file in made.items():
                filename = f"{job.id}_{'output' if ok else 'error'}.jsonl"
                records[ok] = await file.finished(filename, expires_s=job.output_expires_s)
        except BaseException:
            for file in made.values():
                await file.drop()
            raise
        output, error = records.get(True), records.get(False)
        finish = partial(self._store.finish_join, shard, output=output, error=error, errors=errors)
        if await self._finish(finish):
            await asyncio.to_thread(self._files.storage.remove, job.key_id, job.id)

    async def _finish(self, finish: Callable[[], bool]) -> bool:
        """The result of *finish*, tried until the store answers: the step may be done by then."""
        while True:
            try:
                return await asyncio.to_thread(finish)
            except StoreUnavailable:  # it may have been committed all the same: `finish` checks
                await asyncio.sleep(1.0)

    def _read_lines(self, shard: ShardRecord, job: JobRecord) -> list[tuple[int, Line, int]]:
        """The lines of a shard: number, content, and how many of `INPUTS_AT_ONCE` it takes."""
        with self._files.storage.open(job.key_id, job.input_file_id) as file, storage_faults():
            file.seek(shard.byte_start)
            content = file.read(shard.byte_count)
            if len(content) < shard.byte_count:
                raise FileNotFoundError(f"{job.input_file_id} has been cut short")
        found = []
        for number, raw in enumerate(content.split(b"\n"), start=shard.first_line):
            if raw.strip():
                line = msgspec.json.decode(raw, type=Line)
                inputs = msgspec.json.decode(line.body, type=_Body).input_count
                found.append((number, line, min(max(1, inputs), INPUTS_AT_ONCE)))
        return found


def _lines(file: IO[bytes], bytes_max: int) -> Iterator[bytes]:
    """The lines of *file* with their ends; one of more than *bytes_max* only in part."""
    with storage_faults():
        yield from iter(partial(file.readline, bytes_max + 1), b"")


def _param(complaint: str) -> str | None:
    """The field that msgspec complains of: one that is wrong, or one that is missing."""
    _, _, wrong = complaint.partition(" - at `$.")
    missing = complaint.split("`")[1] if "missing" in complaint else ""
    return wrong.removesuffix("`") or missing or None


def _error(
    code: str, message: str, line: int | None, param: str | None = None
) -> dict[str, object]:
    return {"code": code, "message": message, "param": param, "line": line}


def _is_gone(fault: StoreUnavailable) -> bool:
    """Whether the storage answers, and lacks what it should have."""
    return isinstance(fault.__cause__, FileNotFoundError)


def _part(shard: ShardRecord, *, ok: bool) -> str:
    """The part file of a shard, named after its lease, so that no other server writes to it."""
    token = (shard.lease or "").rpartition("/")[2]
    return f"{shard.batch_id}/{shard.number:05}-{token}.{'output' if ok else 'error'}"


def _request_id(job: JobRecord, number: int) -> str:
    """Of a line: unique, so that the ledger takes each at most once."""
    return f"batch_req_{job.id.removeprefix('batch_')}_{number}"


def _answered(request_id: str, line: Line, answer: LineAnswer) -> bytes:
    status = answer.usage.status
    error = None
    if status >= ERROR_FROM:
        told = msgspec.json.decode(answer.body)["error"]
        error = {"code": told["code"] or told["type"], "message": told["message"]}
    response = {"status_code": status, "request_id": request_id, "body": answer.body}
    return _output_line(request_id, line, response, error)


def _expired(request_id: str, line: Line) -> bytes:
    says = "This request could not be executed before the completion window expired."
    return _output_line(request_id, line, None, {"code": "batch_expired", "message": says})


def _output_line(
    request_id: str, line: Line, response: object, error: Mapping[str, str] | None
) -> bytes:
    own = {"id": request_id, "custom_id": line.custom_id}
    return _encoder.encode({**own, "response": response, "error": error}) + b"\n"
