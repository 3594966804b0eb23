"""A prompt before every text: never cut, counted, and left out of the mean where the model says so."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.tokenizer.test_tokenizer import ids_of, saved, text_of, word_codec
from tokenizers import processors

from trivec.core.errors import FieldInvalid, TextTooLong
from trivec.core.types import LongText, Truncated
from trivec.tokenizer import JOB_CHARACTERS_MAX, Tokenizer

PROMPT = "w8 w9 "  # ids 12 and 13


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


@pytest.fixture
def words(tmp_path: Path, pool: ThreadPoolExecutor) -> Tokenizer:
    """At most six tokens, of which two are special."""
    return saved(word_codec(), tmp_path, pool)


@pytest.fixture
def skipping(tmp_path: Path, pool: ThreadPoolExecutor) -> Tokenizer:
    return saved(word_codec(), tmp_path, pool, include_prompt=False)


async def test_a_prompt_is_before_every_text(words: Tokenizer) -> None:
    found = await words.tokenize(["w0", "w1 w2"], long_text=LongText.REFUSE, prompt=PROMPT)
    assert ids_of(found) == [[0, 12, 13, 4, 2], [0, 12, 13, 5, 6, 2]]
    assert found.skip is None


@pytest.mark.parametrize(
    ("long_text", "kept"),
    [
        pytest.param(LongText.CUT_END, [0, 12, 13, 4, 5, 2], id="the-end-is-cut"),
        pytest.param(LongText.CUT_START, [0, 12, 13, 11, 12, 2], id="the-start-is-cut"),
    ],
)
@pytest.mark.parametrize("blanks", [0, 500], ids=["a-short-text", "a-text-over-the-bound-of-bytes"])
async def test_a_cut_text_keeps_its_prompt(
    words: Tokenizer, long_text: LongText, kept: list[int], blanks: int
) -> None:
    text = text_of(*range(9)) if not blanks else text_of(0, 1, *[5] * 200, 7, 8)
    found = await words.tokenize([text], long_text=long_text, prompt=PROMPT)
    assert ids_of(found) == [kept]
    assert found.truncated == {0: Truncated(None if blanks else 13, 6)}


async def test_a_prompt_counts_against_the_models_length(words: Tokenizer) -> None:
    await words.tokenize([text_of(0, 1)], long_text=LongText.REFUSE, prompt=PROMPT)
    with pytest.raises(TextTooLong, match="requested 7 tokens"):
        await words.tokenize([text_of(0, 1, 2)], long_text=LongText.REFUSE, prompt=PROMPT)


async def test_a_prompt_that_leaves_no_token_for_a_text_is_refused(words: Tokenizer) -> None:
    says = "At most 6 tokens of a text are read, and 6 are special tokens and the prompt"
    with pytest.raises(FieldInvalid, match=says) as refused:
        await words.tokenize(["w0"], long_text=LongText.CUT_END, prompt=text_of(0, 1, 2, 3) + " ")
    assert refused.value.param == "prompt"


async def test_a_text_cut_to_nothing_is_refused_by_the_number(words: Tokenizer) -> None:
    with pytest.raises(FieldInvalid, match="At most 2 tokens of a text are read") as refused:
        await words.tokenize(["w0"], long_text=LongText.CUT_END, token_count_max=2)
    assert refused.value.param == "token_count_max"


@pytest.mark.parametrize("long_text", [LongText.CUT_END, LongText.KEEP], ids=lambda one: one.value)
async def test_large_requests_have_the_prompt_in_every_job(
    words: Tokenizer, long_text: LongText
) -> None:
    texts = [f"w{i % 2}" + " " * 300 for i in range(2 * JOB_CHARACTERS_MAX // 300)]
    found = await words.tokenize(texts, long_text=long_text, prompt=PROMPT)
    assert ids_of(found) == [[0, 12, 13, 4 + i % 2, 2] for i in range(len(texts))]


async def test_a_text_counted_a_piece_a_turn_has_its_prompt_once(words: Tokenizer) -> None:
    text = "w1 " * JOB_CHARACTERS_MAX
    found = await words.tokenize([text], long_text=LongText.KEEP, prompt=PROMPT)
    assert ids_of(found) == [[0, 12, 13, *[5] * JOB_CHARACTERS_MAX, 2]]


@pytest.mark.parametrize(
    ("template", "skip"),
    [
        pytest.param("<s> $A </s>", 3, id="both-sides"),
        pytest.param("$A </s>", 2, id="after"),
        pytest.param("<s> $A", 3, id="before"),
    ],
)
async def test_a_mean_leaves_out_the_prompt_and_what_opens_the_text(
    template: str, skip: int, tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    """As sentence-transformers counts: the ids of the prompt alone, but for a closing one."""
    codec = word_codec()
    codec.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    model = saved(codec, tmp_path, pool, include_prompt=False)
    found = await model.tokenize(["w0", "w1 w2"], long_text=LongText.CUT_END, prompt=PROMPT)
    assert found.skip is not None
    assert found.skip.dtype == np.int32
    assert found.skip.tolist() == [skip, skip]


async def test_a_mean_is_of_one_token_at_least(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    codec = word_codec()
    codec.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    model = saved(codec, tmp_path, pool, include_prompt=False)
    found = await model.tokenize([" "], long_text=LongText.REFUSE, prompt=PROMPT)
    assert found.skip is not None
    assert found.skip.tolist() == [found.token_count - 1]


async def test_without_a_prompt_nothing_is_left_out(skipping: Tokenizer) -> None:
    assert (await skipping.tokenize(["w0"], long_text=LongText.REFUSE)).skip is None


@pytest.mark.parametrize("given", ["w0 w1 w2", np.array([4, 5, 6], np.int32)], ids=["text", "ids"])
@pytest.mark.parametrize(
    ("long_text", "kept"),
    [(LongText.CUT_END, [0, 4, 2]), (LongText.CUT_START, [0, 6, 2])],
    ids=["end", "start"],
)
async def test_fewer_tokens_than_the_model_reads(
    words: Tokenizer, given: Any, long_text: LongText, kept: list[int]
) -> None:
    found = await words.tokenize([given], long_text=long_text, token_count_max=3)
    assert ids_of(found) == [kept]
    assert found.truncated == {0: Truncated(5, 3)}


async def test_more_tokens_than_the_model_reads_are_never_read(words: Tokenizer) -> None:
    found = await words.tokenize(
        [text_of(*range(9))], long_text=LongText.CUT_END, token_count_max=9
    )
    assert found.truncated == {0: Truncated(11, 6)}
