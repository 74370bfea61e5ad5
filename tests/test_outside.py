"""A paper's own repository uses fairexp with no change to it: a package, a configs/ folder, any path."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MODEL = '''
from torch import nn


class TwoLayer(nn.Module):
    """A plain module: nothing in it knows of fairexp."""

    def __init__(self, side: int, width: int, num_classes: int):
        super().__init__()
        self.first = nn.Linear(side * side, width)
        self.second = nn.Linear(width, num_classes)

    def forward(self, images):
        return self.second(self.first(images.flatten(1)).relu())
'''
MODEL_YAML = """
_target_: ourpaper.nets.TwoLayer
side: ${dataset.image_size}
width: 32
num_classes: ${dataset.num_classes}
"""
EXPERIMENT_YAML = """
# @package _global_
defaults:
  - override /model: two_layer
  - override /dataset: digits
trainer:
  max_steps: 60
  log_every: 10
  eval_every: null
optimizer:
  lr: 1.0e-2
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "Łukasz's papers" / "table one — ünïcode"
    for name, text in {
        "ourpaper/__init__.py": "",
        "ourpaper/nets.py": MODEL,
        "configs/model/two_layer.yaml": MODEL_YAML,
        "configs/experiment/table1.yaml": EXPERIMENT_YAML,
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


def fairexp(
    repository: Path, *words: str, program: "tuple[str, ...]" = (sys.executable, "-m", "fairexp")
) -> "subprocess.CompletedProcess[str]":
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    return subprocess.run(
        [*program, *words], cwd=repository, env=environment, capture_output=True, text=True, timeout=120
    )


def test_a_papers_experiment_runs_under_fsdp_on_two_ranks(repository: Path) -> None:
    words = [
        "--config-dir",
        "configs",
        "experiment=table1",
        "strategy=fsdp",
        "launcher.num_processes=2",
        "tracker=none",
    ]
    done = fairexp(repository, "train", *words, "trainer.device=cpu", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["state"] == "finished"
    assert result["metrics"]["eval/top1"] > 0.8
    assert Path(result["run_dir"]).parent == repository / "runs"
    assert Path(result["run_dir"]).name == f"table1-{result['id']}"

    again = fairexp(repository, "eval", result["id"], "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["metrics"]["eval/top1"] == result["metrics"]["eval/top1"]


def test_the_papers_configs_are_listed_and_explained(repository: Path) -> None:
    done = fairexp(repository, "config", "--config-dir", "configs", "experiment=table1")
    assert done.returncode == 0, done.stderr
    assert "configs/model/two_layer.yaml:4" in done.stdout
    assert "configs/experiment/table1.yaml:7" in done.stdout


def test_the_console_script_finds_the_papers_package_too(repository: Path) -> None:
    script = Path(sys.executable).with_name("fairexp")
    if not script.exists():
        pytest.skip("fairexp is not installed in this environment: there is no console script")
    words = [
        "train",
        "--config-dir",
        "configs",
        "experiment=table1",
        "tracker=none",
        "trainer.device=cpu",
        "trainer.max_steps=2",
    ]
    done = fairexp(repository, *words, "launcher=inline", program=(str(script),))
    assert done.returncode == 0, done.stderr


def test_an_import_error_in_the_papers_module_is_shown_as_itself(repository: Path) -> None:
    with open(repository / "ourpaper" / "nets.py", "a") as file:
        file.write("\nimport a_package_that_is_not_there\n")
    done = fairexp(
        repository, "train", "--config-dir", "configs", "experiment=table1", "tracker=none", "trainer.device=cpu"
    )
    assert done.returncode == 1
    assert "No module named 'a_package_that_is_not_there'" in done.stderr
    assert "nets.py" in done.stderr
