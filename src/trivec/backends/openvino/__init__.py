"""Encoders on CPUs through OpenVINO: our own graph, built from the weights, on packed rows.

`backend.py` is the door; `graph.py` and `linear.py` say what is computed, `rows.py` in which
shapes, `recipe.py` and `certificate.py` with which arithmetic, `prepared.py` from which file.
"""

from trivec.backends.openvino.backend import OpenVinoBackend
from trivec.backends.openvino.certificate import Certificate

__all__ = ["Certificate", "OpenVinoBackend"]
