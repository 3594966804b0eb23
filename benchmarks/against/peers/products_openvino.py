"""The fully-connected layers of a graph like ours and nothing else, by OpenVINO.

Arguments and questions as in `products_onednn`. Weights are int8 a channel, activations quantised on
the way in groups of 128: what our graph's products cost, so it tells what is left to gain outside of
them; and the limit where torch is not at hand, a softer one than oneDNN's.
"""

import json
import sys
import threading
import time
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset15 as op


class Layers:
    """Compiled graphs by precision; each result is a sum, so that no product can be skipped."""

    def __init__(self, hidden: int, intermediate: int, layer_count: int, core_count: int) -> None:
        shapes = [(hidden, hidden)] * 4 + [(intermediate, hidden), (hidden, intermediate)]
        self._hidden = hidden
        self._shapes = shapes * layer_count
        self._core_count = core_count
        self._compiled: dict[str, Any] = {}
        self.operations_a_row = 2 * sum(wide * deep for wide, deep in self._shapes)

    def requests(self, precision: str, rows: int) -> list[Any]:
        """One request a stream, its input `[rows, hidden]` already set."""
        if precision not in self._compiled:
            self._compiled[precision] = self._compile(precision)
        requests = [
            self._compiled[precision].create_infer_request() for _ in range(self._core_count)
        ]
        for request in requests:
            request.set_input_tensor(ov.Tensor(np.ones((rows, self._hidden), np.float32)))
        return requests

    def _compile(self, precision: str) -> Any:
        draw = np.random.default_rng(0)
        x = first = op.parameter([-1, self._hidden], np.float32)
        for wide, deep in self._shapes:
            x = op.matmul(x, self._weight(draw, wide, deep, precision), False, True)
        model = ov.Model([op.result(x)], [first])
        return ov.Core().compile_model(
            model,
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": "f32",
                "DYNAMIC_QUANTIZATION_GROUP_SIZE": "128",
                "NUM_STREAMS": self._core_count,
                "INFERENCE_NUM_THREADS": self._core_count,
            },
        )

    def _weight(self, draw: np.random.Generator, wide: int, deep: int, precision: str) -> Any:
        if precision == "fp32":
            scaled = draw.standard_normal((wide, deep), np.float32) / np.sqrt(deep)
            return op.constant(scaled.astype(np.float32))
        steps = draw.integers(-127, 128, (wide, deep)).astype(np.int8)
        scale = np.full((wide, 1), 1 / (73 * np.sqrt(deep)), np.float32)
        return op.multiply(op.convert(op.constant(steps), "f32"), op.constant(scale))


def rate_gops(layers: Layers, question: Any) -> float:
    """Billions of operations a second over all streams, a mean over the time asked for."""
    requests = layers.requests(question["precision"], question["rows"])
    passes_a_second = [0.0] * len(requests)
    started = threading.Barrier(len(requests))

    def drive(stream: int) -> None:
        requests[stream].infer()
        started.wait()
        passes, started_s = 0, time.perf_counter()
        while (elapsed_s := time.perf_counter() - started_s) < question["seconds"]:
            requests[stream].infer()
            passes += 1
        passes_a_second[stream] = passes / elapsed_s

    threads = [threading.Thread(target=drive, args=(i,)) for i in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    operations: int = layers.operations_a_row * question["rows"]
    return operations * sum(passes_a_second) / 1e9


def main() -> None:
    hidden, intermediate, layer_count, core_count = map(int, sys.argv[1:5])
    layers = Layers(hidden, intermediate, layer_count, core_count)
    print(json.dumps({"loaded": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps({"gops": rate_gops(layers, json.loads(line))}), flush=True)


if __name__ == "__main__":
    main()
