"""One embedder in a process of its own: JSON lines in, JSON lines out.

    python -m benchmarks.peer KIND MODEL_DIR cls|mean|last PRECISION WORK_DIR

It runs in a peer's own environment, so it knows numpy and, but for our own engine, nothing of ours.
Between two questions it waits on its input and costs nothing: that makes interleaved repeats fair.
Question: `{"texts": [...]}`. Answer: `{"seconds": s, "vectors": [[...], ...]}` with the first few; or
`{"failed": "..."}`, where it cannot be loaded.
"""

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

CHECKED = 8  # vectors sent back for a look at whether everybody computes the same thing
BATCH = 32  # texts at once, the default of sentence-transformers

Embed: TypeAlias = Callable[[Sequence[str]], Any]  # texts to float32 [texts, dimensions]


def in_batches(embed: Embed) -> Embed:
    """*embed* over batches of neighbours in length, longest first, as every fast peer does it."""

    def whole(texts: Sequence[str]) -> Any:
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        parts = [
            np.asarray(embed([texts[i] for i in order[at : at + BATCH]]), np.float32)
            for at in range(0, len(order), BATCH)
        ]
        vectors = np.empty((len(texts), parts[0].shape[1]), np.float32)
        vectors[order] = np.concatenate(parts)
        return vectors

    return whole


def pooled(hidden: Any, mask: Any, pooling: str) -> Any:
    """Unit vectors of *hidden* `[texts, length, hidden]`, whose tokens *mask* `[texts, length]` has."""
    if pooling != "mean":
        rows = hidden[np.arange(len(mask)), mask.sum(1) - 1 if pooling == "last" else 0]
    else:
        weight = mask[..., None].astype(np.float32)
        rows = (hidden * weight).sum(1) / weight.sum(1)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def tokenizer_of(folder: Path) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def sentence_transformers(folder: Path, pooling: str, precision: str, work: Path) -> Embed:
    """What most people run, fp32 on torch."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    return lambda texts: model.encode(list(texts), batch_size=BATCH, show_progress_bar=False)


def flagembedding(folder: Path, pooling: str, precision: str, work: Path) -> Embed:
    """The home of BGE-M3, fp32 on torch; dense vectors only, of the first token."""
    from FlagEmbedding import BGEM3FlagModel

    model = BGEM3FlagModel(str(folder), use_fp16=False, devices="cpu")
    return lambda texts: model.encode(list(texts), batch_size=BATCH)["dense_vecs"]


def ctranslate2(folder: Path, pooling: str, precision: str, work: Path) -> Embed:
    """CTranslate2's encoder, converted from the same folder; it packs away padding by itself."""
    import ctranslate2 as library

    if not (converted := work / "ctranslate2").exists():
        library.converters.TransformersConverter(str(folder)).convert(str(converted))
    encoder = library.Encoder(str(converted), device="cpu", compute_type=precision)
    tokenizer = tokenizer_of(folder)

    def embed(texts: Sequence[str]) -> Any:
        ids = [one.ids for one in tokenizer.encode_batch(list(texts))]
        hidden = np.array(encoder.forward_batch(ids).last_hidden_state)
        mask = np.arange(hidden.shape[1])[None, :] < np.array([[len(one)] for one in ids])
        return pooled(hidden, mask, pooling)

    return in_batches(embed)


def onnxruntime(folder: Path, pooling: str, precision: str, work: Path) -> Embed:
    """ONNX Runtime on a graph exported from torch; int8 is its dynamic quantisation."""
    import onnxruntime as library

    work.mkdir(parents=True, exist_ok=True)
    if not (file := work / "model.onnx").exists():
        export_onnx(folder, file)
    if precision == "int8":
        if not (target := work / "model_int8.onnx").exists():
            from onnxruntime.quantization import QuantType, quantize_dynamic

            beside = [*work.glob("*.data"), *work.glob("encoder.*")]  # weights over 2 GiB
            quantize_dynamic(
                file,
                target,
                per_channel=True,
                weight_type=QuantType.QInt8,
                op_types_to_quantize=["MatMul", "Gemm"],
                use_external_data_format=bool(beside) or file.stat().st_size > 2**31,
            )
        file = target
    session, tokenizer = library.InferenceSession(file), tokenizer_of(folder)
    tokenizer.enable_padding()

    def embed(texts: Sequence[str]) -> Any:
        encodings = tokenizer.encode_batch(list(texts))
        mask = np.array([one.attention_mask for one in encodings], np.int64)
        ids = np.array([one.ids for one in encodings], np.int64)
        hidden = session.run(None, {"input_ids": ids, "attention_mask": mask})[0]
        return pooled(hidden, mask, pooling)

    return in_batches(embed)


def export_onnx(folder: Path, file: Path) -> None:
    import torch
    from transformers import AutoModel

    class Hidden(torch.nn.Module):  # type: ignore[misc, name-defined, unused-ignore]
        def __init__(self) -> None:
            super().__init__()
            self.encoder = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0]

    axes = {0: "texts", 1: "length"}
    sample = torch.full((2, 8), 5, dtype=torch.long)
    torch.onnx.export(
        Hidden(),
        (sample, torch.ones_like(sample)),
        str(file),  # over 2 GiB only a plain string makes it write the weights beside the graph
        input_names=["input_ids", "attention_mask"],
        output_names=["hidden"],
        dynamic_axes={"input_ids": axes, "attention_mask": axes, "hidden": axes},
        opset_version=17,
        dynamo=False,
    )


def trivec(folder: Path, pooling: str, precision: str, work: Path) -> Embed:
    """Our own engine: tokenise, embed, vectors; on an event loop of its own."""
    from concurrent.futures import Future
    from threading import Thread

    from benchmarks import harness

    from trivec.core.types import LongText, Output
    from trivec.server.machine import usable_cores

    settings = harness.quiet_settings(
        f"bench={folder}", precision=precision, data_dir=work / "trivec"
    )
    loaded: Future[harness.EngineOnTrial] = Future()
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        try:
            async with harness.engine_on_trial(settings, cores=usable_cores()) as trial:
                loaded.set_result(trial)
                await asyncio.Event().wait()  # until the process ends
        except Exception as error:
            loaded.set_exception(error)

    Thread(target=loop.run_until_complete, args=(serve(),), daemon=True).start()
    trial = loaded.result()

    async def embed_all(texts: Sequence[str]) -> Any:
        at_once = harness.REQUESTS_AT_ONCE
        vectors = np.empty((len(texts), trial.embedder.card.dimensions), np.float32)

        async def embed_part(part: slice) -> None:
            if texts[part]:
                sequences = await trial.embedder.tokenizer.tokenize(
                    texts[part], long_text=LongText.CUT_END
                )
                reply = await trial.embedder.embed(sequences, Output.DENSE)
                vectors[part] = reply.vectors.dense

        parts = (slice(i, None, at_once) for i in range(at_once))
        await asyncio.gather(*map(embed_part, parts))
        return vectors

    return lambda texts: asyncio.run_coroutine_threadsafe(embed_all(texts), loop).result()


KINDS = (sentence_transformers, flagembedding, ctranslate2, onnxruntime, trivec)


def main() -> None:
    talk = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is talk, not an answer
    kind, folder, pooling, precision, work = sys.argv[1:6]
    load = next(one for one in KINDS if one.__name__ == kind)
    try:
        embed = load(Path(folder), pooling, precision, Path(work))
    except Exception as error:  # others' code, which may raise anything
        print(json.dumps({"failed": f"{type(error).__name__}: {error}"}), file=talk, flush=True)
        sys.exit(1)
    print(json.dumps({"loaded": True}), file=talk, flush=True)
    for line in sys.stdin:
        texts = json.loads(line)["texts"]
        started_s = time.perf_counter()
        vectors = embed(texts)
        seconds = time.perf_counter() - started_s
        few = np.asarray(vectors[:CHECKED], np.float32).tolist()
        print(json.dumps({"seconds": seconds, "vectors": few}), file=talk, flush=True)
    os._exit(0)  # our own engine's threads wait for work for ever


if __name__ == "__main__":
    main()
