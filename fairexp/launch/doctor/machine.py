"""What doctor sees of the installation, this machine and its folders, and of a node that PROBE was sent to."""

from __future__ import annotations

import fcntl
import json
import math
import netrc
import os
import platform
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fairexp.config.schema import Trainer
from fairexp.launch.doctor.check import Finding, Problems, ask, judge
from fairexp.launch.submit import visible_gpus

GIB = 2**30

# What a Python process sees, here or on a node of a cluster; run as a program of its own.
PROBE = """
import json, os, platform, time

shm = os.statvfs("/dev/shm")
seen = {"host": platform.node(), "python": platform.python_version(), "shm": shm.f_bavail * shm.f_frsize, "gpus": []}
try:
    import torch

    seen["torch"], seen["cuda"] = torch.__version__, torch.version.cuda or torch.version.hip
    if torch.version.cuda:
        seen["driver"] = torch._C._cuda_getDriverVersion()
    if torch.cuda.is_available():
        seen["gpus"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        seen["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
except Exception as error:
    seen["error"] = f"{type(error).__name__}: {error}"
print(json.dumps({**seen, "time": time.time()}))
"""

# Several ranks sum a number: python -c REDUCE BACKEND RANKS
REDUCE = """
import datetime, sys, tempfile, torch
from torch import distributed, multiprocessing

def work(rank, backend, ranks, store):
    limit = datetime.timedelta(seconds=30)
    distributed.init_process_group(backend, init_method=store, rank=rank, world_size=ranks, timeout=limit)
    one = torch.ones(1, device=f"cuda:{rank}" if backend == "nccl" else "cpu")
    distributed.all_reduce(one)
    assert one.item() == ranks, f"the sum of {ranks} ones is {one.item()}"

backend, ranks = sys.argv[1], int(sys.argv[2])
with tempfile.TemporaryDirectory() as folder:
    multiprocessing.start_processes(work, (backend, ranks, f"file://{folder}/store"), ranks, start_method="fork")
"""


def versions() -> Finding:
    """Python and the packages that fairexp requires, without importing them."""
    from packaging.requirements import Requirement

    words = [f"Python {platform.python_version()}", f"fairexp {metadata.version('fairexp')}"]
    problems: Problems = []
    for need in map(Requirement, metadata.requires("fairexp") or []):
        if need.marker:  # an extra's
            continue
        version = metadata.version(need.name)
        words.append(f"{need.name} {version}")
        if not need.specifier.contains(version, prereleases=True):
            problems.append(("warn", f"{need.name} {version}: install {need}"))
    return judge(", ".join(words), problems)


def gpus(trainer: Trainer) -> Finding:
    """What a run's processes would see here; where that is several GPUs, also whether they can sum a number."""
    seen = json.loads(ask(sys.executable, "-c", PROBE))
    words, problems = judge_probe(seen, len(visible_gpus()), trainer)
    if len(seen["gpus"]) > 1:
        try:
            ask(sys.executable, "-c", REDUCE, "nccl", str(len(seen["gpus"])))
        except RuntimeError as error:
            problems.append(("fail", f"all_reduce over them: {error}; NCCL_DEBUG=INFO says more"))
    return judge(words, problems)


def judge_probe(seen: Mapping[str, Any], devices: int, trainer: Trainer) -> tuple[str, Problems]:
    """What PROBE saw, in words. `devices`: how many GPUs there should be."""
    words = [", ".join(f"{count} x {name}" for name, count in Counter(seen["gpus"]).items()) or "no GPU"]
    problems: Problems = []
    if "error" in seen:
        problems.append(("fail", f"install torch anew: {seen['error']}"))
    else:
        words += [f"torch {seen['torch']} for {'CUDA ' + seen['cuda'] if seen['cuda'] else 'the CPU'}"]
    if seen.get("driver"):
        words += [f"driver for CUDA up to {seen['driver'] // 1000}.{seen['driver'] % 1000 // 10}"]
    if seen["gpus"]:
        words += [f"NCCL {seen['nccl']}"]
    elif trainer.device == "cuda" or (devices and trainer.device == "auto"):
        advice = "install one for a CUDA that the driver takes, or set trainer.device=cpu"
        problems.append(("fail", f"torch can't use a GPU: {advice}"))
    if seen["shm"] < GIB:  # a data loading worker that finds it full dies of SIGBUS; containers have 64 MiB
        advice = "enlarge /dev/shm (docker run --shm-size=8g), or use trainer.num_workers=0"
        problems.append(("fail" if seen["shm"] <= GIB // 16 and trainer.num_workers else "warn", advice))
    return f"{'; '.join(words)}; /dev/shm {seen['shm'] / GIB:.1f} GiB free", problems


def open_files() -> Finding:
    """The limit of open files; sbatch hands it on to jobs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # -1: none
    few: Problems = [("warn", "workers and ranks need many: `ulimit -n 4096` first")]
    return judge(f"up to {soft} (hard limit {hard})", few if 0 <= soft < 4096 else [])


def standing(folder: Path) -> Path:
    """The folder, or the nearest above it that exists: a look makes no runs_dir."""
    return next(each for each in (folder, *folder.parents) if each.exists())


def disk(runs_dir: Path) -> Finding:
    """Room and inodes."""
    found = os.statvfs(standing(runs_dir))
    free = found.f_bavail * found.f_frsize
    inodes = found.f_favail if found.f_files else math.inf  # some file systems make them as needed
    problems: Problems = []
    if free < 5 * GIB:
        advice = "checkpoints will fill it: make room, or set runs_dir elsewhere"
        problems.append(("fail" if free < GIB // 10 else "warn", advice))
    if inodes < 10_000:
        problems.append(("fail" if inodes < 100 else "warn", "inodes run out, a run makes dozens: delete files"))
    return judge(f"{runs_dir}: {free / GIB:.1f} GiB and {inodes:,} inodes free", problems)


def writes(runs_dir: Path) -> Finding:
    """Whether what a run does with files works there, and how far that clock is from this machine's."""
    place, doing = standing(runs_dir), "make a folder"
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=place) as folder:
            draft, final = Path(folder, "draft"), Path(folder, "final")
            doing, began = "write and fsync a file", time.time()
            with open(draft, "w") as file:
                file.write("new")
                file.flush()
                os.fsync(file.fileno())
            took_s, skew_s = time.time() - began, draft.stat().st_mtime - began
            doing = "rename a file onto another"
            final.touch()
            os.rename(draft, final)
            doing = "lock a file (flock)"
            with open(final) as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            doing = "delete a folder"
    except OSError as error:
        return Finding("fail", f"{place}: can't {doing}: {error.strerror}", "set runs_dir to a folder where that works")
    words = f"write, fsync ({took_s * 1000:.0f} ms), rename, flock and delete work; clocks {abs(skew_s):.1f} s apart"
    return judge(words, skew_problems(skew_s))


def skew_problems(skew_s: float) -> Problems:
    """`skew_s`: between a machine's clock and the file system's."""
    advice = f"clocks {abs(skew_s):.0f} s apart, set them (chrony, ntp): a run is told lost by its heartbeat's age"
    return [("warn", advice)] if abs(skew_s) > 5 else []


def wandb(tracker: Mapping[str, Any]) -> Finding:
    """Whether there is a key, where one is needed. The key is never shown, and no network is asked."""
    mode = tracker.get("mode", "not the tracker")
    mode = os.environ.get("WANDB_MODE", "online") if mode == "auto" else mode
    if mode != "online" or os.environ.get("WANDB_API_KEY"):
        return Finding("ok", f"{mode}, with the key of WANDB_API_KEY" if mode == "online" else f"{mode}: needs no key")
    file = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        hosts = list(netrc.netrc(str(file)).hosts) if file.exists() else []
    except netrc.NetrcParseError as error:  # its words may hold the key
        return Finding("warn", f"{file}: line {error.lineno} can't be read", "mend it, or set WANDB_API_KEY")
    own = urlsplit(os.environ.get("WANDB_BASE_URL", "")).netloc
    # api.wandb.ai, api.forge.coreweave.com, or a server that the file of wandb's settings names
    if known := [host for host in hosts if host == own or "wandb" in host or "coreweave" in host]:
        return Finding("ok", f"online, with the key for {', '.join(known)} in {file}")
    return Finding("warn", f"no key in {file}", "runs are recorded offline: `wandb login`, or set WANDB_API_KEY")


def git() -> Finding:
    """Whether a run started here can record the code's state."""
    try:
        return Finding("ok", f"commit {ask('git', 'describe', '--always', '--dirty')}")
    except (RuntimeError, FileNotFoundError) as error:
        advice = "`git init` and commit: runs record the commit and the changes"
        return Finding("warn", f"{os.getcwd()}: {error}", advice)
