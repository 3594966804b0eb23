"""How fast the torch engine is on this machine's device: one command, no network, nothing installed.

    python -m benchmarks.gpu                      everything, BGE-M3's shape, 24 layers
    python -m benchmarks.gpu --small              the same at a size that a CPU does in two minutes
    python -m benchmarks.gpu --tokens-max 32768   one of the engine's dials; see --help

Makes its own dummy weights. Talks on stderr, ends with one JSON line on stdout. Every rate is set
against the matrix rate measured in the same run. What is missing here (a peer's package, a GPU) is
said and left out.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.gpu_engine import engine_rates
from benchmarks.gpu_peers import peers
from benchmarks.gpu_plan import Plan, device_name, peak_memory_gib, talk
from benchmarks.gpu_stages import host_stages
from benchmarks.gpu_zoo import nan_zoo

from trivec.backends.torch.backend import TorchBackend
from trivec.backends.torch.tuning import Tuning
from trivec.checkpoints.dummy import BLUEPRINTS, write_dummy
from trivec.checkpoints.opening import open_checkpoint
from trivec.cli.bench.figures import Provenance
from trivec.cli.bench.texts import sentences


def main() -> None:
    arguments = parse()
    plan = Plan.of(arguments)
    with tempfile.TemporaryDirectory(prefix="trivec-gpu-") as made:
        folder = arguments.model or dummy(Path(made) / "bge-m3", plan)
        checkpoint = open_checkpoint(str(folder), cache_dir=Path(made) / "cache")
        tuning = Tuning(
            tokens_max=arguments.tokens_max,
            slots_per_device=arguments.slots,
            attention=arguments.attention,
            compiled=arguments.compiled,
            graph_tokens_max=arguments.graph_tokens_max,
        )
        backend = TorchBackend.load(
            checkpoint, precision=arguments.precision, device=arguments.device, tuning=tuning
        )
        talk(f"{backend.precision}; " + "; ".join(f"{k}: {v}" for k, v in backend.notes.items()))
        figures: dict[str, Any] = {
            "model": {"layers": checkpoint.config.layer_count, "dummy": arguments.model is None},
            "precision": backend.precision,
            "budget": asdict(backend.budget),
            "notes": dict(backend.notes),
        }
        parts: dict[str, Callable[[], Any]] = {
            "engine": lambda: engine_rates(backend, checkpoint, plan),
            "peers": lambda: peers(folder, backend, plan),
            "host": lambda: host_stages(
                arguments.tokenizer or checkpoint.tokenizer_file,
                checkpoint.config,
                seconds=plan.seconds,
            ),
            "http": lambda: over_http(folder, arguments, plan),
            "nan_zoo": lambda: nan_zoo(checkpoint, arguments.device, plan),
        }
        for name in arguments.only or parts:
            talk(f"-- {name}")
            figures[name] = parts[name]()
            figures["peak_memory_gib"] = peak_memory_gib()
        backend.close()
    packages = (
        "torch",
        "numpy",
        "tokenizers",
        "transformers",
        "sentence-transformers",
        "flash-attn",
    )
    provenance = Provenance.now(*packages).as_dict()
    print(
        json.dumps(
            {"benchmark": "gpu", **figures, "device": device_name(), "provenance": provenance}
        )
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--small", action="store_true", help="two layers, short texts: for CPUs")
    parser.add_argument("--model", type=Path, help="a checkpoint's folder instead of a dummy")
    parser.add_argument("--tokenizer", type=Path, help="a real tokenizer.json for the host's part")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of one measurement")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens-max", type=int, help="tokens of one batch")
    parser.add_argument("--slots", type=int, help="threads that feed one device")
    parser.add_argument(
        "--attention", help="varlen, flash-attn-2, flash-attn-3, grouped, reference"
    )
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument("--graph-tokens-max", type=int, help="largest captured batch; 0: none")
    names = ("engine", "peers", "host", "http", "nan_zoo")
    parser.add_argument("--only", nargs="+", choices=names, help="parts to run")
    return parser.parse_args()


def dummy(folder: Path, plan: Plan) -> Path:
    """A dummy of BGE-M3's shape, or at small size of a quarter of its width."""
    blueprint = BLUEPRINTS["baai/bge-m3"].with_layers(plan.layers)
    if plan.is_small:
        config = replace(
            blueprint.config,
            hidden_size=256,
            head_count=4,
            intermediate_size=1024,
            vocabulary_size=8_000,
        )
        blueprint = replace(blueprint, config=config, multi_dimensions=256)
    started_s = time.perf_counter()
    write_dummy(folder, replace(blueprint, torch_files=False))
    talk(f"dummy weights of {plan.layers} layers in {time.perf_counter() - started_s:.0f} s")
    return folder


def over_http(folder: Path, arguments: argparse.Namespace, plan: Plan) -> dict[str, Any] | str:
    """Texts a second and latency of `trivec serve`, by clients and texts a request."""
    from trivec.cli.bench.server import ServerFailed, Shape, measure, own_server

    counts = ((1, 1), (4, 1), (8, 8)) if arguments.small else (
        (1, 1), (16, 1), (64, 1), (256, 1), (8, 32), (32, 32), (16, 128), (4, 512)
    )  # fmt: skip
    texts = sentences(4096)
    options = (
        "--backend",
        "torch",
        "--device",
        arguments.device,
        "--precision",
        arguments.precision,
    )
    found: dict[str, Any] = {}
    try:
        with own_server(str(folder), arguments=options) as target:
            for shape in (Shape(*pair) for pair in counts):
                measure(target, shape, texts, duration_s=min(1.0, plan.seconds))
                answers = measure(target, shape, texts, duration_s=plan.seconds)
                found[str(shape)] = {
                    "texts_a_second": answers.rate * shape.text_count,
                    "p50_ms": answers.latency_s(0.50) * 1e3,
                    "p99_ms": answers.latency_s(0.99) * 1e3,
                }
                talk(f"{shape!s:>7}: {found[str(shape)]}")
    except ServerFailed as error:
        talk(str(error))
        return f"the server did not start: {str(error).splitlines()[0]}"
    return found


if __name__ == "__main__":
    main()
