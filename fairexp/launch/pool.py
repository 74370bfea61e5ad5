"""The local pool: a process that runs a sweep's runs on this machine as its devices become free, without the terminal.

One daemon a submission; several share the machine's devices by launch.slots. It holds torch and forks each run, which costs
10 ms where a fresh process takes 1.2 s to import it; that is safe since it never starts a thread and never touches a GPU.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from fairexp.config.rundir import RunDir
from fairexp.config.schema import Launcher, Local
from fairexp.errors import FAILED, PREEMPTED, UserError
from fairexp.launch import submission, submit
from fairexp.launch.node import Node
from fairexp.launch.slots import Slots, Taken
from fairexp.launch.snapshot import Snapshot
from fairexp.launch.submission import Batch, Wanted
from fairexp.lifetime import die_with
from fairexp.runs.state import alive, own_process, start_time

# Loads torch before it knows what for, so that this happens beside the composing; fairexp comes from the frozen code.
WARM = """
import json, sys
import torch
order = json.loads(sys.stdin.readline() or "null")
if order:
    sys.path[:0] = order["paths"]
    from fairexp.launch import pool
    pool.serve(order["folder"])
"""


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
    wanted: Sequence[Wanted],
    snapshot: Snapshot,
    warm: Warm | None,
    search: dict[str, Any] | None = None,
) -> str:
    """Starts a pool for the runs and returns at once; its process id. The first run starts before the last folder is made."""
    warm = warm or Warm()
    batch = Batch(list(wanted))
    pid = warm.process.pid
    record = {
        **own_process(),
        "pid": pid,
        "started": start_time(pid),
        "submitter": own_process(),
        "slots": slot_names(wanted[0].launcher),
        "job_id": str(pid),
        **({"search": search} if search else {}),
    }
    folder = submission.record(runs_dir, name, batch, record)
    if search:
        warm.go(folder, snapshot.import_paths)
    else:
        submission.ready(batch, snapshot, folder, batch.runs[:1])
        warm.go(folder, snapshot.import_paths)
        submission.ready(batch, snapshot, folder, batch.runs[1:])
    return str(pid)


def serve(folder: str) -> None:
    """The daemon: runs what the submission lists, in its order, until all of it has ended."""
    log = os.open(Path(folder) / "pool.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    record = json.loads((Path(folder) / "submission.json").read_text(encoding="utf-8"))
    from fairexp.runtime import worker  # noqa: F401  # the runs are forked with it

    if "search" in record:
        from fairexp.launch import trial  # noqa: F401
    Pool(record).run()


class Pool:
    """The queue of one submission, and the runs that it has started."""

    def __init__(self, record: dict[str, Any]):
        self.record = record
        self.slots = Slots(record["slots"])
        count = record["search"]["num_trials"] if "search" in record else 0
        self.queue: deque[Path | int] = deque(range(count) if count else map(Path, record["runs"]))
        self.running: dict[int, Path | int] = {}
        self.stopping = False

    def run(self) -> None:
        """Until nothing waits and nothing runs. SIGTERM: the runs save and end, and those that wait don't begin."""
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        while self.queue or self.running:
            self._reap()
            if self.stopping:
                self.queue.clear()
            if not self.queue:
                time.sleep(0.1)
                continue
            item = self.queue[0]
            if not self._is_ready(item):
                continue
            taken = self.slots.take(self._count(item), self._still_wanted)
            if taken is None:
                continue
            with taken:  # ours; the child keeps its own
                self.queue.popleft()
                self.running[self._fork(item, taken)] = item

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopping = True
        for pid in self.running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    def _is_ready(self, item: Path | int) -> bool:
        """Whether the run's folder is there and it is still to be run; drops it from the queue where it is not."""
        if isinstance(item, int):
            return True
        if not (item / "status.json").exists():
            submitter = self.record["submitter"]
            if alive(submitter["pid"], submitter["started"]) or (item / "status.json").exists():
                time.sleep(0.01)
            else:
                self.queue.popleft()  # the submitter was killed: the same command submits it
            return False
        if RunDir(item).status()["state"] in ("cancelled", "finished"):
            self.queue.popleft()
            return False
        return True

    def _count(self, item: Path | int) -> int:
        if isinstance(item, int):
            return self.record["search"]["num_processes"]
        return RunDir(item).launch()["num_processes"]

    def _still_wanted(self) -> bool:
        """Whether the queue's first still waits; asked while it does."""
        self._reap()
        item = self.queue[0]
        return not self.stopping and (isinstance(item, int) or RunDir(item).status()["state"] != "cancelled")

    def _fork(self, item: Path | int, taken: Taken) -> int:
        daemon = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        if pid := os.fork():
            return pid
        code = FAILED
        try:
            die_with(daemon)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
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
        if isinstance(item, int):
            trial.tell(self.record, item, run_dir)
        return code

    def _reap(self) -> None:
        """Takes note of the runs that have ended; one that was killed, or asks for another attempt, goes to the queue's end."""
        for pid in list(self.running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                item = self.running.pop(pid)
                code = os.waitstatus_to_exitcode(status)
                if (code == PREEMPTED or code < 0) and not self.stopping:
                    self.queue.append(item)  # begin() counts, and stops a run that doesn't get on
