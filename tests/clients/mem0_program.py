"""A program for the environment that has mem0.

Run by test_mem0.py as `python mem0_program.py BASE_URL`, the key in OPENAI_API_KEY. Prints what it
saw as one JSON object.
"""

import json
import sys

from mem0.configs.embeddings.base import BaseEmbedderConfig
from mem0.embeddings.openai import OpenAIEmbedding

MODEL = "all-minilm-l6-v2"
TEXTS = ["A cat sits on the mat.", "Interest rates rose again."]


def main() -> None:
    url = sys.argv[1]
    plain = OpenAIEmbedding(BaseEmbedderConfig(model=MODEL, openai_base_url=url))
    sized = OpenAIEmbedding(
        BaseEmbedderConfig(model=MODEL, openai_base_url=url, embedding_dims=384)
    )
    seen = {
        "plain": plain.embed(TEXTS[0], "add"),
        "sized": sized.embed(TEXTS[0], "search"),
        "batch": sized.embed_batch(TEXTS),
    }
    json.dump(seen, sys.stdout)


if __name__ == "__main__":
    main()
