"""A linear layer as OpenVINO nodes, in each form of `recipe.Form`.

The plugin recognises what is written here: an int8 constant, converted and scaled, becomes an int8
kernel; one FakeQuantize on integers before it makes the activations int8 with our own scale.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from openvino import Node, Output
from openvino import opset15 as op

from trivec.backends.openvino.recipe import Form

INT8_MAX = 127.0
UINT8_MAX = 255.0
ROW_FLOOR = 1e-10  # a row of zeros is divided by this instead of by zero

Tensors = Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True, slots=True)
class LinearInput:
    """Activations made ready once for all the layers that read them."""

    form: Form
    values: Output  # [rows, in]; whole numbers in ±127, or 0 to 255, for INT8_ROWS
    row_scale: Output | None  # [rows, 1]; what one step of *values* is worth, for INT8_ROWS


class _Lent:
    """A read-only array lent to OpenVINO, which shares memory only where numpy calls it writable.

    A constant is never written to, so a mapped file may stand behind it without a copy.
    """

    def __init__(self, array: NDArray[np.generic]) -> None:
        self._array = array  # kept alive as long as the view of it
        interface = array.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}


def constant(array: NDArray[np.generic]) -> Output:
    """*array* as a node that shares its memory: it must stay unchanged."""
    lent = np.asarray(_Lent(np.ascontiguousarray(array)))
    return op.constant(lent, shared_memory=True).output(0)


def number(value: float) -> Output:
    return op.constant(np.float32(value)).output(0)


def linear_input(
    x: Node, form: Form, *, channel_scale: NDArray[np.generic] | None, lift: float
) -> LinearInput:
    """Make *x* `[rows, in]` ready for *form*; *channel_scale* `[in]` evens out its channels.

    INT8_ROWS: one scale a token. The largest |x| of the row becomes 127; or, where *lift* says how
    far below zero *x* may be, it is lifted by that and its largest value becomes 255. A row's bits
    depend on that row alone.
    """
    if form is Form.FP32:
        return LinearInput(form, x.output(0), None)
    if lift and form is Form.INT8_ROWS:
        x = op.add(x, number(lift))
    if channel_scale is not None:
        x = op.multiply(x, constant(channel_scale))
    if form is Form.INT8_GROUPS:
        return LinearInput(form, x.output(0), None)
    if lift:
        # True already; but the plugin then makes x once, within GELU's own pass, instead of
        # once for its largest value and once more for its steps (a quarter less time there).
        x = op.maximum(x, number(0.0))
    low, high = (0.0, UINT8_MAX) if lift else (-INT8_MAX - 1, INT8_MAX)
    size = x if lift else op.absolute(x)
    largest = op.maximum(op.reduce_max(size, op.constant(np.array([-1])), True), number(ROW_FLOOR))
    steps = op.multiply(x, op.divide(number(high), largest))  # [rows, in]
    bounds = (number(low), number(high))
    whole = op.fake_quantize(steps, *bounds, *bounds, 256)
    return LinearInput(form, whole.output(0), op.multiply(largest, number(1 / high)).output(0))


def linear(x: LinearInput, tensors: Tensors, name: str) -> Node:
    """X Wᵀ + b for the layer *name*, where it has a bias: float32 `[rows, out]`."""
    weight, bias = tensors[f"{name}.weight"], tensors.get(f"{name}.bias")
    if x.form is Form.FP32:
        matrix = constant(weight)
    else:
        scale = constant(tensors[f"{name}.scale"])  # [out, 1]
        matrix = op.multiply(op.convert(constant(weight), "f32"), scale).output(0)
    product = op.matmul(x.values, matrix, False, True)
    if x.row_scale is not None:
        product = op.multiply(product, x.row_scale)
    return product if bias is None else op.add(product, constant(bias))
