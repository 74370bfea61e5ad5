"""Tiny runs without a command line, in forks of the process that calls: a fork has torch already, and may be killed.

Used by the tests beside it and, with bigger numbers, by scripts/faults/checkpoints.
"""

from __future__ import annotations

import builtins
import hashlib
import io
import json
import os
import pickle
import random
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from fairexp.config import attempt, manifest, rundir
from fairexp.config.compose import compose
from fairexp.config.rundir import RunDir
from fairexp.errors import FAILED, RunError
from fairexp.runtime import build, checkpoint, dist, loop
from fairexp.runtime.build import Run
from fairexp.runtime.data import Batches
from fairexp.runtime.preempt import Stop
from fairexp.runtime.trackers.nothing import Nothing

TINY = (
    "name=tiny",
    "model=mlp",
    "model.hidden=[4]",
    "model.dropout=0.1",
    "dataset=digits",
    "trainer.device=cpu",
    "trainer.max_steps=6",
    "trainer.max_epochs=null",
    "trainer.global_batch_size=16",
    "trainer.log_every=1",
    "trainer.eval_every=3",
    "trainer.ema_decay=0.9",
    "checkpoint.every=1",
    "tracker=none",
)
RANKS = {1: "strategy=single", 2: "strategy=ddp"}
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "RENDEZVOUS_FILE", "FAIREXP_ATTEMPT", "FAIREXP_HOST")
SPEECHLESS = 70  # what a fork ends with after an exception that a user would have seen as a traceback
STEP = "checkpoints/step_{:08d}"


# --- forks ---


@dataclass(frozen=True)
class Ended:
    """How a fork ended: its exit code (negative: a signal), what it said, what its function returned."""

    code: int
    said: str
    value: Any = None

    @property
    def lines(self) -> list[str]:
        return self.said.splitlines()


class Fork:
    """`function()` in a fork of this process. A RunError ends it with 1 and a line, as it ends a rank."""

    def __init__(self, function: Callable[[], Any], folder: Path, environment: Mapping[str, str] | None = None):
        import torch._dynamo  # noqa: F401  # a second that each fork would need for its optimizer

        sys.stdout.flush()
        sys.stderr.flush()
        self.said = folder / f"said_{time.monotonic_ns()}"
        self.code: int | None = None
        self.pipe, end = os.pipe()
        drawn = random.getstate()
        self.pid = os.fork()
        if self.pid == 0:
            random.setstate(drawn)  # Python seeds it anew in a fork
            os.close(self.pipe)
            self._child(function, end, environment or {})
        os.close(end)
        self.data = b""

    def _child(self, function: Callable[[], Any], end: int, environment: Mapping[str, str]) -> None:
        code = SPEECHLESS
        try:
            file = os.open(self.said, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            os.dup2(file, 1)
            os.dup2(file, 2)
            sys.stdout = open(1, "w", closefd=False)  # not pytest's  # noqa: SIM115
            sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
            for name in RANK_VARIABLES:
                os.environ.pop(name, None)
            os.environ.update(environment)
            torch.set_num_threads(1)
            data = pickle.dumps(function())
            while data:
                data = data[os.write(end, data) :]
            code = 0
        except RunError as error:
            print(error, file=sys.stderr)
            code = FAILED
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def poll(self) -> bool:
        """Whether it has ended; a stopped one hasn't."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is not None

    def wait(self, seconds: float = 60.0) -> Ended:
        """How it ended. A TimeoutError, after it has been killed, where it didn't in time."""
        deadline = time.monotonic() + seconds
        while not self._at_end(deadline - time.monotonic()):
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"it hung for {seconds} s, having said: {self.said.read_text()}")
        if self.code is None:
            _, status = os.waitpid(self.pid, 0)
            self.code = os.waitstatus_to_exitcode(status)
        said = self.said.read_text() if self.said.exists() else ""
        self.said.unlink(missing_ok=True)
        return Ended(self.code, said, pickle.loads(self.data) if self.data else None)

    def _at_end(self, seconds: float) -> bool:
        if not select.select([self.pipe], [], [], max(seconds, 0))[0]:
            return False
        part = os.read(self.pipe, 1 << 20)
        self.data += part
        if not part:
            os.close(self.pipe)
        return not part

    def kill(self) -> None:
        if not self.poll():
            os.kill(self.pid, signal.SIGKILL)
            _, status = os.waitpid(self.pid, 0)
            self.code = os.waitstatus_to_exitcode(status)


def apart(function: Callable[[], Any], folder: Path, seconds: float = 60.0) -> Ended:
    """The function's end, in a fork."""
    return Fork(function, folder).wait(seconds)


def value(ended: Ended) -> Any:
    """What a fork that went well returned."""
    assert ended.code == 0, ended.said
    return ended.value


def ranks(functions: list[Callable[[], Any]], folder: Path) -> list[Fork]:
    """A fork a function, which are the ranks of one world on this machine."""
    meeting = str(folder / f"meeting_{time.monotonic_ns()}")
    common = {"WORLD_SIZE": str(len(functions)), "RENDEZVOUS_FILE": meeting, "GLOO_SOCKET_IFNAME": "lo"}
    return [
        Fork(function, folder, {"RANK": str(rank), "LOCAL_RANK": str(rank), **common})
        for rank, function in enumerate(functions)
    ]


# --- runs ---


def new(path: Path, *overrides: str, num_ranks: int = 1) -> Path:
    """A run's folder, as `fairexp train` makes it."""
    config = compose([*TINY, RANKS[num_ranks], *overrides]).config
    rundir.create(path, config, "fairexp train", {"trusted": [], "max_failures": 3}, {})
    return path


def begun(path: Path, **settings: Any) -> Run:
    """This process's part of the folder's run, at step 0, as the newest attempt. `settings`: of the section checkpoint."""
    run_dir = RunDir(path)
    config = run_dir.config()
    config["checkpoint"] |= settings
    here = dist.place("cpu")
    number = attempt.take(path) if here.first else 0
    run = build.build(run_dir, config, here, Stop())
    number = int(dist.max_over_ranks(torch.tensor(number)))
    run.dir = RunDir(path, attempt.workspace(path, number))
    return run


def again(run: Run, path: Path | None = None) -> None:
    """Another attempt, with the same objects: so that a hundred of them needn't be built."""
    path = path or run.dir.path
    run.dir = RunDir(path, attempt.workspace(path, attempt.take(path)))
    run.saver = checkpoint.Saver(run.here.device)
    run.tracker = Nothing()


def train(run: Run, steps: int = 1) -> None:
    """So many steps with a row of metrics each, without saves."""
    batches = Batches(run.fetch_training, run.training, run.here, 0, run.step)
    for _ in range(steps):
        loss, _ = loop.train_step(run, next(batches), wants_norm=False)
        run.step += 1
        run.tracker.log({"train/loss": float(loss)}, run.step)


def saved(run: Run) -> None:
    """Saves, and waits until it is on the disk."""
    checkpoint.save(run)
    run.saver.finish(run)


def back(run: Run) -> dict[str, str]:
    """Restores the newest checkpoint that is whole and opens the metrics, as a worker does: the state then."""
    checkpoint.restore(run)
    build.track(run)
    return state(run)


def state(run: Run) -> dict[str, str]:
    """All that a checkpoint has to bring back, as digests: the bits of each tensor and generator, the text of the rest."""
    found = {}
    for name, tensor in checkpoint._tensors(run).items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        data = whole.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        found[name] = f"{whole.dtype} {list(whole.shape)} {hashlib.sha256(data).hexdigest()}"
    return found | {"scalars": json.dumps(checkpoint._scalars(run), sort_keys=True)}


def steps(path: Path) -> list[int]:
    """The run's checkpoints."""
    return list(manifest.committed(path / "checkpoints"))


def only_checkpoints(path: Path) -> bool:
    """Whether nothing else lies in checkpoints/, and each has all its files and no other."""
    for folder in (path / "checkpoints").iterdir():
        body = manifest.check_all(folder)
        if {file.name for file in folder.iterdir()} != {*body["files"], manifest.FILE}:
            return False
    return all(folder.name.startswith("step_") for folder in (path / "checkpoints").iterdir())


def leftovers(path: Path) -> list[str]:
    """What earlier attempts have left in their workspaces."""
    return [str(file) for over in (path / "attempts").glob("*/over") for file in over.iterdir()]


# --- the system calls of a save ---


class Calls:
    """Counts the calls that change a file system and strikes at the n-th: before it, or, where it is a write, after its first
    half. `log`: (call, file below `folder`) of each."""

    NAMES = ("open", "mkdir", "rename", "replace", "fsync", "unlink", "rmdir", "link", "symlink")

    def __init__(self, folder: Path, at: int | None = None, strike: Callable[[], None] = lambda: None):
        self.folder = folder
        self.at = at
        self.strike = strike
        self.log: list[tuple[str, str]] = []

    def count(self, name: str, file: Any) -> bool:
        """Notes a call; whether it is the one to strike at."""
        if isinstance(file, int):
            file = os.readlink(f"/proc/self/fd/{file}")
        self.log.append((name, os.path.relpath(os.fsdecode(file), self.folder)))
        return len(self.log) == self.at

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, the calls of this process's threads are counted."""
        before = {name: getattr(os, name) for name in self.NAMES}
        there = builtins.open
        for name, function in before.items():
            setattr(os, name, self._counted(name, function))
        builtins.open = self._open  # type: ignore[assignment]
        try:
            yield
        finally:
            builtins.open = there
            for name, function in before.items():
                setattr(os, name, function)

    def _counted(self, name: str, function: Any) -> Any:
        def call(file: Any, *rest: Any, **more: Any) -> Any:
            folder = more.get("dir_fd")  # as shutil.rmtree works
            where = file if folder is None else os.path.join(os.readlink(f"/proc/self/fd/{folder}"), file)
            changes = name != "open" or (rest and rest[0] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            if changes and self.count(name, where):
                self.strike()
            return function(file, *rest, **more)

        return call

    def _open(self, file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **more: Any) -> Any:
        if not set(mode) & set("wxa+") or isinstance(file, int):
            return io.open(file, mode, buffering, *rest, **more)  # noqa: UP020
        calls = self
        if self.count("open", file):
            self.strike()

        class Raw(io.FileIO):
            def write(self, data: Any) -> int:
                if calls.count("write", self.fileno()):
                    super().write(memoryview(data)[: len(data) // 2])
                    calls.strike()
                return super().write(data)

        raw = Raw(file, mode.replace("b", "").replace("t", ""))
        if buffering == 0:
            return raw
        buffered = io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, **more)


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
