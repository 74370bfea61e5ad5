"""The verbs `cancel` and `requeue`: ends runs and starts them again, wherever they live."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence

from fairexp.config.rundir import RunDir
from fairexp.launch import slurm
from fairexp.runs.state import LIVE, OVER, State, alive, states, submission
from fairexp.runs.sweeps import SweepDir


def cancel(runs: Sequence[RunDir]) -> list[RunDir]:
    """Ends the queued and running ones among the runs, for good; those that it ended. A running one saves first."""
    found = states(runs)
    ended = [run for run in runs if found[run.path].word in LIVE]
    jobs: list[str] = []
    for run in ended:
        run.set_status(cancel=True)  # read by the job when its ranks have stopped, by a pool before it starts the run
    for run in ended:
        state = found[run.path]
        if run.status()["state"] in OVER:
            continue  # it has ended meanwhile
        if state.kind == "slurm":
            if state.job:
                jobs.append(state.job)
            if state.word == "queued":
                run.set_status(state="cancelled", job_id=state.job)
        else:
            _end_here(run, state)
    if jobs:
        slurm.cancel(jobs)
    return ended


def cancel_search(sweep: SweepDir) -> None:
    """Ends a search's slots, also those that have no run yet; the runs themselves are `cancel`led first."""
    jobs: list[str] = []
    for uid in sweep.search().get("submissions", []):
        record = submission(sweep.runs_dir, uid) or {}
        if record.get("kind") == "slurm" and record["job_id"]:
            jobs.append(record["job_id"])
        elif alive(record.get("pid"), record.get("started")):
            os.kill(record["pid"], signal.SIGTERM)
    if jobs:
        slurm.cancel(jobs)


def _end_here(run: RunDir, state: State) -> None:
    pid = run.status().get("pid")
    if state.word == "running" and pid:
        try:
            os.kill(pid, signal.SIGTERM)
        except ProcessLookupError:
            run.set_status(state="cancelled")
    else:
        run.set_status(state="cancelled")


def requeue(runs: Sequence[RunDir]) -> tuple[list[RunDir], list[str]]:
    """Stops running jobs of Slurm and puts them back into the queue, where they go on from what they saved.

    Those that it did, and what was refused.
    """
    found = states(runs)
    done, refused = [], []
    for run in runs:
        state = found[run.path]
        if state.kind != "slurm" or state.word not in LIVE or not state.job:
            again = "the same `fairexp train` command starts it again"
            refused.append(f"{run.path.name} is {state.word}, not in Slurm's queue: {again}")
            continue
        record = submission(run.path.parent, run.status().get("submission") or "")
        assert record is not None
        if state.word == "queued" or slurm.ask("scontrol", "requeue", state.job, fails="no") != "no":
            done.append(run)
        else:
            refused.append(f"{run.path.name}: scontrol requeue {state.job} was refused")
    return done, refused
