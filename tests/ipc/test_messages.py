"""Messages: what goes in comes out, bit for bit, and what does not fit is refused."""

import struct
from dataclasses import replace
from types import MappingProxyType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.engine.rig import ALL, card, sequences

from trivec.core.errors import (
    BusyError,
    DeadlineExceeded,
    Draining,
    EngineFault,
    Loading,
    Overloaded,
    ServiceError,
)
from trivec.core.types import Output, Reply, SparseVector, Vectors
from trivec.ipc.frames import WireBroken
from trivec.ipc.messages import (
    Ask,
    Hello,
    ModelHello,
    read_ask,
    read_hello,
    read_pages,
    read_refusal,
    read_reply,
    write_ask,
    write_hello,
    write_pages,
    write_refusal,
    write_reply,
)

CARDS = (card("first", Output.DENSE), card("second", ALL))
ASK = Ask(1, sequences(3, 1, 8), Output.DENSE | Output.MULTI, 12.5)


def joined(pieces: list[memoryview]) -> bytearray:
    return bytearray(b"".join(pieces))


def vectors(outputs: Output, *row_counts: int) -> Vectors:
    draw = np.random.default_rng(3)
    dense = draw.standard_normal((len(row_counts), 8), np.float32)
    sparse = [
        SparseVector(np.arange(count, dtype=np.int32), draw.random(count, np.float32))
        for count in row_counts
    ]
    multi = [draw.standard_normal((count, 4), np.float32) for count in row_counts]
    nothing = (None,) * len(row_counts)
    return Vectors.of(
        dense,
        tuple(sparse) if Output.SPARSE in outputs else nothing,
        tuple(multi) if Output.MULTI in outputs else nothing,
    )


@pytest.mark.parametrize("deadline_s", [None, 0.25, -1.0])
def test_a_request_arrives_as_it_was_sent(deadline_s: float | None) -> None:
    found = read_ask(joined(write_ask(replace(ASK, deadline_s=deadline_s))), CARDS)
    assert (found.model, found.outputs, found.deadline_s) == (1, ASK.outputs, deadline_s)
    np.testing.assert_array_equal(found.sequences.token_ids, ASK.sequences.token_ids)
    np.testing.assert_array_equal(found.sequences.cu_seqlens, ASK.sequences.cu_seqlens)


@pytest.mark.parametrize("outputs", [Output.DENSE, ALL, Output.MULTI, Output.SPARSE], ids=str)
@pytest.mark.parametrize("row_counts", [(5, 0, 2), (0,), (0, 0)], ids=str)
def test_vectors_arrive_bit_for_bit(outputs: Output, row_counts: tuple[int, ...]) -> None:
    sent = Reply(vectors(outputs, *row_counts), 0.5, 1.5)
    found = read_reply(joined(write_reply(sent)))
    assert (found.queue_s, found.compute_s) == (0.5, 1.5)
    np.testing.assert_array_equal(found.vectors.dense, sent.vectors.dense)
    for ours, theirs in zip(found.vectors.sparse, sent.vectors.sparse, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            np.testing.assert_array_equal(ours.token_ids, theirs.token_ids)
            np.testing.assert_array_equal(ours.weights, theirs.weights)
    for rows, their_rows in zip(found.vectors.multi, sent.vectors.multi, strict=True):
        assert (rows is None) == (their_rows is None)
        if rows is not None and their_rows is not None:
            np.testing.assert_array_equal(rows, their_rows)


def changed(at: int, word: bytes) -> bytearray:
    body = joined(write_ask(ASK))
    body[at : at + len(word)] = word
    return body


HEAD = 24  # bytes before a request's starts, which are 0, 3, 4, 12


@pytest.mark.parametrize(
    ("body", "words"),
    [
        pytest.param(b"short", "cut short", id="less-than-its-head"),
        pytest.param(joined(write_ask(ASK))[:-1], "ends", id="a-byte-short"),
        pytest.param(joined(write_ask(ASK)) + b"x", "left over", id="a-byte-long"),
        pytest.param(changed(0, b"\x02\x00"), "model 2 of 2", id="a-model-that-is-not-there"),
        pytest.param(changed(0, b"\x00\x00"), "does not have", id="an-output-it-has-not"),
        pytest.param(changed(2, b"\x00\x00"), "outputs 0", id="no-output"),
        pytest.param(changed(HEAD, b"\x01"), "do not span", id="starts-that-begin-late"),
        pytest.param(changed(HEAD + 4, b"\x00"), "is empty", id="an-empty-sequence"),
        pytest.param(changed(HEAD + 4, b"\x05"), "is empty", id="starts-that-go-back"),
        pytest.param(changed(HEAD + 16, b"\xff\xff\xff\xff"), "vocabulary", id="an-id-below-0"),
        pytest.param(changed(HEAD + 16, b"\xff\xff\xff\x7f"), "vocabulary", id="an-id-beyond"),
        pytest.param(joined(write_ask(replace(ASK, sequences=sequences(8_193)))), "beyond 8192",
                     id="a-text-too-long"),
        pytest.param(struct.pack("<HHIIId", 1, 1, 0, 0, 0, 0.0) + bytes(4), "do not span",
                     id="no-sequence-at-all"),
    ],
)  # fmt: skip
def test_a_request_that_could_cost_the_device_is_stopped(body: bytearray, words: str) -> None:
    with pytest.raises(WireBroken, match=words):
        read_ask(body, CARDS)


@given(st.binary(max_size=200))
def test_noise_is_refused_and_nothing_else_happens(noise: bytes) -> None:
    for read in (read_reply, read_refusal, read_hello, read_pages):
        try:
            read(noise)
        except WireBroken:
            continue


@given(at=st.integers(0, 10_000), word=st.binary(min_size=1, max_size=4))
def test_a_damaged_reply_is_refused_or_has_its_own_shape(at: int, word: bytes) -> None:
    body = joined(write_reply(Reply(vectors(ALL, 3, 1), 0.0, 0.0)))
    at %= len(body)
    body[at : at + len(word)] = word
    try:
        found = read_reply(body)
    except WireBroken:
        return
    assert len(found.vectors.dense) == len(found.vectors.multi)


@pytest.mark.parametrize("kind", [Overloaded, Draining, Loading, DeadlineExceeded])
def test_a_refusal_is_the_same_error_on_the_other_side(kind: type[BusyError]) -> None:
    found = read_refusal(write_refusal(kind("no room", retry_after_s=2.5)))
    assert type(found) is kind
    assert (str(found), found.retry_after_s) == ("no room", 2.5)


@pytest.mark.parametrize("error", [EngineFault("it broke"), ServiceError("what is this")])
def test_whatever_else_went_wrong_is_our_fault(error: ServiceError) -> None:
    found = read_refusal(write_refusal(error))
    assert type(found) is EngineFault
    assert str(found) == str(error)


def test_a_hello_tells_every_model_whole() -> None:
    noted = replace(CARDS[1], notes=MappingProxyType({"device": "cpu"}), aliases=("a", "b"))
    model = ModelHello(noted, "/models/tokenizer.json", 0.99, 0.999, "fine")
    hello = Hello("1.0", "torch", "cuda", "found 1", 2, (model,))
    found = read_hello(write_hello(hello))
    assert found == hello
    assert found.models[0].card.outputs == ALL


def test_pages_of_metrics_keep_their_bytes() -> None:
    pages = {"api-1": b"a 1\n", "engine": "ü 2\n".encode()}
    assert read_pages(write_pages(pages)) == pages
