"""Bodies of millions of items are refused before anything is made of them; others are let through."""

import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trivec.api.rules import refuse_too_many_items
from trivec.core.errors import FieldInvalid, RequestError, RequestTooLarge
from trivec.settings import HttpLimits

LIMITS = HttpLimits(inputs_max=3, request_tokens_max=10)
TEXTS = st.text(st.sampled_from('a,["\\]{é\n'), max_size=40)
INPUTS = TEXTS | st.lists(TEXTS, max_size=3) | st.lists(st.integers(0, 99), max_size=10)
MEBIBYTE = 1024 * 1024


@given(INPUTS, st.booleans())
def test_what_is_within_the_limits_is_let_through(value: object, ascii_only: bool) -> None:
    body = json.dumps({"model": "m", "input": value}, ensure_ascii=ascii_only).encode()
    refuse_too_many_items(body, LIMITS)


@pytest.mark.parametrize(
    ("item", "refusal"),
    [
        pytest.param("12345", RequestTooLarge, id="token-ids"),
        pytest.param("[]", FieldInvalid, id="empty-lists"),
        pytest.param("[1]", FieldInvalid, id="lists-of-one-id"),
        pytest.param('"a"', FieldInvalid, id="short-texts"),
        pytest.param(r'"\""', FieldInvalid, id="texts-of-quotes"),
    ],
)
def test_millions_of_items_are_refused_before_they_are_made(
    item: str, refusal: type[RequestError]
) -> None:
    count = 8 * MEBIBYTE // (len(item) + 1)
    body = b'{"model": "m", "input": [%b]}' % ",".join([item] * count).encode()
    tracemalloc.start()
    try:
        with pytest.raises(refusal):
            refuse_too_many_items(body, HttpLimits())
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 6 * len(body)
