"""Encoders on CPUs through OpenVINO: our own graph, built from the weights, on packed tokens.

`backend.py` is the `Backend`; `graph.py` says what is computed, `packing.py` in which shapes,
`quantise.py`, `calibrate.py` and `trial.py` in which scheme, `session.py` runs it, `cache.py` keeps it.
"""

from trivec.backends.openvino.backend import OpenVinoBackend
from trivec.backends.openvino.cache import check_cache
from trivec.backends.openvino.calibrate import Certificate

__all__ = ["Certificate", "OpenVinoBackend", "check_cache"]
