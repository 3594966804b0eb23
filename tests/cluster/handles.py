"""Handles without a cluster: Ray Serve's own mode for tests, in which replicas are threads."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what Ray itself imports
    from ray import serve

from trivec.cluster.serve import BackendReplica, HandleBackend
from trivec.core.ports import Backend

__all__ = ["handle_backend", "serve"]

CALL_S_MAX = 60.0

_numbers = count()
_backends: dict[int, Backend] = {}  # what a replica is made of is pickled, and a backend is not


class Runner(BackendReplica):
    """A replica of a backend of this process, by its number."""

    def __init__(self, number: int) -> None:
        super().__init__(_backends[number], call_s_max=CALL_S_MAX)


@contextmanager
def handle_backend(backend: Backend, *, call_s_max: float = CALL_S_MAX) -> Iterator[HandleBackend]:
    """*backend* behind a handle, whose arguments are pickled as between processes."""
    number = next(_numbers)
    _backends[number] = backend
    handle = serve.run(serve.deployment(Runner).bind(number), _local_testing_mode=True)
    yield HandleBackend(
        handle,
        ingress="test",
        slot_count=backend.slot_count,
        budget=backend.budget,
        call_s_max=call_s_max,
    )
    del _backends[number]
