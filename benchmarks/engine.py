"""The engine's rate as a share of what the machine's matrix products allow, in one run.

Run: python -m benchmarks.engine --model ID|DIR --name NAME [--precision int8|fp32] [--envs DIR]

Each round measures the limit (oneDNN over every weight of the model, all cores, 256 rows), OpenVINO's
fully-connected layers alone, and then one workload; the share is taken round by round, so that noisy
neighbours cancel out. Without torch's environment the second stands in for the first. Beside int8
layers `share_of_arithmetic` counts attention's products at the fp32 rate of the same limit, since
they are not int8: the time that the arithmetic must cost over the time it took. The last line is JSON.
"""

import argparse
import asyncio
import sys
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.against.environments import ENVS, python_of
from benchmarks.against.peer import Peer
from benchmarks.figures import Provenance, Spread, ratio
from benchmarks.harness import EngineOnTrial, engine_on_trial, quiet_settings, sized
from benchmarks.keeping import keep
from benchmarks.texts import Workload, mixed, sentences, uniform

from trivec.models.ops import ModelConfig
from trivec.server.machine import usable_cores

LENGTHS = (16, 128, 512, 2048, 8192)
LIMIT_ROWS = 256  # where the rate of the products has levelled off


@dataclass(frozen=True, slots=True)
class Limit:
    """A process that does nothing but the model's matrix products."""

    peer: Peer
    precision: str
    seconds: float

    def gops(self) -> float:
        question = {"rows": LIMIT_ROWS, "precision": self.precision, "seconds": self.seconds}
        return float(self.peer.ask(question)["gops"])


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """Billions of operations of a workload: the weights' products, and attention's two."""

    weights_gop: float
    attention_gop: float

    @classmethod
    def of(cls, workload: Workload, config: ModelConfig) -> "Arithmetic":
        """A token costs 2 for each weight of a layer's six matrices; n tokens 4 · n² · hidden a layer."""
        hidden, wide = config.hidden_size, config.intermediate_size
        weights = config.num_hidden_layers * (4 * hidden * hidden + 2 * hidden * wide)
        attention = config.num_hidden_layers * 4 * hidden * workload.squares()
        return cls(2 * weights * workload.token_count / 1e9, attention / 1e9)

    @property
    def gop(self) -> float:
        return self.weights_gop + self.attention_gop

    def least_s(self, *, weights_gops: float, attention_gops: float) -> float:
        """What it costs at these rates and nothing else."""
        return self.weights_gop / weights_gops + self.attention_gop / attention_gops


@dataclass(frozen=True, slots=True)
class Limits:
    """What a round is compared with."""

    of_products: dict[str, Limit]  # at the model's own precision, the one that counts first
    of_attention: Limit  # at fp32, by the first of them


async def measure(
    trial: EngineOnTrial, limits: Limits, given: argparse.Namespace
) -> dict[str, Any]:
    seconds, repeats = given.seconds, given.repeats
    card = trial.embedder.card
    slot_count = trial.models.slot_count  # each has a text, or a core would stand idle
    first = [
        uniform(n, tokens=max(2048, n * slot_count))
        for n in given.lengths
        if n <= card.token_count_max
    ]
    first.append(mixed(tokens=8192, length_max=card.token_count_max))
    workloads = [await sized(trial, one, seconds=seconds) for one in first]
    figures: dict[str, Any] = {}
    for workload in workloads:
        spreads = await compared(trial, workload, limits, repeats)
        figures[workload.name] = {name: asdict(spread) for name, spread in spreads.items()}
        shares = {name: spread for name, spread in spreads.items() if name.startswith("share_of")}
        shown = ", ".join(f"{name} {spread.median:.2f}" for name, spread in shares.items())
        print(
            f"{workload.name:>6}: {spreads['tokens_a_second']} tokens/s, {shown}", file=sys.stderr
        )
    texts = sentences(512)
    many = [await trial.rate_of_texts(texts) for _ in range(repeats)]
    figures["sentences"] = {
        "texts_a_second": asdict(Spread.of([rate.texts_a_second for rate in many])),
        "tokens_a_second": asdict(Spread.of([rate.tokens_a_second for rate in many])),
    }
    return figures


async def compared(
    trial: EngineOnTrial, workload: Workload, limits: Limits, repeats: int
) -> dict[str, Spread]:
    """The rates of one workload and of the limits, turn and turn about, and its shares of them."""
    arithmetic = Arithmetic.of(workload, trial.models.loaded[0].checkpoint.config)
    rates: dict[str, list[float]] = defaultdict(list)
    for _ in range(repeats):
        for name, limit in limits.of_products.items():
            rates[name].append(await asyncio.to_thread(limit.gops))
        rates["fp32"].append(await asyncio.to_thread(limits.of_attention.gops))
        rate = await trial.rate_of(workload)
        rates["tokens_a_second"].append(rate.tokens_a_second)
        rates["texts_a_second"].append(rate.texts_a_second)
        rates["engine_gops"].append(arithmetic.gop / rate.elapsed_s)
        rates["elapsed_s"].append(rate.elapsed_s)
    names = list(limits.of_products)
    least_s = [
        arithmetic.least_s(weights_gops=weights, attention_gops=attention)
        for weights, attention in zip(rates[names[0]], rates["fp32"], strict=True)
    ]
    shares = {f"share_of_{name}": ratio(rates["engine_gops"], rates[name]) for name in names}
    shares["share_of_arithmetic"] = ratio(least_s, rates["elapsed_s"])
    return {name: Spread.of(many) for name, many in rates.items()} | shares


def start_limits(
    config: ModelConfig, precision: str, *, cores: int, envs: Path, work_dir: Path
) -> dict[str, Peer]:
    shape = (config.hidden_size, config.intermediate_size, config.num_hidden_layers, cores)
    arguments = [str(one) for one in shape]
    work_dir.mkdir(parents=True, exist_ok=True)
    pythons = {"openvino": Path(sys.executable)}
    if python_of("onnxruntime", envs).exists():
        pythons["onednn"] = python_of("onnxruntime", envs)
    return {
        name: Peer(
            f"products_{name}", *arguments, python=python, log=work_dir / f"products_{name}.log"
        )
        for name, python in sorted(pythons.items())
    }


async def run(given: argparse.Namespace) -> dict[str, Any]:
    settings = quiet_settings(given.model, precision=given.precision, data_dir=given.data_dir)
    cores = usable_cores()
    async with engine_on_trial(settings, cores=cores) as trial:
        loaded = trial.models.loaded[0]
        precision = loaded.card.precision
        started = start_limits(
            loaded.checkpoint.config,
            precision,
            cores=cores,
            envs=given.envs,
            work_dir=given.envs.parent / "work",
        )
        with ExitStack() as open_peers:
            peers = {name: open_peers.enter_context(peer) for name, peer in started.items()}
            seconds = given.seconds / 2
            products = {name: Limit(peer, precision, seconds) for name, peer in peers.items()}
            fp32 = Limit(next(iter(peers.values())), "fp32", seconds)
            figures = await measure(trial, Limits(products, fp32), given)
        return {
            "benchmark": "engine",
            "model": given.name,
            "precision": precision,
            "cores": cores,
            "load_s": round(trial.load_s, 2),
            "workloads": figures,
            "provenance": Provenance.now("openvino", "numpy").as_dict(),
        }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--model", default="all-minilm-l6-v2")
    arguments.add_argument("--name", required=True, help="what the result is filed under")
    arguments.add_argument("--precision", default="int8", choices=["int8", "fp32"])
    arguments.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    arguments.add_argument("--envs", type=Path, default=ENVS)
    arguments.add_argument("--data-dir", type=Path)
    arguments.add_argument("--seconds", type=float, default=2.0)
    arguments.add_argument("--repeats", type=int, default=5)
    given = arguments.parse_args()
    keep(f"engine-{given.name}-{given.precision}", asyncio.run(run(given)))


if __name__ == "__main__":
    main()
