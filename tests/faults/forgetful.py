"""`fairexp verify-resume` of trainings that forget something, each in a process forked from this one, which holds torch; prints
{case: [exit code, output]}."""

import dataclasses
import json
import os
import random
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import user_code

from fairexp.launch.verify import verify
from fairexp.runtime import checkpoint

WORDS = (
    "model=mlp",
    "model.hidden=[16]",
    "model.dropout=0.5",
    "dataset=digits",
    "trainer.device=cpu",
    "trainer.global_batch_size=32",
    "trainer.eval_every=2",
    "launcher.threads_per_process=1",
    "launcher.num_processes=1",
)
STEPS = 3


def without(function: str, *dropped: str) -> Callable[[], None]:
    """Makes a function of checkpoint leave out what has such a name."""

    def patch() -> None:
        whole = getattr(checkpoint, function)

        def part(*arguments: Any) -> dict[str, Any]:
            return {name: value for name, value in whole(*arguments).items() if not name.startswith(dropped)}

        setattr(checkpoint, function, part)

    return patch


def wrong_best() -> None:
    whole = checkpoint._scalars
    checkpoint._scalars = lambda run: whole(run) | {"best": {}}


def not_of_torch() -> None:
    whole = checkpoint.RandomState.apply

    def part(state: checkpoint.RandomState) -> None:
        whole(dataclasses.replace(state, torch=torch.get_rng_state()))

    checkpoint.RandomState.apply = part


def nothing() -> None:
    pass


CASES: dict[str, tuple[Callable[[], None], tuple[str, ...]]] = {
    "nothing": (nothing, ("trainer.ema_decay=0.9",)),
    "optimizer": (without("_tensors", "optim.head.weight."), ()),
    "generator": (not_of_torch, ()),
    "generator not saved": (without("_tensors", "rng.0.torch"), ()),
    "weight": (without("_module_state", "head.bias"), ()),
    "average": (
        lambda: setattr(checkpoint, "_take", user_code.take_without_average(checkpoint._take)),
        ("trainer.ema_decay=0.9",),
    ),
    "loss scale": (
        lambda: setattr(checkpoint, "_take", user_code.take_without_scale(checkpoint._take)),
        ("trainer.precision=fp16",),
    ),
    "best": (wrong_best, ()),
    "buffer": (nothing, ("model._target_=user_code.HiddenBuffer",)),
    "attribute": (nothing, ("model._target_=user_code.Counts",)),
    "own generator": (nothing, ("dataset.augment._target_=user_code.Noise",)),
    "global generator": (nothing, ("dataset.augment._target_=user_code.GlobalNoise", "trainer.num_workers=1")),
    "clock": (nothing, ("task._target_=user_code.ByTheClock",)),
}


def run(case: str, folder: Path) -> list[Any]:
    patch, words = CASES[case]
    said = folder / f"{case}.txt"
    if pid := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return [code, said.read_text()]
    code = 99
    try:
        output = os.open(said, os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        patch()
        code = verify([*WORDS, *words, f"runs_dir={folder / case}"], [], "train", [], STEPS)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    torch.set_num_threads(1)
    random.seed(0)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps({case: run(case, Path(folder)) for case in CASES}))
