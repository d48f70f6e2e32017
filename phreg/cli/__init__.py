"""The command line: `phreg.cli:main`.

program ─► commands ─► phreg.api
├─ flags       settings as flags
├─ progress    bars, or lines where there is no terminal
└─ printing    tables and verdicts
"""

from phreg.cli.program import main as main
