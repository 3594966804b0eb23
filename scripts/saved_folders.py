"""Write tests/reference/saved/VERSIONS.json: what one sentence-transformers saves, and its vectors.

Run by hand, in an environment of that version, which need not have Trivec:

    python scripts/saved_folders.py MINILM_FOLDER

Of every case the small files that `SentenceTransformer.save` wrote beside the encoder are kept as
they are, and of its vectors their products with four fixed directions. Weights of Dense and LayerNorm
modules are made by a formula, so that the test makes the same ones.
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "reference" / "saved"
TEXTS = ("a cat sits on the mat", "x", "Ünïcödé 12,5 %", "interest rates rose again " * 30)
WIDTH, DENSE = 384, 64
KEPT = ("sentence_bert_config.json", "config_sentence_transformers.json", "modules.json")
# Of an encoder and its tokenizer, and the words of a model's page.
PASSED_OVER = ("config.json", "model.safetensors", "tokenizer.json", "vocab.txt", "README.md")
Modules = list[Any]


def numbers(*shape: int) -> np.ndarray:
    """Float32 of *shape*, between -0.1 and 0.1, the same wherever they are made."""
    steps = np.arange(np.prod(shape), dtype=np.int64) * 7919 % 20011
    return ((steps / 20010 - 0.5) / 5).astype(np.float32).reshape(shape)


def directions(width: int) -> np.ndarray:
    return numbers(4, width)


def cases() -> dict[str, tuple[Callable[[], Modules], dict[str, Any]]]:
    """By name: the modules after the encoder, and what else the model is made with."""
    import torch
    from sentence_transformers import models

    def dense(width: int, **settings: Any) -> Any:
        made = models.Dense(width, DENSE, **settings)
        made.linear.weight.data = torch.from_numpy(numbers(DENSE, width))
        if made.linear.bias is not None:
            made.linear.bias.data = torch.from_numpy(numbers(DENSE))
        return made

    def layer_norm(width: int) -> Any:
        made = models.LayerNorm(width)
        made.norm.weight.data = torch.from_numpy(numbers(width))
        made.norm.bias.data = torch.from_numpy(numbers(width))
        return made

    def pooling(mode: str, **settings: Any) -> Any:
        return models.Pooling(WIDTH, pooling_mode=mode, **settings)

    def pooled(mode: str) -> Modules:
        return [pooling(mode)]

    identity = {"bias": False, "activation_function": torch.nn.Identity()}
    poolings = ("cls", "mean", "max", "lasttoken", "weightedmean", "mean_sqrt_len_tokens")
    prompts = {"prompts": {"query": "find what answers: "}, "default_prompt_name": "query"}
    return {
        **{mode: (partial(pooled, mode), {}) for mode in poolings},
        "normalised": (lambda: [pooling("mean"), models.Normalize()], {}),
        "dense-tanh": (lambda: [pooling("mean"), dense(WIDTH), models.Normalize()], {}),
        "dense-identity": (lambda: [pooling("cls"), dense(WIDTH, **identity)], {}),
        "dense-gelu": (
            lambda: [pooling("mean"), dense(WIDTH, activation_function=torch.nn.GELU())],
            {},
        ),
        "layer-norm": (lambda: [pooling("mean"), layer_norm(WIDTH), models.Normalize()], {}),
        "truncate-dim": (lambda: [pooling("mean"), models.Normalize()], {"truncate_dim": 100}),
        "prompts": (lambda: [pooling("mean"), models.Normalize()], prompts),
        "prompts-left-out": (lambda: [pooling("mean", include_prompt=False)], prompts),
        "max-seq-length": (lambda: [pooling("mean")], {"max_seq_length": 24}),
    }


def main() -> None:
    from sentence_transformers import SentenceTransformer, models

    versions = {name: metadata.version(name) for name in ("sentence-transformers", "transformers")}
    found: dict[str, Any] = {}
    for name, (modules, settings) in cases().items():
        length = settings.pop("max_seq_length", 64)
        encoder = models.Transformer(sys.argv[1], max_seq_length=length)
        model = SentenceTransformer(modules=[encoder, *modules()], device="cpu", **settings)
        with TemporaryDirectory() as folder:
            model.save(folder)
            vectors = SentenceTransformer(folder, device="cpu").encode(list(TEXTS))
            files = {
                file.relative_to(folder).as_posix(): json.loads(file.read_text("utf-8"))
                for file in sorted(Path(folder).rglob("*.json"))
                if file.name not in PASSED_OVER or file.parent != Path(folder)
            }
        products = np.asarray(vectors) @ directions(vectors.shape[1]).T
        found[name] = {"files": files, "products": np.round(products, 6).tolist()}
    FOLDER.mkdir(exist_ok=True)
    file = FOLDER / f"{'-'.join(versions.values())}.json"
    file.write_text(
        json.dumps({"versions": versions, "cases": found}, indent=1, ensure_ascii=False) + "\n",
        "utf-8",
    )


if __name__ == "__main__":
    main()
