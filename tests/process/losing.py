"""A whole server whose device is lost by the word "lost": `python losing.py DATA_DIR API_PROCESSES`."""

import os
import sys

from trivec import build
from trivec.backends.fake import FakeBackend
from trivec.build import (
    Choice,
    LoadedModel,
    Models,
    Parts,
    make_tokenizers,
    model_card,
    set_up,
)
from trivec.checkpoints import open_checkpoint
from trivec.cli.serve import run
from trivec.core.errors import DeviceLost
from trivec.core.ports import OnProgress, no_progress
from trivec.core.types import Batch, Vectors
from trivec.settings import Settings, load_settings

LOST_TOKEN_ID = 2439  # "lost" in the small model's vocabulary


class LosingBackend(FakeBackend):
    """A fake whose device is gone as soon as it sees the word."""

    def run(self, batch: Batch, *, slot: int) -> Vectors:
        if LOST_TOKEN_ID in batch.token_ids:
            raise DeviceLost("the driver says goodbye")
        return super().run(batch, slot=slot)


def load(
    settings: Settings,
    context: Parts,
    *,
    cores: int,
    takes_text: bool = True,
    on_progress: OnProgress = no_progress,
) -> Models:
    checkpoint = open_checkpoint("all-minilm-l6-v2", cache_dir=settings.data_dir / "models")
    backend = LosingBackend(dimensions=checkpoint.config.hidden_size)
    loaded = LoadedModel(checkpoint, backend, model_card(checkpoint, "fake"), None)
    tokenizers = (
        make_tokenizers([loaded.checkpoint], context=context, cores=1) if takes_text else ()
    )
    return set_up([loaded], Choice("fake", "cpu", "a test"), context=context, tokenizers=tokenizers)


def main(data_dir: str, api_processes: str) -> None:
    """Run the whole command, whose processes are forks of this one, with another `load_models`."""
    build.load_models = load
    chosen = {"data_dir": data_dir, "port": 0, "api_processes": api_processes}
    os._exit(run(load_settings(chosen, {})))


main(*sys.argv[1:])
