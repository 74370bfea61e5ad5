"""Language modelling: cross-entropy of each next token; perplexity and bits per byte while evaluating."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NOT_COUNTED = -100  # a target of that value is no target


class NextToken:
    """The mean loss over a batch's counted targets, in nats a token; while evaluating also `{"loss": ..., "bits_per_byte":
    ...}`, each a pair of sums a row: what was lost, and over how many tokens or bytes.

    A batch is a dict: "tokens" and "targets", int64 (batch, length), a target of -100 isn't counted; "documents", int32 of the
    same shape, where attention must not cross from one to another; "num_bytes", int64 (batch,), the text that the counted
    targets stand for. The model gives logits (batch, length, vocabulary), or an object with `.logits`.

    `chunk`: the model's forward takes the targets and gives each position's loss and log-sum-exp, so many positions at a
    time; the logits of a large vocabulary are never held whole. 0: all at once. `z_loss`: weight of the squared log-sum-exp,
    which keeps logits from drifting (PaLM: Chowdhery et al. 2022, arXiv:2204.02311, with 1e-4); not in the evaluation.
    """

    def __init__(self, chunk: int = 0, z_loss: float = 0.0) -> None:
        self.chunk = chunk
        self.z_loss = z_loss

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Any]]:
        losses, log_sums = self._positions(model, batch)
        counted = self.weigh(batch)
        loss = losses.sum() / counted.clamp(min=1)
        if model.training:
            if self.z_loss:
                squares = torch.where(batch["targets"] == NOT_COUNTED, 0.0, log_sums.square())
                loss = loss + self.z_loss * squares.sum() / counted.clamp(min=1)
            return loss, {}
        rows = losses.sum(1)
        metrics = {"loss": (rows, (batch["targets"] != NOT_COUNTED).sum(1))}
        if "num_bytes" in batch:
            metrics["bits_per_byte"] = rows / math.log(2), batch["num_bytes"]
        return loss, metrics

    def weigh(self, batch: dict[str, Tensor]) -> Tensor:
        """The number of counted targets: by it a micro batch's mean counts in the global batch's."""
        return (batch["targets"] != NOT_COUNTED).sum()

    def derive(self, means: dict[str, float]) -> dict[str, float]:
        """What follows from the means over the whole evaluation set."""
        return {"perplexity": math.exp(min(means["loss"], 700.0))}

    def _positions(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Each position's loss, 0 where it isn't counted, and the log-sum-exp of its logits; float32 (batch, length)."""
        where = {"documents": batch["documents"]} if "documents" in batch else {}
        if self.chunk:
            both = model(batch["tokens"], targets=batch["targets"], chunk=self.chunk, **where)
            return both[..., 0], both[..., 1]
        logits = model(batch["tokens"], **where)
        logits = (logits if isinstance(logits, Tensor) else logits.logits).float()
        losses = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="none")
        log_sums = logits.logsumexp(-1) if self.z_loss else losses
        return losses.view_as(batch["targets"]), log_sums
