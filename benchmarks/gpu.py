"""How fast the torch engine is on this machine's device: one command, no network, nothing installed.

    python -m benchmarks.gpu --out FILE           everything, BGE-M3's shape, 24 layers
    python -m benchmarks.gpu --small              the same at a size that a CPU does in two minutes
    python -m benchmarks.gpu --tokens-max 32768   one of the engine's dials; see --help

Makes its own dummy weights. Talks on stderr, ends with one JSON line on stdout, and keeps what it
has in --out after every part: a run that is stopped prints and keeps what was measured. Every rate
is set against the matrix rate measured in the same run. What is missing here (a peer's package, a
GPU, time) is said and left out.
"""

import argparse
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import gpu_parts as parts
from benchmarks.figures import LOCAL, provenance
from benchmarks.gpu_record import PART_S, Plan, Record, TimeBudget, talk
from tests.support.dummy import BLUEPRINTS, write_dummy

from trivec.backends.torch.backend import TorchBackend
from trivec.backends.torch.device import TorchOptions
from trivec.checkpoints import open_checkpoint

PACKAGES = ("torch", "triton", "numpy", "tokenizers", "sentence-transformers", "flash-attn")
DIALS = ("tokens_max", "slots_per_device", "attention", "compiled", "graph_tokens_max")
SMALL_NOTE = "small: shows that everything runs; rates and shares of so small a model mean nothing"


def measure_all(
    given: argparse.Namespace, plan: Plan, *, time_left: TimeBudget, record: Record, made: Path
) -> None:
    folder = given.model or dummy(made / "bge-m3", plan)
    checkpoint = open_checkpoint(str(folder), cache_dir=made / "cache")
    began_s = time.perf_counter()
    backend = TorchBackend.load(
        checkpoint,
        precision=given.precision,
        device=given.device,
        options=TorchOptions(**{name: getattr(given, name) for name in DIALS}),
    )
    record.put("load_s", time.perf_counter() - began_s)
    talk(f"{backend.precision}; " + "; ".join(f"{k}: {v}" for k, v in backend.notes.items()))
    layers = checkpoint.config.num_hidden_layers
    record.put("model", {"layers": layers, "dummy": given.model is None})
    record.put("precision", backend.precision)
    record.put("budget", asdict(backend.budget))
    record.put("notes", dict(backend.notes))

    def has_time_for_a_round(round_s: float) -> bool:
        return time_left.has(round_s, then=record.to_come[1:])

    engine = partial(record.put, "engine")
    tokenizer_file = given.tokenizer or checkpoint.tokenizer_file
    measures: dict[str, Callable[[], Any]] = {
        "engine": lambda: parts.engine_rates(
            backend, checkpoint.config, plan, keep=engine, may_go_on=has_time_for_a_round
        ),
        "host": lambda: parts.host_stages(tokenizer_file, checkpoint.config, seconds=plan.seconds),
        "peers": lambda: parts.peers(folder, backend, plan),
        "http": lambda: parts.over_http(folder, plan, keep=partial(record.put, "http")),
        "nan_zoo": lambda: parts.nan_zoo(checkpoint, plan),
    }
    for name in list(record.to_come):  # a copy: what is finished leaves it
        talk(f"-- {name}, {time_left.left_s:.0f} s left")
        if not plan.is_small and name != "engine" and not time_left.has(PART_S[name]):
            talk(f"left out: it needs some {PART_S[name]:.0f} s; run it alone with --only {name}")
            continue
        try:
            record.finish(name, measures[name]())
        except Exception as error:  # the outermost loop: one part's failure is no other's
            talk(traceback.format_exc())
            record.put(f"{name}_failed", repr(error))
        record.put("peak_memory_gib", parts.peak_memory_gib())
    backend.close()


def dummy(folder: Path, plan: Plan) -> Path:
    """A dummy of BGE-M3's shape, or at small size of a quarter of its width."""
    blueprint = BLUEPRINTS["baai/bge-m3"].with_layers(plan.layers)
    if plan.is_small:
        config = replace(
            blueprint.config, hidden_size=256, num_attention_heads=4, intermediate_size=1024,
            vocab_size=8_000,
        )  # fmt: skip
        blueprint = replace(blueprint, config=config, multi_dimensions=256)
    started_s = time.perf_counter()
    write_dummy(folder, replace(blueprint, torch_files=False))
    talk(f"dummy weights of {plan.layers} layers in {time.perf_counter() - started_s:.0f} s")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--small", action="store_true", help="two layers, short texts: for CPUs")
    add("--model", type=Path, help="a checkpoint's folder instead of a dummy")
    add("--tokenizer", type=Path, help="a real tokenizer.json for the host's part")
    add("--layers", type=int, default=24)
    add("--device", default="auto")
    add("--precision", default="auto")
    add("--seconds", type=float, default=3.0, help="length of one measurement")
    add("--repeats", type=int, default=5)
    add("--tokens-max", type=int, help="tokens of one batch")
    add("--slots-per-device", "--slots", type=int, help="threads that feed one device")
    add("--attention", help="varlen, flash-attn-2, flash-attn-3, grouped, reference")
    add("--compiled", action=argparse.BooleanOptionalAction, default=None)
    add("--graph-tokens-max", type=int, help="largest captured batch; 0: none")
    add("--api-processes", type=int, help="of the server; default: half the cores")
    add("--only", nargs="+", choices=PART_S, help="parts to run")
    add("--budget-s", type=float, default=540.0, help="what would end later is left out")
    add("--out", type=Path, default=LOCAL / "gpu.json", help="where it is kept")
    given = parser.parse_args()
    plan, time_left = Plan.of(given), TimeBudget(given.budget_s)
    record = Record(given.out, [name for name in PART_S if name in (given.only or PART_S)])
    with (
        record.printed_whatever_happens(),
        tempfile.TemporaryDirectory(prefix="trivec-gpu-") as made,
    ):
        record.put("device", parts.device_name())
        if plan.is_small:
            record.put("note", SMALL_NOTE)
            talk(SMALL_NOTE)
        record.put("provenance", provenance(*PACKAGES))
        measure_all(given, plan, time_left=time_left, record=record, made=Path(made))


if __name__ == "__main__":
    main()
