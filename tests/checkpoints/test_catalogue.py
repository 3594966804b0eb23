"""The catalogue is data: its facts agree with one another, and unusual licences are told."""

import logging
from pathlib import Path

import pytest

from trivec.checkpoints.catalogue import CatalogueEntry, entries, entry_of
from trivec.checkpoints.hub import pull
from trivec.core.errors import CheckpointRefused

ENTRIES = {entry.id: entry for entry in entries()}


def test_there_are_models_of_every_kind() -> None:
    assert len(ENTRIES) >= 40
    outputs = {name for entry in entries() for name in entry.outputs}
    assert outputs == {"dense", "sparse", "multi", "score"}
    assert len({entry.family for entry in entries()}) >= 9


@pytest.mark.parametrize("entry", entries(), ids=ENTRIES)
def test_the_facts_of_a_model_agree(entry: CatalogueEntry) -> None:
    assert entry.id == entry.id.lower()
    assert ("dense" in entry.outputs) == (entry.pooling is not None)
    assert (entry.outputs == ("score",)) == (entry.labels > 0) == (entry.dimensions == 0)
    assert list(entry.matryoshka_dimensions) == sorted(set(entry.matryoshka_dimensions))
    assert entry.matryoshka_dimensions[-1:] in ((), (entry.dimensions,))
    assert all(entry.prompts.values())
    assert entry.licence
    assert entry.token_count_max > 0
    assert (entry.revision is not None) or not entry.is_pinned


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("naver/splade-cocondenser-ensembledistil", ["CC-BY-NC-SA-4.0, forbids commercial use"]),
        ("google/embeddinggemma-300m", ["agreed to its terms (Gemma)", "HF_TOKEN"]),
        ("naver/splade-v3", ["forbids commercial use", "HF_TOKEN"]),
    ],
)
def test_an_unusual_licence_is_told_before_a_pull(
    name: str,
    words: list[str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no network in tests")

    monkeypatch.setattr("trivec.checkpoints.hub._list_files", unreachable)
    with (
        caplog.at_level(logging.WARNING, "trivec.checkpoints"),
        pytest.raises(CheckpointRefused, match="could not be fetched"),
    ):
        pull(entry_of(name), cache_dir=tmp_path)
    assert all(word in caplog.text for word in words)


def test_an_ordinary_licence_needs_no_words() -> None:
    assert entry_of("all-minilm-l6-v2").terms is None


def test_a_name_that_is_not_known_is_answered_with_those_near_it() -> None:
    with pytest.raises(CheckpointRefused, match=r"Near it: .*qwen/qwen3-embedding-0\.6b"):
        entry_of("Qwen3-Embedding-0.6B-GGUF")
