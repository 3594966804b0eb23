"""Bulk work that survives crashes: a corpus to a file of vectors, a file of requests to one of answers.

Input is read in shards, whose results are kept as soon as they are computed. In the end each row is
in the output or, with the reason, among the errors. Models and the API's answers are given.
"""

GO_ON = "What is finished is kept: run the same command again to go on"
