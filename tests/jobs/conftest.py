"""Bulk work needs pyarrow, which comes with the tests' tools."""

import importlib.util

# An environment of before it was needed runs the other suites all the same.
collect_ignore_glob = [] if importlib.util.find_spec("pyarrow") else ["test_*.py"]
