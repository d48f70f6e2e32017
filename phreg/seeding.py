"""Random numbers as a pure function of what they are for: no state to keep or restore."""

import hashlib

import torch


def keyed_generator(*key: int | str) -> torch.Generator:
    """Makes a random generator from a hash of its key: the same on every machine, unlike any other key's."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
