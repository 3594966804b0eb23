"""The way between host and device: pinned, asynchronous copies on CUDA, nothing at all on CPUs.

One link a device. Launches go to one stream, in the order in which its caller makes them; results
travel on a second one, so that a large answer does not hold up the next batch.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from trivec.core.types import Int32Array


class Fetched(Protocol):
    """Tensors on their way to the host."""

    def wait(self) -> list[NDArray[np.generic]]:
        """Block until they are here. The arrays keep the host memory that they lie in alive."""
        ...


class Link(Protocol):
    device: torch.device

    def entered(self) -> AbstractContextManager[None]:
        """Make the device and its stream this thread's own for a while."""
        ...

    def up(self, array: Int32Array) -> torch.Tensor:
        """A copy of *array* on the device; the caller does not touch *array* again."""
        ...

    def down(self, tensors: Sequence[torch.Tensor]) -> Fetched: ...

    def probe(self) -> None:
        """Wait for all work of the device. Raises `RuntimeError` when it is lost."""
        ...

    def free_bytes(self) -> int | None:
        """Memory left on the device; None where nobody can say."""
        ...

    def trim(self) -> None:
        """Give cached memory back to the device."""
        ...


class HostLink:
    """The CPU: every tensor is on the host already."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    @contextmanager
    def entered(self) -> Iterator[None]:
        with torch.inference_mode():
            yield

    def up(self, array: Int32Array) -> torch.Tensor:
        return torch.from_numpy(array)

    def down(self, tensors: Sequence[torch.Tensor]) -> Fetched:
        return _Here([tensor.numpy() for tensor in tensors])

    def probe(self) -> None:
        return

    def free_bytes(self) -> int | None:
        return None

    def trim(self) -> None:
        return


class CudaLink:
    """One CUDA device. Host memory comes from torch's cache of pinned blocks, which waits for the
    copies that use a block before it lends the block again.
    """

    def __init__(self, index: int) -> None:
        self.device = torch.device("cuda", index)
        self.stream = torch.cuda.Stream(self.device)
        self._answers = torch.cuda.Stream(self.device)

    @contextmanager
    def entered(self) -> Iterator[None]:
        with torch.inference_mode(), torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            yield

    def up(self, array: Int32Array) -> torch.Tensor:
        return torch.from_numpy(array).pin_memory().to(self.device, non_blocking=True)

    def overwrite(self, tensor: torch.Tensor, array: Int32Array) -> None:
        """Copy *array* over *tensor*, in the stream's order."""
        tensor.copy_(torch.from_numpy(array).pin_memory(), non_blocking=True)

    def down(self, tensors: Sequence[torch.Tensor]) -> Fetched:
        self._answers.wait_stream(self.stream)
        hosted = []
        with torch.cuda.stream(self._answers):
            for tensor in tensors:
                host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                host.copy_(tensor, non_blocking=True)
                tensor.record_stream(self._answers)
                hosted.append(host)
            # A blocking event lets the thread sleep: spinning would take a core from tokenisers.
            arrived = torch.cuda.Event(blocking=True)
            arrived.record()
        return _OnItsWay(hosted, arrived)

    def probe(self) -> None:
        torch.cuda.synchronize(self.device)

    def free_bytes(self) -> int | None:
        return int(torch.cuda.mem_get_info(self.device)[0])

    def trim(self) -> None:
        torch.cuda.empty_cache()


class _Here:
    def __init__(self, arrays: list[NDArray[np.generic]]) -> None:
        self._arrays = arrays

    def wait(self) -> list[NDArray[np.generic]]:
        return self._arrays


class _OnItsWay:
    def __init__(self, hosted: list[torch.Tensor], arrived: torch.cuda.Event) -> None:
        self._hosted = hosted
        self._arrived = arrived

    def wait(self) -> list[NDArray[np.generic]]:
        self._arrived.synchronize()
        return [host.numpy() for host in self._hosted]
