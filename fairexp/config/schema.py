"""The sections that fairexp itself reads, with their types and bounds. config.validate checks a config against them
before anything starts; the runtime reads its settings through them."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Bound:
    """Allowed values: at least `low` (more than, if `open`), and at most `high`."""

    low: float
    high: float = math.inf
    open: bool = False

    def __str__(self) -> str:
        low = f"{'>' if self.open else '>='} {self.low}"
        return low if math.isinf(self.high) else f"{low} and <= {self.high}"

    def holds(self, value: float) -> bool:
        return (value > self.low if self.open else value >= self.low) and value <= self.high


Positive = Annotated[int, Bound(1)]
Fraction = Annotated[float, Bound(0, 1)]


@dataclass(frozen=True)
class Trainer:
    """How long, in which batches, in which arithmetic; configs/trainer/default.yaml explains each."""

    max_steps: Positive | None
    max_epochs: Positive | None
    global_batch_size: Positive
    micro_batch_size: Positive | None
    grad_clip_norm: Annotated[float, Bound(0, open=True)] | None
    decay_norm_and_bias: bool
    precision: Literal["fp32", "bf16", "fp16"]
    compile: Literal["off", "blocks", "whole"]
    ema_decay: Fraction | None
    eval_every: Positive | None
    log_every: Positive
    eval_batch_size: Positive | None
    deterministic: bool
    num_workers: Annotated[int, Bound(0)]
    device: Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class Checkpoint:
    """When the state is saved and what is kept."""

    every: Positive | None
    keep_last: Positive


@dataclass(frozen=True)
class Launcher:
    """Which processes a run gets."""

    kind: Literal["local", "inline"]
    nodes: Positive
    num_processes: Positive | None
    threads_per_process: Positive | None


@dataclass(frozen=True)
class Scalars:
    """The run's own values, at the top level."""

    name: str
    seed: Annotated[int, Bound(0, 2**63 - 1)]
    runs_dir: str


Section = TypeVar("Section")
SECTIONS: dict[str, type] = {"trainer": Trainer, "checkpoint": Checkpoint, "launcher": Launcher}


def read(section: type[Section], values: Mapping[str, Any]) -> Section:
    """The section's values as an object, after config.validate has passed them."""
    return section(**values)


def allowed(annotation: Any) -> str:
    """An annotation in words: `int >= 1 or null`."""
    origin = get_origin(annotation)
    if origin is Annotated:
        base, bound = get_args(annotation)
        return f"{allowed(base)} {bound}"
    if origin is Literal:
        return f"one of {', '.join(map(str, get_args(annotation)))}"
    if origin in (Union, types.UnionType):
        return " or ".join(allowed(part) for part in get_args(annotation))
    return "null" if annotation is type(None) else annotation.__name__


def shown(value: Any) -> str:
    """A value as a person would write it in YAML."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else repr(value)


def fits(value: Any, annotation: Any) -> bool:
    """Whether the value is of the annotation's type and within its bounds. An int is a float; a bool is no number."""
    origin = get_origin(annotation)
    if origin is Annotated:
        base, bound = get_args(annotation)
        return fits(value, base) and bound.holds(value)
    if origin is Literal:
        return value in get_args(annotation) and not isinstance(value, bool)
    if origin in (Union, types.UnionType):
        return any(fits(value, part) for part in get_args(annotation))
    if annotation is type(None):
        return value is None
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, annotation)


def settings(section: type) -> dict[str, Any]:
    """Each field's name and annotation, in order."""
    hints = get_type_hints(section, include_extras=True)
    return {field.name: hints[field.name] for field in fields(section)}


def num_ranks(launcher: Launcher, device: str, gpus: int) -> int:
    """The processes a node that a run gets: what is asked, else one a GPU, one on the CPU."""
    return launcher.num_processes or (max(gpus, 1) if device != "cpu" else 1)
