"""What settings say of the published protocol that they follow, so that every record holds it."""

from phreg.config import Config

RESAMPLING = "pictures are resampled bicubically and antialiased, theirs bilinearly"
"""A difference that several protocols have."""


class ProtocolSettings(Config):
    """Settings of a task that has published protocols."""

    published: str | None = None
    """Published protocol that the settings started from; --protocol sets it, and nothing else does."""
    differs: tuple[str, ...] = ()
    """What of that protocol is not followed, which every result says; settings given beside a protocol are
    added to its own list."""
