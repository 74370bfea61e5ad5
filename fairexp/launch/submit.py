"""Starts a frozen run on this machine: through submitit's local executor, or in this process."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fairexp.config.attempt import take
from fairexp.config.rundir import RunDir
from fairexp.config.schema import Launcher, Slurm, num_ranks


def submit(run_dir: RunDir) -> None:
    """Starts the run through submitit's local executor and returns at once; the run goes on in a session of its own."""
    import submitit  # 0.1 s: only where something is submitted

    from fairexp.launch.job import Job

    executor = submitit.LocalExecutor(folder=run_dir.submit)
    executor.update_parameters(
        tasks_per_node=1,  # launch.supervise starts the ranks
        timeout_min=60 * 24 * 365,  # submitit's default would end the run after minutes
        stderr_to_stdout=True,
    )
    with _not_for_us(signal.SIGINT, signal.SIGHUP):
        job = executor.submit(Job(str(run_dir.path)))
    run_dir.set_status(job_id=job.job_id)


@contextmanager
def _not_for_us(*numbers: int) -> Iterator[None]:
    """Processes that are started inside ignore the terminal's signals: a Ctrl-C is for the command that follows the run,
    which passes it on to the ranks; submitit's controller would kill them a second later, in the middle of their save."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_inline(run_dir: RunDir) -> int:
    """Runs the one rank in this process, for a debugger; its exit code."""
    from fairexp.launch.follow import lines_beside
    from fairexp.launch.job import conclude, variables
    from fairexp.launch.node import Node

    os.environ.update(variables(run_dir.launch()))
    number = take(run_dir.path)
    os.environ["FAIREXP_ATTEMPT"] = str(number)
    run_dir.set_status(state="running", attempts=number, pid=os.getpid())
    from fairexp.runtime import worker

    with lines_beside(run_dir):
        return conclude(run_dir, {0: worker.main(run_dir)}, Node("local"))


def plan(launcher: Launcher, device: str, owner: int | None, trusted: list[str], sys_path: list[str]) -> dict:
    """What launch.json says: everything that the job must know besides the config. Derived values stand here, resolved."""
    devices = visible_gpus()
    num_processes = num_ranks(launcher, device, len(devices))
    cores = len(os.sched_getaffinity(0))
    if isinstance(launcher, Slurm):
        threads = launcher.threads_per_process or launcher.cpus_per_process or 1
        found = None  # Slurm gives each job its own
    else:
        threads = launcher.threads_per_process or (1 if num_processes > 1 else cores)
        found = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(devices) if devices else None)
    return {
        "kind": launcher.kind,
        "num_processes": num_processes,
        "nodes": launcher.nodes,
        "threads": threads,
        "devices": found,
        "max_failures": getattr(launcher, "max_failures", 3),
        "cwd": os.getcwd(),
        "sys_path": sys_path,
        "trusted": trusted,
        "owner": owner,
    }


def visible_gpus() -> list[str]:
    """The GPUs that CUDA would show, without asking CUDA: importing torch takes a second and a half."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return [device for device in listed.split(",") if device.strip() and device != "-1"]
    return sorted(path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*"))
