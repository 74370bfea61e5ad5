"""A run goes on as if nothing had happened: on the same processes bit for bit, on others with the same curve."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import Fairexp, Tiny, Trained, interrupted

from fairexp.runtime import dist
from fairexp.runtime.preempt import Stop

WORLDS = ("single", "ddp2", "fsdp2", "fsdp4", "hybrid")
# Long enough to be caught in the middle, with dropout: the generators of every rank must go on where they were.
DROPOUT = ("model.dropout=0.1", "trainer.max_steps=150", "trainer.eval_every=50", "checkpoint.keep_last=2")
# Its batch norms keep statistics that no gradient carries from rank to rank.
BATCH_NORM = ("model=resnet18", "model.depth=18", "model.width=8", "model.stem=small")


def bits(run: Trained) -> dict[int, str]:
    return {step: loss.hex() for step, loss in run.losses.items()}


def checkpoints(run_dir: Path) -> list[str]:
    return sorted(folder.name for folder in (run_dir / "checkpoints").iterdir())


@pytest.mark.parametrize("target", WORLDS)
@pytest.mark.parametrize("source", WORLDS)
def test_a_run_saved_under_any_strategy_resumes_under_any(
    tiny: Tiny, fairexp: Fairexp, tmp_path: Path, source: str, target: str
) -> None:
    uninterrupted = tiny(target)
    path = interrupted(uninterrupted, tmp_path, tiny(source).path / "checkpoints/step_00000010")
    ended = fairexp(*uninterrupted.command, f"runs_dir={tmp_path}")
    assert ended.returncode == 0, ended.stderr
    assert "steps 10 -> 20 (resumed)" in ended.stderr
    resumed = Trained(path, uninterrupted.command)
    assert resumed.steps == list(range(1, 21))
    if source == target:
        assert bits(resumed) == bits(uninterrupted)
    assert resumed.losses == pytest.approx(tiny("single").losses, rel=1e-5)
    assert resumed.evals[20] == pytest.approx(tiny("single").evals[20], rel=1e-5)


def test_the_same_command_with_more_processes_is_the_same_run(tiny: Tiny) -> None:
    assert tiny("fsdp4").path.name == tiny("fsdp2").path.name
    assert len({tiny(world).path.name for world in ("single", "ddp2", "fsdp2", "hybrid")}) == 4


@pytest.mark.parametrize(
    ("strategy", "workers"),
    [("single", 0), ("ddp2", 0), ("fsdp2", 0), ("single", 2)],
    ids=["single", "ddp2", "fsdp2", "workers"],
)
def test_ctrl_c_saves_and_the_same_command_goes_on_bit_for_bit(
    tiny: Tiny, fairexp: Fairexp, environment: dict[str, str], tmp_path: Path, strategy: str, workers: int
) -> None:
    uninterrupted = tiny(strategy, *DROPOUT)
    words = (*uninterrupted.command, f"runs_dir={tmp_path}", f"trainer.num_workers={workers}")
    path = tmp_path / uninterrupted.path.name

    metrics = path / "metrics.jsonl"
    command = [sys.executable, "-m", "fairexp", *words]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE) as process:
        while process.poll() is None and not (metrics.exists() and '"step": 8,' in metrics.read_text()):
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said.decode()
    stopped = Trained(path, words)
    assert 8 <= stopped.steps[-1] < 150
    assert checkpoints(path)[-1] == f"step_{stopped.steps[-1]:08d}"

    ended = fairexp(*words)
    assert ended.returncode == 0, ended.stderr
    resumed = Trained(path, words)
    assert resumed.steps == list(range(1, 151))
    assert bits(resumed) == bits(uninterrupted)
    assert resumed.evals[150] == uninterrupted.evals[150]


def test_only_the_last_checkpoints_are_kept(tiny: Tiny) -> None:
    assert checkpoints(tiny("single", *DROPOUT).path) == ["step_00000140", "step_00000150"]


@pytest.mark.parametrize("overrides", [(), BATCH_NORM], ids=["vit", "batch_norm"])
def test_a_sharded_checkpoint_evaluates_in_one_process_to_what_was_logged(
    tiny: Tiny, fairexp: Fairexp, overrides: tuple[str, ...]
) -> None:
    run = tiny("fsdp2", *overrides)
    ended = fairexp("eval", str(run.path), "--json")
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["metrics"] == pytest.approx(run.evals[20], rel=1e-5)


def test_a_run_that_was_killed_after_its_last_step_still_sums_up(tiny: Tiny, fairexp: Fairexp, tmp_path: Path) -> None:
    uninterrupted = tiny("single")
    path = interrupted(uninterrupted, tmp_path, uninterrupted.path / "checkpoints/step_00000020")
    assert fairexp(*uninterrupted.command, f"runs_dir={tmp_path}").returncode == 0
    there, here = (json.loads((folder / "summary.json").read_text()) for folder in (uninterrupted.path, path))
    assert (here["step"], here["final"], here["best"]) == (20, there["final"], there["best"])


@pytest.mark.parametrize("alone", [False, True])
def test_a_resumed_run_notices_a_signal_at_its_next_step(alone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "alone", lambda: alone)
    monkeypatch.setattr(dist, "max_over_ranks", lambda values: values)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        stop = Stop().listen()
        assert not stop.agreed(100_000)
        for step in (
            range(100_001, 100_020) if alone else ()
        ):  # of quick steps others are asked at the next hundred only
            assert not stop.agreed(step)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed(100_020 if alone else 100_001), "it took the 100,000 steps before its start for quick ones"
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
