"""Ollama's API, as far as embeddings go. Texts are cut at the end, its default, unless told not to."""

import hashlib
from datetime import UTC, datetime
from typing import Annotated

import msgspec
from msgspec import Struct
from starlette.responses import PlainTextResponse, Response

from trivec import __version__
from trivec.api.context import RequestContext
from trivec.api.errors import ErrorShape
from trivec.api.inference import EmbeddedInputs, embed, read, respond
from trivec.api.openapi import Operation, keyed
from trivec.api.responses import json_response, to_json
from trivec.api.rules import blamed_on
from trivec.api.schemas import Dimensions, EmbeddingsRequest, doc
from trivec.core.errors import FieldInvalid
from trivec.core.quantisation import cut
from trivec.core.types import ModelCard, Output

LATEST = ":latest"  # what Ollama puts behind a name without a tag


class OllamaError(Struct, frozen=True):
    """Ollama's shape of every failure."""

    error: str


OLLAMA = ErrorShape(OllamaError, lambda error, _: OllamaError(error.message))


class OllamaOptions(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What every request for vectors may say; null means unset."""

    model: str
    truncate: Annotated[bool | None, doc("false: a text that is too long is an error.")] = None
    options: Annotated[dict[str, msgspec.Raw] | None, doc("No effect.")] = None
    keep_alive: Annotated[str | int | float | None, doc("No effect.")] = None


class OllamaEmbedRequest(OllamaOptions, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Body of `POST /api/embed`."""

    input: str | list[str]
    dimensions: Dimensions | None = None


class OllamaEmbeddingsRequest(OllamaOptions, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Body of `POST /api/embeddings`."""

    prompt: str


class OllamaShowRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """Body of `POST /api/show`."""

    model: str | None = None
    name: Annotated[str | None, doc("The same as `model`.")] = None
    verbose: bool | None = None


class OllamaEmbedResponse(Struct, frozen=True):
    """Response of `POST /api/embed`; durations are nanoseconds."""

    model: str
    embeddings: list[list[float]]
    total_duration: int
    load_duration: int
    prompt_eval_count: int


class OllamaEmbeddingsResponse(Struct, frozen=True):
    """Response of `POST /api/embeddings`."""

    embedding: list[float]


class OllamaDetails(Struct, frozen=True):
    """What kind of model it is."""

    format: str
    family: str
    parameter_size: str
    quantization_level: str
    parent_model: str = ""
    families: list[str] | None = None


class OllamaModel(Struct, frozen=True):
    """A served model. There is no file of which `size` and `digest` could be told."""

    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: OllamaDetails


class OllamaTags(Struct, frozen=True):
    """Response of `GET /api/tags`."""

    models: list[OllamaModel]


class OllamaShowResponse(Struct, frozen=True):
    """Response of `POST /api/show`."""

    modified_at: str
    details: OllamaDetails
    model_info: dict[str, str | int]
    capabilities: list[str]
    modelfile: str = ""
    parameters: str = ""
    template: str = ""
    license: str = ""


class OllamaVersion(Struct, frozen=True):
    """Response of `GET /api/version`: ours."""

    version: str


async def embed_texts(context: RequestContext) -> Response:
    """Turn texts into vectors, as Ollama does."""
    asked = await read(OllamaEmbedRequest, context)
    embedded = await _embed(asked, context, "input", asked.input, asked.dimensions)
    rows = cut(embedded.vectors.dense, asked.dimensions)
    total_s = context.app.clock.now_s() - context.started_s

    def write() -> bytes:
        return msgspec.json.encode(
            {
                "model": asked.model,
                "embeddings": msgspec.Raw(to_json(rows)),
                "total_duration": int(total_s * 1e9),
                "load_duration": 0,
                "prompt_eval_count": context.token_count,
            }
        )

    return await respond(context, write, byte_count=embedded.response_bytes)


async def embed_prompt(context: RequestContext) -> Response:
    """Turn one text into a vector, as older versions of Ollama do."""
    asked = await read(OllamaEmbeddingsRequest, context)
    embedded = await _embed(asked, context, "prompt", asked.prompt)
    return json_response(OllamaEmbeddingsResponse(embedded.vectors.dense[0].tolist()))


async def _embed(
    asked: OllamaOptions,
    context: RequestContext,
    field: str,
    given: str | list[str],
    dimensions: int | None = None,
) -> EmbeddedInputs:
    """The vectors of what was *given* in *field*."""
    request = EmbeddingsRequest(
        model=_name(asked.model, context),
        input=given if isinstance(given, str) else [*given],
        dimensions=dimensions,
        output_type="dense",
        truncate="none" if asked.truncate is False else "end",
    )
    with blamed_on({"input": field, "output_type": "model"}):
        return await embed(request, context)


def _name(name: str, context: RequestContext) -> str:
    """*name* without Ollama's tag of the latest version, unless a model is called so."""
    return name if name in context.app.embedders else name.removesuffix(LATEST)


async def tags(context: RequestContext) -> Response:
    """List the models this key may use, as Ollama does."""
    models = [
        OllamaModel(
            name=card.id,
            model=card.id,
            modified_at=_modified(card),
            size=0,
            digest=hashlib.sha256(card.id.encode()).hexdigest(),
            details=_details(card),
        )
        for card in context.app.cards_for(context.known_caller)
    ]
    return json_response(OllamaTags(models))


async def show(context: RequestContext) -> Response:
    """Show one model, as Ollama does."""
    asked = await read(OllamaShowRequest, context, joins_queue=False)
    if not (name := asked.model or asked.name):
        raise FieldInvalid("you must provide a model parameter", param="model")
    card = context.find_embedder(_name(name, context)).card
    info: dict[str, str | int] = {
        "general.architecture": "trivec",
        "trivec.context_length": card.token_count_max,
        "trivec.embedding_length": card.dimensions,
    }
    capabilities = ["embedding"] if Output.DENSE in card.outputs else []
    return json_response(OllamaShowResponse(_modified(card), _details(card), info, capabilities))


def _details(card: ModelCard) -> OllamaDetails:
    return OllamaDetails("safetensors", card.owned_by, "", card.precision)


def _modified(card: ModelCard) -> str:
    return datetime.fromtimestamp(card.created, UTC).isoformat()


async def version(_: RequestContext) -> Response:
    """Tell the server's version."""
    return json_response(OllamaVersion(__version__))


async def root(_: RequestContext) -> Response:
    """Tell whoever probes the root that something runs."""
    return PlainTextResponse("Trivec is running")


OPERATIONS = (
    keyed("/api/embed", embed_texts, OllamaEmbedResponse, OllamaEmbedRequest, OLLAMA),
    keyed(
        "/api/embeddings", embed_prompt, OllamaEmbeddingsResponse, OllamaEmbeddingsRequest, OLLAMA
    ),
    keyed("/api/show", show, OllamaShowResponse, OllamaShowRequest, OLLAMA),
    keyed("/api/tags", tags, OllamaTags, None, OLLAMA),
    Operation("GET", "/api/version", version, None, OllamaVersion, error_shape=OLLAMA),
    Operation("GET", "/", root, None, None, error_shape=OLLAMA),
)
