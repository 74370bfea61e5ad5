"""The verb `sync`: brings runs' W&B pages up to their metrics.jsonl."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from fairexp.config.rundir import RunDir
from fairexp.errors import FAILED, UserError
from fairexp.runs.state import LIVE, states

OURS = "fairexp.runtime.trackers.wandb.Wandb"


def sync(runs: Sequence[RunDir]) -> int:
    """Fills the pages of the runs, one after the other; ends at the first that can't be filled."""
    configs = {run.path: run.config() for run in runs}
    if others := [run.path.name for run in runs if configs[run.path]["tracker"]["_target_"] != OURS]:
        raise UserError(f"{', '.join(others[:12])}: no tracker=wandb, so no page to fill")
    now = states(runs)
    from fairexp.runtime.trackers.wandb_refill import refill, scratch

    code = 0
    with scratch() as folder:
        for run in runs:
            word = now[run.path].word
            if word in LIVE and sends_itself(run):
                _say(f"{run.path.name} is {word} and sends its rows itself; sync it when it has ended")
                code = FAILED
                continue
            try:
                sent = refill(folder, run.metrics_file, run.id, configs[run.path], word)
            except Exception as error:  # whatever a client, a proxy or a server thinks of
                text = " ".join(str(error).split())[:300]
                _say(f"{run.path.name}: {text or type(error).__name__}")
                return FAILED
            _say(f"{run.path.name}: {sent} rows sent" if sent else f"{run.path.name}: its page has all")
    return code


def sends_itself(run: RunDir) -> bool:
    """Whether a run that goes on was begun online: two that send under one id overwrite each other's rows."""
    try:
        return not Path(os.readlink(run.path / "wandb/latest-run")).name.startswith("offline")
    except OSError:
        return False


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
