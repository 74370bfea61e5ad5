"""One process, one device."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, get_total_norm

from fairexp.runtime import init
from fairexp.runtime.dist import Place

NO_CONTEXT = nullcontext()


class Single:
    """The model as it is."""

    needs_group = False
    model_ranks = 1

    def wrap(self, model: nn.Module, here: Place, seed: int) -> nn.Module:
        init.materialize(model, here.device, seed)
        return model

    def last_micro_batch(self, model: nn.Module, last: bool) -> AbstractContextManager[None]:
        return NO_CONTEXT

    def grad_norm(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        return get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])

    def clip_grad_norm(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
        return clip_grad_norm_(parameters, max_norm)
