"""The pages of docs/use: each program runs as it is printed, and prints what the page says it does."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.api.house import CARD, House, StandIn
from tests.process.server import Server

PAGES = Path(__file__).resolve().parents[2] / "docs" / "use"
WEAVIATE_PYTHON = PAGES.parents[1] / ".venv-weaviate" / "bin" / "python"
ADDRESS = "http://127.0.0.1:8000"
LINES_MAX = 40
MODEL = "all-minilm-l6-v2"
TEXTS = ["A cat sits on the mat.", "Interest rates rose again."]
# Pages of MiniLM, and the module that each needs.
DENSE = {
    "openai": "openai",
    "langchain": "langchain_cohere",
    "llamaindex": "llama_index.embeddings.openai_like",
    "haystack": "haystack",
    "litellm": "litellm",
    "chroma": "chromadb",
    "lancedb": "lancedb",
}
# Of BGE-M3's three vectors, by a stand-in for the model.
HYBRID = {"qdrant": "qdrant_client", "milvus": "milvus_lite"}
APPLICATIONS = {"open-webui", "n8n", "dify"}  # settings, and no program
OTHERS = {"pgvector", "weaviate"}


def text_of(name: str) -> str:
    return (PAGES / f"{name}.md").read_text("utf-8")


def program_of(name: str) -> str:
    [program] = re.findall(r"^```python\n(.+?)^```$", text_of(name), re.M | re.S)
    return str(program)


def output_of(name: str) -> str:
    [shown] = re.findall(r"^```text\n(.+?)^```$", text_of(name), re.M | re.S)
    return str(shown)


def printed(program: str, url: str, key: str, folder: Path, **environ: str) -> str:
    """What *program* prints, run in a process of its own in *folder*."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program.replace(ADDRESS, url)],
        cwd=folder,
        env={**os.environ, "TRIVEC_API_KEY": key, "LITELLM_LOCAL_MODEL_COST_MAP": "True"} | environ,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def needs(module: str) -> None:
    try:
        is_here = find_spec(module) is not None
    except ModuleNotFoundError:
        is_here = False
    if not is_here:
        pytest.skip(f"{module} comes with: make test-clients")


@pytest.fixture
def hybrid_house() -> Iterator[House]:
    house = House(model=StandIn(replace(CARD, token_count_max=256)))
    yield house
    house.close()


def test_every_page_is_short_and_has_its_test() -> None:
    tested = {*DENSE, *HYBRID, *OTHERS}
    assert {file.stem for file in PAGES.glob("*.md") if "```python" in file.read_text()} == tested
    lengths = {name: len(text_of(name).splitlines()) for name in tested | APPLICATIONS}
    assert {name: n for name, n in lengths.items() if n > LINES_MAX} == {}


@pytest.mark.parametrize("name", DENSE)
def test_a_page_prints_what_it_says(name: str, server: Server, tmp_path: Path) -> None:
    needs(DENSE[name])
    assert printed(program_of(name), server.url, server.key, tmp_path) == output_of(name)


@pytest.mark.parametrize("name", HYBRID)
def test_a_store_of_several_vectors_finds_the_text_itself(
    name: str, hybrid_house: House, tmp_path: Path
) -> None:
    needs(HYBRID[name])
    with hybrid_house.listening() as address:
        found = printed(program_of(name), address, hybrid_house.key, tmp_path)
    assert found == f"{TEXTS[0]}\n"


def test_pgvector_finds_the_text_where_postgres_has_it(
    server: Server, postgres: Any, tmp_path: Path
) -> None:
    """Without the extension only the statement that wants it fails."""
    psycopg = pytest.importorskip("psycopg", reason="comes with: make test")
    url = postgres.new_database()
    with psycopg.connect(url) as connection:
        known = "SELECT 1 FROM pg_available_extensions WHERE name = 'vector'"
        has_extension = connection.execute(known).fetchone() is not None
    program = program_of("pgvector")
    if has_extension:
        found = printed(program, server.url, server.key, tmp_path, DATABASE_URL=url)
        assert found == output_of("pgvector")
        return
    # With the plain numbers in place of the extension's type, all the rest runs.
    plain = (
        program.replace('database.execute("CREATE EXTENSION IF NOT EXISTS vector")', "pass")
        .replace("embedding vector(384)", "embedding text")
        .replace('database.execute("CREATE INDEX ON notes USING hnsw', 'print("CREATE INDEX')
        .replace("ORDER BY embedding <=> %s::vector", "WHERE embedding <> %s ORDER BY id")
    )
    found = printed(plain, server.url, server.key, tmp_path, DATABASE_URL=url)
    assert found.endswith(output_of("pgvector"))


def test_weaviates_client_takes_every_call_of_the_page(server: Server, tmp_path: Path) -> None:
    """Weaviate itself is no package, so its client's own classes check the calls."""
    if not WEAVIATE_PYTHON.exists():
        pytest.skip("the environment comes with: make test-clients")
    page = tmp_path / "program.py"
    page.write_text(program_of("weaviate").replace(ADDRESS, server.url))
    run = subprocess.run(
        [str(WEAVIATE_PYTHON), str(Path(__file__).with_name("weaviate_program.py")), str(page)],
        env={"TRIVEC_API_KEY": server.key, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    shown, seen = run.stdout.splitlines()
    assert shown == "the nearest"
    assert json.loads(seen) == {"texts": TEXTS, "sizes": [384, 384], "asked": 384}


class TestApplications:
    """The requests that the settings make these programs send, as their sources write them."""

    def post(self, server: Server, path: str, body: dict[str, Any]) -> Any:
        headers = {"Authorization": f"Bearer {server.key}", "Content-Type": "application/json"}
        answer = httpx.post(server.url + path, json=body, headers=headers, timeout=60)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def test_open_webui_embeds_and_reranks(self, server: Server) -> None:
        # open_webui/retrieval/utils.py and models/external.py
        text = text_of("open-webui")
        [base] = re.findall(r"^RAG_OPENAI_API_BASE_URL=http://HOST:8000(\S+)$", text, re.M)
        [rerank] = re.findall(r"^RAG_EXTERNAL_RERANKER_URL=http://HOST:8000(\S+)$", text, re.M)
        answer = self.post(server, f"{base}/embeddings", {"input": TEXTS, "model": MODEL})
        assert [len(one["embedding"]) for one in answer["data"]] == [384, 384]
        asked = {"model": MODEL, "query": "cat", "documents": TEXTS, "top_n": len(TEXTS)}
        ranked = sorted(
            self.post(server, rerank, asked)["results"], key=lambda one: int(one["index"])
        )
        assert ranked[0]["relevance_score"] > ranked[1]["relevance_score"]

    def test_dify_embeds_and_reranks(self, server: Server) -> None:
        # dify-official-plugins, models/openai_api_compatible
        [base] = set(re.findall(r"`http://HOST:8000(/\w+)`", text_of("dify")))
        body = {"model": MODEL, "input": TEXTS, "encoding_format": "float"}
        answer = self.post(server, f"{base}/embeddings", body)
        assert [len(one["embedding"]) for one in answer["data"]] == [384, 384]
        assert answer["usage"]["prompt_tokens"] > 0
        asked = {"model": MODEL, "query": "cat", "documents": TEXTS, "top_n": 3}
        found = self.post(server, f"{base}/rerank", asked)["results"]
        assert {one["index"] for one in found} == {0, 1}

    def test_n8n_embeds_by_the_client_that_its_node_holds(self, server: Server) -> None:
        # EmbeddingsOpenAi.node.ts holds LangChain's class, which sends texts without line breaks by
        # openai's client for Node; that client asks for base64 where nothing is said.
        [base] = re.findall(r"`http://HOST:8000(/\w+)`", text_of("n8n"))
        body = {"model": MODEL, "input": TEXTS, "encoding_format": "base64"}
        answer = self.post(server, f"{base}/embeddings", body)
        assert [one["index"] for one in answer["data"]] == [0, 1]
        models = httpx.get(
            f"{server.url}{base}/models", headers={"Authorization": f"Bearer {server.key}"}
        ).json()
        assert MODEL in [one["id"] for one in models["data"]]
