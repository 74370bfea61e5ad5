"""Runs in words: one, or a table of all."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from fairexp.config.rundir import RunDir
from fairexp.runs.find import runs

STALE_AFTER_S = 60.0  # rank 0 beats every two seconds


def facts(run: RunDir) -> dict[str, Any]:
    """What is known of a run. State "lost": running by its file, but its heart has stopped."""
    status, summary = run.status(), run.summary() or {}
    state, age = status["state"], time.time() - status["heartbeat"]
    rows = run.last_rows()
    metrics = {key: value for row in rows for key, value in row.items() if key != "step"}
    return {
        "run_dir": str(run.path),
        "id": run.id,
        "name": run.path.name.rpartition("-")[0],
        "state": "lost" if state in ("running", "queued") and age > STALE_AFTER_S else state,
        "step": status["step"],
        "max_steps": status.get("max_steps"),
        "metrics": summary.get("final") or metrics,
        "best": summary.get("best", {}),
        "attempts": status["attempts"],
        "age_s": round(age, 1),
        "host": status.get("host"),
        "error": status.get("error"),
    }


def show_table(runs_dir: Path, as_json: bool) -> int:
    """Prints the runs of a folder."""
    found = [facts(run) for run in runs(runs_dir)]
    if as_json:
        print(json.dumps(found))
        return 0
    if not found:
        print(f"no runs in {runs_dir}")
        return 0
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("run", "state", "step", "metrics", "age"):
        table.add_column(column, overflow="fold")
    for run in found:
        steps = f"{run['step']}/{run['max_steps']}" if run["max_steps"] else str(run["step"])
        table.add_row(Path(run["run_dir"]).name, run["state"], steps, numbers(run["metrics"]), age(run["age_s"]))
    Console(highlight=False, soft_wrap=True).print(table)
    return 0


def show_one(run: RunDir, as_json: bool) -> int:
    """Prints one run: how it stands, where its files are, and why it failed if it did."""
    if as_json:
        print(json.dumps(facts(run)))
        return 0
    print(describe(run))
    print(f"  command  {(run.path / 'command.txt').read_text(encoding='utf-8').strip()}")
    print(f"  config   {run.config_file}")
    for checkpoint in sorted(run.checkpoints.glob("step_*")):
        print(f"  saved    {checkpoint}")
    return 0


def describe(run: RunDir) -> str:
    """A run in a few lines."""
    it = facts(run)
    steps = f"{it['step']} of {it['max_steps']}" if it["max_steps"] else it["step"]
    lines = [f"{run.path.name}: {it['state']}, step {steps}, attempt {it['attempts']}, {run.path}"]
    if it["metrics"]:
        lines.append(f"  now      {numbers(it['metrics'])}")
    if it["best"]:
        lines.append(f"  best     {numbers(it['best'])}")
    if it["state"] == "failed" and it["error"]:
        lines.append(f"  error    {it['error']}")
        for log in sorted(run.logs.glob(f"rank_*.attempt_{it['attempts']}.log"))[:8]:
            lines.append(f"  log      {log}")
    return "\n".join(lines)


def numbers(metrics: dict[str, Any]) -> str:
    """The metrics that a person compares: evaluation first, else the training loss."""
    chosen = [key for key in metrics if key.startswith("eval/")] or [key for key in metrics if key == "train/loss"]
    return "  ".join(f"{key} {float(metrics[key]):.4f}" for key in chosen)


def age(seconds: float) -> str:
    """90 -> 1m, 7200 -> 2h."""
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{int(seconds // size)}{unit}"
    return f"{int(seconds)}s"
