"""A checkpoint small enough for every unit test, of any family, complete and seeded."""

from pathlib import Path

from tests.support.dummy import Blueprint, write_dummy

from trivec.models.bert import BertConfig
from trivec.models.pooling import Pooling


def write_tiny(
    folder: Path,
    *,
    family: str = "xlm-roberta",
    layers: int = 2,
    hidden: int = 64,
    attention_heads: int = 4,
    vocabulary_size: int = 2000,
    position_count: int = 130,
    pooling: Pooling = Pooling.CLS,
    heads: bool = True,
    torch_files: bool = False,
    stored_type: str = "F32",
    seed: int = 0,
) -> Path:
    """Write a model in the sentence-transformers layout into *folder*, and return *folder*.

    *heads* adds BGE-M3's sparse and multi-vector heads; *torch_files* writes `.bin` and `.pt`
    in place of safetensors. It reads `position_count` tokens (two fewer in the roberta family).
    """
    is_bert = family == "bert"
    config = BertConfig(
        family=family,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=attention_heads,
        intermediate_size=4 * hidden,
        layer_norm_eps=1e-12 if is_bert else 1e-5,
        vocab_size=vocabulary_size,
        max_position_embeddings=position_count,
        position_offset=0 if is_bert else 2,
        type_vocab_size=2 if is_bert else 1,
        pad_token_id=0 if is_bert else 1,
    )
    blueprint = Blueprint(
        config=config,
        pooling=pooling,
        normalize=True,
        token_count_max=config.token_count_max,
        multi_dimensions=hidden if heads else None,
        torch_files=torch_files,
        stored_type=stored_type,
    )
    write_dummy(folder, blueprint, seed=seed)
    return folder
