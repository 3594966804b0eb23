"""Hybrid retrieval in one request: BGE-M3's dense vectors for meaning, its sparse ones for words.

export OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=tv_...
"""

import numpy as np
from openai import OpenAI

texts = [
    "What is BGE M3?",  # the query; passages follow
    "BGE M3 embeds a text as one dense vector, as weighted words, and as one vector a token.",
    "BM25 ranks documents by the words they share with a query.",
]
with OpenAI() as client:
    answer = client.embeddings.create(
        model="baai/bge-m3",
        input=texts,
        encoding_format="float",
        extra_body={"output_type": "dense&sparse"},
    )
dense = np.array([datum.embedding for datum in answer.data])  # [texts, 1024]
sparse = [datum.model_dump()["sparse_embedding"] for datum in answer.data]
words = [dict(zip(one["indices"], one["values"], strict=True)) for one in sparse]
for i, passage in enumerate(texts[1:], 1):
    shared = sum(weight * words[i].get(token, 0.0) for token, weight in words[0].items())
    score = 0.7 * (dense[0] @ dense[i]) + 0.3 * shared
    print(f"{score:.3f}  {passage}")
