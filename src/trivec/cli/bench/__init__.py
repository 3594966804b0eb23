"""`trivec bench engine|server`: how fast this machine is, in words and one JSON line.

What measures lives here, because users have it too; `benchmarks/` adds limits, peers and targets.
"""

from trivec.cli.bench.commands import bench_app

__all__ = ["bench_app"]
