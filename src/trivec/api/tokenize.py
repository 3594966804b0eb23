"""`POST /tokenize`: counting tokens without spending any."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec

from trivec.api.answers import Answer
from trivec.api.bodies import read_json_body
from trivec.api.encoding import IN_LINE_BYTES_MAX, check_answer_fits
from trivec.api.metering import Meter
from trivec.api.numbers import INT_TEXT_BYTES
from trivec.api.questions import TokenizeQuestion, tokenize_question
from trivec.api.schemas import TokenizeAnswer, TokenizedText
from trivec.api.shelf import Shelf
from trivec.api.visit import Visit
from trivec.core.errors import Overloaded
from trivec.core.ports import Clock, Embedder
from trivec.core.types import LongText, Sequences
from trivec.settings import HttpLimits

AT_ONCE = 1  # large requests that are tokenised: the threads are those of embeddings
WAITING_MAX = 4
LARGE_BYTES = 64 * 1024  # of a body; smaller ones take no turn
TOKEN_BYTES = 48  # an id in an array, as a Python integer in a list, and as text
SPELLED_BYTES = 72  # its string, in a list


class Tokenize:
    """A text that would not fit is counted all the same, and said not to fit."""

    def __init__(self, shelf: Shelf, meter: Meter, limits: HttpLimits, clock: Clock) -> None:
        self._shelf = shelf
        self._meter = meter
        self._limits = limits
        self._clock = clock
        self._turns = asyncio.Semaphore(AT_ONCE)
        self._waiting = 0

    async def __call__(self, visit: Visit) -> Answer:
        self._check_room(visit.declared_bytes)
        body = await read_json_body(visit, self._limits)
        visit.watch()
        async with self._turn(len(body)):
            answer = await self._count(visit, body)
        visit.held.shrink(answer.byte_count)
        return answer

    async def _count(self, visit: Visit, body: bytes) -> Answer:
        question = tokenize_question(body, self._limits)
        visit.input_count = len(question.inputs)
        embedder = self._shelf.find(question.model, visit)
        await self._meter.open(visit, body)
        started_s = self._clock.now_s()
        inputs = question.inputs.for_model(embedder.card)
        sequences = await embedder.tokenize(
            inputs, long_text=LongText.KEEP, are_own=question.inputs.are_own
        )
        visit.timings.tokenize_s = self._clock.now_s() - started_s
        answer_bytes = sequences.token_count * INT_TEXT_BYTES
        check_answer_fits(answer_bytes, answer_bytes_max=self._limits.answer_bytes_max)
        spelled_bytes = SPELLED_BYTES if question.return_tokens else 0
        visit.held.add_answer(sequences.token_count * (TOKEN_BYTES + spelled_bytes))
        return await self._encode(question, sequences, embedder, answer_bytes)

    def _check_room(self, body_bytes: int) -> None:
        """Refuse a large request, if need be unread, while as many as may are waiting."""
        if body_bytes >= LARGE_BYTES and self._waiting >= WAITING_MAX:
            raise Overloaded(
                f"{WAITING_MAX} large requests to tokenize are waiting, which is the most. "
                "Please try again shortly, with fewer inputs at a time.",
                retry_after_s=random.uniform(5, 10),  # noqa: S311 # not all at once again
            )

    @asynccontextmanager
    async def _turn(self, body_bytes: int) -> AsyncIterator[None]:
        """A turn of the few that large requests have. Raises `Overloaded` where too many wait."""
        if body_bytes < LARGE_BYTES:
            yield
            return
        self._check_room(body_bytes)
        self._waiting += 1
        try:
            await self._turns.acquire()
        finally:
            self._waiting -= 1
        try:
            yield
        finally:
            self._turns.release()

    async def _encode(
        self,
        question: TokenizeQuestion,
        sequences: Sequences,
        embedder: Embedder,
        answer_bytes: int,
    ) -> Answer:
        data = []
        for i in range(len(sequences)):
            data.append(_tokenized(i, question, sequences, embedder))
            await asyncio.sleep(0)  # others get a turn after every text
        answer = TokenizeAnswer(
            object="list",
            model=question.model,
            data=data,
            token_count_max=embedder.card.token_count_max,
            total_tokens=sequences.token_count,
            request_tokens_max=self._limits.request_tokens_max,
            fits=sequences.token_count <= self._limits.request_tokens_max
            and all(text.fits for text in data),
        )
        if answer_bytes <= IN_LINE_BYTES_MAX["float"]:
            return Answer(200, (msgspec.json.encode(answer),))
        return Answer(200, (await asyncio.to_thread(msgspec.json.encode, answer),))


def _tokenized(
    index: int, question: TokenizeQuestion, sequences: Sequences, embedder: Embedder
) -> TokenizedText:
    start, end = sequences.cu_seqlens[index : index + 2].tolist()
    token_ids = sequences.token_ids[start:end]
    return TokenizedText(
        object="tokens",
        index=index,
        token_ids=token_ids.tolist(),
        token_count=end - start,
        fits=end - start <= embedder.card.token_count_max and index not in sequences.truncated,
        tokens=embedder.token_strings(token_ids) if question.return_tokens else None,
    )
