"""What a body holds is told from its punctuation, so that no body can hold up everybody else."""

import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trivec.api.marks import Marks, count_marks
from trivec.api.questions import embeddings_question
from trivec.core.errors import FieldInvalid, RequestError, RequestTooLarge
from trivec.settings import HttpLimits

LIMITS = HttpLimits()
MEBIBYTE = 1024 * 1024

TEXTS = st.text(st.sampled_from('a,["\\]{é\n'), max_size=8)
VALUES = st.recursive(TEXTS | st.integers(), lambda inner: st.lists(inner, max_size=4))


def slow_marks(value: object) -> Marks:
    """The twin: walks the decoded value."""
    if isinstance(value, str):
        return Marks(1, 0, 0)
    if not isinstance(value, list):
        return Marks(0, 0, 0)
    inner = [slow_marks(item) for item in value]
    return Marks(
        text_count=sum(one.text_count for one in inner),
        comma_count=sum(one.comma_count for one in inner) + max(0, len(value) - 1),
        array_count=sum(one.array_count for one in inner) + 1,
    )


@given(VALUES, st.booleans())
def test_punctuation_is_counted_outside_texts_only(value: object, ascii_only: bool) -> None:
    body = json.dumps(value, ensure_ascii=ascii_only).encode()
    assert count_marks(body) == slow_marks(value)


def body_of(item: str, byte_count: int = 8 * MEBIBYTE) -> bytes:
    count = byte_count // (len(item) + 1) - 32
    return b'{"model": "m", "input": [%b]}' % ",".join([item] * count).encode()


@pytest.mark.parametrize(
    ("item", "refusal"),
    [
        pytest.param("12345", RequestTooLarge, id="token-ids"),
        pytest.param("[]", FieldInvalid, id="empty-lists"),
        pytest.param("[1]", FieldInvalid, id="lists-of-one-id"),
        pytest.param('"a"', FieldInvalid, id="short-texts"),
    ],
)
def test_millions_of_items_are_refused_before_they_are_made(
    item: str, refusal: type[RequestError]
) -> None:
    body = body_of(item)
    tracemalloc.start()
    try:
        with pytest.raises(refusal, match=r"too long|max 300000 tokens"):
            embeddings_question(body, LIMITS)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 3.5 * len(body), "objects were made"


@pytest.mark.parametrize(
    "texts",
    [
        pytest.param(["a,b," * 1000] * 2048, id="commas-in-every-text"),
        pytest.param(['[["\\' * 500] * 2048, id="brackets-quotes-and-backslashes-in-every-text"),
        pytest.param(["[1],[2]," * 100_000], id="a-text-that-looks-like-lists"),
    ],
)
def test_what_stands_in_a_text_counts_for_nothing(texts: list[str]) -> None:
    body = json.dumps({"model": "m", "input": texts}).encode()
    assert len(body) > LIMITS.request_tokens_max, "else nothing is counted"
    assert embeddings_question(body, LIMITS).inputs.texts == texts


@pytest.mark.parametrize(
    "ids",
    [
        pytest.param([7] * 300_000, id="of-one-text"),
        pytest.param([[7] * 146] * 2048, id="of-as-many-texts-as-may-be"),
    ],
)
def test_as_many_token_ids_as_a_request_may_have_pass(ids: list[int] | list[list[int]]) -> None:
    body = json.dumps({"model": "m", "input": ids}).encode()
    assert len(body) > LIMITS.request_tokens_max, "else nothing is counted"
    assert embeddings_question(body, LIMITS).inputs.token_lists is not None
