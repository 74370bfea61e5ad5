"""Evaluates a checkpoint on one process, whatever strategy wrote it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fairexp.config.manifest import Damaged
from fairexp.config.rundir import RunDir
from fairexp.errors import RunError, UserError
from fairexp.runtime import build, checkpoint, dist, loop
from fairexp.runtime.make import trust
from fairexp.runtime.preempt import Stop

SINGLE = {"_target_": "fairexp.runtime.strategies.single.Single"}


def evaluate_checkpoint(
    run_dir: RunDir, config: Mapping[str, Any], folder: Path, trusted: Sequence[str]
) -> dict[str, float]:
    """The evaluation metrics of the checkpoint in `folder`."""
    trust(trusted)
    here = dist.place(config["trainer"]["device"])
    try:
        run = build.build(run_dir, {**config, "strategy": SINGLE}, here, Stop())
        checkpoint.load(run, folder)
        return {f"eval/{name}": value for name, value in loop.evaluate(run).items()}
    except (RunError, Damaged) as error:
        raise UserError(str(error)) from error
