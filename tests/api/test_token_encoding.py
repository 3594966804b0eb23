"""Arrays of OpenAI's token ids are made into texts again, where a request or the server says so."""

import gzip
import warnings
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from tests.api.corpus import TEXTS
from tests.api.house import CARD, MODEL, House, StandIn

from trivec.build import check_models
from trivec.core.errors import FieldInvalid, SettingInvalid
from trivec.settings import HttpLimits, Settings, load_settings
from trivec.tokenizer import encodings as token_encodings

try:
    with warnings.catch_warnings():  # it opens its files in an old way
        warnings.simplefilter("ignore", DeprecationWarning)
        import bpe_openai
except ModuleNotFoundError:
    bpe_openai = None

needs_tables = pytest.mark.skipif(bpe_openai is None, reason="bpe-openai is not installed")
SENTENCE = "What is BGE-M3? Ünïcödé, 日本語, 😀."


def ids_of(text: str, encoding: str = "cl100k_base") -> list[int]:
    found: list[int] = bpe_openai.get_encoding(encoding).encode(text)
    return found


async def post(house: House, url: str = "/embeddings", /, **given: object) -> dict[str, Any]:
    async with house.client() as client:
        answer: dict[str, Any] = (await client.post(url, json={"model": MODEL, **given})).json()
    return answer


@pytest.fixture
def repairing() -> Iterator[House]:
    """A house that takes every array for cl100k_base's, unless the request says otherwise."""
    limits = HttpLimits(token_encoding="cl100k_base")
    house = House(limits=limits, model=StandIn(replace(CARD, prompts={"query": "q: "})))
    yield house
    house.close()


@needs_tables
@pytest.mark.parametrize("encoding", ["cl100k_base", "o200k_base"])
async def test_ids_are_embedded_as_the_text_they_were_made_of(house: House, encoding: str) -> None:
    ids = ids_of(SENTENCE, encoding)
    text = await post(house, input=SENTENCE)
    for given in (ids, [ids]):
        repaired = await post(house, input=given, token_encoding=encoding)
        assert repaired == text | {"token_encoding": encoding}


@needs_tables
async def test_tokenize_repairs_them_too(house: House) -> None:
    repaired = await post(house, "/tokenize", input=ids_of("ab"), token_encoding="cl100k_base")
    assert repaired["data"][0]["token_ids"] == [0, 101, 102, 2]
    assert repaired["token_encoding"] == "cl100k_base"


@needs_tables
async def test_a_server_repairs_arrays_of_clients_that_cannot_say_what_they_send(
    repairing: House,
) -> None:
    texts = ["first", "second text"]
    repaired = await post(repairing, input=[ids_of(text) for text in texts])
    assert repaired["data"] == (await post(repairing, input=texts))["data"]
    assert repaired["token_encoding"] == "cl100k_base"


@needs_tables
async def test_a_request_may_say_that_its_ids_are_the_models_own(repairing: House) -> None:
    own = await post(repairing, input=[101, 102], token_encoding="model")
    assert own == await post(repairing, input="ab")
    assert "token_encoding" not in own


async def test_ids_are_checked_for_being_anothers_unless_the_request_says_that_they_are_own(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    trusted: list[object] = []
    tokenize = house.model.tokenize

    async def listen(*given: Any, **options: Any) -> Any:
        trusted.append(options["trusted"])
        return await tokenize(*given, **options)

    monkeypatch.setattr(house.model, "tokenize", listen)
    await post(house, input=[5, 6])
    await post(house, input=[5, 6], token_encoding="model")
    assert trusted == [False, True]


@needs_tables
async def test_texts_are_texts_whatever_the_encoding(repairing: House) -> None:
    assert "token_encoding" not in await post(repairing, input="a", token_encoding="o200k_base")


@needs_tables
async def test_repaired_texts_take_a_prompt(repairing: House) -> None:
    repaired = await post(repairing, input=ids_of("hello"), input_type="query")
    assert repaired["data"] == (await post(repairing, input="q: hello"))["data"]


@needs_tables
@pytest.mark.parametrize(
    ("ids", "param"),
    [
        pytest.param([[5], [100_256]], "input[1]", id="between-the-tokens-and-the-special-ones"),
        pytest.param([-1], "input[0]", id="below-all"),
        pytest.param([10**12], "input[0]", id="beyond-all"),
    ],
)
async def test_an_id_that_the_encoding_has_not_is_refused(
    house: House, ids: object, param: str
) -> None:
    error = (await post(house, input=ids, token_encoding="cl100k_base"))["error"]
    assert error["param"] == param
    assert "none of cl100k_base's" in error["message"]


@needs_tables
@pytest.mark.parametrize("encoding", ["cl100k_base", "o200k_base"])
def test_every_text_comes_back(encoding: str) -> None:
    texts = [text for text in TEXTS if "<|" not in text]
    ids = [ids_of(text, encoding) for text in texts]
    assert token_encodings.decode(ids, encoding) == texts


@needs_tables
def test_what_a_cut_leaves_of_a_character_is_marked() -> None:
    ids = ids_of("😀")
    assert len(ids) > 1
    assert token_encodings.decode([ids[:-1]], "cl100k_base") == ["\ufffd"]


@needs_tables
def test_special_tokens_are_their_own_words() -> None:
    assert token_encodings.decode([[100257]], "cl100k_base") == ["<|endoftext|>"]


@pytest.fixture
def no_tables(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def absent(name: str) -> metadata.Distribution:
        raise metadata.PackageNotFoundError(name)

    token_encodings.token_table.cache_clear()
    monkeypatch.setattr(metadata, "distribution", absent)
    yield
    token_encodings.token_table.cache_clear()


@pytest.mark.usefixtures("no_tables")
async def test_a_server_without_the_tables_says_what_to_do(house: House) -> None:
    error = (await post(house, input=[5], token_encoding="cl100k_base"))["error"]
    assert error["param"] == "token_encoding"
    assert "Send texts instead" in error["message"]
    assert "trivec[openai-tokens]" in error["message"]


@pytest.mark.usefixtures("no_tables")
def test_a_server_that_is_to_repair_and_cannot_does_not_start() -> None:
    settings = load_settings({"http": {"token_encoding": "o200k_base"}}, {})
    with pytest.raises(SettingInvalid, match=r"token_encoding o200k_base: .*openai-tokens"):
        check_models(settings)
    check_models(Settings())


def test_a_table_that_is_not_openais_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Installed:
        def locate_file(self, _: str) -> Path:
            return tmp_path

    (tmp_path / "cl100k_base.tiktoken.gz").write_bytes(gzip.compress(b"IQ== 0\n"))
    token_encodings.token_table.cache_clear()
    monkeypatch.setattr(metadata, "distribution", lambda _: Installed())
    with pytest.raises(FieldInvalid, match="is not OpenAI's"):
        token_encodings.token_table("cl100k_base")


async def test_ids_beyond_the_vocabulary_name_the_remedy(house: House) -> None:
    message = (await post(house, input=[100_000]))["error"]["message"]
    assert 'send "token_encoding": "cl100k_base"' in message
