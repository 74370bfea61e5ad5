"""The classification task against values worked out by hand."""

import inspect
import math
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn

from fairexp.tasks.classification import Classification, topk_hits

torch.set_num_threads(1)

# Probabilities of three classes; the true classes are ranked first, second and third.
PROBABILITIES = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.2, 0.1, 0.7]])
LABELS = torch.tensor([0, 1, 1])


class Given(nn.Module):
    """A model whose input is its output."""

    def forward(self, logits: Tensor) -> Tensor:
        return logits


def test_evaluation_gives_the_mean_loss_and_each_samples_loss_and_hits() -> None:
    loss, metrics = Classification(topk=(1, 2))(Given().eval(), (PROBABILITIES.log(), LABELS))
    losses = [-math.log(0.5), -math.log(0.3), -math.log(0.1)]
    assert loss.item() == pytest.approx(sum(losses) / 3)
    assert metrics.pop("loss").tolist() == pytest.approx(losses)
    assert {name: value.tolist() for name, value in metrics.items()} == {"top1": [1, 0, 0], "top2": [1, 1, 0]}
    assert {value.dtype for value in (loss, *metrics.values())} == {torch.float32}


def test_training_gives_the_loss_alone() -> None:
    loss, metrics = Classification()(Given(), (PROBABILITIES.log(), LABELS))
    assert loss.item() == pytest.approx(-(math.log(0.5) + math.log(0.3) + math.log(0.1)) / 3)
    assert metrics == {}


def test_labels_are_smoothed_in_training_only() -> None:
    batch = (PROBABILITIES[:1].log(), LABELS[:1])
    smooth, plain = Classification(label_smoothing=0.3), Classification()
    # 0.7 of the weight on the true class, 0.1 more on each of the three
    expected = -(0.8 * math.log(0.5) + 0.1 * math.log(0.3) + 0.1 * math.log(0.2))
    assert smooth(Given(), batch)[0].item() == pytest.approx(expected)
    assert smooth(Given().eval(), batch)[0] == plain(Given().eval(), batch)[0]


def test_a_k_that_is_not_below_the_number_of_classes_is_left_out() -> None:
    assert topk_hits(PROBABILITIES, LABELS, [1, 3, 5]).keys() == {"top1"}
    assert topk_hits(PROBABILITIES, LABELS, [5]) == {}


def test_bfloat16_logits_give_a_float32_loss() -> None:
    loss, metrics = Classification(topk=[1])(Given().eval(), (PROBABILITIES.bfloat16(), LABELS))
    assert loss.dtype == metrics["top1"].dtype == torch.float32


def test_metrics_are_made_without_reading_the_device() -> None:
    # meta tensors have no values: whatever would wait for one fails
    model = nn.Linear(4, 10, device="meta").eval()
    batch = (torch.empty(6, 4, device="meta"), torch.empty(6, dtype=torch.int64, device="meta"))
    loss, metrics = Classification()(model, batch)
    assert {loss.device.type, *(value.device.type for value in metrics.values())} == {"meta"}


def test_the_loss_reaches_the_models_gradients() -> None:
    model = nn.Linear(4, 10)
    loss, _ = Classification()(model, (torch.randn(6, 4), torch.arange(6)))
    loss.backward()
    assert model.weight.grad is not None
    assert model.weight.grad.abs().sum() > 0


def test_config_arguments_are_the_constructors() -> None:
    config = yaml.safe_load((Path(__file__).parents[1] / "configs/task/classification.yaml").read_text())
    assert list(config) == ["_target_", *inspect.signature(Classification).parameters]
    assert config["_target_"] == "fairexp.tasks.classification.Classification"
