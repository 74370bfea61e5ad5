"""What `fairexp verify-resume` compares: a digest of each state that the next step may depend on, found by walking the run's
objects and not by asking the checkpoint, which may have forgotten one; and of each batch and loss.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fairexp.runtime import dist, shards

if TYPE_CHECKING:
    from fairexp.runtime.build import Run


class Watched:
    """In place of `run.stop`, which the loop asks after every step: takes the census, and ends the process as a power failure
    would after step `kill_at`."""

    def __init__(self, run: Run, at: list[int], kill_at: int | None):
        self.run = run
        self.stop = run.stop
        self.task = run.task
        self.at = at
        self.kill_at = kill_at
        self.seen: list[str] = []
        self.file = run.dir.path / "census" / f"rank_{run.here.rank}.jsonl"
        self.file.parent.mkdir(exist_ok=True)
        run.stop = self  # type: ignore[assignment]
        run.task = self._see
        self._write(run.step)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stop, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "trouble":
            self.stop.trouble = value
        else:
            super().__setattr__(name, value)

    def agreed(self, step: int) -> bool:
        self._write(step)
        if self.kill_at is not None and step >= self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.stop.agreed(step)

    def _see(self, model: Any, batch: Any) -> Any:
        if model.training:
            self.seen.append(digest(batch))
        loss, metrics = self.task(model, batch)
        if model.training:
            self.seen.append(float(loss).hex())
        return loss, metrics

    def _write(self, step: int) -> None:
        row: dict[str, Any] = {"step": step, "seen": self.seen}
        if step in self.at:
            dist.share_buffers(self.run.module)  # as the save after this step does
            row["states"] = dict(states(self.run))
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.seen = []


def states(run: Run) -> Iterator[tuple[str, str]]:
    """Each state's name and the digest of its value on this rank."""
    # first: FSDP gives up its gathered weights here, and their memory mustn't be in use
    kept = run.module.state_dict().keys()
    yield "step", digest(run.step)
    for name, weight in run.module.named_parameters():
        yield f"weight {name}", digest(weight)
    for name, tensor in run.module.named_buffers():
        yield f"{'buffer' if name in kept else 'buffer outside the state dict'} {name}", digest(tensor)
    for name, module in run.module.named_modules():
        yield from _attributes(f"model attribute {name}." if name else "model attribute ", module)
    for name, parameter in run.parameters.items():
        for what, value in run.optimizer.state.get(parameter, {}).items():
            yield f"optimizer {what} of {name}", digest(value)
    for number, group in enumerate(run.optimizer.param_groups):
        for what, value in group.items():
            if what != "params":
                yield f"optimizer group {number} {what}", digest(value)
    for name, average in run.ema.shadow.items() if run.ema else ():
        yield f"average {name}", digest(average)
    yield "guard", digest(run.guard.state())
    yield "loss scale", digest(run.precision.state())
    yield "generator torch", digest(torch.get_rng_state())
    yield "generator python", digest(random.getstate())
    yield "generator numpy", digest(np.random.get_state(legacy=True))
    if run.here.device.type == "cuda":
        yield "generator cuda", digest(torch.cuda.get_rng_state(run.here.device))
    yield "best metrics", digest(run.best)
    fetch = run.fetch_training
    objects = {"dataset": fetch.dataset, "augment": fetch.augment, "mix": fetch.mix, "schedule": run.schedule}
    for name, thing in objects.items():
        yield from _attributes(f"{name} attribute ", thing)


def _attributes(prefix: str, thing: Any) -> Iterator[tuple[str, str]]:
    """The plain values among an object's attributes, and its generators."""
    for name, value in getattr(thing, "__dict__", {}).items():
        if isinstance(value, bool | int | float | str | random.Random | np.random.Generator | torch.Generator) or (
            isinstance(value, Tensor) and value.numel() < 1 << 20
        ):
            yield f"{prefix}{name}", digest(value)


def digest(value: Any) -> str:
    """Sixteen hex digits that two values share only if their bits are the same."""
    hashed = hashlib.sha256()
    _feed(hashed, value)
    return hashed.hexdigest()[:16]


def _feed(hashed: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        values, _ = shards.piece(value)
        hashed.update(f"{values.dtype} {tuple(values.shape)} ".encode())
        if values.numel():
            hashed.update(values.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(value, np.ndarray):
        hashed.update(f"{value.dtype} {value.shape} ".encode() + np.ascontiguousarray(value).tobytes())
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            hashed.update(f"{key}: ".encode())
            _feed(hashed, value[key])
    elif isinstance(value, tuple | list):
        hashed.update(f"{len(value)} of ".encode())
        for each in value:
            _feed(hashed, each)
    elif isinstance(value, random.Random):
        _feed(hashed, value.getstate())
    elif isinstance(value, np.random.Generator):
        hashed.update(repr(value.bit_generator.state).encode())
    elif isinstance(value, torch.Generator):
        _feed(hashed, value.get_state())
    elif isinstance(value, float):
        hashed.update(value.hex().encode())
    else:
        hashed.update(repr(value).encode())
