"""What every `Embedder` promises to the routes above it.

Another implementation joins by adding itself to `EMBEDDERS`.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tests.engine.rig import ALL, Listener
from tests.ipc.rig import several
from tokenizers import models, pre_tokenizers, processors

from trivec.backends.fake import FakeBackend
from trivec.core.clock import SystemClock
from trivec.core.errors import DeadlineExceeded, Overloaded, TextTooLong, TokenIdUnknown
from trivec.core.ports import Backend, Embedder
from trivec.core.types import LongText, ModelCard, Output, Sequences
from trivec.engine import Engine, Workers
from trivec.settings import QueueLimits
from trivec.tokenizer import Tokenizer

TOKEN_COUNT_MAX = 12
VOCABULARY_SIZE = 64


def tokenizer_file(folder: Path) -> Path:
    words = ["<s>", "</s>", "<unk>", *(f"w{i}" for i in range(VOCABULARY_SIZE - 3))]
    codec = tokenizers.Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    codec.add_special_tokens(["<s>", "</s>"])
    codec.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    codec.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> $B:1 </s>:1",
        special_tokens=[("<s>", 0), ("</s>", 1)],
    )
    codec.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@asynccontextmanager
async def local_engine(
    folder: Path, backend: FakeBackend, outputs: Output = ALL, *, reached_by: Backend | None = None
) -> AsyncIterator[Embedder]:
    """An engine on *backend*, which it may reach by another one."""
    workers = Workers(2, clock=SystemClock(), observer=Listener())
    with ThreadPoolExecutor(2) as pool:
        engine = Engine(
            ModelCard(
                id="words",
                token_count_max=TOKEN_COUNT_MAX,
                vocabulary_size=VOCABULARY_SIZE,
                dimensions=8,
                outputs=outputs,
                labels=backend.labels,
                precision="fp32",
                created=0,
                owned_by="tests",
                late_chunking=True,
                include_prompt=False,
            ),
            tokenizer=Tokenizer(
                tokenizer_file(folder),
                token_count_max=TOKEN_COUNT_MAX,
                vocabulary_size=VOCABULARY_SIZE,
                pool=pool,
                include_prompt=False,
            ),
            backend=reached_by or backend,
            workers=workers,
            limits=QueueLimits(),
        )
        workers.start()
        yield engine
        await workers.stop(5)


@asynccontextmanager
async def engine_at_a_distance(
    folder: Path, backend: FakeBackend, outputs: Output = ALL
) -> AsyncIterator[Embedder]:
    """The same engine in another process, as an API process sees it."""
    async with (
        local_engine(folder, backend, outputs) as engine,
        several(engine, folder / "tokenizer.json") as remote,
    ):
        yield remote.embedder


@asynccontextmanager
async def engine_over_ray(
    folder: Path, backend: FakeBackend, outputs: Output = ALL
) -> AsyncIterator[Embedder]:
    """An engine as Ray Serve's ingress has it: its batches go through a handle."""
    from tests.cluster.handles import handle_backend

    with handle_backend(backend) as remote:
        async with local_engine(folder, backend, outputs, reached_by=remote) as engine:
            yield engine


EMBEDDERS: dict[str, Callable[..., AbstractAsyncContextManager[Embedder]]] = {
    "engine": local_engine,
    "remote": engine_at_a_distance,
    **({"ray": engine_over_ray} if find_spec("ray") else {}),
}


@pytest.fixture
def backend() -> FakeBackend:
    """What every embedder here drives; its gate holds whatever waits."""
    return FakeBackend(dimensions=8, outputs=ALL, slot_count=2)


@pytest.fixture(params=EMBEDDERS)
async def embedder(
    request: pytest.FixtureRequest, tmp_path: Path, backend: FakeBackend
) -> AsyncIterator[Embedder]:
    async with EMBEDDERS[request.param](tmp_path, backend) as embedder:
        yield embedder
        backend.gate.set()


async def read(embedder: Embedder, *texts: str) -> Sequences:
    return await embedder.tokenizer.tokenize(texts, long_text=LongText.REFUSE)


async def test_texts_and_their_own_ids_are_the_same_sequences(embedder: Embedder) -> None:
    texts = await read(embedder, "w1 w2 w3", "w9")
    ids = [np.array([4, 5, 6], np.int32), np.array([0, 12, 1], np.int32)]
    lists = await embedder.tokenizer.tokenize(ids, long_text=LongText.REFUSE)
    np.testing.assert_array_equal(texts.token_ids, lists.token_ids)
    np.testing.assert_array_equal(texts.cu_seqlens, lists.cu_seqlens)
    assert embedder.tokenizer.token_strings(texts.token_ids) == [
        "<s>",
        "w1",
        "w2",
        "w3",
        "</s>",
        "<s>",
        "w9",
        "</s>",
    ]


async def test_tokens_are_found_in_their_text_and_made_into_texts_again(
    embedder: Embedder,
) -> None:
    whole = await embedder.tokenizer.find_tokens(["w1  w20"], special_tokens=True)
    bare = await embedder.tokenizer.find_tokens(["w1  w20"], special_tokens=False)
    assert [tuple(token) for token in whole[0]] == [
        (0, "<s>", True, 0, 0),
        (4, "w1", False, 0, 2),
        (23, "w20", False, 4, 7),
        (1, "</s>", True, 0, 0),
    ]
    assert bare == [whole[0][1:3]]
    ids = [np.array([0, 4, 23, 1], np.int32), np.array([5], np.int32)]
    assert await embedder.tokenizer.decode(ids, special_tokens=False) == ["w1 w20", "w2"]
    assert (await embedder.tokenizer.decode(ids, special_tokens=True))[0] == "<s> w1 w20 </s>"
    with pytest.raises(TokenIdUnknown):
        await embedder.tokenizer.decode(
            [np.array([VOCABULARY_SIZE], np.int32)], special_tokens=True
        )
    with pytest.raises(TextTooLong):
        await embedder.tokenizer.find_tokens(["w1", "w2 " * 1000], special_tokens=True)


async def test_what_cannot_be_read_is_refused_by_its_place(embedder: Embedder) -> None:
    with pytest.raises(TextTooLong) as long:
        await read(embedder, "w1", "w1 " * TOKEN_COUNT_MAX)
    assert long.value.param == "input[1]"
    with pytest.raises(TokenIdUnknown) as unknown:
        await embedder.tokenizer.tokenize(
            [np.array([VOCABULARY_SIZE], np.int32)], long_text=LongText.REFUSE
        )
    assert unknown.value.param == "input[0]"


@pytest.mark.parametrize("outputs", [Output.DENSE, Output.SPARSE, Output.MULTI, ALL], ids=str)
async def test_every_output_that_was_asked_for_is_there_and_no_other(
    embedder: Embedder, outputs: Output
) -> None:
    sequences = await read(embedder, "w1 w2 w3", "w4")
    vectors = (await embedder.embed(sequences, outputs)).vectors
    assert vectors.dense.shape == (2, embedder.card.dimensions)
    assert vectors.dense.dtype == np.float32
    assert [one is not None for one in vectors.sparse] == [Output.SPARSE in outputs] * 2
    assert [None if one is None else len(one) for one in vectors.multi] == (
        [4, 2] if Output.MULTI in outputs else [None, None]
    )


async def test_a_text_has_the_same_bits_alone_and_among_many_at_any_place(
    embedder: Embedder,
) -> None:
    texts = [" ".join(f"w{(i * j) % 60}" for j in range(1 + i % 9)) for i in range(1, 200)]
    together = (await embedder.embed(await read(embedder, *texts), Output.DENSE)).vectors
    replies = await asyncio.gather(
        *[embedder.embed(await read(embedder, text), Output.DENSE) for text in texts]
    )
    for i, reply in enumerate(replies):
        np.testing.assert_array_equal(reply.vectors.dense[0], together.dense[i])


@pytest.fixture(params=EMBEDDERS)
async def reranker(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Embedder]:
    """A model that yields scores alone, of two labels."""
    backend = FakeBackend(dimensions=8, outputs=Output.SCORE, labels=2, slot_count=2)
    async with EMBEDDERS[request.param](tmp_path, backend, Output.SCORE) as embedder:
        yield embedder


async def test_pairs_are_scored_the_same_alone_and_among_many(reranker: Embedder) -> None:
    pairs = [(f"w{i % 3}", " ".join(f"w{j}" for j in range(1 + i % 7))) for i in range(300)]
    sequences = await reranker.tokenizer.tokenize_pairs(pairs, long_text=LongText.REFUSE)
    scores = (await reranker.embed(sequences, Output.SCORE)).vectors.score
    assert scores.shape == (300, 2)
    assert scores.dtype == np.float32
    for i in (0, 7, 299):
        alone = await reranker.tokenizer.tokenize_pairs([pairs[i]], long_text=LongText.REFUSE)
        reply = await reranker.embed(alone, Output.SCORE)
        np.testing.assert_array_equal(reply.vectors.score[0], scores[i])


async def test_of_a_long_pair_the_document_is_cut_or_it_is_refused_by_its_place(
    reranker: Embedder,
) -> None:
    pairs = [("w1", "w2"), ("w1 w2", "w3 " * TOKEN_COUNT_MAX)]
    cut = await reranker.tokenizer.tokenize_pairs(pairs, long_text=LongText.CUT_END)
    assert cut.lengths().tolist() == [5, TOKEN_COUNT_MAX]
    assert cut.truncated[1].original_tokens == 5 + TOKEN_COUNT_MAX
    with pytest.raises(TextTooLong) as long:
        await reranker.tokenizer.tokenize_pairs(pairs, long_text=LongText.REFUSE)
    assert long.value.param == "input[1]"
    with pytest.raises(TextTooLong) as query:
        await reranker.tokenizer.tokenize_pairs([("w1 " * 12, "w2")], long_text=LongText.CUT_END)
    assert query.value.param == "query"


async def test_a_prompt_is_before_each_text_and_may_be_left_out_of_the_mean(
    embedder: Embedder, backend: FakeBackend
) -> None:
    texts = ["w1", "w2 w3"]
    found = await embedder.tokenizer.tokenize(texts, long_text=LongText.REFUSE, prompt="w8 w9 ")
    np.testing.assert_array_equal(
        found.token_ids, (await read(embedder, "w8 w9 w1", "w8 w9 w2 w3")).token_ids
    )
    assert found.skip is not None
    assert found.skip.tolist() == [3, 3]  # with the opening token
    await embedder.embed(found, Output.DENSE)
    skips = [call.batch.skip for call in backend.ran]
    assert [one.tolist() for one in skips if one is not None] == [[3, 3]]


@pytest.mark.parametrize(
    ("chunk_size", "counts"), [(None, [2]), (1, [3, 1])], ids=["each-text", "each-token"]
)
async def test_chunks_have_vectors_of_their_own(
    embedder: Embedder, chunk_size: int | None, counts: list[int]
) -> None:
    found = await embedder.tokenizer.tokenize_chunks(["w1 w2 w3", "w4"], chunk_size=chunk_size)
    reply = await embedder.embed(found, Output.CHUNKS)
    assert [len(rows) for rows in reply.vectors.chunks if rows is not None] == counts


async def test_times_are_told_and_are_never_negative(embedder: Embedder) -> None:
    reply = await embedder.embed(await read(embedder, "w1"), Output.DENSE)
    assert reply.queue_s >= 0
    assert reply.compute_s >= 0


async def test_a_deadline_that_has_passed_is_refused_with_a_time_to_return(
    embedder: Embedder,
) -> None:
    with pytest.raises(DeadlineExceeded) as late:
        await embedder.embed(await read(embedder, "w1"), Output.DENSE, timeout_s=-1.0)
    assert late.value.retry_after_s >= 0


async def test_a_line_with_room_lets_the_smallest_and_the_largest_through(
    embedder: Embedder,
) -> None:
    embedder.check_admission(2)
    embedder.check_admission(300_000)


async def test_a_full_queue_refuses_and_has_room_again_once_calls_have_left(
    embedder: Embedder, backend: FakeBackend
) -> None:
    backend.gate.clear()
    sequences = await read(embedder, *["w1 w2"] * 20_000)
    calls = [asyncio.create_task(embedder.embed(sequences, Output.DENSE)) for _ in range(40)]
    done, _ = await asyncio.wait(calls, return_when=asyncio.FIRST_EXCEPTION)
    assert any(isinstance(call.exception(), Overloaded) for call in done)
    with pytest.raises(Overloaded) as full:
        await embedder.embed(sequences, Output.DENSE)
    assert full.value.retry_after_s > 0
    for call in calls:
        call.cancel()
    await asyncio.wait(calls)
    embedder.check_admission(sequences.token_count)


async def test_a_cancelled_call_leaves_the_others_be(embedder: Embedder) -> None:
    sequences = await read(embedder, *(f"w{i}" for i in range(50)))
    calls = [asyncio.create_task(embedder.embed(sequences, Output.DENSE)) for _ in range(20)]
    await asyncio.sleep(0)
    for call in calls[::2]:
        call.cancel()
    await asyncio.wait(calls)
    assert all(call.cancelled() or call.exception() is None for call in calls[::2])
    assert {len(call.result().vectors) for call in calls[1::2]} == {50}
