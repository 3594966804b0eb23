"""A small tokenizer made on the spot, with the pipeline of the family it stands in for.

Its pieces are the words of a few sentences and single characters of many scripts, as many as
the vocabulary holds. For BGE-M3's real ids, give the dummy the real `tokenizer.json`.
"""

from collections import Counter
from collections.abc import Iterator
from itertools import chain, islice
from math import log
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

# cls, pad, sep, unk, mask
SPECIALS = {
    "bert": ("[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"),
    "roberta": ("<s>", "<pad>", "</s>", "<unk>", "<mask>"),
    "xlm-roberta": ("<s>", "<pad>", "</s>", "<unk>", "<mask>"),
    "modernbert": ("[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"),
}
END_OF_TEXT = "<|endoftext|>"  # Qwen3's one special token: it ends a text, and pads
SENTENCES = """
the harbour is quiet before the first boat leaves and the water is like glass
what does a model know of a word it has seen only once
search engines compare the vector of a question with the vectors of many passages
she sold the old house to pay for a small shop near the station
rain is expected in the north while the south stays dry until the weekend
der Bäcker öffnet um sechs Uhr und verkauft das erste Brot noch warm
le train de nuit arrive à la gare avant que la ville se réveille
el perro duerme bajo la mesa mientras los niños leen un libro
a lua cheia ilumina o caminho até o rio
вечером мы пили чай и говорили о старой книге
το πλοίο φεύγει αύριο το πρωί από το λιμάνι
القطار يصل إلى المدينة في الصباح
הילדה קוראת ספר ליד החלון
बच्चे नदी के किनारे खेल रहे हैं
แมวนอนหลับอยู่ใต้ต้นไม้
我们 明天 早上 坐 火车 去 海边
私 は 毎朝 駅 まで 歩きます
우리는 저녁에 강가를 걸었다
"""
# First and last code point of runs of letters, the most used first.
SCRIPTS = (
    (0x21, 0x7E), (0xA1, 0x17F), (0x370, 0x3FF), (0x400, 0x45F), (0x5D0, 0x5EA), (0x620, 0x64A),
    (0x905, 0x939), (0xE01, 0xE3A), (0x3041, 0x30FF), (0x2010, 0x2027), (0x10D0, 0x10FA),
    (0x531, 0x587), (0x985, 0x9B9), (0xB85, 0xBB9), (0xAC00, 0xD7A3), (0x4E00, 0x9FFF),
)  # fmt: skip


def special_token_names(family: str) -> dict[str, str]:
    """Which special token is which, as the tokenizer's small files say."""
    if family == "qwen3":
        return {"eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}
    cls, pad, sep, unk, mask = SPECIALS[family]
    names = {"cls_token": cls, "pad_token": pad, "sep_token": sep, "unk_token": unk}
    if "roberta" in family:
        names |= {"bos_token": cls, "eos_token": sep}
    return names | {"mask_token": mask}


def write_tokenizer(file: Path, *, family: str, vocabulary_size: int) -> None:
    """Write a `tokenizer.json` whose ids are all below *vocabulary_size*."""
    if family == "qwen3":
        tokenizer = _byte_level(vocabulary_size, [END_OF_TEXT], None)
        tokenizer.add_special_tokens([END_OF_TEXT])
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {END_OF_TEXT}",
            pair=f"$A {END_OF_TEXT} $B:1 {END_OF_TEXT}:1",
            special_tokens=[(END_OF_TEXT, tokenizer.token_to_id(END_OF_TEXT))],
        )
        tokenizer.save(str(file), pretty=False)
        return
    cls, pad, sep, unk, mask = SPECIALS[family]
    if family == "bert":
        tokenizer = _word_piece(vocabulary_size)
    elif family == "xlm-roberta":
        tokenizer = _unigram(vocabulary_size)
    else:
        tokenizer = _byte_level(vocabulary_size, [cls, pad, sep, unk], mask)
    tokenizer.add_special_tokens([cls, pad, sep, unk, AddedToken(mask, lstrip=True, special=True)])
    ids = {token: tokenizer.token_to_id(token) for token in (cls, sep)}
    between = f"{sep} {sep}" if family != "bert" else sep
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {between} $B:1 {sep}:1",
        special_tokens=list(ids.items()),
    )
    assert tokenizer.get_vocab_size() <= vocabulary_size
    tokenizer.save(str(file), pretty=False)


def _unigram(vocabulary_size: int) -> Tokenizer:
    """XLM-R's: sentence pieces that begin with the space before them; ids as the original has them."""
    cls, pad, sep, unk, mask = SPECIALS["xlm-roberta"]
    counts = Counter("▁" + word for word in SENTENCES.split())
    total = sum(counts.values())
    pieces = {word: log(count / total) for word, count in sorted(counts.items())}
    pieces |= {letter: -12.0 for letter in chain("▁", _letters()) if letter not in pieces}
    room = vocabulary_size - 5
    vocabulary = [(token, 0.0) for token in (cls, pad, sep, unk)]
    vocabulary += [*islice(pieces.items(), room), (mask, 0.0)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=3, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return tokenizer


def _word_piece(vocabulary_size: int) -> Tokenizer:
    """BERT's, lower case: words, letters, and letters within a word."""
    cls, pad, sep, unk, mask = SPECIALS["bert"]
    letters = list(dict.fromkeys(letter.lower() for letter in _letters()))
    inner = [f"##{letter}" for letter in letters]
    words = sorted(set(SENTENCES.lower().split()) - set(letters))
    pairs = chain.from_iterable(zip(letters, inner, strict=True))
    tokens = [pad, unk, cls, sep, mask, *chain(islice(pairs, 2 * 0x60), words, pairs)]
    unique = islice(dict.fromkeys(tokens), vocabulary_size)
    vocabulary = {token: token_id for token_id, token in enumerate(unique)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=unk))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _byte_level(vocabulary_size: int, specials: list[str], mask: str | None) -> Tokenizer:
    """RoBERTa's and Qwen3's, without a merge: one token a byte, after *specials*."""
    tokens = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet()), *([mask] if mask else [])]
    assert len(tokens) <= vocabulary_size, "a byte-level vocabulary needs all bytes"
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=specials[-1]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _letters() -> Iterator[str]:
    for first, last in SCRIPTS:
        yield from map(chr, range(first, last + 1))
