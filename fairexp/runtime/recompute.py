"""Activation checkpointing: units of the model compute their activations again in backward, and hold none until then."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fairexp.errors import RunError


def recompute(units: Collection[nn.Module], part: str | float, traced: bool = False) -> None:
    """Lets `part` of the units (off, blocks: all, or a fraction, spread evenly) recompute their activations; in place, before
    the strategy wraps them: their names and state dicts' keys stay. `traced`: torch.compile will trace through it.

    The bits are those of the run without: dropout draws the same masks again, batch norms count a batch once.
    """
    share = {"off": 0.0, "blocks": 1.0}[part] if isinstance(part, str) else part
    if share and not units:
        raise RunError(
            f"trainer.activation_checkpointing={part}: the model has no nn.ModuleList, whose elements would be the units"
        )
    count = len(units)
    some = round(share * count)
    for number, unit in enumerate(units):
        if (number + 1) * some // count == number * some // count:
            continue
        # a trace can't hold a context, and its recomputation leaves buffers alone anyway
        contexts: dict[str, Any] = {} if traced else {"context_fn": partial(_contexts, unit)}
        unit.forward = partial(checkpoint, unit.forward, use_reentrant=False, **contexts)  # type: ignore[method-assign]


def _contexts(unit: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Around the unit's forward, and around its recomputation."""
    buffers = [*unit.buffers()] if unit.training else []
    return nullcontext(), _kept(buffers) if buffers else nullcontext()


@contextmanager
def _kept(buffers: list[Tensor]) -> Iterator[None]:
    """Buffers keep their values: the first forward has added the batch to a norm's running statistics."""
    values = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, value in zip(buffers, values, strict=True):
            buffer.data.copy_(value)  # past autograd, which may have saved the buffer
