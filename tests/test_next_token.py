"""The language-modelling task against values worked out by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from fairexp.tasks.next_token import NextToken

# Two rows of three positions over three tokens; the last position of the second row has no target.
PROBABILITIES = torch.tensor(
    [[[0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.2, 0.1, 0.7]], [[0.1, 0.8, 0.1], [0.4, 0.4, 0.2], [0.3, 0.3, 0.4]]]
)
TARGETS = torch.tensor([[0, 1, 2], [1, 2, -100]])
LOSSES = [[-math.log(p) for p in row] for row in ([0.5, 0.3, 0.7], [0.8, 0.2])]


class Given(nn.Module):
    """A model that answers with what it was made of, as a tensor or as Hugging Face's models do."""

    def __init__(self, logits: Tensor, wrapped: bool = False) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.wrapped = wrapped
        self.asked: dict[str, Tensor] = {}

    def forward(self, tokens: Tensor, **more: Tensor) -> Tensor | SimpleNamespace:
        self.asked = more
        return SimpleNamespace(logits=self.logits) if self.wrapped else self.logits


def batch(**more: Tensor) -> dict[str, Tensor]:
    return {"tokens": torch.zeros(2, 3, dtype=torch.int64), "targets": TARGETS, **more}


@pytest.mark.parametrize("wrapped", [False, True])
def test_training_gives_the_mean_over_counted_targets(wrapped: bool) -> None:
    loss, metrics = NextToken()(Given(PROBABILITIES.log(), wrapped), batch())
    assert loss.item() == pytest.approx(sum(map(sum, LOSSES)) / 5)
    assert metrics == {}


def test_evaluation_gives_sums_and_what_they_are_over() -> None:
    task = NextToken(z_loss=1.0)
    loss, metrics = task(Given(PROBABILITIES.log()).eval(), batch(num_bytes=torch.tensor([6, 5])))
    sums, counts = metrics["loss"]
    assert loss.item() == pytest.approx(sum(map(sum, LOSSES)) / 5)
    assert sums.tolist() == pytest.approx([sum(row) for row in LOSSES])
    assert counts.tolist() == [3, 2]
    bits, sizes = metrics["bits_per_byte"]
    assert bits.tolist() == pytest.approx([sum(row) / math.log(2) for row in LOSSES])
    assert sizes.tolist() == [6, 5]
    assert task.derive({"loss": math.log(3.0)}) == {"perplexity": pytest.approx(3.0)}
    assert math.isfinite(task.derive({"loss": 1e4})["perplexity"])


def test_a_batch_without_targets_has_no_loss_and_no_gradient() -> None:
    model = Given(PROBABILITIES.log())
    loss, _ = NextToken(z_loss=1e-3)(model, batch() | {"targets": torch.full_like(TARGETS, -100)})
    loss.backward()
    assert loss.item() == 0.0
    assert model.logits.grad is not None
    assert model.logits.grad.abs().sum() == 0


def test_z_loss_pulls_the_log_sum_exp_of_counted_positions_to_0() -> None:
    shift = torch.zeros(2, 3, 1)
    shift[0, 0], shift[1, 2] = 2.0, 50.0  # the second isn't counted
    model = Given(PROBABILITIES.log() + shift)
    plain, _ = NextToken()(model, batch())
    loss, _ = NextToken(z_loss=0.5)(model, batch())
    assert (loss - plain).item() == pytest.approx(0.5 * 2.0**2 / 5, rel=1e-5)


def test_documents_and_chunks_are_the_models() -> None:
    model = Given(torch.stack([PROBABILITIES[..., 0], torch.ones(2, 3)], -1))
    documents = torch.zeros(2, 3, dtype=torch.int32)
    loss, _ = NextToken(chunk=2, z_loss=0.1)(model, batch(documents=documents))
    assert model.asked.keys() == {"documents", "targets", "chunk"}
    assert loss.item() == pytest.approx(PROBABILITIES[..., 0].sum().item() / 5 + 0.1)
    NextToken()(Given(PROBABILITIES.log()), batch())
    assert NextToken().weigh(batch()).item() == 5
