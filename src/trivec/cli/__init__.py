"""The command line: parses arguments, prints, and turns errors into exit codes.

Data goes to standard output, messages to standard error. Heavy rooms are imported by the commands
that need them, so that asking for help is quick.
"""

from trivec.cli.main import main

__all__ = ["main"]
