"""One rank of a run, from its environment variables to its exit code. Also `torchrun -m fairexp.runtime.worker RUN_DIR`."""

from __future__ import annotations

import gc
import json
import os
import platform
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path

import torch

from fairexp.beacon import Beacon
from fairexp.config import attempt
from fairexp.config.rundir import RunDir
from fairexp.errors import DISK, DONE, FAILED, INTERRUPTED, Fenced, MachineError, RunError, UserError
from fairexp.lifetime import leave
from fairexp.runtime import build as building
from fairexp.runtime import census, checkpoint, dist, heap, loop
from fairexp.runtime.bad_samples import replaced
from fairexp.runtime.make import make, trust
from fairexp.runtime.preempt import Stop


def main(run_dir: RunDir, beacon: Beacon | None = None) -> int:
    """Runs this rank to its end. The exit code; where it isn't 0, `logs/error_<rank>.json` says why. `beacon`: who watches."""
    beacon = beacon or Beacon()
    stop = Stop().listen()  # first: a Ctrl-C while the model is built ends the run as one during training
    began = time.monotonic()
    here, run = None, None
    heartbeat = Heartbeat()
    try:
        config = run_dir.config()
        if threads := os.environ.get("OMP_NUM_THREADS"):
            torch.set_num_threads(int(threads))  # a pool has loaded torch before it knew
        heap.keep()
        trust(run_dir.launch()["trusted"])
        here = dist.place(config["trainer"]["device"])
        number = int(os.environ.get("FAIREXP_ATTEMPT", "0"))
        if here.first:
            number = number or attempt.take(run_dir.path)  # torchrun started it
            run_dir = RunDir(run_dir.path, attempt.workspace(run_dir.path, number))
            run_dir.set_status(state="running", error=None, attempts=number)
            run_dir.write("environment.json", json.dumps(environment(here), indent=1) + "\n")
        if config["trainer"]["deterministic"]:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        run = building.build(run_dir, config, here, stop)
        run.beacon = beacon
        number = int(dist.max_over_ranks(torch.tensor(number)))
        run.dir = RunDir(run_dir.path, attempt.workspace(run_dir.path, number))
        checkpoint.restore(run)
        building.track(run)
        if watch := run_dir.launch().get("census"):
            census.Watched(run, watch["at"], watch["kill_at"])
        announce(run)
        heartbeat.start(run)
        gc.freeze()  # what start-up made stays: the collector needn't look at it again
        gc.enable()
        beacon.at("loop", run.step)
        make(config["loop"], run=run)
        beacon.at("save", run.step)
        run.saver.finish(run)
        code = (
            INTERRUPTED if stop.stopped and run.step < run.max_steps else DONE
        )  # after the last step it came too late
    except Fenced as error:
        print(error, file=sys.stderr, flush=True)
        leave(FAILED)
    except Exception as error:
        code = FAILED
        record_error(run_dir, error)
        if run is not None:
            run.saver.join()
    heartbeat.stop()  # two writers of status.json would lose each other's changes
    if run is not None:
        beacon.at("end", run.step)
        try:
            end(run, code, time.monotonic() - began)
        except Fenced as error:
            print(error, file=sys.stderr, flush=True)
            leave(FAILED)
        except OSError as error:
            code = FAILED
            record_error(run_dir, error)
    if here is not None:
        dist.leave(here)
    return code


def announce(run: building.Run) -> None:
    """The numbers that follow from the config, before the first step."""
    if not run.here.first:
        return
    config, here, trainer = run.config, run.here, run.trainer
    readers = (
        f"{here.data_size} ranks" if here.model_ranks == 1 else f"{here.data_size} groups of {here.model_ranks} ranks"
    )
    per_rank = run.training.micro_batch_size
    accumulation = -(-trainer.global_batch_size // (per_rank * here.data_size))
    parameters = sum(parameter.numel() for parameter in run.parameters.values())
    lines = [
        f"{run.dir.path.name}: {config['strategy']['_target_'].rpartition('.')[2]}, {here.world_size} x {here.device.type}, "
        f"{torch.get_num_threads()} CPU thread{'s' if torch.get_num_threads() > 1 else ''} a rank, {trainer.precision}",
        f"model {config['model']['_target_'].rpartition('.')[2]}: {parameters:,} parameters",
        f"data {run.training.length:,} samples, {run.training.steps_per_epoch} steps an epoch",
        f"batch {trainer.global_batch_size} = {readers} x {accumulation} micro batches x {per_rank}",
        f"steps {run.step} -> {run.max_steps}" + (" (resumed)" if run.step else ""),
    ]
    print("\n".join(lines), file=sys.stderr, flush=True)
    run.dir.set_status(step=run.step, max_steps=run.max_steps)


def end(run: building.Run, code: int, seconds: float) -> None:
    """Saves what a finished run leaves, and tells the folder and the tracker how it ended."""
    if not run.here.first:
        return
    if code == DONE:
        summary = loop.summary(run, seconds)
        if others := replaced(run.dir.logs):
            summary["bad_samples"] = len(others)  # it has trained on others in their place
        run.dir.write("summary.json", json.dumps(summary, indent=1) + "\n")
    run.tracker.finish(code)
    # whether a run that stopped was cancelled or goes on, and whose fault an error is, says the job, which sees all ranks
    state = {DONE: "finished", INTERRUPTED: "interrupted", FAILED: "failed"}[code]
    says = {"state": state} if code == DONE or "FAIREXP_HOST" not in os.environ else {}
    run.dir.set_status(**says, step=run.step, signal=run.stop.signal or None)


class Heartbeat:
    """Tells status.json every two seconds that rank 0 lives, and its step. Ends the process where a later attempt has the run."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self.thread: threading.Thread | None = None

    def start(self, run: building.Run) -> None:
        """Begins to beat, on rank 0."""
        if run.here.first:
            self.thread = threading.Thread(target=self._beat, args=(run,), daemon=True)
            self.thread.start()

    def _beat(self, run: building.Run) -> None:
        while not self.over.wait(2.0):
            try:
                run.dir.set_status(step=run.step, phase=run.beacon.last().phase)
            except Fenced as error:
                print(error, file=sys.stderr, flush=True)
                leave(FAILED)
            except OSError:  # a disk that is full now may not be so at the next beat
                pass

    def stop(self) -> None:
        """No beat comes after this."""
        self.over.set()
        if self.thread:
            self.thread.join()


def record_error(run_dir: RunDir, error: Exception) -> None:
    """The real exception, for the process that watches the ranks, and in the rank's log. A RunError says it in words."""
    rank = int(os.environ.get("RANK", "0"))
    peer = dist.is_lost_peer(error)
    if peer:
        text, trace = f"rank {rank} lost another rank in a collective; that rank's log says why", ""
    elif isinstance(error, RunError | UserError):
        text, trace = str(error), ""
    elif isinstance(error, OSError) and error.errno in DISK and error.filename:
        text, trace = f"{error.filename}: {error.strerror}; the same command goes on when that is mended", ""
    else:
        text, trace = f"{type(error).__name__}: {error}", traceback.format_exc()
    record = {
        "rank": rank,
        "host": os.environ.get("FAIREXP_HOST", socket.gethostname()),
        "time": time.time(),
        "lost_peer": peer,
        "machine": isinstance(error, MachineError),
        "error": text,
        "traceback": trace,
    }
    with suppress(OSError):  # the disk that the log lies on may be the full one
        print(trace or text, file=sys.stderr, flush=True)
    with suppress(OSError, Fenced):  # a later attempt isn't to take it for its own
        run_dir.write(f"logs/error_{rank}.json", json.dumps(record) + "\n")


def environment(here: dist.Place) -> dict[str, object]:
    """What a bug report or a reproduction needs to know about this machine and its software."""
    folders = [Path(folder) for folder in sys.path if Path(folder).is_dir()]
    cuda = here.device.type == "cuda"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name(here.device) if cuda else platform.processor() or platform.machine(),
        "cpu_threads": torch.get_num_threads(),
        # the folders' names say it: importlib.metadata would read every package's file
        "packages": sorted(
            {path.name.removesuffix(".dist-info") for folder in folders for path in folder.glob("*.dist-info")}
        ),
    }


if __name__ == "__main__":
    leave(main(RunDir(Path(sys.argv[1]))))
