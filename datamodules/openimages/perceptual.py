"""Perceptual hashes: pictures that look the same have 64-bit numbers that differ in few bits."""

from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise

import numpy as np
from PIL import Image
from scipy.fft import dctn

SIDE, KEPT = 32, 8
BITS = KEPT * KEPT


def perceptual_hash(picture: Image.Image) -> int:
    """The DCT hash ("pHash"): signs, about their median, of the 8 x 8 lowest frequencies of the 32 x 32 grey picture."""
    grey = np.asarray(picture.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX, reducing_gap=4.0), np.float64)
    low = dctn(grey, type=2)[:KEPT, :KEPT].ravel()
    return int.from_bytes(np.packbits(low > np.median(low[1:])).tobytes())


def distance(a: int, b: int) -> int:
    """Bits in which two hashes differ, 0 to 64."""
    return (a ^ b).bit_count()


class Lookalikes:
    """Finds, among the hashes added so far, one within `bits` of another.

    Of `bits + 1` bands of a hash, at least one is equal in two that differ in at most `bits` bits: only those are compared.
    """

    def __init__(self, bits: int):
        if not 0 <= bits < BITS:
            raise ValueError(f"hashes have {BITS} bits: {bits} is no distance to look within")
        self.bits = bits
        edges = np.linspace(0, BITS, bits + 2).astype(int).tolist()
        self.bands = list(pairwise(edges))
        self.seen: dict[tuple[int, int], list[tuple[int, str]]] = defaultdict(list)

    def find(self, value: int) -> str | None:
        """The name of the first one added that is as near, or None."""
        near = (entry for key in self._keys(value) for entry in self.seen.get(key, ()))
        return next((name for other, name in near if distance(value, other) <= self.bits), None)

    def add(self, value: int, name: str) -> None:
        entry = value, name
        for key in self._keys(value):
            self.seen[key].append(entry)

    def _keys(self, value: int) -> Iterable[tuple[int, int]]:
        return ((start, value >> start & (1 << stop - start) - 1) for start, stop in self.bands)
