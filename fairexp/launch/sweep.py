"""The verb `train -m`: a sweep's folder is brought in line with what is asked for, and only what is missing is submitted."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairexp.config import schema
from fairexp.config.compose import Composed
from fairexp.config.identity import run_id
from fairexp.config.rundir import RunDir, write_atomically
from fairexp.config.sweep import Point, Sweep, blame, expand
from fairexp.config.validate import problems
from fairexp.errors import DONE, FAILED, UserError
from fairexp.launch import pool, slurm, snapshot, submission, submit
from fairexp.launch.control import cancel
from fairexp.launch.submission import Wanted
from fairexp.runs.state import LIVE, State, states
from fairexp.runs.sweeps import SweepDir, sweeps
from fairexp.runs.table import print_table

AGAIN = ("interrupted", "lost")  # asked for again without a word; failed and cancelled runs only with --retry-failed


@dataclass(frozen=True)
class Planned:
    """A run of the sweep: the values that are its own, and what would be submitted."""

    label: str
    overrides: tuple[str, ...]
    wanted: Wanted

    @property
    def name(self) -> str:
        return self.wanted.path.name


@dataclass(frozen=True)
class Asked:
    """How the sweep was asked for."""

    trusted: Sequence[str]
    retry_failed: bool = False
    prune: bool = False
    follow: bool = False
    dry_run: bool = False
    as_json: bool = False


def sweep(overrides: Sequence[str], config_dirs: Sequence[Path], config_name: str, asked: Asked) -> int:
    """Submits the runs that are neither finished nor going on; DONE, or with `follow` FAILED if one of them failed."""
    from fairexp.launch.train import packages_in

    warm = None
    if not asked.dry_run and not any(word.startswith("launcher=") and word != "launcher=local" for word in overrides):
        warm = pool.Warm()  # loads torch beside us while the runs are composed and checked
    try:
        here = Path.cwd()
        trusted = [*asked.trusted, *packages_in(here)]
        expanded = expand(overrides, config_dirs, config_name)
        planned = plan(expanded, trusted, here)
        runs_dir = planned[0].wanted.path.parent
        kinds = {run.wanted.launcher.kind for run in planned}
        if len(kinds) > 1 or "inline" in kinds:
            raise UserError(f"launcher={', '.join(sorted(kinds))}: a sweep takes launcher=local or launcher=slurm")
        if asked.dry_run:
            return dry_run(expanded.name, planned, asked.as_json)
        if kinds == {"slurm"} and not slurm.available():
            raise UserError("launcher=slurm: there is no sbatch on this machine's PATH")
        folder = SweepDir(runs_dir / "sweeps" / expanded.name)
        if expanded.search:
            from fairexp.launch import search

            code = search.start(folder, expanded, planned, here, asked, warm)
        else:
            code = reconcile(folder, expanded, planned, here, asked, warm)
        warm = None
        return code
    finally:
        if warm:
            warm.close()


def plan(expanded: Sweep, trusted: Sequence[str], here: Path) -> list[Planned]:
    """The sweep's runs in order, each once. UserError with every problem of every run, before anything is made."""
    gpus = len(submit.visible_gpus())
    slots: dict[str, list[str]] = {}
    failures = {problem: list(labels) for problem, labels in expanded.failures.items()}
    planned: dict[str, Planned] = {}
    same: dict[str, list[str]] = {}
    launches: dict[str, dict[str, Any]] = {}
    for point in expanded.points:
        # in a pool a run has one rank unless it asks for more, whatever the machine has
        shown = min(gpus, 1) if kind_of(point) == "local" and not ranks_of(point) else gpus
        found = problems(point.composed, shown, trusted, here)
        if not found:
            run = job(point, trusted, here, launches)
            found = [] if kind_of(point) != "local" else too_large(point, run, slots)
        if found:
            for problem in found:
                failures.setdefault(problem, []).append(point.label)
            continue
        same.setdefault(run.name, []).append(point.label)
        planned.setdefault(run.name, run)
    if failures:
        total = len(expanded.points) + len({label for labels in expanded.failures.values() for label in labels})
        raise UserError(*blame(failures, total))
    for name, labels in same.items():
        if len(labels) > 1 and expanded.search is None:
            say(f"{'; '.join(labels)}: one run, {name}, since they differ in nothing that makes the experiment")
    return list(planned.values())


def kind_of(point: Point) -> Any:
    """The launcher of a point that may not be valid."""
    launcher = point.composed.config.get("launcher")
    return launcher.get("kind") if isinstance(launcher, Mapping) else None


def ranks_of(point: Point) -> Any:
    """The number of ranks that it asks for."""
    return point.composed.config["launcher"].get("num_processes")


def too_large(point: Point, run: Planned, slots: dict[str, list[str]]) -> list[str]:
    """Why the run fits in no pool of this machine; also sets what depends on the pool's size."""
    launcher, launch = run.wanted.launcher, run.wanted.launch
    key = json.dumps(point.composed.config["launcher"], sort_keys=True)
    if key not in slots:
        slots[key] = pool.slot_names(launcher)
    count = len(slots[key])
    # the ranks at work share the cores
    launch["threads"] = launcher.threads_per_process or max(len(os.sched_getaffinity(0)) // count, 1)
    launch["devices"] = None  # the pool says which
    if launch["num_processes"] <= count:
        return []
    where = point.composed.at("launcher.num_processes")
    return [f"{where}: {launch['num_processes']} ranks, but the pool has {count} slots; see launcher.max_parallel"]


def job(
    point: Point | Composed,
    trusted: Sequence[str],
    here: Path,
    launches: dict[str, dict[str, Any]] | None = None,
    path: Path | None = None,
) -> Planned:
    """What is submitted for one composed config."""
    composed, label = (point.composed, point.label) if isinstance(point, Point) else (point, "")
    config = composed.config
    launches = {} if launches is None else launches
    key = json.dumps([config["launcher"], config["trainer"]["device"]], sort_keys=True)
    if key not in launches:
        launcher = schema.launcher_of(config)
        launches[key] = submit.plan(launcher, config["trainer"]["device"], None, list(trusted), [str(here)])
        if launcher.kind == "local" and isinstance(point, Point):
            launches[key]["num_processes"] = launcher.num_processes or 1
    if path is None:
        path = Path(config["runs_dir"]).expanduser().absolute() / f"{config['name']}-{run_id(config)}"
    command = shlex.join(["fairexp", "train", *composed.overrides])
    return Planned(label, composed.overrides, Wanted(path, config, command, launches[key]))


def reconcile(
    folder: SweepDir, expanded: Sweep, planned: Sequence[Planned], here: Path, asked: Asked, warm: Any
) -> int:
    """Brings the sweep in line with the plan."""
    runs_dir = folder.path.parent.parent
    with submission.submitting(runs_dir) as lock:
        earlier = folder.jobs()
        current = {run.name: run for run in planned}
        dropped = [job for job in earlier if job["run"] not in current]
        submission.recover(runs_dir, _submissions_of(runs_dir, [*current, *(job["run"] for job in dropped)]))
        now = states([RunDir(run.wanted.path) for run in planned], settled=True)
        todo = [run for run in planned if wants(now[run.wanted.path], asked.retry_failed)]
        launcher = planned[0].wanted.launcher
        assert isinstance(launcher, schema.Slurm | schema.Local)
        taken = None
        if todo:
            taken = snapshot.take(runs_dir, here, launcher.snapshot_max_mb, launcher.snapshot_exclude)
            for line in taken.left_out:
                say(f"left out of the snapshot: {line}")
        if asked.prune and dropped:
            prune(folder, runs_dir, dropped)
            dropped = []
        write(folder, expanded, planned, dropped)
        wanted = [grouped(run.wanted, folder.name) for run in todo]
        jobs: list[str] = []
        submitted = 0
        if taken and isinstance(launcher, schema.Slurm):
            try:
                found = submission.batches(wanted)
                handed = submission.to_slurm(runs_dir, folder.name, found, taken, lock, going(folder))
            except UserError:
                if not earlier:
                    shutil.rmtree(folder.path)  # nothing was submitted, and nothing is left
                raise
            jobs = [str(batch.job_id) for batch in handed]
            submitted = sum(batch.size for batch in handed)
        elif taken:
            jobs = [pool.start(runs_dir, folder.name, submission.Batch(wanted), taken, warm)]
            warm = None
            submitted = len(wanted)
    if warm:
        warm.close()
    tell(folder, planned, now, todo, submitted, jobs, dropped, asked)
    if asked.follow:
        return follow(folder)
    return DONE if submitted == len(todo) else FAILED


def going(folder: SweepDir) -> list[str]:
    """The jobs of the sweep that are in Slurm's queue."""
    found = states(folder.runs()).values()
    return sorted(
        {state.job.partition("_")[0] for state in found if state.kind == "slurm" and state.word in LIVE and state.job}
    )


def wants(state: State, retry_failed: bool) -> bool:
    """Whether a run in that state is submitted (again). "" is a run that isn't there."""
    return state.word in ("", *AGAIN) or (retry_failed and state.word in ("failed", "cancelled"))


def grouped(wanted: Wanted, sweep_name: str) -> Wanted:
    """The run with the sweep's name as wandb's group, unless the config names one."""
    tracker = wanted.config.get("tracker") or {}
    if "group" not in tracker or tracker["group"] is not None:
        return wanted
    config = {**wanted.config, "tracker": {**tracker, "group": sweep_name}}
    return Wanted(wanted.path, config, wanted.command, wanted.launch)


def _submissions_of(runs_dir: Path, names: Sequence[str]) -> list[str]:
    uids = {RunDir(runs_dir / name).status().get("submission") for name in names}
    return sorted(uid for uid in uids if uid)


def write(folder: SweepDir, expanded: Sweep, planned: Sequence[Planned], dropped: Sequence[Mapping[str, Any]]) -> None:
    """The sweep's file: what was asked for last, and what was asked for before and still stands."""
    folder.path.mkdir(parents=True, exist_ok=True)
    content = {
        "name": folder.name,
        "command": shlex.join(["fairexp", *sys.argv[1:]]),
        "created": folder.content().get("created", time.time()),
        "swept": list(expanded.swept),
        "jobs": [{"label": run.label, "overrides": list(run.overrides), "run": run.name} for run in planned]
        + [{**job, "dropped": True} for job in dropped],
    }
    write_atomically(folder.path / "sweep.json", json.dumps(content, indent=1) + "\n")


def prune(folder: SweepDir, runs_dir: Path, dropped: Sequence[Mapping[str, Any]]) -> None:
    """Cancels the runs that are no longer in the spec, but those that another sweep has too."""
    names = {job["run"] for job in dropped}
    shared: set[str] = set()
    for other in sweeps(runs_dir):
        if other.path != folder.path:
            shared |= names & {job["run"] for job in other.jobs() if not job.get("dropped")}
    for name in sorted(shared):
        say(f"{name}: no longer in this sweep; another one has it too, so it goes on")
    ended = cancel([RunDir(runs_dir / name) for name in sorted(names - shared)])
    for run in ended:
        say(f"{run.path.name}: cancelled, no longer in this sweep")


def tell(
    folder: SweepDir,
    planned: Sequence[Planned],
    now: Mapping[Path, State],
    todo: Sequence[Planned],
    submitted: int,
    jobs: Sequence[str],
    dropped: Sequence[Mapping[str, Any]],
    asked: Asked,
) -> None:
    """Says what the sweep has and what was submitted."""
    names = {run.name for run in todo}
    counts = Counter(now[run.wanted.path].word for run in planned if run.name not in names)
    parts = [f"{count} {word}" for word, count in sorted(counts.items())]
    if submitted:
        kind = "job" if planned[0].wanted.launcher.kind == "slurm" else "pool"
        parts.append(f"{submitted} submitted as {kind} {', '.join(jobs)}")
    if submitted < len(todo):
        parts.append(f"{len(todo) - submitted} left for the same command later")
    if asked.as_json:
        print(json.dumps({"sweep": str(folder.path), "runs": len(planned), "submitted": submitted, "jobs": list(jobs)}))
    say(f"sweep {folder.path}: {len(planned)} runs: {', '.join(parts) if parts else 'none'}")
    if counts["failed"] + counts["cancelled"]:
        say("  --retry-failed submits the failed and the cancelled ones again")
    if dropped:
        say(f"  {len(dropped)} earlier runs are not asked for any more; --prune cancels them")
    if submitted and not asked.follow:
        say(f"  fairexp list {folder.name} shows it; fairexp cancel {folder.name} ends it")


def dry_run(name: str, planned: Sequence[Planned], as_json: bool) -> int:
    """Shows the jobs, the script and what it asks for; nothing is made."""
    now = states([RunDir(run.wanted.path) for run in planned])
    rows = [
        {
            "run": run.name,
            "label": run.label,
            "state": now[run.wanted.path].word or "new",
            "nodes": run.wanted.launch["nodes"],
            "ranks": run.wanted.launch["nodes"] * run.wanted.launch["num_processes"],
        }
        for run in planned
    ]
    if as_json:
        print(json.dumps(rows))
        return DONE
    print_table(
        ("", "run", "settings", "ranks", "state"),
        [(str(at), row["run"], row["label"], str(row["ranks"]), row["state"]) for at, row in enumerate(rows)],
    )
    wanted = [run.wanted for run in planned]
    if planned[0].wanted.launcher.kind == "slurm":
        with tempfile.TemporaryDirectory() as folder:
            for batch in submission.batches(wanted):
                paths = [str(planned[0].wanted.path.parent / "snapshots" / "ID")]  # made when it is submitted
                text = submission.write_script(Path(folder), name, batch, paths, batch.runs[0].launcher, None)
                text = text.replace(folder, str(planned[0].wanted.path.parent / "submissions" / batch.uid))
                print(
                    f"\n# {len(batch.runs)} run{'s' if len(batch.runs) > 1 else ''}: {resources(batch.runs[0])}\n{text}"
                )
    else:
        for batch in submission.batches(wanted):
            print(f"\n{len(batch.runs)} runs on this machine: {resources(batch.runs[0])}")
    say("nothing was submitted")
    return DONE


def resources(wanted: Wanted) -> str:
    """What one run asks for, in words."""
    launcher, launch = wanted.launcher, wanted.launch
    parts = [f"{launch['nodes']} node{'s' if launch['nodes'] > 1 else ''} x {launch['num_processes']} ranks"]
    if isinstance(launcher, schema.Slurm):
        cpus = (launcher.cpus_per_process or 1) * launch["num_processes"]
        parts += [f"{launcher.gpus_per_node or 0} GPUs and {cpus} CPUs a node", f"{launcher.timeout_min} min"]
        parts += [f"{launcher.mem_gb} GB a node"] if launcher.mem_gb else []
        parts += [f"partition {launcher.partition}"] if launcher.partition else []
    return ", ".join(parts)


def follow(folder: SweepDir, waiting: Callable[[], int] = int) -> int:
    """A live table until no run goes on, and none is `waiting` to be made; Ctrl-C ends the showing alone."""
    from fairexp.runs.table import live

    try:
        ended = live(folder.runs, folder.labels, waiting)
    except KeyboardInterrupt:
        return DONE
    return DONE if all(word == "finished" for word in ended) else FAILED


def say(text: str) -> None:
    """Human words go to stderr."""
    print(text, file=sys.stderr, flush=True)
