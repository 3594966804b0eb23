"""Whether arrays of token ids come from this model's tokenizer or from another, as tiktoken.

Every id below the vocabulary's size is legal, so arrays of another tokenizer would be embedded, to
vectors of nothing. Three signs tell them apart (decision 0011 has the distributions they were
chosen from):

- ids that no text makes: `[unused7]`, or a special token in the middle;
- ids that do not survive a round trip: decoded to a text and tokenised again (WordPiece, BPE);
- scripts that no text mixes, within one array or within one word (a Unigram vocabulary of 100
  languages survives any round trip, but another's ids name its pieces at random).

It judges a sample of an array's ids and of a request's arrays, and the request by their majority.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import tokenizers
import tokenizers.models

from trivec.core.types import Int32Array

ARRAYS_MAX = 32  # judged of a request, spread over it
IDS_MAX = 256  # judged of an array, its first ones
IDS_MIN = 5  # shorter arrays say too little, but for ids that no text makes
HALF_A_WORD_IDS_MAX = 8
SHORT_IDS = 16
SURVIVORS_MIN_SHORT = 0.6  # share of ids that survive the round trip; genuine ones: 0.67 and up
SURVIVORS_MIN = 0.8  # of SHORT_IDS and more; genuine ones: 0.86 and up
SCRIPTS_MAX = 3  # of one array
MIXED_WORDS_SHARE_MAX = 1 / 8  # of an array's ids

_UNUSED = re.compile(r"\[unused\d+\]")
_UNKNOWN = ("[UNK]", "<unk>")
# Scripts that one text writes side by side, without blanks, count as one.
_EAST_ASIAN = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "BOPOMOFO", "HALFWIDTH", "FULLWIDTH")


class TokenOrigin:
    """Judges arrays for one model's tokenizer. Thread safe."""

    def __init__(self, codec: tokenizers.Tokenizer) -> None:
        self._codec = codec
        probe = codec.encode("a")
        text_at = [i for i, text in enumerate(probe.sequence_ids) if text is not None]
        prefix, suffix = probe.ids[: text_at[0]], probe.ids[text_at[-1] + 1 :]
        self._prefix_count, self._suffix_count = len(prefix), len(suffix)
        self._ends = {*prefix, *suffix}
        # A closing token separates the texts of a pair; unknown words are ordinary.
        special = {i for i, token in codec.get_added_tokens_decoder().items() if token.special}
        self._impossible = special - {*suffix} - {codec.token_to_id(word) for word in _UNKNOWN}
        self._is_word_piece = isinstance(codec.model, tokenizers.models.WordPiece)
        self._piece = lru_cache(maxsize=65_536)(self._read_piece)

    def is_another(self, arrays: Sequence[Int32Array]) -> bool:
        """Whether another tokenizer made at least half of those *arrays* that tell."""
        step = max(1, len(arrays) // ARRAYS_MAX)
        verdicts = [self._judge(one) for one in arrays[::step][:ARRAYS_MAX]]
        return any(verdicts) and verdicts.count(True) >= verdicts.count(False)

    def _judge(self, array: Int32Array) -> bool | None:
        """Whether another tokenizer made *array*; None where it says too little."""
        codec, ids = self._codec, array[:IDS_MAX].tolist()
        for _ in range(self._prefix_count):
            ids = ids[1:] if ids and ids[0] in self._ends else ids
        for _ in range(self._suffix_count):
            ids = ids[:-1] if ids and ids[-1] in self._ends else ids
        if any(i in self._impossible or _UNUSED.fullmatch(codec.id_to_token(i) or "") for i in ids):
            return True
        # An array cut anywhere may begin within a word, whose rest is another word's pieces.
        begins_word = [self._piece(token_id)[0] for token_id in ids[:HALF_A_WORD_IDS_MAX]]
        ids = ids[begins_word.index(True) if True in begins_word else 0 :]
        if len(ids) < IDS_MIN:
            return None
        if self._mixes_scripts(ids):
            return True
        # The share of ids that are found again, wherever, when their text is tokenised.
        text = codec.decode(ids, skip_special_tokens=False)
        again = Counter(codec.encode(text, add_special_tokens=False).ids)
        survivors = (Counter(ids) & again).total() / len(ids)
        return survivors < (SURVIVORS_MIN_SHORT if len(ids) < SHORT_IDS else SURVIVORS_MIN)

    def _mixes_scripts(self, ids: Sequence[int]) -> bool:
        scripts: set[str] = set()
        mixed = 0  # places where one script follows another within a word
        before: str | None = None
        for begins_word, inside in map(self._piece, ids):
            scripts.update(inside)
            if not begins_word and inside and before not in (None, inside[0]):
                mixed += "EAST ASIAN" not in (inside[0], before)
            before = inside[-1] if inside else None
        crowded = len(scripts) == SCRIPTS_MAX and (mixed > 0 or len(ids) < SHORT_IDS)
        return len(scripts) > SCRIPTS_MAX or crowded or mixed > len(ids) * MIXED_WORDS_SHARE_MAX

    def _read_piece(self, token_id: int) -> tuple[bool, list[str]]:
        """Whether a piece begins a word, and the scripts of its letters, in their order."""
        piece = self._codec.id_to_token(token_id) or ""
        is_new_word = (
            not piece.startswith("##") if self._is_word_piece else piece.startswith(("▁", "Ġ"))
        )
        # The first word of a letter's Unicode name: LATIN, CYRILLIC, ARABIC, …
        words = [unicodedata.name(one, "UNNAMED").split()[0] for one in piece if one.isalpha()]
        return is_new_word, ["EAST ASIAN" if w.startswith(_EAST_ASIAN) else w for w in words]
