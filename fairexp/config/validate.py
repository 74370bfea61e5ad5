"""Every problem of a composed config at once, each in one line: what, where, what is allowed, the nearest match. Nothing is
imported that the config names, and nothing is changed."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from fairexp.config import schema, targets
from fairexp.config.compose import Composed
from fairexp.config.nearest import nearest
from fairexp.config.trust import is_trusted, refusal

# What the runtime adds to the arguments that stand in the config.
GIVEN_LATER: dict[str, tuple[str, ...]] = {
    "optimizer": ("params",),
    "loop": ("run",),
    "tracker": ("run_dir", "run_id", "name", "config", "resumed"),
}
TARGETS = ("model", "task", "optimizer", "schedule", "strategy", "tracker", "loop")  # sections that are one object
COUNTS = ("depth", "width", "num_heads", "hidden")  # with every *_size and num_*: at least one
NOT_NEGATIVE = ("lr", "weight_decay", "momentum", "eps", "dropout", "label_smoothing")


def problems(composed: Composed, gpus: int, trusted: Collection[str], working_dir: Path) -> list[str]:
    """Why the config can't run; [] if it can. `gpus`: how many this machine shows."""
    config = composed.config
    return [
        *sections(composed),
        *numbers(composed, config),
        *called(composed, trusted, working_dir),
        *(batches(composed, gpus) if not list(sections(composed)) else []),
        *folders(composed),
    ]


def sections(composed: Composed) -> Iterator[str]:
    """Unknown keys, missing keys, wrong types and values out of bounds in what fairexp itself reads."""
    config = composed.config
    known = {*schema.SECTIONS, *schema.annotations(schema.Scalars), *TARGETS, "dataset"}
    for key in config.keys() - known:
        yield f"{key} ({composed.where(key)}): no such section{nearest(key, known)}"
    for key in sorted(known - config.keys()):
        yield f"{key}: missing; choose one with {key}=..., or start from configs/train.yaml"
    yield from _section(composed, schema.Scalars, {key: config[key] for key in schema.annotations(schema.Scalars) if key in config}, "")
    for name, section in schema.SECTIONS.items():
        if name in config:
            if isinstance(config[name], Mapping):
                yield from _section(composed, section, config[name], f"{name}.")
            else:
                yield f"{name} ({composed.where(name)}): is {config[name]!r}, not a section"
    for name in (*TARGETS, "dataset"):
        if name in config and not isinstance(config[name], Mapping):
            yield f"{name} ({composed.where(name)}): is {config[name]!r}, not a section"
        elif name in TARGETS and name in config and "_target_" not in config[name]:
            yield f"{name} ({composed.where(name)}): has no _target_"
    name = config.get("name")
    if isinstance(name, str) and (not name or name.startswith(".") or any(c in name for c in "/\\\0\n")):
        yield f"name ({composed.where('name')}): {name!r} can't be part of a folder's name"


def _section(composed: Composed, section: type, values: Mapping[str, Any], prefix: str) -> Iterator[str]:
    annotations = schema.annotations(section)
    for key in values:
        if key not in annotations:
            yield f"{prefix}{key} ({composed.where(prefix + key)}): no such setting{nearest(key, annotations)}"
    for key, annotation in annotations.items():
        if key not in values:
            yield f"{prefix}{key}: missing"
        elif not schema.fits(values[key], annotation):
            yield f"{prefix}{key} ({composed.where(prefix + key)}): {values[key]!r} is not {schema.allowed(annotation)}"


def numbers(composed: Composed, node: Any, prefix: str = "") -> Iterator[str]:
    """NaN and infinities anywhere, and the sizes and rates that can't be negative."""
    items = node.items() if isinstance(node, Mapping) else enumerate(node)
    for key, value in items:
        dotted = f"{prefix}{key}"
        if isinstance(value, Mapping | list):
            yield from numbers(composed, value, f"{dotted}.")
        elif isinstance(value, float) and not math.isfinite(value):
            yield f"{dotted} ({composed.where(dotted)}): {value} is not a finite number"
        elif isinstance(value, int | float) and not isinstance(value, bool) and dotted.partition(".")[0] not in schema.SECTIONS:
            name = str(key) if isinstance(node, Mapping) else prefix.rstrip(".").rpartition(".")[2]
            if (name in COUNTS or name.endswith("_size") or name.startswith("num_")) and value < 1:
                yield f"{dotted} ({composed.where(dotted)}): {value} is not >= 1"
            elif name in NOT_NEGATIVE and value < 0:
                yield f"{dotted} ({composed.where(dotted)}): {value} is not >= 0"


def called(composed: Composed, trusted: Collection[str], working_dir: Path) -> Iterator[str]:
    """`_target_`s that don't exist, aren't trusted, or don't take the arguments that the config gives them."""
    for dotted, node in nodes(composed.config):
        for argument, problem in _call(dotted, node, trusted, working_dir):
            key = f"{dotted}.{argument}" if argument in node else f"{dotted}._target_"
            yield f"{key} ({composed.where(key)}): {problem}"


def _call(dotted: str, node: Mapping[str, Any], trusted: Collection[str], working_dir: Path) -> Iterator[tuple[str, str]]:
    """The problems of one call, each with the argument that it stands at."""
    target = node["_target_"]
    if not isinstance(target, str):
        yield "_target_", f"{target!r} is not a dotted name"
        return
    try:
        signature = targets.find(target, [str(working_dir)])
    except targets.TargetError as error:
        yield "_target_", str(error)
        return
    if not is_trusted(target, trusted):
        yield "_target_", refusal(target)
        return
    later = GIVEN_LATER.get(dotted, ())
    if node.get("_partial_"):
        later = (*later, *signature.parameters)  # the receiver gives the rest
    for problem in targets.check_arguments(signature, node, later):
        yield next((key for key in node if f"'{key}'" in problem), "_target_"), problem


def nodes(node: Any, prefix: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every mapping with a `_target_`, with its dotted key."""
    items = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        if isinstance(value, Mapping) and "_target_" in value:
            yield f"{prefix}{key}", value
        yield from nodes(value, f"{prefix}{key}.")


def batches(composed: Composed, gpus: int) -> Iterator[str]:
    """Batch sizes against processes, processes against strategy and devices."""
    config = composed.config
    trainer, launcher = (schema.read(schema.SECTIONS[name], config[name]) for name in ("trainer", "launcher"))
    if trainer.max_steps is None and trainer.max_epochs is None:
        yield "trainer.max_steps and trainer.max_epochs are both null: give one"
    if launcher.nodes > 1:
        yield f"launcher.nodes ({composed.where('launcher.nodes')}): {launcher.nodes} nodes, but launcher={launcher.kind} has one"
        return
    processes = launcher.num_processes or (max(gpus, 1) if trainer.device != "cpu" else 1)
    if launcher.kind == "inline" and processes != 1:
        yield f"launcher.num_processes: {processes}, but launcher=inline is this one process; use launcher=local"
    strategy = config["strategy"].get("_target_", "") if isinstance(config["strategy"], Mapping) else ""
    if strategy == "fairexp.runtime.strategies.single.Single" and processes > 1:
        yield f"{processes} processes with strategy=single; add strategy=ddp or strategy=fsdp"
    if trainer.device == "cuda" and gpus == 0:
        yield "trainer.device=cuda, but this machine shows no GPU"
    elif trainer.device != "cpu" and 0 < gpus < processes:
        yield f"launcher.num_processes: {processes}, but this machine shows {gpus} GPU{'s' if gpus > 1 else ''}; or add trainer.device=cpu"
    size = config["strategy"].get("shard_size") if isinstance(config["strategy"], Mapping) else None
    if isinstance(size, int) and (size < 1 or processes % size):
        yield f"strategy.shard_size ({composed.where('strategy.shard_size')}): {size} does not divide the {processes} processes"
    batch = trainer.global_batch_size
    if batch % processes:
        yield (
            f"trainer.global_batch_size ({composed.where('trainer.global_batch_size')}): {batch} is not a multiple of the "
            f"{processes} processes; nearest: {_multiples(batch, processes)}"
        )
    elif trainer.micro_batch_size and (batch // processes) % trainer.micro_batch_size:
        step = processes * trainer.micro_batch_size
        yield (
            f"trainer.micro_batch_size ({composed.where('trainer.micro_batch_size')}): {trainer.micro_batch_size} does not divide the "
            f"{batch // processes} samples a rank of global_batch_size {batch}; nearest global_batch_size: {_multiples(batch, step)}"
        )


def _multiples(value: int, step: int) -> str:
    below = value // step * step
    return f"{below} or {below + step}" if below else str(step)


def folders(composed: Composed) -> Iterator[str]:
    """A data folder that is missing, or lacks what dataset.expects lists."""
    dataset = composed.config.get("dataset")
    if not isinstance(dataset, Mapping) or not isinstance(dataset.get("root"), str):
        return
    root = Path(dataset["root"]).expanduser()
    patterns = dataset.get("expects") or []
    layout = f"expected there: {', '.join(map(str, patterns))}" if patterns else "it holds the data"
    where = f"dataset.root ({composed.where('dataset.root')})"
    if not root.is_dir():
        yield f"{where}: no folder {root}; {layout}"
        return
    absent = [pattern for pattern in patterns if next(root.glob(str(pattern)), None) is None]
    if absent:
        yield f"{where}: nothing in {root} matches {', '.join(absent)}; {layout}"
