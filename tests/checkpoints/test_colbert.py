"""ColBERT's settings, as three layouts say them, in a model's own token ids."""

import json
from pathlib import Path
from typing import Any

import pytest

from trivec.checkpoints.colbert import ColbertSettings, read_colbert
from trivec.core.errors import CheckpointRefused
from trivec.core.types import MarkedTexts

WORDS = ["[UNK]", "[MASK]", "[Q] ", "[D] ", "[unused0]", "[unused1]", ".", "?", "a"]
Q, D, MASK = 2, 3, 1


def settings(folder: Path, said: dict[str, Any], prompts: dict[str, str]) -> ColbertSettings:
    file = folder / "tokenizer.json"
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"}
    file.write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    return read_colbert(folder, said, prompts, file)


def test_pylate_s_prefixes_are_tokens_and_its_queries_are_filled_up(tmp_path: Path) -> None:
    said = {"query_prefix": "[Q] ", "document_prefix": "[D] ", "document_length": 100}
    found = settings(tmp_path, said, {"query": "find: "})
    assert found.prompts == {"query": "[Q] find: ", "document": "[D] "}
    assert found.marked == (MarkedTexts("[Q] ", Q, 32, MASK, 32), MarkedTexts("[D] ", D, 100))
    assert found.skipped_token_ids == (6, 7)
    assert found.query_token_id == Q
    assert found.unattended_token_id == MASK


@pytest.mark.parametrize(
    ("changed", "longest", "filled_to", "unattended"),
    [
        ({"query_length": 20}, 20, 20, MASK),
        ({"attend_to_expansion_tokens": True}, 32, 32, None),
        ({"do_query_expansion": False, "query_length": 20}, 20, 0, None),
    ],
    ids=["shorter", "seen", "not-filled-up"],
)
def test_what_fills_up_a_query_of_pylate_s(
    changed: dict[str, Any], longest: int, filled_to: int, unattended: int | None, tmp_path: Path
) -> None:
    said = {"query_prefix": "[Q] ", "document_prefix": "[D] ", **changed}
    found = settings(tmp_path, said, {})
    assert found.marked[0].token_count_max == longest
    assert found.marked[0].filled_to == filled_to
    assert found.unattended_token_id == unattended


def test_stanford_s_metadata_have_the_defaults_of_its_code(tmp_path: Path) -> None:
    (tmp_path / "artifact.metadata").write_text('{"doc_maxlen": 300, "mask_punctuation": false}')
    found = settings(tmp_path, {}, {})
    assert found.prompts == {"query": "[unused0] ", "document": "[unused1] "}
    assert [one.token_count_max for one in found.marked] == [32, 300]
    assert found.skipped_token_ids == ()


def test_sentence_transformers_says_it_in_its_modules(tmp_path: Path) -> None:
    expansion = {"strategy": "min", "attend": True, "token": "a", "length": 16}
    said = {"query_expansion": expansion, "document_length": 90, "skiplist_words": ["?"]}
    found = settings(tmp_path, said, {"query": "[Q] ", "document": "[D] "})
    assert found.marked == (MarkedTexts("[Q] ", Q, None, 8, 16), MarkedTexts("[D] ", D, 90))
    assert found.skipped_token_ids == (7,)
    assert found.unattended_token_id is None


def test_without_any_setting_there_is_no_rule(tmp_path: Path) -> None:
    found = settings(tmp_path, {}, {})
    assert found == ColbertSettings({}, (), (), None, None)


@pytest.mark.parametrize(
    ("said", "prompts", "reason"),
    [
        ({"query_expansion": {"length": 32}}, {"query": "x: "}, "query_expansion is set"),
        ({"skiplist_words": ["."]}, {}, "skiplist_words is set"),
        (
            {"skiplist_words": ["."], "skiplist_tasks": ["query"]},
            {"query": "[Q] "},
            "skiplist_tasks",
        ),
        ({"query_expansion": {"length": 32, "how": 1}}, {"query": "[Q] "}, "how"),
        ({"query_expansion": {"length": 0}}, {"query": "[Q] "}, "length"),
        ({"query_prefix": "[Q] ", "query_length": 10**9}, {}, "query_length|length"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(
    said: dict[str, Any], prompts: dict[str, str], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointRefused, match=reason):
        settings(tmp_path, said, prompts)
