"""The UCI handwritten digits that ship with the package: real images for a first run and for tests, no download."""

from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

FILE = Path(__file__).with_name("digits.csv.gz")  # source and licence: digits.LICENSE.txt
NUM_TRAIN = 1437
MEAN, STD = 0.3054, 0.3755  # of the train split, pixels in 0..1


@cache
def scans() -> Tensor:
    """All 1,797 rows: 64 pixels in 0..16, then the class."""
    return torch.from_numpy(np.loadtxt(FILE, np.float32, delimiter=","))


class Digits:
    """1,437 (train) or 360 (test) scans of digits, float32 [1, 8, 8], normalised to mean 0 and std 1; classes 0-9.

    The scans stand form by form, some 130 digits in one hand. The last 360 come from the last three forms, and `train`
    has 22 scans of the first of these: the test asks for handwriting that is nearly all new.
    """

    def __init__(self, split: Literal["train", "test"]) -> None:
        if split not in ("train", "test"):
            raise ValueError(f"split={split!r}: Digits has train and test")
        table = scans()[:NUM_TRAIN] if split == "train" else scans()[NUM_TRAIN:]
        self.images = (table[:, :64].reshape(-1, 1, 8, 8) / 16 - MEAN) / STD
        self.labels = table[:, 64].long()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: Tensor | list[int]) -> tuple[Tensor, Tensor]:
        indices = torch.as_tensor(indices)
        return self.images.index_select(0, indices), self.labels.index_select(0, indices)
