"""What doctor sees of the installation, this machine and its folders, and of a node that PROBE was sent to."""

from __future__ import annotations

import fcntl
import json
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
GPUS_LIMIT_S = 120.0  # to import torch twice from a cold network file system, and for ranks to meet
MAX_SKEW_S = 5.0  # heartbeats of other hosts are compared with this one's clock

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
    seen["torch_error"] = f"{type(error).__name__}: {error}"
print(json.dumps({**seen, "time": time.time()}))
"""

# Several ranks sum a number: python -c REDUCE BACKEND RANKS
REDUCE = """
import datetime, sys, tempfile, torch
from torch import distributed, multiprocessing

def work(rank, backend, ranks, store):
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    limit = datetime.timedelta(seconds=30)
    distributed.init_process_group(backend, init_method=store, rank=rank, world_size=ranks, timeout=limit)
    one = torch.ones(1, device=device)
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
        try:
            version = metadata.version(need.name)
        except metadata.PackageNotFoundError:
            problems.append(("fail", f"install {need}"))
            continue
        words.append(f"{need.name} {version}")
        if not need.specifier.contains(version, prereleases=True):
            problems.append(("warn", f"{need.name} {version}: install {need}"))
    return judge(", ".join(words), problems)


def gpus(trainer: Trainer) -> Finding:
    """The GPUs as torch sees them; with several, also whether they can sum a number."""
    seen = json.loads(ask(sys.executable, "-c", PROBE))
    words, problems = judge_torch(seen, len(visible_gpus()), trainer)
    if len(seen["gpus"]) > 1:
        try:
            ask(sys.executable, "-c", REDUCE, "nccl", str(len(seen["gpus"])))
        except RuntimeError as error:
            problems.append(("fail", f"all_reduce over them: {error}; NCCL_DEBUG=INFO says more"))
    return judge(words, problems)


def judge_torch(seen: Mapping[str, Any], devices: int, trainer: Trainer) -> tuple[str, Problems]:
    """What the probe saw of torch and the GPUs, in words. `devices`: how many GPUs there should be."""
    if "torch_error" in seen:
        return "torch does not work", [("fail", f"install torch anew: {seen['torch_error']}")]
    words = [", ".join(f"{count} x {name}" for name, count in Counter(seen["gpus"]).items()) or "no GPU"]
    words += [f"torch {seen['torch']} for {'CUDA ' + seen['cuda'] if seen['cuda'] else 'the CPU'}"]
    if takes := seen.get("driver"):
        words += [f"driver for CUDA up to {takes // 1000}.{takes % 1000 // 10}"]
    if seen["gpus"]:
        words += [f"NCCL {seen['nccl']}"]
    problems: Problems = []
    if devices and not seen["gpus"] and trainer.device != "cpu":
        problems.append(("fail", f"torch can't use the {devices} GPUs: install one for a CUDA that the driver takes"))
    elif not seen["gpus"] and trainer.device == "cuda":
        problems.append(("fail", "trainer.device is cuda: use auto or cpu"))
    return "; ".join(words), problems


def shared_memory(trainer: Trainer) -> Finding:
    """/dev/shm, through which data loading workers hand over batches."""
    found = os.statvfs("/dev/shm")
    free = found.f_bavail * found.f_frsize
    return judge(f"/dev/shm: {free / GIB:.1f} GiB free", shm_problems(free, trainer))


def shm_problems(free: int, trainer: Trainer) -> Problems:
    """A worker that finds it full dies of SIGBUS. Containers have 64 MiB unless told otherwise. `free`: bytes."""
    advice = "enlarge /dev/shm (docker run --shm-size=8g), or use trainer.num_workers=0"
    if free >= GIB:
        return []
    return [("fail" if free <= GIB // 16 and trainer.num_workers else "warn", advice)]


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
    problems: Problems = []
    if free < 5 * GIB:
        advice = "checkpoints will fill it: make room, or set runs_dir elsewhere"
        problems.append(("fail" if free < GIB // 10 else "warn", advice))
    counted = found.f_files > 0  # some file systems make inodes as needed
    if counted and found.f_favail < 10_000:
        advice = "inodes run out, a run makes dozens of files: delete some"
        problems.append(("fail" if found.f_favail < 100 else "warn", advice))
    inodes = f" and {found.f_favail:,} inodes" if counted else ""
    return judge(f"{runs_dir}: {free / GIB:.1f} GiB{inodes} free", problems)


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
    return [("warn", advice)] if abs(skew_s) > MAX_SKEW_S else []


def wandb(tracker: Mapping[str, Any]) -> Finding:
    """Whether there is a key, where one is needed. The key is never shown, and no network is asked."""
    if tracker["_target_"] != "fairexp.runtime.trackers.wandb.Wandb":
        return Finding("ok", "not the tracker")
    mode = tracker["mode"] if tracker["mode"] != "auto" else os.environ.get("WANDB_MODE", "online")
    if mode != "online":
        return Finding("ok", f"{mode}, which needs no key")
    if os.environ.get("WANDB_API_KEY"):
        return Finding("ok", "online, with the key of WANDB_API_KEY")
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
        commit = ask("git", "rev-parse", "--short", "--verify", "HEAD")
    except (RuntimeError, FileNotFoundError) as error:
        return Finding(
            "warn", f"{os.getcwd()}: {error}", "`git init` and commit: runs record the commit and the changes"
        )
    lines = ask("git", "status", "--porcelain").splitlines()
    new = sum(line.startswith("??") for line in lines)
    return Finding("ok", f"commit {commit}, {len(lines) - new} changed and {new} new files")
