"""A training order for data whose samples are cheap in the company of their neighbours: row groups, shards."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Generator, Tensor


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
