"""The stores on the page about bulk work take the file that it says they take."""

import importlib.util
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.jobs.rig import Job, rows, write

PAGE = Path(__file__).resolve().parents[2] / "docs" / "bulk.md"
COUNT = 40
EXAMPLES = dict(
    re.findall(r"^### (\w+)\n\n```python\n(.+?)```", PAGE.read_text("utf-8"), re.M | re.S)
)
# LanceDB and Milvus are hundreds of megabytes that CI does without: for whoever has them.
CLIENTS = {"Qdrant": "qdrant_client", "Milvus": "milvus_lite", "LanceDB": "lancedb"}
HERE = [name for name, module in CLIENTS.items() if importlib.util.find_spec(module)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `vectors.parquet`, which the examples take for their own."""
    given = [{**row, "id": i} for i, row in enumerate(rows(COUNT))]
    Job(write(tmp_path / "in.jsonl", given), tmp_path / "vectors.parquet").run()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_store_of_the_page_has_an_example() -> None:
    assert set(EXAMPLES) == {*CLIENTS, "pgvector"}
    for name, example in EXAMPLES.items():
        compile(example, name, "exec")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", HERE)
def test_a_store_takes_all_rows(name: str, folder: Path) -> None:
    found: dict[str, Any] = {}
    exec(compile(EXAMPLES[name], name, "exec"), found)
    assert found["count"] == COUNT


def test_pgvector_is_filled_where_postgres_has_it(folder: Path, postgres: Any) -> None:
    """Without the extension only the statement that wants it fails."""
    psycopg = pytest.importorskip("psycopg", reason="comes with: make test")
    found: dict[str, Any] = {"DATABASE_URL": postgres.new_database()}
    run = partial(exec, compile(EXAMPLES["pgvector"], "pgvector", "exec"), found)
    with psycopg.connect(found["DATABASE_URL"]) as connection:
        known = "SELECT 1 FROM pg_available_extensions WHERE name = 'vector'"
        has_extension = connection.execute(known).fetchone() is not None
    if has_extension:
        run()
        assert found["count"] == COUNT
    else:
        with pytest.raises(psycopg.errors.FeatureNotSupported, match='extension "vector"'):
            run()
