"""Sequences with chunks: all texts read as one, or each text cut after it is read whole."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.tokenizer.test_tokenizer import ids_of, saved, text_of, word_codec

from trivec.core.errors import FieldInvalid, RequestTooLarge, TextTooLong
from trivec.core.types import Sequences
from trivec.tokenizer import Tokenizer


@pytest.fixture
def words(tmp_path: Path) -> Iterator[Tokenizer]:
    """At most ten tokens, of which two are special."""
    with ThreadPoolExecutor(2) as pool:
        yield saved(word_codec(), tmp_path, pool, token_count_max=10)


def bounds_of(sequences: Sequences) -> list[list[int]]:
    assert sequences.chunks is not None
    return [own.tolist() for own in sequences.chunks]


async def test_texts_are_read_as_one_and_each_is_a_chunk(words: Tokenizer) -> None:
    found = await words.tokenize_chunks(["w0 w1", "w2", "w3 w4 w5"])
    assert ids_of(found) == [[0, 4, 5, 6, 7, 8, 9, 2]]
    assert bounds_of(found) == [[1, 3, 4, 7]]


async def test_a_prompt_is_there_once_and_in_no_chunk(words: Tokenizer) -> None:
    found = await words.tokenize_chunks(["w0 w1", "w2"], prompt="w8 w9 ")
    assert ids_of(found) == [[0, 12, 13, 4, 5, 6, 2]]
    assert bounds_of(found) == [[3, 5, 6]]


async def test_a_text_is_cut_into_chunks_of_so_many_tokens(words: Tokenizer) -> None:
    texts = ["w0 w1 w2 w3 w4", "w5 w6"]
    found = await words.tokenize_chunks(texts, chunk_size=2)
    assert ids_of(found) == [[0, 4, 5, 6, 7, 8, 2], [0, 9, 10, 2]]
    assert bounds_of(found) == [[1, 3, 5, 6], [1, 3]]
    prompted = await words.tokenize_chunks(texts, chunk_size=2, prompt="w8 ")
    assert bounds_of(prompted) == [[2, 4, 6, 7], [2, 4]]


async def test_what_the_model_does_not_read_is_refused(words: Tokenizer) -> None:
    await words.tokenize_chunks([text_of(*range(4))] * 2)
    with pytest.raises(RequestTooLarge, match="per request with late_chunking"):
        await words.tokenize_chunks([text_of(*range(4)), text_of(*range(5))])
    with pytest.raises(TextTooLong) as refusal:
        await words.tokenize_chunks(["w0", text_of(*range(9))], chunk_size=2)
    assert refusal.value.index == 1


@pytest.mark.parametrize("chunk_size", [None, 2], ids=["texts", "sizes"])
async def test_a_text_without_a_token_has_no_chunk(
    words: Tokenizer, chunk_size: int | None
) -> None:
    with pytest.raises(FieldInvalid, match=r"input\[1\] makes no token") as refusal:
        await words.tokenize_chunks(["w0", " "], chunk_size=chunk_size)
    assert refusal.value.param == "input[1]"
