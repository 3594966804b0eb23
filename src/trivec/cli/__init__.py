"""The entrance: parses arguments, prints, and turns errors into exit codes.

Data goes to standard output, talk to standard error. Nothing heavy is imported before the
command that needs it runs.
"""

from trivec.cli.main import main

__all__ = ["main"]
