"""OpenAI's token encodings: tiktoken's ids back to the texts that they were made of.

Clients such as LangChain's `OpenAIEmbeddings` send ids of `cl100k_base` to any server. Decoding
needs no tokenizer: a token is some bytes, and a text is its tokens' bytes end to end. Which bytes
is read from the data files of an installed package, which is not imported (decision 0011).
"""

import gzip
import hashlib
import zlib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path

import pybase64

from trivec.core.errors import FieldInvalid

DISTRIBUTION = "bpe-openai"
SHA256 = {  # of the unpacked files, as OpenAI's own tiktoken expects them
    "cl100k_base": "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
    "o200k_base": "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
}
SPECIAL_TOKENS = {
    "cl100k_base": {
        100257: b"<|endoftext|>",
        100258: b"<|fim_prefix|>",
        100259: b"<|fim_middle|>",
        100260: b"<|fim_suffix|>",
        100276: b"<|endofprompt|>",
    },
    "o200k_base": {199999: b"<|endoftext|>", 200018: b"<|endofprompt|>"},
}


def decode(lists: Sequence[Sequence[int]], encoding: str) -> list[str]:
    """The texts of *lists* of token ids. Bytes that are no UTF-8, as at a cut, become U+FFFD.

    Raises `FieldInvalid` for an id that *encoding* does not have, and as `token_table` does. The
    first call reads the table, which takes some 0.2 s.
    """
    tokens = token_table(encoding)
    texts: list[str] = []
    for i, ids in enumerate(lists):
        try:
            texts.append(b"".join([tokens[one] for one in ids]).decode("utf-8", "replace"))
        except KeyError as unknown:
            raise FieldInvalid(
                f"Token id {unknown} in input[{i}] is none of {encoding}'s. Send the text itself, "
                "or name the encoding that made the ids in 'token_encoding'.",
                param=f"input[{i}]",
            ) from None
    return texts


@cache
def token_table(encoding: str) -> Mapping[int, bytes]:
    """The bytes of each token of *encoding*, by id. Raises as `table_bytes` does."""
    tokens = dict(SPECIAL_TOKENS[encoding])
    for line in table_bytes(encoding).splitlines():  # a token in base64, a blank, its id
        token, _, token_id = line.partition(b" ")
        tokens[int(token_id)] = pybase64.b64decode(token)
    return tokens


def table_bytes(encoding: str) -> bytes:
    """The table of *encoding* as OpenAI publishes it. Raises `FieldInvalid` where it is not here."""
    try:
        folder = metadata.distribution(DISTRIBUTION).locate_file("bpe_openai/data")
        packed = Path(str(folder), f"{encoding}.tiktoken.gz").read_bytes()
        lines = gzip.decompress(packed)
    except (metadata.PackageNotFoundError, OSError, EOFError, zlib.error) as fault:
        raise FieldInvalid(
            f"This server lacks the table of {encoding}. Send texts instead; whoever runs it can "
            "install trivec[openai-tokens].",
            param="token_encoding",
        ) from fault
    if hashlib.sha256(lines).hexdigest() != SHA256[encoding]:
        raise FieldInvalid(
            f"This server's table of {encoding} is not OpenAI's. Send texts instead; whoever runs "
            f"it must install {DISTRIBUTION} again.",
            param="token_encoding",
        )
    return lines
