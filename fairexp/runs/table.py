"""Runs in words: one, or a table of all."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from fairexp.config.manifest import committed
from fairexp.config.rundir import RunDir
from fairexp.runs.state import LIVE, State, state, states

PERIOD_S = 2.0  # between two looks of a live table


def facts(run: RunDir, state: State) -> dict[str, Any]:
    """What is known of a run; `state`: as runs.state sees it."""
    status, summary = run.status(), run.summary() or {}
    rows = run.last_rows()
    metrics = {key: value for row in rows for key, value in row.items() if key != "step"}
    return {
        "run_dir": str(run.path),
        "id": run.id,
        "name": run.path.name.rpartition("-")[0],
        "state": state.word,
        "why": state.why,
        "job": state.job,
        "step": status["step"],
        "max_steps": status.get("max_steps"),
        "metrics": summary.get("final") or metrics,
        "best": summary.get("best", {}),
        "attempts": status["attempts"],
        "age_s": round(time.time() - status["heartbeat"], 1),
        "created": status.get("created"),
        "host": status.get("host"),
        "failed_hosts": status.get("failed_hosts", []),
        "error": status.get("error"),
    }


def facts_of(runs: Sequence[RunDir]) -> list[dict[str, Any]]:
    """The facts of many runs; each scheduler is asked once."""
    now = states(runs)
    return [facts(run, now[run.path]) for run in runs]


def show_table(
    runs: Sequence[RunDir], wanted: Sequence[str], as_json: bool, labels: Mapping[str, str], where: Path
) -> int:
    """Prints the runs of `where`; `wanted`: only those in these states; `labels`: what a sweep calls them."""
    found = [run for run in facts_of(runs) if not wanted or run["state"] in wanted]
    if as_json:
        print(json.dumps(found))
        return 0
    if not found:
        print(f"no runs in {where}" + (f" that are {' or '.join(wanted)}" if wanted else ""))
        return 0
    print_table(*_rows(found, labels))
    return 0


def _rows(found: Sequence[dict[str, Any]], labels: Mapping[str, str]) -> tuple[list[str], list[list[str]]]:
    columns = ["run", "state", "step", "metrics", "job", "node", "age"]
    rows = []
    for run in found:
        name = Path(run["run_dir"]).name
        steps = f"{run['step']}/{run['max_steps']}" if run["max_steps"] else str(run["step"])
        why = f" ({run['why']})" if run["why"] and run["state"] in ("queued", "lost", "running") else ""
        own = [labels.get(name, "")] if labels else []
        rest = [steps, numbers(run["metrics"]), run["job"] or "", run["host"] or "", age(run["age_s"])]
        rows.append([name, *own, run["state"] + why, *rest])
    return ([columns[0], "settings", *columns[1:]] if labels else columns), rows


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints a table on stdout, as wide as it is."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else 250  # a file or a pipe takes whole lines
    Console(highlight=False, width=width).print(_table(columns, rows))


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def live(
    runs: Callable[[], Sequence[RunDir]], labels: Callable[[], Mapping[str, str]], waiting: Callable[[], int]
) -> list[str]:
    """Shows the runs on stderr until none is queued or running, and none is still to come; their states then.

    On a terminal the table stands still, else each change is a line.
    """
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True, highlight=False)
    before: dict[str, str] = {}
    with Live(console=console, auto_refresh=False) if console.is_terminal else nullcontext() as shown:
        while True:
            found = facts_of(runs())
            if shown is not None:
                shown.update(_table(*_rows(found, labels())), refresh=True)
            for run in found if shown is None else ():
                if before.get(run["run_dir"]) != run["state"]:
                    before[run["run_dir"]] = run["state"]
                    print(
                        f"{Path(run['run_dir']).name}: {run['state']}, step {run['step']}", file=sys.stderr, flush=True
                    )
            if not any(run["state"] in LIVE for run in found) and not waiting():
                return [run["state"] for run in found]
            time.sleep(PERIOD_S)


def show_one(run: RunDir, as_json: bool) -> int:
    """Prints one run: how it stands, where its files are, and why it failed if it did."""
    if as_json:
        print(json.dumps(facts(run, state(run))))
        return 0
    print(describe(run))
    print(f"  command  {(run.path / 'command.txt').read_text(encoding='utf-8').strip()}")
    print(f"  config   {run.config_file}")
    for name in ("commit", "snapshot"):
        if (file := run.path / "code" / f"{name}.txt").exists():
            print(f"  {name:<8} {file.read_text(encoding='utf-8').strip()}")
    for checkpoint in committed(run.checkpoints).values():
        print(f"  saved    {checkpoint}")
    return 0


def describe(run: RunDir) -> str:
    """A run in a few lines."""
    now = state(run)
    it = facts(run, now)
    steps = f"{it['step']} of {it['max_steps']}" if it["max_steps"] else it["step"]
    why = f" ({now.why})" if now.why and now.word in ("queued", "lost", "running") else ""
    lines = [f"{run.path.name}: {it['state']}{why}, step {steps}, attempt {it['attempts']}, {run.path}"]
    if now.kind == "slurm" and now.job:
        lines.append(f"  job      {now.job}" + (f" on {it['host']}" if it["host"] else ""))
    if it["failed_hosts"]:
        lines.append(f"  failed   on {', '.join(it['failed_hosts'])}")
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
