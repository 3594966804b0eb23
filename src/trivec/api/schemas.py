"""The words of the wire: every structure a client sends or receives, as msgspec types.

What parses requests is what `/openapi.json` is made from. Rules that a type cannot hold (no empty
text, no mixing) are in `questions.py`; the large answers are written by hand in `encoding.py`, and
a test holds them to the types here.
"""

from typing import Annotated, Literal, TypeAlias

from msgspec import Meta, Struct

DIMENSIONS_MAX = 65_536

Input: TypeAlias = Annotated[
    str | list[str | int | list[int]],
    Meta(
        description="One text, 1 to 2048 texts, the token ids of one text, or 1 to 2048 lists of "
        "token ids. No empty text or list, no mixture.",
        examples=["What is BGE M3?", ["first text", "second text"], [0, 4865, 83, 2]],
    ),
]
ModelName: TypeAlias = Annotated[
    str,
    Meta(
        description="The id or alias of a served model.",
        examples=["all-minilm-l6-v2", "baai/bge-m3"],
    ),
]
TokenEncoding: TypeAlias = Annotated[
    Literal["model"] | None,
    Meta(
        description="Whose token ids the integers in `input` are. `model` says: this model's own "
        "tokenizer's, and they are not checked for being another's."
    ),
]


class EmbeddingsRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """What `POST /embeddings` understands. Null means unset."""

    model: ModelName
    input: Input
    encoding_format: Annotated[
        Literal["float", "base64"] | None,
        Meta(description="base64 is little-endian float32; the default is float."),
    ] = None
    dimensions: Annotated[
        Annotated[int, Meta(ge=1, le=DIMENSIONS_MAX)] | None,
        Meta(description="Fewer than the model's own: only for models trained for it."),
    ] = None
    user: Annotated[
        str | None, Meta(description="Kept in the ledger as a hash, and nowhere else.")
    ] = None
    output_type: Annotated[
        str | list[str] | None,
        Meta(
            description="dense (default), sparse, multi (alias colbert), several joined by &, or "
            "a list of them.",
            examples=["dense", "dense&sparse", ["dense", "sparse", "multi"]],
        ),
    ] = None
    truncate: Annotated[
        bool | Literal["none", "end", "start"] | None,
        Meta(description="Cut a text that is too long; by default it is an error. true is end."),
    ] = None
    return_tokens: Annotated[
        bool | None, Meta(description="With sparse: the vocabulary's strings beside the ids.")
    ] = None
    token_encoding: TokenEncoding = None


class TokenizeRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """What `POST /tokenize` understands. Null means unset."""

    model: ModelName
    input: Input
    return_tokens: Annotated[
        bool | None, Meta(description="The vocabulary's strings beside the ids.")
    ] = None
    token_encoding: TokenEncoding = None


class SparseEmbedding(Struct, frozen=True):
    """Token ids, ascending, and their weights; base64 of int32 and float32 where asked for."""

    indices: list[int] | str
    values: list[float] | str
    tokens: list[str] | None = None
    encoding: Literal["base64"] | None = None


class MultiEmbedding(Struct, frozen=True):
    """One vector a token but the first: `shape` is [tokens - 1, dimensions]."""

    shape: tuple[int, int]
    data: list[list[float]] | str
    encoding: Literal["base64"] | None = None


class TruncatedText(Struct, frozen=True):
    """That a text was cut. `original_tokens` is null where it was too long to be counted."""

    original_tokens: int | None
    kept_tokens: int


class Embedding(Struct, frozen=True, omit_defaults=True):
    """The vectors of one text. The last three keys are there only when they say something."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str
    sparse_embedding: SparseEmbedding | None = None
    multi_embedding: MultiEmbedding | None = None
    truncated: TruncatedText | None = None


class Usage(Struct, frozen=True):
    """Tokens computed, special tokens included."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsAnswer(Struct, frozen=True):
    """What `POST /embeddings` answers, in the order of `input`."""

    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: Usage


class TokenizedText(Struct, frozen=True, omit_defaults=True):
    """The tokens of one text, special tokens included."""

    object: Literal["tokens"]
    index: int
    token_ids: list[int]
    token_count: int
    fits: bool
    tokens: list[str] | None = None


class TokenizeAnswer(Struct, frozen=True):
    """What `POST /tokenize` answers. `total_tokens` is what an embedding would be billed."""

    object: Literal["list"]
    model: str
    data: list[TokenizedText]
    token_count_max: int
    total_tokens: int
    request_tokens_max: int
    fits: bool


class Model(Struct, frozen=True, kw_only=True):
    """A served model: OpenAI's four keys and ours."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    context_size: int
    dimensions: int
    dimensions_selectable: bool
    output_types: list[str]
    truncate: Annotated[
        str, Meta(description="What `truncate` is for this key where a request does not say.")
    ]
    precision: str
    recipe: Annotated[
        str | None,
        Meta(description="The exact arithmetic on a CPU, which `--precision` takes; else null."),
    ] = None
    verified: bool
    aliases: list[str]
    notes: dict[str, str]


class ModelList(Struct, frozen=True, kw_only=True):
    """What `GET /models` answers."""

    object: Literal["list"] = "list"
    data: list[Model]


class Probe(Struct, frozen=True):
    """What the probes answer."""

    status: Literal["ok", "unavailable"]
    phase: str
    reason: str


class Problem(Struct, frozen=True):
    """OpenAI's error object, all four keys always."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(Struct, frozen=True):
    """The one shape of every failure."""

    error: Problem
