r"""How well arrays of another tokenizer's ids are told from a model's own: rates by length.

    python -m benchmarks.token_arrays --tokenizer tokenizer.json --sentences FOLDER \
        --other cl100k_base.js --other other/tokenizer.json

FOLDER holds CSV files of sentence pairs, a language each (STS-B); Python's own standard library is
the code. Ranks are the files of the npm package js-tiktoken, and need `pip install tiktoken`. The
last line is JSON. Genuine arrays are whole texts and texts joined and cut anywhere, 2 to 512 ids.
"""

import argparse
import base64
import csv
import json
import os
import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import tokenizers

from trivec.tokenizer.origin import TokenOrigin

Encode = Callable[[str], Sequence[int]]
LENGTHS = (2, 5, 8, 16, 32, 64, 600)
CODE_CHARACTERS = 400


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--sentences", type=Path, required=True)
    parser.add_argument("--other", type=Path, action="append", default=[])
    parser.add_argument("--arrays", type=int, default=20_000, help="of each kind")
    given = parser.parse_args()
    codec = _codec(given.tokenizer)
    origin, vocabulary_size = TokenOrigin(codec), codec.get_vocab_size()
    texts = _texts(given.sentences)

    def share_refused(arrays: Sequence[Sequence[int]]) -> dict[str, object]:
        verdicts = [_is_refused(origin, vocabulary_size, ids) for ids in arrays]
        return {"arrays": len(arrays), "refused": round(sum(verdicts) / max(1, len(arrays)), 5)}

    kinds: dict[str, Encode] = {"own": _encoder(codec)}
    kinds |= {str(file.stem): _other(file) for file in given.other}
    report: dict[str, dict[str, object]] = {}
    for name, encode in kinds.items():
        arrays = _arrays(encode, texts, count=given.arrays)
        rows: dict[str, object] = {}
        for low, high in pairwise(LENGTHS):
            rows[f"{low}-{high - 1}"] = share_refused([a for a in arrays if low <= len(a) < high])
        rows["5 and more"] = share_refused([a for a in arrays if len(a) >= 5])
        report[name] = rows
        for lengths, row in rows.items():
            print(f"{name:14} {lengths:>10} ids  {row}")
    print(json.dumps({"benchmark": "token_arrays", "model": given.tokenizer.name, **report}))


def _is_refused(origin: TokenOrigin, vocabulary_size: int, ids: Sequence[int]) -> bool:
    return max(ids) >= vocabulary_size or origin.is_another([np.array(ids, np.int32)])


def _arrays(encode: Encode, texts: Sequence[Sequence[str]], *, count: int) -> list[list[int]]:
    draw = random.Random(0)
    arrays = []
    for _ in range(count):
        kind = draw.choice(texts)
        if draw.random() < 0.4:
            arrays.append(list(encode(draw.choice(kind))))
            continue
        length, first, at = round(2 ** draw.uniform(1, 9)), draw.randrange(8), draw.randrange(10**6)
        ids: list[int] = []
        while len(ids) < first + length:
            ids += encode(kind[at % len(kind)])
            at += 1
        arrays.append(ids[first : first + length])
    return [ids for ids in arrays if len(ids) >= 2]


def _texts(folder: Path) -> list[list[str]]:
    """Texts of each kind: a language a file, and code."""
    kinds = []
    for file in sorted(folder.glob("*.csv")):
        with file.open(encoding="utf-8", newline="") as lines:
            kinds.append([text for row in csv.reader(lines) for text in row[:2] if text])
    code: list[str] = []
    for file in sorted(Path(os.__file__).parent.glob("*.py"))[:60]:
        source = file.read_text("utf-8", "ignore")[:8000]
        code += [source[i : i + CODE_CHARACTERS] for i in range(0, len(source), CODE_CHARACTERS)]
    return [*kinds, code]


def _codec(file: Path) -> tokenizers.Tokenizer:
    codec = tokenizers.Tokenizer.from_file(str(file))
    codec.no_padding()
    codec.no_truncation()
    return codec


def _encoder(codec: tokenizers.Tokenizer) -> Encode:
    return lambda text: codec.encode(text, add_special_tokens=False).ids


def _other(file: Path) -> Encode:
    if file.suffix == ".json":
        return _encoder(_codec(file))
    import tiktoken  # type: ignore[import-not-found] # not among our requirements

    body = file.read_text("utf-8").removeprefix("export default ").rstrip().rstrip(";")
    given = json.loads(body)
    ranks: dict[bytes, int] = {}
    for line in given["bpe_ranks"].split("\n"):
        _, first, *words = line.split(" ")
        ranks |= {base64.b64decode(word): int(first) + i for i, word in enumerate(words)}
    encoding = tiktoken.Encoding(
        file.stem,
        pat_str=given["pat_str"],
        mergeable_ranks=ranks,
        special_tokens=given["special_tokens"],
    )
    encode: Encode = encoding.encode_ordinary
    return encode


if __name__ == "__main__":
    main()
