"""Runs by what a person calls them: a folder, a name, an id, the beginning of one, a sweep, or a job of the scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fairexp.config.nearest import nearest
from fairexp.config.rundir import RunDir
from fairexp.errors import UserError
from fairexp.runs.state import states
from fairexp.runs.sweeps import SweepDir, sweeps


def runs(runs_dir: Path) -> list[RunDir]:
    """The runs of a folder, oldest first."""
    found = [RunDir(path.parent) for path in runs_dir.glob("*/status.json") if not path.parent.name.startswith(".")]
    return sorted(found, key=lambda run: run.status().get("created", 0.0))


def find(what: str, runs_dir: Path) -> RunDir:
    """The run of that folder, folder name, id, name or job; UserError where there is none or several."""
    matches, _ = find_all(what, runs_dir)
    if len(matches) > 1:
        raise UserError(f"{what}: several runs: {', '.join(run.path.name for run in matches)}")
    return matches[0]


def find_all(what: str, runs_dir: Path) -> tuple[list[RunDir], SweepDir | None]:
    """The runs of that name, and the sweep where it names one. UserError where there is none, or a prefix fits several."""
    path = Path(what)
    if (path / "status.json").is_file():
        return [RunDir(path.absolute())], None
    if (path / "sweep.json").is_file():
        sweep = SweepDir(path.absolute())
        return sweep.runs(), sweep
    known, known_sweeps = runs(runs_dir.absolute()), sweeps(runs_dir.absolute())
    for fits in (lambda name: name == what, lambda name: name.startswith(what)):
        found = [run for run in known if fits(run.path.name) or fits(run.id)]
        found_sweeps = [sweep for sweep in known_sweeps if fits(sweep.name)]
        if len(found) + len(found_sweeps) > 1:
            names = [sweep.path.name for sweep in found_sweeps] + [run.path.name for run in found]
            raise UserError(f"{what}: several runs: {', '.join(names[:12])}{' ...' if len(names) > 12 else ''}")
        if found_sweeps:
            return found_sweeps[0].runs(), found_sweeps[0]
        if found:
            return found, None
    if found := of_job(what, known):
        return found, None
    names = [*(run.path.name for run in known), *(sweep.name for sweep in known_sweeps)]
    raise UserError(f"{what}: no such run in {runs_dir}{nearest(what, names)}")


def of_job(job: str, known: Sequence[RunDir]) -> list[RunDir]:
    """The runs that a job of the scheduler runs or ran: of an array, all of them, or the one of `123_4`."""
    if not job.replace("_", "").isdigit():
        return []
    now = states(known)
    jobs = {run.path: now[run.path].job or run.status().get("job_id") or "" for run in known}
    return [run for run in known if jobs[run.path] == job or jobs[run.path].partition("_")[0] == job]
