"""The local pool: a process that runs a sweep's runs on this machine as its devices become free, without the terminal.

One daemon a submission; several share the machine's devices by launch.slots. It holds torch and forks each run, which costs
10 ms where a fresh process takes 2 s to import it all; that is safe since it never starts a thread and never touches a GPU.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fairexp.config.rundir import RunDir
from fairexp.config.schema import Launcher, Local
from fairexp.errors import FAILED, PREEMPTED, UserError
from fairexp.launch import submission, submit
from fairexp.launch.node import Node
from fairexp.launch.slots import Slots, Taken
from fairexp.launch.snapshot import Snapshot
from fairexp.launch.submission import Batch
from fairexp.lifetime import die_with
from fairexp.runs.state import alive, own_process, start_time

# Loads torch before it knows what for, so that this happens beside the composing; fairexp comes from the frozen code. With
# torch what any optimizer's constructor (_dynamo, 0.5 s) and any run's last save (checkpoint) would import in each run anew.
WARM = """
import gc, json, os, sys
gc.disable()
failure = None
try:
    import torch, torch._dynamo, torch.distributed.checkpoint
except Exception as error:
    failure = error
order = json.loads(sys.stdin.readline() or "null")
if order:
    log = os.open(order["folder"] + "/pool.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if failure:
        raise failure
    sys.path[:0] = order["paths"]
    from fairexp.launch import pool
    pool.serve(order["folder"])
"""
SIGNALS = (signal.SIGCHLD, signal.SIGTERM)  # blocked in the daemon; they end a pause
LOOK_EVERY_S = 1.0


class Warm:
    """A process that loads torch and waits for its order; without one it ends with us."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", WARM],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # the terminal's end and its ^C are not for it
            env={**os.environ, "OMP_NUM_THREADS": "1"},  # no thread before the forks; each run sets its own number
        )

    def go(self, folder: Path, paths: Sequence[str]) -> None:
        """Hands it its order; it lives on by itself."""
        assert self.process.stdin
        self.process.stdin.write(json.dumps({"folder": str(folder), "paths": list(paths)}).encode() + b"\n")
        self.process.stdin.close()
        self.process.returncode = 0  # it is not waited for

    def close(self) -> None:
        """Ends it: there is nothing to run."""
        self.process.kill()
        self.process.communicate()


def slot_names(launcher: Launcher) -> list[str]:
    """This machine's slots: its GPUs, or CPU places, of which a rank takes one each."""
    assert isinstance(launcher, Local)
    gpus = submit.visible_gpus()
    if gpus:
        return gpus[: launcher.max_parallel]
    return [f"cpu_{number}" for number in range(launcher.max_parallel or len(os.sched_getaffinity(0)))]


def start(
    runs_dir: Path,
    name: str,
    batch: Batch,
    snapshot: Snapshot,
    warm: Warm | None,
    search: str | None = None,
) -> str:
    """Starts a pool for the runs and returns at once; its process id. The first run starts before the last folder is made."""
    devices = slot_names(batch.first.launcher)
    Slots(devices)  # UserError, and nothing is made, where they can't be shared out
    warm = warm or Warm()
    pid = warm.process.pid
    record = {
        **own_process(),
        "pid": pid,
        "started": start_time(pid),
        "submitter": own_process(),
        "devices": devices,
        "job_id": str(pid),
        **({"search": search, "num_processes": batch.first.launch["num_processes"]} if search else {}),
    }
    folder = submission.record(runs_dir, name, batch, record)
    submission.ready(batch, snapshot, folder, batch.runs[:1])
    warm.go(folder, snapshot.import_paths)
    submission.ready(batch, snapshot, folder, batch.runs[1:])
    return str(pid)


def serve(folder: str) -> None:
    """The daemon: runs what the submission lists, in its order, until all of it has ended."""
    record = json.loads((Path(folder) / "submission.json").read_text(encoding="utf-8"))
    preload(record)
    gc.freeze()  # a run's collector leaves these pages alone, so that they stay shared
    gc.enable()
    Pool(record).run()


def preload(record: dict[str, Any]) -> None:
    """Imports what runs are made of, of fairexp's own: the user's code may start threads, and is imported in the runs."""
    import fairexp.launch.job
    import fairexp.runtime.worker
    from fairexp.runtime.make import locate

    with contextlib.suppress(ImportError):
        import fsspec  # noqa: F401  # torch's saving looks for it
    if "search" in record:
        import optuna  # noqa: F401

        import fairexp.launch.trial  # noqa: F401
    for run in record["runs"][:1]:  # the others differ in little
        for target in _own_targets(RunDir(Path(run)).config()):
            with contextlib.suppress(Exception):  # the run says it better
                locate(target)


def _own_targets(node: Any) -> Iterator[str]:
    """The names of fairexp's own classes and functions in a config."""
    if isinstance(node, dict):
        if str(node.get("_target_")).startswith("fairexp."):
            yield node["_target_"]
        for value in node.values():
            yield from _own_targets(value)
    elif isinstance(node, list):
        for value in node:
            yield from _own_targets(value)


class Pool:
    """The queue of one submission, and the runs that it has started."""

    def __init__(self, record: dict[str, Any]):
        self.record = record
        self.slots = Slots(record["devices"])
        runs = [Path(run) for run in record["runs"]]
        # behind the runs, a search's trials: each finds out what it runs when it starts
        self.queue: deque[Path | int] = deque([*runs, *range(len(runs), len(runs) + record["slots"])])
        self.running: dict[int, Path | int] = {}
        self.told: set[int] = set()  # the running ones that were asked to end
        self.look_at = 0.0
        self.stopping = False

    def run(self) -> None:
        """Until nothing waits and nothing runs. SIGTERM: the runs save and end, and those that wait don't begin."""
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        while self.queue or self.running:
            self._pause(0.0 if self.queue else LOOK_EVERY_S)
            if self.stopping:
                self.queue.clear()
            if not self.queue or not self._is_ready(item := self.queue[0]):
                continue
            taken = self._take(self._count(item))
            if taken is None:
                continue
            with taken:  # ours; the child keeps its own
                if self._still_wanted():
                    self.queue.popleft()
                    self.running[self._fork(item, taken)] = item

    def _pause(self, seconds: float) -> None:
        """Waits until a run has ended or SIGTERM has come, at most so long; then sees to what has happened meanwhile."""
        came = signal.sigtimedwait(SIGNALS, seconds)
        if came and came.si_signo == signal.SIGTERM:
            self.stopping = True
            self._end(list(self.running))
        self._reap()
        if time.monotonic() > self.look_at:
            # a run that began while `fairexp cancel` went through a long list was queued in that list
            runs = {pid: RunDir(item) for pid, item in self.running.items() if isinstance(item, Path)}
            self._end([pid for pid, run in runs.items() if run.status().get("cancel")])
            self.look_at = time.monotonic() + LOOK_EVERY_S

    def _end(self, pids: Sequence[int]) -> None:
        """Asks running runs to save and end, each once."""
        for pid in pids:
            if pid not in self.told:
                self.told.add(pid)
                os.kill(pid, signal.SIGTERM)  # ours until it is waited for, so never another's

    def _reap(self) -> None:
        """Takes note of the runs that have ended; one that was killed, or asks for another attempt, goes to the queue's end."""
        for pid in list(self.running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                item = self.running.pop(pid)
                self.told.discard(pid)
                code = os.waitstatus_to_exitcode(status)
                if (code == PREEMPTED or code < 0) and not self.stopping:
                    self.queue.append(item)  # begin() counts, and stops a run that doesn't get on

    def _is_ready(self, item: Path | int) -> bool:
        """Whether the run's folder is there and it is still to be run; drops it from the queue where it is not."""
        if isinstance(item, int):
            return True
        run = RunDir(item)
        if not self._is_ours(run):
            submitter = self.record["submitter"]
            if alive(submitter["pid"], submitter["started"]):
                self._pause(0.01)
            elif not self._is_ours(run):  # it might have been made meanwhile
                self.queue.popleft()  # the submitter was killed: the same command submits it, or has done so
            return False
        status = run.status()
        if status.get("cancel") and status["state"] != "finished":
            run.set_status(state="cancelled")  # it was told so as it died, and came back into the queue
        elif status["state"] not in ("cancelled", "finished"):
            return True
        self.queue.popleft()
        return False

    def _is_ours(self, run: RunDir) -> bool:
        """Whether the run has been readied for this pool: one that exists from before names another submission till then."""
        return run.status().get("submission") == self.record["uid"]

    def _still_wanted(self) -> bool:
        """Whether the queue's first still waits; asked while it does."""
        item = self.queue[0]
        if self.stopping or isinstance(item, int):
            return not self.stopping
        status = RunDir(item).status()
        return self._is_ours(RunDir(item)) and not status.get("cancel") and status["state"] != "cancelled"

    def _count(self, item: Path | int) -> int:
        if isinstance(item, int):
            return self.record["num_processes"]
        return RunDir(item).launch()["num_processes"]

    def _take(self, count: int) -> Taken | None:
        """Waits for the slots; None when that is no longer wanted, or can't be done now."""
        try:
            return self.slots.take(count, self._still_wanted, self._pause)
        except UserError as error:  # the disk is full: those that run go on
            print(error, file=sys.stderr, flush=True)
            self._pause(10.0)
            return None

    def _fork(self, item: Path | int, taken: Taken) -> int:
        daemon = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        if pid := os.fork():
            return pid
        code = FAILED
        try:
            die_with(daemon)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            if not taken.names[0].startswith("cpu_"):
                os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(taken.names)
            code = self._attempt(item, daemon, taken)
        except UserError as error:
            print(error, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _attempt(self, item: Path | int, daemon: int, taken: Taken) -> int:
        from fairexp.launch import job

        if isinstance(item, int):
            from fairexp.launch import trial

            run_dir = trial.run_dir_of(self.record, item)
        else:
            run_dir = RunDir(item)
        run_dir.set_status(slots=list(taken.names))
        code = job.attempt(run_dir, Node("pool", job_id=str(daemon), submission=self.record["uid"]))
        if "search" in self.record:
            from fairexp.launch import trial

            trial.tell(self.record, run_dir)
        return code
