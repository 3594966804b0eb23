"""`trivec models`, as it is typed: data on standard output, talk on standard error, exit codes."""

import json
from pathlib import Path

import numpy as np
import pytest
from tests.checkpoints.changing import rewrite
from typer.testing import CliRunner

from trivec.checkpoints import open_own
from trivec.checkpoints.catalogue import entry_of
from trivec.cli import app
from trivec.core.errors import CheckpointRefused


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    """Everything the commands keep is kept in the test's own folder."""
    monkeypatch.setenv("TRIVEC_DATA_DIR", str(tmp_path / "data"))
    return CliRunner()


def test_list_says_what_is_here_and_verified(runner: CliRunner) -> None:
    done = runner.invoke(app, ["models", "list", "--json"])
    assert done.exit_code == 0
    listed = {row["id"]: row for row in json.loads(done.stdout)}
    assert listed["all-minilm-l6-v2"]["verified"]
    assert listed["all-minilm-l6-v2"]["source"] == "wheel"
    assert listed["baai/bge-m3"]["source"] is None
    assert listed["baai/bge-m3"]["outputs"] == ["dense", "sparse", "multi"]
    assert listed["baai/bge-m3"]["pinned"]
    assert not listed["baai/bge-large-en-v1.5"]["pinned"]
    assert listed["intfloat/multilingual-e5-base"]["prompts"] == {
        "query": "query: ",
        "document": "passage: ",
    }


def test_list_is_a_table_for_people(runner: CliRunner) -> None:
    done = runner.invoke(app, ["models", "list"])
    (line,) = [line for line in done.stdout.splitlines() if "all-minilm-l6-v2" in line]
    cells = ["all-minilm-l6-v2", "wheel", "256", "384", "dense", "BERT", "Apache-2.0"]
    assert line.split() == cells


def test_list_searches_names_families_licences_and_outputs(runner: CliRunner) -> None:
    def found(*words: str) -> set[str]:
        done = runner.invoke(app, ["models", "list", *words, "--json"])
        return {row["id"] for row in json.loads(done.stdout)}

    assert "baai/bge-reranker-v2-m3" in found("score", "bge")
    assert all("bge" in one for one in found("score", "BGE"))
    assert found("qwen3") == {f"qwen/qwen3-embedding-{size}" for size in ("0.6b", "4b", "8b")}
    assert found("cc-by-nc") >= {"naver/splade-v3"}
    assert found("no-such-model") == set()


def test_list_keeps_models_of_one_output_and_family_together(runner: CliRunner) -> None:
    rows = json.loads(runner.invoke(app, ["models", "list", "--json"]).stdout)
    groups = [(row["outputs"], row["family"]) for row in rows]
    assert groups == sorted(groups)


def test_list_shows_every_id_whole(runner: CliRunner) -> None:
    ids = {row["id"] for row in json.loads(runner.invoke(app, ["models", "list", "--json"]).stdout)}
    words = runner.invoke(app, ["models", "list"]).stdout.split()
    assert ids <= set(words), "an id that is cut cannot be copied"


def test_pulling_an_unknown_model_says_what_is_known(runner: CliRunner) -> None:
    done = runner.invoke(app, ["models", "pull", "baai/bge-m4"])
    assert isinstance(done.exception, CheckpointRefused)
    assert "baai/bge-m3" in str(done.exception)


def test_verify_meets_every_figure_on_the_real_weights(runner: CliRunner) -> None:
    done = runner.invoke(app, ["models", "verify", "all-minilm-l6-v2"])
    assert done.exit_code == 0, done.stdout
    assert "MISSED" not in done.stdout
    assert "32 of 32 figures are met" in done.stderr


def test_verify_wants_a_model_or_the_prepared_ones(runner: CliRunner, tmp_path: Path) -> None:
    assert runner.invoke(app, ["models", "verify"]).exit_code == 2
    done = runner.invoke(app, ["models", "verify", "--prepared", "--data-dir", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "0 of 0 prepared models" in done.stderr


def test_verify_finds_one_perturbed_weight_out(runner: CliRunner, tmp_path: Path) -> None:
    """A single row of one matrix, scaled by a tenth."""
    wheel = open_own(entry_of("all-minilm-l6-v2"), cache_dir=tmp_path)
    assert wheel is not None
    copy = tmp_path / "copy"
    for file in wheel.folder.rglob("*"):
        if file.is_file() and file.suffix != ".md":
            target = copy / file.relative_to(wheel.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())

    def perturb(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        tensors["encoder.layer.5.output.LayerNorm.weight"][:4] *= 1.1
        return tensors

    rewrite(copy, perturb)
    done = runner.invoke(app, ["models", "verify", f"all-minilm-l6-v2={copy}", "--json"])
    assert done.exit_code == 1
    missed = [row for row in json.loads(done.stdout) if not row["met"]]
    assert missed
    assert all(row["difference"] > 1e-3 for row in missed)
