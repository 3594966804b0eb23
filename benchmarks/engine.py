"""The engine's rate as a share of what the machine's matrix products allow, in one run.

    python -m benchmarks.engine [--model ID|DIR --name NAME] [--precision int8|fp32] [--envs DIR]
    python -m benchmarks.engine --profile [...]      where a row's time goes on one slot

Each round measures the limit (oneDNN over every weight of the model, all cores, 256 rows), then one
workload; the share is taken round by round, so that noisy neighbours cancel out. Beside int8 layers
`share_of_arithmetic` counts attention's products at the fp32 rate of the same limit, since they are
not int8: the time that the arithmetic must cost over the time it took. Without torch's environment
(`python -m benchmarks.roster onnxruntime`) there are rates and no shares. A profile has the plugin's
own counters, kind of kernel by kind of kernel. The last line is JSON.
"""

import asyncio
import json
import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import openvino as ov
from benchmarks.figures import Spread, keep, parser, provenance, ratio
from benchmarks.harness import EngineOnTrial, engine_on_trial, quiet_settings, sized
from benchmarks.roster import ENVS, PeerFailed, Process, Stage
from benchmarks.texts import Arithmetic, Workload, mixed, sentences, uniform, weight_shapes

from trivec.backends.openvino import OpenVinoBackend
from trivec.backends.openvino.packing import as_batch
from trivec.models.ops import ModelConfig
from trivec.server.machine import usable_cores

LENGTHS = (16, 128, 512, 2048, 8192)
LIMIT_ROWS = 256  # where the rate of the products has levelled off
PROFILED_TOKENS, PROFILED_REPEATS = 512, 40
compile_model = ov.Core.compile_model


async def compared(
    trial: EngineOnTrial, workload: Workload, limit: Process | None, given: Any
) -> dict[str, Spread]:
    """The rates of one workload and of the limit, turn and turn about, and its shares of it."""
    loaded = trial.models.loaded[0]
    arithmetic = Arithmetic.of(workload, loaded.checkpoint.config)
    rates: dict[str, list[float]] = defaultdict(list)
    for _ in range(given.repeats):
        for precision in dict.fromkeys((loaded.card.precision, "fp32")) if limit else ():
            question = {"rows": LIMIT_ROWS, "precision": precision, "seconds": given.seconds / 2}
            assert limit is not None
            answer = await asyncio.to_thread(limit.ask, question)
            rates[f"limit_{precision}_gops"].append(float(answer["gops"]))
        rate = await trial.rate_of(workload)
        rates["tokens_a_second"].append(rate.tokens_a_second)
        rates["texts_a_second"].append(rate.texts_a_second)
        rates["engine_gops"].append(arithmetic.gop / rate.elapsed_s)
        rates["elapsed_s"].append(rate.elapsed_s)
    spreads = {name: Spread.of(many) for name, many in rates.items()}
    if limit is not None:
        weights = rates[f"limit_{loaded.card.precision}_gops"]
        least_s = [
            arithmetic.least_s(weights_gops=of_weights, attention_gops=of_attention)
            for of_weights, of_attention in zip(weights, rates["limit_fp32_gops"], strict=True)
        ]
        spreads["share_of_onednn"] = ratio(rates["engine_gops"], weights)
        spreads["share_of_arithmetic"] = ratio(least_s, rates["elapsed_s"])
    return spreads


async def measure(trial: EngineOnTrial, limit: Process | None, given: Any) -> dict[str, Any]:
    """Figures of each length that the model reads, of mixed ones, and of sentences."""
    length_max = trial.embedder.card.token_count_max
    slot_count = trial.models.slot_count  # each has a text, or a core would stand idle
    lengths = [n for n in given.lengths if n <= length_max]
    workloads = [uniform(n, tokens=max(2048, n * slot_count)) for n in lengths]
    figures: dict[str, Any] = {}
    for first in (*workloads, mixed(tokens=8192, length_max=length_max)):
        workload = await sized(trial, first, seconds=given.seconds)
        spreads = await compared(trial, workload, limit, given)
        figures[workload.name] = {name: asdict(spread) for name, spread in spreads.items()}
        shown = [f"{name} {one.median:.2f}" for name, one in spreads.items() if "share" in name]
        rate = spreads["tokens_a_second"]
        print(f"{workload.name:>6}: {rate} tokens/s {', '.join(shown)}", file=sys.stderr)
    many = [await trial.rate_of_texts(sentences(512)) for _ in range(given.repeats)]
    figures["sentences"] = {
        "texts_a_second": asdict(Spread.of([rate.texts_a_second for rate in many])),
        "tokens_a_second": asdict(Spread.of([rate.tokens_a_second for rate in many])),
    }
    return figures


def start_limit(config: ModelConfig, stage: Stage, *, cores: int) -> Process | None:
    shapes = json.dumps([shape for group in weight_shapes(config) for shape in group])
    try:
        python, log = stage.python_of("onnxruntime"), stage.work_dir / "products.log"
        return Process("benchmarks.products", shapes, str(cores), python=python, log=log)
    except PeerFailed as why:
        print(f"no limit: {why}", file=sys.stderr)
        return None


async def run(given: Any) -> dict[str, Any]:
    settings = quiet_settings(given.model, precision=given.precision, data_dir=given.data_dir)
    stage, cores = Stage(Path(), "", given.envs.parent / "work", given.envs), usable_cores()
    async with engine_on_trial(settings, cores=cores) as trial:
        loaded = trial.models.loaded[0]
        limit = start_limit(loaded.checkpoint.config, stage, cores=cores)
        try:
            figures = await measure(trial, limit, given)
        finally:
            if limit is not None:
                limit.close()
        return {
            "benchmark": "engine",
            "model": given.name,
            "precision": loaded.card.precision,
            "recipe": loaded.card.recipe,
            "cores": cores,
            "load_s": round(trial.load_s, 2),
            "workloads": figures,
            "provenance": provenance("openvino", "numpy"),
        }


def counted(
    core: ov.Core, model: ov.Model, device: str, properties: Mapping[str, Any]
) -> ov.CompiledModel:
    return compile_model(core, model, device, {**properties, "PERF_COUNT": True})


async def profile(given: Any) -> dict[str, Any]:
    """Shares of the sum over all nodes: of each its least time counts, so that neighbours weigh little."""
    settings = quiet_settings(given.model, precision=given.precision, data_dir=given.data_dir)
    with mock.patch.object(ov.Core, "compile_model", counted):
        async with engine_on_trial(settings, cores=1) as trial:
            loaded = trial.models.loaded[0]
            assert isinstance(loaded.backend, OpenVinoBackend)
            length = min(PROFILED_TOKENS, loaded.card.token_count_max)
            workload = uniform(length, tokens=PROFILED_TOKENS)
            sequences = workload.sequences(vocabulary_size=loaded.card.vocabulary_size)
            batch = as_batch(sequences, loaded.checkpoint.outputs)
            times: dict[tuple[str, ...], list[float]] = defaultdict(list)
            for _ in range(PROFILED_REPEATS):
                loaded.backend.run(batch, slot=0)
                for node in loaded.backend._session._requests[0].profiling_info:  # type: ignore[union-attr]
                    if node.status == ov.ProfilingInfo.Status.EXECUTED:
                        key = (node.node_name, node.node_type, node.exec_type)
                        times[key].append(node.real_time.total_seconds())
    kinds: dict[str, float] = defaultdict(float)
    for (_, kind, kernel), seconds in times.items():
        kinds[f"{kind} {kernel}"] += min(seconds) / sum(map(min, times.values()))
    shares = sorted(kinds.items(), key=lambda one: -one[1])
    return {
        "benchmark": "profile",
        "model": given.name,
        "recipe": loaded.backend.recipe,
        "lengths": workload.lengths,
        "shares": {name: round(share, 4) for name, share in shares if share >= 0.004},
        "provenance": provenance("openvino"),
    }


def main() -> None:
    arguments = parser(
        __doc__, model="all-minilm-l6-v2", name="all-minilm-l6-v2", precision="int8", seconds=2.0,
        repeats=5,
    )  # fmt: skip
    arguments.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    arguments.add_argument("--envs", type=Path, default=ENVS)
    arguments.add_argument("--data-dir", type=Path)
    arguments.add_argument("--profile", action="store_true", help="instead of rates")
    given = arguments.parse_args()
    result = asyncio.run(profile(given) if given.profile else run(given))
    of = result["recipe"] if given.profile else given.precision
    keep(f"{result['benchmark']}-{given.name}-{of}", result, record=given.record)


if __name__ == "__main__":
    main()
