"""Text to ids: parity with the hub's pipelines, long texts, the client's own ids, hostile input."""

import asyncio
import json
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import tokenizers
from tests.support.dummy.tokenizer import write_tokenizer
from tokenizers import models, normalizers, pre_tokenizers, processors

from trivec import tokenizer as module
from trivec.core.errors import (
    CheckpointRefused,
    EngineFault,
    FieldInvalid,
    RequestError,
    RequestTooLarge,
    TextTooLong,
    TokenIdUnknown,
)
from trivec.core.types import LongText, MarkedTexts, Sequences, TokenRules, Truncated
from trivec.tokenizer import JOB_CHARACTERS_MAX, Tokenizer

T = TypeVar("T")
WORDS = ["<s>", "<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(16))]
OPENING, CLOSING, UNKNOWN = 0, 2, 3


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def word_codec() -> tokenizers.Tokenizer:
    """A tokenizer of one id a word: `w5` is 9."""
    codec = tokenizers.Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    codec.normalizer = normalizers.Lowercase()
    codec.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    codec.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", OPENING), ("</s>", CLOSING)]
    )
    return codec


@pytest.fixture
def words(tmp_path: Path, pool: ThreadPoolExecutor) -> Tokenizer:
    return saved(word_codec(), tmp_path, pool)


def saved(codec: tokenizers.Tokenizer, folder: Path, pool: Executor, **options: Any) -> Tokenizer:
    file = folder / "tokenizer.json"
    codec.save(str(file))
    options = {"token_count_max": 6, "vocabulary_size": len(WORDS)} | options
    return Tokenizer(file, pool=pool, **options)


def ids_of(sequences: Sequences) -> list[list[int]]:
    parts = np.split(sequences.token_ids, sequences.cu_seqlens[1:-1])
    return [part.tolist() for part in parts]


def text_of(*numbers: int) -> str:
    return " ".join(f"w{number}" for number in numbers)


async def test_texts_become_ids_between_special_tokens_in_their_order(words: Tokenizer) -> None:
    found = await words.tokenize(["w0 W1", "w2", " "], long_text=LongText.REFUSE)
    assert ids_of(found) == [[0, 4, 5, 2], [0, 6, 2], [0, 2]]
    assert found.token_ids.dtype == found.cu_seqlens.dtype == np.int32
    assert not found.truncated


async def test_padding_and_truncation_in_the_file_are_switched_off(
    tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    codec = word_codec()
    codec.enable_padding(length=32)
    codec.enable_truncation(4)
    words = saved(codec, tmp_path, pool)
    found = await words.tokenize(["w0", text_of(0, 1, 2, 3)], long_text=LongText.REFUSE)
    assert ids_of(found) == [[0, 4, 2], [0, 4, 5, 6, 7, 2]]


async def test_the_longest_text_is_read_and_one_token_more_is_refused(words: Tokenizer) -> None:
    await words.tokenize([text_of(0, 1, 2, 3)], long_text=LongText.REFUSE)
    with pytest.raises(TextTooLong, match="requested 7 tokens") as refusal:
        await words.tokenize(
            ["w0", text_of(*range(5)), text_of(*range(9))], long_text=LongText.REFUSE
        )
    assert (refusal.value.index, refusal.value.param) == (1, "input[1]")


@pytest.mark.parametrize(
    ("long_text", "kept"),
    [
        pytest.param(LongText.CUT_END, [0, 4, 5, 6, 7, 2], id="the-end-is-cut"),
        pytest.param(LongText.CUT_START, [0, 9, 10, 11, 12, 2], id="the-start-is-cut"),
    ],
)
async def test_a_cut_text_keeps_both_special_tokens_and_is_reported(
    words: Tokenizer, long_text: LongText, kept: list[int]
) -> None:
    found = await words.tokenize(["w1", text_of(*range(9)), "w2"], long_text=long_text)
    assert ids_of(found) == [[0, 5, 2], kept, [0, 6, 2]]
    assert found.truncated == {1: Truncated(original_tokens=11, kept_tokens=6)}


async def test_a_long_text_is_kept_whole_for_counting(words: Tokenizer) -> None:
    found = await words.tokenize([text_of(*range(9))], long_text=LongText.KEEP)
    assert found.lengths().tolist() == [11]
    assert not found.truncated


async def test_a_text_over_64_bytes_a_token_is_refused_unread(words: Tokenizer) -> None:
    fits = "x" * (64 * 6)
    await words.tokenize([fits], long_text=LongText.REFUSE)
    with pytest.raises(TextTooLong, match="more than 384 bytes, 64 for each token") as refusal:
        await words.tokenize(["w0", fits + "x"], long_text=LongText.REFUSE)
    assert refusal.value.index == 1
    with pytest.raises(TextTooLong):
        await words.tokenize(["ü" * (64 * 3) + "x"], long_text=LongText.REFUSE)


async def test_a_text_over_64_bytes_a_token_is_counted_and_does_not_fit(words: Tokenizer) -> None:
    found = await words.tokenize(["w0", "x" * 385, text_of(*[1] * 200)], long_text=LongText.KEEP)
    assert ids_of(found) == [[0, 4, 2], [0, UNKNOWN, 2], [0, *[5] * 200, 2]]
    assert found.truncated == {1: Truncated(3, 3), 2: Truncated(202, 6)}


@pytest.mark.parametrize("blank", [" ", "\n", "\r\n", "\t \u3000"], ids=ascii)
@pytest.mark.parametrize("long_text", list(LongText))
async def test_a_run_of_blanks_counts_once(
    words: Tokenizer, long_text: LongText, blank: str
) -> None:
    run = blank * 60_000  # two pieces and more
    texts = ["w0", f"{run}w1{run}w2{run}"]
    found = await words.tokenize(texts, long_text=long_text)
    assert ids_of(found) == [[0, 4, 2], [0, 5, 6, 2]]
    assert not found.truncated


async def test_what_is_still_too_long_without_its_blanks_is_cut_to_its_words(
    words: Tokenizer,
) -> None:
    text = "\n" * 70_000 + text_of(*[1] * 200) + "\n" * 70_000 + text_of(*[2] * 200)
    found = await words.tokenize([text], long_text=LongText.CUT_END)
    assert ids_of(found) == [[0, 5, 5, 5, 5, 2]]
    found = await words.tokenize([text + "\n" * 70_000], long_text=LongText.CUT_START)
    assert ids_of(found) == [[0, 6, 6, 6, 6, 2]]
    assert found.truncated == {0: Truncated(None, 6)}


async def test_blanks_that_make_tokens_count_each(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    codec = word_codec()
    codec.normalizer = None
    codec.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    words = saved(codec, tmp_path, pool)
    found = await words.tokenize([" " * 500 + "w1"], long_text=LongText.CUT_END)
    assert ids_of(found) == [[0, *[UNKNOWN] * 4, 2]]
    with pytest.raises(TextTooLong):
        await words.tokenize([" " * 500 + "w1"], long_text=LongText.REFUSE)


async def test_a_huge_text_is_counted_a_piece_a_turn_and_to_the_bound(tmp_path: Path) -> None:
    pool = Counting()
    words = saved(word_codec(), tmp_path, pool, request_tokens_max=100_000)
    text = text_of(*(i % 16 for i in range(50_000)))
    found = await words.tokenize(["w0", text], long_text=LongText.KEEP)
    assert found.lengths().tolist() == [3, 50_002]
    assert ids_of(found)[1] == [0, *(4 + i % 16 for i in range(50_000)), 2]
    assert pool.jobs >= len(text) // JOB_CHARACTERS_MAX
    pool.jobs = 0
    with pytest.raises(RequestTooLarge, match="or more tokens, max 100000"):
        await words.tokenize([" ".join([text] * 20)], long_text=LongText.KEEP)
    assert pool.jobs < 2 * 100_000 * len("w00 ") // JOB_CHARACTERS_MAX


@pytest.mark.parametrize(
    ("long_text", "kept"),
    [
        pytest.param(LongText.CUT_END, [0, 4, 4, 4, 4, 2], id="its-beginning-is-read"),
        pytest.param(LongText.CUT_START, [0, 5, 5, 5, 5, 2], id="its-end-is-read"),
    ],
)
async def test_of_a_text_over_64_bytes_a_token_only_that_much_is_read_when_it_may_be_cut(
    words: Tokenizer, long_text: LongText, kept: list[int]
) -> None:
    huge = "w0 " * 1_000 + "é" * 100_000 + " w1" * 1_000
    found = await words.tokenize(["w9", huge], long_text=long_text)
    assert ids_of(found) == [[0, 13, 2], kept]
    assert found.truncated == {1: Truncated(original_tokens=None, kept_tokens=6)}


async def test_a_text_that_shrinks_to_few_tokens_is_still_reported_as_cut(
    words: Tokenizer,
) -> None:
    found = await words.tokenize(["é" * 1_000], long_text=LongText.CUT_END)
    assert ids_of(found) == [[0, UNKNOWN, 2]]
    assert found.truncated == {0: Truncated(original_tokens=None, kept_tokens=3)}


@pytest.mark.parametrize(
    ("given", "found"),
    [
        pytest.param([4, 5], [0, 4, 5, 2], id="bare-ids-are-wrapped"),
        pytest.param([0, 4, 2], [0, 4, 2], id="wrapped-ids-stay"),
        pytest.param([0, 4], [0, 0, 4, 2], id="half-wrapped-ids-are-wrapped"),
        pytest.param([0], [0, 0, 2], id="a-lone-opening-is-wrapped"),
        pytest.param([0, 2], [0, 2], id="an-empty-wrapping-stays"),
    ],
)
async def test_ids_of_the_client(words: Tokenizer, given: list[int], found: list[int]) -> None:
    neighbours = [np.array(ids, np.int32) for ids in ([9, 9], given, [0, 8, 2])]
    sequences = await words.tokenize(neighbours, long_text=LongText.REFUSE)
    assert ids_of(sequences) == [[0, 9, 9, 2], found, [0, 8, 2]]


async def test_ids_of_the_client_are_cut_as_texts_are(words: Tokenizer) -> None:
    given = [np.array([4, 5, 6, 7, 8], np.int32)]
    with pytest.raises(TextTooLong, match="requested 7 tokens"):
        await words.tokenize(given, long_text=LongText.REFUSE)
    found = await words.tokenize(given, long_text=LongText.CUT_START)
    assert ids_of(found) == [[0, 5, 6, 7, 8, 2]]


@pytest.mark.parametrize("unknown", [-1, len(WORDS), 2**31 - 1, -(2**31)])
async def test_an_id_outside_the_vocabulary_is_refused_by_its_place(
    words: Tokenizer, unknown: int
) -> None:
    given = [np.array(ids, np.int32) for ids in ([4], [5, len(WORDS) - 1], [4, unknown])]
    with pytest.raises(TokenIdUnknown, match=str(unknown)) as refusal:
        await words.tokenize(given, long_text=LongText.REFUSE)
    assert refusal.value.param == "input[2]"


async def test_a_lone_surrogate_is_refused_by_its_place(words: Tokenizer) -> None:
    with pytest.raises(FieldInvalid) as refusal:
        await words.tokenize(["w0", "\ud800"], long_text=LongText.REFUSE)
    assert refusal.value.param == "input[1]"
    with pytest.raises(FieldInvalid):
        await words.tokenize(["\udfff" * 90], long_text=LongText.REFUSE)
    with pytest.raises(FieldInvalid) as refusal:  # in a text that is counted a piece a turn
        await words.tokenize(["w0", "w1 " * 60_000 + "\ud800"], long_text=LongText.KEEP)
    assert refusal.value.param == "input[1]"


def test_ids_are_spelt_as_the_vocabulary_does(words: Tokenizer) -> None:
    assert words.token_strings(np.array([4, 19, 2], np.int32)) == ["w0", "w15", "</s>"]


def test_a_file_that_is_no_tokenizer_is_refused_by_name(
    tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")
    with pytest.raises(CheckpointRefused, match=r"tokenizer\.json"):
        Tokenizer(file, token_count_max=6, vocabulary_size=20, pool=pool)


def test_a_tokenizer_larger_than_the_embedding_table_is_refused(
    tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    with pytest.raises(CheckpointRefused, match="up to 19"):
        saved(word_codec(), tmp_path, pool, vocabulary_size=19)
    grown = word_codec()
    grown.add_special_tokens(["<extra>"])
    with pytest.raises(CheckpointRefused, match="up to 20"):
        saved(grown, tmp_path, pool)


SPECIALS = {
    "before-and-after": ("<s> $A </s>", [0], [2]),
    "after-only": ("$A </s>", [], [2]),
    "before-only": ("<s> $A", [0], []),
    "several": ("<s> <unk> $A <pad> </s>", [0, 3], [1, 2]),
    "none": ("$A", [], []),
}


@pytest.mark.parametrize(("single", "before", "after"), SPECIALS.values(), ids=SPECIALS.keys())
async def test_special_tokens_are_those_of_the_files_post_processor(
    single: str, before: list[int], after: list[int], tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    codec = word_codec()
    special_tokens = [(word, i) for i, word in enumerate(WORDS[:4])]
    codec.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=special_tokens
    )
    words = saved(codec, tmp_path, pool, token_count_max=8)
    room = 8 - len(before) - len(after)
    long = [4 + i for i in range(9)]
    texts = ["w0 w1", text_of(*range(9))]
    for long_text, kept in ((LongText.CUT_END, long[:room]), (LongText.CUT_START, long[-room:])):
        expected = [[*before, 4, 5, *after], [*before, *kept, *after]]
        assert ids_of(await words.tokenize(texts, long_text=long_text)) == expected
        for given in ([[4, 5], long], [[*before, 4, 5, *after], [*before, *long, *after]]):
            arrays = [np.array(ids, np.int32) for ids in given]
            found = await words.tokenize(arrays, long_text=long_text)
            assert ids_of(found) == expected
            original = len(before) + 9 + len(after)
            assert found.truncated == {1: Truncated(original_tokens=original, kept_tokens=8)}
    counted = await words.tokenize([text_of(*[1] * 60_000)], long_text=LongText.KEEP)
    assert ids_of(counted) == [[*before, *[5] * 60_000, *after]]


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta", "modernbert", "qwen3"])
async def test_each_familys_ids_are_the_librarys(
    family: str, tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    file = tmp_path / "tokenizer.json"
    write_tokenizer(file, family=family, vocabulary_size=2_000)
    codec = tokenizers.Tokenizer.from_file(str(file))
    texts = ["The rain in the north", "der Bäcker öffnet um sechs", ""]
    expected = [codec.encode(text).ids for text in texts]
    tokenizer = Tokenizer(file, token_count_max=64, vocabulary_size=2_000, pool=pool)
    assert ids_of(await tokenizer.tokenize(texts, long_text=LongText.REFUSE)) == expected
    bare = [codec.encode(text, add_special_tokens=False).ids for text in texts[:2]]
    for given in (expected[:2], bare):
        arrays = [np.array(ids, np.int32) for ids in given]
        found = await tokenizer.tokenize(arrays, long_text=LongText.REFUSE, trusted=True)
        assert ids_of(found) == expected[:2]


async def test_a_text_of_no_token_is_refused_where_none_is_added(
    tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    codec = word_codec()
    codec.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    with pytest.raises(FieldInvalid, match="makes no token") as refusal:
        await saved(codec, tmp_path, pool).tokenize(["w0", " "], long_text=LongText.CUT_END)
    assert refusal.value.param == "input[1]"


def test_a_tokenizer_that_makes_no_token_is_refused(
    tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    codec = word_codec()
    codec.normalizer = normalizers.Replace(tokenizers.Regex("."), "")
    with pytest.raises(CheckpointRefused, match="makes no token of the text 'a'"):
        saved(codec, tmp_path, pool)


class CountingPool(ThreadPoolExecutor):
    """Counts the jobs it is given."""

    def __init__(self) -> None:
        super().__init__(2)
        self.job_count = 0

    def submit(self, work: Callable[..., Any], /, *args: Any, **named: Any) -> "Future[Any]":
        self.job_count += 1
        return super().submit(work, *args, **named)


async def test_a_short_text_pays_no_hand_over_and_a_huge_request_takes_turns(
    tmp_path: Path,
) -> None:
    with CountingPool() as pool:
        words = saved(word_codec(), tmp_path, pool, token_count_max=8_192)
        await words.tokenize(["w0 w1"] * 8, long_text=LongText.REFUSE)
        assert pool.job_count == 0
        await words.tokenize(["w0 " * 200], long_text=LongText.REFUSE)
        assert pool.job_count == 1
        texts = [text_of(*(i % 16 for i in range(n, n + 500))) for n in range(100)]
        found = await words.tokenize(texts, long_text=LongText.REFUSE)
        assert pool.job_count > 2
    assert found.lengths().tolist() == [502] * 100
    assert ids_of(found)[99][1] == 4 + 99 % 16


async def test_what_is_cut_in_a_later_job_is_reported_under_its_own_index(
    tmp_path: Path, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "INLINE_CHARACTERS_MAX", 1)
    monkeypatch.setattr(module, "JOB_CHARACTERS_MAX", 30)
    words = saved(word_codec(), tmp_path, pool)
    texts = [text_of(*range(9)) if i in (3, 8) else "w1 w2" for i in range(10)]
    found = await words.tokenize(texts, long_text=LongText.CUT_END)
    assert set(found.truncated) == {3, 8}
    with pytest.raises(TextTooLong) as refusal:
        await words.tokenize(texts, long_text=LongText.REFUSE)
    assert refusal.value.index == 3


async def test_the_same_texts_have_the_same_ids_on_any_thread(words: Tokenizer) -> None:
    requests = [[text_of(*range(n % 4)) + " " + "é" * 90] * 20 for n in range(16)]
    alone = [await words.tokenize(texts, long_text=LongText.REFUSE) for texts in requests]
    together = await asyncio.gather(
        *(words.tokenize(texts, long_text=LongText.REFUSE) for texts in requests)
    )
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
        np.testing.assert_array_equal(one.cu_seqlens, other.cu_seqlens)


@pytest.fixture(scope="module")
def pipelines(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tokenizer files of the real vocabulary with each of the two pipelines in use."""
    folder = shared_data / "xlmr-tokenizer"
    given = json.loads((folder / "tokenizer.json").read_text())
    described = json.loads((folder / "PIPELINES.json").read_text())
    hub_key = next(key for key in described if key.startswith("hub_pipeline"))
    v5_key = next(key for key in described if key.startswith("v5_pipeline"))
    charsmap = given["normalizer"]
    if charsmap["type"] == "Sequence":
        charsmap = charsmap["normalizers"][0]
    collapse = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
    hub = given | described[hub_key]
    hub["normalizer"] = {"type": "Sequence", "normalizers": [charsmap, collapse]}
    v5 = given | {
        "normalizer": charsmap,
        "pre_tokenizer": described[v5_key]["pre_tokenizer"],
    }
    files = {}
    for name, pipeline in (("hub", hub), ("v5", v5)):
        files[name] = tmp_path_factory.mktemp(name) / "tokenizer.json"
        files[name].write_text(json.dumps(pipeline))
    return files


def cases(folder: Path, name: str, ids: str) -> dict[str, list[int]]:
    found = json.loads((folder / "xlmr-tokenizer" / name).read_text())["cases"]
    return {case["text"]: case[ids] for case in found}


@pytest.mark.parametrize("pipeline", ["hub", "v5"])
async def test_ids_equal_every_published_list(
    pipeline: str, pipelines: dict[str, Path], shared_data: Path, pool: ThreadPoolExecutor
) -> None:
    """The published lists are of the 5.x pipeline; the hub's differs where the third file says."""
    expected = cases(shared_data, "xlmr_bge_m3_ids_v5.json", "ids")
    expected |= cases(shared_data, "transformers_integration_ids.json", "ids")
    expected |= cases(shared_data, "hub_vs_v5_differences.json", f"ids_{pipeline}")
    assert len(expected) >= 40
    tokenizer = Tokenizer(
        pipelines[pipeline], token_count_max=8_192, vocabulary_size=250_002, pool=pool
    )
    found = await tokenizer.tokenize(list(expected), long_text=LongText.REFUSE)
    assert dict(zip(expected, ids_of(found), strict=True)) == expected


async def test_one_character_that_becomes_many_tokens_is_bounded_by_bytes(
    pipelines: dict[str, Path], pool: ThreadPoolExecutor
) -> None:
    tokenizer = Tokenizer(pipelines["hub"], token_count_max=512, vocabulary_size=250_002, pool=pool)
    ligature = "\ufdfa"  # three bytes, a phrase of eighteen letters
    found = await tokenizer.tokenize([ligature * 100_000], long_text=LongText.CUT_END)
    assert found.lengths().tolist() == [512]
    assert found.truncated[0].original_tokens is None


class Counting(Executor):
    """Does the work where it is asked for, and counts how often."""

    def __init__(self) -> None:
        self.jobs = 0

    def submit(self, fn: Callable[..., T], /, *args: object, **kwargs: object) -> "Future[T]":
        self.jobs += 1
        done: Future[T] = Future()
        try:
            done.set_result(fn(*args, **kwargs))
        except RequestError as refusal:
            done.set_exception(refusal)
        return done


BLANK_TEXT = "w5" + " " * (JOB_CHARACTERS_MAX // 2)  # three tokens; two of them are more than a job


@pytest.mark.parametrize("long_text", [LongText.REFUSE, LongText.CUT_END, LongText.CUT_START])
async def test_texts_are_read_no_further_than_the_requests_bound(
    tmp_path: Path, long_text: LongText
) -> None:
    pool = Counting()
    words = saved(word_codec(), tmp_path, pool, token_count_max=40_000, request_tokens_max=7)
    with pytest.raises(RequestTooLarge, match="9 or more tokens, max 7"):
        await words.tokenize([BLANK_TEXT] * 100, long_text=long_text)
    assert pool.jobs == 3
    with pytest.raises(RequestTooLarge, match="9 tokens, max 7"):
        await words.tokenize([BLANK_TEXT] * 3, long_text=long_text)


async def test_texts_that_are_only_counted_are_as_many_tokens_at_most(tmp_path: Path) -> None:
    words = saved(word_codec(), tmp_path, Counting(), token_count_max=40_000, request_tokens_max=7)
    with pytest.raises(RequestTooLarge, match="or more tokens, max 7"):
        await words.tokenize([BLANK_TEXT] * 20, long_text=LongText.KEEP)


class Panicking:
    """A codec whose Rust code panics: that is no `Exception`."""

    def encode_batch_fast(self, texts: object) -> None:
        raise BaseException("a client's text")  # noqa: TRY002

    id_to_token = encode_batch_fast


@pytest.mark.parametrize("text", ["w1", "w1 " * 1_000], ids=["on-the-loop", "in-the-pool"])
async def test_a_panic_is_a_fault_of_ours_that_quotes_nothing(
    text: str, tmp_path: Path, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = saved(word_codec(), tmp_path, pool)
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "_codec", Panicking())
        with pytest.raises(EngineFault, match="tokenizer panicked") as fault:
            await tokenizer.tokenize([text], long_text=LongText.CUT_END)
    assert "client's text" not in str(fault.value)
    assert len(await tokenizer.tokenize(["w1"], long_text=LongText.REFUSE)) == 1


async def test_a_static_model_s_text_has_no_special_tokens_and_at_least_one_token(
    tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    """Words that the vocabulary has not are left out, and a text of none is a token of zeros."""
    rules = TokenRules(has_specials=False, dropped_token_id=UNKNOWN, blank_token_id=len(WORDS))
    tokenizer = saved(
        word_codec(), tmp_path, pool, rules=rules, vocabulary_size=len(WORDS) + 1, token_count_max=4
    )
    texts = ["w0 w1", "w0 other w1", "other", " ", text_of(*range(6))]
    found = await tokenizer.tokenize(texts, long_text=LongText.CUT_END)
    assert ids_of(found) == [[4, 5], [4, 5], [20], [20], [4, 5, 6, 7]]
    assert found.truncated == {4: Truncated(6, 4)}
    ids = await tokenizer.tokenize([np.array([4, UNKNOWN], np.int32)], long_text=LongText.REFUSE)
    assert ids_of(ids) == [[4]]


QUERY = MarkedTexts("w9", 13, token_count_max=6, filler_id=19, filled_to=6)
DOCUMENT = MarkedTexts("[D] ", 14, token_count_max=5)
COLBERT = TokenRules(marked=(QUERY, DOCUMENT))


@pytest.mark.parametrize(
    ("prompt", "text", "ids"),
    [
        pytest.param("w9 ", text_of(0), [0, 13, 4, 2, 19, 19], id="a-query-is-filled-up"),
        pytest.param("w9 w1 ", text_of(0), [0, 13, 5, 4, 2, 19], id="whose-prompt-says-more"),
        pytest.param("w9", text_of(*range(8)), [0, 13, 4, 5, 6, 2], id="and-cut"),
        pytest.param("[D] ", text_of(0), [0, 14, 4, 2], id="a-document-is-not"),
        pytest.param("[D] ", text_of(*range(8)), [0, 14, 4, 5, 2], id="but-cut"),
        pytest.param("", text_of(0), [0, 4, 2], id="a-text-without-a-prompt-is-neither"),
        pytest.param("", "w9 w0", [0, 13, 4, 2], id="nor-one-that-begins-like-it"),
    ],
)
async def test_a_prompt_s_marker_is_one_token_after_the_opening_one(
    prompt: str, text: str, ids: list[int], tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    tokenizer = saved(word_codec(), tmp_path, pool, rules=COLBERT, token_count_max=20)
    texts = [text] * 3
    found = await tokenizer.tokenize(texts, long_text=LongText.CUT_END, prompt=prompt)
    assert ids_of(found) == [ids] * 3
    assert {cut.kept_tokens for cut in found.truncated.values()} <= {len(ids)}


async def test_a_query_that_is_longer_than_the_model_fills_up_is_told_even_where_it_is_kept(
    tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    tokenizer = saved(word_codec(), tmp_path, pool, rules=COLBERT, token_count_max=20)
    text = text_of(*range(8))
    kept = await tokenizer.tokenize([text], long_text=LongText.KEEP, prompt="w9")
    assert kept.truncated == {0: Truncated(11, 6)}
    with pytest.raises(TextTooLong, match="11 tokens"):
        await tokenizer.tokenize([text], long_text=LongText.REFUSE, prompt="w9")


@pytest.mark.parametrize(
    ("count_max", "param"),
    [
        pytest.param(None, "prompt", id="by-the-models-own-number"),
        pytest.param(20, "prompt", id="by-a-larger-one"),
        pytest.param(5, "token_count_max", id="by-a-smaller-one"),
    ],
)
async def test_what_leaves_a_marked_text_no_token_is_named(
    count_max: int | None, param: str, tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    tokenizer = saved(word_codec(), tmp_path, pool, rules=COLBERT, token_count_max=20)
    prompt = f"w9 {text_of(*range(4))} "
    with pytest.raises(FieldInvalid, match="none is left for the text itself") as refused:
        await tokenizer.tokenize(
            ["w0"], long_text=LongText.CUT_END, prompt=prompt, token_count_max=count_max
        )
    assert refused.value.param == param
