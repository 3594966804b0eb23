# ruff: noqa: E402 - what is imported below needs what is asked for above it
"""The order that int8 gives documents beside fp32's: Kendall's tau, query by query.

Texts of the STS benchmark in five languages and of the Big List of Naughty Strings; each query has
documents of its own. A moderate number by default; the full one, some minutes:

    RANK_QUERIES=200 RANK_DOCUMENTS=50 make test-reference ARGS="-s tests/reference/test_rank_agreement.py"

What is compared is what is served: `auto` takes the fastest recipe whose certificate holds, and fp32
where none does, so tau must hold whatever the model. A cross-encoder of random weights would say
little of int8: its head reads a random direction, along which the texts hardly differ, so that their
scores are nearly tied and any rounding reorders them (tau 0.96 of recipes that keep a trained
model's order; their certificates fail, and fp32 is served). A trained head reads a direction in which
texts do differ. So the seeded ones are given such a head, the first principal component of what it
reads within a query. Their 64 channels round more than a thousand do: of some classes every int8 recipe
is refused for its order, and it is that which is tested. Exact ties in fp32 (texts of the same tokens) do
not count.
"""

import csv
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

torch = pytest.importorskip("torch", reason="the reference runs on torch")
transformers = pytest.importorskip("transformers", reason="the reference is transformers")

from tests.reference.test_heads import CLASSES, write
from tests.support.dummy import blueprint_of, write_dummy
from tokenizers import Tokenizer as Codec

from trivec.backends.openvino import OpenVinoBackend
from trivec.backends.openvino.packing import as_batch
from trivec.backends.openvino.quantise import INT8_CONV, INT8_GROUPS_128, INT8_ROWS
from trivec.backends.openvino.trial import ProductTrial
from trivec.checkpoints import open_checkpoint
from trivec.checkpoints.checkpoint import Checkpoint
from trivec.core.types import Batch, LongText, Output
from trivec.models.scoring import WEIGHTS, fused_score
from trivec.tokenizer import Tokenizer

pytestmark = pytest.mark.reference

QUERIES = int(os.environ.get("RANK_QUERIES", "8"))
DOCUMENTS = int(os.environ.get("RANK_DOCUMENTS", "25"))
TAU_MIN = 0.98
RUN_AT_ONCE = 500
NAMES = (
    "bert",
    "xlm-roberta",
    "modernbert-cls",
    "distilbert",
    "mpnet",
    "gte",
    "nomic-bert",
    "qwen3",
)
SERVED_IN_INT8 = {"bert", "xlm-roberta", "qwen3", "all-minilm-l6-v2", "baai/bge-m3"}


@pytest.fixture(autouse=True)
def int8_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else `auto` takes fp32 in layers as narrow as the seeded ones', or on a CPU without VNNI."""
    fast = ProductTrial(speed=2.0, exact_bits=8, weights_only=False)
    tried = dict.fromkeys((INT8_ROWS, INT8_CONV, INT8_GROUPS_128), fast)
    monkeypatch.setattr("trivec.backends.openvino.calibrate.try_products", lambda *_: tried)


@pytest.fixture(scope="module")
def pairs(shared_data: Path) -> list[tuple[str, str]]:
    """QUERIES times DOCUMENTS pairs, a query's next to each other."""
    texts: dict[str, None] = {}
    for file in sorted((shared_data / "stsb").glob("*.csv")):
        with file.open(encoding="utf-8", newline="") as opened:
            texts |= dict.fromkeys(text for row in csv.reader(opened) for text in row[:2])
    naughty = json.loads((shared_data / "blns" / "blns.json").read_text("utf-8"))
    texts |= dict.fromkeys(one for one in naughty if one.strip())
    draw, known = np.random.default_rng(14), list(texts)
    order = draw.permutation(len(known))
    found = []
    for query in order[:QUERIES]:
        chosen = draw.choice(order[QUERIES:], DOCUMENTS, replace=False)
        found += [(known[query], known[document]) for document in chosen]
    return found


def taus(exact: NDArray[Any], other: NDArray[Any]) -> NDArray[np.float64]:
    """Kendall's tau of each query: `[queries]`, of scores `[queries, documents]`."""
    ups, downs = np.triu_indices(exact.shape[1], 1)
    signs = np.sign(exact[:, ups] - exact[:, downs])
    agree = signs * np.sign(other[:, ups] - other[:, downs])
    return np.asarray(agree.sum(axis=1) / (signs != 0).sum(axis=1))


def check(name: str, exact: NDArray[Any], other: NDArray[Any], recipe: str) -> None:
    found = taus(exact.reshape(QUERIES, DOCUMENTS), other.reshape(QUERIES, DOCUMENTS))
    print(f"{name}: {recipe}, tau {found.mean():.4f} mean, {found.min():.4f} least")  # noqa: T201
    assert found.mean() >= TAU_MIN


def open_both(
    name: str, checkpoint: Checkpoint, folder: Path
) -> tuple[OpenVinoBackend, OpenVinoBackend]:
    """The backend in fp32, and as it is served: in int8, or its order was refused.

    Where int8 is expected it is asked for, since `auto` also asks whether it is faster here today.
    """
    is_int8 = name in SERVED_IN_INT8
    exact, served = (
        OpenVinoBackend.load(checkpoint, precision=precision, cores=1, cache_dir=folder / "kept")
        for precision in ("fp32", "int8" if is_int8 else "auto")
    )
    assert is_int8 == ("FAILS" not in summary_of(served)), summary_of(served)
    assert served.precision == ("int8" if is_int8 else "fp32")
    return exact, served


def summary_of(backend: OpenVinoBackend) -> str:
    assert backend.certificate is not None
    return backend.certificate.summary


def read_direction_of_most_variance(model: Any, codec: Codec, pairs: list[tuple[str, str]]) -> None:
    """Give *model*'s last layer the first principal component of its input, within a query."""
    [last] = [
        one
        for one in model.modules()
        if isinstance(one, torch.nn.Linear) and one.out_features == model.config.num_labels
    ]
    seen: list[Any] = []
    hook = last.register_forward_pre_hook(
        lambda _, given: seen.append(given[0].reshape(-1, given[0].shape[-1])[-1])
    )
    queries = min(8, QUERIES)
    with torch.inference_mode():
        for i in range(queries):
            for query, document in pairs[i * DOCUMENTS : i * DOCUMENTS + min(24, DOCUMENTS)]:
                model(input_ids=torch.tensor([codec.encode(query, document).ids[:500]]))
    hook.remove()
    rows = torch.stack(seen).reshape(queries, -1, seen[0].shape[-1])
    rows = (rows - rows.mean(dim=1, keepdim=True)).flatten(0, 1)
    _, strengths, directions = torch.linalg.svd(rows, full_matrices=False)
    with torch.no_grad():
        last.weight.copy_(directions[:1] * (2 * len(rows) ** 0.5 / strengths[0]))


@pytest.mark.parametrize("name", NAMES)
async def test_int8_ranks_as_fp32_does(
    name: str, pairs: list[tuple[str, str]], shared_data: Path, tmp_path: Path
) -> None:
    family, kind, config = CLASSES[name]
    tokenizer_file = shared_data / "xlmr-tokenizer" / "tokenizer.json"
    folder = tmp_path / "model"
    codec = Codec.from_file(str(tokenizer_file))
    model = write(folder, (family, kind, config | {"vocab_size": codec.get_vocab_size()}))
    read_direction_of_most_variance(model, codec, pairs)
    model.save_pretrained(folder)
    shutil.copyfile(tokenizer_file, folder / "tokenizer.json")  # of texts in every language
    checkpoint = open_checkpoint(str(folder), cache_dir=tmp_path / "cache")
    with ThreadPoolExecutor(1) as pool:
        tokenizer = Tokenizer(
            checkpoint.tokenizer_file,
            token_count_max=checkpoint.token_count_max,
            vocabulary_size=checkpoint.config.vocab_size,
            pool=pool,
            rules=checkpoint.rules,
        )
        read = await tokenizer.tokenize_pairs(pairs, long_text=LongText.CUT_END)
    flags = np.full(len(read), Output.SCORE, np.uint8)
    batch = Batch(read.token_ids, read.cu_seqlens, flags, read.token_types)
    exact, served = open_both(name, checkpoint, tmp_path)
    check(name, scores_of(exact, batch), scores_of(served, batch), summary_of(served))


def scores_of(backend: OpenVinoBackend, batch: Batch) -> NDArray[np.float32]:
    parts = [
        backend.run(batch.take(np.arange(i, min(i + RUN_AT_ONCE, len(batch)))), slot=0).score
        for i in range(0, len(batch), RUN_AT_ONCE)
    ]
    return np.concatenate(parts)[:, 0]


@pytest.mark.parametrize("name", ["all-minilm-l6-v2", "baai/bge-m3"])
async def test_int8_vectors_rank_as_fp32s_do(
    name: str, pairs: list[tuple[str, str]], shared_data: Path, tmp_path: Path
) -> None:
    """MiniLM's own weights by cosine; the fusion of BGE-M3's three vectors on a dummy of its shape."""
    if name == "baai/bge-m3":
        file = shared_data / "xlmr-tokenizer" / "tokenizer.json"
        write_dummy(tmp_path / "model", blueprint_of(name).with_layers(2), tokenizer_file=file)
        checkpoint = open_checkpoint(f"{name}={tmp_path / 'model'}", cache_dir=tmp_path / "cache")
    else:
        checkpoint = open_checkpoint(name, cache_dir=tmp_path / "cache")
    weights = {one: WEIGHTS[one] for one in WEIGHTS if one in checkpoint.outputs}
    texts = list(dict.fromkeys(text for pair in pairs for text in pair))
    with ThreadPoolExecutor(1) as pool:
        tokenizer = Tokenizer(
            checkpoint.tokenizer_file,
            token_count_max=checkpoint.token_count_max,
            vocabulary_size=checkpoint.config.vocab_size,
            pool=pool,
        )
        read = await tokenizer.tokenize(texts, long_text=LongText.CUT_END)
    batch = as_batch(read, Output(sum(weights)))
    found = []
    backends = open_both(name, checkpoint, tmp_path)
    for backend in backends:
        rows: dict[str, dict[Output, Any]] = {}
        for i in range(0, len(texts), RUN_AT_ONCE):
            part = np.arange(i, min(i + RUN_AT_ONCE, len(texts)))
            vectors = backend.run(batch.take(part), slot=0)
            rows |= {texts[k]: {output: vectors[output][k - i] for output in weights} for k in part}
        found.append(np.array([fused_score(rows[a], rows[b], weights) for a, b in pairs]))
    check(name, found[0], found[1], summary_of(backends[1]))
