"""The verb `train`: compose, validate, freeze, launch, follow."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from fairexp.config import rundir, schema
from fairexp.config.compose import compose
from fairexp.config.identity import identity, run_id
from fairexp.config.rundir import RunDir
from fairexp.config.validate import problems
from fairexp.errors import DONE, UserError
from fairexp.launch import submit
from fairexp.launch.follow import ENDED, follow, job_lives
from fairexp.runs.table import describe


def train(
    overrides: Sequence[str],
    config_dirs: Sequence[Path],
    config_name: str,
    trusted: Sequence[str],
    fresh: bool,
    as_json: bool,
) -> int:
    """Runs the experiment that the overrides name, or resumes it; the run's exit code."""
    composed = compose(overrides, config_dirs, config_name)
    here = Path.cwd()
    trusted = [*trusted, *packages_in(here)]
    if found := problems(composed, len(submit.visible_gpus()), trusted, here):
        raise UserError(*found)
    config = composed.config
    launcher = schema.launcher_of(config)
    launch = submit.plan(launcher, config["trainer"]["device"], owner=os.getpid(), trusted=trusted, sys_path=[str(here)])
    path = folder(config, fresh)
    try:
        run_dir = rundir.create(path, config, shlex.join(["fairexp", *sys.argv[1:]]), launch, code_state(here))
    except OSError as error:
        if not path.is_dir():
            raise UserError(f"runs_dir: can't make {path}: {error.strerror}") from error
        run_dir = RunDir(path)
    with _one_at_a_time(run_dir):
        status = run_dir.status()
        if status["state"] == "finished":
            say(f"{run_dir.path} has finished; --fresh runs it anew")
            return report(run_dir, as_json)
        if job_lives(status):
            raise UserError(
                f"{run_dir.path} is running: job {status['job_id']} on {status.get('host', 'this machine')}"
            )
        if status["attempts"]:
            resume(run_dir, config, launch)
        say(
            f"{run_dir.path}  ({launch['num_processes']} x {launch['threads']} CPU thread{'s' if launch['threads'] > 1 else ''})"
        )
        if launcher.kind == "local":
            submit.submit(run_dir)
    if launcher.kind == "inline":
        submit.run_inline(run_dir)
    else:
        follow(run_dir, status["attempts"] + 1)
    return report(run_dir, as_json)


def folder(config: Mapping[str, Any], fresh: bool) -> Path:
    """The run's folder; with `fresh`, the first free one beside it."""
    path = Path(config["runs_dir"]).expanduser().absolute() / f"{config['name']}-{run_id(config)}"
    number = 1
    while fresh and path.exists():
        number += 1
        path = path.with_name(f"{config['name']}-{run_id(config)}.{number}")
    return path


def resume(run_dir: RunDir, config: Mapping[str, Any], launch: Mapping[str, Any]) -> None:
    """Readies the folder for another attempt. The experiment is the frozen one; what doesn't belong to it (processes, tracker,
    logging) may have changed, and the old file is kept."""
    frozen = run_dir.config()
    assert identity(frozen) == identity(config)
    if frozen != config:
        attempts = run_dir.status()["attempts"]
        os.replace(run_dir.config_file, run_dir.path / f"config.attempt_{attempts}.yaml")
        text = yaml.dump(dict(config), Dumper=yaml.CSafeDumper, sort_keys=False, allow_unicode=True, width=120)
        rundir.write_atomically(run_dir.config_file, text)
    rundir.write_atomically(run_dir.submit / "launch.json", json.dumps(launch, indent=1) + "\n")
    run_dir.set_status(state="queued", job_id=None)
    saved = sorted(run_dir.checkpoints.glob("step_*"))
    say(f"resuming after {saved[-1].name.replace('_', ' ')}" if saved else "starting again: there is no checkpoint")


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


@contextmanager
def _one_at_a_time(run_dir: RunDir) -> Iterator[None]:
    """Two commands for the same run look one after the other: the second sees the first one's job."""
    with open(run_dir.submit / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def say(text: str) -> None:
    """Human words go to stderr."""
    print(text, file=sys.stderr, flush=True)
