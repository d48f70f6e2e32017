"""The command line, run in the test's own process."""

from phreg import cli


def phreg(*arguments):
    """Runs the command line here and returns its exit code."""
    try:
        cli.main([str(argument) for argument in arguments])
    except SystemExit as end:
        return end.code or 0
    return 0
