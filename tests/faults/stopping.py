"""Runs that are told to stop at a random moment: for the tests, and for scripts/faults/stops, which counts."""

import json
import os
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from test_processes import FOREVER, Command

WORDS = (*FOREVER, "trainer.num_workers=2", "checkpoint.every=40")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


@dataclass
class Stopped:
    """What was seen of a run that was told to stop."""

    told: str
    code: int
    took_s: float
    step: int
    saved: list[int]  # the checkpoints with their final name
    resumed_at: int  # where this start began: what the last one saved
    seen: str


def stop_once(folder: Path, generator: random.Random) -> Stopped:
    """Starts or resumes the run of that folder, and tells a random rank, all processes (as Slurm does) or the job to stop."""
    began_at = max(saved(folder), default=0)
    command = Command(folder, *WORDS)
    try:
        command.until(lambda: command.trained(began_at + 20))
        time.sleep(generator.uniform(0.0, 1.0))
        number = generator.choice(SIGNALS)
        who = generator.choice(("rank", "rank", "all", "job"))
        ranks = command.ranks()
        pids = {
            "rank": [generator.choice(ranks)],
            "all": [
                pid for pid in command.alive() if pid not in (command.process.pid, int(command.status()["job_id"]))
            ],
            "job": [command.status()["pid"]],
        }[who]
        generator.shuffle(pids)
        began = time.monotonic()
        for pid in pids:
            os.kill(pid, number)
        code = command.wait(60)
        took_s = time.monotonic() - began
        status = command.status()
        told = f"{signal.Signals(number).name} to {who if who != 'rank' else f'rank {ranks.index(pids[0])}'}"
        return Stopped(told, code, took_s, status["step"], saved(folder), status["resumed_at"], command.seen)
    finally:
        command.close()


def saved(folder: Path) -> list[int]:
    """The steps of the complete checkpoints: each has its own step inside."""
    steps = []
    for state in sorted(folder.glob("runs/*/checkpoints/step_*/state.json")):
        steps.append(json.loads(state.read_text())["step"])
        assert state.parent.name == f"step_{steps[-1]:08d}"
    return steps
