"""Runs that hang, and runs that only look as if they did: for the tests, and for scripts/faults/hangs, which counts."""

import json
import math
import os
import random
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from test_processes import TWO_RANKS, Command

LIMIT_S = 6.0
FAULTS = ("stops", "holds the GIL", "skips", "worker stops")
MODEL = "_target_: faulty.Model\nin_features: 64\nout_features: 10\nfault: nothing\nrank: 1\nstep: 10\n"
PART = "  _target_: faulty.Digits\n  split: {}\n  rank: null\n  batch: 1\n"
DATA = f"train:\n{PART.format('train')}eval:\n{PART.format('test')}augment: null\nimage_size: 8\nchannels: 1\nnum_classes: 10\n"
SHORT = (
    *TWO_RANKS[:3],
    "tracker=none",
    "--config-dir=configs",
    "model=faulty",
    "trainer.max_epochs=null",
    "trainer.max_steps=40",
    "trainer.eval_batch_size=30",  # 6 batches a rank
    "checkpoint.every=5",
    f"trainer.hang_timeout_s={LIMIT_S}",
)


NOTHING: dict = {"rank": None, "line": "", "time": math.inf, "ranks": [{"since": 0.0}]}


@dataclass
class Hung:
    """What was seen of a run with a fault."""

    fault: str
    rank: int  # the guilty one
    named: int | None  # the one that was named
    line: str
    within_s: float  # from a rank's last sign to the verdict
    code: int
    status: dict
    path: Path
    seen: str


def start(folder: Path, *words: str) -> Command:
    """A short run of `faulty`'s parts in a new folder."""
    (folder / "configs" / "model").mkdir(parents=True)
    (folder / "configs" / "dataset").mkdir()
    (folder / "configs" / "model" / "faulty.yaml").write_text(MODEL)
    (folder / "configs" / "dataset" / "faulty.yaml").write_text(DATA)
    shutil.copy(Path(__file__).with_name("faulty.py"), folder)
    return Command(folder, *SHORT, *words)


def start_hanging(folder: Path, fault: str, rank: int, step: int = 10) -> Command:
    """A run in which that happens on that rank in its first attempt."""
    if fault == "worker stops":
        # both workers do, in turn: at the eleventh batch or the twelfth
        words = (f"dataset.train.rank={rank}", f"dataset.train.batch={step // 2 + 1}", "trainer.num_workers=2")
        return start(folder, "dataset=faulty", *words)
    # a rank that is stopped or keeps the GIL also stops its save in the background: waited for, step 5 is there for sure
    return start(
        folder, f"model.fault='{fault}'", f"model.rank={rank}", f"model.step={step}", "checkpoint.background=false"
    )


def ended(command: Command, fault: str, rank: int) -> Hung:
    """Waits for the run's end."""
    code = command.wait(120)
    assert (command.folder / "runs").exists(), command.seen
    path = command.run_dir
    file = path / "logs" / "hang.attempt_1.json"
    verdict = json.loads(file.read_text()) if file.exists() else NOTHING
    within_s = max(verdict["time"] - each["since"] for each in verdict["ranks"])
    return Hung(fault, rank, verdict["rank"], verdict["line"], within_s, code, command.status(), path, command.seen)


def start_innocent(folder: Path) -> Command:
    """A run whose first step, evaluation and save take longer than the limit."""
    words = ("trainer.max_steps=10000000", "trainer.eval_every=500", "checkpoint.every=500", "trainer.log_every=100")
    return start(folder, "model.fault='is slow'", *words)


def live_through(command: Command) -> None:
    """Suspends the innocent run for longer than the limit, too, and then tells it to stop. Where nothing hung it has saved
    and ends."""
    command.until(lambda: command.process.poll() is not None or command.trained(600))
    assert command.process.poll() is None, command.seen
    suspend(command, LIMIT_S + 0.5)
    seen = command.steps()
    command.until(lambda: command.steps() > seen or command.process.poll() is not None)
    command.process.send_signal(signal.SIGTERM)


def suspend(command: Command, seconds: float) -> None:
    """Stops every process of the run, as Slurm does, and lets them go on later."""
    pids = [pid for pid in command.alive() if pid != command.process.pid]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(seconds)
    random.shuffle(pids)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
