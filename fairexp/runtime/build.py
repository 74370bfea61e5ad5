"""From a frozen config to everything that one process of the run holds, in the order that matters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fairexp.beacon import Beacon
from fairexp.config import manifest, schema
from fairexp.config.rundir import RunDir
from fairexp.errors import RunError
from fairexp.optim.param_groups import param_groups
from fairexp.runtime import data, dist, init, order
from fairexp.runtime.bad_samples import BadSamples
from fairexp.runtime.checkpoint import Saver
from fairexp.runtime.ema import EMA, ScheduleFree
from fairexp.runtime.guard import Guard
from fairexp.runtime.make import locate, make
from fairexp.runtime.precision import Precision, precision
from fairexp.runtime.preempt import Stop
from fairexp.runtime.recompute import recompute
from fairexp.runtime.strategies.strategy import Strategy
from fairexp.runtime.strategies.units import units
from fairexp.runtime.track import Metrics
from fairexp.runtime.trackers.nothing import Nothing

Task = Callable[[nn.Module, Any], tuple[Tensor, dict[str, Tensor | tuple[Tensor, Tensor]]]]


@dataclass
class Run:
    """One process's part of a run. The loop reads and writes it; there is nothing else."""

    dir: RunDir
    config: Mapping[str, Any]
    trainer: schema.Trainer
    checkpoint: schema.Checkpoint
    here: dist.Place
    module: nn.Module  # the model by its own names: for state, never called
    model: nn.Module  # what is called: the module, or the strategy's wrapper around it
    # the module's; walked once, since a walk costs more than a small step's kernels
    parameters: dict[str, nn.Parameter]
    strategy: Strategy
    precision: Precision
    optimizer: torch.optim.Optimizer
    schedule: Callable[[int], float]  # optimizer step -> factor on each group's initial_lr
    task: Task
    ema: EMA | None
    # around an evaluation: the averaged weights, where there are some
    averaged: Callable[[], AbstractContextManager[None]]
    training: order.TrainingOrder
    fetch_training: data.Fetcher
    evaluation: order.EvaluationOrder
    fetch_evaluation: data.Fetcher
    max_steps: int
    stop: Stop
    saver: Saver
    tracker: Metrics | Nothing = field(default_factory=Nothing)
    beacon: Beacon = field(default_factory=Beacon)  # who watches the ranks sees where each is
    step: int = 0  # optimizer steps done
    final: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    evaluated: int = -1  # the step of the last evaluation
    guard: Guard = field(init=False)  # of bad numbers


def build(run_dir: RunDir, config: Mapping[str, Any], here: dist.Place, stop: Stop) -> Run:
    """Model -> strategy -> optimizer -> data. Then come `checkpoint.restore` and, last, the tracker, by `track`."""
    trainer = schema.read(schema.Trainer, config["trainer"])
    strategy: Strategy = make(config["strategy"])
    here = replace(here, model_ranks=strategy.model_ranks)
    if strategy.needs_group or here.world_size > 1:
        dist.join(here)
    seed = config["seed"]

    module = init.construct(lambda: make(config["model"]), locate(config["model"]["_target_"]), seed)
    if not isinstance(module, nn.Module):
        raise RunError(f"model: {config['model']['_target_']} gave a {type(module).__name__}, not a torch.nn.Module")
    if isinstance(getattr(module, "weights", None), str) and manifest.committed(run_dir.checkpoints):
        module.weights = None  # type: ignore[assignment]  # a checkpoint follows: the folder may have gone since
    if trainer.compile == "blocks":
        for unit in units(module).values():
            unit.forward = torch.compile(unit.forward)  # in place: the names stay
    # around the compiled units: torch.compile would skip what it finds inside
    chosen = units(module, config["strategy"].get("units")).values()
    recompute(chosen, trainer.activation_checkpointing, traced=trainer.compile == "whole")
    model = strategy.wrap(module, here, seed)
    if trainer.compile == "whole":
        model.compile()
    # each rank its own dropout masks; ranks that hold one model's parts the same ones, for they see the same activations
    init.seed_generators(init.seed_of(seed, "rank", here.data_rank))

    # after the strategy: FSDP replaces the parameters
    optimizer = _optimizer(config["optimizer"], module, trainer)

    ema = EMA(module, trainer.ema_decay) if trainer.ema_decay is not None else None
    averaged = ema.applied if ema else nullcontext
    if callable(getattr(optimizer, "eval", None)):  # a schedule-free one
        if ema:
            raise RunError("trainer.ema_decay: the optimizer averages the weights itself; set it to null")
        averaged = ScheduleFree(module, optimizer).applied

    dataset = {part: _dataset(config["dataset"], part) for part in ("train", "eval", "augment", "mix", "on_device")}
    lengths = {part: data.length(dataset[part], part) for part in ("train", "eval")}
    per_rank = -(-trainer.global_batch_size // here.data_size)
    micro_batch_size = trainer.micro_batch_size or per_rank
    shuffle = config["dataset"].get("shuffle", True)
    training = order.TrainingOrder(
        lengths["train"], trainer.global_batch_size, micro_batch_size, here, seed, shuffle, dataset["train"]
    )
    max_steps = trainer.max_steps or trainer.max_epochs * training.steps_per_epoch  # type: ignore[operator]

    run = Run(
        dir=run_dir,
        config=config,
        trainer=trainer,
        checkpoint=schema.read(schema.Checkpoint, config["checkpoint"]),
        here=here,
        module=module,
        model=model,
        parameters=dict(module.named_parameters()),
        strategy=strategy,
        precision=precision(trainer.precision, here.device),
        optimizer=optimizer,
        schedule=make(config["schedule"], max_steps=max_steps),
        task=make(config["task"]),
        ema=ema,
        averaged=averaged,
        training=training,
        fetch_training=data.Fetcher(
            dataset["train"],
            dataset["augment"],
            seed,
            BadSamples(run_dir.logs, here.rank, trainer.bad_samples),
            dataset["mix"],
            dataset["on_device"],
        ),
        evaluation=order.EvaluationOrder(lengths["eval"], trainer.eval_batch_size or micro_batch_size, here),
        fetch_evaluation=data.Fetcher(dataset["eval"], None, seed, on_device=dataset["on_device"]),
        max_steps=max_steps,
        stop=stop,
        saver=Saver(here.device),
    )
    run.guard = Guard(run, schema.read(schema.Guard, config["guard"]))
    return run


def _dataset(section: Mapping[str, Any], part: str) -> Any:
    try:
        return make(section.get(part))
    except ValueError as error:
        if not section[part]["_target_"].startswith("fairexp."):
            raise  # of the user's code the traceback is shown
        raise RunError(f"dataset.{part}: {error}") from error


def _optimizer(node: Mapping[str, Any], module: nn.Module, trainer: schema.Trainer) -> torch.optim.Optimizer:
    arguments = {key: value for key, value in node.items() if key not in schema.OPTIMIZER}
    rules = node.get("groups") or []
    decays = "weight_decay" in node or any("weight_decay" in rule for rule in rules)
    try:
        split_decay = decays and not trainer.decay_norm_and_bias
        groups = param_groups(module.named_parameters(), rules, node.get("layer_decay"), split_decay)
    except ValueError as error:
        raise RunError(f"optimizer.{error}") from error
    if not groups:
        raise RunError("the model has no parameter that requires a gradient")
    try:
        optimizer = make(arguments, params=groups)
    except ValueError as error:
        raise RunError(f"optimizer: {error}") from error
    for group in optimizer.param_groups:
        group["lr"] *= group.pop("lr_scale", 1.0)
        group["initial_lr"] = group["lr"]
    return optimizer


def track(run: Run) -> None:
    """Opens metrics.jsonl and the tracker, on rank 0. Rows after the checkpoint that was loaded are dropped."""
    if not run.here.first:
        return
    metrics = Metrics(run.dir.path, Nothing(), run.dir.workspace)
    metrics.drop_after(run.step)  # first: a tracker may send the rows that stay
    metrics.tracker = make(
        run.config["tracker"],
        run_dir=run.dir.path,
        run_id=run.dir.id,
        name=run.config["name"],
        config=dict(run.config),
        resumed=run.step > 0,
    )
    run.tracker = metrics
