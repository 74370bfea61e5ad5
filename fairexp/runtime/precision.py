"""The arithmetic of a step: three objects with the same methods, so that the loop has no branch for it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer


class Precision(Protocol):
    """What the loop asks of an arithmetic."""

    def autocast(self) -> AbstractContextManager[None]:
        """Around the forward pass."""

    def backward(self, loss: Tensor) -> None:
        """Gradients of the loss, perhaps scaled."""

    def unscale(self, optimizer: Optimizer) -> None:
        """Gradients as they are, before their norm is taken."""

    def step(self, optimizer: Optimizer) -> None:
        """One optimizer step."""

    def skip(self, optimizer: Optimizer) -> None:
        """In place of a step that isn't to be applied."""

    def state(self) -> dict[str, float]:
        """What a checkpoint must hold."""

    def load(self, state: dict[str, float]) -> None:
        """Takes a checkpoint's state."""


NO_CONTEXT = nullcontext()


class Full:
    """Float32 throughout."""

    def autocast(self) -> AbstractContextManager[None]:
        return NO_CONTEXT

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def unscale(self, optimizer: Optimizer) -> None:
        pass

    def step(self, optimizer: Optimizer) -> None:
        optimizer.step()

    def skip(self, optimizer: Optimizer) -> None:
        pass

    def state(self) -> dict[str, float]:
        return {}

    def load(self, state: dict[str, float]) -> None:
        pass


class BFloat16(Full):
    """Autocast to bfloat16: parameters, gradients and optimizer state stay in float32."""

    def __init__(self, device: torch.device):
        self.device_type = device.type

    def autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self.device_type, torch.bfloat16)


class Float16:
    """Autocast to float16. Small gradients would vanish there, so the loss is scaled up before backward and gradients
    back down before the step; a step whose gradients overflowed is skipped (Micikevicius et al. 2018)."""

    def __init__(self, device: torch.device):
        self.device_type = device.type
        self.scaler = torch.amp.GradScaler(device.type)

    def autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self.device_type, torch.float16)

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def unscale(self, optimizer: Optimizer) -> None:
        self.scaler.unscale_(optimizer)

    def step(self, optimizer: Optimizer) -> None:
        self.scaler.step(optimizer)
        self.scaler.update()

    def skip(self, optimizer: Optimizer) -> None:
        self.scaler.update()  # forgets that the gradients were unscaled: it would refuse to unscale the next step's

    def state(self) -> dict[str, float]:
        return {"scale": self.scaler.get_scale(), "growth_tracker": self.scaler._get_growth_tracker()}

    def load(self, state: dict[str, float]) -> None:
        if state:
            self.scaler.load_state_dict(
                {**self.scaler.state_dict(), **state, "_growth_tracker": state["growth_tracker"]}
            )


def precision(name: str, device: torch.device) -> Precision:
    """The arithmetic called fp32, bf16 or fp16."""
    if name == "fp32":
        return Full()
    return BFloat16(device) if name == "bf16" else Float16(device)
