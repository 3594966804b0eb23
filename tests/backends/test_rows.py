"""The cutting of a batch into rows, and the few shapes that rows run in."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trivec.backends.openvino.packing import (
    ROW_BUDGET,
    length_size,
    plan_rows,
    token_size,
)

LENGTHS = st.lists(st.integers(1, 8192), min_size=1, max_size=120)


@given(LENGTHS)
def test_every_sequence_is_in_exactly_one_row(lengths: list[int]) -> None:
    rows = plan_rows(np.array(lengths, np.int32))
    members = np.concatenate([row.members for row in rows])
    assert sorted(members.tolist()) == list(range(len(lengths)))


@given(LENGTHS)
def test_a_row_keeps_the_budget_or_holds_one_long_sequence(lengths: list[int]) -> None:
    for row in plan_rows(np.array(lengths, np.int32)):
        assert row.token_count == sum(lengths[i] for i in row.members.tolist())
        assert row.token_count <= ROW_BUDGET.tokens_max or len(row.members) == 1
        assert len(row.members) <= ROW_BUDGET.sequences_max


@given(LENGTHS)
def test_shapes_hold_what_they_must(lengths: list[int]) -> None:
    for row in plan_rows(np.array(lengths, np.int32)):
        assert row.token_size >= row.token_count
        assert row.length_size >= max(lengths[i] for i in row.members.tolist())


@given(LENGTHS)
def test_lengths_in_a_row_are_alike_unless_all_are_short(lengths: list[int]) -> None:
    for row in plan_rows(np.array(lengths, np.int32)):
        own = [lengths[i] for i in row.members.tolist()]
        assert max(own) <= 64 or max(own) <= 1.5 * min(own)


def test_there_are_at_most_64_shapes() -> None:
    tokens = {token_size(count) for count in range(1, 8193)}
    attention = {length_size(length) for length in range(1, 8193)}
    assert len(tokens | attention) <= 64
    assert len(tokens) <= 64


def test_padding_of_a_long_sequence_is_a_fifth_at_most() -> None:
    assert max(token_size(n) / n for n in range(513, 8193)) <= 1.25


def test_a_full_batch_of_similar_texts_is_one_row() -> None:
    rows = plan_rows(np.full(32, 16, np.int32))
    assert [(len(row.members), row.token_size, row.length_size) for row in rows] == [(32, 512, 16)]


def test_a_long_text_does_not_pad_short_ones() -> None:
    rows = plan_rows(np.array([10, 400, 12, 11], np.int32))
    assert [row.members.tolist() for row in rows] == [[1], [2, 3, 0]]
