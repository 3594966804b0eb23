"""What a driver's exception means for the backend: too large a batch, a lost device, or neither."""

from collections.abc import Callable

import torch

# cudaErrorMemoryAllocation, as cuBLAS and the driver word it when they, not torch, ran out.
OUT_OF_MEMORY_WORDS = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch may succeed."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in OUT_OF_MEMORY_WORDS
    )


def why_lost(error: BaseException, *, probe: Callable[[], None]) -> str | None:
    """What the driver says when the device cannot work again; None when it still can.

    Faults such as a device-side assert, an illegal address or an uncorrectable memory error stay
    with the process: every later call fails with them. So the device is asked (*probe* waits for
    its queued work) rather than the many codes and wordings matched.
    """
    if not isinstance(error, RuntimeError):
        return None
    try:
        probe()
    except RuntimeError as sticky:
        return str(sticky).partition("\n")[0]
    return None
