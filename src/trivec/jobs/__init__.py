"""Bulk work: a corpus in, a file of vectors out, through death and restart.

Files, shards and what is kept of them are known here; not models, keys or the API's answers. A
row is computed once, and is in the end in the output or, with the reason, among the errors.
"""

GO_ON = "What is finished is kept: run the same command again to go on"
