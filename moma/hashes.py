"""Numbers that follow from a text alone: what is split or drawn by them is the same everywhere."""

import hashlib
from collections.abc import Iterable

import numpy as np


def unit_hash(text: str) -> float:
    """A number in [0, 1) that depends on `text` alone: splits by it are stable under growth."""
    return float(unit_hashes([text])[0])


def unit_hashes(texts: Iterable[str]) -> np.ndarray:
    """The `unit_hash` of each text, float64 of shape [texts]; in less time than one by one."""
    digests = b"".join([hashlib.sha256(text.encode()).digest() for text in texts])
    # The first seven of a digest's 32 bytes.
    return (np.frombuffer(digests, ">u8")[::4] >> 8) / 2**56
