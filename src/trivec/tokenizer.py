"""Tokenizer: texts, pairs of texts and clients' own ids to token ids, by a checkpoint's `tokenizer.json`.

The same text has the same ids on any thread. Two oddities of the hub's pipelines are kept for
parity with other hosts: trailing blanks become a bare "▁", and a literal `</s>` in a text becomes
the special id. Special tokens are what the file's post-processor adds: on both sides of a text
(BERT), after it (Qwen3), several, or none.
"""

import asyncio
import re
from collections.abc import Callable, Iterator, Sequence, Set
from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
import tokenizers

from trivec.core.errors import (
    CheckpointRefused,
    EngineFault,
    FieldInvalid,
    RequestTooLarge,
    TextTooLong,
    TokenIdsForeign,
    TokenIdUnknown,
    panics_are_faults,
)
from trivec.core.ports import Texts, TokenLists
from trivec.core.types import Int32Array, LongText, Sequences, Truncated
from trivec.token_origin import TokenOrigin

# A text over this many bytes for each token of the maximum is not read, so that its cost is bounded.
TEXT_BYTES_A_TOKEN = 64

# Characters of which a run may be one space to a tokenizer; each tokenizer is asked at load.
BLANKS = " \t\n\r\f\v\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"

# A hand-over to the pool and back costs 30 µs idle and more under load; a text costs 7 µs (words
# seen before) to 0.5 µs a character. Up to this size the event loop does it (decision 0011).
INLINE_CHARACTERS_MAX = 256

# One job of the pool: 10 to 100 ms of work, so that a huge request takes turns with the others.
JOB_CHARACTERS_MAX = 64 * 1024

T = TypeVar("T")


class Tokenizer:
    """One model's tokenizer. Loading reads the file; every other call is thread safe."""

    def __init__(
        self,
        file: Path,
        *,
        token_count_max: int,
        vocabulary_size: int,
        pool: Executor,
        request_tokens_max: int | None = None,
        token_type_count: int = 2,
    ) -> None:
        """*request_tokens_max*: of all texts of a call. *token_type_count*: rows of the model's
        table of token types; a pair has no types where it would need more, as in XLM-R.
        """
        self.token_count_max = token_count_max
        self.request_tokens_max = request_tokens_max
        self.vocabulary_size = vocabulary_size
        self._text_bytes_max = TEXT_BYTES_A_TOKEN * token_count_max
        self._pool = pool
        try:
            self._codec = codec = tokenizers.Tokenizer.from_file(str(file))
        except Exception as exc:  # the library raises nothing narrower
            raise CheckpointRefused(
                f"{file} cannot be read as a tokenizer: {exc}. Fetch the model again."
            ) from exc
        codec.no_padding()
        codec.no_truncation()
        added = codec.get_added_tokens_decoder()
        id_count = max([codec.get_vocab_size(with_added_tokens=False), *(i + 1 for i in added)])
        if id_count > vocabulary_size:  # ids that the embedding table does not hold
            raise CheckpointRefused(
                f"{file} has token ids up to {id_count - 1}, but the model's vocabulary has "
                f"{vocabulary_size}. Take the tokenizer.json that belongs to this model."
            )
        specials, _ = _template(codec.encode("a"))
        self._pair_specials, types = _template(codec.encode("a", "a"))
        if (len(specials), len(self._pair_specials)) != (2, 3):
            raise CheckpointRefused(
                f"{file} makes no token of the text 'a'. Take the tokenizer.json that belongs to "
                "this model."
            )
        self._prefix, self._suffix = specials
        self._pair_types = types if 0 < max(types) < token_type_count else None
        self._origin = TokenOrigin(codec)
        self._blanks = _blank_runs(codec)

    async def tokenize(
        self, inputs: Texts | TokenLists, *, long_text: LongText, are_own: bool = False
    ) -> Sequences:
        """Ids of *inputs*, special tokens included, in their order.

        Raises `TextTooLong` or `TokenIdUnknown` for the first input at fault, `FieldInvalid` for
        a lone surrogate, `RequestTooLarge` as soon as the texts so far are too many tokens.
        Cancelling it frees the pool at the next job's end.
        """
        assert inputs, "a request has at least one input"
        with panics_are_faults("tokenizer"):
            if isinstance(inputs[0], str):
                return await self._encode_texts(cast(Texts, inputs), long_text)
            lists = cast(TokenLists, inputs)
            # Adopting ids is array work; judging them asks the library about each.
            inline_max = JOB_CHARACTERS_MAX if are_own else INLINE_CHARACTERS_MAX
            with_specials = partial(self._with_specials, lists, long_text, are_own=are_own)
            return await self._do(with_specials, inline=sum(map(len, lists)) <= inline_max)

    async def encode_pairs(
        self, pairs: Sequence[tuple[str, str]], *, long_text: LongText
    ) -> Sequences:
        """Ids and token types of (query, document) *pairs*, as a cross-encoder reads them.

        Of a pair that is too long only the document is cut. Raises as `tokenize` does, and
        `TextTooLong` where a query leaves no room for its document.
        """
        assert pairs, "a request has at least one pair"
        with panics_are_faults("tokenizer"):
            texts = list(dict.fromkeys(query for query, _ in pairs))
            encoded = await self._encode_texts(texts, LongText.KEEP)
            query_ids = dict(zip(texts, map(self._without_specials, _split(encoded)), strict=True))
            queries = [query_ids[query] for query, _ in pairs]
            documents = await self._encode_texts([text for _, text in pairs], long_text)
            join = partial(self._join_pairs, queries, documents, long_text)
            joined = await self._do(join, inline=documents.token_count <= INLINE_CHARACTERS_MAX)
            self._refuse_too_many([joined], text_count=len(pairs))
            return joined

    def token_strings(self, token_ids: Int32Array) -> list[str]:
        """The vocabulary's own strings; empty for an id that the vocabulary leaves out."""
        with panics_are_faults("tokenizer"):
            return [self._codec.id_to_token(token_id) or "" for token_id in token_ids.tolist()]

    async def _do(self, work: Callable[[], T], *, inline: bool = False) -> T:
        if inline:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def _refuse_too_many(self, done: Sequence[Sequences], *, text_count: int) -> None:
        token_count = sum(part.token_count for part in done)
        if self.request_tokens_max is not None and token_count > self.request_tokens_max:
            raise RequestTooLarge(
                token_count=token_count,
                token_count_max=self.request_tokens_max,
                is_counted_out=sum(map(len, done)) == text_count,
            )

    async def _encode_texts(self, texts: Texts, long_text: LongText) -> Sequences:
        sizes = list(map(len, texts))
        if sum(sizes) <= INLINE_CHARACTERS_MAX:
            return self._encode(texts, long_text)
        done: list[Sequences] = []
        first = 0
        for job in _jobs(texts, sizes):
            is_huge = len(job[0]) > JOB_CHARACTERS_MAX and _exceeds(job[0], self._text_bytes_max)
            if long_text is LongText.KEEP and is_huge:
                done.append(await self._count(job[0], done, text_count=len(texts)))
            else:
                done.append(await self._do(partial(self._encode, job, long_text, first=first)))
            self._refuse_too_many(done, text_count=len(texts))
            first += len(job)
        return done[0] if len(done) == 1 else _join(done)

    async def _count(self, text: str, done: Sequence[Sequences], *, text_count: int) -> Sequences:
        """The ids of a huge text, tokenised a piece a turn and no further than the request's bound.

        Pieces are cut at blanks, where words are cut anyway; in a word of more than a piece the
        ids at its cuts may differ from those of the whole.
        """
        text, is_over = await self._do(partial(self._shorten, text, LongText.KEEP))
        ids, first = [self._prefix], sum(map(len, done))
        for piece in _pieces(text):
            part = await self._do(partial(self._encode, [piece], LongText.KEEP, first=first))
            ids.append(self._without_specials(part.token_ids))
            so_far = Sequences.pack([np.concatenate(ids)])
            self._refuse_too_many([*done, so_far], text_count=text_count + 1)
        whole = Sequences.pack([np.concatenate([*ids, self._suffix])])
        return self._settle(whole, LongText.KEEP, over={0} if is_over else set())

    def _encode(self, texts: Texts, long_text: LongText, *, first: int = 0) -> Sequences:
        """The ids of neighbouring *texts*, of which one is number *first* of its request."""
        read, over = list(texts), set[int]()
        for i, text in enumerate(texts):
            if not _exceeds(text, self._text_bytes_max):
                continue
            read[i], is_over = self._shorten(text, long_text)
            if is_over and long_text is LongText.REFUSE:
                raise TextTooLong(
                    token_count=None,
                    token_count_max=self.token_count_max,
                    index=first + i,
                    bytes_max=self._text_bytes_max,
                )
            if is_over:
                over.add(i)
        try:
            # Releases the GIL; no offsets, which nobody reads.
            encodings = self._codec.encode_batch_fast(read)
        except TypeError as exc:  # how the library reports a str that is not Unicode
            raise _lone_surrogate(texts, first) from exc
        whole = Sequences.pack([encoding.ids for encoding in encodings])
        return self._settle(whole, long_text, first=first, over=over)

    def _shorten(self, text: str, long_text: LongText) -> tuple[str, bool]:
        """*text* with each run of blanks as one, and whether it is over the byte bound even so.

        It is then cut to the bound unless it is to be kept. Where blanks make tokens each counts.
        It is read a piece at a time: one call for megabytes would hold the interpreter.
        """
        from_start = long_text is LongText.CUT_START
        starts = range(0, len(text), JOB_CHARACTERS_MAX)
        parts, size, bytes_max = [], 0, self._text_bytes_max
        for start in reversed(starts) if from_start else starts:
            part = text[start : start + JOB_CHARACTERS_MAX]
            parts.append(self._blanks.sub(" ", part) if self._blanks else part)
            size += len(parts[-1].encode("utf-8", "replace"))
            if size > bytes_max and long_text is not LongText.KEEP:
                break
        joined = "".join(reversed(parts) if from_start else parts)
        if size <= bytes_max or long_text is LongText.KEEP:
            return joined, size > bytes_max
        encoded = joined.encode("utf-8", "replace")
        kept = encoded[-bytes_max:] if from_start else encoded[:bytes_max]
        return kept.decode("utf-8", "ignore"), True  # a character cut in two is dropped

    def _with_specials(self, lists: TokenLists, long_text: LongText, *, are_own: bool) -> Sequences:
        """The client's own ids, checked, and put between special tokens unless they already are."""
        given = Sequences.pack(lists)
        is_unknown = (given.token_ids < 0) | (given.token_ids >= self.vocabulary_size)
        if is_unknown.any():
            at = int(is_unknown.argmax())
            sequence = int(np.searchsorted(given.cu_seqlens, at, side="right")) - 1
            raise TokenIdUnknown(
                token_id=int(given.token_ids[at]),
                vocabulary_size=self.vocabulary_size,
                param=f"input[{sequence}]",
            )
        if not are_own and self._origin.looks_foreign(lists):
            raise TokenIdsForeign
        begin, end, lengths = given.cu_seqlens[:-1], given.cu_seqlens[1:], given.lengths()
        assert lengths.all(), "the route refuses an empty array"
        special_count = len(self._prefix) + len(self._suffix)
        is_bare = lengths < special_count  # [sequences]
        for i, special in enumerate(self._prefix):
            is_bare |= given.token_ids[np.minimum(begin + i, end - 1)] != special
        for i, special in enumerate(self._suffix[::-1], 1):
            is_bare |= given.token_ids[np.maximum(end - i, begin)] != special
        starts = np.zeros_like(given.cu_seqlens)
        np.cumsum(lengths + special_count * is_bare, out=starts[1:])
        token_ids = np.empty(int(starts[-1]), np.int32)
        for i, special in enumerate(self._prefix):
            token_ids[starts[:-1] + i] = special
        for i, special in enumerate(self._suffix[::-1], 1):
            token_ids[starts[1:] - i] = special
        moved = np.repeat(starts[:-1] - begin + len(self._prefix) * is_bare, lengths)
        token_ids[np.arange(given.token_count) + moved] = given.token_ids
        return self._settle(Sequences(token_ids, starts), long_text)

    def _settle(
        self, whole: Sequences, long_text: LongText, *, first: int = 0, over: Set[int] = frozenset()
    ) -> Sequences:
        """Refuse, cut or keep what is longer than the model reads. *over*: texts over the byte bound."""
        count_max, special_count = self.token_count_max, len(self._prefix) + len(self._suffix)
        if not over and whole.token_count <= count_max and special_count:
            return whole  # so none of them is longer, and none is empty
        lengths = whole.lengths()
        if not lengths.all():
            param = f"input[{first + int(lengths.argmin())}]"
            raise FieldInvalid(f"{param} makes no token, and this model adds none.", param=param)
        is_kept = long_text is LongText.KEEP  # then only what no embedding would read is marked
        changed = set(over) if is_kept else {*np.flatnonzero(lengths > count_max).tolist(), *over}
        if not changed:
            return whole
        if long_text is LongText.REFUSE:
            i = min(changed)
            raise TextTooLong(
                token_count=int(lengths[i]), token_count_max=count_max, index=first + i
            )
        ids, truncated = _split(whole), {}
        for i in sorted(changed):
            original = None if i in over and not is_kept else len(ids[i])
            if not is_kept:
                text = _cut(self._without_specials(ids[i]), count_max - special_count, long_text)
                ids[i] = np.concatenate((self._prefix, text, self._suffix))
            truncated[i] = Truncated(original, min(len(ids[i]), count_max))
        return Sequences.pack(ids, truncated)

    def _without_specials(self, ids: Int32Array) -> Int32Array:
        """The ids of a text without its special tokens."""
        return ids[len(self._prefix) : len(ids) - len(self._suffix)]

    def _join_pairs(
        self, queries: Sequence[Int32Array], documents: Sequences, long_text: LongText
    ) -> Sequences:
        """A sequence for each of *queries* (without special tokens) with its document."""
        before, between, after = self._pair_specials
        special_count = len(before) + len(between) + len(after)
        ones = [[1] * len(specials) for specials in self._pair_specials]
        ids: list[Int32Array] = []
        widths: list[int] = []  # tokens of each type of the template, pair after pair
        truncated: dict[int, Truncated] = {}
        for i, (query, whole) in enumerate(zip(queries, _split(documents), strict=True)):
            document, cut = self._without_specials(whole), documents.truncated.get(i)
            original = len(whole) if cut is None else cut.original_tokens
            if original is not None:
                original += len(document) - len(whole) + special_count + len(query)
            room = self.token_count_max - special_count - len(query)
            is_long = len(document) > room and long_text is not LongText.KEEP
            if is_long and (long_text is LongText.REFUSE or room < 1):
                raise TextTooLong(
                    token_count=original or special_count + len(query) + len(document),
                    token_count_max=self.token_count_max,
                    index=i,
                )
            if is_long:
                document = _cut(document, room, long_text)
            ids.append(np.concatenate((before, query, between, document, after)))
            if is_long or cut is not None:
                truncated[i] = Truncated(original, min(len(ids[i]), self.token_count_max))
            widths += [*ones[0], len(query), *ones[1], len(document), *ones[2]]
        joined = Sequences.pack(ids, truncated)
        if self._pair_types is None:
            return joined
        types = np.repeat(np.tile(np.array(self._pair_types, np.int32), len(ids)), widths)
        return Sequences(joined.token_ids, joined.cu_seqlens, truncated, types)


def _template(encoding: tokenizers.Encoding) -> tuple[list[Int32Array], list[int]]:
    """Special tokens before, between and after the texts; types of special tokens and texts."""
    gaps: list[list[int]] = [[]]
    types = []
    for token_id, token_type, text in zip(
        encoding.ids, encoding.type_ids, encoding.sequence_ids, strict=True
    ):
        if text is None:
            gaps[-1].append(token_id)
        elif text == len(gaps) - 1:
            gaps.append([])
        else:  # another token of the same text
            continue
        types.append(token_type)
    return [np.array(gap, np.int32) for gap in gaps], types


def _split(sequences: Sequences) -> list[Int32Array]:
    return np.split(sequences.token_ids, sequences.cu_seqlens[1:-1])


def _cut(text_ids: Int32Array, room: int, long_text: LongText) -> Int32Array:
    from_start = long_text is LongText.CUT_START
    return text_ids[max(0, len(text_ids) - room) :] if from_start else text_ids[:room]


def _exceeds(text: str, bytes_max: int) -> bool:
    if 4 * len(text) <= bytes_max:  # no character has more than four bytes
        return False
    if len(text) > bytes_max or text.isascii():
        return len(text) > bytes_max
    return len(text.encode("utf-8", "replace")) > bytes_max


def _blank_runs(codec: tokenizers.Tokenizer) -> re.Pattern[str] | None:
    """Runs of those characters of which any number is one space to *codec*; None: there are none."""

    def ids_with(blanks: str) -> list[list[int]]:
        around = ("a{}a", "a{}", "{}a")
        return [codec.encode(text.format(blanks)).ids for text in around]

    one = ids_with(" ")
    found = [blank for blank in BLANKS if all(ids_with(blank * n) == one for n in (1, 2, 3, 64))]
    return re.compile(f"[{re.escape(''.join(found))}]{{2,}}") if found else None


def _pieces(text: str) -> Iterator[str]:
    """*text* in pieces of at most `JOB_CHARACTERS_MAX`, cut before a blank where there is one."""
    start = 0
    while start < len(text):
        end = start + JOB_CHARACTERS_MAX
        if end < len(text):
            blank = max(text.rfind(blank, start + 1, end) for blank in " \n")
            end = blank if blank > start else end
        yield text[start:end]
        start = end


def _jobs(texts: Texts, sizes: Sequence[int]) -> Iterator[Texts]:
    """*texts* cut into neighbours of at most `JOB_CHARACTERS_MAX`; a longer text goes alone."""
    first, characters = 0, 0
    for i, size in enumerate(sizes):
        if characters and characters + size > JOB_CHARACTERS_MAX:
            yield texts[first:i]
            first, characters = i, 0
        characters += size
    yield texts[first:]


def _join(parts: Sequence[Sequences]) -> Sequences:
    """*parts* of one request as one, in their order."""
    token_ids = np.concatenate([part.token_ids for part in parts])
    starts = np.zeros(sum(map(len, parts)) + 1, np.int32)
    np.cumsum(np.concatenate([part.lengths() for part in parts]), out=starts[1:])
    truncated: dict[int, Truncated] = {}
    first = 0
    for part in parts:
        truncated.update({first + i: cut for i, cut in part.truncated.items()})
        first += len(part)
    return Sequences(token_ids, starts, truncated)


def _lone_surrogate(texts: Texts, first: int) -> Exception:
    for i, text in enumerate(texts, first):
        try:
            text.encode()
        except UnicodeEncodeError:
            return FieldInvalid(
                f"input[{i}] holds half of a surrogate pair, which is no character. "
                "Send well-formed Unicode.",
                param=f"input[{i}]",
            )
    return EngineFault("the tokenizer refused a text that is well-formed Unicode")
