"""Slurm: the script that sbatch gets, its submission, and what a job asks the scheduler about itself."""

from __future__ import annotations

import math
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairexp.config.schema import Slurm
from fairexp.errors import UserError
from fairexp.launch.node import Node, expand
from fairexp.launch.supervise import SIGNALS

# --- submitting ---


def script(
    launcher: Slurm,
    num_processes: int,
    name: str,
    command: str,
    logs: Path,
    count: int | None,
    python_path: Sequence[str],
    exclude: Sequence[str] = (),
    dependency: str | None = None,
) -> str:
    """The sbatch script, made by submitit. One task a node starts that node's ranks; `count`: the elements of an array."""
    import submitit.slurm.slurm as writer  # 0.1 s: only where something is submitted

    cpus = launcher.cpus_per_process and launcher.cpus_per_process * num_processes
    excluded = [*launcher.exclude, *(host for host in exclude if host not in launcher.exclude)]
    wanted: dict[str, Any] = {
        "job_name": name,
        "time": launcher.timeout_min,
        "nodes": launcher.nodes,
        "ntasks_per_node": 1,
        "cpus_per_task": cpus,
        "gpus_per_node": launcher.gpus_per_node or None,
        "mem": launcher.mem_gb and f"{round(launcher.mem_gb * 1024)}M",
        "partition": launcher.partition,
        "account": launcher.account,
        "qos": launcher.qos,
        "constraint": launcher.constraint,
        "exclude": ",".join(excluded) or None,
        "signal_delay_s": launcher.signal_lead_s,
        "dependency": dependency,
        "map_count": count,
        "array_parallelism": launcher.max_parallel or count or 1,
        "wckey": None,
        "stderr_to_stdout": True,
        # ours: a node's failure requeues the job, whatever the cluster's default; what the user gives comes last
        "additional_parameters": {"requeue": True, **launcher.sbatch},
        "setup": [
            # the frozen code comes first, and the working folder not at all
            f"export PYTHONPATH={shlex.quote(os.pathsep.join(python_path))}",
            *(f"export {key}={shlex.quote(str(value))}" for key, value in launcher.env.items()),
            *launcher.setup,
        ],
        # srun doesn't inherit cpus-per-task from sbatch since Slurm 22.05
        "srun_args": ["--kill-on-bad-exit=1", *([f"--cpus-per-task={cpus}"] if cpus else [])],
    }
    return writer._make_sbatch_string(command=command, folder=logs, **wanted)


def available() -> bool:
    """Whether this machine can submit to Slurm."""
    import shutil

    return shutil.which("sbatch") is not None and shutil.which("srun") is not None


def max_array_size() -> int:
    """How many elements an array may have; 1 where arrays are off."""
    found = re.search(r"MaxArraySize\s*=\s*(\d+)", ask("scontrol", "show", "config"))
    return max(int(found[1]), 1) if found else 1000


class LimitReached(Exception):
    """The scheduler takes no more jobs of this user now."""


def check(path: Path) -> str:
    """Why sbatch would refuse the script; empty if it would not, or if that can't be told."""
    done = _run(["sbatch", "--test-only", str(path)], ())
    if done.returncode == 0 or _is_limit(done.stderr) or _is_transient(done.stderr):
        return ""
    # said too where the nodes are only drained, and sbatch without --test-only takes the job
    return "" if "node configuration is not available" in done.stderr else _reason(done.stderr)


def submit(path: Path, name: str, keep_open: Sequence[int]) -> str:
    """Hands the script to sbatch; the job's id. A reply that was lost is looked up by the job's name before trying again.

    `keep_open`: descriptors that sbatch inherits. With the submitter's lock among them, a submitter that was killed still
    holds the lock until its sbatch is over, so the next one sees that job. LimitReached, or UserError with sbatch's words.
    """
    for delay in (1.0, 4.0, 15.0, None):
        done = _run(["sbatch", "--parsable", str(path)], keep_open)
        if done.returncode == 0 and (found := re.match(r"\d+", done.stdout.strip())):
            return found[0]
        if known := find(name):
            return known
        if _is_limit(done.stderr):
            raise LimitReached(_reason(done.stderr))
        if delay is None or not _is_transient(done.stderr):
            raise UserError(f"sbatch refused the job: {_reason(done.stderr)}")
        time.sleep(delay)
    raise AssertionError


def find(name: str) -> str | None:
    """The id of the job of that name, queued, running or over."""
    for command in (
        ("squeue", "-h", "-a", "-t", "all", f"--name={name}", "-o", "%F"),
        ("sacct", "-n", "-X", "-P", f"--name={name}", "-S", "now-30days", "-o", "JobID"),
    ):
        if ids := re.findall(r"^\d+", ask(*command), re.MULTILINE):
            return ids[0]
    return None


def cancel(job_ids: Sequence[str]) -> str:
    """scancel; what it complained about."""
    complaints = ""
    for start in range(0, len(job_ids), 500):
        complaints += _run(["scancel", *job_ids[start : start + 500]], ()).stderr
    return complaints.strip()


def _run(command: Sequence[str], keep_open: Sequence[int]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, stdin=subprocess.DEVNULL, pass_fds=tuple(keep_open), timeout=300
        )
    except FileNotFoundError as error:
        raise UserError(f"launcher=slurm: there is no {command[0]} on this machine's PATH") from error
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"{command[0]}: timed out")


def _is_limit(text: str) -> bool:
    return bool(re.search(r"MaxSubmit|submit limit|MaxJobCount|Job limit|maximum number of jobs", text, re.IGNORECASE))


def _is_transient(text: str) -> bool:
    return bool(
        re.search(r"timed out|Unable to contact|temporarily unable|Connection refused|try again", text, re.IGNORECASE)
    )


def _reason(text: str) -> str:
    return " ".join(text.replace("sbatch: error:", "").replace("allocation failure:", "").split()) or "no reason given"


# --- a job about itself ---


@dataclass(frozen=True)
class Standing:
    """How the scheduler sees the job that we are, at the moment when it is told to stop."""

    cancelled: bool = False
    requeued: bool = False  # by the scheduler: it starts again whatever we do
    ending: bool = False  # preempted with grace, or out of time: it starts again only if we ask
    over: bool = False  # ending, and its processes are killed in a moment


def standing(node: Node) -> Standing:
    """What follows after a stop.

    A job that was cancelled is COMPLETING and its count of restarts stands; one that was requeued or preempted is COMPLETING
    too, and the count has grown. With grace time, or with PreemptMode=CANCEL, it has a PreemptTime and is gone for good if it
    just exits.
    """
    facts = _facts(node)
    if not facts:
        return Standing()
    state = facts.get("JobState", "")
    if int(facts.get("Restarts") or 0) > node.restart or state == "PENDING":
        return Standing(requeued=True)
    since = facts.get("PreemptTime", "None")  # as ISO 8601; an earlier attempt's may still stand there
    preempted = since[:1].isdigit() and since >= facts.get("StartTime", "")
    if preempted or state == "TIMEOUT" or facts.get("Reason") == "TimeLimit":
        return Standing(ending=True, over=state != "RUNNING")
    return Standing(cancelled=state != "RUNNING")


def ends_at(node: Node) -> float:
    """When the job's time is over, as time.time(); infinity where that can't be told."""
    when = _facts(node).get("EndTime", "")
    return time.mktime(time.strptime(when, "%Y-%m-%dT%H:%M:%S")) if when[:1].isdigit() else math.inf


def _facts(node: Node) -> dict[str, str]:
    return dict(re.findall(r"(\w+)=(\S*)", ask("scontrol", "show", "job", "-o", node.job_id or "")))


def last_end(node: Node) -> str:
    """How accounting says that this job's attempt before the present one ended: PREEMPTED, REQUEUED, NODE_FAIL; "" where it
    can't tell."""
    text = ask("sacct", "-n", "-X", "-D", "-P", "-j", node.job_id or "", "-o", "State")
    ended = [line.split()[0] for line in text.splitlines() if not line.startswith(("RUNNING", "PENDING"))]
    return ended[-1] if ended else ""


def elsewhere(node: Node, bad: Sequence[str]) -> list[str]:
    """The nodes that the job has to exclude to start elsewhere than on the bad ones: with them those that it excludes already.

    None where too few others are left: then it would wait for ever.
    """
    facts = _facts(node)
    names = {key: expand(facts.get(key, "").replace("(null)", "")) for key in ("ExcNodeList", "ReqNodeList")}
    excluded = {*names["ExcNodeList"], *bad}
    lines = ask("sinfo", "-h", "-N", "-p", facts.get("Partition", ""), "-o", "%N %T").splitlines()
    left = {line.split()[0] for line in lines if not _is_out(line)} - excluded
    return sorted(excluded) if len(left) >= len(node.hosts) and not excluded & set(names["ReqNodeList"]) else []


def requeue(node: Node, bad: Sequence[str]) -> bool:
    """Puts this job back into the queue, to start again elsewhere than on the bad nodes if it can; whether Slurm took it."""
    exclude = elsewhere(node, bad) if bad else []
    if not node.job_id or ask("scontrol", "requeue", node.job_id, fails="no") == "no":
        return False
    if exclude:
        for _ in range(20):  # refused while the job is still being requeued
            if (
                ask("scontrol", "update", f"JobId={node.job_id}", f"ExcNodeList={','.join(exclude)}", fails="no")
                != "no"
            ):
                break
            time.sleep(0.5)
    return True


def down(hosts: tuple[str, ...]) -> list[str]:
    """Those of the hosts that Slurm has lost or taken out."""
    lines = ask("sinfo", "-h", "-N", "-n", ",".join(hosts), "-o", "%N %T").splitlines()
    return sorted({line.split()[0] for line in lines if _is_out(line)})


def restarted(hosts: Sequence[str], since: float) -> list[str]:
    """Those of the hosts whose slurmd has begun after that time."""
    text = ask("scontrol", "show", "node", "-o", ",".join(hosts))
    began = re.findall(r"NodeName=(\S+).*? SlurmdStartTime=(\d\S+)", text)
    return [host for host, when in began if time.mktime(time.strptime(when, "%Y-%m-%dT%H:%M:%S")) > since]


def _is_out(line: str) -> bool:
    return bool(re.search(r" (down|drain|fail|error|.*\*)", line))


def ask(*command: str, fails: str = "") -> str:
    """The command's output; `fails` where it doesn't answer. It ignores signals: Slurm sends them to each process of a job."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=30, preexec_fn=_ignore_signals, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired):
        return fails
    return done.stdout if done.returncode == 0 else fails


def _ignore_signals() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
