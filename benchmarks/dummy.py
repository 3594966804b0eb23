"""`python -m benchmarks.dummy MODEL DIR`: a complete checkpoint of random weights, as the tests use."""

from tests.support.dummy.__main__ import main

main()
