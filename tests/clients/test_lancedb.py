"""LanceDB's OpenAI function embeds what a table stores and what it is asked.

A table asks the function for its size, and LanceDB knows that of OpenAI's models only: for any other
it raises before it asks the server. A subclass that says the size is the remedy.
"""

from pathlib import Path

import lancedb
import pytest
from lancedb.embeddings import get_registry
from lancedb.embeddings.openai import OpenAIEmbeddings
from lancedb.embeddings.registry import register
from lancedb.pydantic import LanceModel, Vector
from tests.process.server import Server


def test_lancedb_embeds_rows_and_queries(
    base_url: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", server.key)
    settings = {"name": "all-minilm-l6-v2", "base_url": base_url}
    with pytest.raises(ValueError, match="Unknown model name"):
        get_registry().get("openai").create(**settings).ndims()

    @register("sized-openai")
    class Sized(OpenAIEmbeddings):  # type: ignore[misc]
        def ndims(self) -> int:
            return 384

    embed = Sized.create(**settings)

    class Row(LanceModel):  # type: ignore[misc]
        text: str = embed.SourceField()
        vector: Vector(embed.ndims()) = embed.VectorField()  # type: ignore[valid-type]

    table = lancedb.connect(tmp_path).create_table("rows", schema=Row)
    table.add([{"text": "A cat sits on the mat."}, {"text": "Interest rates rose again."}])
    found = table.search("On the mat there is a cat.").limit(1).to_list()
    embed._openai_client.close()
    assert found[0]["text"] == "A cat sits on the mat."
