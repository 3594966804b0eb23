"""Messages and shared files: what goes in comes out, bit for bit."""

from dataclasses import replace
from pathlib import Path
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
from trivec.core.types import CertificateSummary, Output, SparseVector, Vectors
from trivec.ipc.folder import Served, ServedModel, SharedFolder
from trivec.ipc.messages import Embedded, EmbedRequest, Refused, decode, encode


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


@pytest.mark.parametrize("timeout_s", [None, 0.25, -1.0])
@pytest.mark.parametrize("types", [None, np.array([0, 0, 1, 0], np.int32)], ids=["none", "types"])
@pytest.mark.parametrize("skip", [None, np.array([2, 0], np.int32)], ids=["whole", "skip"])
@pytest.mark.parametrize(
    "chunks", [None, (np.array([0, 2, 3], np.int32), np.zeros(1, np.int32))], ids=["none", "chunks"]
)
def test_a_request_arrives_as_it_was_sent(
    timeout_s: float | None,
    types: np.ndarray | None,
    skip: np.ndarray | None,
    chunks: tuple[np.ndarray, ...] | None,
) -> None:
    asked = sequences(3, 1)
    sent = EmbedRequest(
        7,
        1,
        Output.DENSE | Output.MULTI,
        asked.token_ids,
        asked.cu_seqlens,
        types,
        timeout_s,
        skip,
        chunks,
        continues=True,
    )
    found = decode(encode(sent))
    assert isinstance(found, EmbedRequest)
    assert (found.id, found.model, found.outputs) == (7, 1, Output.DENSE | Output.MULTI)
    assert (found.timeout_s, found.continues) == (timeout_s, True)
    np.testing.assert_array_equal(found.sequences().token_ids, asked.token_ids)
    np.testing.assert_array_equal(found.sequences().cu_seqlens, asked.cu_seqlens)
    np.testing.assert_array_equal(found.sequences().token_types, types)
    np.testing.assert_array_equal(found.sequences().skip, skip)
    assert (found.sequences().chunks is None) == (chunks is None)
    for ours, theirs in zip(found.sequences().chunks or (), chunks or (), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert found.token_ids.flags.aligned


@pytest.mark.parametrize("outputs", [Output.DENSE, ALL, Output.MULTI, Output.SPARSE], ids=str)
@pytest.mark.parametrize("row_counts", [(5, 0, 2), (0,), (0, 0)], ids=str)
def test_vectors_arrive_bit_for_bit(outputs: Output, row_counts: tuple[int, ...]) -> None:
    sent = vectors(outputs, *row_counts)
    message = decode(encode(Embedded(1, dict(sent.rows), 0.5, 1.5)))
    assert isinstance(message, Embedded)
    found = message.reply()
    assert (found.queue_s, found.compute_s) == (0.5, 1.5)
    np.testing.assert_array_equal(found.vectors.dense, sent.dense)
    for ours, theirs in zip(found.vectors.sparse, sent.sparse, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            np.testing.assert_array_equal(ours.token_ids, theirs.token_ids)
            np.testing.assert_array_equal(ours.weights, theirs.weights)
    for rows, their_rows in zip(found.vectors.multi, sent.multi, strict=True):
        assert (rows is None) == (their_rows is None)
        if rows is not None and their_rows is not None:
            np.testing.assert_array_equal(rows, their_rows)


@given(st.binary(max_size=200))
def test_noise_is_an_exception_and_nothing_else_happens(noise: bytes) -> None:
    with pytest.raises(Exception):  # noqa: B017, PT011 - the reader's loop takes any
        decode(noise + b"\xc1")  # a byte that MessagePack never uses


@pytest.mark.parametrize("kind", [Overloaded, Draining, Loading, DeadlineExceeded])
def test_a_refusal_is_the_same_error_on_the_other_side(kind: type[BusyError]) -> None:
    message = decode(encode(Refused.of(3, kind("no room", retry_after_s=2.5))))
    assert isinstance(message, Refused)
    found = message.exception()
    assert type(found) is kind
    assert isinstance(found, BusyError)
    assert (message.id, str(found), found.retry_after_s) == (3, "no room", 2.5)


@pytest.mark.parametrize("error", [EngineFault("it broke"), ServiceError("what is this")])
def test_any_other_refusal_is_our_fault(error: ServiceError) -> None:
    found = Refused.of(1, error).exception()
    assert type(found) is EngineFault
    assert str(found) == str(error)


def test_what_is_served_is_read_whole(tmp_path: Path) -> None:
    noted = replace(card("second"), notes=MappingProxyType({"device": "cpu"}), aliases=("a", "b"))
    model = ServedModel(noted, "/models/tokenizer.json", CertificateSummary(0.99, 0.999, "fine"))
    served = Served("1.0", "torch", "cuda", "found 1", 2, (model,))
    folder = SharedFolder(tmp_path)
    folder.write_served(served)
    found = folder.read_served()
    assert found == served
    assert found.models[0].card.outputs == ALL


@pytest.mark.parametrize(
    ("change", "is_same"),
    [({"notes": {"device": "other"}}, True), ({"vocabulary_size": 9}, False)],
    ids=["notes", "vocabulary"],
)
def test_another_model_is_another_service(change: dict[str, object], is_same: bool) -> None:
    ours, theirs = (
        Served("1", "fake", "cpu", "", 1, (ServedModel(one, "file", None),))
        for one in (card(), replace(card(), **change))  # type: ignore[arg-type]
    )
    assert ours.is_same_service(theirs) is is_same
