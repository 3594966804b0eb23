"""Texts of every length and oddity through half precision: no row may end up not finite."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from benchmarks.gpu_plan import Plan, talk
from trivec.backends.torch.tuning import Tuning

from trivec.backends.torch.backend import TorchBackend
from trivec.checkpoints.checkpoint import Checkpoint
from trivec.core.types import Batch, Output
from trivec.models.ops import ModelConfig

LENGTH_STEP = 31  # a comb that meets every edge of a kernel's blocks


def nan_zoo(checkpoint: Checkpoint, device: str, plan: Plan) -> dict[str, Any]:
    """Rows that half precision could not hold, over all lengths; all must be whole in the end."""
    found = {}
    for precision in ("bf16", "fp16"):
        backend = TorchBackend.load(
            checkpoint, precision=precision, device=device, tuning=Tuning(compiled=False)
        )
        rows = broken = lost = 0
        worst = 0.0
        for batch in zoo(checkpoint.config, plan.nan_length_max):
            dense = backend.run(batch, slot=0).dense
            if not np.isfinite(dense).all():
                broken += 1
                dense = backend.run_exact(batch, slot=0).dense
            lost += not np.isfinite(dense).all()
            worst = max(worst, float(np.abs(np.linalg.norm(dense, axis=1) - 1).max()))
            rows += len(dense)
        backend.close()
        found[precision] = {
            "rows": rows, "not_finite_at_first": broken, "not_finite_at_last": lost,
            "norm_error_max": worst,
        }  # fmt: skip
        talk(f"{precision}: {found[precision]}")
    return found


def zoo(config: ModelConfig, length_max: int) -> Iterator[Batch]:
    """One text a batch: every length of a comb, then texts of one token repeated."""
    draw = np.random.default_rng(5)
    lengths = [
        *range(1, length_max + 1, LENGTH_STEP),
        *range(32, length_max + 1, length_max // 8),
    ]
    for length in lengths:
        ids = draw.integers(4, config.vocab_size, length, dtype=np.int32)
        yield Batch(ids, np.array([0, length], np.int32), np.array([Output.DENSE], np.uint8))
    for token_id in draw.integers(0, config.vocab_size, 16):
        ids = np.full(length_max // 4, token_id, np.int32)
        yield Batch(ids, np.array([0, len(ids)], np.int32), np.array([Output.DENSE], np.uint8))
