"""Long forms of what `tests/soak` shows in seconds: the service under faults, floods and time.

Each module is one command with a count or a duration, ends in one line of JSON, and leaves with 1
when it failed. They know the service from outside, or break one part of it on purpose.
"""
