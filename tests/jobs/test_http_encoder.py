"""A server as the encoder: the same vectors as in process, and every refusal in its place."""

import asyncio
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from tests.api.house import CARD, MODEL, PLAIN_CARD, PLAIN_MODEL, House, StandIn
from tests.jobs.rig import ALL, rows, vectors_of
from tests.jobs.test_embedding import Faulty

from trivec.core.errors import JobFailed, Overloaded
from trivec.core.quantisation import cut
from trivec.core.types import Output, Reply, Sequences
from trivec.jobs import encoders
from trivec.jobs.encoders import Encoded, HttpEncoder, Truncate

TEXTS = [row["text"] for row in rows(150)]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "PAUSE_S_MAX", 0.0)


class Busy(Faulty):
    """Refuses the first requests."""

    refusals = 3
    _lock = threading.Lock()

    async def embed(self, sequences: Sequences, outputs: Output, **how: Any) -> Reply:
        with self._lock:
            self.refusals -= 1
            if self.refusals >= 0:
                raise Overloaded("The queue is full.", retry_after_s=5.0)
        return await super().embed(sequences, outputs, **how)


@pytest.fixture
def house() -> Iterator[House]:
    made = House(model=Faulty(replace(CARD, token_count_max=80)))
    yield made
    made.close()


@contextmanager
def encoder_on(
    house: House,
    *,
    model: str | None = MODEL,
    outputs: Output = ALL,
    truncate: Truncate = "none",
    key: str | None = None,
    asks: Mapping[str, object] = MappingProxyType({}),
) -> Iterator[HttpEncoder]:
    with house.listening() as address:
        encoder = HttpEncoder(
            f"{address}/v1/",
            key or house.key,
            model=model,
            outputs=outputs,
            truncate=truncate,
            asks=asks,
        )
        try:
            yield encoder
        finally:
            encoder.close()


def encoded_by(house: House, texts: list[str], truncate: Truncate = "none") -> Encoded:
    with encoder_on(house, truncate=truncate) as encoder:
        return asyncio.run(encoder.encode(texts))


def test_a_server_gives_the_vectors_that_its_model_gives(house: House) -> None:
    found = encoded_by(house, TEXTS)
    assert found.vectors is not None
    expected = vectors_of(house.model, TEXTS)
    assert np.array_equal(found.vectors.dense, expected.dense)
    for ours, theirs in zip(found.vectors.sparse, expected.sparse, strict=True):
        assert ours is not None
        assert theirs is not None
        assert np.array_equal(ours.token_ids, theirs.token_ids)
        assert np.array_equal(ours.weights, theirs.weights)
    for one, other in zip(found.vectors.multi, expected.multi, strict=True):
        assert one is not None
        assert other is not None
        assert np.array_equal(one, other)
    assert found.token_count == sum(len(text.encode()) + 2 for text in TEXTS)
    assert (found.bad, found.truncated) == ({}, [])


def test_texts_that_a_server_refuses_or_fails_on_hold_up_no_other(house: House) -> None:
    texts = list(TEXTS)
    texts[5] = texts[64] = "x" * 100
    texts[70] = "!"
    found = encoded_by(house, texts)
    assert found.vectors is not None
    assert set(found.bad) == {5, 64, 70}
    assert "maximum context length is 80 tokens" in found.bad[5]
    good = [text for i, text in enumerate(texts) if i not in found.bad]
    assert np.array_equal(found.vectors.dense, vectors_of(house.model, good, Output.DENSE).dense)


def test_a_text_that_is_cut_is_named(house: House) -> None:
    found = encoded_by(house, ["a", "x" * 100, "b"], truncate="end")
    assert (found.bad, list(found.truncated)) == ({}, [1])


def test_a_server_cuts_vectors_and_puts_a_prompt_before_texts(house: House) -> None:
    asks = {"dimensions": 4, "prompt_name": "document"}
    house.plain_model = StandIn(replace(PLAIN_CARD, prompts={"document": "passage: "}))
    house.serve()
    with encoder_on(house, model=PLAIN_MODEL, outputs=Output.DENSE, asks=asks) as encoder:
        found = asyncio.run(encoder.encode(["a", "b", "c"])).vectors
    assert found is not None
    texts = [f"passage: {text}" for text in ("a", "b", "c")]
    dense = vectors_of(house.plain_model, texts, Output.DENSE).dense
    assert np.array_equal(found.dense, cut(dense, 4))


def test_a_server_that_fails_on_everything_stops_the_job(house: House) -> None:
    with pytest.raises(JobFailed, match="failed on"):
        encoded_by(house, [f"!{i}" for i in range(8)])


def test_a_busy_server_is_asked_again(house: House) -> None:
    house.model = Busy(house.model.card)
    house.serve()
    found = encoded_by(house, TEXTS[:100])
    assert found.vectors is not None
    assert len(found.vectors) == 100


def test_a_model_is_known_by_what_its_card_says(house: House) -> None:
    with encoder_on(house, model=None, outputs=Output.DENSE) as encoder:
        assert encoder.model["id"] in (MODEL, PLAIN_MODEL)
        assert encoder.model["dimensions"] == CARD.dimensions
        assert encoder.model["precision"] == CARD.precision


def test_what_no_text_is_at_fault_for_stops_the_job_and_shows_no_key(house: House) -> None:
    with pytest.raises(JobFailed, match="401") as refused, encoder_on(house, key="no-such-key-x"):
        pass
    assert "no-such-key-x" not in str(refused.value)
    with pytest.raises(JobFailed, match="404"), encoder_on(house, model="nobody/knows"):
        pass
    with (
        encoder_on(house, model=PLAIN_MODEL, outputs=Output.SPARSE) as encoder,
        pytest.raises(JobFailed, match="output_type"),
    ):
        asyncio.run(encoder.encode(["a", "b"]))


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://a/v1", "http://127.0.0.1:1/v1"])
def test_an_address_without_a_server_is_refused(url: str) -> None:
    with pytest.raises(JobFailed, match=url):
        HttpEncoder(url, None, model=None, outputs=Output.DENSE, truncate="none")


def test_it_is_said_once_that_a_server_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    url = "http://127.0.0.1:1/v1"
    with pytest.raises(JobFailed):
        HttpEncoder(url, None, model=None, outputs=Output.DENSE, truncate="none")
    (said,) = caplog.messages
    assert said.startswith(f"{url} is waited for, two minutes at most: ConnectionRefused")
