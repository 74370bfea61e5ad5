"""What doctor asks a Slurm cluster about what launcher=slurm wants of it; last, a job that looks around on a node."""

from __future__ import annotations

import json
import math
import os
import platform
import pwd
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fairexp.config.nearest import nearest
from fairexp.config.schema import Slurm, Trainer
from fairexp.errors import UserError
from fairexp.launch import slurm as submission
from fairexp.launch.doctor.check import Finding, Problems, ask, judge
from fairexp.launch.doctor.machine import PROBE, judge_probe, skew_problems, standing
from fairexp.runs.find import runs

JOB_WAIT_S = 60.0  # for the test job to start and to answer
Row = dict[str, str]


def settings() -> Row:
    """The cluster's, by name."""
    return dict(re.findall(r"^(\S+) += ?(.*?) *$", ask("scontrol", "show", "config"), re.MULTILINE))


def partitions(launcher: Slurm) -> tuple[list[str], dict[str, Row]]:
    """The names of those asked for, or of the cluster's default one, and all that there are."""
    lines = ask("scontrol", "show", "partition", "--oneliner", "--all").splitlines()
    known = {row["PartitionName"]: row for row in (dict(re.findall(r"(\S+?)=(\S*)", line)) for line in lines)}
    names = launcher.partition or os.environ.get("SBATCH_PARTITION")
    return names.split(",") if names else [name for name, row in known.items() if row["Default"] == "YES"], known


def asked_for(launcher: Slurm) -> list[Row]:
    """The partitions that a job may go to."""
    names, known = partitions(launcher)
    return [known[name] for name in names]


def seconds(text: str) -> float:
    """A time as Slurm writes it, `1-02:00:00`, `00:10:00`, `5 sec` or `15`; infinite where there is no limit."""
    if not text[:1].isdigit():
        return math.inf
    days, _, clock = text.removesuffix(" sec").rpartition("-")
    return int(days or 0) * 86400 + sum(int(part) * 60**place for place, part in enumerate(clock.split(":")[::-1]))


def slurm(launcher: Slurm) -> Finding:
    """Whether the cluster answers and has the partition; the cluster's limits."""
    if not shutil.which("sbatch"):
        return Finding("fail", "no sbatch on PATH", "go to a login node of the cluster, or use launcher=local")
    found, (names, known) = settings(), partitions(launcher)
    if unknown := [name for name in names or ["by default"] if name not in known]:
        return Finding("fail", f"no partition {unknown[0]}", f"set launcher.partition{nearest(unknown[0], known)}")
    words = ", ".join(f"{name} {found[name]}" for name in ("MaxArraySize", "MaxJobCount"))
    return Finding("ok", f"{ask('sinfo', '-V')}, cluster {found['ClusterName']}: {words}")


def accounting(launcher: Slurm) -> Finding:
    """Whether sacct can say how a job ended that slurmctld has forgotten, and whether account and qos are this user's."""
    found = settings()
    if found["AccountingStorageType"].endswith(("none", "(null)")):
        advice = f"how a job ended is known for {found['MinJobAge']}, then only by the run's own files"
        return Finding("warn", "off, sacct can't answer", advice)
    ask("sacct", "--noheader", "--allocations", "--starttime=now")
    user = pwd.getpwuid(os.getuid()).pw_name
    rows = ask("sacctmgr", "-nP", "show", "assoc", "where", f"user={user}", "format=account,qos").splitlines()
    own = [(account, qos.split(",")) for account, qos in (row.split("|") for row in rows)]
    longest = dict(row.split("|") for row in ask("sacctmgr", "-nP", "show", "qos", "format=name,maxwall").splitlines())
    name, qos, accounts = launcher.account, launcher.qos, sorted({account for account, _ in own})
    allowed = {each for account, some in own if account == (name or account) for each in some}
    problems: Problems = []
    if not own:
        problems.append(("warn", "ask for an account"))
    elif name and name not in accounts:
        problems.append(("warn", f"set launcher.account: {name} is not yours{nearest(name, accounts)}"))
    elif qos and qos not in allowed:
        problems.append(("warn", f"set launcher.qos: {qos} is not yours{nearest(qos, allowed)}"))
    elif qos and (limit_s := seconds(longest[qos])) < 60 * launcher.timeout_min:
        problems.append(("warn", f"set launcher.timeout_min to {limit_s // 60:.0f} or less, the longest of qos {qos}"))
    words = f"yours: {', '.join(accounts) or 'none'}; asked: account {name or 'default'}, qos {qos or 'default'}"
    return judge(f"sacct answers; {words}; the cluster enforces {found['AccountingStorageEnforce']}", problems)


def partition(launcher: Slurm) -> Finding:
    """Whether it starts jobs, and such long ones."""
    rows, asked_s, lead_s = asked_for(launcher), 60 * launcher.timeout_min, launcher.signal_lead_s
    longest_s = max(seconds(row["MaxTime"]) for row in rows)
    problems: Problems = []
    if all(row["State"] != "UP" for row in rows):
        problems.append(("warn", "it starts no jobs now: wait, or set another launcher.partition"))
    if asked_s > longest_s:
        problems.append(("fail", f"set launcher.timeout_min to {longest_s // 60:.0f} or less: no job would start"))
    if asked_s <= lead_s + 60:  # Slurm sends the signal up to a minute early
        problems.append(("fail", "lower launcher.signal_lead_s or raise launcher.timeout_min: a run stops at once"))
    words = [f"{row['PartitionName']} {row['State']}, MaxTime {row['MaxTime']}" for row in rows]
    return judge(f"{'; '.join(words)}; asked: {launcher.timeout_min} min, saving {lead_s} s before", problems)


def nodes(launcher: Slurm, ranks: int) -> Finding:
    """Whether the partition's nodes can hold what is asked of each."""
    names = ",".join(row["PartitionName"] for row in asked_for(launcher))
    lines = ask("sinfo", "-h", "-N", "-p", names, "-o", "%N|%T|%c|%m|%G|%E").splitlines()
    rows = {line.partition("|")[0]: line.split("|", 5) for line in lines}  # a node of several partitions counts once
    # the gres `gpu:a100:4(S:0-1),gpu:2` is 6 GPUs
    gpus = {name: sum(map(int, re.findall(r"(?:^|,)gpu(?::[^:,(]+)?:(\d+)", row[4]))) for name, row in rows.items()}
    holds = {name: (int(row[2]), int(row[3]) / 1024, gpus[name]) for name, row in rows.items()}
    # a star marks a node that doesn't answer
    away = {name: f"{row[1]} ({row[5]})" for name, row in rows.items() if re.match(r"down|drain|fail|.*\*", row[1])}
    asked = ((launcher.cpus_per_process or 0) * ranks or 1, launcher.mem_gb or 0, launcher.gpus_per_node or 0)
    large = [name for name, has in holds.items() if all(one >= other for one, other in zip(has, asked, strict=True))]
    problems: Problems = []
    if len(large) < launcher.nodes:
        advice = "lower launcher.nodes, num_processes, cpus_per_process, mem_gb or gpus_per_node"
        problems.append(("fail", f"no job would start, nodes that can hold it: {len(large)}; {advice}"))
    elif len(set(large) - set(away)) < launcher.nodes:
        waits = ", ".join(f"{name}, {away[name]}" for name in large if name in away)
        problems.append(("warn", f"the job waits for {waits}"))
    if ranks > 1 and not launcher.cpus_per_process:
        problems.append(("warn", "set launcher.cpus_per_process: all ranks of a node get one CPU together"))
    shape = "{} CPUs, {:.1f} GB, {} GPUs"
    most = shape.format(*(max(column) for column in zip(*(holds.values() or [(0, 0, 0)]), strict=True)))
    words = f"{len(holds) - len(away)} of {len(holds)} up, with up to {most}"
    request = shape.format(*asked).replace(" 0.0 GB,", "")  # the cluster's default
    return judge(f"{words}; asked: {launcher.nodes} with {request}", problems)


def preemption(launcher: Slurm, runs_dir: Path) -> Finding:
    """The time that a run has to save in, against the slowest save; a preempted one has GraceTime, and KillWait after it."""
    found, rows = settings(), asked_for(launcher)
    save_s = max((run.status().get("save_s", 0.0) for run in runs(runs_dir)), default=0.0)
    left_s = min(seconds(row["GraceTime"]) for row in rows) + seconds(found["KillWait"])
    modes = {row["PreemptMode"] for row in rows} if found["PreemptMode"] != "OFF" else {"OFF"}
    problems: Problems = []
    if save_s >= launcher.signal_lead_s:
        advice = f"set launcher.signal_lead_s to {math.ceil(2 * save_s)} or more"
        problems.append(("fail", f"{advice}: at the time limit a run is killed while it saves"))
    if save_s >= left_s and modes != {"OFF"}:
        advice = f"a preempted run is killed after {left_s:.0f} s, while it saves"
        problems.append(("warn", f"{advice}: lower checkpoint.every, it resumes from the last checkpoint"))
    if "CANCEL" in modes:
        problems.append(("warn", "Slurm does not requeue a preempted run: use another partition, or look after it"))
    saved = f"the slowest save took {save_s:.1f} s" if save_s else "no save measured yet"
    words = f"PreemptMode {', '.join(sorted(modes))}, GraceTime and KillWait {left_s:.0f} s"
    return judge(f"{words}, signal_lead_s {launcher.signal_lead_s}; {saved}", problems)


def test_job(launcher: Slurm, ranks: int, trainer: Trainer, runs_dir: Path) -> Finding:
    """Whether Slurm takes all that a run asks for, and whether a node sees runs_dir, Python, torch and its GPU."""
    folder = Path(tempfile.mkdtemp(prefix=".doctor-", dir=standing(runs_dir)))
    name = f"fairexp-doctor-{folder.name.removeprefix('.doctor-')}"
    gpu = 1 if launcher.gpus_per_node else None  # can torch use it? And many a partition takes no job without
    small = replace(launcher, nodes=1, cpus_per_process=None, mem_gb=None, gpus_per_node=gpu)
    small = replace(small, timeout_min=1, signal_lead_s=1)
    look = f"cd {shlex.quote(str(folder))} && {shlex.quote(sys.executable)} probe.py > draft && mv draft seen.json"
    script, command = folder / "job.sh", shlex.join(["sh", "-c", look])
    try:
        (folder / "probe.py").write_text(PROBE)
        script.write_text(submission.script(launcher, ranks, name, command, folder, None, []))
        if refusal := submission.check(script):
            raise UserError(f"sbatch would refuse a run: {refusal}")
        script.write_text(submission.script(small, 1, name, command, folder, None, []))
        return answer(submission.submit(script, name, ()), folder, launcher, trainer)
    except (UserError, submission.LimitReached) as error:
        return Finding("fail", str(error), "change what launcher asks for")
    finally:  # on SIGTERM too
        subprocess.run(["scancel", "--quiet", f"--name={name}"])
        shutil.rmtree(folder, ignore_errors=True)


def answer(job: str, folder: Path, launcher: Slurm, trainer: Trainer) -> Finding:
    """Waits for the node's answer, the job's end or the time limit."""
    began, ended_s = time.monotonic(), math.inf
    while "seen.json" not in os.listdir(folder):  # to list it makes NFS ask its server; to look for one file may not
        took_s = time.monotonic() - began
        state, reason, host = ask("squeue", "-h", "-t", "all", "-j", job, "-o", "%T|%r|%N").split("|")
        if state in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"):
            if took_s > JOB_WAIT_S:
                words = f"job {job} after {took_s:.0f} s: {state} {host or reason}"
                return Finding("warn", words, "it was cancelled; a run would wait too")
        elif took_s > (ended_s := min(ended_s, took_s)) + 3:  # what the node wrote has had time to appear
            words, advice = (
                f"what it wrote in {folder.parent} is not seen here",
                "set runs_dir to a folder that nodes share",
            )
            if outputs := sorted(folder.glob("*.out")):
                words = outputs[0].read_text(errors="replace")[-300:]
                advice = f"make {sys.executable} work there: install it where all nodes see it, or mend launcher.setup"
            return Finding("fail", f"job {job} on {host}: {state}; {words}", advice)
        time.sleep(0.5)
    seen = folder / "seen.json"
    return judge_node(json.loads(seen.read_text()) | {"written": seen.stat().st_mtime}, launcher, trainer)


def judge_node(seen: Mapping[str, Any], launcher: Slurm, trainer: Trainer) -> Finding:
    """`seen`: by PROBE, and the time that the file system gave its file."""
    words, problems = judge_probe(seen, launcher.gpus_per_node or 0, trainer)
    problems += skew_problems(seen["written"] - seen["time"])
    if seen["python"] != platform.python_version():
        problems.append(("fail", f"{sys.executable} is {platform.python_version()} here: let nodes see the same"))
    return judge(f"{seen['host']} sees runs_dir; Python {seen['python']}; {words}", problems)
