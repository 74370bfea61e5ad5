"""Activation checkpointing: units forget their activations and compute them again, to the same bits."""

from pathlib import Path

import pytest
import torch
from test_methods import one_process
from torch import Tensor, nn

from fairexp.errors import RunError
from fairexp.runtime import loop
from fairexp.runtime.recompute import recompute

torch.set_num_threads(1)

DROPOUT = ("model.dropout=0.1", "trainer.micro_batch_size=42", "trainer.max_steps=4", "checkpoint.every=null")


class Unit(nn.Module):
    """Counts its forward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.passes = 0

    def forward(self, x: Tensor, shift: float = 0.0) -> Tensor:
        self.passes += 1
        return torch.relu(self.layer(x) + shift)


@pytest.mark.parametrize(
    ("part", "twice"),
    [
        ("off", ""),
        (0.0, ""),
        (0.01, ""),
        (1 / 6, "5"),
        (0.5, "135"),
        (2 / 3, "1245"),
        (1, "012345"),
        ("blocks", "012345"),
    ],
)
def test_a_fraction_is_so_many_units_spread_evenly(part: str | float, twice: str) -> None:
    units = nn.ModuleList(Unit() for _ in range(6))
    recompute(units, part)
    x = torch.randn(2, 4)
    for unit in units:
        x = unit(x, shift=0.1)
    x.sum().backward()
    assert "".join(str(number) for number, unit in enumerate(units) if unit.passes == 2) == twice
    with torch.no_grad():
        units[0](x)
    assert list(units.state_dict()) == [f"{n}.layer.{name}" for n in range(6) for name in ("weight", "bias")]


def test_a_model_without_units_has_nothing_to_recompute() -> None:
    recompute([], "off")
    with pytest.raises(RunError, match=r"trainer\.activation_checkpointing=0\.5: the model has no nn\.ModuleList"):
        recompute([], 0.5)


def test_recomputed_activations_meet_the_same_dropout_masks(tmp_path: Path) -> None:
    def weights(part: str) -> dict[str, Tensor]:
        run = one_process(tmp_path / part, *DROPOUT, f"trainer.activation_checkpointing={part}")
        loop.fit(run)
        return run.module.state_dict()

    plain = weights("off")
    for part in ("blocks", "0.5"):
        again = weights(part)
        assert all(torch.equal(plain[name], again[name]) for name in plain), part


def test_batch_norms_count_a_batch_once() -> None:
    def trained(part: str) -> dict[str, Tensor]:
        torch.manual_seed(0)
        units = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=momentum), nn.Dropout())
            for momentum in (0.1, None)
        )
        units[1][1].eval()  # a frozen one
        recompute(units, part)
        for step in range(3):
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step)) + 1
            for unit in units:
                x = unit(x)
            x.square().sum().backward()
            units[1][1].train()
        return dict(units.state_dict()) | {name: p.grad for name, p in units.named_parameters()}

    plain, again = trained("off"), trained("blocks")
    assert plain["0.1.num_batches_tracked"] == 3
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)
