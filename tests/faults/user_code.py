"""A user's code that keeps a state where no checkpoint looks for it."""

import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairexp.models.mlp import MLP


class HiddenBuffer(MLP):
    """Adds what a buffer outside the state dict has summed up."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.register_buffer("seen", torch.zeros(1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.seen += images.mean()
        return super().forward(images) + self.seen

    def init_tensor(self, name: str, tensor: Tensor) -> None:
        tensor.zero_() if name == "seen" else super().init_tensor(name, tensor)


class Counts(MLP):
    """Its weight decays with the calls that it has counted."""

    calls = 0

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.calls = self.calls + 1
        return super().forward(images) / (1 + 0.1 * self.calls)


class Noise:
    """An augmentation with a generator of its own, and not the samples' seeds."""

    def __init__(self, degrees: float, translate: float, scale: list[float], shear: float) -> None:
        self.draw = torch.Generator().manual_seed(0)

    def __call__(self, batch: Any, seeds: Tensor) -> Any:
        images, labels = batch
        return images + 0.1 * torch.randn(images.shape, generator=self.draw), labels


class GlobalNoise(Noise):
    """The same with torch's global generator, which a data loading worker seeds when it starts."""

    def __init__(self, **given: Any) -> None:
        self.draw = None


class ByTheClock:
    """A loss that is never twice the same."""

    def __init__(self, label_smoothing: float, topk: list[int]) -> None:
        pass

    def __call__(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        images, labels = batch
        return F.cross_entropy(model(images), labels) * (1 + 1e-3 * (time.time() % 1)), {}


def take_without_average(take: Any) -> Any:
    def without(run: Any, *rest: Any) -> None:
        fresh = {name: tensor.clone() for name, tensor in run.ema.shadow.items()}
        take(run, *rest)
        for name, tensor in fresh.items():
            run.ema.shadow[name].copy_(tensor)

    return without


def take_without_scale(take: Any) -> Any:
    def without(run: Any, *rest: Any) -> None:
        load = run.precision.load
        run.precision.load = lambda state: None
        take(run, *rest)
        run.precision.load = load

    return without
