"""Ollama's API, as far as embeddings go. Texts are cut at the end, its default, unless told not to."""

import hashlib
from dataclasses import replace
from datetime import UTC, datetime
from typing import Annotated

import msgspec
from msgspec import Struct
from starlette.responses import PlainTextResponse, Response

from trivec import __version__
from trivec.accounts import Scope
from trivec.api.context import RequestContext
from trivec.api.errors import ErrorShape
from trivec.api.inference import blamed_on, read, respond
from trivec.api.openai import embed as embed_inputs
from trivec.api.openapi import Operation
from trivec.api.responses import cut, json_response, to_json
from trivec.api.schemas import Decoder, Dimensions, EmbeddingsRequest, doc
from trivec.core.errors import FieldInvalid
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


_embed_decoder = Decoder(OllamaEmbedRequest)
_embeddings_decoder = Decoder(OllamaEmbeddingsRequest)
_show_decoder = Decoder(OllamaShowRequest)
_encode = msgspec.json.Encoder().encode


async def embed(context: RequestContext) -> Response:
    """Turn texts into vectors, as Ollama does."""
    asked = await read(_embed_decoder, context)
    given = [asked.input] if isinstance(asked.input, str) else asked.input
    with blamed_on({"output_type": "model"}):
        embedded = await embed_inputs(
            _request(asked, list(given), context, asked.dimensions), context
        )
    rows = cut(embedded.vectors.dense, asked.dimensions)
    total_s = context.app.clock.now_s() - context.started_s

    def write() -> bytes:
        return _encode(
            {
                "model": asked.model,
                "embeddings": msgspec.Raw(to_json(rows)),
                "total_duration": int(total_s * 1e9),
                "load_duration": 0,
                "prompt_eval_count": context.token_count,
            }
        )

    return await respond(context, write, number_count=rows.size)


async def embeddings(context: RequestContext) -> Response:
    """Turn one text into a vector, as older versions of Ollama do."""
    asked = await read(_embeddings_decoder, context)
    with blamed_on({"input": "prompt", "output_type": "model"}):
        embedded = await embed_inputs(_request(asked, asked.prompt, context), context)
    return json_response(OllamaEmbeddingsResponse(embedded.vectors.dense[0].tolist()))


def _request(
    asked: OllamaOptions,
    given: str | list[str | int | list[int]],
    context: RequestContext,
    dimensions: int | None = None,
) -> EmbeddingsRequest:
    return EmbeddingsRequest(
        model=_name(asked.model, context),
        input=given,
        dimensions=dimensions,
        output_type="dense",
        truncate="none" if asked.truncate is False else "end",
    )


def _name(name: str, context: RequestContext) -> str:
    """*name* without Ollama's tag of the latest version, unless a model is called so."""
    return name if name in context.app.embedders else name.removesuffix(LATEST)


async def tags(context: RequestContext) -> Response:
    """List the models this key may use, as Ollama does."""
    cards = context.app.cards_for(context.known_caller)
    models = [
        OllamaModel(
            card.id,
            card.id,
            _modified(card),
            0,
            hashlib.sha256(card.id.encode()).hexdigest(),
            _details(card),
        )
        for card in cards
    ]
    return json_response(OllamaTags(models))


async def show(context: RequestContext) -> Response:
    """Show one model, as Ollama does."""
    asked = await read(_show_decoder, context)
    if not (name := asked.model or asked.name):
        raise FieldInvalid("you must provide a model parameter", param="model")
    card = context.find_embedder(_name(name, context)).card
    info: dict[str, str | int] = {
        "general.architecture": "trivec",
        "trivec.context_length": card.token_count_max,
        "trivec.embedding_length": card.dimensions,
    }
    is_embedding = Output.DENSE in card.outputs
    return json_response(
        OllamaShowResponse(
            _modified(card), _details(card), info, ["embedding"] if is_embedding else []
        )
    )


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


OPERATIONS = tuple(
    replace(one, error_shape=OLLAMA)
    for one in (
        Operation(
            "POST", "/api/embed", embed, Scope.EMBED, OllamaEmbedResponse, OllamaEmbedRequest
        ),
        Operation(
            "POST",
            "/api/embeddings",
            embeddings,
            Scope.EMBED,
            OllamaEmbeddingsResponse,
            OllamaEmbeddingsRequest,
        ),
        Operation("POST", "/api/show", show, Scope.EMBED, OllamaShowResponse, OllamaShowRequest),
        Operation("GET", "/api/tags", tags, Scope.EMBED, OllamaTags),
        Operation("GET", "/api/version", version, None, OllamaVersion),
        Operation("GET", "/", root, None, None),
    )
)
