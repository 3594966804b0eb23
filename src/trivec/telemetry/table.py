"""Every metric and every label value there can be, as one table.

`docs/metrics.md` is this table in words. It does not know where a number comes from. The series of
all rows together stay within `SERIES_MAX`, whatever clients send: a test adds them up.
"""

from dataclasses import dataclass
from enum import Enum

SERIES_MAX = 500
MODELS_MAX = 4  # models with series of their own; those loaded later share the label "other"
OTHER = "other"

STATUS_CLASSES = ("2xx", "4xx", "5xx", OTHER)
PHASES = ("loading", "ready", "draining", "stopped")
TIMED_ROUTES = ("/embeddings", "/tokenize")  # where a duration is work and not a lookup

# What is served, by method. Anything else, a wrong method too, is ("other", "other").
SERVED = frozenset(
    {
        ("POST", "/embeddings"),
        ("POST", "/tokenize"),
        ("GET", "/models"),
        ("GET", "/models/{id}"),
        ("GET", "/livez"),
        ("GET", "/readyz"),
        ("GET", "/health"),
        ("GET", "/metrics"),
        ("GET", "/openapi.json"),
        ("GET", "/admin/v1/keys"),
        ("POST", "/admin/v1/keys"),
        ("GET", "/admin/v1/keys/{id}"),
        ("POST", "/admin/v1/keys/{id}/revoke"),
        ("POST", "/admin/v1/keys/{id}/rotate"),
        ("GET", "/admin/v1/usage"),
    }
)

# The codes of the error table, and the types of the errors that have no code.
REASONS = frozenset(
    {
        "answer_too_large",
        "client_gone",
        "context_length_exceeded",
        "deadline_exceeded",
        "draining",
        "idempotency_in_progress",
        "idempotency_key_reused",
        "insufficient_scope",
        "internal_error",
        "invalid_api_key",
        "invalid_request_error",
        "loading",
        "max_tokens_per_request",
        "model_access_denied",
        "model_not_found",
        "overloaded",
        "rate_limit_exceeded",
        "server_error",
        "store_unavailable",
    }
)


class Kind(Enum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """One row: what is exposed under *name*, and at most how many label combinations it has."""

    name: str  # as it is exposed, "_total" of a counter included
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    children_max: int = 1
    bounds: tuple[float, ...] = ()  # of a histogram; +Inf is understood

    @property
    def series_max(self) -> int:
        """Lines on the page at most: a histogram has its buckets, +Inf, _sum and _count."""
        return self.children_max * (len(self.bounds) + 3 if self.kind is Kind.HISTOGRAM else 1)


_PER_MODEL = MODELS_MAX + 1
_WAIT_BOUNDS_S = (0.001, 0.005, 0.02, 0.1, 0.5, 1, 5, 10, 30)
_WORK_BOUNDS_S = (0.002, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 30, 120)
_SHORT_BOUNDS_S = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 1)

REQUESTS = Metric(
    "trivec_requests_total",
    Kind.COUNTER,
    "Requests answered, by route, method and status class.",
    ("route", "method", "status"),
    (len(SERVED) + 1) * len(STATUS_CLASSES),
)
REFUSALS = Metric(
    "trivec_refusals_total",
    Kind.COUNTER,
    "Requests answered with an error, by its code, or by its type where it has no code.",
    ("reason",),
    len(REASONS) + 1,
)
REQUEST_SECONDS = Metric(
    "trivec_request_duration_seconds",
    Kind.HISTOGRAM,
    "From the first byte of a request to its answer, for the routes that work.",
    ("route", "status"),
    len(TIMED_ROUTES) * (len(STATUS_CLASSES) - 1),
    (0.003, 0.006, 0.0125, 0.025, 0.05, 0.1, 0.25, 1, 5, 30, 600),
)
REQUEST_TOKENS = Metric(
    "trivec_request_tokens",
    Kind.HISTOGRAM,
    "Tokens of a request that was served, special tokens included.",
    ("model",),
    _PER_MODEL,
    (8, 32, 128, 512, 2048, 8192, 32768, 131072),
)
INPUTS = Metric(
    "trivec_inputs_total",
    Kind.COUNTER,
    "Texts of the requests that were served.",
    ("model",),
    _PER_MODEL,
)
TOKENIZE_SECONDS = Metric(
    "trivec_tokenize_seconds",
    Kind.HISTOGRAM,
    "Time from text to token ids, a request.",
    bounds=_SHORT_BOUNDS_S,
)
QUEUE_SECONDS = Metric(
    "trivec_queue_seconds",
    Kind.HISTOGRAM,
    "From joining the line to the start of a request's first batch.",
    ("model",),
    _PER_MODEL,
    _WAIT_BOUNDS_S,
)
COMPUTE_SECONDS = Metric(
    "trivec_compute_seconds",
    Kind.HISTOGRAM,
    "From the start of a request's first batch to its last vector.",
    ("model",),
    _PER_MODEL,
    _WORK_BOUNDS_S,
)
ENCODE_SECONDS = Metric(
    "trivec_encode_seconds",
    Kind.HISTOGRAM,
    "Time to write the answer's JSON, a request.",
    bounds=_SHORT_BOUNDS_S,
)
BATCHES = Metric(
    "trivec_batches_total",
    Kind.COUNTER,
    "Batches run, by outcome: ok or failed.",
    ("model", "outcome"),
    _PER_MODEL * 2,
)
BATCH_FILL = Metric(
    "trivec_batch_fill_ratio",
    Kind.HISTOGRAM,
    "Tokens of a batch over the budget it was filled against; one long text alone may exceed 1.",
    ("model",),
    _PER_MODEL,
    (0.1, 0.25, 0.5, 0.75, 0.9, 1),
)
BATCH_TOKENS = Metric(
    "trivec_batch_tokens_total",
    Kind.COUNTER,
    "Tokens computed, failed batches and second tries included.",
    ("model",),
    _PER_MODEL,
)
BATCH_SECONDS = Metric(
    "trivec_batch_busy_seconds_total",
    Kind.COUNTER,
    "Seconds that worker slots spent inside the device; its rate over the slots is utilisation.",
    ("model",),
    _PER_MODEL,
)
QUEUE_REQUESTS = Metric(
    "trivec_queue_requests",
    Kind.GAUGE,
    "Requests in the line now.",
    ("model",),
    _PER_MODEL,
)
QUEUE_TOKENS = Metric(
    "trivec_queue_tokens", Kind.GAUGE, "Tokens in the line now.", ("model",), _PER_MODEL
)
LOG_LINES_DROPPED = Metric(
    "trivec_log_lines_dropped_total",
    Kind.COUNTER,
    "Lines of the log that were dropped because nobody read them.",
)
ROWS_NOT_FINITE = Metric(
    "trivec_rows_not_finite_total",
    Kind.COUNTER,
    "Vectors that held NaN or infinity, by outcome of the second try: recovered or lost.",
    ("model", "outcome"),
    _PER_MODEL * 2,
)
PHASE = Metric(
    "trivec_phase",
    Kind.GAUGE,
    "1 for the phase of life the process is in, 0 for the others.",
    ("phase",),
    len(PHASES),
)
MODEL_INFO = Metric(
    "trivec_model_info",
    Kind.GAUGE,
    "1 for each served model, with its precision and whether its files match the catalogue.",
    ("model", "precision", "verified"),
    MODELS_MAX,
)
CERTIFICATE_COSINE = Metric(
    "trivec_certificate_cosine",
    Kind.GAUGE,
    "Cosine to fp32 over the probe texts, as the precision certificate has it: min and mean.",
    ("model", "statistic"),
    MODELS_MAX * 2,
)
BUILD_INFO = Metric("trivec_build_info", Kind.GAUGE, "1, with the version of Trivec.", ("version",))

TABLE = (
    REQUESTS,
    REFUSALS,
    REQUEST_SECONDS,
    REQUEST_TOKENS,
    INPUTS,
    TOKENIZE_SECONDS,
    QUEUE_SECONDS,
    COMPUTE_SECONDS,
    ENCODE_SECONDS,
    BATCHES,
    BATCH_FILL,
    BATCH_TOKENS,
    BATCH_SECONDS,
    QUEUE_REQUESTS,
    QUEUE_TOKENS,
    LOG_LINES_DROPPED,
    ROWS_NOT_FINITE,
    PHASE,
    MODEL_INFO,
    CERTIFICATE_COSINE,
    BUILD_INFO,
)

# The process's own numbers (memory, CPU, descriptors, start time), from prometheus_client.
PROCESS_SERIES_MAX = 8
