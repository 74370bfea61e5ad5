"""The training loop. Copy this file into your repository, change it, and point `loop._target_` at it."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fairexp.errors import RunError
from fairexp.runtime import checkpoint, dist
from fairexp.runtime.build import Run
from fairexp.runtime.data import Batches, MicroBatch, evaluation_batches
from fairexp.runtime.peaks import peak_flops
from fairexp.runtime.profile import Profile


def fit(run: Run) -> None:
    """Trains from `run.step` to `run.max_steps`, or until all ranks have agreed to stop; logs, evaluates and saves on the way."""
    batches = Batches(run.fetch_training, run.training, run.here, run.trainer.num_workers, run.step)
    clock = Clock(run, batches)
    profile = Profile(run)
    run.model.train()
    while run.step < run.max_steps:
        step = run.step + 1
        profile.begins(step)
        run.beacon.at("data", step)
        micro_batches = next(batches)
        run.beacon.at("step", step)
        logs = due(run, step, run.trainer.log_every)
        loss, grad_norm = train_step(run, micro_batches, wants_norm=logs)
        if run.guard.rolls_back():  # run.step is a checkpoint's, and the order of batches another from there on
            batches.restart(run.step)
            clock.restart()
            continue
        run.step = step
        if logs:
            run.beacon.at("log", step)
            log(run, loss, grad_norm, clock, micro_batches[0].batch)
        if profile.ends(step):
            clock.restart()
        if due(run, step, run.trainer.eval_every):
            evaluate_and_log(run)
            clock.restart()
        run.beacon.at("agree", step)
        stopping = run.stop.agreed(step)
        if stopping or due(run, step, run.checkpoint.every):
            run.beacon.at("save", step)
            run.guard.check_before_save()
            checkpoint.save(run)
            clock.restart()
        if stopping:
            break
    profile.close()
    batches.close()


def train_step(run: Run, micro_batches: list[MicroBatch], wants_norm: bool) -> tuple[Tensor, Tensor | None]:
    """One optimizer step, if run.guard finds nothing wrong with its numbers. This rank's part of the loss, and the gradient norm
    where it was needed; both stay on the device.

    Each micro batch's mean loss counts by its share of the global batch, so unequal ones average as one big batch would.
    """
    total: Tensor | None = None
    for micro_batch, share in zip(micro_batches, shares(run, micro_batches), strict=True):
        with run.strategy.last_micro_batch(run.model, micro_batch is micro_batches[-1]):
            with run.precision.autocast():
                loss, _ = run.task(run.model, micro_batch.batch)
            if share is not None:
                loss = loss * share
            run.precision.backward(loss)
        total = loss.detach() if total is None else total + loss.detach()
    assert total is not None

    grad_norm = None
    run.precision.unscale(run.optimizer)
    if run.trainer.grad_clip_norm is not None:
        grad_norm = run.strategy.clip_grad_norm(run.parameters.values(), run.trainer.grad_clip_norm)
    elif wants_norm or run.guard.reads:
        grad_norm = run.strategy.grad_norm(run.parameters.values())
    factor = run.schedule(run.step)
    for group in run.optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    if run.guard.accepts(total, grad_norm):
        run.precision.step(run.optimizer)
        if run.ema:
            run.ema.update(run.step)
    else:
        run.precision.skip(run.optimizer)
    for parameter in run.parameters.values():
        parameter.grad = None  # what optimizer.zero_grad() does, in a tenth of its time
    return total, grad_norm


def shares(run: Run, micro_batches: list[MicroBatch]) -> Sequence[float | Tensor | None]:
    """What each micro batch's mean loss counts, times the number of data ranks, by which DDP and FSDP divide; None is 1.

    A mean over samples counts by their number, which every rank knows. Where a task weighs its batches, such as by tokens, the
    ranks add up their weights first.
    """
    weigh = getattr(run.task, "weigh", None)
    if weigh is None:
        return [None if micro_batch.share == 1.0 else micro_batch.share for micro_batch in micro_batches]
    weights = torch.stack([weigh(each.batch) * (each.weight > 0) for each in micro_batches]).double()
    total = dist.sum_over_ranks(weights.sum())  # ranks that share their samples count them each: so does the world size
    return (weights * run.here.world_size / total.clamp(min=1)).unbind()


def due(run: Run, step: int, every: int | None) -> bool:
    """Whether what happens every so many steps happens after this one: at its multiples and at the end."""
    return step == run.max_steps or (every is not None and step % every == 0)


class Clock:
    """Times the steps between two log records."""

    def __init__(self, run: Run, batches: Batches):
        self.run = run
        self.batches = batches
        self.peak = peak_flops(run.here.device)
        self.flops_per_token = cache(getattr(run.module, "flops_per_token", lambda seq_len: None))
        self.restart()

    def restart(self) -> None:
        """Forgets the time since the last record: evaluation and saving are no step time."""
        self.step, self.began, self.waited_s = self.run.step, time.perf_counter(), self.batches.waited_s

    def read(self, batch: Any) -> dict[str, float]:
        """The mean step since the last record or restart. `batch`: one of its batches; if it has tokens, those a second and,
        where model and GPU are known, MFU: the part of the GPUs' peak that the model's own FLOPs make (PaLM, appendix B)."""
        elapsed = time.perf_counter() - self.began
        step_time = elapsed / max(self.run.step - self.step, 1)
        record = {
            "perf/step_time_s": step_time,
            "perf/samples_per_s": (samples_per_s := self.run.trainer.global_batch_size / step_time),
            "perf/data_wait_frac": (self.batches.waited_s - self.waited_s) / elapsed,
            "perf/memory_gib": memory_gib(self.run.here.device),
        }
        if isinstance(batch, dict) and "tokens" in batch:
            seq_len = batch["tokens"].shape[1]
            record["perf/tokens_per_s"] = tokens_per_s = samples_per_s * seq_len
            if self.peak and (flops := self.flops_per_token(seq_len)):
                record["perf/mfu"] = flops * tokens_per_s / (self.peak * self.run.here.world_size)
        self.restart()
        return record


def memory_gib(device: torch.device) -> float:
    """The most that this rank has held: on the GPU what its tensors took, on the CPU the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux


def log(run: Run, loss: Tensor, grad_norm: Tensor | None, clock: Clock, batch: Any) -> None:
    """A record of the step just done, of which `batch` is one. The only place where the host waits for the device's numbers."""
    assert grad_norm is not None
    run.guard.check()
    # each data rank's loss is a share of the mean times their number; ranks that share samples report the same loss
    mean_loss = float(dist.sum_over_ranks(loss.clone())) / run.here.world_size
    record = {
        "train/loss": mean_loss,
        "train/lr": run.optimizer.param_groups[0]["lr"],
        "train/grad_norm": float(grad_norm),
        "train/epoch": run.step / run.training.steps_per_epoch,
        **clock.read(batch),
    }
    run.tracker.log(record, run.step)
    run.final |= record


LESS_IS_BETTER = ("loss", "perplexity", "bits_per_byte")


def evaluate_and_log(run: Run) -> None:
    """Evaluates and logs; the best of each metric goes to summary.json."""
    record = {f"eval/{name}": value for name, value in evaluate(run).items()}
    run.tracker.log(record, run.step)
    run.final |= record
    run.evaluated = run.step
    for name, value in record.items():
        better = min if name.endswith(LESS_IS_BETTER) else max
        run.best[name] = better(value, run.best.get(name, value))


@torch.no_grad()
def evaluate(run: Run) -> dict[str, float]:
    """The task's loss and metrics over the evaluation set: means in which each sample counts exactly once, on any world size,
    and what the task derives from them."""
    run.model.eval()
    dist.share_buffers(run.module)
    with run.averaged():
        sums = _sum_over_evaluation_set(run)
    run.model.train()
    values = dist.sum_over_ranks(torch.stack(list(sums.values()))).tolist()
    means = {name: total / weight for name, (total, weight) in zip(sums, values, strict=True)}
    derive = getattr(run.task, "derive", None)
    return means | derive(means) if derive else means


def _sum_over_evaluation_set(run: Run) -> dict[str, Tensor]:
    """By metric the sum of its values and that of their weights, float64: float32 sums of a large set lose whole samples."""
    sums: dict[str, Tensor] = {}
    for batch, weight, _ in evaluation_batches(run.fetch_evaluation, run.evaluation, run.here, run.trainer.num_workers):
        run.beacon.at("evaluate", run.step)
        with run.precision.autocast():
            loss, metrics = run.task(run.model, batch)
        for name, value in {"loss": loss, **metrics}.items():
            # a value a sample is summed exactly, with a weight each or 1; a mean over the batch counts by its number of samples
            values, weights = value if isinstance(value, tuple) else (value, torch.ones_like(value))
            if values.ndim:
                both = torch.stack([values[:weight].double().sum(), weights[:weight].double().sum()])
            else:
                both = torch.stack([values, weights]).double() * weight
            sums[name] = sums.get(name, 0.0) + both
    return sums


def overfit_one_batch(run: Run, steps: int, below: float) -> None:
    """Trains on the first batch alone, without augmentation, and says whether the loss went below `below`.

    A RunError where it did not: then the model, the loss or the learning rate is broken, and more data won't mend it.
    """
    run.fetch_training.augment = run.fetch_training.mix = None
    run.schedule = lambda step: 1.0
    run.guard.on = False  # the verdict says it
    micro_batches = next(Batches(run.fetch_training, run.training, run.here, 0, 0))
    run.model.train()
    first = mean = float("nan")
    while run.step < steps and not run.stop.agreed(run.step):
        run.beacon.at("step", run.step + 1)
        loss, grad_norm = train_step(run, micro_batches, wants_norm=True)
        run.step += 1
        mean = float(dist.sum_over_ranks(loss.clone())) / run.here.world_size
        first = mean if run.step == 1 else first
        run.tracker.log({"train/loss": mean, "train/grad_norm": float(grad_norm)}, run.step)  # type: ignore[arg-type]
        if mean < below:
            break
    verdict = f"one batch of {run.trainer.global_batch_size}: loss {first:.4g} -> {mean:.4g} in {run.step} steps"
    if not mean < below:  # NaN isn't, nor is it at least `below`
        raise RunError(f"{verdict}; it did not get below {below:g}: look at the model, the loss and optimizer.lr")
    if run.here.first:
        print(f"{verdict}: it can learn (below {below:g})", file=sys.stderr, flush=True)


def summary(run: Run, seconds: float) -> dict[str, Any]:
    """What summary.json says: the final and best metrics and what they cost."""
    return {
        "step": run.step,
        "samples": run.step * run.trainer.global_batch_size,
        "wall_s": round(seconds, 3),
        "world_size": run.here.world_size,
        "device": str(run.here.device.type),
        "final": run.final,
        "best": run.best,
    }
