"""`python -m phreg` and `accelerate launch -m phreg`: the same program as the `phreg` command."""

from phreg.cli import main

if __name__ == "__main__":
    main()
