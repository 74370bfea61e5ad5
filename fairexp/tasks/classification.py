"""Image classification: cross-entropy, and top-k accuracy while evaluating."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F


class Classification:
    """The mean loss of a batch, and while evaluating (`model.eval()`) also `{"loss": ..., "top1": ..., "top5": ...}`, each
    with one value a sample, so that their sum over a data set is exact.

    Training smooths the labels; evaluation doesn't, so that eval/loss compares between runs. Labels are classes, int64
    (batch,), or in training, as mixup and CutMix give them, each class's part: float32 (batch, classes). Training returns no
    metrics: top-k costs as much as a small model's step. All results are float32, on the batch's device.
    """

    def __init__(self, label_smoothing: float = 0.0, topk: Sequence[int] = (1, 5)) -> None:
        self.label_smoothing = label_smoothing
        self.topk = topk

    def __call__(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        images, labels = batch
        logits = model(images).float()  # bfloat16 logits of 1,000 classes are full of ties
        if model.training:
            return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing), {}
        losses = F.cross_entropy(logits, labels, reduction="none")
        return losses.mean(), {"loss": losses, **topk_hits(logits, labels, self.topk)}


def topk_hits(logits: Tensor, labels: Tensor, topk: Sequence[int]) -> dict[str, Tensor]:
    """For each k, 1.0 for each sample whose class is among the k highest logits, else 0.0: `{"top1": ..., "top5": ...}`.

    A k that isn't below the number of classes is left out: it would always be 1.
    """
    topk = [k for k in topk if k < logits.shape[1]]
    if not topk:
        return {}
    hits = logits.topk(max(topk)).indices == labels[:, None]
    return {f"top{k}": hits[:, :k].sum(1).float() for k in topk}
