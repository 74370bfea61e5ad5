"""The verb `checkpoints`: what a run has saved, and whether it is still what was written."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from fairexp.config import manifest
from fairexp.config.manifest import Damaged
from fairexp.config.rundir import RunDir
from fairexp.errors import DONE, FAILED, RunError
from fairexp.runs.table import age


def show(run: RunDir, thorough: bool, as_json: bool) -> int:
    """Prints a line a checkpoint; 1 if one is damaged. `thorough`: reads every byte, else compares sizes only."""
    found = [examine(step, folder, thorough) for step, folder in manifest.committed(run.checkpoints).items()]
    aside = sorted(path.name for path in run.checkpoints.glob("damaged_*"))
    if as_json:
        print(json.dumps({"run_dir": str(run.path), "checkpoints": found, "put_aside": aside}))
    else:
        if not found:
            print(f"{run.path}: no checkpoint yet", file=sys.stderr)
        for one in found:
            print(line(one, thorough))
        for name in aside:
            print(f"{name}: found damaged by a start of the run, and put aside")
    return FAILED if any(one["damage"] for one in found) else DONE


def examine(step: int, folder: Any, thorough: bool) -> dict[str, Any]:
    """What is known of one checkpoint; `damage` names the file that isn't what was written."""
    one: dict[str, Any] = {"step": step, "path": str(folder), "damage": None}
    try:
        body = manifest.check_all(folder, thorough)
    except (Damaged, RunError) as damage:
        return one | {"damage": str(damage)}
    except OSError as error:
        return one | {"damage": f"{error.filename}: {error.strerror}"}
    keys = ("time", "world_size", "strategy", "device", "torch", "metrics")
    sizes = {"files": len(body["files"]), "bytes": sum(entry["bytes"] for entry in body["files"].values())}
    return one | {key: body[key] for key in keys} | sizes


def line(one: dict[str, Any], thorough: bool) -> str:
    """One checkpoint in words."""
    if one["damage"]:
        return f"step {one['step']}: DAMAGED, {one['damage']}"
    metrics = "".join(f"  {name} {value:.4f}" for name, value in one["metrics"].items())
    made_by = f"{one['strategy'].rpartition('.')[2]} on {one['world_size']} x {one['device']}"
    saved = f"{age(max(time.time() - one['time'], 0))} ago"
    checked = "whole" if thorough else "sizes right"
    return f"step {one['step']}: {checked}, {one['bytes'] / 2**20:,.1f} MiB, {made_by}, {saved}{metrics}"
