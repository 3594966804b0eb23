"""ColBERT's settings: how queries and documents are marked, filled up and cut, and what has no row.

Three layouts say it: Stanford's `artifact.metadata`, PyLate's keys in `config_sentence_transformers.json`,
and sentence-transformers 6, whose Transformer and MultiVectorMask modules have it.
"""

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import tokenizers
from msgspec import Meta

from trivec.checkpoints.layout import COLBERT_FILE, read_json
from trivec.core.errors import CheckpointRefused
from trivec.core.types import MarkedTexts

Length = Annotated[int, Meta(ge=4, le=8192)]
QUERY_LENGTH = 32  # where nothing is said, as in all of the layouts' own code
PYLATE_OWN = (
    "query_prefix", "document_prefix", "do_query_expansion", "attend_to_expansion_tokens"
)  # fmt: skip
PYLATE_KEYS = (*PYLATE_OWN, "query_length", "document_length", "skiplist_words")


class _Expansion(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How queries are filled up: to *length*, which with `fixed` is also the longest."""

    length: Length = QUERY_LENGTH
    strategy: Literal["fixed", "min"] = "fixed"
    attend: bool = False
    token: str | None = None


class _Settings(msgspec.Struct, frozen=True):
    """What the files say, by sentence-transformers' names."""

    query: str = ""  # what stands before a query
    document: str = ""
    query_length: Length | None = None
    document_length: Length | None = None
    query_expansion: _Expansion | None = None
    skiplist_words: tuple[str, ...] = ()
    skiplist_tasks: tuple[str, ...] = ("document",)


@dataclass(frozen=True, slots=True)
class ColbertSettings:
    """What a model's files say of its queries and documents, in token ids."""

    prompts: Mapping[str, str]
    marked: tuple[MarkedTexts, ...]  # queries, documents; none where these are no token's
    skipped_token_ids: tuple[int, ...]  # have no row in a document
    query_token_id: int | None  # before queries
    unattended_token_id: int | None  # of what queries are filled up with, where nothing sees it


def read_colbert(
    folder: Path, said: Mapping[str, Any], prompts: Mapping[str, str], tokenizer_file: Path
) -> ColbertSettings:
    """The settings of the token vectors in *folder*.

    *said*: the keys of PyLate and of sentence-transformers' modules that were there; *prompts* as the
    folder has them. Raises `CheckpointRefused`.
    """
    if (folder / COLBERT_FILE).is_file():
        said = _as_stanford_says(read_json(folder / COLBERT_FILE, dict[str, Any]))
    elif {*said} & {*PYLATE_OWN}:
        said = _as_pylate_says(said, prompts)
    try:
        own = {name: prompts[name] for name in ("query", "document") if name in prompts}
        given = {name: value for name, value in said.items() if value is not None}
        found = msgspec.convert(own | given, _Settings)
    except msgspec.ValidationError as error:
        raise CheckpointRefused(
            f"{folder}: its settings of ColBERT are not understood: {error}"
        ) from error
    codec = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    expansion, filler = found.query_expansion, None
    if expansion is not None:
        filler = _filler_id(folder, codec, expansion.token)
    longest = (
        expansion.length if expansion and expansion.strategy == "fixed" else found.query_length
    )
    query = _marked(codec, found.query, longest)
    if query is not None and expansion is not None:
        query = replace(query, filler_id=filler, filled_to=expansion.length)
    document = _marked(codec, found.document, found.document_length)
    if query is None and (expansion is not None or found.skiplist_words):
        name = "query_expansion" if expansion else "skiplist_words"
        raise CheckpointRefused(
            f"{folder}: {name} is set, and its queries do not begin with a token of their own "
            f"({found.query!r}), so they cannot be told from documents"
        )
    if found.skiplist_words and found.skiplist_tasks != ("document",):
        raise CheckpointRefused(
            f"{folder}: skiplist_tasks = {[*found.skiplist_tasks]} is not understood"
        )
    words = [codec.token_to_id(word) for word in found.skiplist_words]
    return ColbertSettings(
        prompts={"query": found.query, "document": found.document} if found.query else {},
        marked=tuple(one for one in (query, document) if one is not None),
        skipped_token_ids=tuple(sorted({one for one in words if one is not None})),
        query_token_id=None if query is None else query.token_id,
        unattended_token_id=filler if expansion is not None and not expansion.attend else None,
    )


def _as_stanford_says(said: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of ColBERT's own code; what it leaves out has that code's defaults."""
    return {
        "query": f"{said.get('query_token_id') or '[unused0]'} ",
        "document": f"{said.get('doc_token_id') or '[unused1]'} ",
        "document_length": said.get("doc_maxlen"),
        "query_expansion": {
            "length": said.get("query_maxlen") or QUERY_LENGTH,
            "attend": bool(said.get("attend_to_mask_tokens")),
        },
        "skiplist_words": list(string.punctuation) if said.get("mask_punctuation", True) else [],
    }


def _as_pylate_says(said: Mapping[str, Any], prompts: Mapping[str, str]) -> dict[str, Any]:
    """Settings of PyLate's own code, which fills up queries unless told otherwise."""
    # Each ahead of its prompt.
    before = {name: said.get(f"{name}_prefix") or "" for name in ("query", "document")}
    expansion = None
    length = said.get("query_length") or QUERY_LENGTH
    if said.get("do_query_expansion") is not False:
        expansion = {"length": length, "attend": bool(said.get("attend_to_expansion_tokens"))}
    return {
        **{name: text + prompts.get(name, "").removeprefix(text) for name, text in before.items()},
        "query_length": length,
        "document_length": said.get("document_length"),
        "query_expansion": expansion,
        # An empty list, too, is punctuation there.
        "skiplist_words": said.get("skiplist_words") or list(string.punctuation),
    }


def _marked(codec: tokenizers.Tokenizer, prompt: str, length: int | None) -> MarkedTexts | None:
    """Texts behind *prompt*, where that begins with a token of the vocabulary, as a whole or a word."""
    word = prompt.partition(" ")[0]
    for marker in (prompt, f"{word} ", word):
        if marker.strip() and (token_id := codec.token_to_id(marker)) is not None:
            return MarkedTexts(marker, token_id, length)
    return None


def _filler_id(folder: Path, codec: tokenizers.Tokenizer, token: str | None) -> int:
    """The token that queries are filled up with: *token*, else the mask, else the closing one."""
    names: Sequence[object] = [token]
    if token is None:
        file = folder / "tokenizer_config.json"
        found = read_json(file, dict[str, Any]) if file.is_file() else {}
        named = (found.get("mask_token"), "[MASK]", "<mask>", found.get("eos_token"))
        names = [one.get("content") if isinstance(one, dict) else one for one in named]
    ids = [codec.token_to_id(name) for name in names if isinstance(name, str)]
    if not any(one is not None for one in ids):
        raise CheckpointRefused(f"{folder}: its tokenizer has no token to fill up queries with")
    return next(one for one in ids if one is not None)
