"""Wire types: every structure of the OpenAI API, and JSON bodies decoded into structures.

What parses requests is what `/openapi.json` is made from. The decoder checks JSON, types and ranges:
msgspec says what is wrong and where, and here its words become OpenAI's and its paths become
`param`. Rules that a type cannot hold (no empty text, no mixing) are in `rules.py`; the large
responses are written by hand in `responses.py`, and a test holds them to the types here.
"""

import codecs
import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import (
    Annotated,
    Generic,
    Literal,
    TypeAlias,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)

import msgspec
from msgspec import Meta, Struct

from trivec.core.errors import FieldInvalid, MalformedBody
from trivec.core.types import Truncated

T = TypeVar("T")

DIMENSIONS_MAX = 65_536
PROMPT_CHARS_MAX = 4_096  # it is put before each of many texts


def doc(text: str, examples: list[object] | None = None) -> Meta:
    """What `/openapi.json` says of a type."""
    return Meta(description=text, examples=examples)


Encoding: TypeAlias = Literal["float", "base64"]
Truncate: TypeAlias = Literal["none", "end", "start"]
OutputDtype: TypeAlias = Literal["float", "int8", "uint8", "binary", "ubinary"]
InputType: TypeAlias = Literal[
    "query",
    "document",
    "search_query",
    "search_document",
    "passage",
    "retrieval.query",
    "retrieval.passage",
    "classification",
    "clustering",
    "separation",
    "text-matching",
]
EmbeddingType: TypeAlias = Literal["float", "base64", "int8", "uint8", "binary", "ubinary"]
Dimensions: TypeAlias = Annotated[int, Meta(ge=1, le=DIMENSIONS_MAX)]


class TokenizeRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """Body of `POST /tokenize`; null means unset."""

    model: Annotated[
        str, doc("The id or alias of a served model.", ["all-minilm-l6-v2", "baai/bge-m3"])
    ]
    input: Annotated[
        str | list[str | int | list[int]],
        doc(
            "One text, 1 to 2048 texts, the token ids of one text, or 1 to 2048 lists of token "
            "ids. No empty text or list, no mixture.",
            ["What is BGE M3?", ["first text", "second text"], [0, 4865, 83, 2]],
        ),
    ]
    return_tokens: Annotated[
        bool | None, doc("The vocabulary's strings beside the (sparse) token ids.")
    ] = None
    token_encoding: Annotated[
        Literal["model", "cl100k_base", "o200k_base"] | None,
        doc(
            "Whose token ids the integers in `input` are. `model` says: this model's own "
            "tokenizer's, and they are not checked for being another's. Ids of OpenAI's encodings "
            "are decoded, and their texts are tokenised again."
        ),
    ] = None
    input_type: Annotated[
        InputType | None,
        doc("What the texts are: the model's own prompt for it is put before each, if it has one."),
    ] = None
    task: Annotated[InputType | None, doc("Jina's word for `input_type`.")] = None
    prompt_name: Annotated[
        str | None, doc("One of the model's prompts, as /models lists them, to put before each.")
    ] = None
    prompt: Annotated[
        Annotated[str, Meta(max_length=PROMPT_CHARS_MAX)] | None,
        doc("A text to put before each; empty for none, where the model has a default prompt."),
    ] = None

    @property
    def prompt_field(self) -> str | None:
        """The field that names a prompt, if any does."""
        fields = ("input_type", "task", "prompt_name", "prompt")
        return next((one for one in fields if getattr(self, one) is not None), None)


class EmbeddingsRequest(TokenizeRequest, frozen=True, forbid_unknown_fields=True):
    """Body of `POST /embeddings`; null means unset."""

    encoding_format: Annotated[
        Encoding | None,
        doc("base64 is of little-endian float32, or of `output_dtype`; the default is float."),
    ] = None
    dimensions: Annotated[
        Dimensions | None, doc("Fewer than the model's own: only for models trained for it.")
    ] = None
    output_dimension: Annotated[Dimensions | None, doc("The same as `dimensions`.")] = None
    output_dtype: Annotated[
        OutputDtype | None,
        doc(
            "What the numbers of dense and multi vectors are. int8: round(v * 127 * sqrt(n) / 8) of "
            "a vector of length 1 and n numbers, kept within 127; uint8: that + 128. ubinary: a bit "
            "a number, 1 where it is above 0, eight in a byte, the first highest; binary: that "
            "byte - 128."
        ),
    ] = None
    embedding_type: Annotated[
        EmbeddingType | None,
        doc(
            "Jina's word for `encoding_format` and `output_dtype`, which win where they are there."
        ),
    ] = None
    normalized: Annotated[
        bool | None, doc("true: of length 1; false is refused of models whose vectors are so.")
    ] = None
    user: Annotated[str | None, doc("Kept as a hash in the ledger, and nowhere else.")] = None
    output_type: Annotated[
        str | list[str] | None,
        doc(
            "dense (default), sparse, multi (alias colbert), several joined by &, or a list.",
            ["dense", "dense&sparse", ["dense", "sparse", "multi"]],
        ),
    ] = None
    truncate: Annotated[
        bool | Truncate | None,
        doc("Cut a text that is too long; by default it is an error. true is end."),
    ] = None
    truncation: Annotated[
        bool | None, doc("Voyage's word for `truncate`, which wins where both are there.")
    ] = None
    truncate_prompt_tokens: Annotated[
        Annotated[int, Meta(ge=-1)] | None,
        doc(
            "Cut each text to so many tokens, special ones included; -1: to as many as the model "
            "reads. At the end, unless `truncate` says start."
        ),
    ] = None

    late_chunking: Annotated[
        bool | None,
        doc("Read all texts as one, and give each the mean of its tokens. Of models that pool so."),
    ] = None
    chunk_size: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        doc("Cut each text into chunks of so many tokens after reading it whole; a vector each."),
    ] = None

    @property
    def cut(self) -> bool | Truncate | None:
        """Which side is cut of a text that is too long; None: as the key or the server says."""
        return self.truncation if self.truncate is None else self.truncate

    @property
    def is_chunked(self) -> bool:
        return bool(self.late_chunking) or self.chunk_size is not None

    @property
    def encoding(self) -> Encoding:
        return self.encoding_format or ("base64" if self.embedding_type == "base64" else "float")

    @property
    def dtype(self) -> OutputDtype:
        of_both = self.embedding_type or "float"
        return self.output_dtype or ("float" if of_both == "base64" else of_both)

    @property
    def size(self) -> int | None:
        """Numbers in a dense vector; None: as many as the model gives."""
        return self.dimensions or self.output_dimension


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


class Chunk(Struct, frozen=True):
    """A part of a text: which one, and where it begins and ends."""

    input: int
    tokens: Annotated[tuple[int, int], doc("In the text's tokens, special ones included.")]
    characters: Annotated[tuple[int, int], doc("In the text, in Unicode code points.")]


class Embedding(Struct, frozen=True, omit_defaults=True):
    """The vectors of one text. The last four keys are there only when they say something."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str
    sparse_embedding: SparseEmbedding | None = None
    multi_embedding: MultiEmbedding | None = None
    truncated: Truncated | None = None
    chunk: Chunk | None = None


class Usage(Struct, frozen=True):
    """Tokens computed, special tokens included."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsResponse(Struct, frozen=True, omit_defaults=True):
    """Response of `POST /embeddings`, in the order of `input`."""

    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: Usage
    token_encoding: Annotated[
        str | None, doc("Of the ids that were decoded; not there where none were.")
    ] = None


class TokenizedText(Struct, frozen=True, omit_defaults=True):
    """The tokens of one text, special tokens included."""

    object: Literal["tokens"]
    index: int
    token_ids: list[int]
    token_count: int
    fits: bool
    tokens: list[str] | None = None


class TokenizeResponse(Struct, frozen=True, omit_defaults=True):
    """Response of `POST /tokenize`; `total_tokens` is what an embedding would be billed."""

    object: Literal["list"]
    model: str
    data: list[TokenizedText]
    token_count_max: int
    total_tokens: int
    request_tokens_max: int
    fits: bool
    token_encoding: Annotated[
        str | None, doc("Of the ids that were decoded; not there where none were.")
    ] = None


class Model(Struct, frozen=True, kw_only=True):
    """A served model: OpenAI's four keys and ours."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    context_size: int
    dimensions: int
    dimensions_selectable: bool
    matryoshka_dimensions: Annotated[list[int], doc("Sizes a vector may be cut to.")]
    prompts: Annotated[dict[str, str], doc("By name: what is put before a text.")]
    default_prompt_name: Annotated[str | None, doc("The prompt where a request names none.")]
    labels: Annotated[int, doc("Numbers in a score; 0 where the model gives none.")]
    late_chunking: Annotated[bool, doc("Whether parts of a text may have vectors.")]
    output_types: list[str]
    truncate: Annotated[str, doc("For this key, where a request does not say.")]
    precision: str
    recipe: Annotated[str | None, doc("The exact arithmetic on a CPU, for `--precision`.")]
    verified: bool
    license: Annotated[str | None, doc("Of the weights, where the catalogue knows them.")]
    aliases: list[str]
    notes: dict[str, str]


class ModelList(Struct, frozen=True, kw_only=True):
    """Response of `GET /models`."""

    object: Literal["list"] = "list"
    data: list[Model]


class Probe(Struct, frozen=True):
    """Response of the probes."""

    status: Literal["ok", "unavailable"]
    phase: str
    reason: str


class ErrorObject(Struct, frozen=True):
    """OpenAI's error object, all four keys always."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(Struct, frozen=True):
    """The one shape of every failure."""

    error: ErrorObject


SHOWN_CHARS_MAX = 80  # how much of a client's own value a message repeats
# What msgspec says, which ends in " - at `$.input[3]`" unless it is said of the whole body.
_UNKNOWN = "Object contains unknown field `"
_MISSING = "Object missing required field `"
_NOT_LISTED = "Invalid enum value "
_WRONG_TYPE = re.compile(r"Expected `(?P<expected>[^`]*)`, got `(?P<found>[^`]*)`")
_PLACE = re.compile(r"(?P<problem>.*) - at `(?P<key>key` in `)?\$\.(?P<param>.*)`", re.DOTALL)
_FORMS = ("Expected `str` matching regex", "Invalid RFC3339")  # said better by the field's own doc


class Decoder(Generic[T]):
    """JSON in UTF-8 into a structure of *kind*."""

    def __init__(self, kind: type[T]) -> None:
        hints = get_type_hints(kind, include_extras=True)
        self._kind = kind
        self._decoder = msgspec.json.Decoder(kind)
        self._fields = frozenset(hints)
        self._docs = {name: text for name, hint in hints.items() for text in _docs(hint)}
        # Of the fields that can hold only certain words, also of structures within: those words.
        self._words: dict[str, list[object]] = {}
        for path, word in _words(kind):
            self._words.setdefault(path, []).append(word)
        self._worded = {path.partition(".")[0] for path in self._words}

    def decode(self, body: bytes) -> T:
        """The structure in *body*. Raises `MalformedBody`, `FieldInvalid`."""
        body = body.removeprefix(codecs.BOM_UTF8)
        try:
            try:
                return self._decoder.decode(body)
            except msgspec.ValidationError:  # the ordinary request is parsed once
                return self._decoder.decode(self._lenient(body))
        except msgspec.ValidationError as refused:
            raise self._refusal(str(refused)) from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as refused:
            if param := _text_at_fault(body):
                raise FieldInvalid(
                    f"Invalid '{param}': it holds half of a surrogate pair, or bytes that are not "
                    "UTF-8, which are no characters. Remove or replace them.",
                    param=param,
                ) from None
            reason = str(refused).removeprefix("JSON is malformed: ")
            if isinstance(refused, UnicodeDecodeError):
                reason = "it is not UTF-8"
            elif isinstance(refused, RecursionError):
                reason = "it is nested too deep"
            elif not body:
                reason = "it is empty"
            raise MalformedBody(
                f"We could not parse the JSON body of your request ({reason}). "
                "Send one JSON object in UTF-8."
            ) from None

    def convert(self, texts: Mapping[str, str]) -> T:
        """The structure of *texts*, as a form or a query gives them. Raises `FieldInvalid`."""
        try:
            return msgspec.convert(texts, self._kind, strict=False)
        except msgspec.ValidationError as refused:
            raise self._refusal(str(refused)) from None

    def _lenient(self, body: bytes) -> bytes:
        """*body* without unknown fields that are null, and with words in lower case."""
        given = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        kept: dict[str, object] = {}
        for name, value in given.items():
            if name in self._worded:
                kept[name] = self._lowered(msgspec.json.decode(value), name)
            elif name in self._fields or bytes(value) != b"null":
                kept[name] = value
        return msgspec.json.encode(kept)

    def _lowered(self, value: object, path: str) -> object:
        """*value*, which is at *path*, with each word in lower case that may be there."""
        if isinstance(value, dict):
            return {name: self._lowered(one, f"{path}.{name}") for name, one in value.items()}
        if isinstance(value, list):
            return [self._lowered(one, path) for one in value]
        is_word = isinstance(value, str) and value.lower() in self._words.get(path, ())
        return value.lower() if isinstance(value, str) and is_word else value

    def _refusal(self, complaint: str) -> MalformedBody | FieldInvalid:
        """*complaint*, which is msgspec's, in OpenAI's words."""
        place = _PLACE.fullmatch(complaint)
        problem = complaint if place is None else place["problem"]
        # Empty: the whole body. In a mapping there is no telling at which key.
        param = "" if place is None else place["param"].replace("[...]", "")
        wrong = _WRONG_TYPE.fullmatch(problem)
        if problem.startswith(_UNKNOWN):
            name = shown(problem.removeprefix(_UNKNOWN).removesuffix("`"))
            return FieldInvalid(
                f"Unrecognized request argument supplied: {name}. Remove it, or correct its name.",
                param=name,
            )
        is_null = wrong is not None and wrong["found"] == "null" and param in ("model", "input")
        if problem.startswith(_MISSING) or is_null:
            missing = "" if is_null else problem.removeprefix(_MISSING).removesuffix("`")
            name = ".".join(filter(None, (param, missing)))
            article = "an" if name[0] in "aeiou" else "a"
            return FieldInvalid(f"you must provide {article} {name} parameter", param=name)
        if not param:
            return MalformedBody(f"The body must be one JSON object. {problem}.")
        # What is left is a range: Expected `int` >= 1, Integer value out of range
        part = "key in" if place is not None and place["key"] else "value for"
        message = f"Invalid {part} '{param}'. {problem}."
        if problem.startswith(_FORMS) and param in self._docs:
            message = f"Invalid value for '{param}'. Expected: {self._docs[param]}"
        elif problem.startswith(_NOT_LISTED):
            value = shown(problem.removeprefix(_NOT_LISTED).strip("'"))
            words = self._words.get(param) or self._words.get(re.sub(r"\[\d+\]", "", param))
            message = f"Invalid value for '{param}' = {value}."
            message += f" Supported values: {words}." if words else ""
        elif wrong is not None:
            expected = wrong["expected"].replace(" | ", " or ")
            message = f"Invalid type for '{param}': expected {expected}, "
            message += f"but got {wrong['found']} instead."
        return FieldInvalid(message, param=param)


@cache
def decoder_of(kind: type[T]) -> Decoder[T]:
    """The decoder of *kind*, made once."""
    return Decoder(kind)


def shown(value: str) -> str:
    """A client's own value, short enough and clean enough for a message."""
    cut = value if len(value) <= SHOWN_CHARS_MAX else value[:SHOWN_CHARS_MAX] + "…"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in cut) or "''"


def _docs(hint: object) -> Iterator[str]:
    """What *hint* says of itself."""
    for part in get_args(hint):
        if isinstance(part, Meta) and part.description is not None:
            yield part.description


def _words(hint: object, path: str = "") -> Iterator[tuple[str, object]]:
    """The values of every `Literal` in *hint*, each after the path of its field."""
    if get_origin(hint) is Literal:
        yield from ((path, word) for word in get_args(hint))
    elif isinstance(hint, type) and issubclass(hint, Struct):
        for one in msgspec.structs.fields(hint):
            yield from _words(one.type, f"{path}.{one.encode_name}".removeprefix("."))
    else:
        for inner in get_args(hint):
            yield from _words(inner, path)


def _text_at_fault(body: bytes) -> str | None:
    """The field, as `input[3]`, whose text cannot be Unicode; None where none is to be found."""
    try:
        parsed = json.loads(body.decode("utf-8", "surrogateescape"))
        return next(_broken_texts(parsed, ""), None)
    except (ValueError, RecursionError):
        return None


def _broken_texts(value: object, path: str) -> Iterator[str]:
    """The paths of the texts in *value* that cannot be Unicode."""
    if isinstance(value, dict):
        for name, one in value.items():
            yield from _broken_texts(one, f"{path}.{shown(name)}".removeprefix("."))
    elif isinstance(value, list):
        for i, one in enumerate(value):
            yield from _broken_texts(one, f"{path}[{i}]")
    elif isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            yield path
