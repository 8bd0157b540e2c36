"""Perceptual hashes: pictures that look the same have 64-bit numbers that differ in few bits."""

from array import array
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
        self.hashes, self.names = array("Q"), list[str]()
        # Of each band: the newest hash by the band's value, and for each hash the one before it of the same value. There are as many
        # hashes as pictures, so they lie in arrays and not in lists of tuples.
        self.newest: list[dict[int, int]] = [{} for _ in self.bands]
        self.before = [array("q") for _ in self.bands]

    def find(self, value: int) -> str | None:
        """The name of one that is as near (the first one added of the first band that has one), or None."""
        for (start, stop), newest, before in zip(self.bands, self.newest, self.before, strict=True):
            found, other = None, newest.get(part(value, start, stop), -1)
            while other >= 0:
                if distance(value, self.hashes[other]) <= self.bits:
                    found = other
                other = before[other]
            if found is not None:
                return self.names[found]
        return None

    def add(self, value: int, name: str) -> None:
        number = len(self.hashes)
        self.hashes.append(value)
        self.names.append(name)
        for (start, stop), newest, before in zip(self.bands, self.newest, self.before, strict=True):
            key = part(value, start, stop)
            before.append(newest.get(key, -1))
            newest[key] = number


def part(value: int, start: int, stop: int) -> int:
    """Bits `start` to `stop` of a hash, as a number."""
    return value >> start & (1 << stop - start) - 1
