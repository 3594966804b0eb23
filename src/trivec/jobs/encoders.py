"""Encoders: texts to vectors, by an embedder of this process or by a server over HTTP.

A text that cannot be embedded is named, with the reason, and holds up no other.
"""

import asyncio
import base64
import logging
import re
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from itertools import chain
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias
from urllib.parse import quote, urlsplit

import msgspec
import numpy as np

from trivec.core.errors import BusyError, EngineFault, JobFailed, RequestError
from trivec.core.ports import Embedder
from trivec.core.types import Float32Array, LongText, Output, Rows, Sequences, SparseVector, Vectors
from trivec.jobs import GO_ON
from trivec.jobs.corpus import cuts

Truncate: TypeAlias = Literal["none", "end", "start"]
ModelIdentity: TypeAlias = Mapping[str, str | int | None]
LONG_TEXT = {"none": LongText.KEEP, "end": LongText.CUT_END, "start": LongText.CUT_START}
OPEN_REQUESTS = 2  # while one ends, the other keeps the device busy
# Two that are being embedded, two tokenised ahead, one on its way to the disk.
SHARDS_AT_ONCE = 5
# Texts in a row on which a model fails one by one: then it is the model, and not the texts.
FAILED_MAX = 8

CONNECTIONS = 4
REQUEST_TEXTS, REQUEST_CHARACTERS = 64, 128 * 1024  # whichever is reached first
ANSWER_S_MAX = 600.0
TRIES_MAX = 8  # with pauses of 1, 2, 4, … s between them: two minutes
PAUSE_S_MAX = 60.0
BUSY = {502, 503, 504}
TEXT_AT_FAULT = {400, 413, 422}  # or several texts together
FAILED = "the server failed on it"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Encoded:
    """The result of encoding some texts."""

    vectors: Vectors | None  # of those that are not bad, in their order; None: all are
    token_count: int
    bad: Mapping[int, str] = field(default_factory=dict)  # by index: why there is no vector
    truncated: Sequence[int] = ()  # indices


class TextEncoder(Protocol):
    """Turns texts into vectors, of several shards at a time; used on the event loop."""

    @property
    def model(self) -> ModelIdentity:
        """What vectors depend on beside the texts, for the manifest."""
        ...

    @property
    def shards_at_once(self) -> int:
        """How many shards, which are in memory, keep it busy."""
        ...

    async def encode(self, texts: Sequence[str]) -> Encoded:
        """Vectors of *texts*, at least one, none empty. Raises `JobFailed` if it cannot go on."""
        ...


class EmbedderEncoder:
    """An encoder over an `Embedder`: texts are tokenised while those before them are embedded."""

    shards_at_once = SHARDS_AT_ONCE

    def __init__(
        self,
        embedder: Embedder,
        outputs: Output,
        *,
        model: ModelIdentity,
        truncate: Truncate,
        prompt: str = "",
    ) -> None:
        self.model = model
        self._embedder = embedder
        self._outputs = outputs
        self._tokenize = partial(
            embedder.tokenizer.tokenize, long_text=LONG_TEXT[truncate], prompt=prompt
        )
        self._is_cut = truncate != "none"
        self._open_requests = asyncio.Semaphore(OPEN_REQUESTS)

    async def encode(self, texts: Sequence[str]) -> Encoded:
        """See `TextEncoder`."""
        bad: dict[int, str] = {}
        try:
            sequences = await self._tokenize(texts)
        except (RequestError, EngineFault):  # one of the texts is at fault
            bad = await self._find_bad(texts)
            if len(bad) == len(texts):
                return Encoded(None, 0, bad)
            sequences = await self._tokenize([one for i, one in enumerate(texts) if i not in bad])
        places = [i for i in range(len(texts)) if i not in bad]
        truncated = [places[i] for i in sequences.truncated]
        if not self._is_cut:
            lengths, length_max = sequences.lengths(), self._embedder.card.token_count_max
            too_long = {*np.flatnonzero(lengths > length_max).tolist(), *sequences.truncated}
            for i in too_long:
                bad[places[i]] = (
                    f"has {lengths[i]} tokens, and the model reads {length_max}; --truncate end "
                    "cuts it"
                )
            if too_long:
                kept = [i for i in range(len(places)) if i not in too_long]
                sequences = taken(sequences, kept)
                places = [places[i] for i in kept]
            truncated = []
        if not places:
            return Encoded(None, 0, bad)
        async with self._open_requests:
            parts, failed = await self._embed(sequences)
        if not parts and len(failed) >= FAILED_MAX:
            raise JobFailed(f"the model failed on {len(failed)} texts in a row. {GO_ON}")
        bad |= {places[i]: reason for i, reason in failed.items()}
        vectors = joined(parts) if parts else None
        return Encoded(vectors, sequences.token_count, bad, [i for i in truncated if i not in bad])

    async def _find_bad(self, texts: Sequence[str]) -> dict[int, str]:
        """Why some of *texts* cannot be tokenised, each tried by itself."""
        bad = {}
        for i, text in enumerate(texts):
            try:
                await self._tokenize([text])
            except (RequestError, EngineFault) as fault:
                bad[i] = str(fault)
        return bad

    async def _embed(self, sequences: Sequences) -> tuple[list[Vectors], dict[int, str]]:
        """Vectors of *sequences*, and why some have none: halves are tried until those are alone."""
        try:
            return [(await self._embedder.embed(sequences, self._outputs)).vectors], {}
        except BusyError as fault:
            raise JobFailed(f"the model cannot go on: {fault} {GO_ON}") from fault
        except EngineFault:
            if len(sequences) == 1:
                return [], {0: "the model failed on it"}
        half, count = len(sequences) // 2, len(sequences)
        parts, failed = await self._embed(taken(sequences, range(half)))
        more, failed_too = await self._embed(taken(sequences, range(half, count)))
        return parts + more, failed | {half + i: one for i, one in failed_too.items()}


class _Answer(NamedTuple):
    """A server's vectors of one text."""

    dense: Float32Array  # [dimensions]
    sparse: SparseVector | None
    multi: Float32Array | None  # [tokens - 1, dimensions]
    is_truncated: bool


class HttpEncoder:
    """An encoder over a server's `/embeddings`, with a few threads of a connection each.

    A server that is busy or out of reach is asked again for two minutes; a rate limit is waited for.
    """

    shards_at_once = SHARDS_AT_ONCE

    def __init__(
        self,
        url: str,
        key: str | None,
        *,
        model: str | None,
        outputs: Output,
        truncate: Truncate,
        asks: Mapping[str, object] = MappingProxyType({}),
    ) -> None:
        """*url* has the prefix, as `http://127.0.0.1:8000/v1`. *asks*: more fields of each request.

        Raises `JobFailed`.
        """
        self._url = url.rstrip("/")
        self._address = urlsplit(self._url)
        if self._address.scheme not in ("http", "https") or not self._address.hostname:
            raise JobFailed(f"--url {url} is no address; give one as http://127.0.0.1:8000/v1")
        self._headers = {"Content-Type": "application/json"}
        if key is not None:
            self._headers["Authorization"] = f"Bearer {key}"
        self._idle: list[HTTPConnection] = []
        self._closed = threading.Event()
        self._is_waiting = False  # for the server to answer
        self._pool = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="trivec-http")
        names = {Output.DENSE: "dense", Output.SPARSE: "sparse", Output.MULTI: "multi"}
        wanted = "&".join(name for one, name in names.items() if one in outputs | Output.DENSE)
        if model is None:
            served = self._ask("/models").get("data")
            if not served:
                raise JobFailed(f"{url} serves no model yet; try again")
            model = served[0]["id"]
        card = self._ask(f"/models/{quote(model)}")
        self.model: ModelIdentity = {
            name: card.get(name) for name in ("id", "precision", "recipe", "dimensions")
        }
        if not isinstance(card.get("dimensions"), int):
            raise JobFailed(f"{url} does not say how long the vectors of {model} are: no Trivec?")
        kind = {"encoding_format": "base64", "output_type": wanted, "truncate": truncate}
        self._head = {"model": model, **kind, **asks}

    async def encode(self, texts: Sequence[str]) -> Encoded:
        """See `TextEncoder`."""
        loop = asyncio.get_running_loop()
        asked = [
            loop.run_in_executor(self._pool, self._request, texts[start:end])
            for start, end in cuts(texts, REQUEST_CHARACTERS, count_max=REQUEST_TEXTS)
        ]
        rows, token_count = list[_Answer | str](), 0
        for answered, tokens in await asyncio.gather(*asked):
            rows += answered
            token_count += tokens
        bad = {i: row for i, row in enumerate(rows) if isinstance(row, str)}
        good = {i: row for i, row in enumerate(rows) if not isinstance(row, str)}
        vectors = None
        if good:
            dense, sparse, multi, _ = zip(*good.values(), strict=True)
            vectors = Vectors.of(np.stack(dense), sparse, multi)
        return Encoded(vectors, token_count, bad, [i for i in good if good[i].is_truncated])

    def close(self) -> None:
        """Send no more requests, and wait for those that were sent."""
        self._closed.set()
        self._pool.shutdown(cancel_futures=True)
        self._close_idle()

    def _close_idle(self) -> None:
        with suppress(IndexError):
            while True:
                self._idle.pop().close()

    def _request(self, texts: Sequence[str]) -> tuple[list[_Answer | str], int]:
        """A row or a reason for each of *texts*, and their tokens."""
        rows, token_count = self._rows(texts)
        is_down = all(isinstance(one, str) and FAILED in one for one in rows)
        if is_down and len(texts) >= FAILED_MAX:
            raise JobFailed(f"{self._url} failed on {len(texts)} texts in a row. {GO_ON}")
        return rows, token_count

    def _rows(self, texts: Sequence[str]) -> tuple[list[_Answer | str], int]:
        """As `_request`. Where the server refuses, the text it names is left out, or all are halved."""
        if not texts:
            return [], 0
        refused = self._ask("/embeddings", {**self._head, "input": texts})
        if "data" in refused:
            items = sorted(refused["data"], key=lambda item: int(item["index"]))
            return [_answer(item) for item in items], int(refused["usage"]["total_tokens"])
        if "message" not in refused:
            raise JobFailed(f"{self._url}/embeddings answers without vectors")
        message, param = refused["message"], refused.get("param") or "input"
        if not param.startswith("input"):
            raise JobFailed(f"{self._url} refuses {param}: {message}")
        if len(texts) == 1:
            return [message], 0
        named = re.match(r"input\[(\d+)\]", param)
        at = int(named[1]) if named else len(texts) // 2
        before, tokens = self._rows(texts[:at])
        own: list[_Answer | str] = [message] if named else []
        after, tokens_after = self._rows(texts[at + len(own) :])
        return before + own + after, tokens + tokens_after

    def _ask(self, path: str, body: object = None) -> dict[str, Any]:
        """The answer to one request, or its error where the texts are at fault. Blocks."""
        reason, pause_s, tries = "", 1.0, 0
        while tries < TRIES_MAX and not self._closed.is_set():
            connection = self._connection()
            try:
                content = None if body is None else msgspec.json.encode(body)
                method = "GET" if body is None else "POST"
                connection.request(method, self._address.path + path, content, self._headers)
                answer = connection.getresponse()
                read = answer.read()
            except (OSError, HTTPException) as fault:
                connection.close()
                reason = f"{type(fault).__name__}: {fault}"
            else:
                self._idle.append(connection)
                if answer.status == HTTPStatus.OK:
                    self._is_waiting = False
                    return _json_object(read)
                error = _json_object(read).get("error")
                error = error if isinstance(error, dict) else {}
                reason = f"{answer.status} {error.get('message') or read[:200].decode('utf-8', 'replace')}"
                if body is not None and answer.status in TEXT_AT_FAULT:
                    return {**error, "message": reason}
                if body is not None and answer.status == HTTPStatus.INTERNAL_SERVER_ERROR:
                    return {"message": f"{FAILED}: {reason}"}
                if answer.status not in (*BUSY, HTTPStatus.TOO_MANY_REQUESTS):
                    break
                tries -= answer.status == HTTPStatus.TOO_MANY_REQUESTS  # which ends by itself
                with suppress(ValueError):
                    pause_s = float(answer.headers.get("retry-after", ""))
            tries += 1
            if tries == 1 and not self._is_waiting:
                self._is_waiting = True  # said once, and not by each connection
                _log.warning("%s is waited for, two minutes at most: %s", self._url, reason)
            if tries < TRIES_MAX:
                self._closed.wait(min(pause_s, PAUSE_S_MAX))
                pause_s *= 2
        self._close_idle()
        raise JobFailed(f"{self._url}{path} does not answer as it should: {reason}")

    def _connection(self) -> HTTPConnection:
        """An idle connection, or a new one."""
        try:
            return self._idle.pop()
        except IndexError:
            scheme = HTTPSConnection if self._address.scheme == "https" else HTTPConnection
            return scheme(self._address.netloc, timeout=ANSWER_S_MAX)


def taken(sequences: Sequences, indices: Sequence[int]) -> Sequences:
    """The sequences at *indices*, none of which was cut."""
    ids = np.split(sequences.token_ids, sequences.cu_seqlens[1:-1])
    skip = None if sequences.skip is None else sequences.skip[list(indices)]
    return replace(Sequences.pack([ids[i] for i in indices]), skip=skip)


def joined(parts: Sequence[Vectors]) -> Vectors:
    """The rows of all *parts*, one after another."""
    if len(parts) == 1:
        return parts[0]
    rows: dict[Output, Rows] = {}
    for output in parts[0].rows:
        own = [part[output] for part in parts]
        if all(isinstance(one, np.ndarray) for one in own):
            rows[output] = np.concatenate([np.asarray(one) for one in own])
        else:
            rows[output] = tuple(chain.from_iterable(own))
    return Vectors(rows)


def _json_object(read: bytes) -> dict[str, Any]:
    with suppress(msgspec.DecodeError):
        found = msgspec.json.decode(read)
        if isinstance(found, dict):
            return found
    return {}


def _answer(item: Mapping[str, Any]) -> _Answer:
    sparse, multi = item.get("sparse_embedding"), item.get("multi_embedding")
    return _Answer(
        dense=_array(item["embedding"], "<f4"),
        sparse=sparse
        and SparseVector(_array(sparse["indices"], "<i4"), _array(sparse["values"], "<f4")),
        multi=multi and _array(multi["data"], "<f4").reshape(multi["shape"]),
        is_truncated="truncated" in item,
    )


def _array(text: str, dtype: str) -> Any:
    return np.frombuffer(base64.b64decode(text), dtype)
