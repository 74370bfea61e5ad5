"""Numbers gone wrong: what all ranks do together about a loss or gradient norm that isn't finite, or is far above the last ones.

The loop asks `accepts` before each optimizer step, then `rolls_back`; and `check` before numbers are logged or saved.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from math import inf, isfinite
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fairexp.config import schema
from fairexp.errors import RunError
from fairexp.runtime import checkpoint, dist, track

if TYPE_CHECKING:
    from fairexp.runtime.build import Run

UNREAD_MOST = 1000  # steps: two numbers each wait on the device


class Bad(NamedTuple):
    """A number gone wrong, and what to do about it. `limit`: what it exceeds; None: it isn't finite."""

    what: str
    value: float
    policy: str
    limit: float | None = None


class Guard:
    """Judges each step before it is applied; all ranks judge the same numbers, so they decide alike.

    With skip, rollback or spikes that is a small collective a step, and on a GPU the host waits for the device. With the
    default, stop, nothing is read from a GPU between checks: up to then the bad step is applied, but never saved.
    """

    def __init__(self, run: Run, settings: schema.Guard):
        self.run = run
        self.settings = settings
        self.on = True
        self.reads = settings.nonfinite != "stop" or settings.spike != "off"
        self.cpu = run.here.device.type == "cpu"
        self.at_once = self.cpu and run.here.world_size == 1
        # in fp16 the scaled gradients overflow now and then, and the loss scaler skips the step itself
        self.overflows = run.trainer.precision == "fp16"
        self.unread: list[tuple[int, Tensor, Tensor | None]] = []  # step, this rank's loss, gradient norm
        self.windows: dict[str, deque[float]] = {
            what: deque(maxlen=settings.spike_window) for what in ("loss", "gradient norm")
        }
        self.num_skipped = 0
        self.bad_batch: int | None = None  # the next step goes without it, from the last checkpoint
        # a batch norm has counted a batch before its step is skipped: its statistics are put back
        skips = "skip" in (settings.nonfinite, settings.spike)
        self.buffers = list(run.module.buffers()) if skips else []
        self.kept = [buffer.clone() for buffer in self.buffers]

    def accepts(self, loss: Tensor, grad_norm: Tensor | None) -> bool:
        """Whether the step is to be applied; RunError where the run stops. `loss`: of this rank, `grad_norm`: of all."""
        if not self.on:
            return True
        if self.reads:
            assert grad_norm is not None
            return self._accepts_now(loss, grad_norm)
        if self.overflows:
            grad_norm = None
        # on a CPU reading is no waiting: all ranks see a bad norm now; another rank's bad loss, when they meet
        bad_norm = self.cpu and grad_norm is not None and not isfinite(grad_norm.item())
        if self.at_once and not bad_norm and isfinite(loss.item()):
            return True  # nothing to keep: 20 kept steps would cost a hundredth of a small step
        self.unread.append((self.run.step + 1, loss, grad_norm))
        if bad_norm or self.at_once or len(self.unread) >= UNREAD_MOST:
            self.check()
        return True

    def _accepts_now(self, loss: Tensor, grad_norm: Tensor) -> bool:
        means = dist.sum_over_ranks(torch.stack([loss, grad_norm.to(loss.device)]).double()) / self.run.here.world_size
        numbers = dict(zip(self.windows, means.tolist(), strict=True))
        if self.overflows and not isfinite(numbers["gradient norm"]):
            del numbers["gradient norm"]
        bad = self._judge(numbers)
        if bad:
            self._act(self.run.step + 1, bad, self._of_each_rank(loss.item()))
        elif self.settings.spike != "off":
            for what, value in numbers.items():
                self.windows[what].append(value)
        _copy(self.kept, self.buffers) if bad else _copy(self.buffers, self.kept)
        return not bad

    def _judge(self, numbers: Mapping[str, float]) -> Bad | None:
        settings = self.settings
        for what, value in numbers.items():
            if not isfinite(value):
                return Bad(what, value, settings.nonfinite)
            window = self.windows[what]
            if settings.spike != "off" and 2 * len(window) >= settings.spike_window:
                limit = spike_limit(window, settings.spike_factor)
                if value > limit:
                    return Bad(what, value, settings.spike, limit)
        return None

    def check(self) -> None:
        """RunError for the first step since the last check that wasn't finite on some rank; all ranks call it together."""
        if self.reads or not self.on:
            return  # each step has been judged
        unread, self.unread = self.unread, []
        losses = _read([loss for _, loss, _ in unread])
        norms = iter(_read([norm for _, _, norm in unread if norm is not None]))
        seen = {
            step: {"loss": loss} | ({"gradient norm": next(norms)} if norm is not None else {})
            for (step, _, norm), loss in zip(unread, losses, strict=True)
        }
        mine = next((step for step, numbers in seen.items() if not all(map(isfinite, numbers.values()))), 0)
        bad_steps = [step for step in self._of_each_rank(mine) if step]
        if bad_steps:
            step = int(min(bad_steps))
            by_rank = self._of_each_rank(seen[step]["loss"])
            bad = self._judge(seen[step] | {"loss": sum(by_rank) / len(by_rank)})
            assert bad
            self._act(step, bad, by_rank)

    def check_before_save(self) -> None:
        """RunError where a number is not finite that was not looked at yet, the weights included."""
        self.check()
        # without grad_clip_norm a gradient is only seen where it is logged
        weights = [p.to_local() if isinstance(p, DTensor) else p.detach() for p in self.run.parameters.values()]
        largest = sum(_read(torch._foreach_norm([weight for weight in weights if weight.numel()], inf)))
        by_rank = self._of_each_rank(largest)
        if self.on and not all(map(isfinite, by_rank)):
            self._act(self.run.step, Bad("largest weight", sum(by_rank), "stop"), [])

    def _act(self, step: int, bad: Bad, losses: list[float]) -> None:
        """Writes the event down and does what the policy says, up to the return to a checkpoint: that is `rolls_back`."""
        run, policy = self.run, bad.policy
        why = f"guard.{'nonfinite' if bad.limit is None else 'spike'}={policy}"
        num_before = self.num_skipped + len(run.training.left_out)
        if policy != "stop" and num_before >= self.settings.max_events:
            policy, why = "stop", f"{why}, but guard.max_events={self.settings.max_events} is reached"
        elif policy == "rollback" and not run.saver.step:
            policy, why = "stop", f"{why}, but there is no checkpoint yet"
        batch = run.training.batch_of(step - 1)
        ranks = [str(rank) for rank, loss in enumerate(losses) if not isfinite(loss)]
        text = f"step {step}: the {bad.what} is {bad.value:.6g}"
        text += f" on rank {', '.join(ranks)}" if ranks else f", above {bad.limit:.6g}" if bad.limit is not None else ""
        file = run.dir.path / "events.jsonl"
        if run.here.first:
            epoch, samples = run.training.samples(batch)
            event = {
                "step": step,
                "what": bad.what,
                "value": track.number(bad.value),
                "limit": bad.limit,
                "policy": policy,
                "why": why,
                "epoch": epoch,
                "batch": batch,
                "losses": [track.number(loss) for loss in losses],  # of each rank, as are the samples
                "samples": samples,
                "attempt": int(os.environ.get("FAIREXP_ATTEMPT", "0")),
                "time": time.time(),
            }
            with open(file, "a", encoding="utf-8") as events:
                events.write(json.dumps(event) + "\n")
        if policy == "stop":
            raise RunError(f"{text} ({why}); the batch's samples are in {file}")
        if run.here.first:
            print(f"{text} ({why}); the batch's samples are in {file}", file=sys.stderr, flush=True)
        if policy == "skip":
            self.num_skipped += 1
        else:
            self.bad_batch = batch

    def rolls_back(self) -> bool:
        """Returns to the last checkpoint if the step just taken asks for it. `run.step` is then the checkpoint's, and the bad
        batch is left out of the order: the same numbers as if it had never been there, whichever checkpoint it was.

        What was left out since that checkpoint isn't in it: a run that is killed meets those batches again, and decides alike.
        """
        if self.bad_batch is None:
            return False
        run = self.run
        left_out = [*run.training.left_out, self.bad_batch]
        checkpoint.restore(run)
        run.training.left_out = left_out
        self.bad_batch = None
        run.stop.goes_back()
        if run.here.first:
            run.tracker.drop_after(run.step)
        return True

    def _of_each_rank(self, value: float) -> list[float]:
        values = torch.zeros(self.run.here.world_size, dtype=torch.float64)
        values[self.run.here.rank] = value
        return dist.sum_over_ranks(values).tolist()

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold, so that a resumed run decides as this one."""
        windows = {what: list(window) for what, window in self.windows.items()}
        return {"windows": windows, "num_skipped": self.num_skipped, "left_out": list(self.run.training.left_out)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Takes a checkpoint's state, after the model has."""
        for what, values in state["windows"].items():
            self.windows[what] = deque(values, maxlen=self.settings.spike_window)
        self.num_skipped = state["num_skipped"]
        self.run.training.left_out = list(state["left_out"])
        _copy(self.buffers, self.kept)


def spike_limit(window: Sequence[float], factor: float) -> float:
    """What a value must not exceed: `factor` robust standard deviations above the window's median.

    1.4826 times the median absolute deviation estimates one for normal values, and outliers don't move it. It counts as a
    hundredth of the median at least: after a flat stretch any change would be a spike.
    """
    center = statistics.median(window)
    spread = statistics.median(abs(value - center) for value in window)
    return center + factor * max(1.4826 * spread, 0.01 * abs(center))


def _read(numbers: Sequence[Tensor]) -> list[float]:
    """One wait for the device, not one a number."""
    return torch.stack(list(numbers)).tolist() if numbers else []


def _copy(source: Sequence[Tensor], target: Sequence[Tensor]) -> None:
    for there, here in zip(source, target, strict=True):
        here.copy_(there)
