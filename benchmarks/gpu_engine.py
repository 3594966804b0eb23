"""The torch engine's rate by text length, against the device's own matrix rate in the same minutes."""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from benchmarks.figures import Spread
from benchmarks.gpu_plan import Plan, finish_device, talk
from benchmarks.texts import Workload, mixed, uniform

from trivec.backends.torch.backend import TorchBackend
from trivec.backends.torch.building import DTYPES
from trivec.checkpoints.checkpoint import Checkpoint
from trivec.core.types import Batch, BatchBudget, Output, Sequences
from trivec.models.ops import ModelConfig


def engine_rates(
    backend: TorchBackend,
    checkpoint: Checkpoint,
    plan: Plan,
    *,
    keep: Callable[[dict[str, Any]], None],
    may_go_on: Callable[[float], bool],
) -> dict[str, Any]:
    """Tokens a second by length, and their arithmetic as a share of the matrix rate.

    Rounds interleave the matrix rate with every length, so that clocks and heat are shared. *keep*
    hears of every round; *may_go_on* says whether there is time for one more of so many seconds.
    """
    config = checkpoint.config
    budget = backend.budget
    workloads = [uniform(n, tokens=8 * budget.tokens_max) for n in plan.lengths]
    workloads.append(mixed(tokens=8 * budget.tokens_max, length_max=max(plan.lengths)))
    batches = {one.name: cut(sequences_of(one, config.vocab_size), budget) for one in workloads}
    products = Products(config, rows=plan.matmul_rows, dtype=DTYPES[backend.precision])
    limits: list[float] = []
    rates: dict[str, list[float]] = {name: [] for name in batches}
    for name, some in batches.items():  # warm: libraries choose kernels at first sight of a shape
        run_for(backend, some, seconds=0.0)
        talk(f"warm: {name}")
    figures: dict[str, Any] = {}
    round_s = 0.0
    while len(limits) < plan.repeats and (not limits or may_go_on(round_s)):
        began_s = time.perf_counter()
        limits.append(products.flops_a_second(seconds=plan.seconds / 3))
        for name, some in batches.items():
            rates[name].append(run_for(backend, some, seconds=plan.seconds))
        round_s = time.perf_counter() - began_s
        figures = figures_of(config, workloads, rates=rates, limits=limits)
        keep(figures)
    return figures


def figures_of(
    config: ModelConfig,
    workloads: Sequence[Workload],
    *,
    rates: Mapping[str, Sequence[float]],
    limits: Sequence[float],
) -> dict[str, Any]:
    talk(f"matrix rate {Spread.of([limit / 1e12 for limit in limits])} TFLOP/s")
    found: dict[str, Any] = {"matrix_flops_a_second": asdict(Spread.of(limits)), "lengths": {}}
    for one in workloads:
        cost = flops_a_token(config, one)
        shares = [rate * cost / limit for rate, limit in zip(rates[one.name], limits, strict=True)]
        talk(f"{one.name:>6}: {Spread.of(rates[one.name])} tokens/s, share {Spread.of(shares)}")
        found["lengths"][one.name] = {
            "tokens_a_second": asdict(Spread.of(rates[one.name])),
            "share_of_matrix_rate": asdict(Spread.of(shares)),
        }
    return found


def flops_a_token(config: ModelConfig, workload: Workload) -> float:
    """Multiplications and additions of the matrix products, attention's two included, by token."""
    hidden, inner = config.hidden_size, config.intermediate_size
    linear = 2 * (4 * hidden * hidden + 2 * hidden * inner)
    attention = 4 * hidden * workload.squares() / workload.token_count
    return float(config.num_hidden_layers * (linear + attention))


class Products:
    """The device's rate on the model's own matrix shapes: every layer's weights distinct."""

    def __init__(self, config: ModelConfig, *, rows: int, dtype: torch.dtype) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        hidden, inner = config.hidden_size, config.intermediate_size
        shapes = [(3 * hidden, hidden), (hidden, hidden), (inner, hidden), (hidden, inner)]

        def drawn(*shape: int) -> torch.Tensor:  # never zeros: chips are faster on them
            return torch.randn(shape, device=device).to(dtype)

        self._weights = [
            drawn(*shape) for _ in range(min(config.num_hidden_layers, 8)) for shape in shapes
        ]
        self._inputs = {width: drawn(rows, width) for width in (hidden, inner)}
        self._flops = float(sum(2 * rows * weight.numel() for weight in self._weights))

    def flops_a_second(self, *, seconds: float) -> float:
        self._once()
        rounds = 0
        started_s = time.perf_counter()
        while rounds == 0 or time.perf_counter() - started_s < seconds:
            self._once()
            rounds += 1
        return rounds * self._flops / (time.perf_counter() - started_s)

    def _once(self) -> None:
        with torch.inference_mode():
            for weight in self._weights:
                torch.nn.functional.linear(self._inputs[weight.shape[1]], weight)
        finish_device()


def sequences_of(workload: Workload, vocabulary_size: int) -> Sequences:
    """Random ids of the workload's lengths, shortest first."""
    ascending = Workload(workload.name, tuple(sorted(workload.lengths)))
    return ascending.sequences(vocabulary_size=vocabulary_size)


def cut(packed: Sequences, budget: BatchBudget) -> list[Batch]:
    """Batches as the engine packs them: neighbours, which are of like length, up to the budget."""
    batches = []
    first = 0
    while first < len(packed):
        last = int(
            np.searchsorted(
                packed.cu_seqlens, packed.cu_seqlens[first] + budget.tokens_max, "right"
            )
        )
        last = min(max(last - 1, first + 1), first + budget.sequences_max, len(packed))
        starts = packed.cu_seqlens[first : last + 1]
        outputs = np.full(last - first, Output.DENSE, np.uint8)
        batches.append(Batch(packed.token_ids[starts[0] : starts[-1]], starts - starts[0], outputs))
        first = last
    return batches


def run_for(backend: TorchBackend, batches: Sequence[Batch], *, seconds: float) -> float:
    """Tokens a second through `run`, every slot busy; all of *batches* at least once."""
    started_s = time.perf_counter()

    def feed(slot: int) -> int:
        tokens, turn = 0, slot
        while turn < len(batches) or time.perf_counter() - started_s < seconds:
            batch = batches[turn % len(batches)]
            backend.run(batch, slot=slot)
            tokens += batch.token_count
            turn += backend.slot_count
        return tokens

    with ThreadPoolExecutor(backend.slot_count) as slots:
        tokens = sum(slots.map(feed, range(backend.slot_count)))
    return tokens / (time.perf_counter() - started_s)
