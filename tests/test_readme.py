"""README says what is true: its commands run, its file tree is the disk's."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]
README = (CHECKOUT / "README.md").read_text(encoding="utf-8")
# what makes a training line short enough for a test; nothing else of the line is changed
SHORT = ["trainer.max_steps=4", "trainer.global_batch_size=16", "trainer.device=cpu", "tracker=none"]


def commands() -> list[list[str]]:
    """The lines of the section Use."""
    (block,) = re.findall(r"## Use\n\n```bash\n(.*?)```", README, re.DOTALL)
    return [shlex.split(line, comments=True) for line in block.splitlines()]


def test_the_commands_of_use_run_in_their_order(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    assert len(commands()) == 12
    for program, *words in commands():
        assert program == "fairexp"
        command = [sys.executable, "-m", "fairexp", *words, *(SHORT if words[0] == "train" else [])]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"{words}: {done.stderr}"


def test_the_exit_codes_are_the_programs() -> None:
    from fairexp import errors

    (line,) = re.findall(r"Exit codes: (.*)", README)
    codes = {int(code) for code in re.findall(r"\b\d+\b", line)}
    assert codes == {errors.DONE, errors.FAILED, errors.WRONG, errors.PREEMPTED, errors.INTERRUPTED}


def test_every_module_stands_in_the_file_tree() -> None:
    (tree,) = re.findall(r"## What is where\n\n(.*?)\n## ", README, re.DOTALL)
    files = [path for path in (CHECKOUT / "fairexp").rglob("*.py") if path.name != "__init__.py"]
    shelf = ("models", "datasets", "tasks", "optim", "strategies", "trackers")  # one line a folder there
    missing = [path.name for path in files if path.parent.name not in shelf and path.name not in tree]
    assert missing == []
    named = set(re.findall(r"\b\w+\.py\b", tree))
    assert named <= {path.name for path in files}
    for folder in re.findall(r"\b(\w+)/", tree):
        assert any(path.is_dir() and path.name == folder for path in CHECKOUT.rglob("*")), folder


def test_the_files_of_a_run_folder_are_those_that_readme_names(tmp_path: Path) -> None:
    words = ["train", "model=mlp", "launcher.num_processes=2", "strategy=ddp", *SHORT]
    subprocess.run(
        [sys.executable, "-m", "fairexp", *words], cwd=tmp_path, capture_output=True, check=True, timeout=120
    )
    (run_dir,) = (tmp_path / "runs").glob("*-*")
    (drawing,) = re.findall(r"### The run folder\n\n(.*?)\n\n", README, re.DOTALL)
    lines = [line.strip() for line in drawing.splitlines()[1:] if not line.startswith(" " * 20)]
    named = {re.split(r"[\s/]", line)[0] for line in lines} | {"tensorboard"}
    assert {path.name for path in run_dir.iterdir()} == named - {"wandb", "tensorboard", "events.jsonl"}


@pytest.mark.parametrize("script", ["quickstart", "test", "venv", "slurm-cluster"])
def test_the_scripts_are_sound_shell(script: str) -> None:
    path = CHECKOUT / "scripts" / script
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", path], check=True)


def test_every_command_that_the_quickstart_shows_passes_validation(tmp_path: Path) -> None:
    from fairexp.config.compose import compose
    from fairexp.config.validate import problems

    text = (CHECKOUT / "scripts" / "quickstart").read_text()
    lines = re.findall(r"fairexp train ([^#)\n]*)", text)
    assert len(lines) == 3
    for line in lines:
        assert problems(compose(line.split()), 0, [], tmp_path) == []


@pytest.mark.parametrize(
    "script", sorted(path.name for path in (CHECKOUT / "scripts/faults").iterdir() if path.is_file())
)
def test_the_long_fault_runs_say_what_they_take(script: str, environment: dict[str, str]) -> None:
    """They are seldom run; here at least their imports are."""
    command = [sys.executable, str(CHECKOUT / "scripts/faults" / script), "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")
