"""Augmentation of whole batches. Called by the loader with the batch and one seed per sample.

A sample's random numbers are a function of its own seed and nothing else, so it gets the same augmentation in
any batch, on any rank, and after a resume.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fairexp.datasets.splitmix import GOLDEN, splitmix64

Batch = tuple[Tensor, Tensor]  # images float32 or bytes [n, c, h, w], labels int64 [n]


def uniform(seeds: Tensor, num: int) -> Tensor:
    """Random numbers in [0, 1), float32 [n, num]; row i depends on seeds[i] alone (seeds: int64 [n], on the CPU).

    splitmix64 as a counter-based generator: torch.Generator would cost a loop over the samples, 5 us each.
    """
    return torch.from_numpy((bits(seeds, num) >> np.uint64(40)).astype(np.float32) * np.float32(2**-24))


def bits(seeds: Tensor, num: int) -> np.ndarray:
    """Random uint64 [n, num], of which `uniform` takes the upper 24 bits."""
    state = splitmix64(seeds.numpy().view(np.uint64))[:, None]  # mixed first: seeds may be neighbours
    return splitmix64(state + np.arange(1, num + 1, dtype=np.uint64) * GOLDEN)


def floats(images: Tensor) -> Tensor:
    """The images as numbers that can be averaged: bytes become float32 of the same values."""
    return images if images.is_floating_point() else images.float()


def affine_matrices(angle: Tensor, shift: Tensor, zoom: Tensor, shear: Tensor) -> Tensor:
    """Matrices [n, 2, 3] for `F.affine_grid` that shear, turn clockwise (both in radians), magnify, then shift.

    `shift` [n, 2] is right and down, in sides of the image, which is square. `affine_grid` asks where an output pixel
    comes from, so these are the inverses of that motion.
    """
    cos, sin, tan = angle.cos(), angle.sin(), shear.tan()
    linear = torch.stack([cos + tan * sin, sin - tan * cos, -sin, cos], 1).view(-1, 2, 2) / zoom[:, None, None]
    return torch.cat([linear, linear @ (-2 * shift[:, :, None])], 2)  # affine_grid's image is 2 wide: -1..1


class RandomAffine:
    """Shears, turns, magnifies, shifts and mirrors each (square) image of a batch by its own random amounts.

    Angles in degrees to either side, `translate` as a part of the image's side, `scale` as (smallest, largest).
    `padding` fills what comes from outside: "border" repeats the edge, "zeros" is the mean grey of normalised images, and
    black of bytes.
    """

    def __init__(
        self,
        degrees: float = 0.0,
        translate: float = 0.0,
        scale: Sequence[float] = (1.0, 1.0),
        shear: float = 0.0,
        flip: bool = False,
        padding: Literal["border", "zeros", "reflection"] = "border",
    ) -> None:
        self.degrees, self.translate, self.shear = degrees, translate, shear
        self.smallest, self.largest = scale
        self.flip, self.padding = flip, padding

    def __call__(self, batch: Batch, seeds: Tensor) -> Batch:
        images, labels = floats(batch[0]), batch[1]
        draws = uniform(seeds, 6)
        sides = 2 * draws - 1  # to either side
        matrices = affine_matrices(
            angle=math.radians(self.degrees) * sides[:, 0],
            shift=self.translate * sides[:, 1:3],
            zoom=self.smallest + (self.largest - self.smallest) * draws[:, 3],
            shear=math.radians(self.shear) * sides[:, 4],
        )
        if self.flip:
            matrices[:, 0] *= sides[:, 5:].sign()
        grid = F.affine_grid(matrices.to(images.device), list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, padding_mode=self.padding, align_corners=False), labels
