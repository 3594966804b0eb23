"""Results of a bulk job on disk: a manifest, a part for each shard, and in the end the output file.

While the job runs there are `OUT.manifest.json` and the folder `OUT.parts`. A part is written under
another name and renamed, so that it is whole or absent; its footer says what it was made of. In the
end `OUT.errors.jsonl` and `OUT` are made of the parts in the same way: a crash loses no part.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import IO, Any, Literal, TypeAlias

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from trivec.core.errors import JobFailed, SettingInvalid
from trivec.core.quantisation import ByteDtype, cut, quantise
from trivec.core.types import Float32Array, ModelCard, Output, Vectors
from trivec.jobs import GO_ON
from trivec.jobs.corpus import ERRORS, MANIFEST, PARTS, BadRow, Shard, as_json_text
from trivec.jobs.encoders import Encoded

DType: TypeAlias = Literal["float32", "float16"] | ByteDtype
ENDINGS = (".parquet", ".jsonl", ".npy")
DENSE, SPARSE_IDS, SPARSE_WEIGHTS, MULTI = VECTORS = (
    "embedding", "sparse_indices", "sparse_values", "multi_embedding",
)  # fmt: skip
TRUNCATED = "truncated"
RESERVED = frozenset((*VECTORS, TRUNCATED))
FOOTER = b"trivec"  # key of our own metadata in a part
# Of the final file, whichever is first; writing a group takes twice its bytes.
ROW_GROUP_ROWS, ROW_GROUP_BYTES = 65_536, 16 * 1024 * 1024
_encoder = msgspec.json.Encoder(enc_hook=str)


@dataclass(frozen=True, slots=True)
class Layout:
    """What is kept of each text."""

    outputs: Output
    dimensions: int  # of the model
    size: int | None = None  # numbers that are kept of a dense vector; None: all
    dtype: DType = "float32"  # of dense and multi; sparse weights are float32
    marks_truncated: bool = False

    def columns(self, vectors: Vectors | None) -> dict[str, pa.Array]:
        """*vectors* as columns; None for no rows."""
        none = np.zeros((0, self.dimensions), np.float32)
        columns = {}
        if Output.DENSE in self.outputs:
            dense = none if vectors is None else vectors.dense
            columns[DENSE] = self._matrix(cut(dense, self.size))
        if Output.SPARSE in self.outputs:
            terms = [] if vectors is None else [one for one in vectors.sparse if one is not None]
            offsets = _offsets([len(one.token_ids) for one in terms])
            ids = np.concatenate([one.token_ids for one in terms] or [np.zeros(0, np.int32)])
            weights = np.concatenate([one.weights for one in terms] or [np.zeros(0, np.float32)])
            columns[SPARSE_IDS] = pa.ListArray.from_arrays(offsets, pa.array(ids))
            columns[SPARSE_WEIGHTS] = pa.ListArray.from_arrays(offsets, pa.array(weights))
        if Output.MULTI in self.outputs:
            rows = [] if vectors is None else [one for one in vectors.multi if one is not None]
            matrix = self._matrix(np.concatenate(rows or [none]))
            columns[MULTI] = pa.ListArray.from_arrays(_offsets([len(one) for one in rows]), matrix)
        return columns

    def _matrix(self, rows: Float32Array) -> pa.Array:
        numbers: NDArray[Any] = rows
        if self.dtype == "float16":
            numbers = rows.astype(np.float16)
        elif self.dtype != "float32":
            numbers = quantise(rows, self.dtype)
        return pa.FixedSizeListArray.from_arrays(pa.array(numbers.reshape(-1)), numbers.shape[1])


@dataclass(frozen=True, slots=True)
class Part:
    """The footer of a part."""

    digest: str  # of its shard
    first_row: int
    row_count: int  # bad ones included
    token_count: int
    truncated_count: int
    bad: tuple[BadRow, ...]


@dataclass(frozen=True, slots=True)
class Totals:
    """The sums of a finished job, over all its runs."""

    rows: int
    texts: int
    tokens: int
    truncated: int
    bad: int
    digest: str  # sha256 over those of its shards


class Results:
    """The files of one job, locked by one process at a time; `write` may be called on any thread."""

    def __init__(self, out: Path, identity: Mapping[str, Any], layout: Layout) -> None:
        """*identity*: plain JSON of all that the output depends on, except the texts."""
        self._out = out
        self._identity = identity
        self._layout = layout
        self._manifest = out.with_name(out.name + MANIFEST)
        self._errors = out.with_name(out.name + ERRORS)
        self._parts = out.with_name(out.name + PARTS)
        self.finished: Totals | None = None  # of an earlier run that finished the job

    @contextmanager
    def open(self) -> Iterator["Results"]:
        """Begin the job, or go on with it. Raises `JobFailed` where OUT is another job's.

        A job that fails before it has kept a shard leaves no files, so that it may begin differently.
        """
        with ExitStack() as held:
            with write_faults(self._out):
                begun = self._read_manifest()
                if begun is None and self._out.exists():
                    raise JobFailed(
                        f"{self._out} exists, and no {self._manifest.name} says of what it was "
                        "made; name another file, or remove it"
                    )
                if begun is not None:
                    self._compare(begun["job"])
                if begun is not None and begun["finished"] is not None:
                    self.finished = Totals(**begun["finished"])
                    shutil.rmtree(self._parts, ignore_errors=True)  # left by a crash
                else:
                    self._parts.mkdir(exist_ok=True)
                    lock = held.enter_context((self._parts / "lock").open("wb"))
                    try:
                        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        busy = f"another process is writing {self._out}; wait for it"
                        raise JobFailed(busy) from None
                    for left in self._parts.glob("*.tmp" if begun else "*.*"):
                        left.unlink()
                    if begun is None:
                        self._write_manifest(None)
            try:
                yield self
            except JobFailed:
                if self.finished is None and not list(self._parts.glob("*.arrow")):
                    self._manifest.unlink(missing_ok=True)
                    shutil.rmtree(self._parts, ignore_errors=True)
                raise

    def part(self, shard: Shard) -> Part | None:
        """The part of *shard* by an earlier run. Raises `JobFailed` where the input has changed."""
        file = self._part_file(shard.number)
        if not file.exists():
            return None
        try:
            part = _footer(_read(file).schema)
        except (OSError, pa.ArrowException):
            return None  # damaged: it is made again
        if part.digest != shard.digest or part.row_count != shard.row_count:
            last = shard.first_row + shard.row_count - 1
            raise self._changed(f"between its rows {shard.first_row} and {last}")
        return part

    def write(self, shard: Shard, encoded: Encoded) -> Part:
        """Keep the vectors of the shard's texts. Blocks."""
        table = shard.table
        bad = [*shard.bad, *(shard.bad_row(i, why) for i, why in sorted(encoded.bad.items()))]
        if self._layout.marks_truncated:
            marks = np.zeros(len(shard.texts), bool)
            marks[list(encoded.truncated)] = True
            table = table.append_column(TRUNCATED, pa.array(marks))
        if encoded.bad:
            good = [i for i in range(len(shard.texts)) if i not in encoded.bad]
            table = table.take(pa.array(good, pa.int64()))
        for name, column in self._layout.columns(encoded.vectors).items():
            table = table.append_column(name, column)
        part = Part(
            digest=shard.digest,
            first_row=shard.first_row,
            row_count=shard.row_count,
            token_count=encoded.token_count,
            truncated_count=len(encoded.truncated),
            bad=tuple(bad),
        )
        table = table.replace_schema_metadata({FOOTER: _encoder.encode(part)})
        with (
            write_faults(self._out),
            self._replacing(self._part_file(shard.number)) as file,
            pa.ipc.new_file(file, table.schema) as writer,
        ):
            writer.write_table(table)
        return part

    def assemble(self, shard_count: int) -> Totals:
        """Make the final file of the parts, all of which exist, and remove them. Blocks."""
        files = [self._part_file(number) for number in range(shard_count)]
        if len(list(self._parts.glob("*.arrow"))) != shard_count:
            raise self._changed("at its end: it was longer")
        with write_faults(self._out):
            types: dict[str, pa.DataType] = {}
            rows = tokens = truncated = bad = 0
            digest = sha256()
            with self._replacing(self._errors) as errors:
                for file in files:
                    schema = _read(file).schema
                    part = _footer(schema)
                    unify(types, schema)
                    errors.writelines(_encoder.encode(row) + b"\n" for row in part.bad)
                    rows += part.row_count
                    tokens += part.token_count
                    truncated += part.truncated_count
                    bad += len(part.bad)
                    digest.update(part.digest.encode())
            if not bad:
                self._errors.unlink()
            totals = Totals(rows, rows - bad, tokens, truncated, bad, digest.hexdigest())
            # Columns of the input first, in their order.
            schema = pa.schema(
                [(name, types[name]) for name in sorted(types, key=lambda name: name in RESERVED)]
            )
            tables = (conformed(_read(file).read_all(), schema) for file in files)
            with self._replacing(self._out) as final:
                if self._out.suffix == ".parquet":
                    _write_parquet(final, tables, schema)
                elif self._out.suffix == ".jsonl":
                    for table in tables:
                        final.writelines(_encoder.encode(row) + b"\n" for row in table.to_pylist())
                else:
                    parts = (_footer(_read(file).schema) for file in files)
                    _write_npy(final, tables, parts, row_count=rows)
            self._write_manifest(totals)
        shutil.rmtree(self._parts, ignore_errors=True)
        return totals

    def check_unchanged(self, digests: Iterator[str]) -> None:
        """Raise `JobFailed` unless the finished job was made of the shards with these *digests*."""
        assert self.finished is not None
        joined = sha256()
        for digest in digests:
            joined.update(digest.encode())
        if joined.hexdigest() != self.finished.digest:
            raise self._changed("since")

    def _changed(self, where: str) -> JobFailed:
        return JobFailed(f"the input of {self._out} has changed {where}; {self._anew}")

    @property
    def _anew(self) -> str:
        return (
            f"name another file, or remove {self._out}, {self._manifest.name} and "
            f"{self._parts.name} to begin anew"
        )

    def _part_file(self, number: int) -> Path:
        return self._parts / f"{number:08}.arrow"

    def _read_manifest(self) -> dict[str, Any] | None:
        """The manifest of a job that is begun, or finished with its file still there."""
        try:
            manifest: dict[str, Any] = json.loads(self._manifest.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as fault:
            raise JobFailed(f"{self._manifest} is damaged; {self._anew}") from fault
        is_stale = manifest["finished"] is not None and not self._out.exists()
        return None if is_stale else manifest

    def _write_manifest(self, totals: Totals | None) -> None:
        content = {"job": self._identity, "finished": None if totals is None else asdict(totals)}
        with self._replacing(self._manifest) as file:
            file.write(json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n")

    def _compare(self, begun: Mapping[str, Any]) -> None:
        for name in {**begun, **self._identity}:
            before, now = begun.get(name), self._identity.get(name)
            if before != now:
                raise JobFailed(
                    f"{self._out} was begun with {name} {json.dumps(before)}, and now it is "
                    f"{json.dumps(now)}; run it as before, or {self._anew}"
                )

    @contextmanager
    def _replacing(self, file: Path) -> Iterator[IO[bytes]]:
        """A new *file* that takes its place, on the disk, when the block ends well."""
        new = self._parts / f"{file.name}.tmp"
        try:
            with new.open("wb") as opened:
                yield opened
                opened.flush()
                os.fsync(opened.fileno())
            new.replace(file)
        except BaseException:
            with suppress(OSError):
                new.unlink(missing_ok=True)
            raise


def parse_outputs(given: str) -> Output:
    """The outputs of names with commas between them. Raises `JobFailed`."""
    names = {"dense": Output.DENSE, "sparse": Output.SPARSE, "multi": Output.MULTI}
    wanted = Output(0)
    for name in given.split(","):
        if name not in names:
            raise JobFailed(f"--outputs has {name!r}; it takes {', '.join(names)}, with commas")
        wanted |= names[name]
    return wanted


def check_card(
    card: ModelCard, outputs: Output, dimensions: int | None, prompt: str | None
) -> None:
    """Raise `SettingInvalid` for what the model does not have, with what it has."""
    if outputs not in card.outputs:
        has = str(card.outputs.name).lower().replace("|", ", ")
        raise SettingInvalid(f"{card.id} has no such --outputs; it has {has}")
    if dimensions is not None and not card.takes_dimensions(dimensions):
        sizes = sorted({*card.matryoshka_dimensions, card.dimensions})
        have = f"any up to {card.dimensions}" if card.dimensions_selectable else f"{sizes}"
        raise SettingInvalid(f"--dimensions is {dimensions}; {card.id} has {have}")
    if prompt is not None and prompt not in card.prompts:
        have = ", ".join(card.prompts) or "none"
        raise SettingInvalid(f"{card.id} has no --prompt {prompt!r}; it has {have}")


@contextmanager
def write_faults(file: Path) -> Iterator[None]:
    """Turn what goes wrong while a part or *file* is written into `JobFailed`."""
    try:
        yield
    except (OSError, pa.ArrowException) as fault:
        reason = fault.strerror if isinstance(fault, OSError) and fault.strerror else str(fault)
        raise JobFailed(f"cannot write {file}: {' '.join(reason.split())}. {GO_ON}") from fault


def unify(types: dict[str, pa.DataType], schema: pa.Schema) -> None:
    """Widen *types*, of columns by name, to those of *schema* too; to text if nothing else fits both.

    Parts of JSONL have the types of their own rows.
    """
    for field in schema:
        known = types.setdefault(field.name, field.type)
        if known != field.type:
            both = [pa.schema([(field.name, one)]) for one in (known, field.type)]
            try:
                types[field.name] = pa.unify_schemas(both, promote_options="permissive")[0].type
            except pa.ArrowException:
                types[field.name] = pa.string()


def conformed(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """*table* with the columns of *schema*: what is missing is null."""
    columns = []
    for field in schema:
        if field.name not in table.column_names:
            columns.append(pa.nulls(len(table), field.type))
            continue
        column = table[field.name]
        if column.type == field.type or field.type != pa.string():
            columns.append(column.cast(field.type, safe=False))
        else:
            values = column.to_pylist()
            texts = [None if value is None else as_json_text(value) for value in values]
            columns.append(pa.array(texts, pa.string()))
    return pa.table(columns, schema=schema)


def _offsets(lengths: Sequence[int]) -> pa.Array:
    return pa.array(np.cumsum([0, *lengths], dtype=np.int32))


def _read(file: Path) -> pa.RecordBatchFileReader:
    return pa.ipc.open_file(pa.memory_map(str(file)))


def _footer(schema: pa.Schema) -> Part:
    return msgspec.json.decode(schema.metadata[FOOTER], type=Part)


def _write_parquet(file: IO[bytes], tables: Iterator[pa.Table], schema: pa.Schema) -> None:
    """Vectors as they are, since they do not compress; other columns with zstd."""
    flat = [one.name for one in schema if one.name not in RESERVED and not one.type.num_fields]
    with pq.ParquetWriter(
        file,
        schema,
        compression=dict.fromkeys(flat, "zstd"),
        use_dictionary=flat,
        write_statistics=flat,
    ) as writer:
        group: list[pa.Table] = []
        for table in tables:
            group.append(table)
            rows, byte_count = sum(map(len, group)), sum(one.nbytes for one in group)
            if rows >= ROW_GROUP_ROWS or byte_count >= ROW_GROUP_BYTES:
                writer.write_table(pa.concat_tables(group))
                group.clear()
        if group:
            writer.write_table(pa.concat_tables(group))


def _write_npy(
    file: IO[bytes], tables: Iterator[pa.Table], parts: Iterator[Part], *, row_count: int
) -> None:
    """Dense vectors `[rows, dimensions]`: row i is the input's, all zero where that was bad."""
    for number, (table, part) in enumerate(zip(tables, parts, strict=True)):
        column = table[DENSE].combine_chunks()
        numbers = column.flatten().to_numpy().reshape(len(table), column.type.list_size)
        if number == 0:
            shape = (row_count, numbers.shape[1])
            description = np.lib.format.dtype_to_descr(numbers.dtype)
            header = {"descr": description, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
        rows = np.zeros((part.row_count, numbers.shape[1]), numbers.dtype)
        is_good = np.ones(part.row_count, bool)
        is_good[[bad.row - part.first_row for bad in part.bad]] = False
        rows[is_good] = numbers
        file.write(rows.tobytes())
