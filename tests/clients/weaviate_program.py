"""A program for the environment that has Weaviate's client.

Run by test_use_pages.py as `python weaviate_program.py PAGE_PROGRAM`, which it runs with a client that
reaches no Weaviate: the client's own classes check the calls. Prints what was stored as JSON, after
what the program printed.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import weaviate


def main() -> None:
    address = weaviate.connect.ConnectionParams.from_params("h", 1, False, "h", 2, False)
    unconnected = weaviate.WeaviateClient(address, skip_init_checks=True)
    notes = mock.create_autospec(unconnected.collections.use("Notes"), instance=True)
    nearest = notes.query.near_vector
    nearest.return_value.objects = [SimpleNamespace(properties={"text": "the nearest"})]
    store = mock.create_autospec(unconnected, instance=True)
    store.collections.create.return_value = notes
    store.__enter__.return_value = store
    weaviate.connect_to_local = lambda: store
    exec(compile(Path(sys.argv[1]).read_text("utf-8"), "weaviate.md", "exec"), {})
    added = notes.batch.dynamic.return_value.__enter__.return_value.add_object.call_args_list
    seen = {
        "texts": [call.kwargs["properties"]["text"] for call in added],
        "sizes": [len(call.kwargs["vector"]) for call in added],
        "asked": len(nearest.call_args.args[0]),
    }
    json.dump(seen, sys.stdout)


if __name__ == "__main__":
    main()
