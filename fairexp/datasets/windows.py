"""A training order for data whose samples are cheap in the company of their neighbours: row groups, shards."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Generator, Tensor

from fairexp.datasets.permutation import permuted
from fairexp.datasets.splitmix import GOLDEN


def window_permutation(blocks: Sequence[int] | np.ndarray, window: int | None, generator: Generator) -> Tensor:
    """A permutation of sum(blocks) samples, drawn from the generator: the blocks in random order, and the samples of each
    `window` blocks shuffled among themselves. Without a window, all samples are.

    A reader that holds `window` blocks reads each once an epoch, wherever it starts. The smaller the window, the more alike
    are neighbours in the order: blocks should be mixed when they are written, and not be one class each.
    """
    if window is not None and window < 1:
        raise ValueError(f"window={window}: takes 1 or more blocks, or null to shuffle all samples")
    ends = torch.as_tensor(np.cumsum(blocks))
    if window is None:
        return torch.randperm(int(ends[-1]), generator=generator)
    sizes = torch.as_tensor(np.asarray(blocks))
    order = torch.randperm(len(ends), generator=generator)
    pieces = []
    for chosen in order.split(window):
        samples = torch.cat([torch.arange(int(ends[b] - sizes[b]), int(ends[b])) for b in chosen.tolist()])
        pieces.append(samples[torch.randperm(len(samples), generator=generator)])
    return torch.cat(pieces)


class WindowOrder:
    """An order of any number of rows that needs a window's memory and begins anywhere at once, drawn from the generator: blocks
    of `block` neighbours in random order, and the rows of each `window` blocks shuffled among themselves. A slice of it is
    int64.

    The first block begins at a random row, so the last one, which is in the last window and may be shorter, is other rows each
    time. `enters` is told the first rows of a window's blocks when the window is looked at, and of those of the next.
    """

    def __init__(
        self,
        length: int,
        block: int,
        window: int,
        generator: Generator,
        enters: Callable[[np.ndarray], None] = lambda rows: None,
    ) -> None:
        self.length, self.block, self.window, self.enters = length, min(block, length), window, enters
        self.turn, self.seed, self.window_seed = torch.randint(1 << 62, (3,), generator=generator).tolist()
        self.number = -1  # of the window at hand
        self.at_hand = torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, places: slice) -> Tensor:
        begin, end, _ = places.indices(self.length)
        size = self.window * self.block
        parts = [self.at_hand[:0]]
        for number in range(begin // size, -(-end // size)):
            first = number * size
            parts.append(self.rows(number)[max(begin - first, 0) : max(end - first, 0)])
        return torch.cat(parts)

    def rows(self, number: int) -> Tensor:
        """The rows of this window, in order."""
        if number != self.number:
            size = min(self.window * self.block, self.length - number * self.window * self.block)
            # seeds of neighbouring windows lie far apart: `permuted` takes the few numbers behind each
            shuffled = permuted(np.arange(size), size, self.window_seed + number * int(GOLDEN))
            block, within = np.divmod(shuffled, self.block)
            begins = self.begins(number)
            self.number, self.at_hand = number, torch.from_numpy((begins[block] + within) % self.length)
            self.enters(np.concatenate([begins, self.begins(number + 1)]))
        return self.at_hand

    def begins(self, number: int) -> np.ndarray:
        """The first row of each block of this window."""
        last, whole = -(-self.length // self.block), self.length // self.block
        blocks = np.arange(min(number * self.window, last), min((number + 1) * self.window, last))
        blocks[blocks < whole] = permuted(blocks[blocks < whole], whole, self.seed)
        return (blocks * self.block + self.turn % self.length) % self.length
