"""A loop for `loop._target_` that saves in several ways, one after the other, and times the steps around each save."""

import json
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from fairexp.runtime import checkpoint
from fairexp.runtime.build import Run
from fairexp.runtime.data import Batches
from fairexp.runtime.loop import train_step

CALM = 4  # steps between two saves of which the median is what a step takes


def fit(run: Run, out: str, rounds: int, ways: list[str]) -> None:
    """Writes a JSON object a line: the way, seconds of a plain step, of the step with the save, of the next one, and until
    the checkpoint was on the disk. The first round, in which buffers are made, is marked."""
    batches = Batches(run.fetch_training, run.training, run.here, 0, 0)
    group = dist.new_group(backend="gloo") if dist.is_initialized() else None
    run.model.train()

    def step(then: Callable[[], Any] = lambda: None) -> float:
        began = time.perf_counter()
        train_step(run, next(batches), wants_norm=False)
        run.step += 1
        then()
        return time.perf_counter() - began

    for _ in range(3):
        step()
    rows = []
    for number in range(rounds):
        for way in ways:
            calm = [step() for _ in range(CALM)]
            finish: list[Callable[[], Any]] = []
            began = time.perf_counter()
            with_save = step(lambda: finish.append(start(run, way, group)))  # noqa: B023
            following = step()
            finish[0]()
            row = {
                "way": way,
                "first": number == 0,
                "calm": sorted(calm)[len(calm) // 2],
                "with_save": with_save,
                "following": following,
                "until_durable": time.perf_counter() - began,
            }
            rows.append(row)
            if dist.is_initialized():
                dist.barrier()
    if run.here.first:
        with open(out, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    run.step = run.max_steps


def start(run: Run, way: str, group: Any) -> Callable[[], Any]:
    """Starts a save; what waits for its end."""
    if way.startswith("fairexp"):
        run.checkpoint = replace(run.checkpoint, background=way == "fairexp, background")
        checkpoint.save(run)
        return lambda: run.saver.finish(run)
    import torch.distributed.checkpoint as dcp

    folder = run.dir.workspace / f"dcp_{run.step}"  # type: ignore[operator]
    tensors = checkpoint._tensors(run)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if way == "dcp.save":
            dcp.save(tensors, checkpoint_id=folder, no_dist=group is None)
            return lambda: clean(run, folder)
        future: Any = dcp.async_save(tensors, checkpoint_id=folder, process_group=group, no_dist=group is None)
    return lambda: (future.result(), clean(run, folder))


def clean(run: Run, folder: Any) -> None:
    if dist.is_initialized():
        dist.barrier()
    if run.here.first:
        shutil.rmtree(folder)
