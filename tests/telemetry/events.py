"""Events as the rooms send them, with every field in its usual range."""

from itertools import product
from typing import Any

from trivec.core.events import (
    BatchRan,
    Event,
    LinesWaiting,
    ModelLoaded,
    PhaseChanged,
    RequestServed,
    RowNotFinite,
    ShardFinished,
)
from trivec.core.health import QueueLoad
from trivec.core.types import CertificateSummary, ModelCard, Output
from trivec.telemetry.metrics import MODELS_MAX, REASONS_MAX, ROUTES_MAX


def request(**changes: Any) -> RequestServed:
    fields: dict[str, Any] = {
        "request_id": "req_01",
        "client_request_id": None,
        "method": "POST",
        "route": "/v1/embeddings",
        "prefix": "/v1",
        "status": 200,
        "code": None,
        "key_id": "key_01",
        "model": "baai/bge-m3",
        "input_count": 3,
        "token_count": 40,
        "request_bytes": 120,
        "response_bytes": 9000,
        "duration_s": 0.050,
        "tokenize_s": 0.001,
        "queue_s": 0.004,
        "compute_s": 0.030,
        "encode_s": 0.002,
    }
    return RequestServed(**(fields | changes))


def batch(**changes: Any) -> BatchRan:
    fields: dict[str, Any] = {
        "model": "baai/bge-m3",
        "slot": 0,
        "sequences": 4,
        "tokens": 256,
        "tokens_max": 512,
        "duration_s": 0.25,
        "failed": False,
    }
    return BatchRan(**(fields | changes))


def every_load() -> list[QueueLoad]:
    """What waits for more models than have a label of their own."""
    return [QueueLoad(f"served-{i}", 7, 900, 1.5) for i in range(MODELS_MAX + 3)]


def loaded(model: str = "baai/bge-m3") -> ModelLoaded:
    card = ModelCard(
        id=model,
        token_count_max=8192,
        vocabulary_size=250_002,
        dimensions=1024,
        outputs=Output.DENSE,
        precision="int8",
        created=1_700_000_000,
        owned_by="baai",
        verified=True,
    )
    return ModelLoaded(card, 2.5, CertificateSummary(0.9931, 0.9987, "passed"))


def every_kind() -> list[Event]:
    """Events after which each metric has each kind of series it can have."""
    events: list[Event] = [loaded(f"served-{number}") for number in range(MODELS_MAX + 3)]
    for model in ["a-client's-word", *(f"served-{number}" for number in range(MODELS_MAX + 3))]:
        events += [request(model=model), batch(model=model), batch(model=model, failed=True)]
        events += [RowNotFinite(model, recovered=recovered) for recovered in (True, False)]
        events.append(ShardFinished("batch_1", model, 9, 1, 90, 0.5))
    unknown = (f"/v1/{number}" for number in range(ROUTES_MAX))
    for route in ("/v1/embeddings", "/v1/tokenize", *unknown, "other"):
        events += [
            request(route=route, method=method, status=status, token_count=0)
            for method, status in product(("GET", "POST"), (200, 404, 405, 503, 999))
        ]
    events += [request(status=503, code=f"code_{number}") for number in range(REASONS_MAX + 10)]
    return [
        *events,
        LinesWaiting(3),
        PhaseChanged("loading", "start"),
        PhaseChanged("unheard of", ""),
    ]
