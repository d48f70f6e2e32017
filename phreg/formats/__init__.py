"""What phreg writes and reads back: adapters, exports, model cards.

`FORMATS` is the table of what a model is exported as. A format is one module of `export/`, which holds its
`FormatSpec` by the name `SPEC`; nothing else in phreg knows a format by its name.
"""

from typing import TYPE_CHECKING, Literal

FORMATS: dict[str, str] = {
    "timm": "phreg.formats.export.timm",
    "transformers": "phreg.formats.export.transformers",
    "open_clip": "phreg.formats.export.open_clip",
    "remote-code": "phreg.formats.export.remote_code",
    "onnx": "phreg.formats.export.onnx",
    "merged": "phreg.formats.export.merged",
    "adapter": "phreg.formats.export.adapter",
}
"""Format -> its module, imported when it is first asked for. Those that ask least come first."""

if TYPE_CHECKING:
    Format = str
else:
    Format = Literal[tuple(FORMATS)]
    """The names of the formats, for the command line."""
