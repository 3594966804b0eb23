"""`trivec models`: list what is known and what is here, pull, and verify."""

import asyncio
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from trivec.checkpoints import open_own
from trivec.checkpoints.catalogue import entries, entry_of
from trivec.cli.common import (
    AsJson,
    DataDir,
    Row,
    print_json,
    print_table,
    say,
    settings_of,
    shown_progress,
)
from trivec.core.errors import CheckpointRefused

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trivec.checkpoints.verify import Embed
    from trivec.core.ports import OnProgress
    from trivec.core.types import Output, Vectors
    from trivec.settings import Settings

MISSED_EXIT_CODE = 1

app = typer.Typer(help="List, pull and verify models.", no_args_is_help=True, add_completion=False)


@app.command("list")
def list_(
    words: Annotated[
        list[str] | None,
        Argument(help="Parts of names, families, licences or outputs, as: score apache."),
    ] = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """List the models known by name and which of them are on this machine, by outputs and family.

    With WORDS only those that match all of them.
    """
    cache_dir = settings_of(data_dir).data_dir / "models"
    rows: list[dict[str, Any]] = []
    found = [entry for entry in entries() if entry.matches(words or [])]
    with shown_progress() as on_progress:  # new files are hashed
        for entry in sorted(found, key=lambda one: (one.outputs, one.family)):
            checkpoint, problem = None, None
            try:
                checkpoint = open_own(entry, cache_dir=cache_dir, on_progress=on_progress)
            except CheckpointRefused as refusal:
                problem = str(refusal)
            rows.append(
                {
                    "id": entry.id,
                    "aliases": list(entry.aliases),
                    "source": checkpoint.source if checkpoint else None,
                    "verified": checkpoint.verified if checkpoint else None,
                    "pinned": entry.is_pinned,
                    "folder": str(checkpoint.folder) if checkpoint else None,
                    "token_count_max": entry.token_count_max,
                    "dimensions": entry.dimensions,
                    "matryoshka_dimensions": list(entry.matryoshka_dimensions),
                    "outputs": list(entry.outputs),
                    "family": entry.family,
                    "licence": entry.licence,
                    "gated": entry.gated,
                    "prompts": dict(entry.prompts),
                    "problem": problem,
                }
            )
            if checkpoint and not checkpoint.verified:
                problem = "its files are not the ones that are known by this name"
            if problem and not as_json:
                say(f"{entry.id}: {problem}")
    if as_json:
        print_json(rows)
        return
    if not rows:
        say(f"no model matches {' '.join(words or [])}")
        return
    cells: list[Row] = [
        {
            "MODEL": row["id"],
            "HERE": row["source"] or "-",
            "TOKENS": row["token_count_max"],
            "SIZE": row["dimensions"] or "-",
            "OUTPUTS": " ".join(row["outputs"]),
            "FAMILY": row["family"],
            "LICENCE": row["licence"] + (" (gated)" if row["gated"] else ""),
        }
        for row in rows
    ]
    # Never the id, which a user copies.
    print_table(cells, folded=("OUTPUTS",), spare=("FAMILY", "TOKENS", "SIZE"))


@app.command()
def pull(
    model: Annotated[str, Argument(help="A catalogue id, as baai/bge-m3.")],
    data_dir: DataDir = None,
) -> None:
    """Fetch a model from the hub into the data folder; resumes where it stopped."""
    from trivec.checkpoints.hub import pull as fetch

    entry, cache_dir = entry_of(model), settings_of(data_dir).data_dir / "models"
    with shown_progress() as on_progress:
        fetch(entry, cache_dir=cache_dir, on_progress=on_progress)
        checkpoint = open_own(entry, cache_dir=cache_dir, on_progress=on_progress)
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
    with shown_progress() as on_progress:
        figures = compare(entry_of(model.partition("=")[0]).id, _embedding(settings, on_progress))
    rows: list[Row] = [
        {
            "figure": one.name,
            "expected": one.expected,
            "found": one.found,
            "difference": one.difference,
            "met": one.is_met,
        }
        for one in figures
    ]
    if as_json:
        print_json(rows)
    else:
        print_table([{**row, "met": "yes" if row["met"] else "MISSED"} for row in rows])
    met = sum(one.is_met for one in figures)
    say(f"{met} of {len(figures)} figures are met (within {TOLERANCE})")
    if met < len(figures):
        raise typer.Exit(MISSED_EXIT_CODE)


def _verify_prepared(settings: "Settings", *, as_json: bool) -> None:
    from trivec.backends.openvino import check_cache

    with shown_progress() as on_progress:
        found = check_cache(settings.data_dir / "models", on_progress)
    if as_json:
        print_json([{"folder": str(one), "problem": fault} for one, fault in found.items()])
    else:
        for folder, fault in found.items():
            print(f"{folder}: {fault or 'as it was written'}")
    sound = sum(fault is None for fault in found.values())
    hint = "" if sound == len(found) else "; the next start makes a damaged one again"
    say(f"{sound} of {len(found)} prepared models are as they were written{hint}")
    if hint:
        raise typer.Exit(MISSED_EXIT_CODE)


def _embedding(settings: "Settings", on_progress: "OnProgress") -> "Embed":
    """Load the one model of *settings*; a function from texts to its vectors."""
    import numpy as np

    from trivec.build import load_models, open_parts
    from trivec.core.types import Batch, LongText
    from trivec.server.machine import usable_cores

    parts = open_parts(settings)
    models = load_models(settings, parts, cores=usable_cores(), on_progress=on_progress)
    [model] = models.loaded

    def embed(texts: "Sequence[str]", outputs: "Output") -> "Vectors":
        on_progress(f"{model.card.id}: embedding {len(texts)} texts", None)
        tokenizer = models.embedders[model.card.id].tokenizer
        ids = asyncio.run(tokenizer.tokenize(texts, long_text=LongText.REFUSE))
        wanted = np.full(len(texts), outputs & model.card.outputs, np.uint8)  # [sequences]
        return model.backend.run(Batch(ids.token_ids, ids.cu_seqlens, wanted), slot=0)

    return embed
