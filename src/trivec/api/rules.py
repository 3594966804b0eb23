"""Rules of a request that no type can hold: which inputs, outputs, sizes and prompts it may name.

Every refusal is OpenAI's in words and in `param`; another API's names are put in by `blamed_on`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import numpy as np

from trivec.api.schemas import EmbeddingsRequest, shown
from trivec.core.errors import (
    FieldInvalid,
    MalformedBody,
    RequestError,
    RequestTooLarge,
    TokenIdUnknown,
)
from trivec.core.quantisation import unit
from trivec.core.types import Float32Array, Int32Array, LongText, ModelCard, Output
from trivec.settings import HttpLimits

OTHER_ITEMS_MAX = 64  # texts, lists and commas of a request's other fields
OUTPUTS = {
    "dense": Output.DENSE,
    "sparse": Output.SPARSE,
    "multi": Output.MULTI,
    "colbert": Output.MULTI,
}
# What an `input_type` may be called among a model's prompts, beside its own word.
SYNONYMS: Sequence[Sequence[str]] = (
    ("query", "search_query", "retrieval.query"),
    ("document", "passage", "search_document", "retrieval.passage", "corpus"),
)
LONG_TEXT: Mapping[bool | str, LongText] = {
    False: LongText.REFUSE,
    "none": LongText.REFUSE,
    True: LongText.CUT_END,
    "end": LongText.CUT_END,
    "start": LongText.CUT_START,
}


def check_inputs(given: str | Sequence[str | int | list[int]], limits: HttpLimits) -> int:
    """How many inputs are *given*. Raises `FieldInvalid` for none of the four forms that `input`
    has, `RequestTooLarge`.
    """
    if not given:
        raise _empty("input", "string" if isinstance(given, str) else "array")
    if isinstance(given, str):
        return 1
    kind = type(given[0])
    if kind is not int and len(given) > limits.inputs_max:
        raise _array_too_long(f"an array with length {len(given)}", limits)
    if len(set(map(type, given))) > 1:
        i = next(i for i, item in enumerate(given) if type(item) is not kind)
        raise FieldInvalid(
            f"Invalid 'input[{i}]': all inputs must be of one kind. "
            "Send texts, or token ids, or lists of token ids.",
            param=f"input[{i}]",
        )
    if kind is not int and not all(given):
        i = next(i for i, item in enumerate(given) if not item)
        raise _empty(f"input[{i}]", "string" if kind is str else "array")
    token_count = len(given) if kind is int else 0
    if kind is list:
        token_count = sum(map(len, cast("list[list[int]]", given)))
    if token_count > limits.request_tokens_max:
        raise RequestTooLarge(token_count=token_count, token_count_max=limits.request_tokens_max)
    return 1 if kind is int else len(given)


def _array_too_long(found: str, limits: HttpLimits) -> FieldInvalid:
    return FieldInvalid(
        "Invalid 'input': array too long. Expected an array with maximum length "
        f"{limits.inputs_max}, but got {found} instead.",
        param="input",
    )


def _empty(param: str, kind: str) -> FieldInvalid:
    return FieldInvalid(
        f"Invalid '{param}': empty {kind}. Send at least one character or token id.", param=param
    )


def refuse_too_many_items(body: bytes, limits: HttpLimits, strings_a_text: int = 1) -> None:
    """Refuse an `input` that is far too long before millions of objects are made of it, or texts
    of several strings each.

    8 MiB of `[],` take the decoder a second, in which it holds the interpreter's lock, and 200 MB;
    counting the punctuation outside its strings takes about 20 ms. What passes is counted exactly
    once it is decoded.
    """
    if b"\\" in body:
        body = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    characters = np.frombuffer(body, np.uint8)
    quotes = characters == ord('"')
    is_outside = np.bitwise_xor.accumulate(quotes.view(np.uint8)) == 0
    texts = int(np.count_nonzero(quotes)) // 2
    arrays = int(np.count_nonzero((characters == ord("[")) & is_outside))
    commas = int(np.count_nonzero((characters == ord(",")) & is_outside))
    if (count := max(texts, arrays)) > strings_a_text * limits.inputs_max + OTHER_ITEMS_MAX:
        if strings_a_text == 1:
            raise _array_too_long(f"one of about {count}", limits)
        raise MalformedBody(f"The body holds about {count} strings or arrays. Send fewer texts.")
    if commas > limits.request_tokens_max + limits.inputs_max + OTHER_ITEMS_MAX:
        raise RequestTooLarge(token_count=commas, token_count_max=limits.request_tokens_max)


def own_token_ids(
    lists: Sequence[list[int]], vocabulary_size: int, *, is_flat: bool
) -> list[Int32Array]:
    """*lists* as int32 `[tokens]` each. Raises `TokenIdUnknown`, which names the place in `input`."""
    for i, ids in enumerate(lists):
        if min(ids) < 0 or max(ids) >= vocabulary_size:
            at = next(k for k, one in enumerate(ids) if not 0 <= one < vocabulary_size)
            raise TokenIdUnknown(
                token_id=ids[at],
                vocabulary_size=vocabulary_size,
                param=f"input[{at}]" if is_flat else f"input[{i}][{at}]",
            )
    return [np.array(ids, np.int32) for ids in lists]


def check_texts(texts: Sequence[object], field: str, count_max: int) -> None:
    """Raise `FieldInvalid` where there are none, too many, or empty ones."""
    if not 0 < len(texts) <= count_max:
        raise FieldInvalid(
            f"Invalid '{field}': an array with length {len(texts)}. Send 1 to {count_max} at a time.",
            param=field,
        )
    for i, text in enumerate(texts):
        check_text(text, f"{field}[{i}]")


def check_text(text: object, field: str) -> None:
    """Raise `FieldInvalid` where it is empty."""
    if not text:
        raise FieldInvalid(
            f"Invalid '{field}': it is empty. Send at least one character.", param=field
        )


@contextmanager
def blamed_on(fields: Mapping[str, str | None]) -> Iterator[None]:
    """Let a refusal name this face's field: *fields*, by OpenAI's word or the tokenizer's, or None."""
    try:
        yield
    except RequestError as error:
        ours, bracket, index = (error.param or "").partition("[")
        theirs = fields.get(ours, ours)
        told = theirs or ours
        message = str(error).replace(f"({ours}", f"({told}").replace(f"'{ours}", f"'{told}")
        error.args, error.param = (message,), theirs + bracket + index if theirs else None
        raise


def choose_outputs(asked: EmbeddingsRequest, card: ModelCard) -> Output:
    """What `output_type` asks for. Raises `FieldInvalid` where the model lacks it, or the size."""
    outputs = Output.DENSE
    if asked.output_type is not None or Output.DENSE not in card.outputs:
        outputs = outputs_named(asked.output_type, card)
    dimensions = asked.size or card.dimensions  # to ask for them all changes nothing
    param = "dimensions" if asked.dimensions else "output_dimension"
    if dimensions != (asked.output_dimension or dimensions):
        raise FieldInvalid(
            f"'dimensions' is {dimensions} and 'output_dimension' {asked.output_dimension}. They "
            "mean the same: send one of them.",
            param="output_dimension",
        )
    if dimensions != card.dimensions and not card.takes_dimensions(dimensions):
        message = "This model does not support specifying dimensions."
        if card.dimensions_selectable or card.matryoshka_dimensions:
            sizes = sorted({*card.matryoshka_dimensions, card.dimensions})
            have = f"at most {sizes[-1]}"
            if not card.dimensions_selectable:
                have = ", ".join(map(str, sizes))
            message = (
                f"Invalid value for '{param}' = {dimensions}. This model's vectors have {have}."
            )
        raise FieldInvalid(message, param=param)
    if asked.is_chunked:
        check_chunks(asked, outputs, card)
    if asked.dtype in ("binary", "ubinary") and dimensions % 8:
        named = "embedding_type" if asked.output_dtype is None else "output_dtype"
        raise FieldInvalid(
            f"'{named}' = {asked.dtype} packs eight numbers in a byte, and {dimensions} is no "
            "multiple of 8.",
            param=named,
        )
    return outputs


def outputs_named(given: str | Sequence[str] | None, card: ModelCard) -> Output:
    """The outputs that are *given* by name; by default dense, or else all that are no score.

    Raises `FieldInvalid` for none, for an unknown one, and for one that the model lacks.
    """
    if given == []:
        raise FieldInvalid(
            f"Invalid 'output_type': empty array. Supported values: {list(OUTPUTS)}.",
            param="output_type",
        )
    joined = given if given is None or isinstance(given, str) else "&".join(given)
    outputs = Output(0)
    names = ["dense"] if joined is None else joined.split("&")
    if joined is None and not card.outputs & (Output.DENSE | Output.SCORE):
        names = output_names(card.outputs)  # SPLADE's, or token vectors
    for name in names:
        if name.lower() not in OUTPUTS:
            raise FieldInvalid(
                f"Invalid value for 'output_type' = {shown(name)}. "
                f"Supported values: {list(OUTPUTS)}, or several of them joined by '&'.",
                param="output_type",
            )
        outputs |= OUTPUTS[name.lower()]
    if absent := outputs & ~card.outputs:
        raise FieldInvalid(
            f"This model has no {' and no '.join(output_names(absent))} "
            f"output; it has {', '.join(output_names(card.outputs))}.",
            param="output_type",
        )
    return outputs


def check_chunks(asked: EmbeddingsRequest, outputs: Output, card: ModelCard) -> None:
    """Refuse chunks where the model has none, and what does not go with them. `FieldInvalid`."""
    param = "late_chunking" if asked.late_chunking else "chunk_size"
    is_text = isinstance(asked.input, str) or isinstance(asked.input[0], str)
    cuts = LONG_TEXT[asked.cut or False] is not LongText.REFUSE
    problem = None
    if not card.late_chunking:
        problem = "needs a model whose vector is the mean of its tokens (late_chunking in /models)"
    elif asked.late_chunking and asked.chunk_size is not None:
        problem = "takes each text for a chunk, and chunk_size cuts texts: send one of them"
    elif outputs != Output.DENSE:
        problem = "gives dense vectors alone"
    elif not is_text:
        problem = "is of texts, and 'input' holds token ids"
    elif cuts or asked.truncate_prompt_tokens is not None:
        problem = "reads texts whole, so none can be cut"
    if problem is not None:
        raise FieldInvalid(f"'{param}' {problem}.", param=param)


def output_names(outputs: Output) -> list[str]:
    """The public names of *outputs*, as `/models` lists them."""
    return [str(output.name).lower() for output in outputs]


def of_length_one(rows: Float32Array, *, wanted: bool, param: str) -> Float32Array:
    """*rows* of length 1, or as the model gives them where that is not *wanted*.

    Raises `FieldInvalid` where these are of length 1, too.
    """
    if not np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-3):
        return unit(rows) if wanted else rows
    if not wanted:
        raise FieldInvalid(
            "This model's vectors are of length 1; they are not to be had otherwise.", param=param
        )
    return rows


def choose_prompt(
    card: ModelCard,
    *,
    prompt: str | None = None,
    prompt_name: str | None = None,
    input_type: str | None = None,
    task: str | None = None,
    are_texts: bool = True,
) -> str:
    """What goes before every input: what the request names, else the model's default prompt.

    An *input_type* that none of the model's prompts is for leaves the default, as in
    sentence-transformers. Token ids take no prompt. Raises `FieldInvalid`.
    """
    given = {"prompt": prompt, "prompt_name": prompt_name, "input_type": input_type, "task": task}
    named = [field for field, value in given.items() if value is not None]
    if len(named) > 1:
        raise FieldInvalid(
            f"'{named[0]}' and '{named[1]}' both say what goes before each input. Send one of them.",
            param=named[1],
        )
    found = card.prompts.get(card.default_prompt_name or "", "")
    if prompt is not None:
        found = prompt
    elif prompt_name is not None:
        if prompt_name not in card.prompts:
            listed = ", ".join(sorted(card.prompts)) or "none"
            raise FieldInvalid(
                f"This model has no prompt called {shown(prompt_name)}. It has: {listed}.",
                param="prompt_name",
            )
        found = card.prompts[prompt_name]
    elif (word := input_type or task) is not None:
        by_word = {name.lower(): text for name, text in card.prompts.items()}
        words = (word, *next((words for words in SYNONYMS if word in words), ()))
        texts = [by_word[word] for word in words if word in by_word]
        found = next(filter(None, texts), "") if texts else found
    if found and named and not are_texts:
        raise FieldInvalid(
            f"'{named[0]}' puts a prompt before texts, and 'input' holds token ids. Send texts, or "
            "ids that begin with the prompt's.",
            param=named[0],
        )
    return found if are_texts else ""
