"""Hands runs over to Slurm or to the local pool, so that a submitter killed at any point leaves nothing lost or doubled.

A submission is a folder RUNS_DIR/submissions/UID. Its record is written first, with the list of its runs; then the run
folders, which name it; then the scheduler is asked; then the record gets the job's id. Whoever comes after a killed
submitter finds the job of a record without an id by its name, which holds the UID; and a run whose submission has no job
was never submitted.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fairexp.config import rundir, schema
from fairexp.config.identity import identity
from fairexp.config.rundir import RunDir, as_yaml, write_atomically
from fairexp.errors import UserError
from fairexp.launch import slurm
from fairexp.launch.snapshot import Snapshot
from fairexp.runs.state import submission, submissions


@dataclass(frozen=True)
class Wanted:
    """A run to be submitted: its folder, which may exist, and what goes into it."""

    path: Path
    config: Mapping[str, Any]
    command: str
    launch: dict[str, Any]

    @property
    def launcher(self) -> schema.Launcher:
        return schema.launcher_of(self.config)


@dataclass
class Batch:
    """Runs that are handed over together: one array, or one pool. Behind them `slots` for trials of a search, which find out
    when they start what they run, and ask for what `like` asks for."""

    runs: list[Wanted]
    slots: int = 0
    like: Wanted | None = None
    uid: str = field(default_factory=lambda: f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}")
    job_id: str | None = None

    @property
    def first(self) -> Wanted:
        return self.like or self.runs[0]

    @property
    def size(self) -> int:
        return len(self.runs) + self.slots


@contextmanager
def submitting(runs_dir: Path) -> Iterator[int]:
    """One submitter at a time looks at a folder of runs and adds to it; the lock's descriptor."""
    try:
        runs_dir.mkdir(parents=True, exist_ok=True)
        file = open(runs_dir / ".lock", "w")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"runs_dir: can't make {runs_dir}: {error.strerror}") from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def batches(wanted: Sequence[Wanted], slots: int = 0, like: Wanted | None = None) -> list[Batch]:
    """The runs by what they ask of the scheduler, none longer than an array may be; then the slots."""
    groups: dict[str, list[Wanted]] = {}
    for run in wanted:
        shape = json.dumps([run.config["launcher"], run.launch["num_processes"]], sort_keys=True)
        groups.setdefault(shape, []).append(run)
    on_slurm = any(run.launcher.kind == "slurm" for run in (*wanted, *([like] if like else [])))
    most = slurm.max_array_size() if on_slurm else len(wanted) + slots
    found = [Batch(group[at : at + most]) for group in groups.values() for at in range(0, len(group), most)]
    return found + [Batch([], min(most, slots - at), like) for at in range(0, slots, most)]


def record(runs_dir: Path, name: str, batch: Batch, more: Mapping[str, Any]) -> Path:
    """Writes the submission's record; its folder."""
    folder = submissions(runs_dir) / batch.uid
    folder.mkdir(parents=True)
    content = {
        "uid": batch.uid,
        "kind": batch.first.launcher.kind,
        "name": name,
        "created": time.time(),
        "runs": [str(run.path) for run in batch.runs],
        "slots": batch.slots,
        "array": batch.size > 1,
        "job_id": None,
        **more,
    }
    write_atomically(folder / "submission.json", json.dumps(content, indent=1) + "\n")
    return folder


def amend(runs_dir: Path, uid: str, **changes: Any) -> None:
    """Changes keys of a submission's record."""
    content = submission(runs_dir, uid)
    assert content is not None
    write_atomically(submissions(runs_dir) / uid / "submission.json", json.dumps(content | changes, indent=1) + "\n")


def ready(batch: Batch, snapshot: Snapshot, folder: Path, runs: Sequence[Wanted] | None = None) -> None:
    """Makes the run folders of the batch, or of some of its runs; readies those that exist for another attempt."""
    code: dict[str, str | Path] = {"snapshot.txt": f"{snapshot.path}\n"}
    if snapshot.commit:
        patch = folder / "uncommitted.patch"
        if not patch.exists():
            patch.write_text(snapshot.patch, encoding="utf-8", errors="surrogateescape")
        code |= {"commit.txt": f"{snapshot.commit}\n", "uncommitted.patch": patch}
    for run in batch.runs if runs is None else runs:
        launch = {**run.launch, "sys_path": snapshot.import_paths, "snapshot": snapshot.id}
        if (run.path / "status.json").exists():
            again(RunDir(run.path), run.config, launch, code, submission=batch.uid)
        else:
            rundir.create(run.path, run.config, run.command, launch, code, submission=batch.uid)


def again(
    run_dir: RunDir,
    config: Mapping[str, Any],
    launch: Mapping[str, Any],
    code: Mapping[str, str | Path],
    **status: Any,
) -> None:
    """Readies the folder for another attempt. The experiment is the frozen one; what doesn't belong to it (processes, tracker,
    logging) may have changed, and the old file is kept."""
    frozen = run_dir.config()
    assert identity(frozen) == identity(config)
    if frozen != config:
        attempts = run_dir.status()["attempts"]
        shutil.copyfile(run_dir.config_file, run_dir.path / f"config.attempt_{attempts}.yaml")
        write_atomically(run_dir.config_file, as_yaml(config))
    write_atomically(run_dir.submit / "launch.json", json.dumps(launch, indent=1) + "\n")
    rundir.write_code(run_dir, code)
    run_dir.set_status(state="queued", job_id=None, pid=None, error=None, failures=0, cancel=False, **status)


def to_slurm(
    runs_dir: Path,
    name: str,
    found: Sequence[Batch],
    snapshot: Snapshot,
    lock: int,
    after: Sequence[str] = (),
    search: str | None = None,
) -> list[Batch]:
    """Submits the batches, each an array; those that have a job then. Those without one met the scheduler's limit.

    `after`: jobs whose runs count against max_parallel. UserError, and nothing is made, where sbatch would refuse one.
    """
    paths = python_path(snapshot)
    folders = [record(runs_dir, name, batch, {"search": search} if search else {}) for batch in found]
    try:
        for batch, folder in zip(found, folders, strict=True):
            write_script(folder, name, batch, paths, batch.first.launcher, None)
        for number, folder in enumerate(folders):
            same = number and found[number].first.config["launcher"] == found[number - 1].first.config["launcher"]
            if not same and (refusal := slurm.check(folder / "job.sh")):
                raise UserError(f"sbatch would refuse the job: {refusal}")
    except UserError:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    earlier = list(after)
    for number, (batch, folder) in enumerate(zip(found, folders, strict=True)):
        launcher = batch.first.launcher
        assert isinstance(launcher, schema.Slurm)
        if launcher.max_parallel and earlier:
            # %N throttles one array: the next waits for it, so that never more than N run
            write_script(folder, name, batch, paths, launcher, f"afterany:{':'.join(earlier)}")
        ready(batch, snapshot, folder)
        try:
            batch.job_id = slurm.submit(folder / "job.sh", job_name(name, batch.uid), [lock])
        except (slurm.LimitReached, UserError) as refusal:
            for rest, its_folder in zip(found[number:], folders[number:], strict=True):
                withdraw(rest, its_folder)
            if isinstance(refusal, UserError):
                raise
            print(f"the scheduler takes no more jobs now: {refusal}", file=sys.stderr)
            break
        amend(runs_dir, batch.uid, job_id=batch.job_id)
        earlier = [batch.job_id] if launcher.max_parallel else []
    return [batch for batch in found if batch.job_id]


def withdraw(batch: Batch, folder: Path) -> None:
    """Takes back a submission that the scheduler refused: what it made anew goes, what was there before is as it was."""
    for run in batch.runs:
        status = RunDir(run.path).status()
        if status.get("submission") == batch.uid and status["attempts"] == 0:
            shutil.rmtree(run.path, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)


def write_script(
    folder: Path,
    name: str,
    batch: Batch,
    paths: Sequence[str],
    launcher: schema.Launcher,
    dependency: str | None,
) -> str:
    """Writes the sbatch script of a batch; its text."""
    assert isinstance(launcher, schema.Slurm)
    text = slurm.script(
        launcher,
        batch.first.launch["num_processes"],
        job_name(name, batch.uid),
        shlex.join([sys.executable, "-P", "-u", "-m", "fairexp.launch.job", str(folder / "submission.json")]),
        folder,
        batch.size if batch.size > 1 else None,
        paths,
        exclude=bad_hosts(batch),
        dependency=dependency,
    )
    (folder / "job.sh").write_text(text, encoding="utf-8")
    return text


def bad_hosts(batch: Batch) -> list[str]:
    """The nodes that a run of the batch failed on twice."""
    bad: set[str] = set()
    for run in batch.runs:
        failed = RunDir(run.path).status().get("failed_hosts") or []
        bad |= {host for host in failed if failed.count(host) > 1}
    return sorted(bad)


def python_path(snapshot: Snapshot) -> list[str]:
    """PYTHONPATH of a job: the frozen code, then what the submitter's own PYTHONPATH has outside the frozen folders."""
    top = snapshot.source
    rest = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    return [*snapshot.import_paths, *(folder for folder in rest if not Path(folder).resolve().is_relative_to(top))]


def job_name(name: str, uid: str) -> str:
    """The scheduler's name of a submission: for people, and unique."""
    return f"{name}.{uid}"


def recover(runs_dir: Path, uids: Sequence[str]) -> None:
    """Completes the records that a killed submitter left without a job's id, where there is such a job after all."""
    for uid in uids:
        content = submission(runs_dir, uid)
        if content and content["kind"] == "slurm" and content["job_id"] is None:
            job_id = slurm.find(job_name(content["name"], uid))
            if job_id:
                amend(runs_dir, uid, job_id=job_id)
