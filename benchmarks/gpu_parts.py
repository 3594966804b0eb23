"""The parts of a GPU measurement: the engine's rate, the host beside it, peers, HTTP, odd texts."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from benchmarks.figures import Spread, percentile
from benchmarks.gpu_record import Plan, talk
from benchmarks.harness import ServerFailed, Shape, Target, measure, own_server
from benchmarks.load import Answers, LoadFailed
from benchmarks.texts import Arithmetic, Workload, mixed, sentences, uniform, weight_shapes
from tokenizers import Tokenizer

from trivec.api.responses import to_base64, to_json
from trivec.backends.torch.backend import TorchBackend
from trivec.backends.torch.device import TorchOptions
from trivec.backends.torch.ops import DTYPES, pack
from trivec.checkpoints.checkpoint import Checkpoint
from trivec.core.types import Batch, BatchBudget, Output, Sequences
from trivec.models.ops import ModelConfig

Keep: TypeAlias = Callable[[dict[str, Any]], None]  # told a part's figures when there are more
HOST_TOKENS_A_SECOND = 600_000  # the rate of a device that the host is to keep up with
LOADERS_MAX = 6  # one process of clients ends near 10,000 answers a second
ODD_LENGTH_STEP = 31  # meets every edge of a kernel's blocks


def device_name() -> str:
    return str(torch.cuda.get_device_name()) if torch.cuda.is_available() else "cpu"


def peak_memory_gib() -> float | None:
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None


def engine_rates(
    backend: TorchBackend,
    config: ModelConfig,
    plan: Plan,
    *,
    keep: Keep,
    may_go_on: Callable[[float], bool],
) -> dict[str, Any]:
    """Tokens a second by text length, and their arithmetic as a share of the matrix rate.

    Rounds interleave the matrix rate with every length, so that clocks and heat are shared.
    *may_go_on* says whether there is time for one more round of so many seconds.
    """
    budget = backend.budget
    workloads = [uniform(n, tokens=8 * budget.tokens_max) for n in plan.lengths]
    workloads.append(mixed(tokens=8 * budget.tokens_max, length_max=max(plan.lengths)))
    batches = {}
    for one in workloads:
        ascending = Workload(one.name, tuple(sorted(one.lengths)))
        sequences = ascending.sequences(vocabulary_size=config.vocab_size)
        batches[one.name] = cut(sequences, budget)
    matrix_rate = matrix_products(config, rows=plan.matmul_rows, dtype=DTYPES[backend.precision])
    limits: list[float] = []
    rates: dict[str, list[float]] = {name: [] for name in batches}
    for name, some in batches.items():  # warm: libraries choose kernels at first sight of a shape
        run_for(backend, some, seconds=0.0)
        talk(f"warm: {name}")
    figures: dict[str, Any] = {}
    round_s = 0.0
    while len(limits) < plan.repeats and (not limits or may_go_on(round_s)):
        began_s = time.perf_counter()
        limits.append(matrix_rate(plan.seconds / 3))
        for name, some in batches.items():
            rates[name].append(run_for(backend, some, seconds=plan.seconds))
        round_s = time.perf_counter() - began_s
        figures = engine_figures(config, workloads, rates=rates, limits=limits)
        keep(figures)
    return figures


def engine_figures(
    config: ModelConfig,
    workloads: Sequence[Workload],
    *,
    rates: Mapping[str, Sequence[float]],
    limits: Sequence[float],
) -> dict[str, Any]:
    talk(f"matrix rate {Spread.of([limit / 1e12 for limit in limits])} TFLOP/s")
    found: dict[str, Any] = {"matrix_flops_a_second": asdict(Spread.of(limits)), "lengths": {}}
    for one in workloads:
        token_flops = Arithmetic.of(one, config).gop * 1e9 / one.token_count
        shares = [
            rate * token_flops / limit for rate, limit in zip(rates[one.name], limits, strict=True)
        ]
        talk(f"{one.name:>6}: {Spread.of(rates[one.name])} tokens/s, share {Spread.of(shares)}")
        found["lengths"][one.name] = {
            "tokens_a_second": asdict(Spread.of(rates[one.name])),
            "share_of_matrix_rate": asdict(Spread.of(shares)),
        }
    return found


def matrix_products(
    config: ModelConfig, *, rows: int, dtype: torch.dtype
) -> Callable[[float], float]:
    """Measures the device's FLOP/s, over so many seconds, on the model's own matrix shapes.

    Every layer's weights are distinct.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    groups = weight_shapes(config, layers=8)
    shapes = [(sum(rows for rows, _ in group), group[0][1]) for group in groups]

    def drawn(*shape: int) -> torch.Tensor:  # never zeros: chips are faster on them
        return torch.randn(shape, device=device).to(dtype)

    weights = [drawn(*shape) for shape in shapes]
    inputs = {width: drawn(rows, width) for _, width in shapes}
    flops = float(sum(2 * rows * weight.numel() for weight in weights))

    def multiply() -> None:
        with torch.inference_mode():
            for weight in weights:
                torch.nn.functional.linear(inputs[weight.shape[1]], weight)
        if torch.cuda.is_available():  # launches return before the device has done anything
            torch.cuda.synchronize()

    return lambda seconds: flops / seconds_a_call(multiply, seconds)


def seconds_a_call(
    call: Callable[[], object], seconds: float, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Mean time by *clock* of one *call*, warm, over *seconds* of calls."""
    call()
    rounds = 0
    started_s, began = time.perf_counter(), clock()
    while rounds == 0 or time.perf_counter() - started_s < seconds:
        call()
        rounds += 1
    return (clock() - began) / rounds


def cut(packed: Sequences, budget: BatchBudget) -> list[Batch]:
    """Batches as the engine packs them: neighbours, which are of like length, up to the budget."""
    batches = []
    first = 0
    while first < len(packed):
        tokens_end = packed.cu_seqlens[first] + budget.tokens_max
        last = int(np.searchsorted(packed.cu_seqlens, tokens_end, "right")) - 1
        last = min(max(last, first + 1), first + budget.sequences_max, len(packed))
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


def host_stages(tokenizer_file: Path, config: ModelConfig, *, seconds: float) -> dict[str, Any]:
    """Tokens a second of every stage alone, for short sentences and for texts of some 420 tokens.

    Rates are by second of processor time over all threads, so that their inverses add up to the
    cores that a device needs beside it.
    """
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    found: dict[str, Any] = {}
    for name, words_median, count in (("short", 10.0, 512), ("long", 350.0, 64)):
        texts = sentences(count, words_median=words_median, words_max=500)
        rates = host_rates(tokenizer, texts, config, seconds=seconds)
        cores = {stage: HOST_TOKENS_A_SECOND / rate for stage, rate in rates.items()}
        found[name] = {"tokens_a_second": rates, "cores_at_600k": cores}
        talk(f"{name}: {found[name]}")
    return found


def host_rates(
    tokenizer: Tokenizer, texts: list[str], config: ModelConfig, *, seconds: float
) -> dict[str, float]:
    ids = [one.ids for one in tokenizer.encode_batch_fast(texts)]
    packed = Sequences.pack(ids)
    outputs = np.full(len(packed), Output.DENSE, np.uint8)
    batch = Batch(packed.token_ids, packed.cu_seqlens, outputs)
    dense = np.random.default_rng(0).standard_normal((len(packed), config.hidden_size), np.float32)
    stages: dict[str, Callable[[], object]] = {
        "tokenise": lambda: [one.ids for one in tokenizer.encode_batch_fast(texts)],
        "pack": lambda: Sequences.pack(ids),
        "lay_out": lambda: pack(batch, position_offset=2),
        "encode_base64": lambda: [to_base64(row) for row in dense],
        "encode_floats": lambda: [to_json(row) for row in dense],
    }
    return {
        name: packed.token_count / seconds_a_call(stage, seconds / 3, clock=time.process_time)
        for name, stage in stages.items()
    }


def peers(folder: Path, backend: TorchBackend, plan: Plan) -> dict[str, Any]:
    """Texts a second of ordinary sentences, tokenising included: ours, and sentence-transformers'."""
    texts = sentences(64 if plan.is_small else 4096)
    found: dict[str, Any] = {"trivec": {"texts_a_second": own_rate(folder, backend, texts)}}
    rates: dict[str, float | str] = {}
    try:
        from sentence_transformers import SentenceTransformer

        options = {"dtype": DTYPES[backend.precision]}
        model = SentenceTransformer(str(folder), local_files_only=True, model_kwargs=options)
        for batch_size in (32, 256):
            encode = partial(model.encode, texts, batch_size=batch_size, normalize_embeddings=True)
            rate = len(texts) / seconds_a_call(encode, seconds=0.0)
            rates[f"texts_a_second_batch_{batch_size}"] = rate
    except Exception as error:  # others' code, which may raise anything, and need not be here
        rates["failed"] = repr(error)
    found["sentence_transformers"] = rates
    talk(f"{found}")
    return found


def own_rate(folder: Path, backend: TorchBackend, texts: list[str]) -> float:
    """Texts a second of the same sentences through our tokeniser and backend, warm."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def embed() -> None:
        ids = sorted((one.ids for one in tokenizer.encode_batch_fast(texts)), key=len)
        run_for(backend, cut(Sequences.pack(ids), backend.budget), seconds=0.0)

    return len(texts) / seconds_a_call(embed, seconds=0.0)


WORDS = {"short": 10.0, "long": 350.0}  # a text; by XLM-R's tokeniser some 17 and 420 tokens
TEXTS = {"short": 4096, "long": 512}
SMALL_RUNS = {"short": ((1, 1), (4, 1), (8, 8))}
FULL_RUNS = {
    "short": ((1, 1), (16, 1), (64, 1), (256, 1), (64, 8), (32, 32), (16, 128)),
    "long": ((1, 1), (32, 16)),
}


def over_http(folder: Path, plan: Plan, *, keep: Keep) -> dict[str, Any] | str:
    """Texts a second and latency of `trivec serve`, by clients and texts a request.

    As many processes of clients as it takes keep the server busy. A run that fails loses only
    itself, as long as the server lives.
    """
    cores = os.cpu_count() or 1
    api_processes = plan.api_processes or (2 if plan.is_small else max(1, cores // 2))
    options = ["--backend", "torch", "--device", plan.device, "--precision", plan.precision]
    settings = {"TRIVEC_API_PROCESSES": str(api_processes), "TRIVEC_LIFE__DRAIN_GRACE_S": "0"}
    loader_count = max(1, min(LOADERS_MAX, cores // 4))
    found: dict[str, Any] = {"api_processes": api_processes}
    try:
        with (
            own_server(str(folder), arguments=options, environ=settings) as target,
            ProcessPoolExecutor(loader_count, mp_context=get_context("spawn")) as loaders,
        ):
            runs = SMALL_RUNS if plan.is_small else FULL_RUNS
            for kind, (clients, texts) in ((k, pair) for k, many in runs.items() for pair in many):
                name = f"{kind} {Shape(clients, texts)}"
                counts = [len(range(i, clients, loader_count)) for i in range(loader_count)]
                try:
                    for seconds in (min(1.0, plan.seconds), plan.seconds):  # the first: warm
                        load = partial(load_from_one_process, kind, texts, target, seconds)
                        answers = list(loaders.map(load, filter(None, counts)))
                    latencies = [one for part in answers for one in part.latencies_s]
                    found[name] = {
                        "texts_a_second": sum(part.rate for part in answers) * texts,
                        "p50_ms": percentile(latencies, 0.50) * 1e3,
                        "p99_ms": percentile(latencies, 0.99) * 1e3,
                    }
                except (LoadFailed, OSError) as error:
                    found[name] = f"failed: {error}"
                talk(f"{name:>14}: {found[name]}")
                keep(found)
    except ServerFailed as error:
        talk(str(error))
        return f"the server did not start: {str(error).splitlines()[0]}"
    return found


def load_from_one_process(
    kind: str, text_count: int, target: Target, seconds: float, client_count: int
) -> Answers:
    texts = sentences(TEXTS[kind], words_median=WORDS[kind], words_max=500)
    return measure(target, Shape(client_count, text_count), texts, duration_s=seconds)


def nan_zoo(checkpoint: Checkpoint, plan: Plan) -> dict[str, Any]:
    """Rows that half precision could not hold, over all lengths; all must be finite in the end."""
    length_max, size = plan.nan_length_max, checkpoint.config.vocab_size
    draw = np.random.default_rng(5)
    lengths = [*range(1, length_max + 1, ODD_LENGTH_STEP), *range(32, length_max, length_max // 8)]
    texts = [draw.integers(4, size, length, dtype=np.int32) for length in lengths]
    repeated = draw.integers(0, size, 16, dtype=np.int32)  # texts of one token again and again
    texts += [np.full(length_max // 4, token_id, np.int32) for token_id in repeated]
    found = {}
    for precision in ("bf16", "fp16"):
        options = TorchOptions(compiled=False)
        backend = TorchBackend.load(
            checkpoint, precision=precision, device=plan.device, options=options
        )
        broken = lost = 0
        worst = 0.0
        for ids in texts:
            outputs = np.array([Output.DENSE], np.uint8)
            batch = Batch(ids, np.array([0, len(ids)], np.int32), outputs)
            dense = backend.run(batch, slot=0).dense
            if not np.isfinite(dense).all():
                broken += 1
                dense = backend.run_exact(batch, slot=0).dense
            lost += not np.isfinite(dense).all()
            worst = max(worst, float(np.abs(np.linalg.norm(dense, axis=1) - 1).max()))
        backend.close()
        found[precision] = {
            "rows": len(texts), "not_finite_at_first": broken, "not_finite_at_last": lost,
            "norm_error_max": worst,
        }  # fmt: skip
        talk(f"{precision}: {found[precision]}")
    return found
