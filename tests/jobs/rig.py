"""Corpora on disk, and a job over them with a model that needs no files."""

import asyncio
import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tests.api.house import CARD, StandIn

from trivec.core.types import LongText, Output, Vectors
from trivec.jobs.corpus import Columns, Corpus, Shard, ShardSize, find_sources
from trivec.jobs.embedding import Progress, embed_corpus
from trivec.jobs.encoders import EmbedderEncoder, Encoded, ModelIdentity, Truncate, joined
from trivec.jobs.results import RESERVED, Layout, Results, Totals

ALL = Output.DENSE | Output.SPARSE | Output.MULTI
SIZE = ShardSize(rows_max=10, characters_max=200)
PLAIN = Columns()
Row = dict[str, Any]


def rows(count: int) -> list[Row]:
    """Rows of texts of many lengths, all of which the model reads."""
    return [
        {"id": f"id-{i}", "text": f"{'word ' * (i * 7 % 11)}{i} é", "price": i / 2}
        for i in range(count)
    ]


def write(file: Path, given: Sequence[Row]) -> Path:
    """A file of *given* in the format that its name says."""
    match file.suffix:
        case ".jsonl":
            file.write_text("".join(json.dumps(row) + "\n" for row in given), "utf-8")
        case ".csv" | ".tsv":
            with file.open("w", encoding="utf-8", newline="") as opened:
                writer = csv.DictWriter(
                    opened, list(given[0]), delimiter="," if file.suffix == ".csv" else "\t"
                )
                writer.writeheader()
                writer.writerows(given)
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(list(given)), file, row_group_size=7)
        case ".txt":
            file.write_text("".join(f"{row['text']}\n" for row in given), "utf-8")
    return file


def shards(
    given: Path,
    columns: Columns = PLAIN,
    size: ShardSize = SIZE,
    form: str | None = None,
) -> list[Shard]:
    return list(Corpus(find_sources(str(given), form=form), columns, size).shards())


class CountingEncoder(EmbedderEncoder):
    """The encoder in process, which remembers what it was asked for."""

    asked: list[str]

    async def encode(self, texts: Sequence[str]) -> Encoded:
        self.asked += texts
        return await super().encode(texts)


@dataclass
class Job:
    """A job and how it is run; a second `run` is a second start of the command."""

    given: Path
    out: Path
    outputs: Output = Output.DENSE
    columns: Columns = field(default_factory=lambda: Columns(id="id", reserved=RESERVED))
    shard_size: ShardSize = SIZE
    dtype: Any = "float32"
    truncate: Truncate = "none"
    size: int | None = None
    prompt: str = ""
    model: StandIn = field(default_factory=lambda: StandIn(replace(CARD, token_count_max=80)))
    name: str = "stand-in"
    asked: list[str] = field(default_factory=list)
    told: list[Progress] = field(default_factory=list)

    def run(self, *, stop_when: Callable[[Progress], bool] = lambda _: False) -> Totals | None:
        """One start; stopped once *stop_when* says so of the progress."""

        async def run() -> Totals | None:
            identity: ModelIdentity = {"id": self.name, "dimensions": self.model.card.dimensions}
            encoder = CountingEncoder(
                self.model,
                self.outputs,
                model=identity,
                truncate=self.truncate,
                prompt=self.prompt,
            )
            encoder.asked = self.asked
            stop = asyncio.Event()

            def on_progress(progress: Progress) -> None:
                self.told.append(replace(progress))
                if stop_when(progress):
                    stop.set()

            layout = Layout(
                self.outputs,
                self.model.card.dimensions,
                self.size,
                self.dtype,
                marks_truncated=self.truncate != "none",
            )
            job = {"model": identity, "dtype": self.dtype}
            corpus = Corpus(find_sources(str(self.given)), self.columns, self.shard_size)
            with Results(self.out, job, layout).open() as results:
                return await embed_corpus(
                    corpus, results, encoder, stop=stop, on_progress=on_progress
                )

        return asyncio.run(run())

    @property
    def errors(self) -> list[Row]:
        file = Path(f"{self.out}.errors.jsonl")
        if not file.exists():
            return []
        return [json.loads(line) for line in file.read_text("utf-8").splitlines()]

    def left_over(self) -> list[str]:
        """What lies beside the output."""
        beside = self.out.parent.glob(f"{self.out.name}.*")
        return sorted(one.name.removeprefix(self.out.name) for one in beside)


def vectors_of(model: StandIn, texts: Sequence[str], outputs: Output = ALL) -> Vectors:
    """What the model gives for *texts*, asked for each by itself."""

    async def embed() -> list[Vectors]:
        given = [await model.tokenize([one], long_text=LongText.CUT_END) for one in texts]
        return [(await model.embed(one, outputs)).vectors for one in given]

    return joined(asyncio.run(embed()))


def matrix(column: pa.ChunkedArray) -> NDArray[Any]:
    """A column of vectors as `[rows, numbers]`."""
    whole = column.combine_chunks()
    return np.asarray(whole.flatten().to_numpy()).reshape(len(whole), -1)
