"""Every family of models that phreg patches, one tiny random model each: library/name -> builder."""

from collections.abc import Callable

import families_open_clip
import families_timm
import families_transformers
from torch import nn

LIBRARIES = {
    "transformers": families_transformers.FAMILIES,
    "timm": families_timm.FAMILIES,
    "open_clip": families_open_clip.FAMILIES,
}

FAMILIES: dict[str, Callable[[], nn.Module]] = {
    f"{library}/{name}": build for library, families in LIBRARIES.items() for name, build in families.items()
}
