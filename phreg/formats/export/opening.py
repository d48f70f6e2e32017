"""How `phreg.load` takes an export back: what is the same for formats that a stock library loads."""

import logging

from phreg.backbones import resolve
from phreg.backbones.base import Backbone
from phreg.backbones.resolve import Located
from phreg.errors import LoadError
from phreg.record import Base, RunRecord, weights_sha256

logger = logging.getLogger(__name__)


def open_stock(found: Located, record: RunRecord) -> tuple[Backbone, Base]:
    """Builds a stock model, and checks that it is the one that was exported.

    Raises:
        LoadError: It is not, or holds a pickle.
    """
    if not any(path.suffix == ".safetensors" for path in found.folder.iterdir()):
        raise LoadError(
            f"asked for the export in {found.source}, which has no .safetensors file; phreg exports write no "
            "other kind, and a pickle may hold code: fetch it again, whole"
        )
    backbone, base = resolve.load(found)
    check_unchanged(found, record, base.sha256)
    return backbone, base


def check_unchanged(found: Located, record: RunRecord, sha256: str) -> None:
    """Checks that an export loads as what was written.

    Raises:
        LoadError: It has other weights.
    """
    if record.sha256 is None:
        logger.warning(
            "%s has no sha256 of its weights: damage to them would go unnoticed; export it again to have "
            "them checked", found.source,
        )  # fmt: skip
    elif sha256 != record.sha256:
        raise LoadError(
            f"asked for the export in {found.source}, whose weights have sha256 {sha256[:12]}…, and "
            f"{record.sha256[:12]}… were written; it was changed since: fetch or export it again"
        )


def whole_base(backbone: Backbone, found: Located) -> Base:
    """Names a model that phreg wrote whole as its own base."""
    sha256 = weights_sha256(backbone.disk_state())
    return Base(found.source, backbone.spec.library, found.revision, sha256)
