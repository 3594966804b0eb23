"""What happened, as values. Packages tell an `Observer`; only telemetry knows what a metric is."""

from dataclasses import dataclass
from typing import TypeAlias

from trivec.core.types import CertificateSummary, ModelCard


@dataclass(frozen=True, slots=True)
class RequestServed:
    """An HTTP request was answered, well or badly. Never holds text, vectors or a key."""

    request_id: str
    client_request_id: str | None
    method: str
    route: str  # the route's template, or "other"
    prefix: str  # of those that its API is served under, the one that the route begins with
    status: int
    code: str | None  # the error's code or type; None for a success
    key_id: str | None
    model: str | None  # a served id
    input_count: int
    token_count: int
    request_bytes: int
    response_bytes: int
    duration_s: float
    tokenize_s: float = 0.0
    queue_s: float = 0.0
    compute_s: float = 0.0
    encode_s: float = 0.0
    traceparent: str | None = None  # the client's W3C trace context, as it was sent
    ended_s: float | None = None  # seconds since the epoch; None: now
    message: str | None = None  # what a client was told that it did wrong; for a person's terminal


@dataclass(frozen=True, slots=True)
class BatchRan:
    """A worker finished one batch."""

    model: str
    slot: int
    sequences: int
    tokens: int
    tokens_max: int  # the budget it was filled against
    duration_s: float
    failed: bool


@dataclass(frozen=True, slots=True)
class RowNotFinite:
    """A vector held NaN or infinity and was computed again in fp32."""

    model: str
    recovered: bool


@dataclass(frozen=True, slots=True)
class ModelLoaded:
    """A model is ready to serve; from now on its id is a label."""

    card: ModelCard
    load_s: float
    certificate: CertificateSummary | None = None  # of its precision, where it has one


@dataclass(frozen=True, slots=True)
class PhaseChanged:
    """The process moved on in its life."""

    phase: str  # loading, ready, draining, stopped
    reason: str


@dataclass(frozen=True, slots=True)
class ShardFinished:
    """Lines of a batch job were answered and billed."""

    batch_id: str
    model: str  # a served id
    completed: int  # lines
    failed: int
    token_count: int
    duration_s: float


@dataclass(frozen=True, slots=True)
class LinesWaiting:
    """How many lines of batch jobs are not answered yet, whichever server will do it."""

    count: int


Event: TypeAlias = (
    LinesWaiting
    | ShardFinished
    | RequestServed
    | BatchRan
    | RowNotFinite
    | ModelLoaded
    | PhaseChanged
)
