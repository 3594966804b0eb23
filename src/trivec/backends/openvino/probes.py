"""The texts that a certificate is judged by: our own sentences, in many scripts and lengths.

Two sets that share no sentence: one to see how large each channel grows, one to compare vectors.
"""

import json
from dataclasses import dataclass
from importlib import resources

import numpy as np
from tokenizers import Tokenizer

from trivec.checkpoints.checkpoint import Checkpoint
from trivec.core.types import Batch, Output, Sequences

LENGTHS_MADE = (3, 4, 6, 9, 64, 128, 256, 512)  # beside the sentences' own, special tokens included


@dataclass(frozen=True, slots=True)
class Probes:
    """Both sets, tokenised for one model."""

    calibration: Sequences
    judgement: Sequences


def read_sentences() -> dict[str, tuple[str, str]]:
    """Two sentences a script or language."""
    text = resources.files("trivec.backends.openvino").joinpath("probes.json").read_text("utf-8")
    return {script: (pair[0], pair[1]) for script, pair in json.loads(text).items()}


def make_probes(checkpoint: Checkpoint) -> Probes:
    """The probes in *checkpoint*'s own token ids, none longer than it reads."""
    tokenizer = Tokenizer.from_file(str(checkpoint.tokenizer_file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    pairs = read_sentences().values()
    ids = [
        [encoding.ids for encoding in tokenizer.encode_batch([pair[half] for pair in pairs])]
        for half in (0, 1)
    ]
    limit = checkpoint.token_count_max
    return Probes(*(Sequences.pack(_with_lengths(half, limit)) for half in ids))


def _with_lengths(sentences: list[list[int]], token_count_max: int) -> list[list[int]]:
    """*sentences* and sequences of `LENGTHS_MADE` tokens cut from them laid end to end."""
    first, last = sentences[0][0], sentences[0][-1]
    bodies = [token for ids in sentences for token in ids[1:-1]]
    made = [
        [first, *bodies[shift : shift + length - 2], last]
        for shift, length in enumerate(LENGTHS_MADE)
        if length <= token_count_max
    ]
    return [ids for ids in sentences if len(ids) <= token_count_max] + made


def as_batch(sequences: Sequences, outputs: Output) -> Batch:
    """*sequences* with the same *outputs* for each."""
    flags = np.full(len(sequences), int(outputs), np.uint8)
    return Batch(sequences.token_ids, sequences.cu_seqlens, flags)
