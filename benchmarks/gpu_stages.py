"""The host's work beside a GPU, each stage alone: what must keep up with the device.

Tokenise, pack, lay out, cut the answers, write them. Rates are tokens by second of processor time,
so that their inverses add up to the cores that a device needs beside it.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.gpu_plan import talk
from tokenizers import Tokenizer

from trivec.api.responses import to_base64, to_json
from trivec.backends.torch.answers import Sent, to_vectors
from trivec.backends.torch.layout import lay_out
from trivec.cli.bench.texts import sentences
from trivec.core.types import Batch, Output, Sequences
from trivec.models.ops import ModelConfig

TEXT_COUNT = 512
TARGET_TOKENS_A_SECOND = 600_000


def host_stages(tokenizer_file: Path, config: ModelConfig, *, seconds: float) -> dict[str, Any]:
    """Tokens a second of every stage alone, for short sentences and for texts of 512 tokens."""
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    found: dict[str, Any] = {}
    for name, words_median, count in (("short", 10.0, TEXT_COUNT), ("long", 350.0, 64)):
        texts = sentences(count, words_median=words_median, words_max=500)
        rates = stage_rates(config, tokenizer, texts, seconds=seconds)
        cores = {stage: TARGET_TOKENS_A_SECOND / rate for stage, rate in rates.items()}
        found[name] = {"tokens_a_second": rates, "cores_at_600k": cores}
        for stage, rate in rates.items():
            talk(
                f"{name} {stage:>14}: {rate:>12,.0f} tokens/s, {cores[stage]:.3f} cores at 600 k/s"
            )
    return found


def stage_rates(
    config: ModelConfig, tokenizer: Tokenizer, texts: list[str], *, seconds: float
) -> dict[str, float]:
    ids = [one.ids for one in tokenizer.encode_batch_fast(texts)]
    packed = Sequences.pack(ids)
    tokens, rows = packed.token_count, len(packed)
    batch = Batch(packed.token_ids, packed.cu_seqlens, np.full(rows, Output.DENSE, np.uint8))
    width = config.hidden_size
    dense = np.random.default_rng(0).standard_normal((rows, width), np.float32)
    sent = Sent(dense, None, None, None)
    vocabulary_size = config.vocab_size
    stages: dict[str, Callable[[], object]] = {
        "tokenise": lambda: [one.ids for one in tokenizer.encode_batch_fast(texts)],
        "pack": lambda: Sequences.pack(ids),
        "lay_out": lambda: lay_out(batch, position_offset=2),
        "cut": lambda: list(to_vectors(sent, batch, vocabulary_size).dense),
        "encode_base64": lambda: [to_base64(row) for row in dense],
        "encode_floats": lambda: [to_json(row) for row in dense],
    }
    return {name: tokens / core_seconds(stage, seconds) for name, stage in stages.items()}


def core_seconds(stage: Callable[[], object], seconds: float) -> float:
    """Processor time of one call of *stage*, over all threads that it starts."""
    stage()
    rounds = 0
    started_s = time.perf_counter()
    started_cpu_s = time.process_time()
    while rounds == 0 or time.perf_counter() - started_s < seconds / 3:
        stage()
        rounds += 1
    return (time.process_time() - started_cpu_s) / rounds
