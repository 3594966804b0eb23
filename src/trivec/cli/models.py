"""`trivec models`: what is known and what is here, pulling, checking, and dummies.

It parses and prints; the work is the checkpoints room's. Tables go to standard output.
"""

import asyncio
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from trivec.checkpoints.catalogue import CatalogueEntry, entries, entry_of
from trivec.checkpoints.checkpoint import Checkpoint
from trivec.checkpoints.verify import Embed
from trivec.cli.store import AsJson, DataDir, print_json, print_table, say, table
from trivec.core.errors import CheckpointRefused
from trivec.core.types import Batch, LongText, Output, Vectors
from trivec.settings import Settings, load_settings

MISSED_EXIT_CODE = 1

models_app = typer.Typer(
    help="Pull, list and check models, or write a dummy one.", no_args_is_help=True
)


@models_app.command("list")
def list_models(data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """List the models known by name and which of them are on this machine."""
    rows = [_listed(entry, _cache_dir(data_dir)) for entry in entries()]
    if as_json:
        print_json(rows)
        return
    listed = table(LISTED, numbers=("TOKENS", "SIZE"))
    listed.columns[0].no_wrap = True  # what a user copies
    for row in rows:
        listed.add_row(*(_shown(row[name]) for name in LISTED.values()))
    print_table(listed)
    for row in rows:
        if row["verified"] is False:
            say(f"{row['id']}: its files are not the ones that are known by this name")
    for row in rows:
        if row["problem"]:
            say(f"{row['id']}: {row['problem']}")


LISTED = {
    "MODEL": "id",
    "HERE": "source",
    "TOKENS": "token_count_max",
    "SIZE": "dimensions",
    "OUTPUTS": "outputs",
}


def _listed(entry: CatalogueEntry, cache_dir: Path) -> dict[str, object]:
    """What one line of the list says. A model that is here is opened, which checks its hashes."""
    from trivec.checkpoints.opening import open_own

    problem: str | None = None
    checkpoint: Checkpoint | None = None
    try:
        checkpoint = open_own(entry, cache_dir=cache_dir)
    except CheckpointRefused as refusal:
        problem = str(refusal)
    return {
        "id": entry.id,
        "aliases": list(entry.aliases),
        "source": checkpoint.source if checkpoint else None,
        "verified": checkpoint.verified if checkpoint else None,
        "pinned": entry.is_pinned,
        "folder": str(checkpoint.folder) if checkpoint else None,
        "token_count_max": entry.token_count_max,
        "dimensions": entry.dimensions,
        "outputs": ["dense", "sparse", "multi"] if entry.has_heads else ["dense"],
        "prefixes": dict(entry.prefixes),
        "problem": problem,
    }


def _shown(value: object) -> str:
    if isinstance(value, list):
        return " ".join(value)
    return "-" if value is None else str(value)


@models_app.command()
def pull(
    model: Annotated[str, typer.Argument(help="A catalogue id, as baai/bge-m3.")],
    data_dir: DataDir = None,
) -> None:
    """Fetch a model from the hub into the data folder; resumes where it stopped."""
    from trivec.checkpoints.hub import pull as fetch
    from trivec.checkpoints.opening import open_own

    entry, cache_dir = entry_of(model), _cache_dir(data_dir)
    fetch(entry, cache_dir=cache_dir)
    checkpoint = open_own(entry, cache_dir=cache_dir)
    assert checkpoint is not None
    if not entry.is_pinned:
        say(
            f"{entry.id} has no known hashes; what came was noted, and later starts compare with it"
        )
    print(checkpoint.folder)


@models_app.command()
def dummy(
    model: Annotated[str, typer.Argument(help="The model to imitate: baai/bge-m3.")],
    folder: Annotated[Path, typer.Argument(help="A new or empty folder.")],
    layers: Annotated[
        int | None, typer.Option(min=1, max=200, help="Layers of the encoder.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same bytes.")] = 0,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="A tokenizer.json; a tiny one is made without."
        ),
    ] = None,
) -> None:
    """Write a complete checkpoint of random weights in the model's own layout."""
    from trivec.checkpoints.dummy import blueprint_of, write_dummy

    blueprint = blueprint_of(model)
    if layers is not None:
        blueprint = blueprint.with_layers(layers)
    write_dummy(folder, blueprint, seed=seed, tokenizer_file=tokenizer)
    print(folder)


@models_app.command()
def verify(
    model: Annotated[
        str | None, typer.Argument(help="A catalogue id, or ID=DIR for a copy.")
    ] = None,
    prepared: Annotated[
        bool,
        typer.Option("--prepared", help="Read every prepared int8 model whole against its hash."),
    ] = False,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Compare a model's vectors with published figures, at fp32; exit code 1 on a miss."""
    if prepared == (model is not None):
        raise typer.BadParameter("give a model, or --prepared alone")
    if model is None:
        _verify_prepared(_cache_dir(data_dir), as_json=as_json)
        return
    from trivec.checkpoints.verify import TOLERANCE
    from trivec.checkpoints.verify import verify as compare

    settings = load_settings(
        {"data_dir": data_dir, "precision": "fp32", "models": (model,)}, os.environ, warn=say
    )
    entry = entry_of(model.partition("=")[0])
    figures = compare(entry.id, _embedding(settings))
    if as_json:
        rows = [
            {
                "figure": one.name,
                "expected": one.expected,
                "found": one.found,
                "difference": one.difference,
                "met": one.is_met,
            }
            for one in figures
        ]
        print_json(rows)
    else:
        numbers = ("EXPECTED", "FOUND", "DIFFERENCE")
        compared = table(("FIGURE", *numbers, ""), numbers=numbers)
        for one in figures:
            cells = (f"{one.expected:.4f}", f"{one.found:.4f}", f"{one.difference:.5f}")
            compared.add_row(one.name, *cells, "" if one.is_met else "MISSED")
        print_table(compared)
    missed = sum(not one.is_met for one in figures)
    say(f"{len(figures) - missed} of {len(figures)} figures are met (within {TOLERANCE})")
    if missed:
        raise typer.Exit(MISSED_EXIT_CODE)


def _verify_prepared(cache_dir: Path, *, as_json: bool) -> None:
    from trivec.backends.openvino import check_cache

    found = check_cache(cache_dir)
    if as_json:
        print_json([{"folder": str(folder), "problem": fault} for folder, fault in found.items()])
    else:
        for folder, fault in found.items():
            print(f"{folder}: {fault or 'as it was written'}")
    damaged = sum(fault is not None for fault in found.values())
    say(
        f"{len(found) - damaged} of {len(found)} prepared models are as they were written"
        + ("; the next start makes a damaged one again" if damaged else "")
    )
    if damaged:
        raise typer.Exit(MISSED_EXIT_CODE)


def _embedding(settings: Settings) -> Embed:
    """Load the one model of *settings*; a function from texts to its vectors, text by text."""
    from trivec.build import choose, load_model
    from trivec.server.machine import usable_cores
    from trivec.tokenizer import Tokenizer

    model = load_model(
        settings.models[0], settings=settings, choice=choose(settings), cores=usable_cores()
    )
    checkpoint = model.checkpoint
    tokenizer = Tokenizer(
        checkpoint.tokenizer_file,
        token_count_max=checkpoint.token_count_max,
        vocabulary_size=checkpoint.config.vocab_size,
        pool=ThreadPoolExecutor(1),
    )

    def embed(texts: Sequence[str], outputs: Output) -> Vectors:
        rows = []
        for text in texts:
            one = asyncio.run(tokenizer.tokenize([text], long_text=LongText.REFUSE))
            flags = np.array([outputs & checkpoint.outputs], np.uint8)
            rows.append(model.backend.run(Batch(one.token_ids, one.cu_seqlens, flags), slot=0))
        return Vectors.of(
            dense=np.concatenate([row.dense for row in rows]),
            sparse=tuple(sparse for row in rows for sparse in row.sparse),
            multi=tuple(multi for row in rows for multi in row.multi),
        )

    return embed


def _cache_dir(data_dir: str | None) -> Path:
    settings = load_settings({"data_dir": data_dir}, os.environ, warn=say)
    return settings.data_dir / "models"
