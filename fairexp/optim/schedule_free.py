"""Schedule-free optimizers (the extra `schedulefree`): no learning-rate schedule, and evaluation at an average of the weights."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch.optim import Optimizer


def adamw(
    params: Iterable[Any],
    lr: float = 2.5e-3,
    betas: Sequence[float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    r: float = 0.0,
    weight_lr_power: float = 2.0,
    foreach: bool = True,
) -> Optimizer:
    """Schedule-Free AdamW (Defazio et al. 2024, arXiv:2405.15682): the authors' own, whose warm-up is the schedule's here.

    A step weighs in the average by its number to the power `r`, times the largest learning rate so far to the power
    `weight_lr_power`. ImportError: the package is missing.
    """
    try:
        from schedulefree import AdamWScheduleFree
    except ImportError as error:
        raise ImportError("schedule-free optimizers need schedulefree: pip install 'fairexp[schedulefree]'") from error
    return AdamWScheduleFree(
        params,
        lr=lr,
        betas=tuple(betas),
        eps=eps,
        weight_decay=weight_decay,
        r=r,
        weight_lr_power=weight_lr_power,
        foreach=foreach,
    )
