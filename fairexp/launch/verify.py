"""The verb `verify-resume`: trains 2N steps at a stretch, and again with a kill -9 after a checkpoint, and compares bits."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fairexp.config import rundir, schema
from fairexp.config.compose import compose
from fairexp.config.manifest import committed
from fairexp.config.rundir import RunDir
from fairexp.config.validate import problems
from fairexp.errors import DONE, FAILED, UserError
from fairexp.launch.job import attempt
from fairexp.launch.node import Node
from fairexp.launch.submit import plan, visible_gpus
from fairexp.launch.train import packages_in
from fairexp.lifetime import die_with

# What is usually behind a state that doesn't come back, by the beginning of its name.
CAUSES = {
    "buffer outside": "it was registered with persistent=False: leave that out, or compute it anew in each forward pass",
    "model attribute": "plain attributes are not saved: make it a buffer",
    "dataset attribute": "a data set keeps no state: draw from the global generators, which are seeded for each sample",
    "augment attribute": "an augmentation gets a seed for each sample: draw from it, and keep no state",
    "mix attribute": "it gets a seed for each sample: draw from it, and keep no state",
    "schedule attribute": "a schedule must be a function of the step",
    "batch of": "an augmentation or data set draws from a generator that isn't seeded by the sample, or reads what changes",
    "loss of": "the forward pass depends on something that is not saved: a clock, a file, a generator of its own",
}


def verify(overrides: Sequence[str], config_dirs: Sequence[Path], name: str, trusted: list[str], steps: int) -> int:
    """Prints whether the run that the overrides name goes on bit for bit after a kill, or the first state that doesn't.
    `steps`: N; the checkpoint is written after it, the kill comes halfway to 2N."""
    fixed = [f"trainer.max_steps={2 * steps}", "trainer.max_epochs=null", "trainer.log_every=1", "tracker=none"]
    fixed += [f"checkpoint.every={steps}", "checkpoint.keep_last=2", "checkpoint.background=false"]
    composed = compose([*overrides, *fixed], config_dirs, name)
    trusted = [*trusted, *packages_in(Path.cwd())]
    if wrong := problems(composed, len(visible_gpus()), trusted, Path.cwd()):
        raise UserError(*wrong)
    config = composed.config
    if config["launcher"]["kind"] != "local":
        raise UserError(
            f"launcher={config['launcher']['kind']}: verify-resume runs on this machine; say launcher=local"
        )
    runs_dir = Path(config["runs_dir"]).expanduser().absolute()
    runs_dir.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="verify-resume-", dir=runs_dir))
    launch = plan(schema.launcher_of(config), config["trainer"]["device"], os.getpid(), trusted, sys_path=[os.getcwd()])
    whole, broken = (_folder(folder / part, config, launch, steps) for part in ("at_a_stretch", "interrupted"))
    say(f"{config['name']}: {2 * steps} steps at a stretch")
    if _run(whole, launch, steps, None) != DONE:
        return _failed(whole)
    kill_at = steps + (steps + 1) // 2
    say(f"{config['name']}: the same, killed after step {kill_at}")
    _run(broken, launch, steps, kill_at)
    if steps not in committed(broken.checkpoints):
        return _failed(broken)
    say(f"{config['name']}: and on from the checkpoint of step {steps}")
    if _run(broken, launch, steps, None) != DONE:
        return _failed(broken)
    found, compared = difference(whole, broken, steps)
    if found is None:
        shutil.rmtree(folder)
        print(f"{config['name']}: resumes bit for bit: {compared}")
        return DONE
    cause = next((text for kind, text in CAUSES.items() if found.startswith(kind)), "fairexp didn't save or restore it")
    print(f"{config['name']}: does not resume bit for bit: {found}; {cause}\n  the two runs: {folder}")
    return FAILED


def say(line: str) -> None:
    """A line of progress on stderr."""
    print(line, file=sys.stderr, flush=True)


def _folder(path: Path, config: Mapping[str, Any], launch: Mapping[str, Any], steps: int) -> RunDir:
    return rundir.create(path / f"{config['name']}-verify", config, "fairexp verify-resume", launch, {})


def _run(run: RunDir, launch: dict[str, Any], steps: int, kill_at: int | None) -> int:
    """One attempt at the run in a process of its own; its exit code."""
    census = {"at": [steps, 2 * steps], "kill_at": kill_at}
    rundir.write_atomically(run.submit / "launch.json", json.dumps(launch | {"census": census}, indent=1) + "\n")
    parent = os.getpid()
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = FAILED
    try:
        die_with(parent)
        code = attempt(run, Node("local"))
    finally:
        os._exit(code)


def _failed(run: RunDir) -> int:
    print(f"fairexp: {run.path} failed: {run.status().get('error') or 'it ended without a word'}", file=sys.stderr)
    return FAILED


def difference(whole: RunDir, broken: RunDir, steps: int) -> tuple[str | None, str]:
    """The first thing that differs, None if nothing does; and how much was compared."""
    num_states = num_seen = 0
    ranks = sorted((whole.path / "census").glob("rank_*.jsonl"), key=lambda path: int(path.stem[5:]))
    rows = {file.stem[5:]: (_rows(file), _rows(broken.path / "census" / file.name)) for file in ranks}
    for step in range(1, 2 * steps + 1):
        for rank, (theirs, ours) in rows.items():
            for number, (one, other) in enumerate(zip(theirs[step]["seen"], ours[step]["seen"], strict=True)):
                num_seen += 1
                if one != other:
                    what, before = "loss" if number % 2 else "batch", " (before the kill)" if step <= steps else ""
                    return f"{what} of step {step}, micro batch {number // 2 + 1}, on rank {rank}{before}", ""
            states, others = theirs[step].get("states", {}), ours[step].get("states", {})
            when = "after the restart" if step == steps else "at the end"
            for name in (*states, *(name for name in others if name not in states)):
                num_states += 1
                if states.get(name) != others.get(name):
                    return f"{name} ({when}, step {step}, rank {rank})", ""
    metrics = [_metrics(run) for run in (whole, broken)]
    for step, name in metrics[0].keys() | metrics[1].keys():
        if metrics[0].get((step, name)) != metrics[1].get((step, name)):
            return f"metric {name} of step {step}", ""
    return None, f"{num_states} states, {num_seen} batches and losses, {len(metrics[0])} metrics"


def _rows(file: Path) -> dict[int, dict[str, Any]]:
    """The rows by step. After a restart the later ones count; the step of the checkpoint is not done again, only its states
    are taken again."""
    rows: dict[int, dict[str, Any]] = {}
    for row in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
        rows[row["step"]] = row if row["seen"] else rows.get(row["step"], row) | {"states": row.get("states", {})}
    return rows


def _metrics(run: RunDir) -> dict[tuple[int, str], Any]:
    rows = map(json.loads, run.metrics_file.read_text(encoding="utf-8").splitlines())
    return {
        (row["step"], name): value
        for row in rows
        for name, value in row.items()
        if name != "step" and not name.startswith("perf/")
    }
