"""A program for the environment that has lancedb.

Run by test_lancedb.py as `python lancedb_program.py BASE_URL`, the key in OPENAI_API_KEY. Prints what it
saw as one JSON object.
"""

import json
import sys

import lancedb
from lancedb.embeddings import get_registry
from lancedb.embeddings.openai import OpenAIEmbeddings
from lancedb.embeddings.registry import register
from lancedb.pydantic import LanceModel, Vector


@register("sized-openai")
class Sized(OpenAIEmbeddings):  # type: ignore[misc]
    def ndims(self) -> int:
        return 384


def main() -> None:
    settings = {"name": "all-minilm-l6-v2", "base_url": sys.argv[1]}
    refused = ""
    try:
        get_registry().get("openai").create(**settings).ndims()
    except ValueError as fault:
        refused = str(fault)
    embed = Sized.create(**settings)

    class Row(LanceModel):  # type: ignore[misc]
        text: str = embed.SourceField()
        vector: Vector(embed.ndims()) = embed.VectorField()  # type: ignore[valid-type]

    table = lancedb.connect("rows.lance").create_table("rows", schema=Row)
    table.add([{"text": "A cat sits on the mat."}, {"text": "Interest rates rose again."}])
    found = table.search("On the mat there is a cat.").limit(1).to_list()
    json.dump({"refused": refused, "found": found[0]["text"]}, sys.stdout)


if __name__ == "__main__":
    main()
