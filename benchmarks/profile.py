"""Where a row's time goes on one slot: the plugin's own counters, kind of kernel by kind of kernel.

Run: python -m benchmarks.profile [--model ID|DIR] [--name NAME] [--precision auto|RECIPE] [--cache DIR]

Of each node its least time over the repeats counts, so that neighbours weigh little; shares are of
their sum. What the linear layers reach of the machine's limit is in `benchmarks.engine`. The last
line is JSON.
"""

import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import openvino as ov
from benchmarks.figures import Provenance, keep, parser

from trivec.backends.openvino import OpenVinoBackend
from trivec.backends.openvino.packing import as_batch
from trivec.checkpoints import open_checkpoint
from trivec.core.types import Sequences

TOKENS, REPEATS = 512, 40
compile_model = ov.Core.compile_model


def counted(
    core: ov.Core, model: ov.Model, device: str, properties: Mapping[str, Any]
) -> ov.CompiledModel:
    return compile_model(core, model, device, {**properties, "PERF_COUNT": True})


def main() -> None:
    default = "all-minilm-l6-v2"
    given = parser(__doc__, model=default, name=default, precision="auto", cache="").parse_args()
    cache = Path(given.cache or tempfile.mkdtemp(prefix="trivec-bench-"))
    checkpoint = open_checkpoint(given.model, cache_dir=cache)
    with mock.patch.object(ov.Core, "compile_model", counted):
        backend = OpenVinoBackend.load(
            checkpoint, precision=given.precision, cores=1, cache_dir=cache
        )
    length = min(TOKENS, checkpoint.token_count_max)
    ids = np.random.default_rng(0).integers(5, checkpoint.config.vocab_size, length).tolist()
    batch = as_batch(Sequences.pack([ids] * (TOKENS // length)), checkpoint.outputs)
    times: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for _ in range(REPEATS):
        backend.run(batch, slot=0)
        for node in backend._session._requests[0].profiling_info:  # type: ignore[union-attr]
            if node.status == ov.ProfilingInfo.Status.EXECUTED:
                key = (node.node_name, node.node_type, node.exec_type)
                times[key].append(node.real_time.total_seconds())
    kinds: dict[str, float] = defaultdict(float)
    for (_, kind, kernel), seconds in times.items():
        kinds[f"{kind} {kernel}"] += min(seconds)
    total = sum(kinds.values())
    shares = sorted(((name, s / total) for name, s in kinds.items()), key=lambda one: -one[1])
    result = {
        "benchmark": "profile",
        "model": given.name,
        "recipe": backend.recipe,
        "lengths": [length] * (TOKENS // length),
        "shares": {name: round(share, 4) for name, share in shares if share >= 0.004},
        "provenance": Provenance.now("openvino").as_dict(),
    }
    keep(f"profile-{given.name}-{backend.recipe}", result, record=given.record)


if __name__ == "__main__":
    main()
