"""Several data sets as one, in exact proportions."""

import heapq
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairexp.datasets.permutation import permuted

MOST_PLACES = 1 << 16  # of a mixture's table


class Mixture:
    """Several sets, mixed: of the first n samples, each set has its weight's share to less than one sample, for any n.

    A set is walked in a seeded order of its own, anew each time it has been walked through, so a small one of a large weight
    is repeated. Which set a sample is of stands in a table of one period; its place in the set is computed: resuming
    anywhere costs nothing. The mixture is its own order, which `dataset.shuffle: false` keeps, and is `endless`: the second
    epoch goes on where the first has ended, in the middle of a set's walk.

    Weights needn't add up to 1. What is exact are ratios with a common denominator of at most 65,536 (0.7, 0.2, 0.1 have 10);
    others are rounded to it, and `weights` says to what. `length`: samples of an epoch; without, as many as it takes to walk
    through every set. A set of map style that gathers batches (`__getitems__`) of dicts will do; `made_by` makes each of what
    stands in `sets`, such as a folder.
    """

    endless = True

    def __init__(
        self,
        sets: Sequence[Any],
        weights: Sequence[float],
        length: int | None = None,
        seed: int = 0,
        made_by: Callable[[Any], Any] | None = None,
    ) -> None:
        if len(sets) != len(weights) or not sets:
            raise ValueError(f"weights: {len(weights)} for {len(sets)} sets")
        if wrong := [weight for weight in weights if not (weight > 0 and math.isfinite(weight))]:
            raise ValueError(f"weights: takes numbers above 0, got {wrong[0]}")
        if made_by:
            sets = [made_by(each) for each in sets]
        if empty := [number for number, each in enumerate(sets) if not len(each)]:
            raise ValueError(f"sets: number {empty[0]} is empty")
        for what in ("vocab_size", "tokenizer"):
            values = {getattr(each, what) for each in sets if hasattr(each, what)}
            if len(values) > 1:
                raise ValueError(f"sets: their {what} differ: {' and '.join(map(str, sorted(values)))}")
            if values:
                setattr(self, what, values.pop())
        self.sets = list(sets)
        self.seed = seed
        self.shares = periods(weights)
        self.period = sum(self.shares)
        self.weights = [share / self.period for share in self.shares]
        self.set_at, self.before = schedule(self.shares)
        self.length = length or max(
            -(-len(each) * self.period // share) for each, share in zip(sets, self.shares, strict=True)
        )
        self.fingerprint: dict[str, str | int] = {
            "shares": ":".join(map(str, self.shares)),
            "seed": seed,
            "epoch": self.length,  # samples
        }
        for number, each in enumerate(sets):
            facts = getattr(each, "fingerprint", {})
            self.fingerprint |= {f"{number}.{key}": value for key, value in facts.items()}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {key: value[0] for key, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Tensor | list[int]) -> dict[str, Tensor]:
        numbers = np.asarray(indices, dtype=np.int64)
        which, places = self.places(numbers)
        there = np.unique(which).tolist()
        batches = [self.sets[number].__getitems__(torch.from_numpy(places[which == number])) for number in there]
        if other := set(batches[0]) ^ {key for batch in batches for key in batch}:
            raise ValueError(f"sets: not all give {' and '.join(sorted(other))}")
        # rows are set by set in what follows, and go back to where they were asked for
        back = torch.from_numpy(np.argsort(np.concatenate([np.flatnonzero(which == number) for number in there])))
        return {key: torch.cat([batch[key] for batch in batches])[back] for key in batches[0]}

    def places(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each sample the number of its set, and its own in there."""
        rounds, at = np.divmod(indices, self.period)
        which = self.set_at[at]
        drawn = rounds * np.array(self.shares)[which] + self.before[at]  # of this set, before this sample
        places = np.empty_like(drawn)
        for number in np.unique(which).tolist():
            size = len(self.sets[number])
            mine = which == number
            walks, place = np.divmod(drawn[mine], size)
            found = np.empty_like(place)
            for walk in np.unique(walks).tolist():
                now = walks == walk
                found[now] = permuted(place[now], size, (self.seed * 1_000_003 + number) * 1_000_003 + walk)
            places[mine] = found
        return which, places


def periods(weights: Sequence[float]) -> list[int]:
    """Whole numbers in the ratio of the weights, 65,536 or less in all; exact, where such numbers exist."""
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    denominator = math.lcm(*(share.denominator for share in shares))
    if denominator <= MOST_PLACES:
        return [int(share * denominator) for share in shares]
    if len(weights) > MOST_PLACES:
        raise ValueError(f"weights: {len(weights):,} sets; a mixture takes {MOST_PLACES:,}")
    found = [max(1, int(share * MOST_PLACES)) for share in shares]
    # what rounding down has left goes to the largest remainders; what the small ones' 1 takes, from the largest
    by_need = sorted(range(len(found)), key=lambda number: found[number] - shares[number] * MOST_PLACES)
    rest = MOST_PLACES - sum(found)
    for number in by_need[: max(0, rest)]:
        found[number] += 1
    found[found.index(max(found))] += min(0, rest)
    return found


def schedule(shares: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """One period: which set each place is of, and how many of its places come before.

    A set's j-th place lies between those at which its exact share reaches j and j + 1; of those that may come, the one that
    must come soonest does. So no set's count is ever off by a whole sample (Tijdeman, "The chairman assignment problem", 1980).
    """
    period = sum(shares)
    set_at, before = np.empty(period, np.int64), np.empty(period, np.int64)
    counts = [0] * len(shares)
    ready: list[tuple[int, int]] = []  # by when, and which
    coming = [(0, number) for number in range(len(shares))]  # from when, and which
    for place in range(period):
        while coming and coming[0][0] <= place:
            _, number = heapq.heappop(coming)
            heapq.heappush(ready, (-(-(counts[number] + 1) * period // shares[number]), number))
        _, number = heapq.heappop(ready)
        set_at[place], before[place] = number, counts[number]
        counts[number] += 1
        if counts[number] < shares[number]:
            heapq.heappush(coming, (counts[number] * period // shares[number], number))
    return set_at, before
