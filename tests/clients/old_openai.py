"""A program for another environment, with an earlier major version of openai-python.

Run by test_old_openai.py as `python old_openai.py BASE_URL`, the key in OPENAI_API_KEY. Prints what
it saw as one JSON object.
"""

import asyncio
import json
import sys

import openai

MODEL = "all-minilm-l6-v2"


def main() -> None:
    client = openai.OpenAI(base_url=sys.argv[1])
    one = client.embeddings.create(model=MODEL, input="Hello, world")
    many = client.embeddings.create(model=MODEL, input=["a", "b"], encoding_format="float")
    try:
        client.embeddings.create(model="nobody", input="a")
    except openai.NotFoundError as fault:
        refused = fault.code
    seen = {
        "version": openai.__version__,
        "embedding": one.data[0].embedding,
        "indices": [row.index for row in many.data],
        "tokens": one.usage.total_tokens,
        "refused": refused,
        "async": asyncio.run(embed_asynchronously()),
    }
    json.dump(seen, sys.stdout)


async def embed_asynchronously() -> list[float]:
    async with openai.AsyncOpenAI(base_url=sys.argv[1]) as client:
        answer = await client.embeddings.create(model=MODEL, input="Hello, world")
    return answer.data[0].embedding


main()
