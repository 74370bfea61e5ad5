"""The optim shelf: schedules at chosen steps, parameter groups, and the YAML files that choose from it."""

import importlib
import inspect
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from fairexp.optim.param_groups import split_decay
from fairexp.optim.schedules import constant, cosine, linear, wsd

torch.set_num_threads(1)

CONFIGS = Path(__file__).parents[1] / "configs"
SCHEDULES: dict[str, Callable[..., float]] = {
    "cosine": cosine,
    "linear": linear,
    "constant": constant,
    "wsd": partial(wsd, decay=0.3),
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


@pytest.mark.parametrize(
    ("schedule", "arguments", "factors"),
    [
        (cosine, {"max_steps": 6, "warmup": 2}, {0: 0.5, 1: 1, 2: 0.853553, 3: 0.5, 4: 0.146447, 5: 0}),
        (cosine, {"max_steps": 5, "warmup": 0}, {0: 1, 1: 0.853553, 2: 0.5, 3: 0.146447, 4: 0}),
        (cosine, {"max_steps": 5, "warmup": 1, "final": 0.2}, {0: 1, 2: 0.6, 4: 0.2}),
        (linear, {"max_steps": 8, "warmup": 4}, {0: 0.25, 1: 0.5, 2: 0.75, 3: 1, 4: 0.75, 5: 0.5, 6: 0.25, 7: 0}),
        (linear, {"max_steps": 5, "warmup": 0, "final": 0.5}, {0: 1, 1: 0.875, 2: 0.75, 3: 0.625, 4: 0.5}),
        (constant, {"max_steps": 8, "warmup": 4}, {0: 0.25, 1: 0.5, 2: 0.75, 3: 1, 4: 1, 7: 1}),
        (constant, {"max_steps": 8, "warmup": 0}, {0: 1, 7: 1}),
        (wsd, {"max_steps": 10, "warmup": 2, "decay": 4}, {0: 0.5, 1: 1, 5: 1, 6: 0.75, 7: 0.5, 8: 0.25, 9: 0}),
        (wsd, {"max_steps": 10, "warmup": 0, "decay": 2, "final": 0.1}, {0: 1, 7: 1, 8: 0.55, 9: 0.1}),
        (wsd, {"max_steps": 10, "warmup": 0, "decay": 0}, {0: 1, 9: 1}),
        (wsd, {"max_steps": 4, "warmup": 2, "decay": 2}, {0: 0.5, 1: 1, 2: 0.5, 3: 0}),
    ],
)
def test_a_schedule_has_these_factors(
    schedule: Callable[..., float], arguments: dict[str, Any], factors: dict[int, float]
) -> None:
    assert {step: schedule(step, **arguments) for step in factors} == pytest.approx(factors, abs=1e-6)


@every_schedule
@pytest.mark.parametrize("warmup", [0, 1, 7, 50, 0.0, 0.25])
def test_a_schedule_rises_from_above_zero_to_one_and_never_rises_again(
    schedule: Callable[..., float], warmup: int | float
) -> None:
    factors = [schedule(step, max_steps=100, warmup=warmup) for step in range(100)]
    peak = factors.index(1.0)
    num_warmup = int(warmup * 100) if isinstance(warmup, float) else warmup
    assert peak == max(num_warmup - 1, 0)
    assert factors[0] > 0
    assert max(factors) == 1
    assert all(a < b for a, b in pairwise(factors[: peak + 1]))
    assert all(a >= b for a, b in pairwise(factors[peak:]))


@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("schedule", [cosine, linear, partial(wsd, decay=0.3)])
def test_the_last_step_has_the_final_factor_and_so_has_all_after_it(
    schedule: Callable[..., float], final: float
) -> None:
    for step in 99, 100, 1000:
        assert schedule(step, max_steps=100, warmup=10, final=final) == pytest.approx(final, abs=1e-12)


@every_schedule
def test_a_fraction_is_the_same_as_its_steps(schedule: Callable[..., float]) -> None:
    for step in range(100):  # 0.29 * 100 is a little less than 29 in floating point
        assert schedule(step, max_steps=100, warmup=0.29) == schedule(step, max_steps=100, warmup=29)
        assert wsd(step, max_steps=100, warmup=5, decay=0.29) == wsd(step, max_steps=100, warmup=5, decay=29)


def test_wsd_does_not_know_the_length_of_the_run_before_it_decays() -> None:
    for step in range(80):
        assert wsd(step, max_steps=100, warmup=10, decay=20) == wsd(step, max_steps=500, warmup=10, decay=20)


@pytest.mark.parametrize("schedule", [cosine, linear, constant])
def test_a_run_of_one_step_trains(schedule: Callable[..., float]) -> None:
    assert schedule(0, max_steps=1, warmup=0) == schedule(0, max_steps=1, warmup=1) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (partial(cosine, 0, max_steps=10, warmup=-1), "warmup=-1"),
        (partial(linear, 0, max_steps=10, warmup=-0.1), "warmup=-0.1"),
        (partial(constant, 0, max_steps=10, warmup=1.0), "warmup=1.0: .*a float below 1"),
        (partial(wsd, 0, max_steps=10, warmup=0, decay=-3), "decay=-3"),
        (partial(cosine, 0, max_steps=10, warmup=11), "^warmup=11: 11 steps, more than max_steps=10"),
        (partial(wsd, 0, max_steps=10, warmup=6, decay=0.5), "warmup=6 and decay=0.5: 11 steps"),
        (partial(cosine, 0, max_steps=0, warmup=0), "max_steps=0"),
        (partial(linear, 0, max_steps=10, warmup=0, final=-0.1), "final=-0.1"),
        (partial(wsd, 0, max_steps=10, warmup=0, decay=1, final=1.5), "final=1.5"),
    ],
)
def test_nonsense_is_named(call: Callable[[], float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_matrices_decay_and_biases_and_norms_do_not() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    decayed, others = split_decay(net.named_parameters())
    assert names(net, decayed) == ["0.weight", "3.weight"]
    assert "weight_decay" not in decayed
    assert names(net, others) == ["0.bias", "1.weight", "1.bias", "3.bias"]
    assert others["weight_decay"] == 0.0


def test_frozen_parameters_and_empty_groups_are_left_out() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2, bias=False))
    net[0].requires_grad_(False)
    (decayed,) = split_decay(net.named_parameters())
    assert names(net, decayed) == ["1.weight"]
    assert split_decay(net[0].named_parameters()) == []


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("schedule/*.yaml")), ids=lambda path: path.stem)
def test_a_schedule_config_lacks_only_the_step_and_the_length_of_the_run(path: Path) -> None:
    target, arguments = load(path)
    assert arguments.pop("_partial_") is True
    assert ["step", "max_steps", *arguments] == [*inspect.signature(target).parameters]
    assert target(0, max_steps=1000, **arguments) == 1 / 50


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("optimizer/*.yaml")), ids=lambda path: path.stem)
def test_an_optimizer_config_steps_both_groups_and_decays_one(path: Path) -> None:
    target, arguments = load(path)
    assert all(type(arguments[key]) is float for key in ("lr", "weight_decay"))
    net = nn.Linear(4, 2)
    optimizer = target(split_decay(net.named_parameters()), **arguments)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [arguments["weight_decay"], 0.0]
    before = [parameter.clone() for parameter in net.parameters()]
    net(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def names(net: nn.Module, group: dict[str, Any]) -> list[str]:
    """The names of a group's parameters, in its order."""
    name_of = {parameter: name for name, parameter in net.named_parameters()}
    return [name_of[parameter] for parameter in group["params"]]


def load(path: Path) -> tuple[Callable[..., Any], dict[str, Any]]:
    """What a YAML's `_target_` names, and the arguments it gives."""
    arguments: Any = OmegaConf.to_container(OmegaConf.load(path))
    assert next(iter(arguments)) == "_target_"
    module, _, name = arguments.pop("_target_").rpartition(".")
    return getattr(importlib.import_module(module), name), arguments
