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

from fairexp.models.vit import ViT
from fairexp.optim.muon import MuonAdamW, orthogonalize
from fairexp.optim.param_groups import layer_scales, param_groups
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
    decayed, others = param_groups(net.named_parameters())
    assert decayed["param_names"] == names(net, decayed) == ["0.weight", "3.weight"]
    assert "weight_decay" not in decayed
    assert others["param_names"] == names(net, others) == ["0.bias", "1.weight", "1.bias", "3.bias"]
    assert others["weight_decay"] == 0.0
    (everything,) = param_groups(net.named_parameters(), split_decay=False)
    assert names(net, everything) == [name for name, _ in net.named_parameters()]


def test_frozen_parameters_and_empty_groups_are_left_out() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2, bias=False))
    net[0].requires_grad_(False)
    (decayed,) = param_groups(net.named_parameters())
    assert names(net, decayed) == ["1.weight"]
    assert param_groups(net[0].named_parameters()) == []


def test_the_first_rule_that_matches_a_parameter_has_it() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    rules = [{"match": "1.bias", "lr": 3.0}, {"match": ["0.*", "1.*"], "lr": 2.0, "weight_decay": 0.5}]
    groups = param_groups(net.named_parameters(), rules)
    assert [(names(net, group), group["lr"], group.get("weight_decay")) for group in groups] == [
        (["1.bias"], 3.0, 0.0),
        (["0.weight", "1.weight"], 2.0, 0.5),
        (["0.bias"], 2.0, 0.0),
    ]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([{"match": "0.wieght"}], r"^groups.0.match: no trainable parameter is named '0.wieght'; nearest: 0.weight"),
        ([{"match": ["0.*", "2.*"]}], r"^groups.0.match: no trainable parameter is named '2.\*'; nearest: "),
        ([{"match": "*"}, {"match": "0.*"}], r"^groups.1.match: what it names belongs to groups that stand before it"),
    ],
)
def test_a_rule_that_does_nothing_is_named(rules: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        param_groups(nn.Sequential(nn.Linear(4, 2)).named_parameters(), rules)


def test_each_layer_below_the_head_learns_slower() -> None:
    net = ViT(8, 4, 1, 10, width=8, depth=2, num_heads=2, pool="cls")
    scales = layer_scales([name for name, _ in net.named_parameters()], 0.5)
    assert {".".join(name.split(".")[:2]): scale for name, scale in scales.items()} == {
        "cls_token": 1 / 8,
        "pos_embed": 1 / 8,
        "patch_embed.proj": 1 / 8,
        "blocks.0": 1 / 4,
        "blocks.1": 1 / 2,
        "norm.weight": 1.0,
        "norm.bias": 1.0,
        "head.weight": 1.0,
        "head.bias": 1.0,
    }
    groups = param_groups(net.named_parameters(), [{"match": "head.*", "lr": 1.0}], layer_decay=0.5)
    assert [(group["lr_scale"], group.get("lr"), len(group["params"])) for group in groups][:2] == [
        (1.0, None, 2),  # the final norm
        (0.5, None, 4),
    ]
    assert [name for group in groups[-2:] for name in group["param_names"]] == ["head.weight", "head.bias"]
    with pytest.raises(ValueError, match=r"^layer_decay: no parameter's name has blocks.N.*: weight, bias"):
        layer_scales(["weight", "bias"], 0.5)


def test_an_orthogonalized_matrix_keeps_its_singular_vectors_and_has_values_near_one() -> None:
    for shape in ((24, 8), (8, 24)):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
        values = u.T @ orthogonalize(matrix).float() @ vh.T
        assert values.diag().min() > 0.6
        assert values.diag().max() < 1.25
        assert (values - values.diag().diag()).abs().max() < 0.02


def test_muon_moves_the_matrices_of_blocks_as_torch_does_and_adamw_the_rest() -> None:
    def net() -> nn.Module:
        torch.manual_seed(0)
        return ViT(8, 4, 1, 10, width=8, depth=1, num_heads=2)

    ours, theirs = net(), net()
    optimizer = MuonAdamW(param_groups(ours.named_parameters()), lr=0.01, weight_decay=0.1)
    hidden = [p for name, p in theirs.named_parameters() if name.startswith("blocks.") and p.ndim == 2]
    ids = {id(p) for p in hidden}
    others = [(name, p) for name, p in theirs.named_parameters() if id(p) not in ids]
    muon = torch.optim.Muon(hidden, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(param_groups(others), lr=0.01, weight_decay=0.1, betas=(0.9, 0.95))
    assert len(hidden) == 4
    for model, optimizers in ((ours, [optimizer]), (theirs, [muon, adamw])):
        torch.manual_seed(1)
        for _ in range(3):
            model(torch.randn(4, 1, 8, 8)).square().sum().backward()
            for each in optimizers:
                each.step()
                each.zero_grad()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, msg=name)


def test_a_group_says_which_matrices_are_muons() -> None:
    net = nn.Module()
    net.blocks, net.head = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]), nn.Linear(4, 2)
    rules = [{"match": "blocks.0.*", "muon": False}, {"match": "head.*", "muon": True}]
    optimizer = MuonAdamW(param_groups(net.named_parameters(), rules))
    assert sorted(name for group in optimizer.param_groups if group["muon"] for name in group["param_names"]) == [
        "blocks.1.weight",
        "head.weight",
    ]
    with pytest.raises(ValueError, match=r"^Muon takes matrices of blocks"):
        MuonAdamW(param_groups(net.head.named_parameters()))


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
    assert arguments.pop("groups") == []
    assert arguments.pop("layer_decay") is None
    net = nn.Sequential(nn.Linear(4, 2))
    optimizer = target(param_groups(net.named_parameters()), **arguments)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [arguments["weight_decay"], 0.0]
    getattr(optimizer, "train", lambda: None)()
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
