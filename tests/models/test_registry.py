"""What a config leads to: its family, the tensors it reads, and which linear layers share an input."""

from typing import Any

import numpy as np
import pytest

from trivec.models import registry
from trivec.models.ops import Activation, Alibi, AttentionSpec, Buckets, Rope, Table

CONFIG: dict[str, Any] = {
    "model_type": "xlm-roberta",
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 20,
    "max_position_embeddings": 10,
    "type_vocab_size": 1,
    "pad_token_id": 1,
}


def test_a_model_reads_the_tensors_that_its_files_hold() -> None:
    shapes = registry.tensor_shapes(registry.read_config(CONFIG))
    assert len(shapes) == 5 + 2 * 16
    assert shapes["embeddings.word_embeddings.weight"] == (20, 8)
    assert shapes["embeddings.position_embeddings.weight"] == (10, 8)
    assert shapes["encoder.layer.1.intermediate.dense.weight"] == (32, 8)
    assert shapes["encoder.layer.1.output.dense.weight"] == (8, 32)
    assert shapes["encoder.layer.1.output.LayerNorm.bias"] == (8,)


def test_the_plan_says_what_int8_must_know_of_each_input() -> None:
    plan = registry.plan_of(registry.read_config(CONFIG))
    qkv, projection, up, down = plan.linears[4:]
    layer = "encoder.layer.1"
    assert [name.rpartition(".")[2] for name in qkv.names] == ["query", "key", "value"]
    assert {group.layer for group in (qkv, projection, up, down)} == {1}
    assert projection.values == f"{layer}.attention.self.value"
    assert (up.activation, down.activation) == (None, Activation.GELU)
    assert plan.attention == [AttentionSpec(2, 4, 2)] * 2
    assert plan.token_tables == ["embeddings.word_embeddings"]
    assert plan.blocks == ["encoder.layer.0", "encoder.layer.1"]


@pytest.mark.parametrize(
    ("family", "offset", "longest"), [("bert", 0, 10), ("roberta", 2, 8), ("xlm-roberta", 2, 8)]
)
def test_positions_begin_where_the_family_begins_them(
    family: str, offset: int, longest: int
) -> None:
    config = registry.read_config({**CONFIG, "model_type": family})
    assert (config.position_offset, config.token_count_max) == (offset, longest)


GTE = {**CONFIG, "model_type": "new", "pad_token_id": 0}
GEMMA = {
    **CONFIG, "model_type": "gemma3_text", "num_key_value_heads": 1, "sliding_window": 512
}  # fmt: skip
JINA = {**CONFIG, "model_type": "bert", "position_embedding_type": "alibi"}


@pytest.mark.parametrize(
    ("config", "code", "family"),
    [
        pytest.param(
            {**CONFIG, "model_type": "nomic_bert"}, "NomicBertModel", "nomic_bert", id="nomic"
        ),
        pytest.param(GTE, "NewModel", "new", id="gte"),
        pytest.param(
            {**JINA, "feed_forward_type": "geglu"}, "JinaBertModel", "jina_bert", id="jina"
        ),
    ],
)
def test_code_that_a_family_stands_for_is_not_needed_and_other_code_is_refused(
    config: dict[str, Any], code: str, family: str
) -> None:
    known = {"AutoModel": f"somebody/implementation--modeling.{code}"}
    assert registry.read_config({**config, "auto_map": known}).family == family
    other = known | {"AutoTokenizer": "somebody/implementation--tokenization.Tokenizer"}
    with pytest.raises(ValueError, match="run code"):
        registry.read_config({**config, "auto_map": other})


@pytest.mark.parametrize(
    ("both_ways", "window"), [(True, 256), (False, 511)], ids=["both-ways", "causal"]
)
def test_gemma_s_window_is_of_both_sides_or_counts_the_token_itself(
    both_ways: bool, window: int
) -> None:
    config = {**GEMMA, "use_bidirectional_attention": both_ways, "sliding_window_pattern": 2}
    sliding, full = registry.plan_of(registry.read_config(config)).attention
    assert (sliding.window, full.window) == (window, None)
    assert sliding.rope == Rope(10_000.0, 10)
    assert full.rope == Rope(1_000_000.0, 10)
    assert full.causal != both_ways


def test_ntk_scaling_slows_every_rotation_by_the_published_formula() -> None:
    scaled = {**GTE, "rope_theta": 20_000.0, "rope_scaling": {"type": "ntk", "factor": 8.0}}
    (spec, _) = registry.plan_of(registry.read_config(scaled)).attention
    assert spec.rope == Rope(160_000.0, 10, divisor=8.0 ** (2 / 4))
    cosines, _ = spec.rope.tables(4)
    np.testing.assert_allclose(cosines[1], np.cos([8**-0.5, 160_000**-0.5 * 8**-0.5]), rtol=1e-6)


def test_alibi_s_slopes_are_a_series_and_between_powers_of_two_the_neighbours_mix() -> None:
    """As the paper's own code gives them for 12 heads."""
    eight = [2.0**-i for i in range(1, 9)]
    np.testing.assert_allclose(Alibi(8, 1).slopes, eight)
    np.testing.assert_allclose(
        Alibi(12, 1).slopes, [*eight, 2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5], rtol=1e-6
    )
    assert Alibi(2, 2).by_distance()[1].tolist() == [-2 * 2**-8, -(2**-8), 0, -(2**-8), -2 * 2**-8]


def test_near_distances_have_a_bucket_each_and_far_ones_share_one() -> None:
    """32 buckets of which 16 are for keys after the query, 8 of these exact, up to 128."""
    buckets = Buckets(Table("gains", 32, 1), 128).by_distance(
        np.arange(32.0, dtype=np.float32)[:, None]
    )
    by_distance = dict(zip(range(-128, 129), buckets[0].astype(int).tolist(), strict=True))
    assert [by_distance[-i] for i in (0, 1, 7, 8, 11, 12, 16, 127, 128)] == [
        0,
        1,
        7,
        8,
        8,
        9,
        10,
        15,
        15,
    ]
    assert [by_distance[i] for i in (1, 7, 8, 128)] == [17, 23, 24, 31]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        pytest.param(
            {"model_type": "distilbert", "activation": "relu"}, "activation", id="distilbert"
        ),
        pytest.param(
            {"model_type": "mpnet", "relative_attention_num_buckets": 64}, "buckets", id="mpnet"
        ),
        pytest.param(
            {"model_type": "nomic_bert", "rotary_scaling_factor": 2}, "rotary_scaling", id="nomic"
        ),
        pytest.param(
            {"model_type": "nomic_bert", "num_experts": 8, "moe_every_n_layers": 2, "moe_top_k": 2},
            "8 experts, 2 at a time",
            id="experts-with-gates",
        ),
        pytest.param(
            {"model_type": "nomic_bert", "moe_normalize_expert_weights": True},
            "moe_normalize",
            id="experts-by-other-weights",
        ),
        pytest.param(
            {"model_type": "nomic_bert", "mlp_fc1_bias": True}, "mlp_fc1_bias", id="nomic-biases"
        ),
        pytest.param({**GTE, "logn_attention_scale": True}, "logn", id="gte"),
        pytest.param({**GTE, "rope_scaling": {"type": "yarn"}}, "scaled", id="gte-by-yarn"),
        pytest.param({**GEMMA, "query_pre_attn_scalar": 168}, "query_pre", id="gemma-by-a-scale"),
        pytest.param({**GEMMA, "attn_logit_softcapping": 50.0}, "softcapping", id="gemma-2"),
        pytest.param({**JINA, "feed_forward_type": "reglu"}, "feed_forward_type", id="jina"),
        pytest.param({**GTE, "num_attention_heads": 8}, "even multiple", id="heads-of-one-number"),
    ],
)
def test_what_changes_a_family_s_vectors_is_refused_by_name(
    changed: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        registry.read_config({**CONFIG, **changed})


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        pytest.param({"model_type": "t5"}, "model_type is 't5'", id="an-unknown-family"),
        pytest.param(
            {"lora_adaptations": ["retrieval.query"]}, "adapter for each task", id="jina-3"
        ),
        pytest.param({"model_type": "jina_embeddings_v3"}, "adapter for each", id="jina-3-of-5"),
        pytest.param({"model_type": ["bert"]}, "model_type is", id="a-family-that-is-a-list"),
        pytest.param({"hidden_act": "relu"}, "hidden_act", id="another-activation"),
        pytest.param({"auto_map": {"AutoModel": "x"}}, "run code", id="code-of-its-own"),
        pytest.param({"num_attention_heads": 3}, "no multiple", id="heads-that-do-not-divide"),
        pytest.param({"hidden_size": 10**9}, "hidden_size", id="an-absurd-width"),
        pytest.param({"max_position_embeddings": 2}, "no position", id="no-room-for-a-token"),
        pytest.param({"quantization_config": {}}, "quantised at load", id="quantised-already"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(changed: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        registry.read_config({**CONFIG, **changed})


@pytest.mark.parametrize(("changed", "is_near"), [({}, True), ({"mlp_bias": True}, False)])
def test_half_precision_is_not_chosen_where_it_is_known_to_be_far_from_fp32(
    changed: dict[str, Any], is_near: bool
) -> None:
    config = registry.read_config({**CONFIG, "model_type": "modernbert", **changed})
    assert (config.fp32_reason is None) == is_near
