"""The entrance: parses arguments, prints, and turns errors into exit codes.

Data goes to standard output, talk to standard error. Nothing heavy is imported before the
command that needs it runs.
"""


def main() -> None:
    """Run the command that the arguments name."""
