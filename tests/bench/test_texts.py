"""What is measured with: the same on every run, of the lengths that the names say."""

import numpy as np
import pytest
from benchmarks.harness import deal, in_parts
from benchmarks.texts import Arithmetic, Workload, mixed, sentences, uniform, weight_shapes
from tests.support.dummy import BLUEPRINTS

from trivec.models.ops import AttentionSpec


def test_sentences_are_distinct_and_the_same_every_time() -> None:
    texts = sentences(500)
    assert len(set(texts)) == 500
    assert texts == sentences(500)
    assert 8 <= np.median([len(text.split()) for text in texts]) <= 13


def test_a_uniform_workload_holds_as_many_as_its_tokens_allow_and_at_least_one() -> None:
    assert uniform(128, tokens=2048).lengths == (128,) * 16
    assert uniform(8192, tokens=2048).lengths == (8192,)


def test_mixed_lengths_stay_within_what_the_model_reads() -> None:
    lengths = mixed(tokens=20_000, length_max=256).lengths
    assert min(lengths) >= 4
    assert max(lengths) == 256
    assert 20_000 <= sum(lengths) < 20_256


def test_ids_are_packed_by_the_lengths_and_inside_the_vocabulary() -> None:
    sequences = Workload("any", (3, 5, 4)).sequences(vocabulary_size=100)
    assert sequences.cu_seqlens.tolist() == [0, 3, 8, 12]
    assert sequences.token_ids.min() >= 0
    assert sequences.token_ids.max() < 100


def test_dealing_loses_no_sequence_and_gives_each_hand_every_length() -> None:
    whole = Workload("any", (3, 30, 4, 40, 5)).sequences(vocabulary_size=100)
    hands = deal(whole, 2)
    assert [hand.lengths().tolist() for hand in hands] == [[3, 4, 5], [30, 40]]
    assert hands[1].token_ids[:30].tolist() == whole.token_ids[3:33].tolist()


def test_more_hands_than_sequences_leave_no_empty_request() -> None:
    whole = Workload("one", (7,)).sequences(vocabulary_size=100)
    assert [len(hand) for hand in deal(whole, 4)] == [1]


def test_parts_are_whole_or_dropped() -> None:
    assert [list(part) for part in in_parts("abcdefg", 3)] == [["a", "b", "c"], ["d", "e", "f"]]


def test_the_arithmetic_of_bge_m3_is_what_its_shapes_say() -> None:
    """0.604 GFLOP a token, and 0.0983 MFLOP more for each token that it attends to."""
    config = BLUEPRINTS["baai/bge-m3"].config
    one = Arithmetic.of(Workload("one", (1,)), config)
    many = Arithmetic.of(Workload("many", (512,)), config)
    assert abs(one.gop - 0.6041) < 1e-3
    assert abs(many.gop / 512 - (0.60398 + 512 * 98304e-9)) < 1e-3


@pytest.mark.parametrize(
    ("window", "causal", "pairs"),
    [
        pytest.param(None, False, 25 + 1, id="every-token-sees-all"),
        pytest.param(None, True, 15 + 1, id="causal-sees-itself-and-those-before"),
        pytest.param(1, False, 5 + 2 * 4 + 1, id="a-window-sees-its-neighbours"),
        pytest.param(2, True, 5 + 4 + 3 + 1, id="a-causal-window"),
        pytest.param(9, False, 25 + 1, id="a-window-wider-than-the-text"),
    ],
)
def test_the_pairs_that_attention_multiplies(window: int | None, causal: bool, pairs: int) -> None:
    spec = AttentionSpec(heads=2, head_dim=4, kv_heads=1, window=window, causal=causal)
    assert Workload("two", (5, 1)).pairs_seen(spec) == pairs


def test_grouped_queries_and_gated_networks_are_counted_by_their_own_shapes() -> None:
    """Qwen3 0.6B: 16 heads of 128 and 8 for keys and values; gate, up and down of 3,072."""
    config = BLUEPRINTS["qwen/qwen3-embedding-0.6b"].config
    attention, gated = 1024 * 128 * (16 + 8 + 8 + 16), 3 * 1024 * 3072
    arithmetic = Arithmetic.of(Workload("one", (1,)), config)
    assert arithmetic.weights_gop == 2 * 28 * (attention + gated) / 1e9
    assert arithmetic.attention_gop == 28 * 4 * 16 * 128 / 1e9
    assert len(weight_shapes(config, layers=2)) == 2 * 4


def test_attention_is_counted_at_its_own_rate() -> None:
    arithmetic = Arithmetic(weights_gop=300.0, attention_gop=50.0)
    assert arithmetic.least_s(weights_gops=600.0, attention_gops=100.0) == 1.0
