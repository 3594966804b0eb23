"""Corpus: rows with texts, read from JSONL, CSV, Parquet and plain text files, cut into shards.

Files are read from beginning to end, a shard in memory at a time. The cuts depend on the rows
alone, so a second reading yields the same shards.
"""

import csv
import gzip
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from trivec.core.errors import JobFailed
from trivec.jobs import GO_ON

STDIN = "-"
MANIFEST, ERRORS, PARTS = ".manifest.json", ".errors.jsonl", ".parts"  # beside the output
OUTPUT_ENDINGS = ("", MANIFEST, ERRORS, PARTS)
FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
    ".parquet": "parquet",
}
COMPRESSED = ".gz"  # may follow any of these but .parquet
LINE_BYTES_MAX = 64 * 1024 * 1024
NESTING_MAX = 63  # of lists and objects in a value: Arrow writes 64 levels, the innermost included
PARQUET_BUFFER_BYTES = 1024 * 1024  # read at a time, instead of a whole row group
ROW_COLUMN = "row"  # the rows' numbers, where no column of the input identifies them


@dataclass(frozen=True, slots=True)
class Source:
    """One file of the input, or standard input."""

    name: str
    format: str  # one of the values of FORMATS
    byte_count: int | None  # as it lies on disk; None: unknown, as of a pipe

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """The bytes on disk. What goes wrong in the block is a `JobFailed`."""
        with read_faults(self.name):
            if self.name == STDIN:
                yield sys.stdin.buffer
            else:
                with Path(self.name).open("rb") as raw:
                    yield raw

    def lines(self, raw: BinaryIO) -> Iterator[bytes]:
        """The lines of a file that is no Parquet; a longer one than is reasonable is refused."""
        is_compressed = self.name.endswith(COMPRESSED)
        stream = cast(BinaryIO, gzip.open(raw)) if is_compressed else raw  # noqa: SIM115
        for number, line in enumerate(iter(partial(stream.readline, LINE_BYTES_MAX), b""), 1):
            if len(line) == LINE_BYTES_MAX:
                raise JobFailed(
                    f"{self.name} line {number} has more than {LINE_BYTES_MAX:,} bytes; is it "
                    f"{self.format}? Say what it is with --format"
                )
            yield line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns to read, and their use."""

    text: str = "text"
    id: str | None = None  # None: rows are identified by their number
    kept: tuple[str, ...] | None = None  # beside the id; None: all
    reserved: frozenset[str] = frozenset()  # names of the output, which the input may not have

    def names_kept(self, names: Iterable[str]) -> list[str]:
        """Those of *names* to copy, the id first, each once."""
        chosen = [name for name in names if self.kept is None or name in self.kept]
        return list(dict.fromkeys([self.id, *chosen] if self.id is not None else chosen))


@dataclass(frozen=True, slots=True)
class ShardSize:
    """The maxima of a shard; its last text may exceed the characters."""

    rows_max: int
    characters_max: int


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row without a vector, and why."""

    row: int  # in the whole input, from 0
    file: str
    line: int  # in its file, from 1; of a Parquet file the row
    id: object
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """Neighbouring rows: the unit of work, done again when the process dies in it."""

    number: int
    first_row: int
    row_count: int  # bad ones included
    texts: list[str]  # of the rows that could be read
    rows: list[int]  # [texts]; their numbers in the whole input
    places: list[tuple[str, int]]  # [texts]; file and line
    table: pa.Table  # [texts]; the id, then the columns that are kept
    bad: list[BadRow]
    digest: str  # sha256 over texts and ids
    position: float | None  # share of the input that is read with it; None: unknown

    def bad_row(self, index: int, reason: str) -> BadRow:
        """Text *index* as a bad row, for a *reason* of the model's."""
        file, line = self.places[index]
        return BadRow(self.rows[index], file, line, self.table[0][index].as_py(), reason)


class Record(NamedTuple):
    """A row of a file of lines: its values by column, or why there are none."""

    file: str
    line: int
    values: Mapping[str, object]
    reason: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Block:
    """The rows of a shard, not checked yet."""

    places: list[tuple[str, int]]  # [rows]; file and line
    texts: list[object]  # [rows]; None where there is none
    reasons: Mapping[int, str]  # of the rows that cannot even be parsed
    table: pa.Table  # [rows]; the columns that are kept
    position: float | None


def find_sources(given: str, *, form: str | None = None, out: Path | None = None) -> list[Source]:
    """The files that *given* names: a file, a folder's files in the order of their paths, or `-`.

    *form* overrules the names' endings; standard input is JSONL without it. In a folder, *out* and
    the files beside it with its name are left out. Raises `JobFailed`.
    """
    if given == STDIN:
        if form == "parquet":
            raise JobFailed("Parquet is read from its end, which standard input lacks; name a file")
        return [Source(STDIN, form or "jsonl", None)]

    def format_of(file: Path) -> str | None:
        suffix, inner = file.suffix.lower(), Path(file.stem).suffix.lower()
        found = FORMATS.get(inner if suffix == COMPRESSED else suffix)
        return form or (None if suffix == COMPRESSED and found == "parquet" else found)

    ours = {Path(f"{out.absolute()}{ending}") for ending in OUTPUT_ENDINGS} if out else set[Path]()

    def is_input(file: Path) -> bool:
        return file.is_file() and ours.isdisjoint((file.absolute(), *file.absolute().parents))

    path = Path(given)
    with read_faults(given):
        path.stat()  # an absent one has this error, and not one of its name's ending
        is_folder = path.is_dir()
        files = sorted(filter(is_input, path.rglob("*"))) if is_folder else [path]
        sources = [
            Source(str(f), found, f.stat().st_size or None)
            for f in files
            if (found := format_of(f))
        ]
    if not sources:
        problem = "has no file that ends in" if is_folder else "ends in none of"
        raise JobFailed(f"{given} {problem} {', '.join(FORMATS)}; say what it is with --format")
    return sources


def check_columns(sources: Sequence[Source], columns: Columns) -> None:
    """Raise `JobFailed` where a CSV or Parquet file is unreadable or lacks a column."""
    for source in sources:
        if source.name == STDIN or source.format not in ("csv", "parquet"):
            continue
        with source.open() as raw:
            if source.format == "parquet":
                types = {one.name: one.type for one in pq.ParquetFile(raw).schema_arrow}
            else:
                _, header = next(_csv_rows(source, raw), (1, []))
                types = dict.fromkeys(header, pa.string())
        for name in (columns.text, columns.id, *(columns.kept or ())):
            if name is not None and name not in types:
                raise JobFailed(
                    f"{source.name} has no column {name!r}; it has {', '.join(types) or 'none'}. "
                    "Name the columns with --text-column, --id-column and --keep"
                )
        if not _is_text(types[columns.text]):
            raise JobFailed(
                f"column {columns.text!r} of {source.name} is {types[columns.text]}, no text; "
                "name another with --text-column"
            )


class Corpus:
    """The rows of *sources*, which can be read several times unless they are standard input."""

    def __init__(self, sources: Sequence[Source], columns: Columns, size: ShardSize) -> None:
        self._sources = sources
        self._columns = columns
        self._size = size
        self._total = sum(source.byte_count or 0 for source in sources)

    def shards(self) -> Iterator[Shard]:
        """All rows in order. Raises `JobFailed` for a file that cannot be read, or holds nothing."""
        first_row = 0
        for number, block in enumerate(self._blocks()):
            shard = _checked(block, self._columns, number=number, first_row=first_row)
            if number == 0 and not shard.texts:
                bad = shard.bad[0]
                raise JobFailed(
                    f"none of the first {shard.row_count} rows has a text; {bad.file} line "
                    f"{bad.line}: {bad.reason}. Name column and format with --text-column, --format"
                )
            yield shard
            first_row += shard.row_count
        if first_row == 0:
            name = self._sources[0].name
            raise JobFailed(f"{'standard input' if name == '-' else name} has no row to embed")

    def _blocks(self) -> Iterator[_Block]:
        before = 0  # bytes of the sources that are read
        for is_parquet, group in groupby(self._sources, lambda one: one.format == "parquet"):
            sources = list(group)
            yield from (self._parquet_blocks if is_parquet else self._line_blocks)(sources, before)
            before += sum(source.byte_count or 0 for source in sources)

    def _line_blocks(self, sources: Sequence[Source], before: int) -> Iterator[_Block]:
        """Rows of files of lines, of which neighbours may share a block."""
        columns, size = self._columns, self._size
        records: list[Record] = []
        characters = 0

        def block(position: float | None) -> _Block:
            names = columns.names_kept(dict.fromkeys(n for one in records for n in one.values))
            reasons = {i: one.reason for i, one in enumerate(records) if one.reason}
            kept = {name: [one.values.get(name) for one in records] for name in names}
            for name, values in kept.items():
                for i, value in enumerate(values):
                    if isinstance(value, (dict, list)) and is_nested_too_deep(value):
                        reasons[i], values[i] = f"{name!r} is nested too deep", None
            return _Block(
                places=[(one.file, one.line) for one in records],
                texts=[one.values.get(columns.text) for one in records],
                reasons=reasons,
                table=pa.table({name: as_column(values) for name, values in kept.items()}),
                position=position,
            )

        for source in sources:
            with source.open() as raw:
                for record in _RECORDS[source.format](source, raw, columns.text):
                    records.append(record)
                    characters += len(str(record.values.get(columns.text, "")))
                    if len(records) >= size.rows_max or characters >= size.characters_max:
                        read = None if source.byte_count is None else before + raw.tell()
                        yield block(None if read is None else read / max(1, self._total))
                        records, characters = [], 0
            before += source.byte_count or 0
        if records:
            yield block(before / self._total if self._total else None)

    def _parquet_blocks(self, sources: Sequence[Source], before: int) -> Iterator[_Block]:
        columns, size = self._columns, self._size
        for source in sources:
            with source.open() as raw:
                file = pq.ParquetFile(raw, buffer_size=PARQUET_BUFFER_BYTES)
                kept = columns.names_kept(file.schema_arrow.names)
                read = list(dict.fromkeys([columns.text, *kept]))
                line, row_count = 1, max(1, file.metadata.num_rows)
                for batch in file.iter_batches(size.rows_max, columns=read):
                    whole = pa.Table.from_batches([batch])
                    texts, reasons = _texts_of(whole[columns.text])
                    for start, end in cuts(texts, size.characters_max):
                        done = before + (source.byte_count or 0) * (line + end - 1) / row_count
                        yield _Block(
                            places=[(source.name, line + i) for i in range(start, end)],
                            texts=list(texts[start:end]),
                            reasons={i - start: one for i, one in reasons.items() if i >= start},
                            table=whole.select(kept).slice(start, end - start),
                            position=done / max(1, self._total),
                        )
                    line += len(texts)
            before += source.byte_count or 0


def as_column(values: Sequence[object]) -> pa.Array:
    """*values* of JSON in the type that fits them all; as JSON text where none does."""
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError):
        return pa.array([None if one is None else as_json_text(one) for one in values], pa.string())


def as_json_text(value: object) -> str:
    """*value* as it is if it is text, else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def is_nested_too_deep(value: object) -> bool:
    """Whether there are more than `NESTING_MAX` lists or objects in each other in *value*."""
    level = [value]
    for _ in range(NESTING_MAX):
        level = [
            inner
            for one in level
            if isinstance(one, (dict, list))
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
    return any(isinstance(one, (dict, list)) for one in level)


@contextmanager
def read_faults(name: str) -> Iterator[None]:
    """Turn what libraries raise while they read *name* into `JobFailed`."""
    try:
        yield
    except (OSError, EOFError, csv.Error, pa.ArrowException) as fault:
        said = " ".join(str(getattr(fault, "strerror", None) or fault).split()).rstrip(".")
        raise JobFailed(f"cannot read {name}: {said}. {GO_ON}, when it is mended") from fault


def _checked(block: _Block, columns: Columns, *, number: int, first_row: int) -> Shard:
    """*block* as a shard: the rows that can be embedded, apart from those that cannot."""
    table, row_count = block.table, len(block.texts)
    rows = range(first_row, first_row + row_count)
    own_names = columns.reserved | ({ROW_COLUMN} if columns.id is None else set())
    if taken := own_names & {*table.column_names}:
        raise JobFailed(
            f"the input has a column {min(taken)!r} itself, which is one of the output's; say what "
            "to keep with --keep" + (", or what the id is" if ROW_COLUMN in taken else "")
        )
    if columns.id is None:
        numbers = pa.array(rows, pa.int64())
        table = pa.table([numbers, *table.columns], [ROW_COLUMN, *table.column_names])
    ids = table[0].to_pylist()
    good: list[int] = []
    bad: list[BadRow] = []
    for i, (text, row_id) in enumerate(zip(block.texts, ids, strict=True)):
        if i in block.reasons:
            reason = block.reasons[i]
        elif text is None:
            reason = f"has no {columns.text!r}"
        elif not isinstance(text, str):
            reason = f"{columns.text!r} is no text"
        elif not text:
            reason = f"{columns.text!r} is empty"
        elif row_id is None:
            reason = f"has no {columns.id!r}"
        else:
            good.append(i)
            continue
        bad.append(BadRow(rows[i], *block.places[i], row_id, reason))
    texts = [str(block.texts[i]) for i in good]
    digest = hashlib.sha256("\0".join(texts).encode())
    digest.update("\0".join(str(ids[i]) for i in good).encode())
    return Shard(
        number=number,
        first_row=first_row,
        row_count=row_count,
        texts=texts,
        rows=[rows[i] for i in good],
        places=[block.places[i] for i in good],
        table=table.take(pa.array(good, pa.int64())) if bad else table,
        bad=bad,
        digest=digest.hexdigest(),
        position=block.position,
    )


def _jsonl_records(source: Source, raw: BinaryIO, _text: str) -> Iterator[Record]:
    decode = msgspec.json.Decoder().decode
    for line, read in enumerate(source.lines(raw), 1):
        try:
            values = decode(read)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as fault:
            if read.strip():  # blank lines are no rows
                yield Record(source.name, line, {}, f"is no JSON: {fault}")
            continue
        if isinstance(values, dict):
            yield Record(source.name, line, values)
        else:
            yield Record(source.name, line, {}, "is no JSON object")


def _text_records(source: Source, raw: BinaryIO, text: str) -> Iterator[Record]:
    for line, read in enumerate(source.lines(raw), 1):
        try:
            yield Record(source.name, line, {text: read.rstrip(b"\r\n").decode()})
        except UnicodeDecodeError:
            yield Record(source.name, line, {}, "is not UTF-8")


def _csv_records(source: Source, raw: BinaryIO, _text: str) -> Iterator[Record]:
    rows = _csv_rows(source, raw)
    _, header = next(rows, (1, []))
    for line, row in rows:
        try:
            "".join(row).encode()
        except UnicodeEncodeError:
            yield Record(source.name, line, {}, "is not UTF-8")
            continue
        if len(row) == len(header):
            yield Record(source.name, line, dict(zip(header, row, strict=True)))
        elif row:  # blank lines are no rows
            reason = f"has {len(row)} columns, the header {len(header)}"
            yield Record(source.name, line, {}, reason)


def _csv_rows(source: Source, raw: BinaryIO) -> Iterator[tuple[int, list[str]]]:
    """First line and cells of each row, the header's too; a byte that is no UTF-8 is a surrogate."""
    csv.field_size_limit(LINE_BYTES_MAX)
    is_tabbed = source.name.removesuffix(COMPRESSED).lower().endswith(".tsv")
    lines = (line.decode("utf-8", "surrogateescape") for line in source.lines(raw))
    reader = csv.reader(lines, delimiter="\t" if is_tabbed else ",")
    line = 1
    for row in reader:
        yield line, row
        line = reader.line_num + 1


_RECORDS = {"jsonl": _jsonl_records, "csv": _csv_records, "text": _text_records}


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _texts_of(column: pa.ChunkedArray) -> tuple[list[str | None], dict[int, str]]:
    """The texts of a Parquet *column*, and why some of them are none."""
    try:
        return column.to_pylist(), {}
    except UnicodeDecodeError:
        texts: list[str | None] = []
        reasons = {}
        for i, read in enumerate(column.cast(pa.binary()).to_pylist()):
            try:
                texts.append(None if read is None else read.decode())
            except UnicodeDecodeError:
                texts.append(None)
                reasons[i] = "is not UTF-8"
        return texts, reasons


def cuts(
    texts: Sequence[str | None], characters_max: int, *, count_max: int | None = None
) -> Iterator[tuple[int, int]]:
    """Starts and ends of runs of *texts*: a run ends with the text that reaches a maximum."""
    start = characters = 0
    for end, text in enumerate(texts, 1):
        characters += len(text or "")
        is_full = characters >= characters_max or end - start == count_max
        if is_full or end == len(texts):
            yield start, end
            start, characters = end, 0
