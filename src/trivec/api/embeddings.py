"""`POST /embeddings`: the walk of one request, from its body to its vectors."""

import asyncio
from collections.abc import Sequence

from trivec.api.answers import Answer
from trivec.api.bodies import read_json_body
from trivec.api.encoding import (
    IN_LINE_BYTES_MAX,
    Result,
    check_answer_fits,
    encode,
    estimate_bytes,
    estimate_dense_bytes,
    estimate_vector_bytes,
)
from trivec.api.guess import Guess
from trivec.api.metering import Meter
from trivec.api.questions import (
    LONG_TEXT,
    EmbeddingsQuestion,
    check_against_card,
    embeddings_question,
)
from trivec.api.shelf import Shelf
from trivec.api.visit import Visit
from trivec.core.errors import RequestTooLarge
from trivec.core.ports import Clock, Embedder
from trivec.core.types import Output, Sequences, SparseVector
from trivec.settings import HttpLimits


class Embeddings:
    """Everything that can be refused is refused before the model is touched."""

    def __init__(self, shelf: Shelf, meter: Meter, limits: HttpLimits, clock: Clock) -> None:
        self._shelf = shelf
        self._meter = meter
        self._limits = limits
        self._clock = clock
        self._guesses: dict[str, Guess] = {}  # by model

    async def __call__(self, visit: Visit) -> Answer:
        body = await read_json_body(visit, self._limits)
        self._shelf.check_admission()  # after reading: a connection with an unread body is lost
        question = embeddings_question(body, self._limits)
        visit.user, visit.input_count = question.user, len(question.inputs)
        embedder = self._shelf.find(question.model, visit)
        check_against_card(question, embedder.card)
        dense_bytes = estimate_dense_bytes(question, embedder.card)
        visit.held.add_answer(dense_bytes)  # before the work of tokenising
        guess = self._guesses.setdefault(embedder.card.id, Guess())
        likely = min(
            guess.tokens_of(question.inputs, embedder.card), self._limits.request_tokens_max
        )
        embedder.check_admission(likely)
        visit.watch()
        await self._meter.open(visit, body, tokens_follow=True)
        del body
        with guess.under_way(likely):
            sequences = await self._tokenize(visit, question, embedder)
            guess.learn(question.inputs, sequences.token_count)
            answer_bytes = estimate_bytes(question, sequences, embedder.card)
            check_answer_fits(answer_bytes, answer_bytes_max=self._limits.answer_bytes_max)
            vector_bytes = estimate_vector_bytes(question, sequences, embedder.card)
            visit.held.add_answer(answer_bytes + vector_bytes - dense_bytes)
            await self._meter.reserve_tokens(visit, sequences.token_count)
        result = await self._embed(visit, question, embedder, sequences)
        return await self._encode(visit, result, answer_bytes)

    async def _tokenize(
        self, visit: Visit, question: EmbeddingsQuestion, embedder: Embedder
    ) -> Sequences:
        started_s = self._clock.now_s()
        inputs = question.inputs.for_model(embedder.card)
        assert visit.caller is not None, "the route is not open"
        default = LONG_TEXT[visit.caller.truncate or self._limits.truncate]
        sequences = await embedder.tokenize(
            inputs, long_text=question.long_text or default, are_own=question.inputs.are_own
        )
        visit.timings.tokenize_s = self._clock.now_s() - started_s
        token_count_max = self._limits.request_tokens_max
        if sequences.token_count > token_count_max:
            raise RequestTooLarge(
                token_count=sequences.token_count, token_count_max=token_count_max
            )
        return sequences

    async def _embed(
        self,
        visit: Visit,
        question: EmbeddingsQuestion,
        embedder: Embedder,
        sequences: Sequences,
    ) -> Result:
        deadline_s = visit.deadline_s - self._clock.now_s()
        reply = await embedder.embed(sequences, question.outputs, deadline_s=deadline_s)
        visit.token_count = sequences.token_count
        visit.timings.queue_s, visit.timings.compute_s = reply.queue_s, reply.compute_s
        spelled = None
        if question.return_tokens and Output.SPARSE in question.outputs:
            spelled = await _spell(reply.vectors.sparse, embedder)
        return Result(question, sequences, reply.vectors, spelled)

    async def _encode(self, visit: Visit, result: Result, answer_bytes: int) -> Answer:
        started_s = self._clock.now_s()
        if answer_bytes <= IN_LINE_BYTES_MAX[result.question.encoding]:
            body = encode(result)
        else:  # in a thread of the event loop's own pool, so that nobody else waits for it
            body = await asyncio.to_thread(encode, result)
        visit.timings.encode_s = self._clock.now_s() - started_s
        answer = Answer(200, body)
        visit.held.shrink(answer.byte_count)
        return answer


async def _spell(vectors: Sequence[SparseVector | None], embedder: Embedder) -> list[list[str]]:
    """The strings of each vector's ids; others get a turn after every vector."""
    spelled = []
    for vector in vectors:
        assert vector is not None, "strings are spelled only where sparse vectors were asked for"
        spelled.append(embedder.token_strings(vector.token_ids))
        await asyncio.sleep(0)
    return spelled
