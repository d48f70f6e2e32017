"""The public names of phreg, and their modules. This is the only list: `__init__.py` reads it."""

from phreg.api import add_test_time_registers as add_test_time_registers
from phreg.api import denoise as denoise
from phreg.api import distill as distill
from phreg.api import evaluate as evaluate
from phreg.api import export as export
from phreg.api import inspect as inspect
from phreg.api import load as load
from phreg.api import push as push
from phreg.api import quickstart as quickstart
from phreg.errors import PhregError as PhregError
from phreg.formats.info import info as info
from phreg.registers import add_registers as add_registers
from phreg.registers import remove_registers as remove_registers

__version__: str
