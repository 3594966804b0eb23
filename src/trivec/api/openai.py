"""The OpenAI API: embeddings, tokenize and models, and the rules of a request that no type can hold."""

import asyncio
import random
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TypeVar, cast

import numpy as np
from starlette.responses import Response

from trivec.accounts import Scope
from trivec.api.context import RequestContext
from trivec.api.openapi import Operation
from trivec.api.responses import (
    IN_LINE_BYTES_MAX,
    INT_TEXT_BYTES,
    encode_embeddings,
    estimate_bytes,
    json_response,
)
from trivec.api.schemas import (
    Chunk,
    Decoder,
    EmbeddingsRequest,
    EmbeddingsResponse,
    Model,
    ModelList,
    TokenizedText,
    TokenizeRequest,
    TokenizeResponse,
    shown,
)
from trivec.core.errors import (
    AnswerTooLarge,
    FieldInvalid,
    MalformedBody,
    Overloaded,
    RequestTooLarge,
    TokenIdUnknown,
)
from trivec.core.ports import Embedder, Texts, TokenLists
from trivec.core.types import Int32Array, LongText, ModelCard, Output, Sequences, Vectors
from trivec.settings import HttpLimits
from trivec.tokenizer.encodings import decode

Asked = TypeVar("Asked")

PARSE_IN_LINE_BYTES_MAX = 256 * 1024  # larger bodies are parsed in a thread
OTHER_ITEMS_MAX = 64  # texts, lists and commas of a request's other fields
LARGE_TOKENIZE_BYTES = 64 * 1024  # of a body; smaller ones need not wait for others
LARGE_TOKENIZE_MAX = 5  # at a time: one runs, the others wait
TOKEN_STRINGS_IN_LINE_MAX = 8192
TOKEN_BYTES = 48  # an id in an array, as a Python integer in a list, and as text
TOKEN_STRING_BYTES = 72  # its string, in a list
TEXT_TOKEN_BYTES = 320  # a token with its text and place, as objects
OUTPUTS = {
    "dense": Output.DENSE,
    "sparse": Output.SPARSE,
    "multi": Output.MULTI,
    "colbert": Output.MULTI,
}
QUERY = ("query", "search_query", "retrieval.query")
DOCUMENT = ("document", "passage", "search_document", "retrieval.passage", "corpus")
# What an `input_type` may be called among a model's prompts, beside its own word.
PROMPT_NAMES: Mapping[str, Sequence[str]] = {
    **dict.fromkeys(("query", "search_query", "retrieval.query"), QUERY),
    **dict.fromkeys(("document", "search_document", "passage", "retrieval.passage"), DOCUMENT),
}
LONG_TEXT: Mapping[bool | str, LongText] = {
    False: LongText.REFUSE,
    "none": LongText.REFUSE,
    True: LongText.CUT_END,
    "end": LongText.CUT_END,
    "start": LongText.CUT_START,
}
_embeddings_decoder = Decoder(EmbeddingsRequest)
_tokenize_decoder = Decoder(TokenizeRequest)


@dataclass(frozen=True, slots=True)
class EmbeddedInputs:
    """The inputs of a request and their vectors."""

    sequences: Sequences
    vectors: Vectors
    outputs: Output  # that were asked for
    response_bytes: int  # of the response in the form that was asked for, near enough


async def embeddings(context: RequestContext) -> Response:
    """Turn texts into vectors."""
    app, clock = context.app, context.app.clock
    body = await context.read_body()
    app.check_admission()  # after reading: a connection with an unread body is lost
    asked = await parse(_embeddings_decoder, body, context)
    del body
    embedded = await embed(asked, context)
    vectors, outputs = embedded.vectors, embedded.outputs
    token_strings: list[list[str]] = []
    if asked.return_tokens and Output.SPARSE in outputs:
        embedder = context.find_embedder(asked.model)
        for vector in vectors.sparse:
            assert vector is not None, "every sequence was asked for its sparse vector"
            token_strings.append(embedder.token_strings(vector.token_ids))
            await asyncio.sleep(0)  # other requests get a turn after every vector

    started_s = clock.now_s()
    encode = partial(
        encode_embeddings,
        vectors,
        embedded.sequences,
        asked=asked,
        outputs=outputs,
        token_strings=token_strings or None,
        token_encoding=context.token_encoding,
        chunks=context.chunks,
    )
    in_line = embedded.response_bytes <= IN_LINE_BYTES_MAX[asked.encoding]
    encoded = encode() if in_line else await asyncio.to_thread(encode)
    context.encode_s = clock.now_s() - started_s
    context.memory.shrink(len(encoded))
    return Response(encoded, media_type="application/json")


async def embed(asked: EmbeddingsRequest, context: RequestContext) -> EmbeddedInputs:
    """The vectors of what was *asked*, by whichever face, within all limits, and billed.

    Whatever can be refused is refused before the model is touched.
    """
    limits, clock = context.app.limits, context.app.clock
    context.user = asked.user
    context.input_count = rows = check_inputs(asked.input, limits)
    embedder = context.find_embedder(asked.model)
    card = embedder.card
    outputs = choose_outputs(asked, card)
    least_bytes = sum(estimate_bytes(asked, outputs, card, rows=rows, tokens=rows))
    context.memory.add(least_bytes, is_response=True)  # before the work of tokenising
    context.timeout.watch_client()
    await context.reservation.acquire(tokens_follow=True)

    truncate: bool | str = context.known_caller.truncate or limits.truncate
    for said in (asked.truncation, asked.truncate):
        truncate = truncate if said is None else said
    long_text, count_max = LONG_TEXT[truncate], asked.truncate_prompt_tokens
    if count_max is not None:
        count_max = card.token_count_max if count_max == -1 else count_max
        if not 1 <= count_max <= card.token_count_max:
            raise FieldInvalid(
                f"Invalid value for 'truncate_prompt_tokens' = {count_max}. It is -1, or 1 to "
                f"{card.token_count_max}, which is all that this model reads.",
                param="truncate_prompt_tokens",
            )
        long_text = LongText.CUT_END if long_text is LongText.REFUSE else long_text
    sequences = await tokenize_input(
        asked, embedder, context, long_text=long_text, token_count_max=count_max
    )
    token_count = sequences.token_count
    if sequences.chunks is not None:
        rows = sum(len(bounds) - 1 for bounds in sequences.chunks)
    response_bytes, vector_bytes = estimate_bytes(
        asked, outputs, card, rows=rows, tokens=token_count
    )
    await context.admit(
        token_count,
        response_bytes=response_bytes,
        vector_bytes=vector_bytes,
        reserved_bytes=least_bytes,
    )

    wanted = outputs if sequences.chunks is None else Output.CHUNKS
    reply = await embedder.embed(sequences, wanted, deadline_s=context.deadline_s - clock.now_s())
    context.token_count = token_count
    context.queue_s, context.compute_s = reply.queue_s, reply.compute_s
    vectors = reply.vectors
    if sequences.chunks is not None:  # each as a text of its own would be
        vectors = Vectors.of(np.concatenate([rows for rows in vectors.chunks if rows is not None]))
    if card.layer_norm_before_cut and asked.size not in (None, card.dimensions):
        # What a LayerNorm divides by, the later division by the slice's own length undoes.
        centred = vectors.dense - vectors.dense.mean(axis=1, keepdims=True)
        vectors = Vectors({**vectors.rows, Output.DENSE: centred})
    return EmbeddedInputs(sequences, vectors, outputs, response_bytes)


async def tokenize(context: RequestContext) -> Response:
    """Count tokens without spending any."""
    body = await context.read_body()
    context.timeout.watch_client()
    async with tokenizer_turn(context):
        return await count_tokens(body, context)


@asynccontextmanager
async def tokenizer_turn(context: RequestContext) -> AsyncIterator[None]:
    """Let a large request wait for its turn, for it takes the tokenizer's threads from embeddings."""
    app = context.app
    if context.request_bytes < LARGE_TOKENIZE_BYTES:
        yield
        return
    if app.large_tokenize_count >= LARGE_TOKENIZE_MAX:
        raise Overloaded(
            f"{LARGE_TOKENIZE_MAX - 1} large requests to tokenize are waiting, which is the most. "
            "Please try again shortly, with fewer inputs at a time.",
            retry_after_s=random.uniform(5, 10),  # noqa: S311 # not all at once again
        )
    app.large_tokenize_count += 1
    try:
        async with app.large_tokenize:
            yield
    finally:
        app.large_tokenize_count -= 1


async def count_tokens(body: bytes, context: RequestContext) -> Response:
    """The response to `POST /tokenize`. A text that would not fit is counted all the same."""
    limits = context.app.limits
    asked = await parse(_tokenize_decoder, body, context)
    context.input_count = check_inputs(asked.input, limits)
    embedder = context.find_embedder(asked.model)
    token_count_max = embedder.card.token_count_max
    await context.reservation.acquire()
    sequences = await tokenize_input(asked, embedder, context, long_text=LongText.KEEP)
    token_count = sequences.token_count
    response_bytes = token_count * INT_TEXT_BYTES
    if response_bytes > limits.answer_bytes_max:
        raise AnswerTooLarge(answer_bytes=response_bytes, answer_bytes_max=limits.answer_bytes_max)
    token_bytes = TOKEN_BYTES + (TOKEN_STRING_BYTES if asked.return_tokens else 0)
    context.memory.add(token_count * token_bytes, is_response=True)
    data = []
    for i in range(len(sequences)):
        start, end = sequences.cu_seqlens[i : i + 2].tolist()
        token_ids = sequences.token_ids[start:end]
        strings = None
        if asked.return_tokens:  # of a long text it takes up to 0.3 s
            is_short = end - start <= TOKEN_STRINGS_IN_LINE_MAX
            read = embedder.token_strings
            strings = read(token_ids) if is_short else await asyncio.to_thread(read, token_ids)
        data.append(
            TokenizedText(
                object="tokens",
                index=i,
                token_ids=token_ids.tolist(),
                token_count=end - start,
                fits=end - start <= token_count_max and i not in sequences.truncated,
                tokens=strings,
            )
        )
        await asyncio.sleep(0)  # other requests get a turn after every text
    counted = TokenizeResponse(
        object="list",
        model=asked.model,
        data=data,
        token_count_max=token_count_max,
        total_tokens=token_count,
        request_tokens_max=limits.request_tokens_max,
        fits=token_count <= limits.request_tokens_max and all(text.fits for text in data),
        token_encoding=context.token_encoding,
    )
    in_line = response_bytes <= IN_LINE_BYTES_MAX["float"]
    encode = partial(json_response, counted)
    response = encode() if in_line else await asyncio.to_thread(encode)
    context.memory.shrink(len(response.body))
    return response


async def list_models(context: RequestContext) -> Response:
    """List the models this key may use."""
    cards = context.app.cards_for(context.known_caller)
    return json_response(ModelList(data=[_model(card, card.id, context) for card in cards]))


async def show_model(context: RequestContext) -> Response:
    """Show one model."""
    name = context.path_params["id"]
    return json_response(_model(context.find_embedder(name).card, name, context))


def _model(card: ModelCard, name: str, context: RequestContext) -> Model:
    return Model(
        id=name,
        created=card.created,
        owned_by=card.owned_by,
        context_size=card.token_count_max,
        dimensions=card.dimensions,
        dimensions_selectable=card.dimensions_selectable,
        matryoshka_dimensions=list(card.matryoshka_dimensions),
        prompts=dict(card.prompts),
        default_prompt_name=card.default_prompt_name,
        labels=card.labels,
        late_chunking=card.late_chunking,
        output_types=output_names(card.outputs),
        truncate=context.known_caller.truncate or context.app.limits.truncate,
        precision=card.precision,
        recipe=card.recipe,
        verified=card.verified,
        aliases=list(card.aliases),
        notes=dict(card.notes),
    )


async def parse(
    decoder: Decoder[Asked], body: bytes, context: RequestContext, *, strings_a_text: int = 1
) -> Asked:
    """The request in *body*, in which a text takes as many as *strings_a_text*, its fields' names
    among them. Raises `MalformedBody`, `FieldInvalid`, `RequestTooLarge`.
    """
    if len(body) <= PARSE_IN_LINE_BYTES_MAX:
        return decoder.decode(body)
    await asyncio.to_thread(refuse_too_many_items, body, context.app.limits, strings_a_text)
    return await asyncio.to_thread(decoder.decode, body)


async def tokenize_input(
    asked: TokenizeRequest,
    embedder: Embedder,
    context: RequestContext,
    *,
    long_text: LongText,
    token_count_max: int | None = None,
) -> Sequences:
    """The sequences of the texts or token ids in *asked*. Raises what `Embedder.tokenize` does."""
    given = asked.input
    encoding = asked.token_encoding or context.app.limits.token_encoding
    started_s = context.app.clock.now_s()
    inputs: Texts | TokenLists
    if isinstance(given, str):
        inputs = [given]
    elif isinstance(given[0], str):
        inputs = cast("list[str]", given)
    else:
        is_flat = isinstance(given[0], int)  # the ids of one text, without a list around them
        lists = cast("list[list[int]]", [given] if is_flat else given)
        if encoding in (None, "model"):
            inputs = own_token_ids(lists, embedder.card.vocabulary_size, is_flat=is_flat)
        else:
            inputs = await asyncio.to_thread(decode, lists, encoding)
            context.memory.add(sum(map(len, inputs)))
            context.token_encoding = encoding
    prompt = ""
    if asked.names_prompt or embedder.card.default_prompt_name is not None:
        prompt = choose_prompt(asked, embedder.card, are_texts=isinstance(inputs[0], str))
    if isinstance(asked, EmbeddingsRequest) and asked.is_chunked:
        texts = cast("list[str]", inputs)
        sequences = await embedder.tokenize_chunks(
            texts, prompt=prompt, chunk_size=asked.chunk_size
        )
        if asked.chunk_size is not None:
            context.memory.add(sequences.token_count * TEXT_TOKEN_BYTES)
            context.chunks = await find_chunks(texts, sequences, embedder, prompt=prompt)
    else:
        sequences = await embedder.tokenize(
            inputs,
            long_text=long_text,
            trusted=encoding == "model",
            prompt=prompt,
            token_count_max=token_count_max,
        )
    context.tokenize_s = context.app.clock.now_s() - started_s
    return sequences


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


def choose_prompt(asked: TokenizeRequest, card: ModelCard, *, are_texts: bool) -> str:
    """What goes before every input: what *asked* names, else the model's default prompt.

    An `input_type` that none of the model's prompts is for leaves the default, as in
    sentence-transformers. Token ids take no prompt. Raises `FieldInvalid`.
    """
    fields = ("prompt", "prompt_name", "input_type")
    named = [field for field in fields if getattr(asked, field) is not None]
    if len(named) > 1:
        raise FieldInvalid(
            f"'{named[0]}' and '{named[1]}' both say what goes before each input. Send one of them.",
            param=named[1],
        )
    prompts, listed = card.prompts, ", ".join(sorted(card.prompts)) or "none"
    prompt = prompts.get(card.default_prompt_name or "", "")
    if asked.prompt is not None:
        prompt = asked.prompt
    elif asked.prompt_name is not None:
        if asked.prompt_name not in prompts:
            raise FieldInvalid(
                f"This model has no prompt called {shown(asked.prompt_name)}. It has: {listed}.",
                param="prompt_name",
            )
        prompt = prompts[asked.prompt_name]
    elif asked.input_type is not None:
        by_word = {name.lower(): text for name, text in prompts.items()}
        words = (asked.input_type, *PROMPT_NAMES.get(asked.input_type, ()))
        found = [by_word[word] for word in words if word in by_word]
        prompt = next(filter(None, found), "") if found else prompt
    if prompt and named and not are_texts:
        raise FieldInvalid(
            f"'{named[0]}' puts a prompt before texts, and 'input' holds token ids. Send texts, or "
            "ids that begin with the prompt's.",
            param=named[0],
        )
    return prompt if are_texts else ""


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


def choose_outputs(asked: EmbeddingsRequest, card: ModelCard) -> Output:
    """What `output_type` asks for. Raises `FieldInvalid` where the model lacks it, or the size."""
    given = asked.output_type
    if given == []:
        raise FieldInvalid(
            f"Invalid 'output_type': empty array. Supported values: {list(OUTPUTS)}.",
            param="output_type",
        )
    joined = "&".join(given) if isinstance(given, list) else given
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
    dimensions = asked.size or card.dimensions  # to ask for them all changes nothing
    param = "dimensions" if asked.dimensions else "output_dimension"
    if dimensions != (asked.output_dimension or dimensions):
        raise FieldInvalid(
            f"'dimensions' is {dimensions} and 'output_dimension' {asked.output_dimension}. They "
            "mean the same: send one of them.",
            param="output_dimension",
        )
    sizes = sorted({*card.matryoshka_dimensions, card.dimensions})
    if dimensions not in sizes and not (card.dimensions_selectable and dimensions < sizes[-1]):
        message = "This model does not support specifying dimensions."
        if card.dimensions_selectable or card.matryoshka_dimensions:
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
        raise FieldInvalid(
            f"'output_dtype' = {asked.dtype} packs eight numbers in a byte, and {dimensions} is no "
            "multiple of 8.",
            param="output_dtype",
        )
    return outputs


def check_chunks(asked: EmbeddingsRequest, outputs: Output, card: ModelCard) -> None:
    """Refuse chunks where the model has none, and what does not go with them. `FieldInvalid`."""
    param = "late_chunking" if asked.late_chunking else "chunk_size"
    is_text = isinstance(asked.input, str) or isinstance(asked.input[0], str)
    said = asked.truncation if asked.truncate is None else asked.truncate
    cuts = LONG_TEXT[said or False] is not LongText.REFUSE
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


async def find_chunks(
    texts: Texts, sequences: Sequences, embedder: Embedder, *, prompt: str
) -> list[Chunk]:
    """Where each chunk of *sequences* lies in its text, which had *prompt* before it."""
    found = await embedder.find_tokens([prompt + text for text in texts], special_tokens=True)
    assert sequences.chunks is not None
    return [
        Chunk(
            i,
            (int(start), int(end)),
            (max(0, tokens[start].start - len(prompt)), tokens[end - 1].end - len(prompt)),
        )
        for i, (tokens, bounds) in enumerate(zip(found, sequences.chunks, strict=True))
        for start, end in pairwise(bounds.tolist())
    ]


def output_names(outputs: Output) -> list[str]:
    """The public names of *outputs*, as `/models` lists them."""
    return [str(output.name).lower() for output in outputs]


OPERATIONS = (
    Operation(
        "POST", "/embeddings", embeddings, Scope.EMBED, EmbeddingsResponse, EmbeddingsRequest
    ),
    Operation("POST", "/tokenize", tokenize, Scope.EMBED, TokenizeResponse, TokenizeRequest),
    Operation("GET", "/models", list_models, Scope.EMBED, ModelList),
    Operation("GET", "/models/{id:path}", show_model, Scope.EMBED, Model),
)
