"""One compiled encoder and its slots: rows in, hidden states out.

It knows the OpenVINO runtime: streams, requests, precision hints. It knows no files and no vectors.
"""

import mmap
import threading
from collections.abc import Sequence

import openvino as ov

from trivec.backends.openvino.packing import Buffers, RowInputs
from trivec.backends.openvino.pages import let_go, return_free
from trivec.backends.openvino.plugin import open_core
from trivec.backends.openvino.recipe import Form, Recipe
from trivec.backends.openvino.rows import ROW_BUDGET
from trivec.core.types import Float32Array

LONG_TOKENS = 2 * ROW_BUDGET.tokens_max
"""Rows above this leave 74 kB a token behind in the plugin, which is given back (BGE-M3: 0.6 GB)."""

COPIES_BYTES_MAX = 64 << 20
"""What the weights of a model may take again for all slots after the first: MiniLM, not BGE-M3."""


class Session:
    """A compiled encoder with one stream of one thread a slot.

    Two streams of one thread beat one stream of two by 10 to 25 % up to 512 tokens a row
    (decision 0031), and a slot's thread is then the same core's work from end to end.

    A model of one stream runs in the thread that asks, and one of several hands over to a thread
    of its own. So each slot compiles its own where the copies of the weights are small
    (decision 0043), and in the grouped form always: there the plugin (2026.4) finds shared weights
    by the address of memory it has already given back, and a second model in the process may get
    those of the first (8 of 25 loads were wrong; decision 0032). Otherwise all slots share one.
    """

    def __init__(
        self,
        model: ov.Model,
        recipe: Recipe,
        *,
        slot_count: int,
        mapped: Sequence[mmap.mmap] = (),
    ) -> None:
        """*mapped* are the files that the tables of *model* are read from as they are needed."""
        streams = stream_count(recipe.form, packed_bytes(model), slot_count=slot_count)
        core, properties = open_core(), _properties(recipe, streams)
        self._compiled = [
            core.compile_model(model, "CPU", properties) for _ in range(slot_count // streams)
        ]
        self._requests = [
            self._compiled[slot // streams].create_infer_request() for slot in range(slot_count)
        ]
        self.mapped = mapped
        self._buffers = [Buffers() for _ in range(slot_count)]
        self._gate = threading.Lock()
        self._running = 0
        self._swollen = False

    @property
    def slot_count(self) -> int:
        return len(self._requests)

    def buffers(self, slot: int) -> Buffers:
        """The memory that *slot* packs its rows in."""
        return self._buffers[slot]

    def hidden(self, inputs: RowInputs, *, slot: int) -> Float32Array:
        """Last hidden states `[kept_size, hidden]`: a view, valid until the slot's next row."""
        self._infer(inputs, slot)
        view: Float32Array = self._requests[slot].get_output_tensor(0).data
        return view

    def extras(self, inputs: RowInputs, *, slot: int) -> Sequence[Float32Array]:
        """Copies of the outputs after the first, for a graph that was built with `Extra`s."""
        self._infer(inputs, slot)
        outputs = self._requests[slot].output_tensors
        return [output.data.copy() for output in outputs[1:]]

    def _infer(self, inputs: RowInputs, slot: int) -> None:
        given = (inputs.tokens, inputs.gather, inputs.bias, inputs.kept)
        request = self._requests[slot]
        for i, array in enumerate(given):
            request.set_input_tensor(i, ov.Tensor(array, shared_memory=True))
        with self._gate:
            self._running += 1
        try:
            request.infer(share_outputs=True)  # or it would copy what `hidden` reads in place
        finally:
            self._leave(was_long=inputs.tokens.shape[1] > LONG_TOKENS)

    def _leave(self, *, was_long: bool) -> None:
        """The last slot out after a long row gives its memory back; its output stays valid."""
        with self._gate:
            self._running -= 1
            self._swollen |= was_long
            if self._swollen and not self._running:
                for compiled in self._compiled:
                    compiled.release_memory()
                return_free()
                let_go(self.mapped)  # a text of thousands of tokens has read all over the table
                self._swollen = False


def _properties(recipe: Recipe, streams: int) -> dict[str, str | int | bool]:
    properties: dict[str, str | int | bool] = {
        # Where the CPU has avx512_bf16 the plugin would take bf16, which switches int8
        # activations off (decision 0003).
        "INFERENCE_PRECISION_HINT": "f32",
        "NUM_STREAMS": streams,
        "INFERENCE_NUM_THREADS": streams,
        # Pinned, every model of one stream takes the first core, and a stream waits for its own
        # core while the event loop is on it and another stands idle (decision 0043).
        "ENABLE_CPU_PINNING": False,
    }
    if recipe.group_size is not None:
        properties["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = recipe.group_size
    return properties


def stream_count(form: Form, weights_bytes: int, *, slot_count: int) -> int:
    """Streams of each compiled model: *slot_count* where all slots share one, else 1."""
    copies_bytes = (slot_count - 1) * weights_bytes
    is_shared = form is not Form.INT8_GROUPS and copies_bytes > COPIES_BYTES_MAX
    return slot_count if is_shared else 1


def packed_bytes(model: ov.Model) -> int:
    """What the plugin copies to pack it: matrices that are multiplied, not tables looked up in."""
    return sum(node.get_byte_size() for node in model.get_ordered_ops() if _is_packed(node))


def _is_packed(node: ov.Node) -> bool:
    is_matrix = node.get_type_name() == "Constant" and len(node.get_output_shape(0)) == 2
    readers = {one.get_node().get_type_name() for one in node.output(0).get_target_inputs()}
    return is_matrix and "Gather" not in readers
