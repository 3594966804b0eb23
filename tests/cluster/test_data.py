"""Bulk work on two nodes: complete and exactly once, also where an actor and a node are killed."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
import ray.data
from benchmarks.texts import sentences
from tests.cluster.nodes import process_ids, wait_until
from tests.soak import ray_dataset

from trivec.cluster.data import KeptShards, embed_dataset
from trivec.core.errors import JobFailed

SETTLE_S = 150.0
COUNT = 4_000
SHARD_ROWS = 50
EMPTY, LONG = 70, 1_234  # rows that have no vector
OPTIONS = ("--id-column", "id", "--shard-rows", f"{SHARD_ROWS}", "--backend", "fake")
MODEL = "all-minilm-l6-v2"


@pytest.fixture
def lines() -> list[str]:
    """A corpus."""
    texts = sentences(COUNT)
    texts[EMPTY], texts[LONG] = "", "word " * 2_000
    return [json.dumps({"id": i, "text": one}) + "\n" for i, one in enumerate(texts)]


def started(*arguments: "str | Path") -> "subprocess.Popen[str]":
    """`trivec embed - …`, whose corpus is to be written."""
    command = [sys.executable, "-m", "trivec", "embed", "-", *map(str, arguments), *OPTIONS]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def give(process: "subprocess.Popen[str]", lines: Sequence[str]) -> None:
    assert process.stdin is not None
    process.stdin.writelines(lines)
    process.stdin.flush()


def finish(process: "subprocess.Popen[str]", lines: Sequence[str]) -> None:
    """Give the last *lines*, and check that it ends as one does of which two rows are bad."""
    _, said = process.communicate("".join(lines), timeout=SETTLE_S)
    assert process.returncode == 3, said


def kill_one(name: str) -> None:
    """Kill a process of the cluster that has an actor of class *name*."""
    os.kill(process_ids(name)[0], signal.SIGKILL)


def wait_for_files(folder: Path, *, count: int, made_by: "Future[Any] | None" = None) -> None:
    """Until *count* shards are kept in *folder*."""

    def are_there() -> bool:
        if made_by is not None and made_by.done():
            made_by.result()
        return len(list(folder.glob("*.arrow"))) >= count

    wait_until(are_there, within_s=SETTLE_S, what=f"shard {count}")


def test_a_job_outlives_an_actor_and_a_node_and_its_files_are_those_of_one_machine(
    cluster: Any, second_node: Any, lines: list[str], tmp_path: Path
) -> None:
    plain, out = tmp_path / "plain.parquet", tmp_path / "out.parquet"
    finish(started(plain), lines)
    process = started(out, "--ray", cluster.address, "--ray-actors", "2", "--ray-cpus", "1")
    parts = tmp_path / "out.parquet.parts"
    give(process, lines[:1_500])
    wait_for_files(parts, count=10)
    kill_one("BulkEngine")
    give(process, lines[1_500:3_000])
    wait_for_files(parts, count=40)
    cluster.remove_node(second_node, allow_graceful=False)
    finish(process, lines[3_000:])
    assert out.read_bytes() == plain.read_bytes()
    for ending in (".manifest.json", ".errors.jsonl"):
        ours, theirs = (Path(f"{file}{ending}").read_text("utf-8") for file in (out, plain))
        assert ours == theirs


def test_what_a_cluster_cannot_do_is_said_in_a_line(cluster: Any, tmp_path: Path) -> None:
    for arguments, reason in (
        (("--ray", "127.0.0.1:1"), "no Ray cluster at 127.0.0.1:1"),
        (("--ray", cluster.address, "--url", "http://127.0.0.1:1/v1"), "give one"),
        (("--ray", cluster.address, "--model", "nothing/here"), "nothing/here"),
    ):
        process = started(tmp_path / "out.parquet", *arguments)
        _, said = process.communicate("", timeout=SETTLE_S)
        assert process.returncode == 2
        assert reason in said.splitlines()[-1]


def embedded(source: Path, **options: Any) -> pa.Table:
    """What a pipeline with our stage makes of *source*."""
    ray.data.DataContext.get_current().enable_progress_bars = False
    ds = ray.data.read_json(str(source), override_num_blocks=8)
    made = embed_dataset(ds, model=MODEL, settings={"backend": "fake"}, **options)
    return pa.concat_tables(ray.get(made.to_arrow_refs())).sort_by("id")


@pytest.mark.filterwarnings("ignore")  # Ray's own, which would end its threads
def test_a_pipeline_outlives_an_actor_and_goes_on_where_it_was(
    driver: None, second_node: Any, lines: list[str], tmp_path: Path
) -> None:
    source, kept = tmp_path / "in.jsonl", tmp_path / "kept"
    source.write_text("".join(lines), "utf-8")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(embedded, source, manifest=str(kept), actors=2)
        wait_for_files(kept, count=1, made_by=running)
        kill_one("MapWorker")
        table = running.result(timeout=SETTLE_S)
    assert table["id"].to_pylist() == list(range(COUNT)), "complete, and each once"
    errors = {i: error for i, error in enumerate(table["error"].to_pylist()) if error}
    assert errors.keys() == {EMPTY, LONG}
    assert [i for i in range(COUNT) if not table["embedding"][i].is_valid] == [EMPTY, LONG]

    files = {file: file.stat().st_ino for file in kept.glob("*.arrow")}
    removed = next(iter(files))
    removed.unlink()
    assert embedded(source, manifest=str(kept)) == table
    again = {file: file.stat().st_ino for file in kept.glob("*.arrow")}
    assert again.keys() == files.keys()
    assert {file for file in files if again[file] != files[file]} == {removed}


@pytest.mark.filterwarnings("ignore")  # Ray's own, which would end its threads
def test_a_pipeline_that_keeps_nothing_outlives_an_actor_and_a_node(
    cluster: Any, driver: None, second_node: Any
) -> None:
    """The short form of the soak, whose long one has 200,000 rows."""
    seen = ray_dataset.outlive(cluster, second_node, 8_000, {"backend": "fake"})
    assert len(seen.killed) == 2
    assert set(seen.times.tolist()) == {1}, "complete, and each once"
    assert seen.errors == 0
    assert seen.cosine_min >= ray_dataset.COSINE_MIN


def test_what_is_kept_is_one_jobs_and_whole(tmp_path: Path) -> None:
    folder = str(tmp_path / "kept")
    kept, columns = KeptShards(folder, {"model": "a"}), pa.table({"embedding": [[1.0], None]})
    assert kept.read("digest") is None
    kept.write("digest", columns)
    assert KeptShards(folder, {"model": "a"}).read("digest") == columns
    with pytest.raises(JobFailed, match="name another folder"):
        KeptShards(folder, {"model": "b"})
    file = tmp_path / "kept" / "digest.arrow"
    file.write_bytes(file.read_bytes()[:-20])
    assert kept.read("digest") is None, "half a file is none"
