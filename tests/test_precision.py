"""The arithmetic of a step: low precision near the full one, gradients that are the global batch's, norms and means exact."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Fairexp, Tiny, Trained, interrupted
from torch import Tensor, nn
from torch.nn import functional as F

from fairexp.runtime.data import MicroBatch
from fairexp.runtime.dist import Place
from fairexp.runtime.loop import train_step
from fairexp.runtime.order import TrainingOrder
from fairexp.runtime.precision import Full
from fairexp.runtime.strategies.single import Single

torch.set_num_threads(1)


@pytest.mark.parametrize("strategy", ["single", "fsdp2"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_stays_near_fp32(tiny: Tiny, strategy: str, precision: str) -> None:
    low, full = tiny(strategy, f"trainer.precision={precision}"), tiny("single")
    assert low.losses == pytest.approx(full.losses, rel=1e-2)
    assert low.norms == pytest.approx(full.norms, rel=5e-2), "fp16's scale was left in the gradients"
    assert max(abs(low.losses[step] / full.losses[step] - 1) for step in full.steps) > 1e-5, "these are fp32's losses"


def test_the_loss_scale_goes_on_where_it_was(tiny: Tiny, fairexp: Fairexp, tmp_path: Path) -> None:
    uninterrupted = tiny("single", "trainer.precision=fp16")
    assert uninterrupted.state(10)["precision"]["growth_tracker"] == 10  # good steps since the scale last changed
    path = interrupted(uninterrupted, tmp_path)
    assert fairexp(*uninterrupted.command, f"runs_dir={tmp_path}").returncode == 0
    resumed = Trained(path, uninterrupted.command)
    assert resumed.state(20)["precision"] == uninterrupted.state(20)["precision"]
    assert resumed.losses == uninterrupted.losses


@pytest.mark.parametrize("strategy", ["ddp2", "ddp4", "fsdp2", "fsdp4", "hybrid"])
def test_the_logged_norm_is_the_global_batchs_before_clipping(tiny: Tiny, strategy: str) -> None:
    norms = tiny("single").norms
    assert max(norms.values()) > 0.4, "nothing was clipped"
    assert tiny(strategy).norms == pytest.approx(norms, rel=1e-4)


@pytest.mark.parametrize("strategy", ["ddp2", "hybrid"])
def test_the_last_ragged_batch_of_an_evaluation_counts_exactly(tiny: Tiny, strategy: str) -> None:
    alone, shared = tiny("single").evals[20], tiny(strategy, "trainer.micro_batch_size=7").evals[20]
    assert (alone["eval/top1"] * 360).is_integer()
    assert (shared["eval/top1"], shared["eval/top5"]) == (alone["eval/top1"], alone["eval/top5"])


# train_step itself, with the ranks of a world one after the other in this process


DATA = torch.randn(23, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(23) % 3


def classify(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    return F.cross_entropy(model(batch[0]), batch[1]), {}


def linear() -> nn.Linear:
    model = nn.Linear(5, 3, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.arange(parameter.numel()).view_as(parameter) / 10)
    return model


def step(micro_batches: list[MicroBatch], clip: float | None = None) -> tuple[Tensor, Tensor | None, Tensor]:
    """One step of gradient descent with learning rate 1: the loss, the norm, and how far each parameter moved."""
    model = linear()
    run: Any = SimpleNamespace(
        model=model,
        module=model,
        parameters=dict(model.named_parameters()),
        task=classify,
        strategy=Single(),
        precision=Full(),
        optimizer=torch.optim.SGD([{"params": [*model.parameters()], "lr": 1.0, "initial_lr": 1.0}]),
        schedule=lambda step: 1.0,
        trainer=SimpleNamespace(grad_clip_norm=clip),
        ema=None,
        guard=SimpleNamespace(reads=False, accepts=lambda loss, grad_norm: True),
        step=0,
    )
    loss, norm = train_step(run, micro_batches, wants_norm=True)
    return (
        loss,
        norm,
        nn.utils.parameters_to_vector(model.parameters()) - nn.utils.parameters_to_vector(linear().parameters()),
    )


def full_batch() -> tuple[Tensor, Tensor]:
    """The loss and the gradient of all samples at once, by torch alone."""
    model = linear()
    loss, _ = classify(model, (DATA, LABELS))
    loss.backward()
    return loss.detach(), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("micro_batch_size", [1, 2, 5, 23])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_unequal_micro_batches_average_to_the_full_batchs_gradient(world_size: int, micro_batch_size: int) -> None:
    losses, moves = [], []
    for rank in range(world_size):
        here = Place(rank, world_size, rank, torch.device("cpu"))
        parts = next(TrainingOrder(23, 23, micro_batch_size, here, 0).steps(0))
        loss, _, move = step([MicroBatch((DATA[p.indices], LABELS[p.indices]), p.weight, p.share) for p in parts])
        losses.append(loss)
        moves.append(move)
    loss, gradient = full_batch()
    torch.testing.assert_close(torch.stack(losses).mean(), loss)  # DDP and FSDP average over the ranks
    torch.testing.assert_close(-torch.stack(moves).mean(0), gradient)


def test_a_clipped_step_has_the_length_it_was_clipped_to() -> None:
    _, gradient = full_batch()
    whole = [MicroBatch((DATA, LABELS), 23, 1.0)]
    for clip in (None, 0.1, 100.0):
        _, norm, move = step(whole, clip)
        torch.testing.assert_close(norm, gradient.norm())
        torch.testing.assert_close(
            -move, gradient if clip != 0.1 else 0.1 * gradient / gradient.norm(), rtol=1e-5, atol=1e-8
        )
