"""Which parameters decay: the groups that the run hands to its optimizer."""

from collections.abc import Iterable
from typing import Any

from torch import nn


def split_decay(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
    """Optimizer groups: parameters of 2 or more dimensions, then the others (biases, norms) without weight decay.

    The order is that of `named_parameters`, since optimizer states are saved by position. Frozen parameters are left
    out, and so is an empty group. The rule is the number of dimensions alone: a ViT's positions and class token have 3
    and decay. A parameter that FSDP sharded still answers with its global number.
    """
    trainable = [parameter for _, parameter in named_parameters if parameter.requires_grad]
    decayed = [parameter for parameter in trainable if parameter.ndim >= 2]
    others = [parameter for parameter in trainable if parameter.ndim < 2]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
