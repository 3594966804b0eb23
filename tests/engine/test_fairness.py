"""The order in which a queue is served, as properties of any queue and budget."""

from collections import Counter, deque
from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.rig import unanswered as request

from trivec.core.types import BatchBudget
from trivec.engine.request import OVERTAKING_BATCHES_MAX, BatchItem, Request, RequestQueue

BUDGET = BatchBudget(tokens_max=512, sequences_max=64)


def queue_of(*requests: Request) -> RequestQueue:
    queue = RequestQueue()
    for one in requests:
        queue.add(one)
    return queue


def lengths_of(items: Sequence[BatchItem]) -> list[int]:
    return [int(item.request.sequences.lengths()[i]) for item in items for i in item.indices]


def requests_of(items: Sequence[BatchItem]) -> list[Request]:
    return [item.request for item in items]


length_lists = st.lists(
    st.one_of(st.integers(1, 40), st.integers(1, 600), st.integers(1, 8_192)),
    min_size=1,
    max_size=20,
)
queues = st.lists(length_lists, min_size=1, max_size=8)
budgets = st.builds(BatchBudget, st.integers(16, 2_000), st.integers(1, 64))


@given(queues, budgets)
@settings(max_examples=150, deadline=None)
def test_every_sequence_is_taken_once_and_no_batch_is_empty_or_over_budget(
    waiting: list[list[int]], budget: BatchBudget
) -> None:
    requests = [request(*lengths) for lengths in waiting]
    queue = queue_of(*requests)
    taken: Counter[tuple[int, int]] = Counter()
    while queue:
        items = queue.take_batch(budget)
        lengths = lengths_of(items)
        assert lengths, "a queue that holds something yields something"
        assert len(lengths) == 1 or sum(lengths) <= budget.tokens_max
        assert len(lengths) <= budget.sequences_max
        taken.update((requests.index(item.request), i) for item in items for i in item.indices)
    assert taken == Counter(
        (r, i) for r, lengths in enumerate(waiting) for i in range(len(lengths))
    )
    assert queue.token_count == 0


@given(queues, budgets, st.data())
@settings(max_examples=100, deadline=None)
def test_the_queue_counts_exactly_the_tokens_that_are_in_no_batch(
    waiting: list[list[int]], budget: BatchBudget, data: st.DataObject
) -> None:
    queue = queue_of(*(request(*lengths) for lengths in waiting))
    left = sum(map(sum, waiting))
    while queue:
        if data.draw(st.integers(0, 3), label="somebody leaves") == 0:
            leaver = data.draw(st.sampled_from(list(queue)), label="leaver")
            left -= leaver.tokens_left
            queue.remove(leaver)
        else:
            left -= sum(lengths_of(queue.take_batch(budget)))
        assert queue.token_count == left == sum(one.tokens_left for one in queue)
        bound = data.draw(st.integers(1, 3_000), label="a newcomer's tokens")
        assert queue.tokens_before(bound) == sum(min(one.tokens_left, bound) for one in queue)


@given(queues, budgets)
@settings(max_examples=100, deadline=None)
def test_lengths_in_a_batch_are_within_a_factor_of_two_or_all_short(
    waiting: list[list[int]], budget: BatchBudget
) -> None:
    queue = queue_of(*(request(*lengths) for lengths in waiting))
    while queue:
        lengths = lengths_of(queue.take_batch(budget))
        assert max(lengths) <= max(2 * min(lengths), 64)


@given(st.lists(st.integers(1, 64), min_size=2, max_size=200), budgets)
@settings(max_examples=100, deadline=None)
def test_a_request_that_is_not_finished_has_its_batch_for_itself(
    lengths: list[int], budget: BatchBudget
) -> None:
    bulk = request(*lengths)
    queue = queue_of(bulk)
    while not bulk.is_exhausted:
        items = queue.take_batch(budget)
        if bulk in requests_of(items) and not bulk.is_exhausted:
            assert requests_of(items) == [bulk]
        while len(queue) < 4:
            queue.add(request(5))


def backlogs(count_min: int, count_max: int) -> st.SearchStrategy[list[list[int]]]:
    """Requests of sixty texts and more, none longer than a batch: equal, random or at a batch's edge."""

    def of_seed(count: int, seed: int) -> list[list[int]]:  # drawing each length is slow
        chance = Random(seed)
        pools = ([chance.randint(1, 512)], range(1, 513), (1, 256, 257, 511, 512))
        return [
            chance.choices(chance.choice(pools), k=chance.randint(60, 80)) for _ in range(count)
        ]

    return st.builds(of_seed, st.integers(count_min, count_max), st.integers(0, 1_000_000))


def widest_gap(waiting: list[list[int]]) -> int:
    """Tokens that one of them was ever ahead of another while all of them waited."""
    queue = queue_of(*(request(*lengths) for lengths in waiting))
    served: Counter[Request] = Counter(dict.fromkeys(queue, 0))
    widest = 0
    while len(queue) == len(waiting):
        widest = max(widest, max(served.values()) - min(served.values()))
        for item in queue.take_batch(BUDGET):
            served[item.request] += sum(lengths_of([item]))
    return widest


@given(backlogs(2, OVERTAKING_BATCHES_MAX))
@settings(max_examples=100, deadline=None)
def test_backlogged_requests_have_had_the_same_tokens_but_for_three_batches(
    waiting: list[list[int]],
) -> None:
    """The bound of deficit round robin: a quantum and twice the largest batch (Shreedhar, 1995)."""
    assert widest_gap(waiting) < 3 * BUDGET.tokens_max


@given(backlogs(OVERTAKING_BATCHES_MAX + 1, 3 * OVERTAKING_BATCHES_MAX))
@settings(max_examples=60, deadline=None)
def test_the_age_bound_puts_a_request_ahead_by_one_more_batch_and_no_further(
    waiting: list[list[int]],
) -> None:
    """With more than four fresh ones, somebody has a second turn before the last has its first."""
    assert widest_gap(waiting) < 4 * BUDGET.tokens_max


def test_a_query_goes_before_the_next_batch_of_any_bulk_request() -> None:
    bulks = [request(*[128] * 64) for _ in range(5)]
    queue = queue_of(*bulks)
    for _ in range(7):
        queue.take_batch(BUDGET)
    query = request(16)
    queue.add(query)
    assert requests_of(queue.take_batch(BUDGET)) == [query]


def test_queries_that_wait_together_run_together() -> None:
    queries = [request(n) for n in (16, 30, 9, 40)]
    queue = queue_of(request(*[128] * 64), *queries)
    queue.take_batch(BUDGET)
    assert requests_of(queue.take_batch(BUDGET)) == queries


def test_a_bulk_request_has_one_batch_in_five_however_many_queries_keep_coming() -> None:
    bulk = request(*[512] * 10)
    queue = queue_of(bulk)
    queue.take_batch(BUDGET)
    batches_between = []
    batches = 0
    while not bulk.is_exhausted:
        while len(queue) < 100:
            queue.add(request(256))
        if bulk in requests_of(queue.take_batch(BUDGET)):
            batches_between.append(batches)
            batches = 0
        else:
            batches += 1
    assert set(batches_between[1:]) == {OVERTAKING_BATCHES_MAX}


def test_a_long_text_alone_in_line_runs_at_once() -> None:
    long = request(8_192)
    assert requests_of(queue_of(long).take_batch(BUDGET)) == [long]


def test_a_long_text_waits_as_many_rounds_as_it_is_turns_long() -> None:
    long, bulk = request(4 * 512), request(*[512] * 20)
    queue = queue_of(long, bulk)
    batches = 0
    while not long.is_exhausted:
        queue.take_batch(BUDGET)
        batches += 1
    assert batches == 5, "three batches pay for its first three turns, the fourth is its own"


@given(st.lists(st.integers(65, 8_192), min_size=1, max_size=8), st.integers(16, 64))
@settings(max_examples=100, deadline=None)
def test_rounds_granted_at_once_serve_in_the_order_of_one_round_at_a_time(
    lengths: list[int], quantum: int
) -> None:
    expected, turns = [], deque((length, 0) for length in lengths)
    while turns:
        length, deficit = turns.popleft()
        if deficit + quantum >= length:
            expected.append(length)
        else:
            turns.append((length, deficit + quantum))
    queue = queue_of(*map(request, lengths))
    budget = BatchBudget(quantum, 64)
    assert [lengths_of(queue.take_batch(budget)) for _ in lengths] == [[n] for n in expected]


def test_small_requests_are_finished_long_before_a_bulk_one() -> None:
    bulk = request(*[100] * 500)
    small = [request(*[100] * 10) for _ in range(4)]
    queue = queue_of(bulk, *small)
    batches = 0
    while any(not one.is_exhausted for one in small):
        queue.take_batch(BUDGET)
        batches += 1
    assert batches <= 15
    assert bulk.tokens_left > 400 * 100


@pytest.mark.parametrize(
    ("lengths", "batches"),
    [
        pytest.param([10, 400, 10, 390], [[400], [390], [10, 10]], id="long-before-short"),
        pytest.param([120, 130, 110, 140], [[140, 130, 120, 110]], id="neighbours-share-a-batch"),
        pytest.param([300, 100, 250], [[300], [250], [100]], id="unlike-lengths-do-not"),
        pytest.param([3, 64, 20], [[64, 20, 3]], id="short-ones-always-do"),
        pytest.param([600, 500], [[600], [500]], id="an-overlong-one-runs-alone"),
        pytest.param([513, 1, 1], [[513], [1, 1]], id="overlong-even-when-the-rest-is-tiny"),
    ],
)
def test_batches_of_one_request(lengths: list[int], batches: list[list[int]]) -> None:
    queue = queue_of(request(*lengths))
    taken = []
    while queue:
        taken.append(lengths_of(queue.take_batch(BUDGET)))
    assert taken == batches


def test_a_batch_holds_no_more_sequences_than_the_budget_says() -> None:
    queue = queue_of(*(request(2) for _ in range(5)))
    sizes = []
    while queue:
        sizes.append(len(lengths_of(queue.take_batch(BatchBudget(512, 2)))))
    assert sizes == [2, 2, 1]


def test_a_request_that_left_is_never_chosen() -> None:
    stays, leaves = request(10), request(10)
    queue = queue_of(leaves, stays)
    queue.remove(leaves)
    queue.remove(leaves)
    assert requests_of(queue.take_batch(BUDGET)) == [stays]
    assert queue.take_batch(BUDGET) == []


def test_the_queue_grows_past_its_first_slots_and_reuses_them() -> None:
    requests = [request(7) for _ in range(200)]
    queue = queue_of(*requests)
    assert queue.tokens_before(5) == 200 * 5
    for one in requests[:150]:
        queue.remove(one)
    for _ in range(150):
        queue.add(request(3))
    assert (len(queue), queue.token_count) == (200, 50 * 7 + 150 * 3)
    assert queue.tokens_before(5) == 50 * 5 + 150 * 3
