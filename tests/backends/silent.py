"""A session that runs and computes nothing, as int8 that the plugin cannot run on this CPU."""

import numpy as np

from trivec.backends.openvino.packing import RowInputs
from trivec.backends.openvino.session import Session
from trivec.backends.openvino.witness import Plan, compiled
from trivec.core.types import Float32Array


class SilentSession(Session):
    """Every result is empty and has lost its shape."""

    def __init__(self, inner: Session) -> None:
        self._requests = inner._requests
        self._buffers = inner._buffers

    def hidden(self, inputs: RowInputs, *, slot: int) -> Float32Array:
        return np.empty(0, np.float32)


def silent(plan: Plan, slot_count: int) -> Session:
    """What *plan* is compiled into, silenced."""
    return SilentSession(compiled(plan, slot_count))
