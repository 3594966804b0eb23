"""A job from a corpus to a file: what is in it, and that no start computes what another has kept."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from tests.api.house import CARD, StandIn
from tests.jobs.rig import ALL, Job, matrix, rows, vectors_of, write

from trivec.core.errors import EngineFault, JobFailed, Overloaded
from trivec.core.ports import Texts, TokenLists
from trivec.core.quantisation import cut, quantise
from trivec.core.types import Float32Array, LongText, Output, Reply, Sequences, SparseVector
from trivec.jobs.corpus import Columns
from trivec.jobs.results import Layout, Results

COUNT = 45


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(write(tmp_path / "in.jsonl", rows(COUNT)), tmp_path / "out.parquet")


def texts() -> list[str]:
    return [row["text"] for row in rows(COUNT)]


def test_every_row_has_the_vectors_of_its_text(job: Job) -> None:
    job.outputs = ALL
    totals = job.run()
    assert totals is not None
    assert (totals.rows, totals.texts, totals.bad) == (COUNT, COUNT, 0)
    table = pq.read_table(job.out)
    assert table.select(["id", "text", "price"]).to_pylist() == rows(COUNT)
    expected = vectors_of(job.model, texts())
    assert np.array_equal(matrix(table["embedding"]), expected.dense)
    terms = [one for one in expected.sparse if one is not None]
    assert table["sparse_indices"].to_pylist() == [one.token_ids.tolist() for one in terms]
    assert table["sparse_values"].to_pylist() == [one.weights.tolist() for one in terms]
    multi = [one.tolist() for one in expected.multi if one is not None]
    assert table["multi_embedding"].to_pylist() == multi
    assert job.left_over() == [".manifest.json"]


def test_only_what_is_asked_for_is_kept(job: Job) -> None:
    job.outputs = Output.SPARSE
    job.run()
    assert pq.read_schema(job.out).names[3:] == ["sparse_indices", "sparse_values"]


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "uint8", "binary", "ubinary"])
def test_numbers_are_as_the_api_gives_them(job: Job, dtype: Any) -> None:
    job.dtype = dtype
    job.outputs = Output.DENSE | Output.MULTI
    job.run()
    table = pq.read_table(job.out)
    expected = vectors_of(job.model, texts(), job.outputs)

    def reduced(numbers: Float32Array) -> Any:
        is_float = dtype.startswith("float")
        return numbers.astype(dtype) if is_float else quantise(numbers, dtype)

    assert np.array_equal(matrix(table["embedding"]), reduced(expected.dense))
    for found, rows_of in zip(table["multi_embedding"].to_pylist(), expected.multi, strict=True):
        assert rows_of is not None
        assert np.array_equal(found, reduced(rows_of))


def test_a_vector_is_cut_as_the_api_cuts_it(job: Job) -> None:
    job.size = 3
    job.run()
    dense = vectors_of(job.model, texts(), Output.DENSE).dense
    assert np.array_equal(matrix(pq.read_table(job.out)["embedding"]), cut(dense, 3))


def test_a_prompt_goes_before_each_text(job: Job) -> None:
    job.prompt = "passage: "
    write(job.given, [*rows(COUNT), {"id": "long", "text": "x" * 75}])
    job.run()
    dense = vectors_of(job.model, [f"passage: {one}" for one in texts()], Output.DENSE).dense
    assert np.array_equal(matrix(pq.read_table(job.out)["embedding"]), dense)
    assert job.errors[0]["id"] == "long", "with its prompt it is too long"


def test_jsonl_has_the_rows_of_parquet(job: Job) -> None:
    job.outputs = Output.DENSE | Output.SPARSE
    job.run()
    job.out = job.out.with_suffix(".jsonl")
    job.run()
    lines = job.out.read_text("utf-8").splitlines()
    assert [json.loads(line) for line in lines] == pq.read_table(
        job.out.with_suffix(".parquet")
    ).to_pylist()


def test_npy_has_a_row_for_each_of_the_input_and_zeros_for_bad_ones(job: Job) -> None:
    given = [*rows(COUNT), {"id": "bad", "text": ""}, {"id": "last", "text": "good"}]
    write(job.given, given)
    job.out = job.out.with_suffix(".npy")
    job.run()
    found = np.load(job.out)
    dense = vectors_of(job.model, [*texts(), "good"], Output.DENSE).dense
    assert found.dtype == np.float32
    assert np.array_equal(np.delete(found, COUNT, axis=0), dense)
    assert not found[COUNT].any()


def test_types_of_a_column_that_differ_between_shards_are_joined(job: Job) -> None:
    given = [{**row, "x": None, "y": 1} for row in rows(COUNT)]
    given[-1] |= {"x": 7, "y": "text"}
    write(job.given, given)
    job.run()
    table = pq.read_table(job.out)
    assert table["x"].to_pylist() == [None] * (COUNT - 1) + [7]
    assert table["y"].to_pylist() == ["1"] * (COUNT - 1) + ["text"]


def test_a_text_that_is_too_long_is_a_bad_row_or_cut_and_marked(job: Job) -> None:
    write(job.given, [*rows(COUNT), {"id": "long", "text": "x" * 100}])
    totals = job.run()
    assert totals is not None
    assert (totals.texts, totals.bad) == (COUNT, 1)
    [error] = job.errors
    assert error["id"] == "long"
    assert error["line"] == COUNT + 1
    assert error["file"] == str(job.given)
    assert "102 tokens" in error["reason"]
    assert "--truncate" in error["reason"]
    job.out = job.out.with_name("cut.parquet")
    job.truncate = "start"
    totals = job.run()
    assert totals is not None
    assert (totals.truncated, totals.bad) == (1, 0)
    table = pq.read_table(job.out)
    assert table["truncated"].to_pylist() == [False] * COUNT + [True]
    assert job.errors == []


@pytest.mark.parametrize("ending", [".parquet", ".jsonl", ".npy"])
def test_a_shard_may_be_bad_as_a_whole(job: Job, ending: str) -> None:
    given = rows(COUNT)
    for i in range(25):
        given[i]["text"] = "x" * 100 if i < 20 else None
    write(job.given, given)
    job.out = job.out.with_suffix(ending)
    totals = job.run()
    assert totals is not None
    assert (totals.texts, totals.bad) == (COUNT - 25, 25)
    if ending == ".parquet":
        assert pq.read_table(job.out)["id"].to_pylist() == [row["id"] for row in given[25:]]
    assert [one["row"] for one in job.errors] == list(range(25))


class Skipping(StandIn):
    """Says of each sequence how many tokens its pooled mean skips: as many as its text has."""

    async def tokenize(self, inputs: Texts | TokenLists, **how: Any) -> Sequences:
        sequences = await super().tokenize(inputs, **how)
        return replace(sequences, skip=sequences.lengths() - 2)

    async def embed(self, sequences: Sequences, outputs: Output, **how: Any) -> Reply:
        assert sequences.skip is not None
        assert sequences.skip.tolist() == (sequences.lengths() - 2).tolist()
        if ord("!") + 4 in sequences.token_ids:
            raise EngineFault("a vector is not finite")
        return await super().embed(sequences, outputs, **how)


def test_what_the_mean_skips_stays_with_its_sequence(job: Job) -> None:
    given = rows(COUNT)
    given[3]["text"], given[4]["text"] = "x" * 100, "!"
    write(job.given, given)
    job.model = Skipping(replace(CARD, token_count_max=80))
    totals = job.run()
    assert totals is not None
    assert totals.bad == 2


class Faulty(StandIn):
    """Fails on every sequence with the token of "!", and cannot tokenise a "?"."""

    async def tokenize(
        self,
        inputs: Texts | TokenLists,
        *,
        long_text: LongText,
        trusted: bool = False,
        prompt: str = "",
        token_count_max: int | None = None,
    ) -> Sequences:
        if any("?" in str(one) for one in inputs):
            raise EngineFault("the tokenizer panicked")
        return await super().tokenize(
            inputs,
            long_text=long_text,
            trusted=trusted,
            prompt=prompt,
            token_count_max=token_count_max,
        )

    async def embed(
        self,
        sequences: Sequences,
        outputs: Output,
        *,
        deadline_s: float | None = None,
        background: bool = False,
    ) -> Reply:
        if ord("!") + 4 in sequences.token_ids:
            raise EngineFault("a vector is not finite")
        return await super().embed(sequences, outputs, deadline_s=deadline_s)


def test_a_text_on_which_the_model_fails_holds_up_no_other(job: Job) -> None:
    given = rows(COUNT)
    for i, mark in ((3, "!"), (17, "?"), (18, "!"), (44, "!?")):
        given[i] = {**given[i], "text": mark}
    write(job.given, given)
    job.model = Faulty(replace(CARD, token_count_max=80))
    job.outputs = ALL
    job.run()
    table = pq.read_table(job.out)
    good = [row for i, row in enumerate(given) if i not in (3, 17, 18, 44)]
    assert table["id"].to_pylist() == [row["id"] for row in good]
    expected = vectors_of(job.model, [row["text"] for row in good])
    assert np.array_equal(matrix(table["embedding"]), expected.dense)
    assert table["sparse_indices"].to_pylist() == [
        one.token_ids.tolist() for one in expected.sparse if isinstance(one, SparseVector)
    ]
    assert [(one["row"], one["id"]) for one in job.errors] == [
        (i, f"id-{i}") for i in (3, 17, 18, 44)
    ]


def test_a_second_start_goes_on_and_computes_nothing_twice(job: Job) -> None:
    undisturbed = replace(job, out=job.out.with_name("whole.parquet"), asked=[])
    undisturbed.run()
    assert job.run(stop_when=lambda progress: progress.rows >= 10) is None
    assert not job.out.exists()
    first = len(job.asked)
    assert 10 <= first < COUNT
    job.run()
    assert sorted(job.asked) == sorted(texts()), "each text once"
    assert job.told[-1].rows_kept + job.told[-1].rows == COUNT
    assert pq.read_table(job.out).equals(pq.read_table(undisturbed.out))
    assert job.out.read_bytes() == undisturbed.out.read_bytes()


def test_a_third_start_finds_it_finished(job: Job) -> None:
    totals = job.run()
    job.asked.clear()
    assert job.run() == totals
    assert job.asked == []


def test_bad_rows_of_an_earlier_start_are_not_lost(job: Job) -> None:
    given = rows(COUNT)
    given[1]["text"] = given[-1]["text"] = ""
    write(job.given, given)
    job.run(stop_when=lambda progress: progress.bad > 0)
    totals = job.run()
    assert totals is not None
    assert totals.bad == 2
    assert [one["row"] for one in job.errors] == [1, COUNT - 1]


@pytest.mark.parametrize("is_finished", [False, True], ids=["half-done", "finished"])
@pytest.mark.parametrize("change", ["text", "id", "fewer"])
def test_a_changed_input_is_refused(job: Job, change: str, is_finished: bool) -> None:
    job.run(stop_when=lambda _: not is_finished)
    given = rows(COUNT)
    if change == "fewer":
        del given[5:]
    else:
        given[0][change] = "another"
    write(job.given, given)
    with pytest.raises(JobFailed, match="has changed") as refused:
        job.run()
    assert "manifest.json" in str(refused.value)
    write(job.given, rows(COUNT))
    assert job.run() is not None, "as it was, it goes on"


def test_another_model_or_another_form_is_refused_with_both_named(job: Job) -> None:
    job.run(stop_when=lambda _: True)
    with pytest.raises(JobFailed, match=r'dtype "float32", and now it is "int8"'):
        replace(job, dtype="int8").run()
    with pytest.raises(JobFailed, match=r'"stand-in".+"other"'):
        replace(job, name="other").run()
    assert job.run() is not None


def test_a_file_of_unknown_origin_is_never_replaced(job: Job) -> None:
    job.out.write_text("mine")
    with pytest.raises(JobFailed, match="exists"):
        job.run()
    assert job.out.read_text() == "mine"


def test_a_removed_output_is_made_anew(job: Job) -> None:
    job.run()
    job.out.unlink()
    write(job.given, rows(3))
    totals = job.run()
    assert totals is not None
    assert totals.rows == 3


def test_one_process_at_a_time(job: Job) -> None:
    refused: list[str] = []

    def start_another(_: object) -> bool:
        manifest = json.loads(Path(f"{job.out}.manifest.json").read_bytes())
        other = Results(job.out, manifest["job"], Layout(Output.DENSE, CARD.dimensions))
        with pytest.raises(JobFailed) as fault, other.open():
            pass
        refused.append(str(fault.value))
        return True

    job.run(stop_when=start_another)
    assert "another process" in refused[0]


def test_a_model_that_cannot_go_on_stops_the_job_and_loses_nothing(job: Job) -> None:
    job.run(stop_when=lambda progress: progress.rows >= 10)
    kept = len(job.asked)
    job.model.fault = Overloaded("The server stopped.", retry_after_s=1.0)
    with pytest.raises(JobFailed, match="cannot go on"):
        job.run()
    job.model.fault = None
    job.asked.clear()
    job.run()
    assert len(job.asked) == COUNT - kept


def test_a_model_that_fails_on_everything_stops_the_job(job: Job) -> None:
    job.model.fault = EngineFault("the driver said something")
    with pytest.raises(JobFailed, match="failed on"):
        job.run()
    assert not job.out.exists()


def test_a_job_that_fails_before_it_keeps_anything_may_begin_with_other_options(job: Job) -> None:
    with pytest.raises(JobFailed, match="none of the first"):
        replace(job, columns=replace(job.columns, text="body"), dtype="int8").run()
    assert job.left_over() == []
    assert job.run() is not None


def test_shards_of_a_job_whose_manifest_is_gone_are_not_taken_for_another_ones(job: Job) -> None:
    job.run(stop_when=lambda progress: progress.rows >= 10)
    Path(f"{job.out}.manifest.json").unlink()
    job.asked.clear()
    assert replace(job, dtype="int8").run() is not None
    assert len(job.asked) == COUNT


def test_an_input_that_breaks_off_keeps_what_is_before_and_goes_on_when_mended(
    tmp_path: Path,
) -> None:
    job = Job(write(tmp_path / "in.parquet", rows(COUNT)), tmp_path / "out.parquet")
    whole = job.given.read_bytes()
    group = pq.ParquetFile(job.given).metadata.row_group(4).column(1)
    start = group.dictionary_page_offset or group.data_page_offset
    broken = bytearray(whole)
    broken[start : start + group.total_compressed_size] = b"\xff" * group.total_compressed_size
    job.given.write_bytes(broken)
    with pytest.raises(JobFailed, match="cannot read"):
        job.run()
    kept = len(job.asked)
    assert kept > 0
    job.given.write_bytes(whole)
    job.run()
    assert len(job.asked) == COUNT
    assert pq.read_table(job.out)["id"].to_pylist() == [row["id"] for row in rows(COUNT)]


def test_without_an_id_column_rows_are_numbered(job: Job) -> None:
    given = rows(COUNT)
    given[2]["text"] = ""
    write(job.given, given)
    job.columns = Columns(kept=("price",))
    job.run()
    table = pq.read_table(job.out)
    assert table["row"].to_pylist() == [i for i in range(COUNT) if i != 2]
    assert table.column_names == ["row", "price", "embedding"]
    assert job.errors[0]["id"] == 2
