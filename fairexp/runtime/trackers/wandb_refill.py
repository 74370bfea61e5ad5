"""Brings a run's W&B page up to its metrics.jsonl, for `fairexp sync`: also of runs that were recorded offline."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fairexp.errors import DONE, INTERRUPTED
from fairexp.runtime.track import read
from fairexp.runtime.trackers.wandb import STEP, Unsent, Wandb, as_sent

ROWS_PER_S = 100  # that a server takes at least


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for all that wandb writes meanwhile: metrics.jsonl has every row already."""
    with tempfile.TemporaryDirectory(prefix="fairexp-sync-", ignore_cleanup_errors=True) as folder:
        for kind in ("DATA", "CACHE", "ARTIFACT"):
            os.environ[f"WANDB_{kind}_DIR"] = str(Path(folder, kind.lower()))
        os.environ["WANDB_ERROR_REPORTING"] = "false"
        os.environ["WANDB_SILENT"] = "true"  # its Api has words of its own
        try:
            yield Path(folder)
        finally:
            end_children()


def end_children() -> None:
    """Ends wandb's service, which has sent all it had to or can't. Asked to end by itself, it may first wait for the answers of
    a server that is away; and wandb waits for it when Python exits, without a limit. What it says of the loss isn't for the user:
    from here on nothing more comes on stderr."""
    sys.stderr.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    for file in Path("/proc/self/task").glob("*/children"):
        for child in file.read_text().split():
            os.kill(int(child), signal.SIGKILL)


def refill(folder: Path, metrics_file: Path, run_id: str, config: Mapping[str, Any], word: str) -> int:
    """Sends the rows that the page lacks, and how the run ended; the number of rows. `word`: the run's state.

    The page is asked for what it has, so a second time sends nothing, and gaps in the middle are found. An exception says why
    it couldn't be done.
    """
    import wandb

    settings = {key: value for key, value in config["tracker"].items() if key != "_target_"}
    if not wandb.login(prompt=False, verify=False):
        raise Unsent(f"no API key for {wandb.setup().settings.base_url}: `wandb login`, or set WANDB_API_KEY")
    rows = read(metrics_file) if metrics_file.exists() else []
    api = wandb.Api(timeout=max(round(settings["init_timeout_s"]), 1))
    path = f"{settings['entity'] or api.default_entity}/{settings['project']}/{run_id}"
    try:
        page = api.run(path)
    except wandb.errors.CommError as error:
        if "Could not find run" not in str(error):
            raise
        lacking, told = list(map(as_sent, rows)), not rows
    else:
        lacking = lacks(rows, page.scan_history(use_cache=False))
        told = (
            page.state == "finished" if word == "finished" else page.state != "running" or word in ("queued", "running")
        )
    if told and not lacking:
        return 0

    settings |= {"mode": "online", "finish_timeout_s": settings["finish_timeout_s"] + len(lacking) / ROWS_PER_S}
    tracker = Wandb(folder, run_id, config["name"], dict(config), resumed=False, **settings)
    if not tracker.online:
        raise Unsent("wandb couldn't start online")
    tracker.later = "the same command sends the rest"
    assert tracker.run is not None
    for row in lacking:
        tracker.run.log(row)
    tracker.run.summary.update(
        {name: value for row in rows for name, value in as_sent(row).items()}
    )  # the last of each
    tracker.finish({"finished": DONE, "failed": 1}.get(word, INTERRUPTED))
    return len(lacking)


def lacks(rows: Sequence[Mapping[str, Any]], page: Iterator[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows, or the metrics of them, that the page hasn't."""
    has: dict[int, set[str]] = {}
    for row in page:
        if row.get(STEP) is not None:
            has.setdefault(int(row[STEP]), set()).update(name for name, value in row.items() if value is not None)
    lacking = []
    for row in map(as_sent, rows):
        new = {name: value for name, value in row.items() if name not in has.get(row[STEP], ())}
        if new.keys() - {STEP}:
            lacking.append({STEP: row[STEP], **new})
    return lacking
