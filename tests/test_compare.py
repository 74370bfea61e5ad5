"""The verb `compare`: which settings stand in its columns, what it averages, and what it refuses to."""

import copy
import functools
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fairexp.config import rundir
from fairexp.config.compose import compose
from fairexp.config.identity import identity, run_id
from fairexp.config.rundir import RunDir
from fairexp.errors import UserError
from fairexp.runs.compare import ABSENT, best_of, compare, differing, estimate, flatten, number, t_95


@functools.cache
def composed(*overrides: str) -> dict[str, Any]:
    """The config that a command line would freeze."""
    return compose(overrides).config


def config(*overrides: str, **settings: Any) -> dict[str, Any]:
    """The same, with more settings by dotted keys."""
    changed = copy.deepcopy(composed(*overrides))
    for key, value in settings.items():
        *path, last = key.split(".")
        functools.reduce(lambda node, part: node[part], path, changed)[last] = value
    return changed


def make(runs_dir: Path, settings: dict[str, Any], metrics: Mapping[str, Any] | None = None, more: str = "") -> RunDir:
    """A run folder of these settings; with metrics: of a finished run."""
    path = runs_dir / f"{settings['name']}-{run_id(settings)}{more}"
    run = rundir.create(path, settings, "fairexp train", {"num_processes": 1}, {})
    if metrics is not None:
        best = {"eval/top1": 1.0}
        summary = json.dumps(
            {"step": 9, "final": dict(metrics), "best": best}
        )  # a NaN is bare, as the worker writes it
        (run.path / "summary.json").write_text(summary)
        run.set_status(state="finished", step=9)
    return run


def accuracy(value: Any) -> dict[str, Any]:
    return {"train/loss": 0.5, "eval/loss": 0.25, "eval/top1": value}


def printed(
    capsys: pytest.CaptureFixture[str], runs: list[RunDir], over: str | None = None, metrics: tuple[str, ...] = ()
) -> list[dict[str, Any]]:
    """What --json prints: strict JSON, one value."""
    compare(runs, over, metrics, as_json=True)

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(capsys.readouterr().out, parse_constant=refuse)


def told(capsys: pytest.CaptureFixture[str], *arguments: Any) -> list[list[str]]:
    """The table's lines as words, and what stands below it."""
    assert compare(*arguments, as_json=False) == 0
    return [line.split() for line in capsys.readouterr().out.splitlines() if line.strip("─ ")]


def columns(*configs: dict[str, Any]) -> dict[str, list[Any]]:
    return differing([flatten(identity(each)) for each in configs])


# ---------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize(
    ("df", "published"),
    [
        (1, 12.706),
        (2, 4.303),
        (3, 3.182),
        (4, 2.776),
        (5, 2.571),
        (9, 2.262),
        (10, 2.228),
        (29, 2.045),
        (30, 2.042),
        (31, 2.040),
        (40, 2.021),
        (60, 2.000),
        (120, 1.980),
        (1000, 1.962),
        (100_000, 1.960),
    ],
)
def test_the_quantile_is_the_one_of_the_published_tables(df: int, published: float) -> None:
    assert round(t_95(df), 3) == published


def test_the_quantile_has_more_digits_than_the_tables() -> None:
    # 1 and 2 degrees of freedom have closed forms
    assert t_95(1) == pytest.approx(math.tan(math.pi * 0.475), rel=1e-12)
    assert t_95(2) == pytest.approx(0.95 * math.sqrt(2 / (1 - 0.95**2)), rel=1e-12)


def test_the_interval_is_that_of_students_own_data() -> None:
    # Student 1908, the extra hours of sleep by ten patients (R's `sleep`, group 1): t.test gives 0.75 [-0.530, 2.030]
    mean, ci95 = estimate([0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0])
    assert ci95 is not None
    assert (round(mean, 3), round(mean - ci95, 3), round(mean + ci95, 3)) == (0.75, -0.53, 2.03)


def test_one_value_has_no_interval_and_what_is_not_finite_does_no_harm() -> None:
    assert estimate([0.5]) == (0.5, None)
    assert estimate([0.5, 0.5]) == (0.5, 0.0)
    for values in ([math.nan, 1.0], [math.inf, -math.inf], [math.inf, 1.0, 2.0]):
        mean, ci95 = estimate(values)
        assert not math.isfinite(mean)
        assert ci95 is not None
        assert math.isnan(ci95)


@pytest.mark.parametrize(
    ("metric", "best"),
    [
        ("eval/top1", 3.0),
        ("eval/loss", 1.0),
        ("best/eval/perplexity", 1.0),
        ("eval/word_error", 1.0),
        ("perf/step_time_s", 1.0),
        ("perf/samples_per_s", 3.0),
        ("train/lr", None),
    ],
)
def test_losses_are_best_when_low(metric: str, best: float | None) -> None:
    assert best_of(metric, [2.0, 3.0, math.nan, None, 1.0]) == best
    assert best_of(metric, [2.0, 2.0, math.nan]) is None  # nothing is better than another


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.95831, "0.9583"), (3e-5, "3e-05"), (0.0, "0.0000"), (-12.5, "-12.5000"), (20480.12, "20480.1")],
)
def test_numbers_show_digits_that_say_something(value: float, shown: str) -> None:
    assert number(value) == shown


# ------------------------------------------------------------------------------------------------- which settings differ


def test_only_what_differs_and_belongs_to_the_experiment_is_a_column() -> None:
    here = config("tracker=none", **{"seed": 1, "runs_dir": "/elsewhere", "trainer.log_every": 3})
    there = config("tracker=wandb", **{"optimizer.betas": [0.9, 0.95]})
    assert columns(here, there) == {"seed": [1, 0], "optimizer.betas": [[0.9, 0.999], [0.9, 0.95]]}
    assert columns(here) == columns(here, here) == {}


def test_a_choice_stands_for_what_follows_from_it() -> None:
    assert columns(config("model=vit"), config("model=resnet18"), config("model=mlp")) == {
        "model": ["ViT", "ResNet", "MLP"]
    }
    found = columns(config("optimizer=adamw"), config("optimizer=sgd"))
    assert found == {"optimizer": ["AdamW", "SGD"], "optimizer.lr": [1e-3, 0.1], "optimizer.weight_decay": [0.05, 5e-4]}


def test_what_differs_within_a_choice_is_shown_also_where_others_lack_it() -> None:
    found = columns(config("model=vit"), config("model=vit", **{"model.patch_size": 4}), config("model=mlp"))
    assert found == {"model": ["ViT", "ViT", "MLP"], "model.patch_size": [2, 4, ABSENT]}
    same_class = columns(config("model=vit"), config("model=vit_tiny"))
    assert same_class["model.width"] == [96, 192]
    assert "model" not in same_class


def test_a_data_set_is_one_choice_and_its_sizes_are_shown_once() -> None:
    assert columns(config("dataset=digits"), config("dataset=fashion_mnist")) == {
        "dataset.train": ["Digits", "IDX"],
        "dataset.augment.translate": [0.1, 0.036],
        "dataset.image_size": [8, 28],
    }
    found = columns(config("dataset=digits"), config("dataset=digits", **{"dataset.augment": None}))
    assert found == {"dataset.augment": ["RandomAffine", None]}


def test_only_what_repeats_a_column_is_left_out() -> None:
    sizes = [{"model.size": 8, "data.size": 8, "net.size": 3}, {"model.size": 28, "data.size": 28, "net.size": 4}]
    assert differing(sizes) == {"data.size": [8, 28], "net.size": [3, 4]}


def test_classes_of_one_name_are_told_apart_by_their_modules() -> None:
    assert differing([{"model._target_": "a.Net"}, {"model._target_": "b.Net"}]) == {"model": ["a.Net", "b.Net"]}


def test_settings_of_different_types_are_different() -> None:
    assert differing([{"x": 1, "y": None, "z": math.nan}, {"x": True, "y": "null", "z": math.nan}]) == {
        "x": [1, True],
        "y": [None, "null"],
    }


def test_no_two_experiments_look_the_same() -> None:
    words = ("model=vit", "model=resnet18", "dataset=fashion_mnist", "optimizer=sgd", "schedule=wsd", "strategy=ddp")
    configs = [config(word, **{"seed": seed}) for word in words for seed in (0, 1)]
    configs += [config("model=vit", "dataset=fashion_mnist", **{"dataset.augment.degrees": 9, "model.pool": "cls"})]
    shown = [json.dumps(row, default=repr) for row in zip(*columns(*configs).values(), strict=True)]
    assert len(shown) == len(configs)
    assert len(set(shown)) == len({run_id(each) for each in configs})


# ------------------------------------------------------------------------------------------------------------- the table


def test_over_seeds_a_setting_is_a_row_with_mean_and_interval(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [
        make(tmp_path, config(f"model={model}", seed=seed), accuracy(top1 + seed / 100))
        for model, top1 in (("vit", 0.9), ("mlp", 0.5))
        for seed in range(3)
    ]
    header, vit, mlp, explained, star = told(capsys, runs, "seed", ["eval/top1", "eval/loss"])
    assert header == ["model", "n", "eval/top1", "eval/loss"]
    # 4.3027 * 0.01 / sqrt(3)
    assert vit == ["ViT", "3", "0.9100", "±", "0.0248*", "0.2500", "±", "0.0000"]
    assert mlp == ["MLP", "3", "0.5100", "±", "0.0248", "0.2500", "±", "0.0000"]
    assert " ".join(explained) == "mean ± half width of the 95 % confidence interval (Student t) over seed"
    assert star[0] == "*"


def test_without_over_each_run_is_a_row_by_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [make(tmp_path, config("model=vit", seed=seed), accuracy(seed / 10)) for seed in (3, 4)]
    header, third, fourth, _ = told(capsys, [*runs, runs[0]], None, [])  # named twice: compared once
    assert header == ["run", "seed", "eval/loss", "eval/top1"]
    assert third == [runs[0].path.name, "3", "0.2500", "0.3000"]
    assert fourth == [runs[1].path.name, "4", "0.2500", "0.4000*"]


def test_unfinished_runs_are_counted_and_in_no_mean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [make(tmp_path, config("model=vit", seed=seed), accuracy(0.5)) for seed in (0, 1)]
    runs += [make(tmp_path, config("model=vit", seed=2)), make(tmp_path, config("model=mlp"))]
    failed = make(tmp_path, config("model=vit", seed=3), accuracy(0.1))
    failed.set_status(state="failed")  # a rank failed after rank 0 had written the summary
    vit, mlp = printed(capsys, [*runs, failed], "seed")
    assert (vit["n"], vit["unfinished"], vit["metrics"]["eval/top1"]["values"]) == (2, 2, [0.5, 0.5])
    assert vit["runs"] == [runs[0].path.name, runs[1].path.name, runs[2].path.name, failed.path.name]
    assert (mlp["n"], mlp["unfinished"]) == (0, 1)
    assert mlp["metrics"]["eval/top1"] == {"mean": None, "ci95": None, "values": []}
    lines = told(capsys, [*runs, failed], "seed", ["eval/top1"])
    assert lines[0] == ["model", "n", "unfinished", "eval/top1"]
    assert lines[1] == ["ViT", "2", "2", "0.5000", "±", "0.0000"]
    assert lines[2] == ["MLP", "0", "1", "-"]
    assert "unfinished: 3 of 5 runs, in none of the numbers" in [" ".join(line) for line in lines]


def test_json_has_settings_as_they_are_and_nan_as_a_string(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [
        make(tmp_path, config("model=vit", **{"seed": 0, "optimizer.lr": 1e-3}), accuracy(math.nan)),
        make(tmp_path, config("model=vit", **{"seed": 1, "optimizer.lr": 1e-3}), accuracy("NaN")),
        make(tmp_path, config("model=vit", **{"seed": 0, "optimizer.lr": None}), accuracy("Infinity")),
    ]
    assert printed(capsys, runs, "seed", ("eval/top1",)) == [
        {
            "settings": {"optimizer.lr": 0.001},
            "n": 2,
            "metrics": {"eval/top1": {"mean": "NaN", "ci95": "NaN", "values": ["NaN", "NaN"]}},
            "runs": [run.path.name for run in runs[:2]],
            "unfinished": 0,
        },
        {
            "settings": {"optimizer.lr": None},
            "n": 1,
            "metrics": {"eval/top1": {"mean": "Infinity", "ci95": None, "values": ["Infinity"]}},
            "runs": [runs[2].path.name],
            "unfinished": 0,
        },
    ]
    lines = told(capsys, runs, "seed", ["eval/top1"])
    assert lines[1:3] == [["0.001", "2", "nan", "±", "nan"], ["null", "1", "inf"]]


def test_what_repeats_the_seed_goes_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = []
    for seed in (0, 1, 2):
        settings = config("model=vit", "+split_seed=0", seed=seed, split_seed=seed)  # split_seed: ${seed}
        runs.append(make(tmp_path, settings, accuracy(0.5)))
    assert [row["n"] for row in printed(capsys, runs, "seed")] == [3]
    other = make(tmp_path, config("model=vit", "+split_seed=0", seed=3, split_seed=7), accuracy(0.5))
    assert [row["n"] for row in printed(capsys, [*runs, other], "seed")] == [
        1,
        1,
        1,
        1,
    ]  # it doesn't repeat it: it differs


def test_over_takes_a_whole_section_and_what_is_not_of_the_experiment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [make(tmp_path, config(f"model={model}", seed=5), accuracy(0.5)) for model in ("vit", "mlp", "resnet18")]
    assert [(row["settings"], row["n"]) for row in printed(capsys, runs, "model")] == [({}, 3)]
    for processes in (1, 2):
        settings = config("model=mlp", **{"seed": 6, "launcher.num_processes": processes})
        runs.append(make(tmp_path, settings, accuracy(0.5), more=f".{processes}"))
    assert compare(runs[3:], "launcher.num_processes", [], as_json=True) == 0
    output = capsys.readouterr()
    assert [row["n"] for row in json.loads(output.out)] == [2]
    assert output.err == ""  # the same experiment twice, but not on as many processes


def test_the_same_experiment_twice_in_a_mean_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [make(tmp_path, config("model=vit", seed=seed), accuracy(0.5)) for seed in (0, 1)]
    runs.append(make(tmp_path, config("model=vit", seed=1), accuracy(0.5), more=".2"))  # --fresh
    compare(runs, "seed", [], as_json=False)
    assert capsys.readouterr().err == (
        f"fairexp: the same experiment twice, and both count: {runs[1].path.name}, {runs[2].path.name}\n"
    )
    compare(runs, None, [], as_json=False)
    assert capsys.readouterr().err == ""


# -------------------------------------------------------------------------------------------------------------- metrics


def test_the_evaluation_is_shown_and_else_the_training_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_it = make(tmp_path, config("model=vit"), accuracy(0.5))
    without = make(tmp_path, config("model=mlp"), {"train/loss": 2.0, "train/lr": 0.1})
    assert list(printed(capsys, [with_it])[0]["metrics"]) == ["eval/loss", "eval/top1"]
    assert list(printed(capsys, [without])[0]["metrics"]) == ["train/loss"]
    lines = told(capsys, [with_it, without], None, ["train/lr", "best/eval/top1", "train/loss"])
    assert lines[0] == ["run", "model", "train/lr", "best/eval/top1", "train/loss"]
    assert lines[1] == [with_it.path.name, "ViT", "-", "1.0000", "0.5000*"]
    assert lines[2] == [without.path.name, "MLP", "0.1000", "1.0000", "2.0000"]


def test_a_metric_that_fewer_runs_have_says_how_many(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [make(tmp_path, config("model=vit", seed=seed), accuracy(0.5)) for seed in (0, 1)]
    runs.append(make(tmp_path, config("model=vit", seed=2), {"train/loss": 0.5, "eval/top1": None}))
    assert told(capsys, runs, "seed", ["eval/top1", "train/loss"])[1] == (
        ["3", "0.5000", "±", "0.0000", "(2)", "0.5000", "±", "0.0000"]
    )


def test_unknown_metrics_and_keys_are_named_with_the_nearest(tmp_path: Path) -> None:
    runs = [make(tmp_path, config("model=vit"), accuracy(0.5))]
    with pytest.raises(UserError) as wrong:
        compare(runs, None, ["eval/top", "eval/top1", "loss"], as_json=False)
    assert [problem.partition("; there are")[0] for problem in wrong.value.problems] == [
        "eval/top: no run has this metric; nearest: eval/top1, best/eval/top1, eval/loss",
        "loss: no run has this metric; nearest: eval/loss",
    ]
    for over, nearest in (("sed", "seed"), ("optimizer.Lr", "optimizer.lr"), ("lr", "optimizer.lr")):
        with pytest.raises(UserError, match=rf"^--over {over}: no run has this key; nearest: {nearest}\b"):
            compare(runs, over, [], as_json=False)


def test_nothing_finished_is_exit_code_1_and_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make(tmp_path, config("model=vit"))
    assert compare([run], "seed", ["eval/top1"], as_json=False) == 1
    assert capsys.readouterr() == ("", "fairexp: nothing to compare: none of 1 runs has finished\n")
    assert compare([run], "seed", [], as_json=True) == 1
    assert json.loads(capsys.readouterr().out)[0]["unfinished"] == 1
    assert compare([], "seed", [], as_json=True) == 1
    assert capsys.readouterr() == ("[]\n", "fairexp: no runs to compare\n")


def test_a_file_gets_the_whole_table_in_plain_text(tmp_path: Path, environment: dict[str, str]) -> None:
    settings = [
        config("model=vit", **{"trainer.max_steps": 10**n, "optimizer.lr": 10.0**-n, "seed": n}) for n in range(4)
    ]
    runs = [str(make(tmp_path, each, accuracy(0.5)).path) for each in settings]
    code = """
import sys
from pathlib import Path
from fairexp.config.rundir import RunDir
from fairexp.runs.compare import compare
compare([RunDir(Path(path)) for path in sys.argv[1:]], None, [], False)
print(*({"torch", "numpy", "scipy", "wandb"} & set(sys.modules)), file=sys.stderr, end="")
"""
    env = {**environment, "COLUMNS": "40"}
    ended = subprocess.run([sys.executable, "-c", code, *runs], capture_output=True, text=True, env=env, check=True)
    assert ended.stderr == ""
    header, *rows = [line.split() for line in ended.stdout.splitlines() if line.strip("─ ")]
    assert header == ["run", "optimizer.lr", "trainer.max_steps", "seed", "eval/loss", "eval/top1"]
    assert [row[0] for row in rows[:4]] == [os.path.basename(run) for run in runs]
    assert "\x1b" not in ended.stdout
