"""What a config leads to: its family, the tensors it reads, and which linear layers share an input."""

from typing import Any

import pytest

from trivec.models import registry
from trivec.models.ops import Activation, AttentionSpec

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


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        pytest.param({"model_type": "t5"}, "model_type is 't5'", id="an-unknown-family"),
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
