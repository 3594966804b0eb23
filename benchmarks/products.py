"""Nothing but the matrix products of a model, by oneDNN through torch: the limit of an engine.

Run by `benchmarks.engine` in an environment with torch: SHAPES (JSON, [out, in] each) CORES. Question:
`{"rows": n, "precision": "int8"|"fp32", "seconds": s}`; answer: `{"gops": g}`. Every weight of the model is
a matrix of its own, so the caches see what they see there; int8 has static scales, prepacked weights
and activations that were quantised beforehand. One thread a core, each with rows of its own.
"""

import json
import sys
import threading
import time
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch


class Products:
    """The weights of all layers, and one pass over them at each precision."""

    def __init__(self, shapes: list[list[int]]) -> None:
        self._shapes = shapes
        self.operations_a_row = 2 * sum(wide * deep for wide, deep in self._shapes)

    @cached_property
    def int8(self) -> list[Any]:
        made = []
        for wide, deep in self._shapes:
            weight = torch.randint(-127, 127, (wide, deep), dtype=torch.int8)
            packed = torch.ops.onednn.qlinear_prepack(weight, None)
            zeros = torch.zeros(wide, dtype=torch.long)
            made.append((deep, packed, torch.rand(wide) + 0.01, zeros, torch.randn(wide)))
        return made

    @cached_property
    def fp32(self) -> list[Any]:
        pack, shapes = torch.ops.mkldnn._reorder_linear_weight, self._shapes
        return [
            (deep, pack(torch.randn(wide, deep), 256), torch.randn(wide)) for wide, deep in shapes
        ]

    def pass_over(self, precision: str, rows: int) -> Callable[[], None]:
        widths = {deep for _, deep in self._shapes}
        if precision == "fp32":
            floats = {deep: torch.randn(rows, deep) for deep in widths}

            def once() -> None:
                for deep, packed, bias in self.fp32:
                    torch.ops.mkldnn._linear_pointwise(floats[deep], packed, bias, "none", [], "")

            return once
        steps = {deep: torch.randint(0, 255, (rows, deep), dtype=torch.uint8) for deep in widths}

        def once_int8() -> None:
            for deep, packed, scales, zeros, bias in self.int8:
                torch.ops.onednn.qlinear_pointwise(
                    steps[deep], 0.02, 128, packed, scales, zeros, bias,
                    1.0, 0, torch.float32, "none", [], "",
                )  # fmt: skip

        return once_int8


def rate_gops(products: Products, question: Any, core_count: int) -> float:
    """Billions of operations a second over all cores, a mean over the time asked for."""
    passes_a_second = [0.0] * core_count
    started = threading.Barrier(core_count)

    def drive(core: int) -> None:
        torch.set_num_threads(1)
        once = products.pass_over(question["precision"], question["rows"])
        with torch.inference_mode():
            once()
            started.wait()
            passes, started_s = 0, time.perf_counter()
            while (elapsed_s := time.perf_counter() - started_s) < question["seconds"]:
                once()
                passes += 1
            passes_a_second[core] = passes / elapsed_s

    products.pass_over(question["precision"], 1)()  # weights are made once, before the threads
    threads = [threading.Thread(target=drive, args=(core,)) for core in range(core_count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    operations: int = products.operations_a_row * question["rows"]
    return operations * sum(passes_a_second) / 1e9


def main() -> None:
    torch.set_num_threads(1)
    products, core_count = Products(json.loads(sys.argv[1])), int(sys.argv[2])
    print(json.dumps({"loaded": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps({"gops": rate_gops(products, json.loads(line), core_count)}), flush=True)


if __name__ == "__main__":
    main()
