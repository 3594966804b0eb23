"""`trivec embed` as a process of its own: its exit codes, its death and what stops it."""

import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from benchmarks.texts import sentences
from tests.checkpoints.tiny import write_tiny
from tests.process.server import clean_environment, running

pq = pytest.importorskip("pyarrow.parquet", reason="comes with: make test")

DYING = Path(__file__).parents[1] / "jobs" / "dying.py"
KILLS = 4
COUNT = 160
STEPS = 5 * (COUNT // 16 + 4)  # a file a shard, two manifests, the errors and the output
FAKE = ("--backend", "fake")
SMALL = ("--shard-rows", "16", "--id-column", "id")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    file = tmp_path / "in.jsonl"
    lines = [json.dumps({"id": i, "text": one}) for i, one in enumerate(sentences(COUNT))]
    file.write_text("\n".join(lines), "utf-8")
    return file


def embed(
    *arguments: "str | Path", program: Sequence[str] = ("-m", "trivec", "embed"), given: str = ""
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *program, *map(str, arguments)],
        env=clean_environment(),
        input=given,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_kills_at_any_step_change_no_vector_and_no_id(corpus: Path, tmp_path: Path) -> None:
    options = (*SMALL, *FAKE)
    whole, out, late = (tmp_path / f"{name}.parquet" for name in ("whole", "out", "late"))
    undisturbed = embed(corpus, whole, *options)
    assert undisturbed.returncode == 0, undisturbed.stderr
    draw = random.Random(20261129)
    steps = [(out, draw.randint(1, STEPS // KILLS)) for _ in range(KILLS - 1)]
    in_the_end = STEPS - draw.randint(0, 10)  # while the final file is made
    for file, step in (*steps, (late, in_the_end)):
        killed = embed(str(step), corpus, file, *options, program=[str(DYING)])
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    for file in (out, late):
        finished = embed(corpus, file, *options)
        assert finished.returncode == 0, finished.stderr
        assert pq.read_table(file)["id"].to_pylist() == list(range(COUNT))
        assert file.read_bytes() == whole.read_bytes()
        left = sorted(one.name.removeprefix(file.name) for one in tmp_path.glob(f"{file.name}*"))
        assert left == ["", ".manifest.json"]


def test_a_kill_leaves_the_small_models_vectors_as_they_are(corpus: Path, tmp_path: Path) -> None:
    """A resumed run embeds other texts together, and a vector does not depend on its neighbours."""
    options = (*SMALL, "--precision", "fp32", "--data-dir", tmp_path / "data")
    whole, out = tmp_path / "whole.parquet", tmp_path / "out.parquet"
    undisturbed = embed(corpus, whole, *options)
    assert undisturbed.returncode == 0, undisturbed.stderr
    killed = embed(str(STEPS // 2), corpus, out, *options, program=[str(DYING)])
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert 0 < len(list((tmp_path / "out.parquet.parts").glob("*.arrow"))) < COUNT / 16
    assert embed(corpus, out, *options).returncode == 0
    assert out.read_bytes() == whole.read_bytes()


def test_exit_codes_and_messages_tell_how_it_went(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    good = embed(corpus, out, *FAKE, *SMALL)
    assert (good.returncode, good.stdout) == (0, "")
    first, *lines = good.stderr.splitlines()
    assert first == "all-minilm-l6-v2 in fake on cpu (fake)"
    assert re.fullmatch(r"\d+ rows, [\d,]+ texts/s, [\d,]+ tokens/s, \d+:\d\d:\d\d left", lines[0])
    assert re.fullmatch(rf"{re.escape(str(out))}: {COUNT} texts, [\d,]+ tokens", lines[-1])
    with corpus.open("a") as opened:
        opened.write('\n{"id": 7}\n')
    bad = embed(corpus, tmp_path / "bad.parquet", *FAKE, *SMALL)
    assert bad.returncode == 3
    assert "1 row has no vector" in bad.stderr
    [error] = (tmp_path / "bad.parquet.errors.jsonl").read_text("utf-8").splitlines()
    assert json.loads(error) == {
        "row": COUNT, "file": str(corpus), "line": COUNT + 1, "id": 7, "reason": "has no 'text'",
    }  # fmt: skip


def test_standard_input_is_a_corpus(corpus: Path, tmp_path: Path) -> None:
    out, named = tmp_path / "out.parquet", tmp_path / "named.parquet"
    assert embed("-", out, *FAKE, *SMALL, given=corpus.read_text("utf-8")).returncode == 0
    assert embed(corpus, named, *FAKE, *SMALL).returncode == 0
    assert out.read_bytes() == named.read_bytes()


def test_a_prompt_goes_before_each_text(tmp_path: Path) -> None:
    folder, prompt = write_tiny(tmp_path / "tiny", position_count=514), "passage: "
    prompts = {"prompts": {"document": prompt}, "default_prompt_name": None}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    texts = sentences(5)
    vectors = []
    for name, before, options in (("named", "", ["--prompt", "document"]), ("written", prompt, [])):
        given, out = tmp_path / f"{name}.jsonl", tmp_path / f"{name}.parquet"
        given.write_text("\n".join(json.dumps({"text": before + one}) for one in texts), "utf-8")
        run = embed(given, out, *FAKE, "--model", folder, *options)
        assert run.returncode == 0, run.stderr
        vectors.append(pq.read_table(out)["embedding"].to_pylist())
    assert vectors[0] == vectors[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda one: one.name)
def test_asked_to_stop_it_finishes_what_is_begun_and_goes_on_later(
    corpus: Path, tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "out.parquet"
    fifo = tmp_path / "fifo.jsonl"  # whose end it waits for, until it is told to stop
    os.mkfifo(fifo)
    command = [sys.executable, "-m", "trivec", "embed", str(fifo), str(out), *FAKE, *SMALL]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=clean_environment())
    assert process.stderr is not None
    lines = corpus.read_text("utf-8").splitlines(keepends=True)
    with fifo.open("w") as feed:
        feed.writelines(lines[:80])
        feed.flush()
        while "texts/s" not in (line := process.stderr.readline()):
            assert line, "it ended before it embedded anything"
        process.send_signal(number)
        assert "Finishing" in process.stderr.readline()
        feed.writelines(lines[80:])
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 130
    assert "run the same command again" in said
    parts = sorted((tmp_path / "out.parquet.parts").glob("*.arrow"))
    assert 5 <= len(parts) < COUNT / 16
    resumed = embed(corpus, out, *FAKE, *SMALL)
    assert resumed.returncode == 0, resumed.stderr
    assert re.search(r"^\d+ rows \(\d+ of earlier runs\)", resumed.stderr, re.M), resumed.stderr
    assert pq.read_table(out)["id"].to_pylist() == list(range(COUNT))


def test_asked_twice_it_leaves_at_once(corpus: Path, tmp_path: Path) -> None:
    fifo, out = tmp_path / "fifo.jsonl", tmp_path / "out.parquet"
    os.mkfifo(fifo)
    command = [sys.executable, "-m", "trivec", "embed", str(fifo), str(out), *FAKE, *SMALL]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=clean_environment())
    assert process.stderr is not None
    with fifo.open("w") as feed:  # it reads on, and there is nothing more
        feed.write(corpus.read_text("utf-8"))
        feed.flush()
        while "texts/s" not in (line := process.stderr.readline()):
            assert line, "it ended before it embedded anything"
        process.send_signal(signal.SIGINT)
        assert "Finishing" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        assert "run the same command again" in process.stderr.readline()
        assert process.wait(60) == 130
    process.stderr.close()
    assert embed(corpus, out, *FAKE, *SMALL).returncode == 0


def test_a_full_disk_stops_it_in_one_line_and_it_goes_on_with_room(
    corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.parquet"
    files_of_10_kb = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000));"
        "from trivec.cli import main; sys.argv = ['trivec', 'embed', *sys.argv[1:]]; main()"
    )
    full = embed(corpus, out, *FAKE, *SMALL, program=["-c", files_of_10_kb])
    assert full.returncode == 2
    last = full.stderr.splitlines()[-1]
    assert last.startswith(f"trivec: cannot write {out}: File too large")
    assert "run the same command again" in last
    assert not list((tmp_path / "out.parquet.parts").glob("*.tmp"))
    assert embed(corpus, out, *FAKE, *SMALL).returncode == 0
    assert pq.read_table(out)["id"].to_pylist() == list(range(COUNT))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(("IN", "/proc/out.parquet"), ["cannot write /proc/out"], id="read-only"),
        pytest.param(("IN", "no/folder/out.npy"), ["cannot write", "No such"], id="no-folder"),
        pytest.param(("no.jsonl", "a.npy"), ["cannot read no.jsonl"], id="no-input"),
        pytest.param(("IN", "a.txt"), ["a.txt ends in none of .parquet"], id="ending"),
        pytest.param(("IN", "a.npy", "--outputs", "dense,sparse"), [".npy"], id="npy-sparse"),
        pytest.param(("IN", "a.parquet", "--outputs", "sparse"), ["it has dense"], id="no-head"),
        pytest.param(("IN", "a.parquet", "--dimensions", "99"), ["99", "[384]"], id="dimensions"),
        pytest.param(("IN", "a.parquet", "--prompt", "x"), ["'x'", "has none"], id="prompt"),
        pytest.param(("IN", "a.parquet", "--outputs", "x"), ["'x'", "sparse"], id="outputs"),
        pytest.param(("IN", "a.parquet", "--url", "nowhere"), ["--url nowhere"], id="url"),
        pytest.param(
            ("IN", "a.parquet", "--url", "http://127.0.0.1:1/v1", "--precision", "int8"),
            ["--precision", "the server's"],
            id="precision-of-a-server",
        ),
        pytest.param(("IN", "a.parquet", "-m", "no-such"), ["no-such"], id="model"),
        pytest.param(("IN", "a.parquet", "--dtype", "int4"), ["'int4'"], id="dtype"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    corpus: Path, arguments: Sequence[str], words: Sequence[str]
) -> None:
    given = [str(corpus) if one == "IN" else one for one in arguments]
    refused = embed(*given, *(() if "--url" in given else FAKE))
    assert (refused.returncode, refused.stdout) == (2, "")
    [line] = refused.stderr.splitlines()[-1:]
    assert line.startswith("trivec: ")
    assert [word for word in words if word not in line] == []
    assert "Traceback" not in refused.stderr


def test_without_pyarrow_it_says_what_to_install(corpus: Path, tmp_path: Path) -> None:
    hidden = (
        "import sys; sys.modules['pyarrow'] = None;"
        "from trivec.cli import main; sys.argv = ['trivec', 'embed', *sys.argv[1:]]; main()"
    )
    refused = embed(corpus, tmp_path / "a.npy", program=["-c", hidden])
    assert refused.returncode == 2
    assert refused.stderr == "trivec: trivec embed needs pyarrow: pip install 'trivec[bulk]'\n"


def test_a_server_computes_what_this_process_would(corpus: Path, tmp_path: Path) -> None:
    near, far = tmp_path / "near.parquet", tmp_path / "far.parquet"
    assert embed(corpus, near, *FAKE, *SMALL).returncode == 0
    with running(tmp_path / "data", *FAKE) as server:
        given = embed(corpus, far, *SMALL, "--url", server.url + "/v1", "--key", server.key)
    assert given.returncode == 0, given.stderr
    assert pq.read_table(far).equals(pq.read_table(near))
