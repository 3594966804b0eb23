"""From a checkpoint to a model on one device: weights up, then every fast path by trial."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from trivec.backends.torch.attention import AttentionChoice, ReferenceAttention, choose_attention
from trivec.backends.torch.encoder import Block, Encoder, RunBlock, Weights, run_block
from trivec.backends.torch.graphs import Graphs, rehearsal, unpack
from trivec.backends.torch.link import CudaLink, HostLink, Link
from trivec.backends.torch.model import DeviceModel, Parts
from trivec.backends.torch.trial import (
    REFUSALS,
    first_words,
    try_attention,
    try_compiled,
    what_is_wrong,
)
from trivec.backends.torch.tuning import Tuning, graph_shapes
from trivec.backends.torch.weights import load_encoder, load_heads
from trivec.checkpoints.checkpoint import Checkpoint

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GRAPH_TOKENS_MAX = 2_048  # beyond it the launches of a batch take less time than its arithmetic


@dataclass(frozen=True, slots=True)
class Built:
    """A model on a device, and what was chosen for it and why."""

    model: DeviceModel
    notes: Mapping[str, str]


def build(
    checkpoint: Checkpoint, *, precision: str, cuda_index: int | None, tuning: Tuning
) -> Built:
    """Load *checkpoint* on a CUDA device, or on the CPU. Raises `CheckpointRefused`."""
    link: Link = HostLink() if cuda_index is None else CudaLink(cuda_index)
    with link.entered():
        encoder = load_encoder(checkpoint, device=link.device, dtype=DTYPES[precision])
        attention = _choose_attention(encoder, tuning, precision=precision, link=link)
        run, compiled_note = _choose_run(encoder, tuning, link=link)
        parts = Parts(
            encoder=encoder,
            heads=load_heads(checkpoint, device=link.device),
            attention=attention.attention,
            run=run,
            config=checkpoint.config,
        )
        graphs, graphs_note = _capture(parts, tuning, link=link)
    notes = {
        "attention": attention.reason,
        "compiled": compiled_note,
        "cuda_graphs": graphs_note,
    }
    return Built(DeviceModel(parts, link, graphs), notes)


def build_exact(checkpoint: Checkpoint, like: DeviceModel) -> DeviceModel:
    """The same model in fp32, every path plain: where *like* is, or on the CPU for want of memory.

    Shares the weights of *like* when those are fp32 already.
    """
    parts = replace(like.parts, attention=ReferenceAttention(), run=run_block)
    if parts.encoder.like.dtype is torch.float32:
        return DeviceModel(parts, like.link)
    like.link.trim()  # what is cached for batches counts as taken otherwise
    free_bytes = like.link.free_bytes()
    stays = free_bytes is not None and 2 * fp32_bytes(like.parts.encoder) < free_bytes
    link = like.link if stays else HostLink()
    with link.entered():
        encoder = load_encoder(checkpoint, device=link.device, dtype=torch.float32)
        heads = load_heads(checkpoint, device=link.device)
    return DeviceModel(replace(parts, encoder=encoder, heads=heads), link)


def fp32_bytes(encoder: Encoder) -> int:
    """Bytes of the encoder's weights in fp32."""
    return sum(4 * int(tensor.numel()) for tensor in encoder.weights.values())


def _choose_attention(
    encoder: Encoder, tuning: Tuning, *, precision: str, link: Link
) -> AttentionChoice:
    return choose_attention(
        tuning.attention,
        trial=lambda form: try_attention(form, encoder),
        has_packed=isinstance(link, CudaLink) and precision != "fp32",
    )


def _choose_run(encoder: Encoder, tuning: Tuning, *, link: Link) -> tuple[RunBlock, str]:
    """How blocks run, compiled where that is asked for or wins, and why."""
    if tuning.compiled is False:
        return run_block, "no: not asked for"
    if tuning.compiled is None and not isinstance(link, CudaLink):
        return run_block, "no: on CPUs the matrix products leave nothing to win"
    if isinstance(link, CudaLink) and importlib.util.find_spec("triton") is None:
        return run_block, "no: triton is not installed"
    compiled = _compiled_run()
    wrong = try_compiled(compiled, encoder)
    return (run_block, f"no: {wrong}") if wrong is not None else (compiled, "yes")


def _compiled_run() -> RunBlock:
    """`run_block` compiled once for any token count and for the model's own widths.

    With `dynamic=True` the weights' sizes, and LayerNorm's eps, would be variables as well: kernels
    could not know how long the rows are that they sum.
    """
    compiled = torch.compile(run_block)

    def run(function: Block, weights: Weights, *values: object) -> torch.Tensor:
        for value in values:
            if isinstance(value, torch.Tensor):
                torch._dynamo.maybe_mark_dynamic(value, 0)
        return compiled(function, weights, *values)

    return run


def _capture(parts: Parts, tuning: Tuning, *, link: Link) -> tuple[Graphs | None, str]:
    """CUDA graphs of small batches, tried on the smallest, and why not."""
    if not isinstance(link, CudaLink):
        return None, "no: not on a CUDA device"
    if not parts.attention.is_capturable:
        return None, f"no: {parts.attention.name} attention lays each batch out anew on the host"
    tokens_max = GRAPH_TOKENS_MAX if tuning.graph_tokens_max is None else tuning.graph_tokens_max
    if tokens_max == 0:
        return None, "no: not asked for"
    try:
        graphs = Graphs.capture(parts.encode, graph_shapes(tokens_max), link)
    except REFUSALS as error:
        return None, f"no: {first_words(error)}"
    layout = rehearsal(graphs.shapes[-1], sequence_count=2)
    plain = unpack(link.up(layout.words), layout.shape, layout.lengths)
    wrong = what_is_wrong(lambda: graphs.replay(layout, link)[1], lambda: parts.encode(plain))
    if wrong is not None:
        return None, f"no: {wrong}"
    return graphs, f"{len(graphs.shapes)} shapes, up to {tokens_max} tokens"
