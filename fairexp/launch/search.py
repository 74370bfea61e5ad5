"""`train -m sweep.sampler=tpe`: as many slots as trials are missing; each asks Optuna for its values when it starts."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from fairexp.config import schema
from fairexp.config.rundir import RunDir, write_atomically
from fairexp.config.sweep import Search, Settings, Sweep
from fairexp.errors import DONE, FAILED, UserError
from fairexp.launch import pool, snapshot, submission, sweep
from fairexp.launch.snapshot import Snapshot
from fairexp.launch.submission import Wanted
from fairexp.launch.trial import trials
from fairexp.runs.state import Queue, alive, states
from fairexp.runs.state import submission as record_of
from fairexp.runs.sweeps import SweepDir


def start(
    folder: SweepDir,
    expanded: Sweep,
    planned: Sequence[sweep.Planned],
    here: Path,
    asked: sweep.Asked,
    warm: pool.Warm | None,
) -> int:
    """Submits the trials that are missing to the search's number, and those that were interrupted."""
    settings, search = expanded.settings, expanded.search
    assert search is not None
    assert settings.num_trials is not None
    if importlib.util.find_spec("optuna") is None:
        raise UserError(f"sweep.sampler={settings.sampler}: needs Optuna: pip install 'fairexp[search]'")
    like = planned[0].wanted
    launcher = like.launcher
    assert isinstance(launcher, schema.Slurm | schema.Local)
    if any(run.wanted.config["launcher"] != like.config["launcher"] for run in planned):
        raise UserError("launcher: the trials of a search all ask for the same")
    runs_dir = folder.runs_dir
    with submission.submitting(runs_dir) as lock:
        uids = folder.search().get("submissions", [])
        submission.recover(runs_dir, uids)
        runs = list({trial["run"]: RunDir(runs_dir / trial["run"]) for trial in trials(folder.path)}.values())
        now = states(runs, settled=True)
        again = [run for run in runs if sweep.wants(now[run.path], asked.retry_failed)]
        waiting = _waiting(folder, uids)
        new = max(settings.num_trials - len(trials(folder.path)) - waiting, 0)
        sweep.write(folder, expanded, [], [])
        jobs: list[str] = []
        if again or new:
            taken = snapshot.take(runs_dir, here, launcher.snapshot_max_mb, launcher.snapshot_exclude)
            found = submission.batches([Wanted(run.path, run.config(), "", like.launch) for run in again], new, like)
            if launcher.kind == "local":  # one pool for all
                runs_again = [run for batch in found for run in batch.runs]
                found = [submission.Batch(runs_again, new, like)]
            _write(folder, settings, search, like, taken, [*uids, *(batch.uid for batch in found)])
            if isinstance(launcher, schema.Slurm):
                going = _jobs_of(folder, uids)
                handed = submission.to_slurm(runs_dir, folder.name, found, taken, lock, going, str(folder.path))
                jobs = [str(batch.job_id) for batch in handed]
            else:
                jobs = [pool.start(runs_dir, folder.name, found[0], taken, warm, str(folder.path))]
                warm = None
    if warm:
        warm.close()
    counts = Counter(state.word for run, state in now.items() if run not in {run.path for run in again})
    parts = [f"{count} {word}" for word, count in sorted(counts.items())]
    parts += [f"{waiting} not begun"] if waiting else []
    if jobs:
        kind = "job" if launcher.kind == "slurm" else "pool"
        parts.append(f"{len(again) + new} submitted as {kind} {', '.join(jobs)}")
    sweep.say(f"search {folder.path}: {settings.num_trials} trials: {', '.join(parts)}")
    if asked.follow:
        return sweep.follow(folder, lambda: _waiting(folder, folder.search().get("submissions", [])))
    return DONE if jobs or not (again or new) else FAILED


def _write(
    folder: SweepDir, settings: Settings, search: Search, like: Wanted, taken: Snapshot, uids: Sequence[str]
) -> None:
    """What the trials need: the space, the configs in which values are replaced, the frozen code, how to launch."""
    code = {"snapshot.txt": f"{taken.path}\n"}
    if taken.commit:
        code |= {"commit.txt": f"{taken.commit}\n", "uncommitted.patch": taken.patch}
    (folder.path / "code").mkdir(exist_ok=True)
    for name, text in code.items():
        (folder.path / "code" / name).unlink(missing_ok=True)  # runs share the old one by a link
        (folder.path / "code" / name).write_text(text, encoding="utf-8", errors="surrogateescape")
    content = {
        "sampler": settings.sampler,
        "sampler_seed": settings.sampler_seed,
        "metric": settings.metric,
        "direction": settings.direction,
        "space": search.space,
        "group_keys": search.group_keys,
        "bases": search.bases,
        "launch": {**like.launch, "sys_path": taken.import_paths, "snapshot": taken.id},
        "code": list(code),
        "submissions": list(uids),
    }
    write_atomically(folder.path / "search.json", json.dumps(content, indent=1) + "\n")


def _jobs_of(folder: SweepDir, uids: Sequence[str]) -> list[str]:
    """The jobs of the search that are in Slurm's queue."""
    records = [record for uid in uids if (record := record_of(folder.runs_dir, uid)) and record["kind"] == "slurm"]
    entries = Queue(record["job_id"] for record in records if record["job_id"]).entries
    return sorted({job.partition("_")[0] for job in entries} & {str(record["job_id"]) for record in records})


def _waiting(folder: SweepDir, uids: Sequence[str]) -> int:
    """How many slots are submitted and have not begun."""
    begun = {trial["slot"] for trial in trials(folder.path)}
    records = [record for uid in uids if (record := record_of(folder.runs_dir, uid)) and record["job_id"]]
    queue = Queue(record["job_id"] for record in records if record["kind"] == "slurm")
    count = 0
    for record in records:
        for index in range(len(record["runs"]), len(record["runs"]) + record["slots"]):
            if f"{record['uid']}_{index}" in begun:
                continue
            job = f"{record['job_id']}_{index}" if record["array"] else record["job_id"]
            lives = queue.entry(job) if record["kind"] == "slurm" else alive(record["pid"], record["started"])
            count += 1 if lives else 0
    return count
