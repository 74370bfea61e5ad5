"""Sweeps on a real Slurm: frozen when they are submitted, asked for again without harm, the same on many nodes as on one."""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest


def rows(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> dict[int, float]:
    """The training losses by step."""
    return {row["step"]: row["train/loss"] for row in rows(run) if "train/loss" in row}


def state(run: Path) -> str:
    return json.loads((run / "status.json").read_text())["state"]


MINE = ("train", "--config-dir", "configs", "experiment=mine", "launcher=slurm", "trainer.max_steps=20")


def test_two_nodes_with_two_ranks_each_train_as_four_ranks_of_one_machine(project: Any, cluster: Any) -> None:
    vit = [
        "experiment=vit_digits",
        "trainer.max_steps=12",
        "trainer.log_every=1",
        "trainer.eval_every=6",
        "tracker=none",
    ]
    vit += ["strategy=fsdp", "trainer.device=cpu", "model.width=32", "model.depth=2"]
    nodes = ["launcher=slurm", "launcher.nodes=2", "launcher.num_processes=2"]
    submitted = project.fairexp("train", *vit, *nodes, "--follow")
    assert submitted.returncode == 0, submitted.stderr
    run = project.run
    assert project.status()["hosts"] == list(cluster.nodes[:2])
    assert sorted(path.name for path in (run / "logs").iterdir()) == [f"rank_{rank}.attempt_1.log" for rank in range(4)]
    threads = ["launcher.num_processes=4", "launcher.threads_per_process=1"]
    local = project.fairexp("train", *vit, *threads, "runs_dir=local")
    assert local.returncode == 0, local.stderr
    other = project.path / "local" / run.name  # the same id: where it runs is not the experiment
    assert losses(run).keys() == losses(other).keys() == set(range(1, 13))
    assert losses(run) == pytest.approx(losses(other), rel=1e-6)


def test_what_was_submitted_runs_whatever_is_edited_afterwards(project: Any, cluster: Any) -> None:
    nets = (project.path / "mypaper" / "nets.py").read_text()
    project.write("mypaper/nets.py", nets + "\nprint('edited before', flush=True)\n")
    project.write("untracked.py", "X = 1\n")
    for seed, lr in ((1, 0.01), (2, 0.01), (3, 0.02)):
        done = project.fairexp(*MINE, "+launcher.sbatch.hold=true", f"seed={seed}", f"optimizer.lr={lr}")
        assert done.returncode == 0, done.stderr
    jobs = [line.split()[0] for line in cluster.squeue()]
    assert [cluster.show(job)["JobState"] for job in jobs] == ["PENDING"] * 3
    (project.path / "configs/experiment/mine.yaml").unlink()
    project.write("configs/model/mynet.yaml", "_target_: mypaper.nets.MyNet\nwidth: 999\n")
    project.write("mypaper/nets.py", "print('edited in the queue', flush=True)\n1 / 0\n")
    (project.path / "untracked.py").unlink()
    for job in jobs:
        cluster.release(job)
    cluster.wait(lambda: not cluster.squeue(), 60, "the jobs have ended")
    assert [project.status(run)["state"] for run in project.runs] == ["finished"] * 3
    for run, lr in zip(project.runs, (0.01, 0.01, 0.02), strict=True):
        log = (run / "logs" / "rank_0.attempt_1.log").read_text()
        assert "edited before" in log
        assert "edited in the queue" not in log
        assert f"lr: {lr}" in (run / "config.yaml").read_text()
        assert "edited before" in (run / "code" / "uncommitted.patch").read_text()
        assert (run / "code" / "commit.txt").read_text() == project.git("rev-parse", "HEAD")
        assert (Path((run / "code" / "snapshot.txt").read_text().strip()) / "repo" / "untracked.py").is_file()


COUNTS = """
import os
from mypaper.nets import MyNet


class Counts(MyNet):
    # a line for each time that a run really starts
    def __init__(self, side: int = 8, width: int = 16, num_classes: int = 10, breaks: bool = False):
        with open(os.environ["COUNTER"], "a") as file:
            file.write(f"{width}\\n")
        if breaks and not os.path.exists(os.environ["COUNTER"] + ".mended"):
            raise ValueError("broken as asked")
        super().__init__(side, width, num_classes)
"""
# sbatch that kills the submitter after its third submission, and a cluster that takes no arrays
KILLS = """#!/bin/sh
"{real}" "$@"; code=$?
case "$*" in *--test-only*) exit $code;; esac
echo x >> "{count}"
[ "$(wc -l < "{count}")" != 3 ] || kill -9 "$PPID"
exit $code
"""
NO_ARRAYS = """#!/bin/sh
case "$*" in "show config") echo "MaxArraySize = 1";; *) exec "{real}" "$@";; esac
"""


@pytest.fixture
def counting(project: Any) -> Any:
    """The project with a model that counts its starts."""
    project.write("mypaper/counts.py", COUNTS)
    project.write(
        "configs/model/counts.yaml", "_target_: mypaper.counts.Counts\nwidth: 16\nnum_classes: 10\nbreaks: false\n"
    )
    project.env["COUNTER"] = str(project.path / "runs.counter")
    return project


def starts(project: Any) -> list[str]:
    """The widths of the models that were made, in order."""
    counter = Path(project.env["COUNTER"])
    return counter.read_text().split() if counter.exists() else []


def shims(project: Any, tmp_path: Path, **scripts: str) -> dict[str, str]:
    """A PATH on which these programs stand in front of Slurm's own, which they call."""
    folder = tmp_path / "shims"
    folder.mkdir()
    for name, text in scripts.items():
        (folder / name).write_text(text.format(real=shutil.which(name), count=tmp_path / "count"))
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


@pytest.mark.alone
def test_a_sweep_whose_submitter_is_killed_has_each_job_once(counting: Any, cluster: Any, tmp_path: Path) -> None:
    widths = ",".join(map(str, range(1, 12)))
    line = [*MINE, "-m", "model=counts", "sweep.name=twelve"]
    asked = [*line, f"model.width={widths},99"]
    path = shims(counting, tmp_path, sbatch=KILLS, scontrol=NO_ARRAYS)
    killed = counting.fairexp(*asked, env=path)
    assert killed.returncode == -signal.SIGKILL
    assert len((tmp_path / "count").read_text().split()) == 3
    again = counting.fairexp(*asked)
    assert again.returncode == 0, again.stderr
    assert "9 submitted" in again.stderr
    cluster.wait(lambda: not cluster.squeue(), 120, "the jobs have ended")
    assert sorted(starts(counting), key=int) == [*map(str, range(1, 12)), "99"]
    assert len(counting.runs) == 12
    assert {state(run) for run in counting.runs} == {"finished"}

    began = time.monotonic()
    once_more = counting.fairexp(*asked)
    assert time.monotonic() - began < 3
    assert (once_more.returncode, "12 finished" in once_more.stderr) == (0, True)
    assert cluster.squeue() == []
    assert len(starts(counting)) == 12

    # a value more, held in the queue, and gone again
    more = counting.fairexp(*line, f"model.width={widths},99,100,101", "+launcher.sbatch.hold=true")
    assert "2 submitted" in more.stderr, more.stderr
    assert [line.split()[1] for line in cluster.squeue()] == ["PENDING"] * 2
    kept = counting.fairexp(*line, f"model.width={widths},99,100", "+launcher.sbatch.hold=true")
    assert "1 earlier runs are not asked for any more; --prune cancels them" in kept.stderr
    assert len(cluster.squeue()) == 2
    pruned = counting.fairexp(*line, f"model.width={widths},99,100", "+launcher.sbatch.hold=true", "--prune")
    assert pruned.returncode == 0, pruned.stderr
    cluster.wait(lambda: len(cluster.squeue()) == 1, 10, "one job is cancelled")
    states = {re.search(r"width: (\d+)", (run / "config.yaml").read_text())[1]: state(run) for run in counting.runs}
    assert {width: state for width, state in states.items() if state != "finished"} == {
        "100": "queued",
        "101": "cancelled",
    }


def test_retry_failed_submits_the_failed_run_alone(counting: Any, cluster: Any) -> None:
    line = [*MINE, "-m", "model=counts", "model.width=5,6", "model.breaks=true,false"]
    first = counting.fairexp(*line, "--follow")
    assert first.returncode == 1
    cluster.wait(lambda: not cluster.squeue(), 30, "the jobs have ended")
    assert sorted(starts(counting)) == ["5", "5", "6", "6"]
    again = counting.fairexp(*line)
    assert "2 failed, 2 finished" in again.stderr
    assert "--retry-failed submits" in again.stderr
    Path(counting.env["COUNTER"] + ".mended").touch()
    retried = counting.fairexp(*line, "--retry-failed", "--follow")
    assert retried.returncode == 0, retried.stderr
    assert "2 submitted" in retried.stderr
    assert len(starts(counting)) == 6
    assert {state(run) for run in counting.runs} == {"finished"}
    assert sorted(counting.status(run)["attempts"] for run in counting.runs) == [1, 1, 2, 2]


def test_a_sweep_with_four_broken_jobs_names_them_and_submits_nothing(project: Any, cluster: Any) -> None:
    project.write(
        "configs/model/argument.yaml", "_target_: mypaper.nets.MyNet\nside: 8\nwidht: 16\nwidth: 16\nnum_classes: 10\n"
    )
    project.write("configs/model/open.yaml", "_target_: mypaper.nets.MyNet\nside: 8\nwidth: ???\nnum_classes: 10\n")
    project.write("configs/model/absent.yaml", "_target_: mypaper.absent.Net\nwidth: 16\n")
    uneven = "# @package _global_\ndefaults:\n  - mine\ntrainer:\n  global_batch_size: 83\n"
    project.write("configs/experiment/uneven.yaml", uneven)
    project.write(
        "configs/sweep/five.yaml",
        "overrides: [launcher=slurm, launcher.num_processes=2, strategy=ddp]\n"
        "runs: [[experiment=mine], [experiment=mine, model=argument], [experiment=mine, model=open],\n"
        "       [experiment=mine, model=absent], [experiment=uneven]]\n",
    )
    done = project.fairexp("train", "--config-dir", "configs", "sweep=five")
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert len(lines) == 4, done.stderr
    for file, line, problem, label in (
        ("model/argument.yaml", 3, "MyNet takes no 'widht'; nearest: width", "model=argument"),
        ("model/open.yaml", 3, "model.width", "model=open"),
        ("model/absent.yaml", 1, "mypaper.absent", "model=absent"),
        ("experiment/uneven.yaml", 5, "83 is not a multiple of 2 processes", "experiment=uneven"),
    ):
        (said,) = (text for text in lines if f"{file}:{line}" in text)
        assert problem in said
        assert said.endswith(f"{label}]")
    assert not project.runs_dir.exists()

    # what only Slurm can know is asked before anything is made, too
    refused = project.fairexp(*MINE, "-m", "seed=1,2", "launcher.partition=nosuch")
    assert refused.returncode == 2
    assert "sbatch would refuse the job: invalid partition specified: nosuch" in refused.stderr
    assert project.runs == []
    assert [path for name in ("submissions", "sweeps") for path in (project.runs_dir / name).iterdir()] == []
    assert cluster.squeue() == []
