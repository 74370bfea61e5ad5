"""A thousand runs on a real Slurm that takes arrays of a hundred, and a search whose trials are an array's elements."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

COUNT = 1000
GRID = (
    *("train", "--config-dir", "configs", "experiment=mine", "-m", "launcher=slurm", "sweep.name=many"),
    *("optimizer.lr=1e-2,1e-3", f"seed=range(0,{COUNT // 2})", "+launcher.sbatch.hold=true"),
)


def test_a_thousand_runs_are_submitted_each_once_in_arrays_that_the_cluster_takes(
    project: Any, cluster: Any, tmp_path: Path
) -> None:
    calls = tmp_path / "calls"
    (shims := tmp_path / "shims").mkdir()
    real = subprocess.run(["which", "sbatch"], capture_output=True, text=True, check=True).stdout.strip()
    (shims / "sbatch").write_text(f'#!/bin/sh\necho "$*" >> {calls}\nexec {real} "$@"\n')
    (shims / "sbatch").chmod(0o755)
    done = project.fairexp(*GRID, env={"PATH": f"{shims}:{os.environ['PATH']}"})
    assert done.returncode == 0, done.stderr
    assert "1000 runs: 1000 submitted" in done.stderr
    submissions = [line for line in calls.read_text().splitlines() if "--test-only" not in line]
    assert len(submissions) == 10  # arrays of 101 at most
    elements = [line.split()[0] for line in cluster.squeue()]
    assert len(elements) == len(set(elements)) == COUNT

    # each element is another run, and all of the grid's runs are there
    records = [json.loads(path.read_text()) for path in (project.runs_dir / "submissions").glob("*/submission.json")]
    runs = {f"{record['job_id']}_{index}": run for record in records for index, run in enumerate(record["runs"])}
    assert set(runs) == set(elements)
    assert len(set(runs.values())) == COUNT == len(project.runs)

    table = project.fairexp("list", "many")
    assert table.stdout.count("queued") == COUNT
    assert "seed=499" in table.stdout
    again = project.fairexp(*GRID)
    assert "1000 runs: 1000 queued" in again.stderr
    assert len(cluster.squeue()) == COUNT
    # by job: one element, and the whole array
    one = elements[0]
    assert json.loads(project.fairexp("show", one, "--json").stdout)["run_dir"] == runs[one]
    assert "1 of 1 runs cancelled" in project.fairexp("cancel", one).stderr
    array = one.partition("_")[0]
    left = sum(element.startswith(f"{array}_") for element in elements) - 1
    assert f"{left} of {left + 1} runs cancelled" in project.fairexp("cancel", array).stderr
    ended = project.fairexp("cancel", "many")
    assert f"{COUNT - left - 1} of {COUNT} runs cancelled" in ended.stderr, ended.stderr
    cluster.wait(lambda: not cluster.squeue(), 60, "an empty queue")


def test_never_more_runs_at_once_than_max_parallel_over_several_arrays(project: Any, cluster: Any) -> None:
    words = ("launcher.max_parallel=3", "seed=range(0,6)", "trainer.max_steps=2", "model.delay_s=0.3")
    line = [word for word in GRID if not word.startswith(("seed", "sweep", "optimizer", "+launcher"))]
    for lr in (0.1, 0.2):  # the second meets the first's array in the queue
        done = project.fairexp(*line, *words, f"optimizer.lr=choice({lr})", "sweep.name=few")
        assert done.returncode == 0, done.stderr
    most = 0

    def over() -> bool:
        nonlocal most
        states = [line.split()[1] for line in cluster.squeue()]
        most = max(most, sum(state in ("RUNNING", "COMPLETING") for state in states))
        return not states

    cluster.wait(over, 120, "all have run")
    assert most == 3
    assert [project.status(run)["state"] for run in project.runs] == ["finished"] * 12


def test_a_search_goes_on_from_its_journal_and_takes_no_more_slots_than_asked(project: Any, cluster: Any) -> None:
    line = [
        "train",
        "--config-dir",
        "configs",
        "experiment=mine",
        "trainer.max_steps=5",
        "launcher=slurm",
        "sweep.name=tuned",
    ]
    line += [
        "optimizer.lr=tag(log,interval(1e-4,1e-1))",
        "model.width=8,16",
        "sweep.sampler=tpe",
        "sweep.metric=eval/loss",
    ]
    first = project.fairexp(*line, "sweep.num_trials=4", "launcher.max_parallel=2", "--follow")
    assert first.returncode == 0, first.stderr
    cluster.wait(lambda: not cluster.squeue(), 30, "an empty queue")
    folder = project.runs_dir / "sweeps" / "tuned"
    trials = [json.loads(path.read_text()) for path in sorted((folder / "trials").iterdir())]
    assert [trial["number"] for trial in trials] == [0, 1, 2, 3]
    assert len({trial["run"] for trial in trials}) == 4
    assert {project.status(run)["state"] for run in project.runs} == {"finished"}

    again = project.fairexp(*line, "sweep.num_trials=4")
    assert "4 trials: 4 finished" in again.stderr
    assert cluster.squeue() == []
    more = project.fairexp(*line, "sweep.num_trials=6", "--follow")
    assert "2 submitted" in more.stderr
    cluster.wait(lambda: not cluster.squeue(), 30, "an empty queue")

    held = project.fairexp(*line, "sweep.num_trials=9", "+launcher.sbatch.hold=true")
    assert "3 submitted" in held.stderr
    assert len(cluster.squeue()) == 3
    assert project.fairexp("cancel", "tuned").returncode == 0
    cluster.wait(lambda: not cluster.squeue(), 30, "trials without a run are cancelled too")

    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    study = optuna.load_study(
        study_name="search", storage=JournalStorage(JournalFileBackend(str(folder / "optuna.journal")))
    )
    results = {trial.number: trial.value for trial in study.get_trials()}
    assert sorted(results) == list(range(6))
    for path in (folder / "trials").iterdir():
        trial = json.loads(path.read_text())
        summary = json.loads((project.runs_dir / trial["run"] / "summary.json").read_text())
        assert results[trial["number"]] == summary["final"]["eval/loss"]
        lr = study.get_trials()[trial["number"]].params["optimizer.lr"]
        assert f"lr: {lr}" in (project.runs_dir / trial["run"] / "config.yaml").read_text()
    assert len({trial.params["optimizer.lr"] for trial in study.get_trials()}) == 6
