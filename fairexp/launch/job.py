"""One node's part of an attempt at a run: from the run folder to the ranks' exit codes, and what follows from them.

submitit runs `Job("runs/x")` on this machine; Slurm runs `python -m fairexp.launch.job SUBMISSION.json` once a node.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":  # a task of Slurm's: a signal waits from here on, until the ranks can be told
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2))

import gc
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairexp.beacon import beacons
from fairexp.config.attempt import take
from fairexp.config.manifest import committed
from fairexp.config.rundir import RunDir
from fairexp.errors import DONE, FAILED, INTERRUPTED, PREEMPTED, RunError
from fairexp.launch import hang, slurm, stacks
from fairexp.launch.node import Node, environment_of, meet, on_slurm
from fairexp.launch.supervise import SIGNALS, supervise
from fairexp.lifetime import die_with

SPARE_S = 20.0  # for a step, and to leave, besides twice the slowest save so far
MEETS_IN_TIME_S = 5.0  # another node's ranks write down why they ended; ours may notice first that they have gone


@dataclass(frozen=True)
class Job:
    """One run on this machine: `Job("runs/x")()` starts its ranks and returns the run's exit code."""

    run_dir: str

    def __call__(self) -> int:
        die_with(os.getppid())  # submitit's controller; and the ranks die with this process
        os.setsid()  # away from the terminal: its ^C would reach each rank beside the one that is passed on
        code = PREEMPTED
        while code == PREEMPTED:  # it hung
            code = attempt(RunDir(Path(self.run_dir)), Node("local", job_id=str(os.getppid())))
        return code


def main(submission_file: str) -> int:
    """A Slurm task: this node's part of the run that the submission lists under the array's index."""
    submission = json.loads(Path(submission_file).read_text(encoding="utf-8"))
    index = int(os.environ.get("SLURM_ARRAY_TASK_ID", "0"))
    node = on_slurm(submission["uid"], os.environ)
    if index < len(submission["runs"]):
        run_dir = RunDir(Path(submission["runs"][index]))
    else:
        from fairexp.launch import trial

        run_dir = trial.run_dir_of(submission, index, node.first)
    code = attempt(run_dir, node)
    if "search" in submission and node.first:
        from fairexp.launch import trial

        trial.tell(submission, run_dir)
    return code


def attempt(run_dir: RunDir, node: Node) -> int:
    """Runs this node's ranks; DONE, FAILED, INTERRUPTED, or PREEMPTED where the run is to start again."""
    gc.disable()  # a sixth of torch's import; the worker enables it before the loop
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until the ranks can be told: torch is imported first
    launch = run_dir.launch()
    os.chdir(launch["cwd"])
    sys.path[:0] = [folder for folder in launch["sys_path"] if folder not in sys.path]
    number: int | None = None
    if node.first:
        number = begin(run_dir, node, launch)
        if number is None:
            if len(node.hosts) > 1:
                meet(run_dir, node, None)
            return DONE if run_dir.status()["state"] in ("finished", "cancelled") else FAILED
    rendezvous: dict[str, str] = {}
    listener: socket.socket | None = None
    if len(node.hosts) > 1:
        place, listener = meet(run_dir, node, number)
        number = place["attempt"]
        if number is None:
            return DONE  # the first node has said why
        rendezvous = environment_of(node, place)
    else:
        file = run_dir.submit / f"rendezvous_{number}"
        file.unlink(missing_ok=True)
        rendezvous = {"RENDEZVOUS_FILE": str(file)}

    # the ranks are forked from a process that holds torch, in the last moment before it has threads
    os.environ.update(variables(launch, len(node.hosts)))
    from fairexp.runtime import worker

    per_node = launch["num_processes"]

    def environment(k: int) -> dict[str, str]:
        rank = node.index * per_node + k
        own = {"RENDEZVOUS_FD": str(listener.fileno())} if listener and rank == 0 else {}
        return (
            rendezvous
            | own
            | {
                "RANK": str(rank),
                "LOCAL_RANK": str(k),
                "WORLD_SIZE": str(len(node.hosts) * per_node),
                "LOCAL_WORLD_SIZE": str(per_node),
                "FAIREXP_HOST": node.host,
                "FAIREXP_ATTEMPT": str(number),
            }
        )

    signs = beacons(per_node)
    assert number is not None
    watch = hang.Watch(run_dir, node, number, signs, run_dir.config()["trainer"]["hang_timeout_s"])

    def rank(k: int) -> int:
        stacks.offer(watch.stacks_of(k))
        return worker.main(run_dir, signs[k])

    over = False  # the job's time is, and we asked for another attempt

    def told() -> bool:
        nonlocal over
        if node.kind == "slurm" and node.first and not over:  # a second signal would see the job that was requeued
            over = keep_place(run_dir, node)
        return over

    codes = supervise(
        per_node,
        environment,
        lambda k: run_dir.logs / f"rank_{node.index * per_node + k}.attempt_{number}.log",
        rank,
        launch["owner"],
        told=told,
        hangs=watch.hangs,
        ends=EndsInTime(run_dir, slurm.ends_at(node)) if node.kind == "slurm" and node.first else None,
    )
    watch.close()
    codes = {node.index * per_node + k: code for k, code in codes.items()}
    if listener:
        listener.close()
    if "RENDEZVOUS_FILE" in rendezvous:
        Path(rendezvous["RENDEZVOUS_FILE"]).unlink(missing_ok=True)
    if owner_is_gone(launch["owner"]):
        run_dir.set_status(state="failed", error=f"the command that followed it (process {launch['owner']}) was killed")
        return FAILED
    return conclude(run_dir, codes, node, number, over)


# --- before ---


def begin(run_dir: RunDir, node: Node, launch: dict[str, Any]) -> int | None:
    """Opens the next attempt; its number, or None where there is none to be: the run is over, another submission has it, it
    has failed too often without getting on, or it lies on a node that it failed on twice."""
    status = run_dir.status()
    if status["state"] in ("finished", "cancelled"):
        return None
    if status.get("submission") != node.submission or not claim(run_dir, node):
        print(f"{run_dir.path}: another submission has this run; nothing to do", file=sys.stderr, flush=True)
        return None
    saved = last_saved(run_dir)
    if status["state"] == "running":  # the last attempt ended without a word: its node failed, or it was killed
        status |= after_silence(run_dir, node, status)
    if status.get("failures", 0) >= launch.get("max_failures", 3):
        error = f"no progress in {status['failures']} attempts: {status.get('error') or 'they ended without a word'}"
        run_dir.set_status(state="failed", **{**status, "state": "failed", "error": error})
        return None
    bad = bad_hosts(status)
    if node.kind == "slurm" and set(bad) & set(node.hosts) and bad != status.get("avoids"):
        # once: where Slurm sends the run back to such a node, it stays there
        keys = ("failures", "failed_hosts")
        run_dir.set_status(state="preempted", avoids=bad, **{key: status[key] for key in keys if key in status})
        if slurm.elsewhere(node, bad) and slurm.requeue(node, bad):
            time.sleep(60)  # Slurm ends us
            return None
    for stale in run_dir.logs.glob("error_*.json"):
        stale.unlink()
    number = take(run_dir.path)
    run_dir.set_status(
        state="running",
        attempts=number,
        pid=os.getpid(),
        host=node.host,
        hosts=list(node.hosts),
        job_id=node.job_id,
        error=None,
        signal=None,
        resumed_at=saved,
        failures=status.get("failures", 0),
        failed_hosts=status.get("failed_hosts", []),
    )
    if run_dir.status().get("cancel"):  # told so while it became a running one
        run_dir.set_status(state="cancelled")
        return None
    return number


def claim(run_dir: RunDir, node: Node) -> bool:
    """Whether the run is this job's. Two jobs of one submission, should a scheduler ever make two, are not both told yes;
    a requeued job is the same one."""
    if node.submission is None:
        return True
    file = run_dir.submit / f"claim_{node.submission}"
    try:
        os.symlink(node.job_id or "", file)  # a link appears with what it says; a file would be empty for a moment
    except FileExistsError:
        return os.readlink(file) == node.job_id
    return True


def last_saved(run_dir: RunDir) -> int:
    """The step of the newest checkpoint."""
    return max(committed(run_dir.checkpoints), default=0)


def after_silence(run_dir: RunDir, node: Node, status: dict[str, Any]) -> dict[str, Any]:
    """The counts after an attempt that ended without a word. One that was preempted didn't fail: it had no time to save."""
    hosts = tuple(status.get("hosts") or [])
    if node.kind != "slurm" or not hosts:
        return after_failure(run_dir, status, [])
    end = slurm.last_end(node)
    if end == "PREEMPTED":
        return {}
    lost = slurm.down(hosts)
    if end == "NODE_FAIL" and not lost:  # they are back
        lost = slurm.restarted(hosts, since=status["heartbeat"]) if len(hosts) > 1 else list(hosts)
    return after_failure(run_dir, status, lost)


def after_failure(run_dir: RunDir, status: dict[str, Any], hosts: Sequence[str]) -> dict[str, Any]:
    """The counts after an attempt that failed through no fault of the user's code."""
    progressed = last_saved(run_dir) > status.get("resumed_at", 0)
    return {
        "failures": 1 if progressed else status.get("failures", 0) + 1,
        "failed_hosts": [*status.get("failed_hosts", []), *hosts],
    }


def bad_hosts(status: dict[str, Any]) -> list[str]:
    """The nodes that this run has failed on twice."""
    failed = status.get("failed_hosts") or []
    return sorted({host for host in failed if failed.count(host) > 1})


def variables(launch: dict[str, Any], nodes: int = 1) -> dict[str, str]:
    """Environment variables of every rank, to be set before torch is imported."""
    fixed = {"OMP_NUM_THREADS": str(launch["threads"]), "PYTHONUNBUFFERED": "1"}
    if launch["devices"] is not None:  # submitit's local executor has overwritten it
        fixed["CUDA_VISIBLE_DEVICES"] = launch["devices"]
    if nodes == 1:
        # one machine: the ranks talk over the loopback interface, so nothing of a run can be reached from outside
        fixed["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    return fixed


class EndsInTime:
    """Whether a stop has to begin now, so that the save is over when the job's time is: where saves are slow, before the signal
    that comes launcher.signal_lead_s ahead."""

    def __init__(self, run_dir: RunDir, ends_at: float):
        self.run_dir = run_dir
        self.ends_at = ends_at
        self.look_at = 0.0

    def __call__(self) -> bool:
        now = time.time()
        if now < self.look_at:
            return False
        self.look_at = now + 5.0
        return now + 2 * self.run_dir.status().get("save_s", 0.0) + SPARE_S > self.ends_at


# --- after ---


def keep_place(run_dir: RunDir, node: Node) -> bool:
    """Asks for another attempt as soon as the job's time is over: its ranks may be killed before they have saved. Whether it
    is over."""
    status, over = run_dir.status(), slurm.standing(node).over
    if over and not status.get("cancel"):
        slurm.requeue(node, bad_hosts(status))
    return over


def conclude(run_dir: RunDir, codes: dict[int, int], node: Node, number: int | None = None, over: bool = False) -> int:
    """The node's exit code from its ranks', after status.json says how the attempt ended and, where it should, the job is
    back in the queue. `number`: of the attempt; `over`: the job's time was, so `keep_place` has asked for another one."""
    status = run_dir.status()
    if number is not None and (status["attempts"], status.get("submission")) != (number, node.submission):
        print(f"{run_dir.path}: another attempt has this run; nothing to say", file=sys.stderr, flush=True)
        return FAILED  # Slurm had lost this node, which lived on
    if all(code == DONE for code in codes.values()):
        return DONE
    if all(code in (DONE, INTERRUPTED) for code in codes.values()):
        return stopped(run_dir, node, number, over) if node.first else DONE  # all nodes' ranks stopped at one step
    if node.kind != "slurm":
        return failed(run_dir, codes, node, number)
    if not _first_to_say(run_dir, node, codes):
        return DONE  # at another code srun would end the node that is about to say it, within KillWait
    return failed(run_dir, codes, node, number)


def stopped(run_dir: RunDir, node: Node, number: int | None = None, over: bool = False) -> int:
    """A signal stopped the ranks, and they have saved unless they hung: requeued exactly where the scheduler would let the run
    be lost."""
    status = run_dir.status()
    if node.kind != "slurm":
        run_dir.set_status(state="cancelled" if status.get("cancel") else "interrupted")
        return INTERRUPTED
    now = slurm.standing(node)
    if now.cancelled or status.get("cancel"):
        run_dir.set_status(state="cancelled")
        return INTERRUPTED
    if now.requeued and not over:
        run_dir.set_status(state="preempted")
        return PREEMPTED
    if over or now.ending or status.get("signal") in (signal.SIGUSR1, signal.SIGUSR2):
        changes: dict[str, Any] = {"failures": 0}
        hung = hang.verdict(run_dir, number)  # in a step longer than the grace time: as if Slurm had ended it
        if hung or last_saved(run_dir) <= status.get("resumed_at", 0):  # or its whole time was not enough for a step
            changes = after_failure(run_dir, status, [])
        return back_into_the_queue(run_dir, node, status, changes, asked=now.requeued)
    run_dir.set_status(state="interrupted")
    return INTERRUPTED


def failed(run_dir: RunDir, codes: dict[int, int], node: Node, number: int | None) -> int:
    """An exception of the run's code ends the run. A rank or a data loading process that was killed, or a rank that lost sight
    of the others, is the machine's fault: the run starts again, as long as it gets on; so does one that hung, also at a
    terminal."""
    error = first_error(run_dir)
    hung = None if error else hang.verdict(run_dir, number)
    cause = hung.line if hung else root_cause(run_dir, codes, node)
    if (error and not error["machine"]) or not (hung or node.kind.startswith(("slurm", "pool"))):
        run_dir.set_status(state="failed", error=cause)
        return FAILED
    if hung:
        run_dir.set_status(hang=cause)  # stays, while the next attempt clears the error
    status = run_dir.status()
    if node.kind == "local" and status.get("cancel"):
        run_dir.set_status(state="cancelled", error=cause)
        return INTERRUPTED
    hosts: list[str] = []
    if node.kind == "slurm":
        now = slurm.standing(node)
        if now.cancelled or status.get("cancel"):
            run_dir.set_status(state="cancelled", error=cause)
            return INTERRUPTED
        hosts = slurm.down(node.hosts)
        if now.requeued:  # since one of the nodes failed, or somebody wished it
            counts = after_failure(run_dir, status, hosts) if hosts else {}
            run_dir.set_status(state="preempted", error=cause, **counts)
            return PREEMPTED
        if not hosts and (error or first_cause(codes)[1] < 0):
            hosts = [hung.host if hung else error["host"] if error else node.host]
    return back_into_the_queue(run_dir, node, status, {"error": cause} | after_failure(run_dir, status, hosts))


def back_into_the_queue(
    run_dir: RunDir, node: Node, status: dict[str, Any], changes: dict[str, Any], asked: bool = False
) -> int:
    """Asks for another attempt, where it isn't `asked` for already, unless the run doesn't get on."""
    most = run_dir.launch().get("max_failures", 3)
    if changes["failures"] >= most:
        why = changes.get("error") or "its time limit is too short for a step and a save"
        run_dir.set_status(**changes | {"state": "failed", "error": f"no progress in {most} attempts: {why}"})
        return FAILED
    run_dir.set_status(state="preempted", **changes)
    if node.kind == "slurm" and not asked and not slurm.requeue(node, bad_hosts(status | changes)):
        run_dir.set_status(state="interrupted", error="scontrol requeue was refused; the same command goes on")
        return INTERRUPTED
    return PREEMPTED


def _first_to_say(run_dir: RunDir, node: Node, codes: dict[int, int]) -> bool:
    """Whether this node says how the attempt failed: one of them, and rather the one where it began."""
    if len(node.hosts) == 1:
        return True
    verdict = run_dir.submit / f"verdict_{node.job_id}.{node.restart}"
    if first_cause(codes)[1] >= 0:  # its ranks only lost their peers: another node knows why, unless Slurm has lost it
        deadline, ask_at = time.monotonic() + MEETS_IN_TIME_S, 0.0
        while time.monotonic() < deadline and not verdict.exists() and first_error(run_dir) is None:
            if time.monotonic() > ask_at:
                if slurm.standing(node).requeued:
                    break
                ask_at = time.monotonic() + 1.0
            time.sleep(0.1)
    try:
        os.close(os.open(verdict, os.O_CREAT | os.O_EXCL, 0o666))
    except FileExistsError:
        return False
    return True


def owner_is_gone(owner: int | None) -> bool:
    """Whether the command that followed the run has been killed."""
    return owner is not None and not Path(f"/proc/{owner}").exists()


def root_cause(run_dir: RunDir, codes: dict[int, int], node: Node) -> str:
    """The first rank's own error: those of its siblings ("connection closed by peer") only follow from it."""
    rank, code = first_cause(codes)
    error = first_error(run_dir)
    host = error["host"] if error else node.host
    where = f" on {host}" if len(node.hosts) > 1 else ""
    if error:
        return f"rank {error['rank']}{where}: {error['error']}"
    if code < 0:
        hint = " (out of memory?)" if code == -signal.SIGKILL else ""
        return f"rank {rank}{where} was killed by {signal.Signals(-code).name}{hint}"
    return f"rank {rank}{where} ended with exit code {code}"


def first_cause(codes: dict[int, int]) -> tuple[int, int]:
    """The rank that failed before its siblings, which were ended then, and its exit code."""
    return next((rank, code) for rank, code in codes.items() if code not in (DONE, INTERRUPTED))


def first_error(run_dir: RunDir) -> dict[str, Any] | None:
    """The exception that came first, if a rank could write one down that isn't the loss of another rank."""
    errors = [json.loads(path.read_text(encoding="utf-8")) for path in run_dir.logs.glob("error_*.json")]
    own = [error for error in errors if not error["lost_peer"]]
    return min(own, key=lambda error: error["time"], default=None)


def _exit(run: Callable[[], int]) -> int:
    try:
        return run()
    except RunError as error:
        print(error, file=sys.stderr, flush=True)
        return FAILED


if __name__ == "__main__":
    sys.exit(_exit(lambda: main(sys.argv[1])))
