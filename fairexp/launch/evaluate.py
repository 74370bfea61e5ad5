"""The verb `eval`: a run's checkpoint on its evaluation set, or on another's, in this process."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from fairexp.config.manifest import committed
from fairexp.config.nearest import nearest
from fairexp.config.rundir import RunDir
from fairexp.errors import UserError
from fairexp.launch.job import variables


def evaluate(run_dir: RunDir, overrides: Sequence[str], step: str | None, trusted: Sequence[str], as_json: bool) -> int:
    """Prints the metrics of the last checkpoint, or of `step`'s. `overrides`: `key=value` on the frozen config."""
    number, folder = chosen(run_dir, step)
    config = run_dir.config()
    for override in overrides:
        assign(config, override)
    launch = prepared(run_dir, trusted)
    from fairexp.runtime.evaluation import evaluate_checkpoint

    metrics = evaluate_checkpoint(run_dir, config, folder, launch["trusted"])
    if as_json:
        print(json.dumps({"run_dir": str(run_dir.path), "id": run_dir.id, "step": number, "metrics": metrics}))
    else:
        print(
            f"{run_dir.path.name} step {number}: " + "  ".join(f"{key} {value:.4f}" for key, value in metrics.items())
        )
    return 0


def chosen(run_dir: RunDir, step: str | None) -> tuple[int, Path]:
    """The step and folder of the run's last checkpoint, or of `step`'s."""
    saved = committed(run_dir.checkpoints)
    if not saved:
        raise UserError(f"{run_dir.path}: no checkpoint yet")
    if step is not None and (not step.isdigit() or int(step) not in saved):
        raise UserError(f"--step {step}: no such checkpoint; there are: {', '.join(map(str, sorted(saved)))}")
    number = int(step) if step else max(saved)
    return number, saved[number]


def prepared(run_dir: RunDir, trusted: Sequence[str]) -> dict[str, Any]:
    """Makes this process the run's only rank, before torch is imported; how it is launched."""
    launch = {**run_dir.launch(), "num_processes": 1, "threads": len(os.sched_getaffinity(0))}
    launch["trusted"] = [*launch["trusted"], *trusted]
    os.environ.update(variables(launch))
    sys.path[:0] = [folder for folder in launch["sys_path"] if folder not in sys.path]
    os.chdir(launch["cwd"])
    return launch


def assign(config: dict[str, Any], override: str) -> None:
    """Sets `a.b=value` in the frozen config; the key must be there."""
    key, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"{override}: write key=value")
    *parents, last = key.split(".")
    node: Any = config
    for parent in parents:
        node = node.get(parent) if isinstance(node, dict) else None
    if not isinstance(node, dict) or last not in node:
        known = list(node) if isinstance(node, dict) else list(config)
        raise UserError(f"{override}: the run's config has no {key}{nearest(last, known)}")
    node[last] = yaml.safe_load(text)
