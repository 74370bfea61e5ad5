"""mixup and CutMix: a training image becomes a blend of itself and another, and its label that of both.

Called by the loader. Partner and blend are functions of the sample's own seed, so they are the same in any batch, on any
number of ranks, and after a resume; the papers take the partner from the same batch, where it would depend on the ranks.
"""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fairexp.datasets.augment import Batch, bits, floats, uniform

SALT = 0x6D697875705F6D78  # other numbers than the augmentation draws from the same seeds


class Mix:
    """Images float32 [n, c, h, w] with labels float32 [n, num_classes], from images and int64 classes and their partners'.

    mixup (Zhang et al. 2018, arXiv:1710.09412) averages two images, CutMix (Yun et al. 2019, arXiv:1905.04899) pastes a
    rectangle of the other one; the labels are weighted as the images are. The first image's weight is drawn from
    Beta(alpha, alpha), for each sample; an alpha of 0 leaves that one out, and where both are above 0 each takes half. `prob`
    of the samples are blended at all. Partners are drawn from the whole set, which reads up to twice the images.
    """

    def __init__(self, num_classes: int, mixup_alpha: float, cutmix_alpha: float, prob: float = 1.0) -> None:
        if mixup_alpha < 0 or cutmix_alpha < 0 or mixup_alpha == cutmix_alpha == 0:
            raise ValueError(f"mixup_alpha={mixup_alpha}, cutmix_alpha={cutmix_alpha}: one must be above 0, none below")
        self.num_classes = num_classes
        self.mixup_alpha, self.cutmix_alpha = mixup_alpha, cutmix_alpha
        self.cut_part = 0.5 if mixup_alpha and cutmix_alpha else float(cutmix_alpha > 0)  # of the blended samples
        self.prob = prob

    def partners(self, seeds: Tensor, length: int) -> Tensor:
        """The partner's index for each sample that is blended, in their order; seeds: int64 [n]."""
        drawn = torch.from_numpy((bits(seeds ^ SALT, 1)[:, 0] % np.uint64(length)).astype(np.int64))
        return drawn[self.blended(seeds)]

    def blended(self, seeds: Tensor) -> Tensor:
        """Which samples are blended at all, bool [n]."""
        return uniform(seeds ^ SALT, 2)[:, 1] < self.prob

    def __call__(self, batch: Batch, seeds: Tensor) -> Batch:
        """`batch`: the samples of these seeds and, after them, their partners."""
        images, classes = floats(batch[0]), batch[1]
        labels = F.one_hot(classes, self.num_classes).float()
        num, which = len(seeds), self.blended(seeds)
        draws = uniform(seeds[which] ^ SALT, 7).T.contiguous()[2:]
        cut = draws[0] < self.cut_part
        weights = beta(torch.where(cut, self.cutmix_alpha, self.mixup_alpha), draws[1], draws[2])
        pasted = boxes(weights, draws[3], draws[4], *images.shape[-2:])
        kept = torch.where(cut[:, None, None], (~pasted).float(), weights[:, None, None])  # of each pixel
        weights = torch.where(cut, kept.mean((1, 2)), weights)  # a rectangle is cut off at the edges
        return (
            _blend(images[:num], images[num:], which, kept[:, None].to(images.dtype)),
            _blend(labels[:num], labels[num:], which, weights[:, None]),
        )


def _blend(own: Tensor, others: Tensor, which: Tensor, kept: Tensor) -> Tensor:
    blended = own.clone()
    blended[which] = kept * own[which] + (1 - kept) * others
    return blended


def beta(alpha: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Numbers of Beta(alpha, alpha), float32 [n], from two uniform ones each.

    Exact for any alpha, without rejections: Student's t by Bailey's polar method (1994), of which the symmetric beta
    distribution is a function (Devroye 1996, "Random variate generation in one line of code").
    """
    rest = u.double() ** (1 / alpha.double())
    cos = (2 * math.pi * v.double()).cos()
    squares = (1 - rest) * cos**2
    return (0.5 + 0.5 * cos.sign() * (squares / (rest + squares)).sqrt()).float()


def boxes(weights: Tensor, x: Tensor, y: Tensor, height: int, width: int) -> Tensor:
    """CutMix's rectangles, bool [n, height, width]: 1 - weight of the area, centred at (x, y) in 0..1, cut off at the edges."""
    sides = (1 - weights).sqrt()

    def along(size: int, centre: Tensor) -> Tensor:
        half, middle = (sides * size).int() // 2, (centre * size).int()
        place = torch.arange(size)
        return (place >= (middle - half)[:, None]) & (place < (middle + half)[:, None])

    return along(height, y)[:, :, None] & along(width, x)[:, None, :]
