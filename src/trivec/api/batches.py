"""The Files and Batches APIs, as OpenAI's clients speak them; and how a line of a batch is answered.

A key finds its own files and batches only: of others' it is told that they do not exist.
"""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from io import BytesIO
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.responses import Response
from starlette.types import Receive, Send
from starlette.types import Scope as AsgiScope

from trivec.accounts import Key, RequestUsage
from trivec.api.context import AppState, RequestContext
from trivec.api.errors import TABLE, error_response, fault_of
from trivec.api.inference import read_query
from trivec.api.openai import embeddings
from trivec.api.openapi import keyed
from trivec.api.rerank import rerank
from trivec.api.responses import json_response
from trivec.api.schemas import decoder_of, doc
from trivec.core.errors import (
    BodyTooSlow,
    EngineFault,
    FieldInvalid,
    MalformedBody,
    MediaTypeUnsupported,
    ServiceError,
)
from trivec.jobs.batches import ENDPOINTS, Batches, LineAnswer
from trivec.jobs.files import NewFile
from trivec.jobs.records import FileRecord, JobPlan, JobRecord, Page, Status

DAY_S = 24 * 3600
INPUT_EXPIRES_S = 30 * DAY_S
EXPIRES_S_MIN, EXPIRES_S_MAX = 3_600, 30 * DAY_S
FORM = "multipart/form-data"
FIELD_BYTES_MAX = 1024  # of a part of a form that is no file
FORM_BYTES_MAX = 65_536  # of a form beside its file
FILENAME_CHARS_MAX = 255
RETRY_S_MAX = 10.0
_log = logging.getLogger(__name__)
LINE_HANDLERS = dict(zip(ENDPOINTS, (embeddings, rerank), strict=True))


class UploadRequest(Struct, frozen=True, kw_only=True):
    """Form of `POST /files`."""

    file: Annotated[str, Meta(extra_json_schema={"format": "binary"})]
    purpose: Literal["batch"]
    anchor: Annotated[Literal["created_at"] | None, doc("The default is 30 days.")] = msgspec.field(
        default=None, name="expires_after[anchor]"
    )
    seconds: Annotated[int, Meta(ge=EXPIRES_S_MIN, le=EXPIRES_S_MAX)] | None = msgspec.field(
        default=None, name="expires_after[seconds]"
    )


class FileObject(Struct, frozen=True, kw_only=True):
    """A file."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: Literal["batch", "batch_output"]
    status: Literal["processed"] = "processed"


class FilesQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """Query of `GET /files`."""

    purpose: str | None = None
    limit: Annotated[int, Meta(ge=1, le=10_000)] = 10_000
    order: Literal["asc", "desc"] = "desc"
    after: str | None = None


class FileList(Struct, frozen=True, kw_only=True):
    """Response of `GET /files`."""

    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(Struct, frozen=True, kw_only=True):
    """Response of `DELETE /files/{id}`."""

    id: str
    object: Literal["file"] = "file"
    deleted: bool = True


class OutputExpiresAfter(Struct, frozen=True, forbid_unknown_fields=True):
    """When the files of a batch expire: so long after they were made."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Meta(ge=EXPIRES_S_MIN, le=EXPIRES_S_MAX)]


class CreateBatchRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """Body of `POST /batches`; null means unset."""

    input_file_id: str
    endpoint: Literal["/v1/embeddings", "/v1/rerank"]
    completion_window: Annotated[
        str,
        Meta(pattern=r"^([1-9]\d?|[12]\d\d|3[0-2]\d|33[0-6])h$(?!\n)"),
        doc("24h as at OpenAI, or any other number of hours up to 336h."),
    ]
    metadata: (
        Annotated[
            dict[
                Annotated[str, Meta(max_length=64)],
                Annotated[str, Meta(max_length=512)],
            ],
            Meta(max_length=16),
        ]
        | None
    ) = None
    output_expires_after: OutputExpiresAfter | None = None


class BatchError(Struct, frozen=True):
    """What is wrong with a line of the input file."""

    code: str
    message: str
    param: str | None
    line: int | None


class BatchErrors(Struct, frozen=True, kw_only=True):
    """All that is wrong with an input file."""

    object: Literal["list"] = "list"
    data: list[BatchError]


class RequestCounts(Struct, frozen=True):
    """Lines of a batch."""

    total: int
    completed: int
    failed: int


class BatchUsage(Struct, frozen=True):
    """Tokens of a batch, in OpenAI's words for its newer APIs."""

    input_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens: int
    output_tokens_details: dict[str, int]
    total_tokens: int


class BatchObject(Struct, frozen=True, kw_only=True):
    """A batch. Times are in seconds since the epoch, null where they have not come."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    model: str | None
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str
    status: Status
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    usage: BatchUsage
    metadata: dict[str, str] | None


class BatchesQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """Query of `GET /batches`."""

    limit: Annotated[int, Meta(ge=1, le=100)] = 20
    after: str | None = None


class BatchList(Struct, frozen=True, kw_only=True):
    """Response of `GET /batches`, newest first."""

    object: Literal["list"] = "list"
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


async def upload_file(context: RequestContext) -> Response:
    """Upload a file of requests, as multipart/form-data."""
    context.timeout.extend(_jobs(context).files.limits.upload_s_max)
    new = await _jobs(context).files.begin(context.known_caller.id, "batch")
    try:
        form = await _read_form(context, new)
        asked = decoder_of(UploadRequest).convert(form)
        if (asked.anchor is None) != (asked.seconds is None):
            both = "Invalid 'expires_after': send both, the anchor created_at and the seconds."
            raise FieldInvalid(both, param="expires_after")
        kept = await new.keep(_filename(asked.file), expires_s=asked.seconds or INPUT_EXPIRES_S)
    except BaseException:
        await new.drop()
        raise
    return json_response(_file_object(kept))


async def list_files(context: RequestContext) -> Response:
    """List this key's files."""
    asked = read_query(FilesQuery, context)
    page = Page(asked.after, asked.limit, newest_first=asked.order == "desc")
    store, key_id = _jobs(context).store, context.known_caller.id
    found = await asyncio.to_thread(store.list_files, key_id, page, purpose=asked.purpose)
    return _listed(FileList, list(map(_file_object, found)), asked)


async def show_file(context: RequestContext) -> Response:
    """Show a file."""
    return json_response(_file_object(await _file(context)))


async def file_content(context: RequestContext) -> Response:
    """Download a file."""
    file = await _file(context)
    pieces = _jobs(context).files.read(file.key_id, file.id)
    first = await anext(pieces, b"")  # that it cannot be read is better said than shown by an end
    return StreamedFile(file, first, pieces)


async def delete_file(context: RequestContext) -> Response:
    """Delete a file."""
    file_id = context.path_params["id"]
    await _jobs(context).files.delete(context.known_caller.id, file_id)
    return json_response(FileDeleted(id=file_id))


async def create_batch(context: RequestContext) -> Response:
    """Have the requests of a file answered, within a time."""
    asked = decoder_of(CreateBatchRequest).decode(await context.read_body())
    expires = asked.output_expires_after
    plan = JobPlan(
        endpoint=asked.endpoint,
        input_file_id=asked.input_file_id,
        window_s=3_600.0 * int(asked.completion_window[:-1]),
        metadata=asked.metadata,
        output_expires_s=None if expires is None else expires.seconds,
    )
    return json_response(_batch_object(await _jobs(context).create(context.known_caller.id, plan)))


async def list_batches(context: RequestContext) -> Response:
    """List this key's batches, newest first."""
    asked = read_query(BatchesQuery, context)
    store, key_id = _jobs(context).store, context.known_caller.id
    page = Page(asked.after, asked.limit)
    found = await asyncio.to_thread(store.list_batches, key_id, page)
    return _listed(BatchList, list(map(_batch_object, found)), asked)


async def show_batch(context: RequestContext) -> Response:
    """Show a batch."""
    store, key_id = _jobs(context).store, context.known_caller.id
    found = await asyncio.to_thread(store.find_batch, key_id, context.path_params["id"])
    return json_response(_batch_object(found))


async def cancel_batch(context: RequestContext) -> Response:
    """Cancel a batch; what is done by then is in its files."""
    cancelled = await _jobs(context).cancel(context.known_caller.id, context.path_params["id"])
    return json_response(_batch_object(cancelled))


@asynccontextmanager
async def answer_line(
    app: AppState, key: Key, url: str, body: bytes, *, request_id: str
) -> AsyncIterator[LineAnswer]:
    """The answer to one line of a batch: what its endpoint would say, and what it is billed.

    It takes nothing of the key's rate limits, and waits behind all other requests. An error that
    asks to try again is no answer; one of ours is, so that no line is tried for ever.
    """

    async def receive() -> Any:
        return {"type": "http.request", "body": body, "more_body": False}

    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    scope = {"type": "http", "method": "POST", "headers": headers, "query_string": b""}
    context = RequestContext(scope, receive, app)
    context.request_id, context.caller, context.background = request_id, key, True
    retry_after_s: float | None = None
    try:
        try:
            response = await LINE_HANDLERS[url](context)
        except Exception as raised:  # an outermost loop, as the middleware is
            error = raised if isinstance(raised, ServiceError) else fault_of(raised)
            if isinstance(error, EngineFault):
                _log.error("line %s failed: %s", request_id, error)
            response = error_response(error, request_id=request_id)
            if TABLE[type(error)].status in (429, 503):
                retry_after_s = min(getattr(error, "retry_after_s", RETRY_S_MAX), RETRY_S_MAX)
        usage = RequestUsage(
            status=response.status_code,
            input_count=context.input_count,
            token_count=context.token_count if response.status_code < 400 else 0,
            duration_s=app.clock.now_s() - context.started_s,
            user=context.user,
        )
        yield LineAnswer(msgspec.Raw(bytes(response.body)), usage, context.model, retry_after_s)
    finally:
        context.memory.shrink(0)


class StreamedFile(Response):
    """A file's bytes, read while they are sent. Each piece has the deadline of a large answer's."""

    def __init__(self, file: FileRecord, first: bytes, pieces: AsyncGenerator[bytes]) -> None:
        super().__init__(media_type="application/octet-stream")
        self.headers["content-length"] = str(file.byte_count)
        self.headers["x-content-type-options"] = "nosniff"
        self._first = first
        self._pieces = pieces

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with aclosing(self._pieces) as pieces:
            await send({"type": "http.response.body", "body": self._first, "more_body": True})
            if scope["method"] != "HEAD":
                async for piece in pieces:
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class _Upload(UploadFile):
    """The file in a form: what is written to it goes where the file will lie."""

    def __init__(self, new: NewFile, filename: str | None) -> None:
        super().__init__(BytesIO(), filename=filename)
        self._new = new

    async def write(self, data: bytes) -> None:
        await self._new.receive(data)

    async def seek(self, offset: int) -> None:
        """Starlette's parser does this at the end of the file."""


class _UploadParser(MultiPartParser):
    """Starlette's parser, without its temporary files."""

    def __init__(self, context: RequestContext, new: NewFile) -> None:
        headers = Headers({"content-type": context.content_type})
        super().__init__(
            headers, context.pieces(), max_files=1, max_fields=8, max_part_size=FIELD_BYTES_MAX
        )
        self._new = new

    def on_headers_finished(self) -> None:
        super().on_headers_finished()
        part = self._current_part
        if part.file is not None:
            part.file.file.close()
            part.file = _Upload(self._new, part.file.filename)


async def _read_form(context: RequestContext, new: NewFile) -> dict[str, str]:
    """The fields of the form in the body; its file is in *new*, and here by the client's name."""
    if context.content_type.partition(";")[0].strip().lower() != FORM:
        raise MediaTypeUnsupported(f"Upload a file as {FORM}, with the fields file and purpose.")
    declared = context.headers.get(b"content-length", b"")
    if declared.isdigit():  # what is too large is better refused before it has been sent
        new.check_size(int(declared[:20]) - FORM_BYTES_MAX)
    upload_s_max = _jobs(context).files.limits.upload_s_max
    try:
        async with asyncio.timeout(upload_s_max):
            form = await _UploadParser(context, new).parse()
    except MultiPartException as refused:
        says = f"We could not parse the form in the body of your request: {refused.message}"
        raise MalformedBody(says) from None
    except TimeoutError:
        says = f"The upload did not arrive within {upload_s_max:g} seconds. Send smaller files."
        raise BodyTooSlow(says) from None
    return {
        name: value if isinstance(value, str) else value.filename or "file"
        for name, value in form.multi_items()
        if isinstance(value, _Upload) == (name == "file")
    }


def _filename(given: str) -> str:
    """A client's name for its file, without folders and what cannot be shown."""
    name = PurePosixPath(given.replace("\\", "/")).name
    clean = "".join(character for character in name if character.isprintable())
    return clean[:FILENAME_CHARS_MAX] or "file"


def _listed(
    kind: Callable[..., FileList | BatchList], data: list[Any], page: "FilesQuery | BatchesQuery"
) -> Response:
    """The response of a list: one more than the page has says that there are more."""
    shown_here = data[: page.limit]
    first, last = (shown_here[0].id, shown_here[-1].id) if data else (None, None)
    has_more = len(data) > page.limit
    return json_response(kind(data=shown_here, first_id=first, last_id=last, has_more=has_more))


def _jobs(context: RequestContext) -> Batches:
    assert context.app.batches is not None, "the face is served without them"
    return context.app.batches


async def _file(context: RequestContext) -> FileRecord:
    return await _jobs(context).files.find(context.known_caller.id, context.path_params["id"])


def _file_object(file: FileRecord) -> FileObject:
    return FileObject(
        id=file.id,
        bytes=file.byte_count,
        created_at=file.created_us // 1_000_000,
        expires_at=None if file.expires_us is None else file.expires_us // 1_000_000,
        filename=file.filename,
        purpose="batch" if file.purpose == "batch" else "batch_output",
    )


def _batch_object(job: JobRecord) -> BatchObject:
    times: dict[str, Any] = {
        f"{name.removesuffix('_us')}_at": None if at is None else at // 1_000_000
        for name in JobRecord.__slots__
        if name.endswith("_us")
        for at in [getattr(job, name)]
    }
    tokens = job.token_count
    return BatchObject(
        id=job.id,
        endpoint=job.endpoint,
        model=job.model,
        errors=None if job.errors is None else BatchErrors(data=json.loads(job.errors)),
        input_file_id=job.input_file_id,
        completion_window=f"{round((job.expires_us - job.created_us) / 3.6e9)}h",
        status=job.status,
        output_file_id=job.output_file_id,
        error_file_id=job.error_file_id,
        request_counts=RequestCounts(job.total, job.completed, job.failed),
        usage=BatchUsage(tokens, {"cached_tokens": 0}, 0, {"reasoning_tokens": 0}, tokens),
        metadata=None if job.metadata is None else json.loads(job.metadata),
        **times,
    )


FILES, FILE, BATCHES, BATCH = "/files", "/files/{id}", "/batches", "/batches/{id}"
_upload = keyed(FILES, upload_file, FileObject, UploadRequest)
_list_files = keyed(FILES, list_files, FileList)
OPERATIONS = (
    replace(_upload, media_type=FORM),
    replace(_list_files, query_type=FilesQuery),
    keyed(FILE, show_file, FileObject),
    replace(keyed(FILE, delete_file, FileDeleted), method="DELETE"),
    replace(keyed(FILE + "/content", file_content, FileObject), response_type=None),
    keyed(BATCHES, create_batch, BatchObject, CreateBatchRequest),
    replace(keyed(BATCHES, list_batches, BatchList), query_type=BatchesQuery),
    keyed(BATCH, show_batch, BatchObject),
    replace(keyed(BATCH + "/cancel", cancel_batch, BatchObject), method="POST"),
)
