"""A seeded order of any number of samples that needs no memory."""

import numpy as np

from fairexp.datasets.splitmix import GOLDEN, splitmix64

ROUNDS = 8
CHUNK = 1 << 16  # places that are computed at once


def permuted(places: np.ndarray, length: int, seed: int) -> np.ndarray:
    """The numbers of range(length) at these places of their permutation, int64; one-to-one for each (length, seed).

    A Feistel network over a x b >= length with additions in place of XOR, walked on until it ends below length (Black and
    Rogaway, "Ciphers with Arbitrary Finite Domains", 2002); its rounds mix by splitmix64. a x b is at most 2 sqrt(length)
    + 1 larger than length, so next to nothing is walked.
    """
    a = np.uint64(np.ceil(np.sqrt(length)))
    b = np.uint64(-(-length // int(a)))
    keys = _mixed(np.uint64(seed % (1 << 64)) + np.arange(1, ROUNDS + 1, dtype=np.uint64))
    x = places.astype(np.uint64)
    left = np.arange(len(x))
    while len(left):
        high, low = np.divmod(x[left], b)
        for number, key in enumerate(keys):
            if number % 2:
                low = (low + _mixed(high ^ key) % b) % b
            else:
                high = (high + _mixed(low ^ key) % a) % a
        x[left] = high * b + low
        left = left[x[left] >= length]
    return x.astype(np.int64)


def _mixed(x: np.ndarray) -> np.ndarray:
    return splitmix64(x + GOLDEN)
