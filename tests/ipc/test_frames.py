"""Frames: whole messages out of any pieces, nothing beyond its bound, what is void forgotten."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trivec.ipc.frames import (
    FRAME_BYTES_MAX,
    PARTS_MAX,
    End,
    FrameReader,
    Kind,
    Message,
    WireBroken,
    frames_of,
    header,
    void,
)

BOUNDS = {Kind.ASK: 3 * FRAME_BYTES_MAX, Kind.CANCEL: 0}


def reader() -> FrameReader:
    return FrameReader(BOUNDS)


def frames(number: int, *pieces: bytes) -> list[bytes]:
    return list(frames_of(Kind.ASK, number, [memoryview(piece) for piece in pieces]))


@given(
    bodies=st.lists(st.binary(max_size=300), max_size=6),
    cuts=st.lists(st.integers(0, 2000), max_size=12),
)
def test_however_the_bytes_arrive_the_messages_are_the_same(
    bodies: list[bytes], cuts: list[int]
) -> None:
    sent = b"".join(b"".join(frames(i, body)) for i, body in enumerate(bodies))
    edges = sorted({0, len(sent), *(min(cut, len(sent)) for cut in cuts)})
    one = reader()
    found = [message for first, last in pairwise(edges) for message in one.feed(sent[first:last])]
    assert found == [Message(Kind.ASK, i, body) for i, body in enumerate(bodies)]


def test_a_large_message_is_cut_up_and_a_small_one_goes_in_between() -> None:
    large = b"x" * FRAME_BYTES_MAX + b"y" * 5
    first, second = frames(1, large)
    small = b"".join(frames(2, b"small"))
    found = reader().feed(first + small + second)
    assert [(one.number, bytes(one.body)) for one in found] == [(2, b"small"), (1, large)]


def test_pieces_are_laid_end_to_end() -> None:
    assert reader().feed(b"".join(frames(7, b"ab", b"", b"c"))) == [Message(Kind.ASK, 7, b"abc")]


def test_what_was_taken_back_is_forgotten_and_its_number_begins_anew() -> None:
    begun = frames(1, b"x" * FRAME_BYTES_MAX, b"rest")[0]
    found = reader().feed(begun + void(Kind.ASK, 1) + b"".join(frames(1, b"again")))
    assert found == [Message(Kind.ASK, 1, b"again")]


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        pytest.param(b"\xff" * 12, "kind 255", id="no-kind-at-all"),
        pytest.param(header(Kind.REPLY, 1, 0, End.WHOLE), "kind 6", id="a-kind-for-the-other-side"),
        pytest.param(
            header(Kind.ASK, 1, 0, End.WHOLE)[:8] + b"\xff\xff\xff\x7f", "at most", id="too-large"
        ),
        pytest.param(
            header(Kind.CANCEL, 1, 1, End.WHOLE) + b"x", "more than 0", id="more-than-its-kind-has"
        ),
        pytest.param(b"\x02\x09" + b"\0" * 10, "way 9", id="an-end-that-is-none"),
    ],
)
def test_what_cannot_be_is_refused(sent: bytes, words: str) -> None:
    with pytest.raises(WireBroken, match=words):
        reader().feed(sent)


def test_a_message_in_many_frames_is_bounded_as_a_whole() -> None:
    body = b"x" * FRAME_BYTES_MAX
    with pytest.raises(WireBroken, match="ASK of more than"):
        reader().feed(5 * (header(Kind.ASK, 1, len(body), End.NO) + body))


def test_messages_that_begin_and_never_end_are_bounded() -> None:
    begun = [header(Kind.ASK, number, 1, End.NO) + b"x" for number in range(PARTS_MAX + 1)]
    with pytest.raises(WireBroken, match="begun and not ended"):
        reader().feed(b"".join(begun))
