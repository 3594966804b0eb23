"""ONNX Runtime on a graph exported from torch. Arguments: MODEL_DIR cls|mean fp32|int8 CACHE_DIR.

int8 is its dynamic quantisation: weights a scale for each channel, activations one scale a tensor.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from benchmarks.against.peers.answering import answer, in_batches, pooled
from tokenizers import Tokenizer


def exported(model_dir: Path, cache_dir: Path) -> Path:
    """The fp32 graph, exported once."""
    file = cache_dir / "model.onnx"
    if file.exists():
        return file
    import torch
    from transformers import AutoModel

    class Hidden(torch.nn.Module):  # type: ignore[misc, name-defined, unused-ignore]
        def __init__(self) -> None:
            super().__init__()
            self.encoder = AutoModel.from_pretrained(model_dir, attn_implementation="eager").eval()

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0]

    cache_dir.mkdir(parents=True, exist_ok=True)
    axes = {0: "texts", 1: "length"}
    sample = torch.full((2, 8), 5, dtype=torch.long)
    torch.onnx.export(
        Hidden(),
        (sample, torch.ones_like(sample)),
        str(file),  # over 2 GiB only a plain string makes it write the weights beside the graph
        input_names=["input_ids", "attention_mask"],
        output_names=["hidden"],
        dynamic_axes={"input_ids": axes, "attention_mask": axes, "hidden": axes},
        opset_version=17,
        dynamo=False,
    )
    return file


def quantised(file: Path) -> Path:
    target = file.with_name("model_int8.onnx")
    if not target.exists():
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(
            file,
            target,
            per_channel=True,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["MatMul", "Gemm"],
            use_external_data_format=file.stat().st_size > 2**31
            or any(file.parent.glob("*.data"))
            or any(file.parent.glob("encoder.*")),
        )
    return target


def main() -> None:
    model_dir, pooling, precision, cache_dir = sys.argv[1:5]
    file = exported(Path(model_dir), Path(cache_dir))
    session = onnxruntime.InferenceSession(quantised(file) if precision == "int8" else file)
    tokenizer = Tokenizer.from_file(f"{model_dir}/tokenizer.json")
    tokenizer.no_truncation()
    tokenizer.enable_padding()

    def embed(texts: Any) -> Any:
        encodings = tokenizer.encode_batch(list(texts))
        mask = np.array([one.attention_mask for one in encodings], np.int64)
        ids = np.array([one.ids for one in encodings], np.int64)
        hidden = session.run(None, {"input_ids": ids, "attention_mask": mask})[0]
        return pooled(hidden, mask, pooling)

    answer(in_batches(embed))


if __name__ == "__main__":
    main()
