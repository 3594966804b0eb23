"""Bulk work: a corpus in, a file of vectors out, or of the API's answers; through death and restart.

Files, shards and what is kept of them are known here; not models, nor what the API answers. A row is
computed once, and is in the end in the output or, with the reason, among the errors.
"""

GO_ON = "What is finished is kept: run the same command again to go on"
