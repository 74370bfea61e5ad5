"""What submitit runs on a node: the run folder's path and nothing else, so that a requeue is the same object."""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairexp.config.rundir import RunDir
from fairexp.errors import DONE, FAILED, INTERRUPTED
from fairexp.launch.supervise import SIGNALS, supervise
from fairexp.lifetime import die_with


@dataclass(frozen=True)
class Job:
    """One run: `Job("runs/x")()` starts its ranks on this node and returns the run's exit code."""

    run_dir: str

    def __call__(self) -> int:
        gc.disable()  # a sixth of torch's import; the worker enables it before the loop
        run_dir = RunDir(Path(self.run_dir))
        launch = run_dir.launch()
        die_with(os.getppid())  # submitit's controller; and the ranks die with this process
        os.setsid()  # away from the terminal: its ^C would reach each rank beside the one that is passed on
        os.chdir(launch["cwd"])
        sys.path[:0] = [folder for folder in launch["sys_path"] if folder not in sys.path]
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until the ranks can be told: torch is imported first
        attempt = run_dir.status().get("attempts", 0) + 1
        run_dir.set_status(state="running", attempts=attempt, pid=os.getpid(), host=socket.gethostname(), error=None)
        for stale in run_dir.logs.glob("error_*.json"):
            stale.unlink()
        rendezvous = run_dir.submit / f"rendezvous_{attempt}"
        rendezvous.unlink(missing_ok=True)

        # the ranks are forked from a process that holds torch, in the last moment before it has threads
        for name, value in variables(launch).items():
            os.environ[name] = value
        from fairexp.runtime import worker

        def environment(k: int) -> dict[str, str]:
            return {
                "RANK": str(k),
                "LOCAL_RANK": str(k),
                "WORLD_SIZE": str(launch["num_processes"]),
                "LOCAL_WORLD_SIZE": str(launch["num_processes"]),
                "RENDEZVOUS_FILE": str(rendezvous),
            }

        codes = supervise(
            launch["num_processes"],
            environment,
            lambda k: run_dir.logs / f"rank_{k}.attempt_{attempt}.log",
            lambda: worker.main(run_dir),
            launch["owner"],
        )
        rendezvous.unlink(missing_ok=True)
        if owner_is_gone(launch["owner"]):
            run_dir.set_status(
                state="failed", error=f"the command that followed it (process {launch['owner']}) was killed"
            )
            return FAILED
        return conclude(run_dir, codes)


def variables(launch: dict[str, Any]) -> dict[str, str]:
    """Environment variables of every rank, to be set before torch is imported."""
    fixed = {"OMP_NUM_THREADS": str(launch["threads"]), "PYTHONUNBUFFERED": "1"}
    if launch["devices"] is not None:  # submitit's local executor has overwritten it
        fixed["CUDA_VISIBLE_DEVICES"] = launch["devices"]
    # one machine: the ranks talk over the loopback interface, so nothing of a run can be reached from outside
    return {**fixed, "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo")}


def conclude(run_dir: RunDir, codes: dict[int, int]) -> int:
    """The run's exit code from its ranks'; where no rank could say how it ended, status.json says it now."""
    if all(code == DONE for code in codes.values()):
        return DONE
    if all(code in (DONE, INTERRUPTED) for code in codes.values()):
        return INTERRUPTED
    run_dir.set_status(state="failed", error=root_cause(run_dir, codes))
    return FAILED


def owner_is_gone(owner: int | None) -> bool:
    """Whether the command that followed the run has been killed."""
    return owner is not None and not Path(f"/proc/{owner}").exists()


def root_cause(run_dir: RunDir, codes: dict[int, int]) -> str:
    """The first rank's own error: those of its siblings ("connection closed by peer") only follow from it."""
    rank, code = next((rank, code) for rank, code in codes.items() if code not in (DONE, INTERRUPTED))
    if error := first_error(run_dir):
        return f"rank {error['rank']}: {error['error']}"
    if code < 0:
        hint = " (out of memory?)" if code == -signal.SIGKILL else ""
        return f"rank {rank} was killed by {signal.Signals(-code).name}{hint}"
    return f"rank {rank} ended with exit code {code}"


def first_error(run_dir: RunDir) -> dict[str, Any] | None:
    """The exception that came first, if a rank could write one down that isn't the loss of another rank."""
    errors = [json.loads(path.read_text(encoding="utf-8")) for path in run_dir.logs.glob("error_*.json")]
    own = [error for error in errors if not error["lost_peer"]]
    return min(own, key=lambda error: error["time"], default=None)
