"""Kills a training at random until it has finished all the same, and what one compares afterwards; for test_kills.py and
scripts/faults/kills."""

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open

from fairexp.config.attempt import last
from fairexp.config.manifest import committed, decode, text_of

KINDS = ("a rank", "all ranks", "the launcher", "inside a save")
STEPS = 120
# dropout and an average of the weights: generators and what is derived must come back, too
TRAINING = (
    "model=vit",
    "model.width=32",
    "model.depth=2",
    "model.dropout=0.1",
    "dataset=digits",
    "optimizer.lr=3e-3",
    f"trainer.max_steps={STEPS}",
    "trainer.max_epochs=null",
    "trainer.global_batch_size=84",
    "trainer.log_every=1",
    "trainer.eval_every=30",
    "trainer.ema_decay=0.9",
    "trainer.device=cpu",
    "checkpoint.every=6",
    "checkpoint.keep_last=3",
    "launcher.threads_per_process=1",
    "launcher.num_processes=2",
    "tracker=none",
)


@dataclass
class Result:
    """What a training left: bits, and how it came to them."""

    losses: dict[int, str]
    evaluations: dict[tuple[int, str], str]
    state: str  # SHA-256 of every tensor of the last checkpoint, by name
    kills: list[str] = field(default_factory=list)
    recomputed: int = 0  # steps that were done twice
    partial: int = 0  # kills that left a half-written checkpoint


def start(words: Sequence[str], runs_dir: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """`fairexp train`, with what it says in runs_dir/said.txt."""
    command = [sys.executable, "-m", "fairexp", "train", *TRAINING, *words, f"runs_dir={runs_dir}"]
    with open(runs_dir / "said.txt", "ab") as said:
        return subprocess.Popen(command, cwd=runs_dir, env=environment, stdout=said, stderr=said)


def train(
    words: Sequence[str], runs_dir: Path, environment: dict[str, str], kills: Sequence[str] = (), seed: int = 0
) -> Result:
    """A finished training. `kills`: of KINDS, one after the other, at steps drawn from the seed; those that came in time stand in
    the result."""
    chance = random.Random(seed)
    targets = sorted(chance.sample(range(2, STEPS - 4), len(kills)))
    recomputed, partial = 0, 0
    came: list[str] = []
    for kind, target in zip(kills, targets, strict=True):
        process = start(words, runs_dir, environment)
        try:
            until(lambda: any(runs_dir.glob("*-*/status.json")), process)
            (run,) = runs_dir.glob("*-*/")
            until(lambda: steps_done(run) >= target and status(run)["state"] == "running", process)  # noqa: B023
            number = last(run)
            if kind == "inside a save":
                work = run / f"attempts/{number:04d}/work"
                until(lambda: any(name.startswith("step_") for name in os.listdir(work)), process, pause=0)  # noqa: B023
            shoot(kind, run, process, chance)
        except TooLate:
            assert process.wait(60) == 0, (runs_dir / "said.txt").read_text()[-3000:]
            break
        came.append(kind)
        process.wait(60)
        everyone_is_gone(run, number)
        partial += any((run / f"attempts/{number:04d}/work").glob("step_*"))
        recomputed += steps_done(run) - max(committed(run / "checkpoints"), default=0)
    process = start(words, runs_dir, environment)
    code = process.wait(240)
    assert code == 0, (runs_dir / "said.txt").read_text()[-3000:]
    (run,) = runs_dir.glob("*-*/")
    return result(run, came, recomputed, partial)


def shoot(kind: str, run: Path, command: subprocess.Popen[bytes], chance: random.Random) -> None:
    """SIGKILL, without a warning."""
    job = status(run)["pid"]
    ranks = children(job)
    if not ranks:
        raise TooLate
    victims = {
        "a rank": lambda: [chance.choice(ranks)],
        "all ranks": lambda: ranks,
        "the launcher": lambda: chance.sample([command.pid, job], chance.choice([1, 2])),
        "inside a save": lambda: [chance.choice(ranks)],
    }[kind]()
    for pid in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def everyone_is_gone(run: Path, number: int, timeout: float = 20) -> None:
    """Waits until no process has a log of the attempt open."""
    deadline = time.monotonic() + timeout
    while users := [pid for pid in processes() if uses(pid, str(run / "logs"))]:
        assert time.monotonic() < deadline, f"left behind: {users}"
        time.sleep(0.05)


def processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def uses(pid: int, folder: str) -> bool:
    try:
        return os.readlink(f"/proc/{pid}/fd/1").startswith(folder)
    except OSError:
        return False


def children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


class TooLate(Exception):
    """The training came to its end first: a busy machine looks seldom."""


def until(
    condition: Callable[[], bool], process: subprocess.Popen[bytes], pause: float = 0.003, timeout: float = 120
) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        if process.poll() == 0:
            raise TooLate
        assert process.poll() is None, f"the training ended ({process.returncode}) before it could be killed"
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(pause)


def status(run: Path) -> dict[str, Any]:
    return json.loads((run / "status.json").read_text())


def rows(run: Path) -> list[dict[str, Any]]:
    try:
        text = (run / "metrics.jsonl").read_text()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.split("\n")[:-1]]


def steps_done(run: Path) -> int:
    return max((row["step"] for row in rows(run)), default=0)


def result(run: Path, kills: list[str], recomputed: int, partial: int) -> Result:
    losses, evaluations = {}, {}
    for row in rows(run):
        if "train/loss" in row:
            assert row["step"] not in losses, "a step was logged twice"
            losses[row["step"]] = row["train/loss"].hex()
        evaluations |= {(row["step"], name): value.hex() for name, value in row.items() if name.startswith("eval/")}
    return Result(losses, evaluations, state_of(run / f"checkpoints/step_{STEPS:08d}"), kills, recomputed, partial)


def state_of(folder: Path) -> str:
    """The SHA-256 of all tensors of a checkpoint, by name and place."""
    digest = hashlib.sha256()
    body = decode(text_of(folder), folder)
    opened = {}
    for name in sorted(body["tensors"]):
        for file, offset, shape in sorted(body["tensors"][name]["pieces"]):
            if file not in opened:
                opened[file] = safe_open(folder / file, framework="np")
            values = opened[file].get_tensor(name)
            digest.update(f"{name} {offset} {shape}".encode() + values.tobytes())
    return digest.hexdigest()


def difference(one: Result, other: Result) -> str | None:
    """The first thing in which two trainings differ."""
    for name in ("losses", "evaluations"):
        a, b = getattr(one, name), getattr(other, name)
        for key in sorted(a.keys() | b.keys()):
            if a.get(key) != b.get(key):
                return f"{name} {key}: {a.get(key)} and {b.get(key)}"
    return None if one.state == other.state else "the final state"
