"""The verb `train`: compose, validate, freeze, launch, follow."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fairexp.config import rundir, schema
from fairexp.config.attempt import last
from fairexp.config.compose import compose
from fairexp.config.identity import run_id
from fairexp.config.manifest import committed
from fairexp.config.rundir import RunDir
from fairexp.config.validate import problems
from fairexp.errors import DONE, FAILED, UserError
from fairexp.launch import slurm, snapshot, submission, submit, sweep
from fairexp.launch.follow import ENDED, follow, watch
from fairexp.runs.state import LIVE, states
from fairexp.runs.table import describe


def train(
    overrides: Sequence[str],
    config_dirs: Sequence[Path],
    config_name: str,
    trusted: Sequence[str],
    fresh: bool,
    as_json: bool,
    follows: bool = False,
    dry_run: bool = False,
) -> int:
    """Runs the experiment that the overrides name, or resumes it; the run's exit code. On Slurm it returns once the run is
    queued, unless `follows`."""
    composed = compose(overrides, config_dirs, config_name)
    here = Path.cwd()
    trusted = [*trusted, *packages_in(here)]
    if found := problems(composed, len(submit.visible_gpus()), trusted, here):
        raise UserError(*found)
    config = composed.config
    launcher = schema.launcher_of(config)
    on_slurm = isinstance(launcher, schema.Slurm)
    if dry_run:
        planned = sweep.job(composed, trusted, here, path=folder(config, fresh))
        return sweep.dry_run(config["name"], [planned], as_json)
    if on_slurm and not slurm.available():
        raise UserError("launcher=slurm: there is no sbatch on this machine's PATH")
    owner = None if on_slurm else os.getpid()
    launch = submit.plan(launcher, config["trainer"]["device"], owner, trusted, sys_path=[str(here)])
    path = folder(config, fresh)
    command = shlex.join(["fairexp", *sys.argv[1:]])
    with submission.submitting(path.parent) as lock:
        goes_on = there_already(path, on_slurm)
        attempt = last(path) + 1  # the job takes it as soon as it begins
        if not goes_on and isinstance(launcher, schema.Slurm):
            wanted = submission.Wanted(path, config, command, launch)
            if not to_slurm(wanted, launcher, here, lock):
                return FAILED
        elif not goes_on:
            start_here(path, config, command, launch, here)
            if launcher.kind == "local":
                submit.submit(RunDir(path))
    run_dir = RunDir(path)
    if on_slurm and follows:
        watch(run_dir)  # Ctrl-C only stops the showing
    elif not goes_on and launcher.kind == "inline":
        submit.run_inline(run_dir)
    elif not goes_on and launcher.kind == "local":
        follow(run_dir, attempt)
    return report(run_dir, as_json)


def there_already(path: Path, on_slurm: bool) -> bool:
    """Whether the run has finished or goes on, in words; UserError where it goes on on this machine."""
    run_dir = RunDir(path)
    if not (path / "status.json").exists():
        return False
    uid = run_dir.status().get("submission")
    submission.recover(path.parent, [uid] if uid else [])
    now = states([run_dir], settled=True)[path]
    if now.word == "finished":
        say(f"{path} has finished; --fresh runs it anew")
        return True
    if now.word in LIVE and not on_slurm:
        raise UserError(f"{path} is {now.word}: job {now.job} on {run_dir.status().get('host', 'this machine')}")
    if now.word in LIVE:
        say(f"{path} is {now.word} already: job {now.job}")
        return True
    if run_dir.status()["attempts"]:
        saved = list(committed(run_dir.checkpoints))
        say(f"resuming after step {saved[-1]}" if saved else "starting again: there is no checkpoint")
    return False


def to_slurm(wanted: submission.Wanted, launcher: schema.Slurm, here: Path, lock: int) -> bool:
    """Submits the one run; whether Slurm took it."""
    path = wanted.path
    taken = snapshot.take(path.parent, here, launcher.snapshot_max_mb, launcher.snapshot_exclude)
    for line in taken.left_out:
        say(f"left out of the snapshot: {line}")
    batches = submission.batches([wanted])
    if not submission.to_slurm(path.parent, wanted.config["name"], batches, taken, lock):
        return False
    run_id = RunDir(path).id
    say(f"{path}: job {batches[0].job_id}; fairexp watch {run_id} shows it, fairexp cancel {run_id} ends it")
    return True


def start_here(path: Path, config: Mapping[str, Any], command: str, launch: Mapping[str, Any], here: Path) -> None:
    """Makes the run's folder, or readies it for another attempt on this machine: it imports the code as it stands."""
    code = code_state(here)
    if (path / "status.json").exists():
        submission.again(RunDir(path), config, launch, code, submission=None)
    else:
        try:
            rundir.create(path, config, command, launch, code)
        except OSError as error:
            raise UserError(f"runs_dir: can't make {path}: {error.strerror}") from error
    say(f"{path}  ({launch['num_processes']} x {launch['threads']} CPU thread{'s' if launch['threads'] > 1 else ''})")


def folder(config: Mapping[str, Any], fresh: bool) -> Path:
    """The run's folder; with `fresh`, the first free one beside it."""
    path = Path(config["runs_dir"]).expanduser().absolute() / f"{config['name']}-{run_id(config)}"
    number = 1
    while fresh and path.exists():
        number += 1
        path = path.with_name(f"{config['name']}-{run_id(config)}.{number}")
    return path


def report(run_dir: RunDir, as_json: bool) -> int:
    """Says how the run stands; the exit code of that state."""
    status, summary = run_dir.status(), run_dir.summary()
    if as_json:
        result = {
            "run_dir": str(run_dir.path),
            "id": run_dir.id,
            "state": status["state"],
            "step": status["step"],
            "metrics": (summary or {}).get("final", {}),
        }
        print(json.dumps(result))
    else:
        say(describe(run_dir))
    return ENDED.get(status["state"], DONE)


def packages_in(folder: Path) -> list[str]:
    """The packages and modules that lie in the working folder: the user runs that folder's code, so configs may name it."""
    return [
        path.stem
        for path in folder.iterdir()
        if path.stem.isidentifier()
        and path.stem not in sys.stdlib_module_names
        and (path.suffix == ".py" or (path.is_dir() and any(path.glob("*.py"))))
    ]


def code_state(folder: Path) -> dict[str, str]:
    """The commit of the user's repository and the patch of what isn't committed; {} outside a repository."""

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], cwd=folder, capture_output=True, text=True, errors="surrogateescape", timeout=30
        )
        return done.stdout if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "HEAD")
        return {"commit.txt": commit, "uncommitted.patch": git("diff", "HEAD")} if commit else {}
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return {}


def say(text: str) -> None:
    """Human words go to stderr."""
    print(text, file=sys.stderr, flush=True)
