"""Fast paths tried against their plain twins, on the device itself, before they are used.

Kernels differ by device, driver and version; what cannot be tested where this is written is tested
where it runs. Answers are sentences for the log, None where there is nothing to say against a path.
"""

from collections.abc import Callable
from itertools import accumulate

import torch

from trivec.backends.torch.attention import Attention, ReferenceAttention, Spans
from trivec.backends.torch.encoder import Encoder, Packed, RunBlock
from trivec.models.ops import AttentionSpec

TRIAL_LENGTHS = (1, 2, 63, 64, 65, 300)  # around the edges of kernels' blocks
COSINE_MIN = {torch.float32: 0.999999, torch.bfloat16: 0.9995, torch.float16: 0.9995}

# What a kernel that is missing, refused or miscompiled raises, through torch, Triton or flash-attn.
REFUSALS = (RuntimeError, TypeError, ValueError, AssertionError, ImportError, AttributeError)


def what_is_wrong(
    fast: Callable[[], torch.Tensor], plain: Callable[[], torch.Tensor]
) -> str | None:
    """Run both, compare them row by row: `[rows, ...]`."""
    expected = plain()
    try:
        found = fast()
    except REFUSALS as error:
        return first_words(error)
    if found.shape != expected.shape:
        return f"its shape is {tuple(found.shape)}, not {tuple(expected.shape)}"
    cosines = torch.cosine_similarity(found.double().flatten(1), expected.double().flatten(1))
    cosine_min = float(cosines.nan_to_num(-1).min())
    if cosine_min < COSINE_MIN[expected.dtype]:
        return f"its rows differ from the plain form's: minimum cosine {cosine_min:.6f}"
    return None


def first_words(error: BaseException) -> str:
    """What *error* is and the beginning of what it says: drivers and compilers say a great deal."""
    said = str(error).partition("\n")[0].partition(". ")[0]
    return f"it raised {type(error).__name__}: {said[:160]}"


def try_attention(form: Attention, encoder: Encoder) -> str | None:
    """What is wrong with *form* on random queries, keys and values of the encoder's shapes."""
    wrongs = (_wrong_for(form, spec, encoder.like) for spec in encoder.attention)
    return next((wrong for wrong in wrongs if wrong is not None), None)


def _wrong_for(form: Attention, spec: AttentionSpec, like: torch.Tensor) -> str | None:
    spans = trial_spans(like.device)
    heads = spec.heads + 2 * spec.kv_heads
    rows = random_rows((sum(spans.lengths), heads, spec.head_dim), like)
    q, k, v = rows.split([spec.heads, spec.kv_heads, spec.kv_heads], dim=1)
    return what_is_wrong(
        lambda: form.over(spans)(q, k, v, spec),
        lambda: ReferenceAttention().over(spans)(q, k, v, spec),
    )


def try_compiled(run: RunBlock, encoder: Encoder) -> str | None:
    """What is wrong with compiled blocks: the whole encoder, at several token counts."""

    def wrong_at(token_count: int) -> str | None:
        packed = _one_sequence(token_count, encoder)
        plain = ReferenceAttention()
        return what_is_wrong(lambda: encoder(packed, plain, run), lambda: encoder(packed, plain))

    # The second count shows whether the compiled form takes the count as a variable.
    counts = {min(count, encoder.config.token_count_max) for count in (64, 300, 1000)}
    return next((wrong for wrong in map(wrong_at, sorted(counts)) if wrong is not None), None)


def _one_sequence(token_count: int, encoder: Encoder) -> Packed:
    """Small ids in a row."""
    places = torch.arange(token_count, dtype=torch.int32, device=encoder.like.device)
    nothing = torch.zeros_like(places)
    starts = torch.tensor([0, token_count], dtype=torch.int32, device=places.device)
    positions = places + encoder.config.position_offset
    return Packed(places % 5, positions, nothing, nothing, Spans(starts, (token_count,)))


def trial_spans(device: torch.device) -> Spans:
    starts = [0, *accumulate(TRIAL_LENGTHS)]
    return Spans(torch.tensor(starts, dtype=torch.int32, device=device), TRIAL_LENGTHS)


def random_rows(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """The same numbers at every start, of the spread that LayerNorm leaves."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(like)
