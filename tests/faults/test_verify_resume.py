"""`fairexp verify-resume` names what a training forgets, and `fairexp checkpoints` what is damaged."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Fairexp, Tiny

HERE = Path(__file__).parent
# what it says of each case of forgetful.py
NAMED = {
    "optimizer": "optimizer step of head.weight (after the restart, step 3, rank 0)",
    "generator": "generator torch (after the restart, step 3, rank 0)",
    "weight": "weight head.bias (after the restart, step 3, rank 0)",
    "average": "average layers.0.weight (after the restart, step 3, rank 0)",
    "loss scale": "loss scale (after the restart, step 3, rank 0)",
    "best": "best metrics (after the restart, step 3, rank 0)",
    "buffer": "buffer outside the state dict seen (after the restart, step 3, rank 0); it was registered with persistent=False",
    "attribute": "model attribute calls (after the restart, step 3, rank 0); plain attributes are not saved: make it a buffer",
    "own generator": "augment attribute draw (after the restart, step 3, rank 0); an augmentation gets a seed for each sample",
    "global generator": "batch of step 4, micro batch 1, on rank 0; an augmentation or data set draws from a generator",
    "clock": "loss of step 1, micro batch 1, on rank 0 (before the kill); the forward pass depends on something",
}


@pytest.fixture(scope="module")
def said(environment: dict[str, str]) -> dict[str, tuple[int, str]]:
    command = [sys.executable, str(HERE / "forgetful.py")]
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_training_that_forgets_nothing_passes(said: dict[str, tuple[int, str]]) -> None:
    code, output = said["nothing"]
    assert (code, "resumes bit for bit: 146 states, 12 batches and losses, 33 metrics" in output) == (0, True), output


@pytest.mark.parametrize("case", NAMED)
def test_a_state_that_is_forgotten_is_named(said: dict[str, tuple[int, str]], case: str) -> None:
    code, output = said[case]
    assert code == 1, output
    assert f"does not resume bit for bit: {NAMED[case]}" in output


def test_a_generator_that_was_not_saved_is_named(said: dict[str, tuple[int, str]]) -> None:
    code, output = said["generator not saved"]
    assert code == 1, output
    assert "step_00000003: has no state of rank 0's generators of torch" in output


def test_it_is_a_verb(fairexp: Fairexp, tmp_path: Path) -> None:
    words = ("model=mlp", "model.hidden=[16]", "strategy=fsdp", "launcher.num_processes=2", "trainer.device=cpu")
    ended = fairexp("verify-resume", *words, "--steps", "2", f"runs_dir={tmp_path}", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "mlp_digits: resumes bit for bit" in ended.stdout
    assert list(tmp_path.iterdir()) == []
    refused = fairexp("verify-resume", "launcher=slurm")
    assert (refused.returncode, refused.stderr) == (
        2,
        "fairexp: launcher=slurm: verify-resume runs on this machine; say launcher=local\n",
    )


def test_checkpoints_lists_and_verifies(tiny: Tiny, fairexp: Fairexp, tmp_path: Path) -> None:
    run = tmp_path / tiny("fsdp2").path.name
    shutil.copytree(tiny("fsdp2").path, run)
    whole = fairexp("checkpoints", str(run))
    assert whole.returncode == 0, whole.stderr
    assert [line.split(",")[0] for line in whole.stdout.splitlines()] == ["step 10: whole", "step 20: whole"]
    assert "FSDP on 2 x cpu" in whole.stdout
    assert "eval/loss" in whole.stdout
    file = run / "checkpoints/step_00000020/rank_00001.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    damaged = fairexp("checkpoints", str(run))
    assert damaged.returncode == 1
    assert damaged.stdout.splitlines()[1] == f"step 20: DAMAGED, {file}: its digest differs"
    assert fairexp("checkpoints", str(run), "--quick").returncode == 0  # sizes only
    listed = json.loads(fairexp("checkpoints", str(run), "--json").stdout)
    assert [(one["step"], bool(one["damage"])) for one in listed["checkpoints"]] == [(10, False), (20, True)]
