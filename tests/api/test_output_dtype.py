"""The sizes and number types of vectors: each is a rule of one vector, in JSON and in base64."""

import base64
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.api.house import CARD, MODEL, PLAIN_MODEL, House, StandIn

from trivec.core.types import Float32Array

TYPES = {
    "float": "<f4",
    "int8": "<i1",
    "uint8": "<u1",
    "binary": "<i1",
    "ubinary": "<u1",
}
WIDE = 64


@pytest.fixture(scope="module")
def wide() -> Iterator[House]:
    """A house whose model has vectors of 64 numbers, which may be cut to 8, 12 or 32."""
    card = replace(CARD, dimensions=WIDE, matryoshka_dimensions=(8, 12, 32), licence="MIT")
    house = House(model=StandIn(card))
    yield house
    house.close()


async def post(house: House, **given: object) -> dict[str, Any]:
    async with house.client() as client:
        answer: dict[str, Any] = (
            await client.post("/embeddings", json={"model": MODEL, "input": "hello", **given})
        ).json()
    return answer


async def vector(house: House, **given: object) -> NDArray[Any]:
    """The vector of one text, whichever way it was sent."""
    found = (await post(house, **given))["data"][0]["embedding"]
    if isinstance(found, str):
        kind = TYPES[str(given.get("output_dtype", "float"))]
        return np.frombuffer(base64.b64decode(found, validate=True), kind)
    return np.array(found)


def expected(unit: Float32Array, dtype: str) -> list[int]:
    """The rules, a number at a time."""
    if dtype in ("binary", "ubinary"):
        bits = ["1" if number > 0 else "0" for number in unit.tolist()]
        octets = [int("".join(bits[i : i + 8]), 2) for i in range(0, len(bits), 8)]
        return [octet - 128 if dtype == "binary" else octet for octet in octets]
    scale = 127 * len(unit) ** 0.5 / 8
    levels = [max(-127, min(127, round(number * scale))) for number in unit.tolist()]
    return [level + 128 if dtype == "uint8" else level for level in levels]


@pytest.mark.parametrize("encoding", ["float", "base64"])
@pytest.mark.parametrize("dtype", TYPES)
async def test_a_vector_has_the_numbers_of_its_type(wide: House, dtype: str, encoding: str) -> None:
    plain = await vector(wide)
    found = await vector(wide, output_dtype=dtype, encoding_format=encoding)
    if dtype == "float":
        assert found.astype(np.float32).tolist() == plain.astype(np.float32).tolist()
    else:
        assert found.tolist() == expected(plain, dtype)


def cosine(one: NDArray[Any], other: NDArray[Any]) -> float:
    return float(one @ other / (np.linalg.norm(one) * np.linalg.norm(other)))


async def test_int8_keeps_the_direction(wide: House) -> None:
    plain, found = await vector(wide), await vector(wide, output_dtype="int8")
    assert cosine(plain, found.astype(np.float64)) > 0.999


@pytest.mark.parametrize("dtype", TYPES)
async def test_a_vector_does_not_depend_on_its_neighbours(wide: House, dtype: str) -> None:
    alone = await post(wide, output_dtype=dtype)
    beside = await post(wide, input=["x", "hello", "y" * 40], output_dtype=dtype)
    assert beside["data"][1]["embedding"] == alone["data"][0]["embedding"]


@pytest.mark.parametrize("dtype", ["int8", "binary"])
async def test_multi_vectors_have_the_type_and_sparse_ones_stay_floats(
    wide: House, dtype: str
) -> None:
    asked = {"output_type": "dense&sparse&multi"}
    plain = (await post(wide, **asked))["data"][0]
    found = (await post(wide, **asked, output_dtype=dtype))["data"][0]
    assert found["sparse_embedding"] == plain["sparse_embedding"]
    rows = [expected(np.array(row), dtype) for row in plain["multi_embedding"]["data"]]
    assert found["multi_embedding"] == {"shape": [len(rows), len(rows[0])], "data": rows}


@pytest.mark.parametrize("field", ["dimensions", "output_dimension"])
@pytest.mark.parametrize("size", [8, 12, 32, 64])
async def test_a_declared_size_is_cut_before_the_vector_is_brought_to_length_1(
    wide: House, size: int, field: str
) -> None:
    whole = (await vector(wide))[:size]
    found = await vector(wide, **{field: size})
    assert len(found) == size
    np.testing.assert_allclose(found, whole / np.linalg.norm(whole), rtol=1e-6)


async def test_a_layer_norm_comes_before_the_cut_where_the_model_is_trained_so(wide: House) -> None:
    whole = await vector(wide)
    plain_card = wide.model.card
    wide.model.card = replace(plain_card, layer_norm_before_cut=True)
    found, untouched = await vector(wide, dimensions=32), await vector(wide, dimensions=64)
    wide.model.card = plain_card
    normed = (whole - whole.mean()) / np.sqrt(whole.var() + 1e-5)
    np.testing.assert_allclose(found, normed[:32] / np.linalg.norm(normed[:32]), rtol=1e-5)
    assert untouched.tolist() == whole.tolist()


async def test_a_size_and_a_type_go_together(wide: House) -> None:
    small = await vector(wide, dimensions=32)
    assert (await vector(wide, dimensions=32, output_dtype="int8")).tolist() == expected(
        small, "int8"
    )


async def test_the_models_own_size_is_taken_by_every_model(house: House) -> None:
    for model in (MODEL, PLAIN_MODEL):
        assert len(await vector(house, model=model, output_dimension=8)) == 8


async def test_models_show_the_sizes_they_declare(wide: House) -> None:
    async with wide.client() as client:
        shown = (await client.get(f"/models/{MODEL}")).json()
    assert (shown["dimensions"], shown["matryoshka_dimensions"]) == (64, [8, 12, 32])
    assert shown["license"] == "MIT"


@pytest.mark.parametrize(
    ("given", "param", "message"),
    [
        pytest.param(
            {"dimensions": 16}, "dimensions",
            "Invalid value for 'dimensions' = 16. This model's vectors have 8, 12, 32, 64.",
            id="a-size-that-is-not-declared",
        ),
        pytest.param(
            {"output_dimension": 65}, "output_dimension",
            "Invalid value for 'output_dimension' = 65. This model's vectors have 8, 12, 32, 64.",
            id="more-than-there-are",
        ),
        pytest.param(
            {"dimensions": 8, "output_dimension": 12}, "output_dimension",
            "'dimensions' is 8 and 'output_dimension' 12. They mean the same: send one of them.",
            id="two-sizes",
        ),
        pytest.param(
            {"output_dimension": 4, "model": PLAIN_MODEL + "-x"}, "model",
            "The model `all-minilm-l6-v2-x` does not exist",
            id="of-a-model-that-is-not-there",
        ),
        pytest.param(
            {"dimensions": 12, "output_dtype": "binary"}, "output_dtype",
            "'output_dtype' = binary packs eight numbers in a byte, and 12 is no multiple of 8.",
            id="bits-that-fill-no-byte",
        ),
        pytest.param(
            {"output_dtype": "int4"}, "output_dtype",
            "Invalid value for 'output_dtype' = int4. Supported values: ['float', 'int8', 'uint8', "
            "'binary', 'ubinary'].",
            id="a-type-nobody-knows",
        ),
    ],
)  # fmt: skip
async def test_a_vector_that_cannot_be_is_refused(
    wide: House, given: dict[str, object], param: str, message: str
) -> None:
    error = (await post(wide, **given))["error"]
    assert error["param"] == param
    assert error["message"].startswith(message)


@pytest.mark.parametrize("kind", ["float", "base64", "int8", "uint8", "binary", "ubinary"])
async def test_jinas_word_for_a_vectors_form_is_the_two_of_ours(wide: House, kind: str) -> None:
    form = {"encoding_format": kind} if kind == "base64" else {"output_dtype": kind}
    assert await post(wide, embedding_type=kind) == await post(wide, **form)


async def test_our_words_for_a_vectors_form_win(wide: House) -> None:
    asked = {"encoding_format": "base64", "output_dtype": "uint8"}
    assert await post(wide, embedding_type="binary", **asked) == await post(wide, **asked)


async def test_vectors_of_length_one_are_normalized_and_nothing_else(wide: House) -> None:
    assert await post(wide, normalized=True) == await post(wide)
    error = (await post(wide, normalized=False))["error"]
    assert error["param"] == "normalized"
    assert "of length 1" in error["message"]


async def test_a_refusal_names_the_word_that_was_sent(wide: House) -> None:
    error = (await post(wide, embedding_type="binary", dimensions=12))["error"]
    assert error["param"] == "embedding_type"
    assert error["message"].startswith("'embedding_type' = binary packs eight numbers")
