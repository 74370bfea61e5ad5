"""Residual networks for images (He et al. 2016, arXiv:1512.03385).

Layers, parameter names and initialisation are torchvision's, so its state dicts load. As there, a bottleneck strides in
its 3x3 convolution ("v1.5").
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

NUM_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


def conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    """A convolution that keeps the image size at stride 1; no bias, because a batch norm follows."""
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)


def shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """The identity where a block keeps its input's shape, else a projection to the new shape."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: the block of depths 18 and 34."""

    expansion = 1
    last_norm = "bn2"

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = shortcut(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.downsample(x))


class Bottleneck(nn.Module):
    """1x1 to fewer channels, 3x3, 1x1 to four times as many, and a shortcut: the block of depths 50 and 101."""

    expansion = 4
    last_norm = "bn3"

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = self.expansion * channels
        self.conv1 = conv(in_channels, channels, 1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = conv(channels, out_channels, 1)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + self.downsample(x))


def stage(
    block: type[BasicBlock] | type[Bottleneck], num_blocks: int, in_channels: int, channels: int, stride: int
) -> nn.ModuleList:
    """Blocks at one resolution; the first one changes the image size and the channels."""
    out_channels = block.expansion * channels
    first = block(in_channels, channels, stride)
    return nn.ModuleList([first, *(block(out_channels, channels, stride=1) for _ in range(num_blocks - 1))])


class ResNet(nn.Module):
    """Class scores (batch, num_classes) from images (batch, in_channels, height, width).

    `stem="imagenet"` divides the image size by 4 before the first block; `"small"` keeps it, for images of about 32
    pixels or fewer. `width` is the number of channels of the stem and of the first stage; each later stage doubles it.
    """

    def __init__(
        self,
        depth: Literal[18, 34, 50, 101],
        num_classes: int,
        in_channels: int = 3,
        stem: Literal["imagenet", "small"] = "imagenet",
        width: int = 64,
        zero_init_residual: bool = True,
    ) -> None:
        super().__init__()
        if depth not in NUM_BLOCKS:
            raise ValueError(f"depth={depth}: a ResNet has depth {', '.join(map(str, NUM_BLOCKS))}")
        if stem not in ("imagenet", "small"):
            raise ValueError(f"stem={stem!r}: a ResNet has stem 'imagenet' or 'small'")
        block = BasicBlock if depth < 50 else Bottleneck
        n1, n2, n3, n4 = NUM_BLOCKS[depth]
        out = block.expansion * width

        self.conv1 = conv(in_channels, width, 7, stride=2) if stem == "imagenet" else conv(in_channels, width, 3)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if stem == "imagenet" else nn.Identity()
        self.layer1 = stage(block, n1, width, width, stride=1)
        self.layer2 = stage(block, n2, out, 2 * width, stride=2)
        self.layer3 = stage(block, n3, 2 * out, 4 * width, stride=2)
        self.layer4 = stage(block, n4, 4 * out, 8 * width, stride=2)
        self.fc = nn.Linear(8 * out, num_classes)
        self.zero_init = f".{block.last_norm}.weight" if zero_init_residual else None

    def forward(self, images: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(images))))
        for blocks in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in blocks:
                x = block(x)
        return self.fc(x.mean((2, 3)))

    def init_tensor(self, name: str, tensor: Tensor) -> None:
        """Fills the full parameter or buffer `name` in place; called under an RNG seeded from the run's seed and
        `name`, so that weights do not depend on world size or sharding.

        `zero_init_residual` starts the last norm of each block at zero, so that each block is its shortcut at
        first: 0.2 to 0.3 % of top-1 on ImageNet (Goyal et al. 2017, arXiv:1706.02677).
        """
        if tensor.ndim == 4:
            nn.init.kaiming_normal_(tensor, mode="fan_out", nonlinearity="relu")
        elif name.startswith("fc."):
            bound = self.fc.in_features**-0.5
            nn.init.uniform_(tensor, -bound, bound)
        elif self.zero_init and name.endswith(self.zero_init):
            nn.init.zeros_(tensor)
        elif name.endswith(("weight", "running_var")):
            nn.init.ones_(tensor)
        else:  # the norms' biases, running means and counts of batches
            nn.init.zeros_(tensor)
