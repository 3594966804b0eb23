"""`python -m benchmarks.dummy MODEL DIR`: a complete checkpoint of random weights in the model's own layout."""

import argparse
import sys
from pathlib import Path

from tests.support.dummy import BLUEPRINTS, blueprint_of, write_dummy

from trivec.core.errors import CheckpointRefused

LAYERS_MAX = 200


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dummy", description=__doc__)
    parser.add_argument("model", help=f"the model to imitate: {' or '.join(BLUEPRINTS)}")
    parser.add_argument("folder", type=Path, help="a new or empty folder")
    parser.add_argument("--layers", type=int, help="layers of the encoder")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same bytes")
    parser.add_argument(
        "--tokenizer", type=Path, help="a tokenizer.json; a tiny one is made without"
    )
    given = parser.parse_args()
    if given.layers is not None and not 1 <= given.layers <= LAYERS_MAX:
        parser.error(f"--layers is from 1 to {LAYERS_MAX}")
    if given.seed < 0:
        parser.error("--seed is not negative")
    if given.tokenizer is not None and not given.tokenizer.is_file():
        parser.error(f"--tokenizer: {given.tokenizer} is no file")
    try:
        blueprint = blueprint_of(given.model)
        if given.layers is not None:
            blueprint = blueprint.with_layers(given.layers)
        write_dummy(given.folder, blueprint, seed=given.seed, tokenizer_file=given.tokenizer)
    except CheckpointRefused as refusal:
        sys.exit(str(refusal))
    print(given.folder)


if __name__ == "__main__":
    main()
