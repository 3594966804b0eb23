"""What a request asks for, with every rule checked that needs no model: pure functions.

A question is what a handler works with; the wire's optional and loose fields end here.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, cast

import numpy as np

from trivec.api.marks import count_marks
from trivec.api.reading import reader, shown
from trivec.api.schemas import EmbeddingsRequest, Input, TokenizeRequest
from trivec.core.errors import FieldInvalid, RequestTooLarge, TokenIdUnknown
from trivec.core.ports import Texts, TokenLists
from trivec.core.types import Int32Array, LongText, ModelCard, Output
from trivec.settings import HttpLimits

OTHER_ITEMS_MAX = 64  # texts, lists and commas of a request's other fields

Encoding: TypeAlias = Literal["float", "base64"]
RawTokenLists: TypeAlias = Sequence[Sequence[int]]

TOKENS_MIN = 2  # of any text: those that open and close it

OUTPUTS = {
    "dense": Output.DENSE,
    "sparse": Output.SPARSE,
    "multi": Output.MULTI,
    "colbert": Output.MULTI,
}
LONG_TEXT: Mapping[bool | str, LongText] = {
    False: LongText.REFUSE,
    "none": LongText.REFUSE,
    True: LongText.CUT_END,
    "end": LongText.CUT_END,
    "start": LongText.CUT_START,
}


@dataclass(frozen=True, slots=True)
class Inputs:
    """What is to be tokenised: texts, or token ids that are not yet held to a vocabulary."""

    texts: Texts | None
    token_lists: RawTokenLists | None
    is_flat: bool = False  # the ids of one text, sent without a list around them
    are_own: bool = False  # the client says whose ids they are: the model's

    def __len__(self) -> int:
        return len(self.texts if self.texts is not None else self.token_lists or ())

    def for_model(self, card: ModelCard) -> Texts | TokenLists:
        """The texts, or the ids as int32 `[tokens]` a list; `TokenIdUnknown` for a foreign id."""
        if self.texts is not None:
            return self.texts
        return [
            _ids_of_model(ids, card, param="input" if self.is_flat else f"input[{i}]")
            for i, ids in enumerate(self.token_lists or ())
        ]


@dataclass(frozen=True, slots=True)
class EmbeddingsQuestion:
    """A request for vectors, whole and valid as far as can be told without its model."""

    model: str
    inputs: Inputs
    encoding: Encoding
    outputs: Output
    long_text: LongText | None  # None: as the key or the server says
    dimensions: int | None
    return_tokens: bool
    user: str | None


@dataclass(frozen=True, slots=True)
class TokenizeQuestion:
    """A request for tokens, likewise."""

    model: str
    inputs: Inputs
    return_tokens: bool


_read_embeddings = reader(EmbeddingsRequest)
_read_tokenize = reader(TokenizeRequest)


def embeddings_question(body: bytes, limits: HttpLimits) -> EmbeddingsQuestion:
    """The question in *body*, or `MalformedBody`, `FieldInvalid`, `RequestTooLarge`."""
    refuse_too_many_items(body, limits)
    asked = _read_embeddings(body)
    return EmbeddingsQuestion(
        model=asked.model,
        inputs=_inputs(asked, limits),
        encoding=asked.encoding_format or "float",
        outputs=outputs_named(asked.output_type),
        long_text=None if asked.truncate is None else LONG_TEXT[asked.truncate],
        dimensions=asked.dimensions,
        return_tokens=bool(asked.return_tokens),
        user=asked.user,
    )


def tokenize_question(body: bytes, limits: HttpLimits) -> TokenizeQuestion:
    """The question in *body*, or `MalformedBody`, `FieldInvalid`, `RequestTooLarge`."""
    refuse_too_many_items(body, limits)
    asked = _read_tokenize(body)
    return TokenizeQuestion(asked.model, _inputs(asked, limits), bool(asked.return_tokens))


def refuse_too_many_items(body: bytes, limits: HttpLimits) -> None:
    """Refuse an `input` that is far too long, before millions of objects are made of it.

    What passes is counted exactly when it is read. A body shorter than the limit is not counted:
    it cannot hold more.
    """
    if len(body) <= limits.request_tokens_max:
        return
    marks = count_marks(body)
    input_count = max(marks.text_count, marks.array_count)
    if input_count > limits.inputs_max + OTHER_ITEMS_MAX:
        raise _array_too_long(f"one of about {input_count}", limits)
    if marks.comma_count > limits.request_tokens_max + limits.inputs_max + OTHER_ITEMS_MAX:
        _refuse_too_many_tokens(marks.comma_count, limits)


def _inputs(asked: EmbeddingsRequest | TokenizeRequest, limits: HttpLimits) -> Inputs:
    return replace(check_inputs(asked.input, limits), are_own=asked.token_encoding is not None)


def check_inputs(given: Input, limits: HttpLimits) -> Inputs:
    """One of the four legal forms of `input`, or the refusal that names the item at fault."""
    if isinstance(given, str):
        if not given:
            raise _empty("input", "string")
        return Inputs(texts=[given], token_lists=None)
    if not given:
        raise _empty("input", "array")
    kind = type(given[0])
    if len(set(map(type, given))) > 1:
        i = next(i for i, item in enumerate(given) if type(item) is not kind)
        raise FieldInvalid(
            f"Invalid 'input[{i}]': all inputs must be of one kind. "
            "Send texts, or token ids, or lists of token ids.",
            param=f"input[{i}]",
        )
    if kind is int:
        ids = cast("list[int]", given)
        _refuse_too_many_tokens(len(ids), limits)
        return Inputs(texts=None, token_lists=[ids], is_flat=True)
    if len(given) > limits.inputs_max:
        raise _array_too_long(f"an array with length {len(given)}", limits)
    items = cast("list[str] | list[list[int]]", given)
    _refuse_if_empty(items)
    if kind is str:
        return Inputs(texts=cast("list[str]", items), token_lists=None)
    token_lists = cast("list[list[int]]", items)
    _refuse_too_many_tokens(sum(map(len, token_lists)), limits)
    return Inputs(texts=None, token_lists=token_lists)


def outputs_named(words: str | Sequence[str] | None) -> Output:
    """The outputs that `output_type` asks for; dense where it is unset."""
    if words is None:
        return Output.DENSE
    joined = [words] if isinstance(words, str) else words
    outputs = Output(0)
    for word in _split(joined):
        if word.lower() not in OUTPUTS:
            raise FieldInvalid(
                f"Invalid value for 'output_type' = {shown(word)}. "
                f"Supported values: {list(OUTPUTS)}, or several of them joined by '&'.",
                param="output_type",
            )
        outputs |= OUTPUTS[word.lower()]
    if not outputs:
        raise FieldInvalid(
            f"Invalid 'output_type': empty array. Supported values: {list(OUTPUTS)}.",
            param="output_type",
        )
    return outputs


def output_words(outputs: Output) -> list[str]:
    """The public names of *outputs*, as `/models` lists them."""
    return [word for word in ("dense", "sparse", "multi") if OUTPUTS[word] in outputs]


def check_against_card(question: EmbeddingsQuestion, card: ModelCard) -> None:
    """Raise `FieldInvalid` for outputs or dimensions that the model does not have."""
    if question.outputs & ~card.outputs:
        raise FieldInvalid(
            f"This model has no {' and no '.join(output_words(question.outputs & ~card.outputs))} "
            f"output; it has {', '.join(output_words(card.outputs))}.",
            param="output_type",
        )
    if question.dimensions in (None, card.dimensions):  # to ask for them all changes nothing
        return
    if not card.dimensions_selectable:
        raise FieldInvalid("This model does not support specifying dimensions.", param="dimensions")
    if question.dimensions > card.dimensions:
        raise FieldInvalid(
            f"Invalid value for 'dimensions' = {question.dimensions}. "
            f"This model's vectors have {card.dimensions}.",
            param="dimensions",
        )


def _split(joined: Iterable[str]) -> Iterable[str]:
    return (word for words in joined for word in words.split("&"))


def _refuse_if_empty(items: Sequence[str] | Sequence[Sequence[int]]) -> None:
    for i, item in enumerate(items):
        if not item:
            raise _empty(f"input[{i}]", "string" if isinstance(item, str) else "array")


def _empty(param: str, what: str) -> FieldInvalid:
    return FieldInvalid(
        f"Invalid '{param}': empty {what}. Send at least one character or token id.", param=param
    )


def _array_too_long(found: str, limits: HttpLimits) -> FieldInvalid:
    return FieldInvalid(
        "Invalid 'input': array too long. Expected an array with maximum length "
        f"{limits.inputs_max}, but got {found} instead.",
        param="input",
    )


def _refuse_too_many_tokens(count: int, limits: HttpLimits) -> None:
    if count > limits.request_tokens_max:
        raise RequestTooLarge(token_count=count, token_count_max=limits.request_tokens_max)


def _ids_of_model(ids: Sequence[int], card: ModelCard, *, param: str) -> Int32Array:
    try:
        array = np.array(ids, np.int64)  # [tokens]
        foreign = (array < 0) | (array >= card.vocabulary_size)
        first = int(foreign.argmax()) if foreign.any() else None
    except OverflowError:
        first = next(i for i, one in enumerate(ids) if not 0 <= one < card.vocabulary_size)
    if first is None:
        return array.astype(np.int32)
    raise TokenIdUnknown(
        token_id=ids[first], vocabulary_size=card.vocabulary_size, param=f"{param}[{first}]"
    )
