"""llama.cpp's encoder. Arguments: MODEL_DIR cls|mean q8_0 CACHE_DIR.

The weights are written as GGUF by its own library: matrices as blocks of 32 int8 with a scale, the
rest in fp32. Texts become ids by the checkpoint's own tokenizer, so the file holds no vocabulary.
"""

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from benchmarks.against.peers.answering import answer, in_batches
from tokenizers import Tokenizer

TOKENS_MAX = 8192

EMBEDDINGS = {
    "embeddings.word_embeddings.weight": "token_embd.weight",
    "embeddings.position_embeddings.weight": "position_embd.weight",
    "embeddings.token_type_embeddings.weight": "token_types.weight",
    "embeddings.LayerNorm.weight": "token_embd_norm.weight",
    "embeddings.LayerNorm.bias": "token_embd_norm.bias",
}
LAYER = {
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}


def weights(model_dir: Path) -> dict[str, Any]:
    """Every tensor as fp32, by its name without the family's prefix."""
    if (model_dir / "model.safetensors").exists():
        from safetensors.numpy import load_file

        found = load_file(model_dir / "model.safetensors")
    else:
        import torch

        state = torch.load(model_dir / "pytorch_model.bin", weights_only=True)
        found = {name: tensor.float().numpy() for name, tensor in state.items()}
    return {
        name.removeprefix("bert.").removeprefix("roberta."): np.asarray(array, np.float32)
        for name, array in found.items()
        if "position_ids" not in name and "pooler" not in name
    }


def write_gguf(model_dir: Path, pooling: str, file: Path) -> None:
    config = json.loads((model_dir / "config.json").read_text())
    tensors = weights(model_dir)
    if (
        config["model_type"] != "bert"
    ):  # the roberta family counts positions from its padding id + 1
        name = "embeddings.position_embeddings.weight"
        tensors[name] = tensors[name][config["pad_token_id"] + 1 :]
    names = dict(EMBEDDINGS)
    for layer in range(config["num_hidden_layers"]):
        for theirs, gguf_name in LAYER.items():
            for kind in ("weight", "bias"):
                names[f"encoder.layer.{layer}.{theirs}.{kind}"] = f"blk.{layer}.{gguf_name}.{kind}"

    file.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(file, "bert")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(len(tensors["embeddings.position_embeddings.weight"]))
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.CLS if pooling == "cls" else gguf.PoolingType.MEAN)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_token_type_count(config["type_vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    q8_0 = gguf.GGMLQuantizationType.Q8_0
    for name, gguf_name in names.items():
        array = tensors[name]
        matrix = array.ndim == 2 and gguf_name not in ("position_embd.weight", "token_types.weight")
        if matrix:
            writer.add_tensor(gguf_name, gguf.quants.quantize(array, q8_0), raw_dtype=q8_0)
        else:
            writer.add_tensor(gguf_name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Encoder:
    """The low-level interface: ids in, one pooled vector a sequence out."""

    def __init__(self, file: Path, core_count: int) -> None:
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            str(file).encode(), llama_cpp.llama_model_default_params()
        )
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = TOKENS_MAX
        settings.n_seq_max = 64
        settings.n_threads = settings.n_threads_batch = core_count
        settings.embeddings = True
        settings.kv_unified = True
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        self._dimensions = llama_cpp.llama_model_n_embd(self._model)
        self._batch = llama_cpp.llama_batch_init(TOKENS_MAX, 0, 1)

    def embed(self, ids: list[list[int]]) -> Any:
        """Unit vectors `[sequences, dimensions]`, in as few calls as hold TOKENS_MAX tokens."""
        vectors = np.empty((len(ids), self._dimensions), np.float32)
        first = 0
        while first < len(ids):
            last, tokens = first, 0
            while last < len(ids) and tokens + len(ids[last]) <= TOKENS_MAX:
                tokens += len(ids[last])
                last += 1
            self._encode(ids[first:last], vectors[first:last])
            first = last
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def _encode(self, ids: list[list[int]], out: Any) -> None:
        batch, place = self._batch, 0
        for sequence, sequence_ids in enumerate(ids):
            for position, token in enumerate(sequence_ids):
                batch.token[place] = token
                batch.pos[place] = position
                batch.n_seq_id[place] = 1
                batch.seq_id[place][0] = sequence
                batch.logits[place] = 1
                place += 1
        batch.n_tokens = place
        failed = llama_cpp.llama_encode(self._context, batch)
        assert failed == 0, f"llama_encode answered {failed}"
        for sequence in range(len(ids)):
            found = llama_cpp.llama_get_embeddings_seq(self._context, sequence)
            pointer = ctypes.cast(found, ctypes.POINTER(ctypes.c_float))
            out[sequence] = np.ctypeslib.as_array(pointer, (self._dimensions,))


def main() -> None:
    model_dir, pooling, precision, cache_dir = sys.argv[1:5]
    assert precision == "q8_0"
    file = Path(cache_dir) / "model-q8_0.gguf"
    if not file.exists():
        write_gguf(Path(model_dir), pooling, file)
    encoder = Encoder(file, len(os.sched_getaffinity(0)))
    tokenizer = Tokenizer.from_file(f"{model_dir}/tokenizer.json")
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def embed(texts: Any) -> Any:
        return encoder.embed([one.ids for one in tokenizer.encode_batch(list(texts))])

    answer(in_batches(embed))


if __name__ == "__main__":
    main()
