"""Tokenizer: texts, pairs of texts and clients' token ids to ids, by a checkpoint's tokenizer.json.

The same text has the same ids on any thread. Two oddities of the hub's pipelines are kept for
parity with other hosts: trailing blanks become a bare "▁", and a literal `</s>` in a text becomes
the special id. Special tokens are what the file's post-processor adds: on both sides of a text
(BERT), after it (Qwen3), several, or none.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
import tokenizers
from numpy.typing import ArrayLike

from trivec.core.errors import (
    CheckpointRefused,
    FieldInvalid,
    RequestTooLarge,
    TextTooLong,
    TokenIdsForeign,
    TokenIdUnknown,
    panics_are_faults,
)
from trivec.core.ports import Texts, TokenLists
from trivec.core.types import (
    NOTHING_TRUNCATED,
    ORDINARY_RULES,
    Int32Array,
    LongText,
    MarkedTexts,
    Sequences,
    TextToken,
    TokenRules,
    Truncated,
)
from trivec.tokenizer.origin import TokenOrigin

# A text over this many bytes for each token of the maximum is not read, so that its cost is bounded.
TEXT_BYTES_A_TOKEN = 64

# Characters of which a run may be one space to a tokenizer; each tokenizer is asked at load.
BLANKS = " \t\n\r\f\v\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"

# A hand-over to the pool and back costs 30 µs idle and more under load; a text costs 7 µs (words
# seen before) to 0.5 µs a character. Up to this size the event loop does it (decision 0011).
INLINE_CHARACTERS_MAX = 256

# One job of the pool: 10 to 100 ms of work, so that a huge request takes turns with the others.
JOB_CHARACTERS_MAX = 64 * 1024

# A piece of a text as long as a job at most, cut before a blank where there is one.
_PIECE = re.compile(rf"(?s:.{{1,{JOB_CHARACTERS_MAX}}}(?=[ \n]|\Z)|.{{1,{JOB_CHARACTERS_MAX}}})")

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Reading:
    """How the inputs of one call are read."""

    long_text: LongText
    token_count_max: int  # of a sequence; what is longer is treated as `long_text` says
    lead: int  # tokens at the front of every sequence that are never cut: special ones, a prompt's
    prompt: str = ""  # put before every text
    marked: MarkedTexts | None = None


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
        rules: TokenRules = ORDINARY_RULES,
        include_prompt: bool = True,
    ) -> None:
        """*request_tokens_max*: of all texts of a call. A pair has no token types where it would
        need more than the model's table of them has rows, as in XLM-R.
        *include_prompt* False: sequences with a prompt say how many tokens the pooled mean skips.
        """
        self.token_count_max = token_count_max
        self.request_tokens_max = request_tokens_max
        self.vocabulary_size = vocabulary_size
        self._include_prompt = include_prompt
        self._rules = rules
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
        if not rules.has_specials:
            codec.post_processor = tokenizers.processors.Sequence([])
        added = codec.get_added_tokens_decoder()
        id_count = max([codec.get_vocab_size(with_added_tokens=False), *(i + 1 for i in added)])
        specials, _ = _template(codec.encode("a"))
        self._pair_specials, types = _template(codec.encode("a", "a"))
        problem = None
        if id_count > vocabulary_size:  # ids that the embedding table does not hold
            problem = f"has token ids up to {id_count - 1}; the vocabulary has {vocabulary_size}"
        elif (len(specials), len(self._pair_specials)) != (2, 3):
            problem = "makes no token of the text 'a'"
        if problem is not None:
            raise CheckpointRefused(
                f"{file} {problem}. Take the tokenizer.json that belongs to this model."
            )
        self._prefix, self._suffix = specials
        self._special_count = len(self._prefix) + len(self._suffix)
        self._pair_types = types if 0 < max(types) < rules.token_type_count else None
        self._origin = TokenOrigin(codec)
        self._blanks = _blank_runs(codec)

    async def tokenize(
        self,
        inputs: Texts | TokenLists,
        *,
        long_text: LongText,
        trusted: bool = False,
        prompt: str = "",
        token_count_max: int | None = None,
    ) -> Sequences:
        """Ids of *inputs*, special tokens included, in their order.

        *prompt* is put before each text, and is never cut. *token_count_max*: of each sequence,
        where that is less than the model reads.

        Raises `TextTooLong` or `TokenIdUnknown` for the first input at fault, `FieldInvalid` for
        a lone surrogate, `RequestTooLarge` as soon as the texts so far are too many tokens.
        Cancelling it frees the pool at the next job's end.
        """
        assert inputs, "a request has at least one input"
        count_max = min(token_count_max or self.token_count_max, self.token_count_max)
        with panics_are_faults("tokenizer"):
            lead = len(self._prefix)
            marked = next(
                (one for one in self._rules.marked if prompt.startswith(one.marker)), None
            )
            if marked is not None:
                prompt = prompt.removeprefix(marked.marker)
                count_max = min(count_max, marked.token_count_max or count_max)
            if prompt:  # counted as sentence-transformers does: of the prompt alone
                lead = len(self._codec.encode(prompt)) - len(self._suffix)
            how = Reading(long_text, count_max, lead + (marked is not None), prompt, marked)
            if not isinstance(inputs[0], str):
                assert not prompt, "a prompt goes before texts"
                assert marked is None, "a marker is a prompt"
                lists = cast(TokenLists, inputs)
                # Taking ids is array work; judging their origin asks the library about each.
                inline_max = JOB_CHARACTERS_MAX if trusted else INLINE_CHARACTERS_MAX
                if sum(map(len, lists)) <= inline_max:
                    return self._with_specials(lists, how, trusted)
                return await self._in_pool(self._with_specials, lists, how, trusted)
            texts = cast(Texts, inputs)
            if sum(map(len, texts)) + len(prompt) * len(texts) <= INLINE_CHARACTERS_MAX:
                whole = self._encode(texts, how)
            else:
                whole = await self._encode_in_jobs(texts, how)
            if prompt and not self._include_prompt:
                whole = replace(whole, skip=np.minimum(whole.lengths() - 1, np.int32(lead)))
            return whole

    async def _encode_in_jobs(self, texts: Texts, how: Reading) -> Sequences:
        """Ids of all *texts*, on the pool."""
        done: list[Sequences] = []
        first = token_count = 0
        for job in _jobs(texts, prompt_characters=len(how.prompt)):
            if how.long_text is LongText.KEEP and len(job[0]) > JOB_CHARACTERS_MAX:
                done.append(await self._count(job[0], how, first, token_count))
            else:
                done.append(await self._in_pool(self._encode, job, how, first))
            first += len(job)
            token_count += done[-1].token_count
            self._check_token_count(token_count, is_all=first == len(texts))
        return _pack(
            [part.token_ids for part in done],
            np.concatenate([part.lengths() for part in done]),
            {i: cut for part in done for i, cut in part.truncated.items()},
        )

    async def tokenize_chunks(
        self, texts: Texts, *, prompt: str = "", chunk_size: int | None = None
    ) -> Sequences:
        """See `core.ports.TextTokenizer`. Texts are tokenised each alone, whatever lies beside them."""
        if chunk_size is not None:
            whole = await self.tokenize(texts, long_text=LongText.REFUSE, prompt=prompt)
            lead, ends = len(self._prefix), whole.lengths() - len(self._suffix)
            if prompt:
                lead = len(self._codec.encode(prompt)) - len(self._suffix)
            bounds = [np.array([*range(lead, end, chunk_size), end], np.int32) for end in ends]
        else:
            alone = _split(await self.tokenize(texts, long_text=LongText.KEEP))
            opening = np.array(self._codec.encode(prompt, add_special_tokens=False).ids, np.int32)
            parts = [self._prefix, opening, *map(self._without_specials, alone)]
            whole = Sequences.pack([np.concatenate([*parts, self._suffix])])
            bounds = [np.cumsum([len(part) for part in parts], dtype=np.int32)[1:]]
            if whole.token_count > self.token_count_max:
                raise RequestTooLarge(
                    token_count=whole.token_count,
                    token_count_max=self.token_count_max,
                    kind=" with late_chunking, which reads all its texts as one",
                )
        counts = [len(own) - 1 for own in bounds] if chunk_size else np.diff(bounds[0]).tolist()
        if 0 in counts:
            param = f"input[{counts.index(0)}]"
            raise FieldInvalid(f"{param} makes no token of which a chunk could be.", param=param)
        return replace(whole, skip=None, chunks=tuple(bounds))

    async def tokenize_pairs(
        self,
        pairs: Sequence[tuple[str, str]],
        *,
        long_text: LongText,
        document_tokens_max: int | None = None,
    ) -> Sequences:
        """Ids and token types of (query, document) *pairs*, as a cross-encoder reads them.

        Of a pair that is too long only the document is cut; *document_tokens_max* is of a document
        with the special tokens that it would have alone. Raises as `tokenize` does, and
        `TextTooLong` where a query leaves no room for its document.
        """
        texts = list(dict.fromkeys(query for query, _ in pairs))
        encoded = await self.tokenize(texts, long_text=LongText.KEEP)
        query_ids = dict(zip(texts, map(self._without_specials, _split(encoded)), strict=True))
        queries = [query_ids[query] for query, _ in pairs]
        documents = await self.tokenize(
            [document for _, document in pairs],
            long_text=long_text,
            token_count_max=document_tokens_max,
        )
        if documents.token_count <= INLINE_CHARACTERS_MAX:
            joined = self._join_pairs(queries, documents, long_text)
        else:
            joined = await self._in_pool(self._join_pairs, queries, documents, long_text)
        self._check_token_count(joined.token_count, is_all=True)
        return joined

    def token_strings(self, token_ids: Int32Array) -> list[str]:
        """The vocabulary's own strings; empty for an id that the vocabulary leaves out."""
        with panics_are_faults("tokenizer"):
            return [self._codec.id_to_token(token_id) or "" for token_id in token_ids.tolist()]

    async def find_tokens(self, texts: Texts, *, special_tokens: bool) -> list[list[TextToken]]:
        """See `core.ports.TextTokenizer`. Some MB for each 10,000 tokens."""
        found: list[list[TextToken]] = []
        token_count = 0
        for job in _jobs(texts, prompt_characters=0):
            for i, text in enumerate(job, len(found)):
                if len(text.encode("utf-8", "replace")) > self._text_bytes_max:
                    raise self._not_counted(i)
            found += await self._in_pool(self._find_tokens, job, special_tokens)
            token_count += sum(map(len, found[-len(job) :]))
            self._check_token_count(token_count, is_all=len(found) == len(texts))
        return found

    def _find_tokens(self, texts: Texts, special_tokens: bool) -> list[list[TextToken]]:
        with panics_are_faults("tokenizer"):
            read = self._codec.encode_batch(list(texts), add_special_tokens=special_tokens)
        return [
            [
                TextToken(
                    token_id, token if special else text[start:end], bool(special), start, end
                )
                for token_id, token, special, (start, end) in zip(
                    one.ids, one.tokens, one.special_tokens_mask, one.offsets, strict=True
                )
            ]
            for text, one in zip(texts, read, strict=True)
        ]

    async def decode(self, lists: TokenLists, *, special_tokens: bool) -> list[str]:
        """See `core.ports.TextTokenizer`."""
        ids = [one.tolist() for one in lists]
        self._check_known(lists)
        with panics_are_faults("tokenizer"):
            texts: list[str] = await self._in_pool(
                partial(self._codec.decode_batch, ids, skip_special_tokens=not special_tokens)
            )
        return texts

    def _in_pool(self, work: Callable[..., T], *arguments: object) -> Awaitable[T]:
        return asyncio.get_running_loop().run_in_executor(self._pool, work, *arguments)

    def _check_token_count(self, token_count: int, *, is_all: bool) -> None:
        if self.request_tokens_max is not None and token_count > self.request_tokens_max:
            raise RequestTooLarge(
                token_count=token_count,
                token_count_max=self.request_tokens_max,
                is_counted_out=is_all,
            )

    async def _count(self, text: str, how: Reading, first: int, token_count: int) -> Sequences:
        """Ids of a long text; over the byte bound a piece a turn, up to the request's maximum.

        Pieces are cut at blanks, where words are cut anyway; in a word of more than a piece the
        ids at its cuts may differ from those of the whole. *token_count*: of the texts before.
        """
        text, is_over = await self._in_pool(self._shorten, text, LongText.KEEP)
        text, plain = how.prompt + text, replace(how, prompt="", marked=None)
        marker = [] if how.marked is None else [how.marked.token_id]
        ids = [self._prefix, np.array(marker, np.int32)]
        pieces = (match[0] for match in _PIECE.finditer(text)) if is_over else [text]
        for piece in pieces:
            part = await self._in_pool(self._encode, [piece], plain, first)
            ids.append(self._without_specials(part.token_ids))
            token_count += len(ids[-1])
            self._check_token_count(token_count, is_all=False)
        whole = Sequences.pack([np.concatenate([*ids, self._suffix])])
        return self._settle(whole, how, first, over={0} if is_over else set())

    def _encode(self, texts: Texts, how: Reading, first: int = 0) -> Sequences:
        """Ids of neighbouring *texts* of a request, in which the first of them is number *first*."""
        read, over = list(texts), set[int]()
        for i, text in enumerate(texts):
            if 4 * len(text) > self._text_bytes_max:  # no character has more than four
                read[i], is_over = self._shorten(text, how.long_text)
                if is_over:
                    over.add(i)
        if how.prompt:
            read = [how.prompt + text for text in read]
        if over and how.long_text is LongText.REFUSE:
            raise self._not_counted(first + min(over))
        try:
            # Releases the GIL; no offsets, which nobody reads.
            encodings = self._codec.encode_batch_fast(read)
        except TypeError as exc:  # how the library reports a str that is not Unicode
            for i, text in enumerate(texts, first):
                if _LONE_SURROGATE.search(text):
                    raise FieldInvalid(
                        f"input[{i}] holds half of a surrogate pair, which is no character. "
                        "Send well-formed Unicode.",
                        param=f"input[{i}]",
                    ) from exc
            raise
        ids = [encoding.ids for encoding in encodings]
        if how.marked is not None:
            place, marker = len(self._prefix), [how.marked.token_id]
            ids = [one[:place] + marker + one[place:] for one in ids]
        return self._settle(Sequences.pack(ids), how, first, over)

    def _not_counted(self, index: int) -> TextTooLong:
        """The refusal of text number *index*, which is over the bound of bytes."""
        return TextTooLong(
            token_count=None,
            token_count_max=self.token_count_max,
            index=index,
            bytes_max=self._text_bytes_max,
        )

    def _shorten(self, text: str, long_text: LongText) -> tuple[str, bool]:
        """What to read of *text*, and whether the whole is over the bound of bytes.

        Over it, a run of blanks counts as one, unless blanks make tokens; what is over it even so
        is cut to it, unless it is to be kept. *text* is read a piece at a time, since one call for
        megabytes would hold the interpreter.
        """
        parts, size, bytes_max = [], 0, self._text_bytes_max
        if len(text) <= bytes_max and len(text.encode("utf-8", "replace")) <= bytes_max:
            return text, False
        from_start, is_kept = long_text is LongText.CUT_START, long_text is LongText.KEEP
        starts = range(0, len(text), JOB_CHARACTERS_MAX)
        for start in reversed(starts) if from_start else starts:
            parts.append(self._blanks.sub(" ", text[start : start + JOB_CHARACTERS_MAX]))
            size += len(parts[-1].encode("utf-8", "replace"))
            if size > bytes_max and not is_kept:
                break
        joined = "".join(reversed(parts) if from_start else parts)
        if size <= bytes_max or is_kept:
            return joined, size > bytes_max
        encoded = joined.encode("utf-8", "replace")
        kept = encoded[-bytes_max:] if from_start else encoded[:bytes_max]
        return kept.decode("utf-8", "ignore"), True  # a character cut in two is dropped

    def _check_known(self, lists: TokenLists) -> None:
        """Raise `TokenIdUnknown` for an id outside the vocabulary."""
        ids = np.concatenate(lists)  # [tokens]
        unknown = ids[(ids < 0) | (ids >= self.vocabulary_size)]
        if len(unknown):
            i = next(i for i, one in enumerate(lists) if unknown[0] in one)
            raise TokenIdUnknown(
                token_id=int(unknown[0]), vocabulary_size=self.vocabulary_size, param=f"input[{i}]"
            )

    def _with_specials(self, lists: TokenLists, how: Reading, trusted: bool) -> Sequences:
        """A client's ids, checked, and put between special tokens unless they already are."""
        self._check_known(lists)
        if not trusted and self._origin.is_another(lists):
            raise TokenIdsForeign
        prefix, suffix = self._prefix.tobytes(), self._suffix.tobytes()
        parts: list[Int32Array] = []
        lengths: list[int] = []  # [sequences]
        for one in lists:
            assert len(one), "the route refuses an empty array"
            raw = one.tobytes()
            is_whole = raw.startswith(prefix) and raw.endswith(suffix)
            is_whole &= len(one) >= self._special_count
            parts += [one] if is_whole else [self._prefix, one, self._suffix]
            lengths.append(len(one) + (0 if is_whole else self._special_count))
        return self._settle(_pack(parts, lengths), how)

    def _settle(
        self, whole: Sequences, how: Reading, first: int = 0, over: Set[int] = frozenset()
    ) -> Sequences:
        """Refuse, cut or keep what is longer than is read; `truncated` counts from *first*.

        *over*: which texts are over the bound of bytes. Kept for counting, only these are marked.
        """
        count_max, long_text = how.token_count_max, how.long_text
        if not over and whole.token_count <= count_max and self._special_count and not how.marked:
            return whole  # so none of them is longer, and none is empty
        lengths = whole.lengths()
        if self._rules.blank_token_id is None and not lengths.all():
            param = f"input[{first + int(lengths.argmin())}]"
            raise FieldInvalid(f"'{param}' makes no token, and this model adds none.", param=param)
        # Of what is marked none may be longer, though it is kept: no vectors would be the model's.
        is_kept = long_text is LongText.KEEP
        changed = over
        if not is_kept or how.marked is not None:
            changed = over | {*np.flatnonzero(lengths > count_max).tolist()}
        if not changed:
            return self._ruled(whole, how.marked)
        if long_text is LongText.REFUSE:
            i = min(changed)
            raise TextTooLong(
                token_count=int(lengths[i]), token_count_max=count_max, index=first + i
            )
        ids, truncated = _split(whole), {}
        room = count_max - how.lead - len(self._suffix)
        if room < 1 and not is_kept:
            marked_max = None if how.marked is None else how.marked.token_count_max
            model_max = min(self.token_count_max, marked_max or self.token_count_max)
            raise FieldInvalid(
                f"At most {count_max} tokens of a text are read, and {count_max - room} are special "
                "tokens and the prompt, so none is left for the text itself. Allow more tokens, or "
                "shorten the prompt.",
                param="prompt" if count_max == model_max else "token_count_max",
            )
        for i in sorted(changed):
            original = None if i in over and not is_kept else len(ids[i])
            if not is_kept:
                text = _cut(ids[i][how.lead : len(ids[i]) - len(self._suffix)], room, long_text)
                ids[i] = np.concatenate((ids[i][: how.lead], text, self._suffix))
            truncated[first + i] = Truncated(original, min(len(ids[i]), count_max))
        return self._ruled(Sequences.pack(ids, truncated), how.marked)

    def _ruled(self, whole: Sequences, marked: MarkedTexts | None) -> Sequences:
        """*whole* without tokens that have no part in a vector, and with those that fill it up."""
        if marked is None and self._rules.blank_token_id is None:
            return whole
        dropped_id, blank_id = self._rules.dropped_token_id, self._rules.blank_token_id
        ids = _split(whole)
        if dropped_id is not None:
            ids = [one[one != dropped_id] for one in ids]
        if blank_id is not None:
            ids = [one if len(one) else np.array([blank_id], np.int32) for one in ids]
        if marked is not None and marked.filler_id is not None:
            filler = np.full(marked.filled_to, marked.filler_id, np.int32)
            ids = [np.concatenate((one, filler[len(one) :])) for one in ids]
        return Sequences.pack(ids, whole.truncated)

    def _without_specials(self, ids: Int32Array) -> Int32Array:
        """The ids of a text without its special tokens."""
        return ids[len(self._prefix) : len(ids) - len(self._suffix)]

    def _join_pairs(
        self, queries: Sequence[Int32Array], documents: Sequences, long_text: LongText
    ) -> Sequences:
        """A sequence for each of *queries* (without special tokens) with its document."""
        before, between, after = self._pair_specials
        ones = [[1] * len(specials) for specials in self._pair_specials]
        parts: list[Int32Array] = []
        lengths: list[int] = []  # [pairs]
        widths: list[int] = []  # tokens of each type of the template, pair after pair
        truncated: dict[int, Truncated] = {}
        for i, (query, whole) in enumerate(zip(queries, _split(documents), strict=True)):
            document, cut = self._without_specials(whole), documents.truncated.get(i)
            besides = len(before) + len(query) + len(between) + len(after)
            room = self.token_count_max - besides
            original = len(whole) if cut is None else cut.original_tokens  # None: not counted
            if original is not None:
                original += besides - self._special_count
            is_long = len(document) > room and long_text is not LongText.KEEP
            if is_long and (long_text is LongText.REFUSE or room < 1):
                raise TextTooLong(
                    token_count=original or besides + len(document),
                    token_count_max=self.token_count_max,
                    index=i if room > 0 else None,
                )
            if is_long:
                document = _cut(document, room, long_text)
            parts += (before, query, between, document, after)
            lengths.append(besides + len(document))
            widths += [*ones[0], len(query), *ones[1], len(document), *ones[2]]
            if is_long or cut is not None:
                truncated[i] = Truncated(original, min(lengths[i], self.token_count_max))
        types = None
        if self._pair_types is not None:
            types = np.repeat(np.tile(np.array(self._pair_types, np.int32), len(queries)), widths)
        return _pack(parts, lengths, truncated, types)


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


def _blank_runs(codec: tokenizers.Tokenizer) -> re.Pattern[str]:
    """Runs of those characters of which any number is one space to *codec*."""

    def ids_with(blanks: str) -> list[list[int]]:
        return [codec.encode(text).ids for text in (f"a{blanks}a", f"a{blanks}", f"{blanks}a")]

    one = ids_with(" ")
    found = [blank for blank in BLANKS if all(ids_with(blank * n) == one for n in (1, 2, 3, 64))]
    return re.compile(f"[{re.escape(''.join(found))}]{{2,}}" if found else "(?!)")


def _pack(
    parts: Sequence[Int32Array],
    lengths: ArrayLike,  # [sequences]
    truncated: Mapping[int, Truncated] = NOTHING_TRUNCATED,
    token_types: Int32Array | None = None,
) -> Sequences:
    """*parts* laid end to end, which are sequences of these *lengths*."""
    starts = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)  # [sequences + 1]
    return Sequences(np.concatenate(parts), starts, truncated, token_types)


def _split(sequences: Sequences) -> list[Int32Array]:
    return np.split(sequences.token_ids, sequences.cu_seqlens[1:-1])


def _cut(text_ids: Int32Array, room: int, long_text: LongText) -> Int32Array:
    from_start = long_text is LongText.CUT_START
    return text_ids[max(0, len(text_ids) - room) :] if from_start else text_ids[:room]


def _jobs(texts: Texts, *, prompt_characters: int) -> Iterator[Texts]:
    """*texts* cut into neighbours of at most `JOB_CHARACTERS_MAX`; a longer text goes alone."""
    first, characters = 0, 0
    for i, text in enumerate(texts):
        own = prompt_characters + len(text)
        if characters and characters + own > JOB_CHARACTERS_MAX:
            yield texts[first:i]
            first, characters = i, 0
        characters += own
    yield texts[first:]
