"""A multi-layer perceptron on flattened images: the smallest model that trains."""

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn


class MLP(nn.Module):
    """Class scores (batch, num_classes) from images (batch, in_channels, image_size, image_size).

    `hidden` holds the width of each hidden layer; an empty one gives a linear classifier.
    """

    def __init__(
        self, image_size: int, in_channels: int, hidden: Sequence[int], num_classes: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        widths = [in_channels * image_size**2, *hidden]
        self.layers = nn.ModuleList(nn.Linear(n, m) for n, m in pairwise(widths))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = images.flatten(1)
        for layer in self.layers:
            x = self.dropout(F.relu(layer(x)))
        return self.head(x)

    def init_tensor(self, name: str, tensor: Tensor) -> None:
        """Fills the full parameter or buffer `name` in place; called under an RNG seeded from the run's seed and
        `name`, so that weights do not depend on world size or sharding.

        What nn.Linear does by itself: kaiming-uniform, for weights and biases U(-b, b) with b = 1 / sqrt(fan_in).
        """
        layer, _, _ = name.rpartition(".")
        fan_in = self.get_parameter(f"{layer}.weight").shape[1]
        nn.init.uniform_(tensor, -(fan_in**-0.5), fan_in**-0.5)
