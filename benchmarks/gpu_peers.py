"""What others do on the same device with the same weights, where they are installed."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from benchmarks.gpu_engine import cut
from benchmarks.gpu_plan import Plan, finish_device, talk
from benchmarks.texts import sentences
from tokenizers import Tokenizer

from trivec.backends.torch.backend import TorchBackend
from trivec.backends.torch.building import DTYPES
from trivec.core.types import Sequences


def peers(
    folder: Path,
    backend: TorchBackend,
    plan: Plan,
    *,
    keep: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Texts a second of sentence-transformers, and tokens a second of transformers' SDPA.

    *keep* hears of every figure. A peer that fails loses what it has not yet said.
    """
    texts = sentences(64 if plan.is_small else 4096)
    found: dict[str, Any] = {"trivec": {"texts_a_second": own_rate(folder, backend, texts)}}
    talk(f"trivec: {found['trivec']}")
    keep(found)
    for name, measure in (
        ("sentence_transformers", sentence_transformers_rates),
        ("transformers_sdpa", transformers_rates),
    ):
        rates: dict[str, float | str] = {}
        found[name] = rates
        try:
            for what, rate in measure(folder, DTYPES[backend.precision], plan):
                rates[what] = rate
                keep(found)
        except ImportError as error:
            found[name] = f"not here: {error}"
        except Exception as error:  # others' code, which may raise anything
            rates["failed"] = repr(error)
        keep(found)
        talk(f"{name}: {found[name]}")
    return found


def own_rate(folder: Path, backend: TorchBackend, texts: list[str]) -> float:
    """Texts a second of the same sentences through our tokeniser and backend, warm."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def embed() -> None:
        ids = sorted((one.ids for one in tokenizer.encode_batch_fast(texts)), key=len)
        batches = cut(Sequences.pack(ids), backend.budget)

        def feed(slot: int) -> None:  # a slot is one thread's
            for batch in batches[slot :: backend.slot_count]:
                backend.run(batch, slot=slot)

        with ThreadPoolExecutor(backend.slot_count) as slots:
            list(slots.map(feed, range(backend.slot_count)))

    embed()
    started_s = time.perf_counter()
    embed()
    return len(texts) / (time.perf_counter() - started_s)


def sentence_transformers_rates(
    folder: Path, dtype: torch.dtype, plan: Plan
) -> Iterator[tuple[str, float]]:
    """Texts a second of ordinary sentences, tokenising included, sorted by it and in large batches."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(
        str(folder),
        local_files_only=True,
        model_kwargs={"dtype": dtype},
    )
    texts = sentences(64 if plan.is_small else 4096)
    for batch_size in (32, 256):
        model.encode(texts[:batch_size], batch_size=batch_size)
        started_s = time.perf_counter()
        model.encode(texts, batch_size=batch_size, normalize_embeddings=True)
        yield f"texts_a_second_batch_{batch_size}", len(texts) / (time.perf_counter() - started_s)


def transformers_rates(folder: Path, dtype: torch.dtype, plan: Plan) -> Iterator[tuple[str, float]]:
    """Tokens a second of padded rectangles without any padding in them: its best case."""
    from transformers import AutoModel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModel.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    model = model.to(device).eval()
    for length in plan.lengths:
        count = max(1, plan.matmul_rows // length)
        ids = torch.randint(5, model.config.vocab_size - 5, (count, length), device=device)
        mask = torch.ones_like(ids)
        rounds = 0
        with torch.inference_mode():
            model(input_ids=ids, attention_mask=mask)
            finish_device()
            started_s = time.perf_counter()
            while rounds == 0 or time.perf_counter() - started_s < plan.seconds:
                model(input_ids=ids, attention_mask=mask)
                finish_device()
                rounds += 1
        yield f"tokens_a_second_{length}", rounds * ids.numel() / (time.perf_counter() - started_s)
