"""Where a composed value comes from: the file and line that set it last, or the command line."""

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
import pytest
from omegaconf import OmegaConf

from fairexp.config import provenance
from fairexp.config.searching import searching

FILES = {
    "ours/train.yaml": """\
        defaults:
          - model: vit
          - data: digits
          - _self_
          - experiment: null
        seed: 0
        name: ???
        trainer:
          max_steps: 100   # steps
          betas: [0.9, 0.95]
        extra: null
        keep:
          inner: 1
    """,
    "ours/model/vit.yaml": """\
        # a comment
        _target_: models.ViT
        width: 384
        head:
          bias: true
          hidden: {}
    """,
    "ours/model/mlp.yaml": "_target_: models.MLP\nwidth: 64\n",
    "ours/data/digits.yaml": """\
        train: &common
          _target_: data.Digits
          split: train
        eval:
          split: eval
          <<: *common
    """,
    "theirs/model/wide.yaml": "defaults:\n  - vit\n  - _self_\nwidth: 768\n",
    "theirs/data/digits.yaml": "shadowed: true\n",
    "theirs/experiment/big.yaml": """\
        # @package _global_
        defaults:
          - override /model: wide
        seed: 1
        name: ???
        extra:
          note: hello
        keep: {}
        trainer:
          betas: []
    """,
}


@pytest.fixture
def config_dirs(tmp_path: Path) -> list[Path]:
    root = tmp_path / "mes expériences"
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(textwrap.dedent(text), encoding="utf-8")
    return [root / "ours", root / "theirs"]


def leaves(node: Any, prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


CASES = {
    "a value in the primary file": ([], {"seed": "ours/train.yaml:6", "trainer.max_steps": "ours/train.yaml:9"}),
    "a value in a group's file": (
        [],
        {"model.width": "ours/model/vit.yaml:3", "model.head.bias": "ours/model/vit.yaml:5"},
    ),
    "a list and an empty section count as values": (
        [],
        {"trainer.betas": "ours/train.yaml:10", "model.head.hidden": "ours/model/vit.yaml:6"},
    ),
    "an anchor's line for what is merged in, its own for what is written out": (
        [],
        {"data.eval._target_": "ours/data/digits.yaml:2", "data.eval.split": "ours/data/digits.yaml:5"},
    ),
    "the first folder wins": ([], {"data.train.split": "ours/data/digits.yaml:3"}),
    "a chosen option": (["model=mlp"], {"model.width": "ours/model/mlp.yaml:2"}),
    "an option of the second folder, and what it builds on": (
        ["model=wide"],
        {"model.width": "theirs/model/wide.yaml:4", "model._target_": "ours/model/vit.yaml:2"},
    ),
    "an experiment wins over what it overrides": (
        ["experiment=big"],
        {"seed": "theirs/experiment/big.yaml:4", "model.width": "theirs/model/wide.yaml:4"},
    ),
    "a section replaces null; ??? and {} replace nothing, [] does": (
        ["experiment=big"],
        {
            "extra.note": "theirs/experiment/big.yaml:7",
            "name": "ours/train.yaml:7",
            "keep.inner": "ours/train.yaml:13",
            "trainer.betas": "theirs/experiment/big.yaml:10",
        },
    ),
    "the command line wins over all": (
        ["experiment=big", "seed=2", "++model.width=8", "+new.deep=1"],
        {"seed": "command line", "model.width": "command line", "new.deep": "command line"},
    ),
    "an override with a mapping sets only what it names": (
        ["trainer={max_steps: 5}"],
        {"trainer.max_steps": "command line", "trainer.betas": "ours/train.yaml:10"},
    ),
    "one item of a list": (["trainer.betas.0=0.8"], {"trainer.betas": "command line"}),
    "a value with a comma or an equals sign in quotes": (["name='a,b=c'"], {"name": "command line"}),
    "a deleted value stands nowhere": (["~trainer.betas", "~model.head"], {"trainer.max_steps": "ours/train.yaml:9"}),
    "a group put under another name": (["+model@teacher=mlp"], {"teacher.width": "ours/model/mlp.yaml:2"}),
}


@pytest.mark.parametrize("case", CASES)
def test_each_value_comes_from_the_place_that_set_it_last(case: str, config_dirs: list[Path]) -> None:
    overrides, expected = CASES[case]
    found = provenance.sources(config_dirs, "train", overrides)
    root = config_dirs[0].parent
    assert {key: found[key].removeprefix(f"{root}/") for key in expected} == expected


@pytest.mark.parametrize("case", CASES)
def test_the_keys_are_exactly_those_of_the_composed_config(case: str, config_dirs: list[Path]) -> None:
    overrides, _ = CASES[case]
    with searching(config_dirs):
        composed = OmegaConf.to_container(hydra.compose("train", overrides))
    assert set(provenance.sources(config_dirs, "train", overrides)) == set(leaves(composed))


def test_an_experiment_that_no_defaults_list_names_is_added_with_a_plus(config_dirs: list[Path]) -> None:
    (config_dirs[0] / "bare.yaml").write_text("defaults:\n  - model: vit\n  - _self_\n")
    found = provenance.sources(config_dirs, "bare", ["+experiment=big"])
    assert found["seed"].endswith("theirs/experiment/big.yaml:4")


def test_a_folder_of_hydras_own_searchpath_is_searched_too(config_dirs: list[Path]) -> None:
    ours, theirs = config_dirs
    found = provenance.sources([ours], "train", [f"hydra.searchpath=['file://{theirs}']", "model=wide"])
    assert found["model.width"] == f"{theirs}/model/wide.yaml:4"
    assert not [key for key in found if key.startswith("hydra")]


def test_line_of_finds_values_and_sections_and_nothing_else(config_dirs: list[Path]) -> None:
    file = config_dirs[0] / "train.yaml"
    keys = ["seed", "trainer", "trainer.max_steps", "trainer.nothing", "max_steps"]
    assert [provenance.line_of(file, key) for key in keys] == [6, 8, 9, None, None]


def test_an_empty_file_has_no_lines(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing yet\n")
    assert provenance.line_of(tmp_path / "empty.yaml", "seed") is None
