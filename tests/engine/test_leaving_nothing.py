"""A request that failed is gone at once: what its callers hold does not wait for the collector."""

import asyncio
import gc
import weakref

import numpy as np
import pytest
from tests.engine.rig import Rig, sequences

from trivec.backends.fake import Poison
from trivec.core.errors import EngineFault
from trivec.core.types import Output, Sequences

BAD = 200_001


class Mark:
    """Stands for what a request's callers hold, as its body."""


@pytest.mark.parametrize("text", [[1, BAD, 2], [1, 3, 2]], ids=["which-fails", "whose-client-left"])
async def test_nothing_that_a_failed_request_held_waits_for_the_collector(text: list[int]) -> None:
    held: list[weakref.ref[Mark]] = []

    async def call(rig: Rig) -> None:
        mark = Mark()
        held.append(weakref.ref(mark))
        await rig.engine.embed(Sequences.pack([np.array(text, np.int32)]), Output.DENSE)

    gc.collect()
    gc.disable()
    try:
        async with Rig() as rig:
            rig.backend.poison[BAD] = Poison.RAISE
            rig.backend.gate.clear()
            task = asyncio.create_task(call(rig))
            await rig.entered(1)
            if BAD not in text:
                task.cancel()
            rig.backend.gate.set()
            await asyncio.wait([task])
            assert task.cancelled() or isinstance(task.exception(), EngineFault)
            del task
            await rig.engine.embed(sequences(3), Output.DENSE)  # a slot keeps its last job in hand
            assert held[0]() is None
    finally:
        gc.enable()
