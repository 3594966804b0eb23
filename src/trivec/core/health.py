"""How the process is, as one value: what probes are told and routes obey.

It knows words, not causes: whoever owns the process's life says which phase it is in and why.
"""

from dataclasses import dataclass
from typing import Literal, TypeAlias

Phase: TypeAlias = Literal["loading", "ready", "draining", "stopped"]


@dataclass(frozen=True, slots=True)
class Health:
    """One look at the process; probes read it and compute nothing.

    loading: models are not in memory yet; keyed routes answer 503 `loading`.
    ready: everything is answered.
    draining: SIGTERM came; everything is still answered, each time with `Connection: close`.
    stopped: the time to drain is over; keyed routes answer 503 `draining`.
    """

    phase: Phase
    alive: bool  # the event loop answers and no worker is past its time bound
    ready: bool  # loaded, warmed, self-test passed, store writable, not draining
    reason: str  # why it is not alive or not ready, in words for whoever is on call; else "ok"


HEALTHY = Health("ready", alive=True, ready=True, reason="ok")


@dataclass(frozen=True, slots=True)
class QueueLoad:
    """What waits for one model, in no batch yet."""

    model: str
    requests: int
    tokens: int
    seconds: float  # to compute the tokens with all slots, at the model's throughput as measured
