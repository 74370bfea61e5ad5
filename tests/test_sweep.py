"""What a sweep's command line and its file mean: the same runs that Hydra's own multirun would have, each composed once."""

import itertools
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from fairexp.config import sweep
from fairexp.config.compose import compose
from fairexp.config.groups import groups
from fairexp.errors import UserError


def expand(*overrides: str, folder: Path | None = None) -> sweep.Sweep:
    return sweep.expand(overrides, [folder] if folder else [], "train")


def labels(*overrides: str, folder: Path | None = None) -> list[str]:
    return [point.label for point in expand(*overrides, folder=folder).points]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in {
        "experiment/mine.yaml": "# @package _global_\noptimizer:\n  lr: 0.5\ndataset:\n  image_size: 16\n",
        "sweep/table1.yaml": "overrides: [trainer.max_steps=7]\ngrid:\n  optimizer.lr: [1e-3, 0.1]\n  model: vit,mlp\n",
        "sweep/listed.yaml": "runs: [[experiment=mine], [model=mlp, optimizer.lr=3]]\ngrid: {seed: 'range(0,2)'}\n",
        "sweep/one.yaml": "grid: {optimizer.lr: [0.3]}\n",
        "sweep/wrong.yaml": "grdi: {}\nruns: 3\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


GRIDS = [
    ["optimizer.lr=1e-3,3e-4", "seed=range(0,3)"],
    ["model=vit,mlp", "optimizer=adamw,sgd", "optimizer.lr=0.1,0.2"],
    ["model=glob(vit*)", "seed=1,2"],
    ["experiment=choice(vit_digits,resnet_digits)", "trainer.max_steps=5,6"],
    ["+experiment=vit_digits,resnet_digits"],
    ["dataset.image_size=8,16", "model=vit,mlp"],  # read by interpolations of the model
    ["model.depth=1,2,3", "++model.dropout=0.0,0.1"],
    ["model=mlp", "model.hidden=[8],[8,8],[]"],
    ["name=a,'b c',null"],
    ["trainer.grad_clip_norm=null,1,2.5", "trainer.deterministic=true,false"],
    ["optimizer.betas=[0.8,0.9],[0.9,0.99]"],
    ["tracker.tags=[a],[b,c]", "tracker.notes='${name}',x"],
    ["seed=1", "seed=2,3"],
    ["schedule=cosine,linear", "schedule.warmup=0.1,3"],
]


@pytest.mark.parametrize("grid", GRIDS, ids=" ".join)
def test_each_run_has_the_config_that_composing_it_alone_gives(grid: list[str]) -> None:
    points = expand(*grid).points
    assert len(points) > 1
    for point in points:
        alone = compose(point.overrides)
        assert point.composed.config == alone.config, point.label
        assert list(point.composed.config) == list(alone.config)


def test_the_runs_are_the_product_in_hydras_order() -> None:
    grid = ["optimizer.lr=1e-3,3e-4", "model=vit,mlp", "seed=range(0,3)"]
    parsed = OverridesParser.create().parse_overrides(grid)
    each = [[f"{one.key_or_group}={value}" for value in one.sweep_string_iterator()] for one in parsed]
    assert labels(*grid) == [" ".join(words) for words in itertools.product(*each)]


def test_a_glob_takes_the_options_of_its_group() -> None:
    assert labels("model=glob(vit_*)") == [f"model={name}" for name in groups()["model"] if name.startswith("vit_")]


def test_a_file_names_a_tables_runs(folder: Path) -> None:
    found = expand("sweep=table1", folder=folder)
    assert found.name == "table1"
    lrs, models = ("0.001", "0.1"), ("vit", "mlp")
    assert [point.label for point in found.points] == [
        f"optimizer.lr={lr} model={model}" for lr, model in itertools.product(lrs, models)
    ]
    assert {point.composed.config["trainer"]["max_steps"] for point in found.points} == {7}
    assert [point.composed.config["optimizer"]["lr"] for point in found.points] == [0.001, 0.001, 0.1, 0.1]
    assert labels("sweep=one", folder=folder) == ["optimizer.lr=0.3"]


def test_a_list_of_experiments_is_a_sweep_and_the_grid_multiplies_it(folder: Path) -> None:
    found = expand("sweep=listed", folder=folder)
    assert [point.label for point in found.points] == [
        "experiment=mine seed=0",
        "experiment=mine seed=1",
        "model=mlp optimizer.lr=3 seed=0",
        "model=mlp optimizer.lr=3 seed=1",
    ]
    assert [point.composed.config["optimizer"]["lr"] for point in found.points] == [0.5, 0.5, 3, 3]
    for point in found.points:
        assert point.composed.config == compose(point.overrides, [folder]).config


def test_a_sweep_is_the_same_one_whichever_values_it_asks_for() -> None:
    name = expand("optimizer.lr=1,2", "model=mlp", "launcher.max_parallel=2").name
    assert name == expand("model=mlp", "optimizer.lr=3,4,5", "launcher=slurm").name
    assert name != expand("optimizer.lr=1,2", "model=vit").name
    assert name != expand("optimizer.lr=1,2", "model=mlp", "seed=1,2").name
    assert expand("optimizer.lr=1,2", "sweep.name=mine").name == "mine"


def test_a_wrong_settings_file_is_named_with_what_is_allowed(folder: Path) -> None:
    with pytest.raises(UserError) as caught:
        expand("sweep=wrong", folder=folder)
    first, second = caught.value.problems
    assert "sweep.grdi" in first
    assert "sweep/wrong.yaml" in first
    assert "nearest: grid" in first
    assert "takes a list of a list of str or null, got 3" in second


def test_a_value_that_breaks_one_run_leaves_the_others_composed() -> None:
    found = expand("optimizer.lr=1,2", "model=vit,nosuch")
    assert len(found.points) == 2
    (problem,) = found.failures
    assert "no such option of model" in problem
    assert found.failures[problem] == ["optimizer.lr=1 model=nosuch", "optimizer.lr=2 model=nosuch"]


def test_a_search_space_has_intervals_and_choices_and_its_corners_are_checked() -> None:
    found = expand(
        "optimizer.lr=tag(log,interval(1e-5,1e-2))",
        "model.depth=interval(1,4)",
        "model=vit,vit_tiny",
        "task.label_smoothing=0.0,0.1",
        "sweep.sampler=tpe",
        "sweep.num_trials=10",
    )
    assert found.search is not None
    assert found.search.space["optimizer.lr"] == {"kind": "float", "low": 1e-5, "high": 1e-2, "log": True}
    assert found.search.space["model.depth"] == {"kind": "int", "low": 1, "high": 4, "log": False}
    assert found.search.space["task.label_smoothing"]["values"] == [0.0, 0.1]
    assert found.search.group_keys == ["model"]
    depths = {point.composed.config["model"]["depth"] for point in found.points}
    assert depths == {1, 4}
    for point in found.points:
        assert point.composed.config == compose(point.overrides).config
