"""The choice of what runs next, as a property of any line and budget."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trivec.core.types import BatchBudget, Output, Sequences
from trivec.engine.batcher import PASSED_OVER_ROWS_MAX, Share, take_batch
from trivec.engine.line import Line, Request

BUDGET = BatchBudget(tokens_max=512, sequences_max=64)


def request(*lengths: int) -> Request:
    return Request(
        Sequences.pack([np.zeros(length, np.int32) for length in lengths]), Output.DENSE, 0.0
    )


def line_of(*requests: Request) -> Line[Request]:
    line: Line[Request] = Line()
    for one in requests:
        line.join(one)
    return line


def lengths_of(shares: Sequence[Share[Request]]) -> list[int]:
    return [int(share.request.sequences.lengths()[i]) for share in shares for i in share.indices]


def requests_of(shares: Sequence[Share[Request]]) -> list[Request]:
    return [share.request for share in shares]


length_lists = st.lists(
    st.one_of(st.integers(1, 40), st.integers(1, 600), st.integers(1, 8_192)),
    min_size=1,
    max_size=40,
)
lines = st.lists(length_lists, min_size=1, max_size=12)
budgets = st.builds(BatchBudget, st.integers(1, 2_000), st.integers(1, 64))


@given(lines, budgets)
@settings(max_examples=300, deadline=None)
def test_every_sequence_is_taken_once_and_no_batch_is_empty_or_over_budget(
    waiting: list[list[int]], budget: BatchBudget
) -> None:
    requests = [request(*lengths) for lengths in waiting]
    line = line_of(*requests)
    taken: Counter[tuple[int, int]] = Counter()
    while line:
        shares = take_batch(line, budget)
        lengths = lengths_of(shares)
        assert lengths, "a line that holds something yields something"
        assert sum(share.token_count for share in shares) == sum(lengths)
        assert len(lengths) == 1 or sum(lengths) <= budget.tokens_max
        assert len(lengths) <= budget.sequences_max
        taken.update((requests.index(s.request), i) for s in shares for i in s.indices)
    assert taken == Counter(
        (r, i) for r, lengths in enumerate(waiting) for i in range(len(lengths))
    )
    assert line.token_count == 0


@given(lines, budgets, st.data())
@settings(max_examples=200, deadline=None)
def test_the_line_counts_exactly_the_tokens_that_are_in_no_batch(
    waiting: list[list[int]], budget: BatchBudget, data: st.DataObject
) -> None:
    line = line_of(*(request(*lengths) for lengths in waiting))
    left = sum(map(sum, waiting))
    while line:
        if data.draw(st.integers(0, 3), label="somebody leaves") == 0:
            leaver = data.draw(st.sampled_from(list(line)), label="leaver")
            left -= leaver.tokens_left
            line.leave(leaver)
        else:
            left -= sum(share.token_count for share in take_batch(line, budget))
        assert line.token_count == left == sum(one.tokens_left for one in line)
        bound = data.draw(st.integers(1, 3_000), label="a newcomer's tokens")
        assert line.tokens_before(bound) == sum(min(one.tokens_left, bound) for one in line)


@given(lines, budgets)
@settings(max_examples=200, deadline=None)
def test_lengths_in_a_row_are_within_a_factor_of_two_or_all_short(
    waiting: list[list[int]], budget: BatchBudget
) -> None:
    line = line_of(*(request(*lengths) for lengths in waiting))
    while line:
        lengths = lengths_of(take_batch(line, budget))
        assert max(lengths) <= max(2 * min(lengths), 64)


@given(st.lists(st.integers(1, 64), min_size=2, max_size=200), budgets)
@settings(max_examples=100, deadline=None)
def test_a_request_that_is_not_through_has_its_row_for_itself(
    lengths: list[int], budget: BatchBudget
) -> None:
    bulk = request(*lengths)
    line = line_of(bulk)
    while not bulk.is_exhausted:
        shares = take_batch(line, budget)
        if bulk in requests_of(shares) and not bulk.is_exhausted:
            assert requests_of(shares) == [bulk]
        while len(line) < 4:
            line.join(request(5))


def backlogs(count_min: int, count_max: int) -> st.SearchStrategy[list[list[int]]]:
    """Requests of sixty texts and more, none longer than a row: equal, random or at a row's edge."""
    texts = st.one_of(st.integers(1, 512), st.sampled_from((1, 256, 257, 511, 512)))
    return st.lists(
        st.lists(texts, min_size=60, max_size=80), min_size=count_min, max_size=count_max
    )


def widest_gap(waiting: list[list[int]]) -> int:
    """Tokens that one of them was ever ahead of another while all of them waited."""
    line = line_of(*(request(*lengths) for lengths in waiting))
    served: Counter[Request] = Counter(dict.fromkeys(line, 0))
    widest = 0
    while len(line) == len(waiting):
        widest = max(widest, max(served.values()) - min(served.values()))
        for share in take_batch(line, BUDGET):
            served[share.request] += share.token_count
    return widest


@given(backlogs(2, PASSED_OVER_ROWS_MAX))
@settings(max_examples=100, deadline=None)
def test_backlogged_requests_have_had_the_same_tokens_but_for_three_rows(
    waiting: list[list[int]],
) -> None:
    """The bound of deficit round robin: a quantum and twice the largest row (Shreedhar, 1995)."""
    assert widest_gap(waiting) < 3 * BUDGET.tokens_max


@given(backlogs(PASSED_OVER_ROWS_MAX + 1, 3 * PASSED_OVER_ROWS_MAX))
@settings(max_examples=60, deadline=None)
def test_the_age_bound_puts_a_request_ahead_by_one_more_row_and_no_further(
    waiting: list[list[int]],
) -> None:
    """With more than four fresh ones, somebody has a second turn before the last has its first."""
    assert widest_gap(waiting) < 4 * BUDGET.tokens_max


def test_a_query_goes_before_the_next_row_of_any_bulk_request() -> None:
    bulks = [request(*[128] * 64) for _ in range(5)]
    line = line_of(*bulks)
    for _ in range(7):
        take_batch(line, BUDGET)
    query = request(16)
    line.join(query)
    assert requests_of(take_batch(line, BUDGET)) == [query]


def test_queries_that_wait_together_run_together() -> None:
    queries = [request(n) for n in (16, 30, 9, 40)]
    line = line_of(request(*[128] * 64), *queries)
    take_batch(line, BUDGET)
    assert requests_of(take_batch(line, BUDGET)) == queries


def test_a_bulk_request_has_one_row_in_five_however_many_queries_keep_coming() -> None:
    bulk = request(*[512] * 10)
    line = line_of(bulk)
    take_batch(line, BUDGET)
    rows_between = []
    rows = 0
    while not bulk.is_exhausted:
        while len(line) < 100:
            line.join(request(256))
        if bulk in requests_of(take_batch(line, BUDGET)):
            rows_between.append(rows)
            rows = 0
        else:
            rows += 1
    assert set(rows_between[1:]) == {PASSED_OVER_ROWS_MAX}


def test_a_long_text_alone_in_line_runs_at_once() -> None:
    long = request(8_192)
    assert requests_of(take_batch(line_of(long), BUDGET)) == [long]


def test_a_long_text_waits_as_many_rounds_as_it_is_turns_long() -> None:
    long, bulk = request(4 * 512), request(*[512] * 20)
    line = line_of(long, bulk)
    rows = 0
    while not long.is_exhausted:
        take_batch(line, BUDGET)
        rows += 1
    assert rows == 5, "three rows pay for its first three turns, the fourth is its own"


def test_small_requests_are_through_long_before_a_bulk_one() -> None:
    bulk = request(*[100] * 500)
    small = [request(*[100] * 10) for _ in range(4)]
    line = line_of(bulk, *small)
    batches = 0
    while any(not one.is_exhausted for one in small):
        take_batch(line, BUDGET)
        batches += 1
    assert batches <= 15
    assert bulk.tokens_left > 400 * 100


@pytest.mark.parametrize(
    ("lengths", "rows"),
    [
        pytest.param([10, 400, 10, 390], [[400], [390], [10, 10]], id="long-before-short"),
        pytest.param([120, 130, 110, 140], [[140, 130, 120, 110]], id="neighbours-share-a-row"),
        pytest.param([300, 100, 250], [[300], [250], [100]], id="unlike-lengths-do-not"),
        pytest.param([3, 64, 20], [[64, 20, 3]], id="short-ones-always-do"),
        pytest.param([600, 500], [[600], [500]], id="an-overlong-one-runs-alone"),
        pytest.param([513, 1, 1], [[513], [1, 1]], id="overlong-even-when-the-rest-is-tiny"),
    ],
)
def test_rows_of_one_request(lengths: list[int], rows: list[list[int]]) -> None:
    line = line_of(request(*lengths))
    taken = []
    while line:
        taken.append(lengths_of(take_batch(line, BUDGET)))
    assert taken == rows


def test_a_row_holds_no_more_sequences_than_the_budget_says() -> None:
    line = line_of(*(request(2) for _ in range(5)))
    sizes = []
    while line:
        sizes.append(len(lengths_of(take_batch(line, BatchBudget(512, 2)))))
    assert sizes == [2, 2, 1]


def test_a_request_that_left_is_never_chosen() -> None:
    stays, leaves = request(10), request(10)
    line = line_of(leaves, stays)
    line.leave(leaves)
    line.leave(leaves)
    assert requests_of(take_batch(line, BUDGET)) == [stays]
    assert take_batch(line, BUDGET) == []


def test_the_line_grows_past_its_first_places_and_reuses_them() -> None:
    requests = [request(7) for _ in range(200)]
    line = line_of(*requests)
    assert line.tokens_before(5) == 200 * 5
    for one in requests[:150]:
        line.leave(one)
    for _ in range(150):
        line.join(request(3))
    assert (len(line), line.token_count) == (200, 50 * 7 + 150 * 3)
    assert line.tokens_before(5) == 50 * 5 + 150 * 3
