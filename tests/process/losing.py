"""A whole server whose device is lost by the word "lost": run as `python losing.py DATA_DIR`."""

import os
import sys
from pathlib import Path

from trivec.assemble import Choice, Front, LoadedModel, Models, model_card, set_up
from trivec.backends.fake import FakeBackend
from trivec.checkpoints.opening import open_checkpoint
from trivec.cli.greeting import greeting
from trivec.core.errors import DeviceLost
from trivec.core.types import Batch, Vectors
from trivec.server.listening import listen
from trivec.server.serving import live
from trivec.server.supervisor import Heart, Supervisor
from trivec.settings import load_settings

LOST_TOKEN_ID = 2439  # "lost" in the small model's vocabulary


class LosingBackend(FakeBackend):
    """A fake whose device is gone as soon as it sees the word."""

    def run(self, batch: Batch, *, slot: int) -> Vectors:
        if LOST_TOKEN_ID in batch.token_ids:
            raise DeviceLost("the driver says goodbye")
        return super().run(batch, slot=slot)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201


def main(data_dir: Path) -> None:
    settings = load_settings({"data_dir": str(data_dir), "port": 0}, {})
    listener = listen(settings.host, settings.port)

    def load(front: Front) -> Models:
        checkpoint = open_checkpoint("all-minilm-l6-v2", cache_dir=data_dir / "models")
        backend = LosingBackend(dimensions=checkpoint.config.hidden_size)
        loaded = LoadedModel(checkpoint, backend, model_card(checkpoint, "fake"), None)
        return set_up([loaded], Choice("fake", "cpu", "a test"), front=front, cores=1)

    def serve(heart: Heart) -> int:
        announce = greeting(settings, port=listener.getsockname()[1], say=say)
        return live(settings, listener, load=load, heart=heart, announce=announce)

    os._exit(Supervisor(serve, listener, heartbeat_s_max=15, say=say).run())


main(Path(sys.argv[1]))
