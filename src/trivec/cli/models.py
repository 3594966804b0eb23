"""`trivec models`: list what is known and what is here, pull, and verify."""

import asyncio
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from trivec.checkpoints import open_own
from trivec.checkpoints.catalogue import entries, entry_of
from trivec.cli.common import AsJson, DataDir, Row, print_json, print_table, say, settings_of
from trivec.core.errors import CheckpointRefused

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trivec.checkpoints.verify import Embed
    from trivec.core.types import Output, Vectors
    from trivec.settings import Settings

MISSED_EXIT_CODE = 1

app = typer.Typer(help="List, pull and verify models.", no_args_is_help=True, add_completion=False)


@app.command("list")
def list_(data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """List the models known by name and which of them are on this machine."""
    cache_dir = settings_of(data_dir).data_dir / "models"
    found: list[dict[str, object]] = []
    cells: list[Row] = []
    for entry in entries():
        checkpoint, problem = None, None
        try:
            checkpoint = open_own(entry, cache_dir=cache_dir)  # checks its hashes
        except CheckpointRefused as refusal:
            problem = str(refusal)
        outputs = ["dense", "sparse", "multi"] if entry.has_heads else ["dense"]
        found.append(
            {
                "id": entry.id,
                "aliases": list(entry.aliases),
                "source": checkpoint and checkpoint.source,
                "verified": checkpoint and checkpoint.verified,
                "pinned": entry.is_pinned,
                "folder": checkpoint and str(checkpoint.folder),
                "token_count_max": entry.token_count_max,
                "dimensions": entry.dimensions,
                "outputs": outputs,
                "prompts": dict(entry.prompts),
                "problem": problem,
            }
        )
        cells.append(
            {
                "MODEL": entry.id,
                "HERE": checkpoint.source if checkpoint else "-",
                "TOKENS": entry.token_count_max,
                "SIZE": entry.dimensions,
                "OUTPUTS": " ".join(outputs),
            }
        )
        if checkpoint and not checkpoint.verified:
            problem = "its files are not the ones that are known by this name"
        if problem and not as_json:
            say(f"{entry.id}: {problem}")
    if as_json:
        print_json(found)
    else:
        print_table(cells, folded=("OUTPUTS",))  # never the id, which a user copies


@app.command()
def pull(
    model: Annotated[str, Argument(help="A catalogue id, as baai/bge-m3.")],
    data_dir: DataDir = None,
) -> None:
    """Fetch a model from the hub into the data folder; resumes where it stopped."""
    from trivec.checkpoints.hub import pull as fetch

    entry, cache_dir = entry_of(model), settings_of(data_dir).data_dir / "models"
    fetch(entry, cache_dir=cache_dir)
    checkpoint = open_own(entry, cache_dir=cache_dir)
    assert checkpoint is not None
    if not entry.is_pinned:
        say(f"{entry.id} has no known hashes; those of its files now were noted for later starts")
    print(checkpoint.folder)


@app.command()
def verify(
    model: Annotated[str | None, Argument(help="A catalogue id, or ID=DIR for a copy.")] = None,
    prepared: Annotated[bool, Option("--prepared", help="Check the prepared int8 models.")] = False,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Compare a model's vectors with published figures, at fp32; exit code 1 on a miss.

    With --prepared: read every prepared int8 model whole, and compare with its hash.
    """
    if prepared == (model is not None):
        raise typer.BadParameter("give a model, or --prepared alone")
    if model is None:
        _verify_prepared(settings_of(data_dir), as_json=as_json)
        return

    from trivec.checkpoints.verify import TOLERANCE
    from trivec.checkpoints.verify import verify as compare

    settings = settings_of(data_dir, precision="fp32", models=(model,))
    figures = compare(entry_of(model.partition("=")[0]).id, _embedding(settings))
    rows: list[Row] = [
        {
            "figure": one.name,
            "expected": one.expected,
            "found": one.found,
            "difference": one.difference,
            "met": one.is_met if as_json else "yes" if one.is_met else "MISSED",
        }
        for one in figures
    ]
    (print_json if as_json else print_table)(rows)
    met = sum(one.is_met for one in figures)
    say(f"{met} of {len(figures)} figures are met (within {TOLERANCE})")
    if met < len(figures):
        raise typer.Exit(MISSED_EXIT_CODE)


def _verify_prepared(settings: "Settings", *, as_json: bool) -> None:
    from trivec.backends.openvino import check_cache

    found = check_cache(settings.data_dir / "models")
    if as_json:
        print_json([{"folder": str(one), "problem": fault} for one, fault in found.items()])
    else:
        for folder, fault in found.items():
            print(f"{folder}: {fault or 'as it was written'}")
    sound = sum(fault is None for fault in found.values())
    is_sound = sound == len(found)
    next_step = "" if is_sound else "; the next start makes a damaged one again"
    say(f"{sound} of {len(found)} prepared models are as they were written{next_step}")
    if not is_sound:
        raise typer.Exit(MISSED_EXIT_CODE)


def _embedding(settings: "Settings") -> "Embed":
    """Load the one model of *settings*; a function from texts to its vectors."""
    import numpy as np

    from trivec.build import load_models, open_parts
    from trivec.core.types import Batch, LongText
    from trivec.server.machine import usable_cores

    models = load_models(settings, open_parts(settings), cores=usable_cores())
    [model] = models.loaded

    def embed(texts: "Sequence[str]", outputs: "Output") -> "Vectors":
        tokenized = models.embedders[model.card.id].tokenize(texts, long_text=LongText.REFUSE)
        ids = asyncio.run(tokenized)
        wanted = np.full(len(texts), outputs & model.card.outputs, np.uint8)  # [sequences]
        return model.backend.run(Batch(ids.token_ids, ids.cu_seqlens, wanted), slot=0)

    return embed
