"""The cutting of a batch into micro-batches, and the few shapes that these run in."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.backends.batches import batch_of

from trivec.backends.openvino.packing import (
    LENGTH_SIZES,
    MICRO_BATCH_BUDGET,
    TOKEN_SIZES,
    block_size,
    in_blocks,
    pack_micro_batch,
    plan_micro_batches,
    round_up,
)

LENGTHS = st.lists(st.integers(1, 8192), min_size=1, max_size=120)


def cut(lengths: list[int]) -> list[list[int]]:
    """The indices of the texts in each micro-batch."""
    return [members.tolist() for members in plan_micro_batches(np.array(lengths, np.int32))]


@given(LENGTHS)
def test_every_sequence_is_in_exactly_one_micro_batch(lengths: list[int]) -> None:
    assert sorted(i for members in cut(lengths) for i in members) == list(range(len(lengths)))


@given(LENGTHS)
def test_a_micro_batch_keeps_the_budget_or_holds_one_long_sequence(lengths: list[int]) -> None:
    for members in cut(lengths):
        tokens = sum(lengths[i] for i in members)
        assert tokens <= MICRO_BATCH_BUDGET.tokens_max or len(members) == 1
        assert len(members) <= MICRO_BATCH_BUDGET.sequences_max


@given(LENGTHS)
def test_lengths_in_a_micro_batch_are_alike_unless_all_are_short(lengths: list[int]) -> None:
    for members in cut(lengths):
        own = [lengths[i] for i in members]
        assert max(own) <= 64 or max(own) <= 1.5 * min(own)


@given(st.integers(1, 20_000), st.sampled_from([TOKEN_SIZES, LENGTH_SIZES]))
def test_a_size_holds_what_it_must(count: int, sizes: tuple[int, ...]) -> None:
    assert round_up(count, sizes) >= count


def test_there_are_at_most_64_shapes() -> None:
    tokens = {round_up(count, TOKEN_SIZES) for count in range(1, 8193)}
    attention = {round_up(length, LENGTH_SIZES) for length in range(1, 8193)}
    assert len(tokens | attention) <= 64


def test_padding_of_a_long_sequence_is_a_fifth_at_most() -> None:
    assert max(round_up(n, TOKEN_SIZES) / n for n in range(513, 8193)) <= 1.25


def test_a_full_batch_of_similar_texts_is_one_micro_batch() -> None:
    assert len(cut([16] * 32)) == 1
    assert (round_up(32 * 16, TOKEN_SIZES), round_up(16, LENGTH_SIZES)) == (512, 16)


def test_a_long_text_does_not_pad_short_ones() -> None:
    assert cut([10, 400, 12, 11]) == [[1], [2, 3, 0]]


@pytest.mark.parametrize("window", [1, 8, 17, 64, 127, 256, 300, 512])
def test_a_block_is_beside_all_that_a_window_reaches(window: int) -> None:
    """Each place of a sequence once, and each key as far from its queries as in the sequence."""
    block = block_size(window)
    assert block >= window
    for length in (4 * block, 5 * block - 1, 9 * block + 3):
        batch = batch_of([list(range(100, 100 + length))])
        packed = pack_micro_batch(
            batch,
            np.zeros(1, np.int32),
            whole=np.ones(1, np.bool_),
            keeps_last=False,
            position_offset=0,
            window=window,
        )
        columns = np.arange(len(packed.near))[:, None] * block + np.arange(-block, 2 * block)
        is_token = (columns >= 0) & (columns < length)
        assert packed.near.shape == columns.shape
        assert (packed.near[is_token] == columns[is_token]).all()
        assert ((packed.near_bias[:, 0, 0] == 0) == is_token).all()


@given(LENGTHS, st.sampled_from([8, 64, 256]))
def test_how_a_window_is_computed_is_a_matter_of_the_sequence_alone(
    lengths: list[int], window: int
) -> None:
    """Else a text's bits might depend on its neighbours."""
    for members in plan_micro_batches(np.array(lengths, np.int32), window=window):
        assert len({in_blocks(lengths[i], window) for i in members.tolist()}) == 1


@pytest.mark.parametrize("window", [1, 16, 32, 64, 128, 256, 512])
def test_every_text_of_four_blocks_goes_in_blocks(window: int) -> None:
    four = 4 * block_size(window)
    assert all(in_blocks(length, window) for length in range(four, 20_000))
    assert not in_blocks(four // 2, window)
