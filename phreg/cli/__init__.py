"""The command line: `phreg.cli:main`.

program ─► commands ─► phreg.api
├─ flags       settings as flags
├─ progress    bars, or lines where there is no terminal
├─ tables      figures of inspect, evaluate and tasks
└─ printing    verdicts, before and after, lines to copy
"""

from phreg.cli.program import main as main
