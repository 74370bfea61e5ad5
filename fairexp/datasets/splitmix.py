"""Numbers that look random and are a function of a number: for what each sample or place draws of its own."""

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # the step between the states of a sequence


def splitmix64(x: np.ndarray) -> np.ndarray:
    """A bijection of uint64 whose output bits all depend on all input bits (Steele, Lea and Flood, 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
