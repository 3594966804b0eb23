"""CTranslate2's encoder. Arguments: MODEL_DIR cls|mean int8|float32 CACHE_DIR.

Its converter reads the same folder; it packs away padding by itself.
"""

import sys
from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np
from benchmarks.against.peers.answering import answer, in_batches, pooled
from tokenizers import Tokenizer


def main() -> None:
    model_dir, pooling, precision, cache_dir = sys.argv[1:5]
    converted = Path(cache_dir) / "model"
    if not converted.exists():
        ctranslate2.converters.TransformersConverter(model_dir).convert(str(converted))
    encoder = ctranslate2.Encoder(str(converted), device="cpu", compute_type=precision)
    tokenizer = Tokenizer.from_file(f"{model_dir}/tokenizer.json")
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def embed(texts: Any) -> Any:
        ids = [one.ids for one in tokenizer.encode_batch(list(texts))]
        lengths = np.array([len(one) for one in ids])
        hidden = np.array(encoder.forward_batch(ids).last_hidden_state)
        mask = np.arange(hidden.shape[1])[None, :] < lengths[:, None]
        return pooled(hidden, mask, pooling)

    answer(in_batches(embed))


if __name__ == "__main__":
    main()
