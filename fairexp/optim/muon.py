"""Muon for the matrices of the blocks, AdamW for everything else, behind one optimizer."""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import AdamW, Optimizer

# of a quintic polynomial whose slope at 0 is as large as one that keeps singular values near 1 can have (Jordan 2024)
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


@torch.no_grad()
def orthogonalize(matrix: Tensor, num_steps: int = 5) -> Tensor:
    """A matrix with the same singular vectors and singular values of about 1 (0.7 to 1.2), in bfloat16, by a Newton-Schulz
    iteration (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon)."""
    a, b, c = COEFFICIENTS
    x = matrix.bfloat16()
    x = x.T if matrix.shape[0] > matrix.shape[1] else x  # the smaller square
    x = x / x.norm().clamp(min=1e-7)  # the largest singular value is then at most 1
    for _ in range(num_steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class MuonAdamW(Optimizer):
    """Each hidden matrix moves by its momentum made orthogonal (Muon), each other parameter as AdamW moves it.

    One learning rate and weight decay serve both: Muon's update is scaled to the size of AdamW's, 0.2 in each entry's root
    mean square (Liu et al. 2025, arXiv:2502.16982), so what was tuned for AdamW can be kept.

    A hidden matrix is a parameter of 2 dimensions in a block, that is with a number in its name (`blocks.0.mlp.fc1.weight`):
    embeddings and heads have none. A group's `muon` says otherwise: true for its matrices whatever their names, false for
    AdamW. `params`: groups with `params` and `param_names`. ValueError: Muon would have nothing to do.

    A sharded momentum is gathered once a matrix and step, and each rank computes the whole update: the losses of one process.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        num_steps: int = 5,
        betas: Sequence[float] = (0.9, 0.95),
        eps: float = 1e-8,
        fused: bool | None = None,
        muon: bool | None = None,
    ) -> None:
        groups = [part for group in params for part in _split(group, muon)]
        if not any(group["muon"] for group in groups):
            raise ValueError(
                "Muon takes matrices of blocks, with a number in their name such as blocks.0.attn.qkv.weight, and the model has "
                "none; add groups: [{match: ..., muon: true}], or take optimizer=adamw"
            )
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})
        for group in self.param_groups:
            if group["muon"]:
                group.setdefault("momentum", momentum)
                group.setdefault("nesterov", nesterov)
                group.setdefault("num_steps", num_steps)
        others = [group for group in self.param_groups if not group["muon"]]
        # it keeps these very groups and fills in its own settings
        beta1, beta2 = betas
        self.adamw = AdamW(others, lr, (beta1, beta2), eps, weight_decay, fused=fused) if others else None
        self._share()

    def _share(self) -> None:
        if self.adamw is not None:
            self.adamw.param_groups = [group for group in self.param_groups if not group["muon"]]
            self.adamw.state = self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # of load_state_dict: other groups and another state take the place of these
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["muon"]:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._move(parameter, group)
        if self.adamw is not None:
            self.adamw.step()
        return loss

    def _move(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        momentum = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        update = _like(orthogonalize(_whole(update), group["num_steps"]), parameter)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        # an orthogonal m x n matrix has entries of root mean square 1 / sqrt(max(m, n))
        parameter.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(parameter.shape)))


def _split(group: dict[str, Any], default: bool | None) -> list[dict[str, Any]]:
    """The group's hidden matrices, and its other parameters."""
    asked = group.get("muon", default)
    parts: dict[bool, dict[str, Any]] = {}
    for name, parameter in zip(group["param_names"], group["params"], strict=True):
        hidden = re.search(r"(^|\.)\d+\.", name) is not None if asked is None else asked
        takes = hidden and parameter.ndim == 2
        part = parts.setdefault(takes, {**group, "muon": takes, "params": [], "param_names": []})
        part["params"].append(parameter)
        part["param_names"].append(name)
    return [parts[key] for key in sorted(parts, reverse=True)]


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _like(whole: Tensor, parameter: Tensor) -> Tensor:
    """This rank's shard of what every rank has whole, if the parameter is sharded."""
    if not isinstance(parameter, DTensor):
        return whole
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
