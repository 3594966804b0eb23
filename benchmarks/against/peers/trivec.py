"""Our own engine behind the peers' protocol: tokenise, embed, vectors. Arguments: MODEL PRECISION."""

import asyncio
import sys
from collections.abc import Sequence

import numpy as np
from benchmarks.against.peers.answering import answer
from benchmarks.harness import REQUESTS_AT_ONCE, engine_on_trial, quiet_settings

from trivec.core.ports import Embedder
from trivec.core.types import Float32Array, LongText, Output
from trivec.server.machine import usable_cores


async def embed_all(embedder: Embedder, texts: Sequence[str]) -> Float32Array:
    """Dense vectors `[texts, dimensions]`, the texts dealt out over a few requests at once."""
    vectors = np.empty((len(texts), embedder.card.dimensions), np.float32)

    async def embed_hand(hand: int) -> None:
        if texts[hand::REQUESTS_AT_ONCE]:
            sequences = await embedder.tokenizer.tokenize(
                texts[hand::REQUESTS_AT_ONCE], long_text=LongText.CUT_END
            )
            reply = await embedder.embed(sequences, Output.DENSE)
            vectors[hand::REQUESTS_AT_ONCE] = reply.vectors.dense

    await asyncio.gather(*(embed_hand(hand) for hand in range(REQUESTS_AT_ONCE)))
    return vectors


async def main() -> None:
    settings = quiet_settings(sys.argv[1], precision=sys.argv[2])
    loop = asyncio.get_running_loop()
    async with engine_on_trial(settings, cores=usable_cores()) as trial:

        def embed(texts: Sequence[str]) -> Float32Array:
            """Called on the answering thread; the engine stays on its loop."""
            return asyncio.run_coroutine_threadsafe(embed_all(trial.embedder, texts), loop).result()

        await asyncio.to_thread(answer, embed)


if __name__ == "__main__":
    asyncio.run(main())
