"""What of the engine is worth turning, with the values it starts from; `benchmarks/gpu.py` turns it.

Pure: numbers in, budgets and shapes out.
"""

from dataclasses import dataclass, replace

from trivec.backends.torch.layout import Shape
from trivec.core.types import BatchBudget
from trivec.models.ops import ModelConfig

# Matrix products of 1,024-wide encoders fill a Hopper from about 8,000 rows on; twice that keeps
# the launches of a batch well under its own time, and a query never waits longer than 30 ms for it.
CUDA_TOKENS_MAX = 16_384
CPU_TOKENS_MAX = 1_024
GRAPH_SEQUENCE_COUNTS = (256, 32, 2)
SHORTEST_TEXT_TOKENS = 8  # sequences_max = tokens_max / this
MEMORY_SHARE_MAX = 0.5  # of what is free after the weights: the rest is for fp32 re-runs and others


@dataclass(frozen=True, slots=True)
class Tuning:
    """How the devices are driven. Every field changes speed or memory, none the vectors' meaning."""

    tokens_max: int | None = None  # None: by device and free memory
    # Two threads share one stream: while one batch runs, the next is packed and its launches
    # queue behind it, so the device does not wait for the host between batches.
    slots_per_device: int | None = None  # None: 2 on CUDA, 1 on CPU
    attention: str | None = None  # a form's name; None: the first that passes its trial
    compiled: bool | None = None  # None: on CUDA, when its trial passes
    graph_tokens_max: int | None = None  # None: 2,048 on CUDA; 0: no CUDA graphs


def token_budget(
    tuning: Tuning, config: ModelConfig, *, cuda: bool, free_bytes: int | None
) -> BatchBudget:
    """What one batch may hold on a device with *free_bytes* left after the weights."""
    if tuning.tokens_max is not None:
        tokens_max = tuning.tokens_max
    else:
        tokens_max = CUDA_TOKENS_MAX if cuda else CPU_TOKENS_MAX
        if free_bytes is not None:
            fitting = int(MEMORY_SHARE_MAX * free_bytes) // token_bytes(config)
            tokens_max = max(min(tokens_max, fitting), SHORTEST_TEXT_TOKENS)
    return BatchBudget(tokens_max, max(tokens_max // SHORTEST_TEXT_TOKENS, 1))


def token_bytes(config: ModelConfig) -> int:
    """Bytes of activations one token needs at the worst moment of a half-precision pass.

    In the feed-forward half: its inner rows before and after GELU (2 bytes each), the rows of the
    residual in half and in fp32, queries, keys and values; then the heads' fp32 copies, twice.
    """
    encoder = 2 * 2 * config.intermediate_size + (2 + 4 + 4 + 3 * 2) * config.hidden_size
    heads = 3 * 4 * config.hidden_size
    return max(encoder, heads) * 5 // 4  # the allocator's own rounding


def smaller(budget: BatchBudget, failed_tokens: int) -> BatchBudget:
    """The budget after a batch of *failed_tokens* did not fit in memory: half of what failed."""
    tokens_max = max(min(budget.tokens_max, failed_tokens // 2), 1)
    return replace(budget, tokens_max=tokens_max)


def round_tokens(tokens: int) -> int:
    """The token count a captured graph is made for: filler at most 1/4 above 256, doubling below.

    Below some 500 tokens a Hopper spends its time on reading weights and on launches, so that
    filler costs next to nothing there.
    """
    doubled = 1 << (tokens - 1).bit_length()
    if tokens <= 256:
        return max(32, doubled)
    step = max(doubled // 8, 64)
    return -(-tokens // step) * step


def graph_shapes(tokens_max: int) -> tuple[Shape, ...]:
    """Every shape to capture, largest first, so that the later ones fit in the first one's memory.

    The sequence counts are few: attention starts a block of threads for every 128 tokens of every
    sequence and head, and an empty sequence's blocks end at once but are not free.
    """
    rounded = {round_tokens(tokens) for tokens in range(1, tokens_max + 1)}
    return tuple(
        Shape(token_count, sequence_count)
        for token_count in sorted(rounded, reverse=True)
        for sequence_count in GRAPH_SEQUENCE_COUNTS
        if token_count <= tokens_max and sequence_count <= token_count // 2
    )


def graph_shape(token_count: int, sequence_count: int, shapes: tuple[Shape, ...]) -> Shape | None:
    """The captured shape that wastes least on a batch; None when none holds it."""
    fitting = [
        shape
        for shape in shapes
        if shape.token_count >= token_count
        and shape.sequence_count >= sequence_count + (shape.token_count > token_count)
    ]
    return min(fitting, key=lambda shape: (shape.token_count, shape.sequence_count), default=None)
