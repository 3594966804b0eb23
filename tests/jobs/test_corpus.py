"""Reading a corpus: every format yields the same rows, and what is no text is named."""

import gzip
import json
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.jobs.rig import SIZE, Row, rows, shards, write

from trivec.core.errors import JobFailed
from trivec.jobs.corpus import Columns, Corpus, ShardSize, check_columns, find_sources

ENDINGS = [".jsonl", ".csv", ".tsv", ".parquet"]
WITH_ID = Columns(id="id")


@pytest.mark.parametrize("ending", [*ENDINGS, ".txt"])
def test_every_format_yields_the_same_texts_in_their_order(tmp_path: Path, ending: str) -> None:
    given = rows(45)
    found = shards(write(tmp_path / f"a{ending}", given))
    assert [text for shard in found for text in shard.texts] == [row["text"] for row in given]
    assert [row for shard in found for row in shard.rows] == list(range(45))
    assert [shard.number for shard in found] == list(range(len(found)))
    assert [bad for shard in found for bad in shard.bad] == []


@pytest.mark.parametrize("ending", ENDINGS)
def test_columns_are_kept_the_id_first(tmp_path: Path, ending: str) -> None:
    file = write(tmp_path / f"a{ending}", [{"price": 1.5, "id": "x", "text": "t"}])
    price = "1.5" if ending in (".csv", ".tsv") else 1.5  # CSV says nothing of types
    [whole] = shards(file, WITH_ID)
    assert whole.table.to_pylist() == [{"id": "x", "price": price, "text": "t"}]
    assert whole.table.column_names[0] == "id"
    [numbered] = shards(file, Columns(kept=("price",)))
    assert numbered.table.to_pylist() == [{"row": 0, "price": price}]
    [alone] = shards(file, Columns(id="id", kept=()))
    assert alone.table.to_pylist() == [{"id": "x"}]


@pytest.mark.parametrize("ending", [*ENDINGS, ".txt"])
def test_a_shard_keeps_to_its_size_and_a_second_reading_cuts_alike(
    tmp_path: Path, ending: str
) -> None:
    file = write(tmp_path / f"a{ending}", rows(45))
    found = shards(file)
    assert len(found) > 5
    for shard in found:
        assert len(shard.texts) <= SIZE.rows_max
        assert sum(map(len, shard.texts[:-1])) < SIZE.characters_max
    again = shards(file)
    assert [one.digest for one in again] == [one.digest for one in found]


def test_a_digest_tells_texts_and_ids_apart(tmp_path: Path) -> None:
    def digest(text: str, row_id: str) -> str:
        file = write(tmp_path / "a.jsonl", [{"id": row_id, "text": text}])
        return shards(file, WITH_ID)[0].digest

    assert digest("a", "1") == digest("a", "1")
    assert len({digest("a", "1"), digest("b", "1"), digest("a", "2")}) == 3


def test_a_folder_is_its_files_in_the_order_of_their_paths(tmp_path: Path) -> None:
    given = rows(30)
    (tmp_path / "in" / "b").mkdir(parents=True)
    for name, part in (
        ("b/1.parquet", given[10:20]),
        ("a.jsonl", given[:5]),
        ("a.txt", given[5:10]),
        ("c.csv", given[20:]),
    ):
        write(tmp_path / "in" / name, part)
    (tmp_path / "in" / "notes.md").write_text("of no format")
    found = shards(tmp_path / "in")
    assert [text for shard in found for text in shard.texts] == [row["text"] for row in given]
    assert [row for shard in found for row in shard.rows] == list(range(30))
    assert found[0].places[5][1] == 1, "lines of two files in one shard count from 1 in each"
    assert found[-1].position == pytest.approx(1.0)
    assert sorted(one.position or 0.0 for one in found) == [one.position for one in found]


def test_a_compressed_file_is_read_as_it_is_named(tmp_path: Path) -> None:
    plain = write(tmp_path / "a.jsonl", rows(20))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    one, two = shards(plain), shards(tmp_path / "b.jsonl.gz")
    assert [shard.digest for shard in one] == [shard.digest for shard in two]


def test_a_row_without_a_text_is_named_with_its_line(tmp_path: Path) -> None:
    lines = [
        b'{"id": 1, "text": "good"}',
        b'{"id": 2, "text": ""}',
        b"",
        b'{"id": 3}',
        b'{"id": 4, "text": 5}',
        b"{not json",
        b'["a list"]',
        b'{"text": "no id"}',
        b'{"id": 6, "text": "\xff"}',
        b'{"id": 7, "text": "half a pair \\ud800 is no character"}',
        b'{"id": 8, "text": " "}',
        b'{"id": 9, "text": "deep", "x": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    [shard] = shards(tmp_path / "a.jsonl", WITH_ID, ShardSize(100, 10_000))
    assert shard.texts == ["good", " "], "blanks are a text, as for the API"
    assert shard.rows == [0, 9]
    assert shard.places == [(str(tmp_path / "a.jsonl"), 1), (str(tmp_path / "a.jsonl"), 11)]
    assert [(bad.line, bad.row, bad.id) for bad in shard.bad] == [
        (2, 1, 2), (4, 2, 3), (5, 3, 4), (6, 4, None), (7, 5, None), (8, 6, None), (9, 7, None),
        (10, 8, None), (12, 10, None),
    ]  # fmt: skip
    reasons = " | ".join(bad.reason for bad in shard.bad)
    for word in ("is empty", "has no 'text'", "is no text", "is no JSON:", "object", "has no 'id'"):
        assert word in reasons


def test_a_row_of_csv_is_named_with_the_line_it_begins_on(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(
        b'id,text\n1,"two\nlines"\n2,b,too many\n3,\n4,\xff\n\n5,"a ""quoted"" one"\n'
    )
    [shard] = shards(tmp_path / "a.csv", WITH_ID)
    assert shard.texts == ["two\nlines", 'a "quoted" one']
    assert [place[1] for place in shard.places] == [2, 8]
    assert [(bad.line, bad.reason) for bad in shard.bad] == [
        (4, "has 3 columns, the header 2"),
        (5, "'text' is empty"),
        (6, "is not UTF-8"),
    ]


def test_a_row_of_parquet_that_is_no_utf8_is_named(tmp_path: Path) -> None:
    broken = pa.array([b"a", b"\xff", None], pa.binary())
    texts = pa.Array.from_buffers(pa.string(), 3, broken.buffers())
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    [shard] = shards(tmp_path / "a.parquet")
    assert shard.texts == ["a"]
    assert [(bad.line, bad.reason) for bad in shard.bad] == [
        (2, "is not UTF-8"),
        (3, "has no 'text'"),
    ]


def test_values_without_a_common_type_become_json_text(tmp_path: Path) -> None:
    given: list[Row] = [{"text": "a", "x": 1}, {"text": "b", "x": "one"}, {"text": "c", "x": [1]}]
    [shard] = shards(write(tmp_path / "a.jsonl", given))
    assert shard.table["x"].to_pylist() == ["1", "one", "[1]"]


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [
        pytest.param(b"", "a.jsonl", ["no row"], id="empty-jsonl"),
        pytest.param(b"id,text\n", "a.csv", ["no row"], id="empty-csv"),
        pytest.param(b"a\nb\n", "a.jsonl", ["none of the first 2 rows", "line 1"], id="not-jsonl"),
        pytest.param(b"PAR1 and then nothing", "a.parquet", ["cannot read"], id="not-parquet"),
        pytest.param(b"id;text\n1;a\n", "a.csv", ["no column 'text'", "id;text"], id="not-csv"),
        pytest.param(b"not gzip", "a.jsonl.gz", ["cannot read"], id="not-gzip"),
        pytest.param(b"a", "a.doc", ["--format", ".parquet"], id="no-format"),
        pytest.param(None, "a.jsonl", ["cannot read", "No such file"], id="no-file"),
        pytest.param(None, "a", ["cannot read", "No such file"], id="no-file-and-no-ending"),
    ],
)
def test_what_cannot_be_read_is_refused(
    tmp_path: Path, content: bytes | None, name: str, words: list[str]
) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)

    def read() -> None:
        check_columns(find_sources(str(file)), Columns())
        shards(file)

    with pytest.raises(JobFailed) as refused:
        read()
    assert [word for word in [*words, name] if word not in str(refused.value)] == []


def test_a_column_that_is_missing_or_no_text_is_refused_with_those_there_are(
    tmp_path: Path,
) -> None:
    file = write(tmp_path / "a.parquet", [{"body": "a", "size": 1}])
    for columns, words in (
        (Columns(), ["'text'", "body, size"]),
        (Columns("body", id="id"), ["'id'", "body, size"]),
        (Columns("body", kept=("url",)), ["'url'"]),
        (Columns("size"), ["'size'", "int64"]),
    ):
        with pytest.raises(JobFailed) as refused:
            check_columns(find_sources(str(file)), columns)
        assert [word for word in words if word not in str(refused.value)] == []


def test_a_column_named_as_one_of_the_output_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"text": "a", "embedding": [1], "row": 1}])
    with pytest.raises(JobFailed, match="'embedding'"):
        shards(file, Columns(id="row", reserved=frozenset({"embedding"})))
    with pytest.raises(JobFailed, match="'row'"):
        shards(file)


def test_a_parquet_that_breaks_off_yields_what_is_before(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", rows(60))
    whole = bytearray(file.read_bytes())
    group = pq.ParquetFile(file).metadata.row_group(5).column(1)
    start = group.dictionary_page_offset or group.data_page_offset
    whole[start : start + group.total_compressed_size] = b"\xff" * group.total_compressed_size
    file.write_bytes(whole)
    texts: list[str] = []

    def read() -> None:
        for shard in Corpus(find_sources(str(file)), WITH_ID, SIZE).shards():
            texts.extend(shard.texts)

    with pytest.raises(JobFailed, match="run the same command again"):
        read()
    assert texts == [row["text"] for row in rows(60)[: len(texts)]]
    assert len(texts) >= 30


def test_reading_holds_a_shard_and_not_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    with file.open("w") as opened:
        for i in range(40_000):
            opened.write(json.dumps({"text": f"{i} " + "x" * 100}) + "\n")
    peaks = []
    for count in (1, 20):
        tracemalloc.start()
        reading = Corpus(find_sources(str(file)), Columns(), ShardSize(2000, 1 << 20)).shards()
        for _ in range(count):
            next(reading)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0] + 1_000_000


@pytest.mark.parametrize("form", [None, "jsonl"])
def test_what_is_made_in_the_folder_that_is_read_is_no_input(
    tmp_path: Path, form: str | None
) -> None:
    out = tmp_path / "out.parquet"
    for name in ("a.jsonl", "out.parquet.errors.jsonl", "out.parquet.manifest.json", "outer.jsonl"):
        write(tmp_path / "in.jsonl", rows(1)).replace(tmp_path / name)
    (tmp_path / "out.parquet.txt").write_text("a file of its own")
    (tmp_path / "out.parquet.parts").mkdir()
    for file in (out, tmp_path / "out.parquet.parts" / "0.arrow"):
        file.write_bytes(b"ours")
    found = find_sources(str(tmp_path), form=form, out=out)
    names = ["a.jsonl", "out.parquet.txt", "outer.jsonl"]
    assert [Path(source.name).name for source in found] == names
