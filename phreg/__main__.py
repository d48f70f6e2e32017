"""`python -m phreg` and `accelerate launch -m phreg`: the same program as the `phreg` command."""

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line. What stops it while it is still being imported ends in one line too."""
    try:
        from phreg.cli import main as run
    except KeyboardInterrupt:
        sys.stderr.write("phreg: stopped. To go on, give the same command again.\n")
        sys.exit(130)
    run(arguments)


if __name__ == "__main__":
    main()
