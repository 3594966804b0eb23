"""Text to token ids and back, by the checkpoint's own `tokenizer.json`, and what to do with long texts.

It knows texts, ids and one length; not batches, keys or devices. The same text has the same ids on
any thread. Two oddities of the hub's pipelines are kept for parity with other hosts: trailing
blanks become a bare "▁", and a literal `</s>` in a text becomes the special id.
"""

import asyncio
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
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
# seen before) to 0.5 µs a character. Up to this size the event loop does it (decision 0041).
INLINE_CHARACTERS_MAX = 256

# One job of the pool: 10 to 100 ms of work, so that a huge request takes turns with the others.
JOB_CHARACTERS_MAX = 64 * 1024

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Job:
    """Neighbouring texts of one request, encoded in one call."""

    first: int  # index of texts[0] in the request
    texts: Sequence[str]


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
    ) -> None:
        """*request_tokens_max*: of all texts of a call."""
        self.token_count_max = token_count_max
        self.request_tokens_max = request_tokens_max
        self.vocabulary_size = vocabulary_size
        self._pool = pool
        self._codec = _load(file)
        self._opening, self._closing = _special_ids(self._codec, file)
        self._origin = TokenOrigin(self._codec)
        self._blanks = _blank_runs(self._codec)
        _refuse_foreign_ids(self._codec, file, vocabulary_size)

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
            return await self._tokenize_any(inputs, long_text, are_own=are_own)

    async def _tokenize_any(
        self, inputs: Texts | TokenLists, long_text: LongText, *, are_own: bool
    ) -> Sequences:
        if isinstance(inputs[0], str):
            return await self._tokenize_texts(cast(Texts, inputs), long_text)
        lists = cast(TokenLists, inputs)
        id_count = sum(map(len, lists))
        if not are_own:
            is_small = id_count <= INLINE_CHARACTERS_MAX
            await self._do(partial(self._refuse_foreign, lists), inline=is_small)
        is_small = id_count <= JOB_CHARACTERS_MAX
        return await self._do(partial(self._adopt, lists, long_text), inline=is_small)

    def token_strings(self, token_ids: Int32Array) -> list[str]:
        """The vocabulary's own strings; empty for an id that the vocabulary leaves out."""
        with panics_are_faults("tokenizer"):
            return [self._codec.id_to_token(token_id) or "" for token_id in token_ids.tolist()]

    async def _tokenize_texts(self, texts: Texts, long_text: LongText) -> Sequences:
        sizes = list(map(len, texts))
        if sum(sizes) <= INLINE_CHARACTERS_MAX:
            return self._encode(Job(0, texts), long_text)
        done: list[Sequences] = []
        for job in _jobs(texts, sizes):
            if long_text is LongText.KEEP and self._is_huge(job):
                done.append(await self._count(job, done, text_count=len(texts)))
            else:
                done.append(await self._do(partial(self._encode, job, long_text)))
            self._refuse_too_many(done, text_count=len(texts))
        return done[0] if len(done) == 1 else _join(done)

    def _is_huge(self, job: Job) -> bool:
        """Whether *job* is one text, over the byte bound and over what is tokenised in one turn."""
        text = job.texts[0]
        return len(text) > JOB_CHARACTERS_MAX and _exceeds(text, self._text_bytes_max)

    async def _count(self, job: Job, done: Sequence[Sequences], *, text_count: int) -> Sequences:
        """The ids of a huge text, tokenised a piece a turn and no further than the request's bound.

        Pieces are cut at blanks, where words are cut anyway; in a word of more than a piece the
        ids at its cuts may differ from those of the whole.
        """
        text, is_within = await self._do(partial(self._shorten, job.texts[0], LongText.KEEP))
        ids = [np.array([self._opening], np.int32)]
        for piece in _pieces(text):
            part = await self._do(partial(self._encode, Job(job.first, [piece]), LongText.KEEP))
            ids.append(part.token_ids[1:-1])
            so_far = Sequences.pack([np.concatenate(ids)])
            self._refuse_too_many([*done, so_far], text_count=text_count + 1)
        whole = Sequences.pack([np.concatenate([*ids, [self._closing]])])
        return whole if is_within else self._mark_over(whole, frozenset({0}))

    def _refuse_too_many(self, done: Sequence[Sequences], *, text_count: int) -> None:
        token_count = sum(part.token_count for part in done)
        if self.request_tokens_max is not None and token_count > self.request_tokens_max:
            raise RequestTooLarge(
                token_count=token_count,
                token_count_max=self.request_tokens_max,
                is_counted_out=sum(map(len, done)) == text_count,
            )

    async def _do(self, work: Callable[[], T], *, inline: bool = False) -> T:
        if inline:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def _encode(self, job: Job, long_text: LongText) -> Sequences:
        texts, cut = self._bound_bytes(job, long_text)
        try:
            # Releases the GIL; no offsets, which nobody reads.
            encodings = self._codec.encode_batch_fast(texts)
        except TypeError as exc:  # how the library reports a str that is not Unicode
            raise _lone_surrogate(job) from exc
        ids = [encoding.ids for encoding in encodings]
        return self._settle(Sequences.pack(ids), job.first, long_text, cut)

    @property
    def _text_bytes_max(self) -> int:
        return TEXT_BYTES_A_TOKEN * self.token_count_max

    def _bound_bytes(self, job: Job, long_text: LongText) -> tuple[Sequence[str], frozenset[int]]:
        """The job's texts, and which are over the byte bound, and cut to it unless they are kept."""
        huge = [i for i, text in enumerate(job.texts) if _exceeds(text, self._text_bytes_max)]
        if not huge:
            return job.texts, frozenset()
        texts, over = list(job.texts), set()
        for i in huge:
            texts[i], is_within = self._shorten(texts[i], long_text)
            if is_within:
                continue
            if long_text is LongText.REFUSE:
                raise TextTooLong(
                    token_count=None,
                    token_count_max=self.token_count_max,
                    index=job.first + i,
                    bytes_max=self._text_bytes_max,
                )
            over.add(i)
        return texts, frozenset(over)

    def _shorten(self, text: str, long_text: LongText) -> tuple[str, bool]:
        """*text* with each run of blanks as one, and whether it is within the byte bound so.

        Otherwise it is cut to the bound unless it is to be kept. Where blanks make tokens each
        counts. It is read a piece at a time: one call for megabytes would hold the interpreter.
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
            return joined, size <= bytes_max
        encoded = joined.encode("utf-8", "replace")
        kept = encoded[-bytes_max:] if from_start else encoded[:bytes_max]
        return kept.decode("utf-8", "ignore"), False  # a character cut in two is dropped

    def _mark_over(self, whole: Sequences, over: frozenset[int]) -> Sequences:
        """Say of texts that are kept which are over the byte bound: no embedding reads them whole."""
        counts = whole.lengths().tolist()
        marks = {i: Truncated(counts[i], min(counts[i], self.token_count_max)) for i in over}
        return Sequences(whole.token_ids, whole.cu_seqlens, marks)

    def _adopt(self, lists: TokenLists, long_text: LongText) -> Sequences:
        """The client's own ids, checked, and wrapped in special tokens unless they already are."""
        given = Sequences.pack(lists)
        self._refuse_unknown(given)
        lengths = given.lengths()  # [sequences]
        assert lengths.all(), "the route refuses an empty array"
        is_bare = ~(
            (lengths >= 2)
            & (given.token_ids[given.cu_seqlens[:-1]] == self._opening)
            & (given.token_ids[given.cu_seqlens[1:] - 1] == self._closing)
        )
        starts = np.zeros_like(given.cu_seqlens)
        np.cumsum(lengths + 2 * is_bare, out=starts[1:])
        token_ids = np.empty(int(starts[-1]), np.int32)
        token_ids[starts[:-1]] = self._opening
        token_ids[starts[1:] - 1] = self._closing
        moved = np.repeat(starts[:-1] - given.cu_seqlens[:-1] + is_bare, lengths)  # [given tokens]
        token_ids[np.arange(given.token_count) + moved] = given.token_ids
        return self._settle(Sequences(token_ids, starts), 0, long_text, frozenset())

    def _refuse_foreign(self, lists: TokenLists) -> None:
        self._refuse_unknown(Sequences.pack(lists))
        if self._origin.looks_foreign(lists):
            raise TokenIdsForeign

    def _refuse_unknown(self, given: Sequences) -> None:
        is_unknown = (given.token_ids < 0) | (given.token_ids >= self.vocabulary_size)
        if not is_unknown.any():
            return
        at = int(is_unknown.argmax())
        sequence = int(np.searchsorted(given.cu_seqlens, at, side="right")) - 1
        raise TokenIdUnknown(
            token_id=int(given.token_ids[at]),
            vocabulary_size=self.vocabulary_size,
            param=f"input[{sequence}]",
        )

    def _settle(
        self, whole: Sequences, first: int, long_text: LongText, cut: frozenset[int]
    ) -> Sequences:
        """Refuse, cut or keep what is longer than the model reads. *cut*: texts over the byte bound."""
        if not cut and whole.token_count <= self.token_count_max:
            return whole  # so none of them is longer
        lengths = whole.lengths()
        long = np.flatnonzero(lengths > self.token_count_max).tolist()
        if not long and not cut:
            return whole
        if long_text is LongText.KEEP:
            return self._mark_over(whole, cut)
        if long_text is LongText.REFUSE:
            raise TextTooLong(
                token_count=int(lengths[long[0]]),
                token_count_max=self.token_count_max,
                index=first + long[0],
            )
        ids = np.split(whole.token_ids, whole.cu_seqlens[1:-1])
        truncated = {}
        for i in sorted({*long, *cut}):
            original = None if i in cut else len(ids[i])
            ids[i] = self._cut(ids[i], from_start=long_text is LongText.CUT_START)
            truncated[i] = Truncated(original_tokens=original, kept_tokens=len(ids[i]))
        return Sequences.pack(ids, truncated)

    def _cut(self, ids: Int32Array, *, from_start: bool) -> Int32Array:
        """At most `token_count_max` of *ids*, both special tokens still in their places."""
        kept = self.token_count_max
        if len(ids) <= kept:
            return ids
        if from_start:
            return np.concatenate(([self._opening], ids[len(ids) - kept + 1 :])).astype(np.int32)
        return np.concatenate((ids[: kept - 1], [self._closing])).astype(np.int32)


def _load(file: Path) -> tokenizers.Tokenizer:
    try:
        codec = tokenizers.Tokenizer.from_file(str(file))
    except Exception as exc:  # the library raises nothing narrower
        raise CheckpointRefused(
            f"{file} cannot be read as a tokenizer: {exc}. Fetch the model again."
        ) from exc
    codec.no_padding()
    codec.no_truncation()
    return codec


def _special_ids(codec: tokenizers.Tokenizer, file: Path) -> tuple[int, int]:
    """The ids around every text; the BERT family has exactly one on each side."""
    empty = codec.encode("").ids
    if len(empty) != 2:
        raise CheckpointRefused(
            f"{file} puts {len(empty)} special tokens around a text; only one before and one "
            "after it is understood. Take the tokenizer.json that belongs to this model."
        )
    return empty[0], empty[1]


def _refuse_foreign_ids(codec: tokenizers.Tokenizer, file: Path, vocabulary_size: int) -> None:
    """Ids that the embedding table does not hold would be read outside of it."""
    added = codec.get_added_tokens_decoder()
    id_count = max([codec.get_vocab_size(with_added_tokens=False), *(i + 1 for i in added)])
    if id_count > vocabulary_size:
        raise CheckpointRefused(
            f"{file} has token ids up to {id_count - 1}, but the model's vocabulary has "
            f"{vocabulary_size}. Take the tokenizer.json that belongs to this model."
        )


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


def _lone_surrogate(job: Job) -> Exception:
    for i, text in enumerate(job.texts):
        try:
            text.encode()
        except UnicodeEncodeError:
            return FieldInvalid(
                f"input[{job.first + i}] holds half of a surrogate pair, which is no character. "
                "Send well-formed Unicode.",
                param=f"input[{job.first + i}]",
            )
    return EngineFault("the tokenizer refused a text that is well-formed Unicode")


def _jobs(texts: Texts, sizes: Sequence[int]) -> Iterator[Job]:
    """*texts* cut into neighbours of at most `JOB_CHARACTERS_MAX`; a longer text goes alone."""
    first, characters = 0, 0
    for i, size in enumerate(sizes):
        if characters and characters + size > JOB_CHARACTERS_MAX:
            yield Job(first, texts[first:i])
            first, characters = i, 0
        characters += size
    yield Job(first, texts[first:])


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
