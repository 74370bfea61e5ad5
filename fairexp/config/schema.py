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
    activation_checkpointing: Literal["off", "blocks"] | Fraction
    ema_decay: Fraction | None
    eval_every: Positive | None
    log_every: Positive
    profile_steps: list[Positive] | None
    eval_batch_size: Positive | None
    deterministic: bool
    num_workers: Annotated[int, Bound(0)]
    bad_samples: Annotated[int, Bound(0)]
    device: Literal["auto", "cpu", "cuda"]
    hang_timeout_s: Annotated[float, Bound(0, open=True)] | None


@dataclass(frozen=True)
class Checkpoint:
    """When the state is saved and what is kept; configs/checkpoint/default.yaml explains each."""

    every: Positive | None
    keep_last: Positive
    keep_every: Positive | None
    keep_best: Annotated[int, Bound(0)]
    best_metric: str | None
    best_is: Literal["min", "max"]
    background: bool
    on_error: Literal["stop", "continue"]


@dataclass(frozen=True)
class Guard:
    """What follows from a number gone wrong; configs/guard/default.yaml explains each."""

    nonfinite: Literal["stop", "skip", "rollback"]
    spike: Literal["off", "stop", "skip", "rollback"]
    spike_factor: Annotated[float, Bound(0, open=True)]
    spike_window: Annotated[int, Bound(4)]
    max_events: Positive


@dataclass(frozen=True)
class Launcher:
    """Which processes a run gets."""

    kind: Literal["local", "inline", "slurm"]
    nodes: Positive
    num_processes: Positive | None
    threads_per_process: Positive | None


@dataclass(frozen=True)
class Inline(Launcher):
    """launcher=inline: this process."""


@dataclass(frozen=True)
class Local(Launcher):
    """launcher=local: this machine, one run at once or a sweep's runs as its devices become free."""

    max_parallel: Positive | None
    snapshot_max_mb: Positive
    snapshot_exclude: list[str]


@dataclass(frozen=True)
class Slurm(Launcher):
    """launcher=slurm: what sbatch is asked for; configs/launcher/slurm.yaml explains each."""

    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    gpus_per_node: Annotated[int, Bound(0)] | None
    cpus_per_process: Positive | None
    mem_gb: Annotated[float, Bound(0, open=True)] | None
    timeout_min: Positive
    signal_lead_s: Annotated[int, Bound(1, 65535)]
    max_parallel: Positive | None
    max_failures: Positive
    exclude: list[str]
    sbatch: dict[str, str | int | float | bool]
    setup: list[str]
    env: dict[str, str | int | float]
    snapshot_max_mb: Positive
    snapshot_exclude: list[str]


# what fairexp itself reads of the optimizer section; its other keys are the optimizer's arguments
OPTIMIZER: dict[str, Any] = {
    "groups": list[dict[str, Any]] | None,
    "layer_decay": Annotated[float, Bound(0, 1, open=True)] | None,
}
LAUNCHERS: dict[Any, type[Launcher]] = {"inline": Inline, "local": Local, "slurm": Slurm}


@dataclass(frozen=True)
class Scalars:
    """The run's own values, at the top level."""

    name: str
    seed: Annotated[int, Bound(0, 2**63 - 1)]
    runs_dir: str


Section = TypeVar("Section")
SECTIONS: dict[str, type] = {"trainer": Trainer, "checkpoint": Checkpoint, "guard": Guard, "launcher": Launcher}


def section_of(name: str, values: Mapping[str, Any]) -> type:
    """The section's class; a launcher's kind decides which settings it has."""
    if name == "launcher":
        kind = values.get("kind")
        return LAUNCHERS.get(kind if isinstance(kind, str) else None, Launcher)
    return SECTIONS[name]


def launcher_of(config: Mapping[str, Any]) -> Launcher:
    """The launcher section of a config that config.validate has passed."""
    return read(section_of("launcher", config["launcher"]), config["launcher"])


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
    if origin is list:
        return f"a list of {allowed(get_args(annotation)[0])}"
    if origin is dict:
        return "a section of key: value"
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
    if origin is list:
        return isinstance(value, list) and all(fits(item, get_args(annotation)[0]) for item in value)
    if origin is dict:
        values = get_args(annotation)[1]
        return isinstance(value, dict) and (values is Any or all(fits(item, values) for item in value.values()))
    if annotation is type(None):
        return value is None
    if annotation is bool:
        return isinstance(value, bool)
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, annotation)


_settings: dict[type, dict[str, Any]] = {}


def settings(section: type) -> dict[str, Any]:
    """Each field's name and annotation, in order."""
    if (
        section not in _settings
    ):  # get_type_hints takes 0.2 ms, and a sweep of a thousand runs asks eight thousand times
        hints = get_type_hints(section, include_extras=True)
        _settings[section] = {field.name: hints[field.name] for field in fields(section)}
    return _settings[section]


def num_ranks(launcher: Launcher, device: str, gpus: int) -> int:
    """The processes a node that a run gets: what is asked, else one a GPU, one on the CPU. `gpus`: this machine's."""
    if isinstance(launcher, Slurm):
        gpus = launcher.gpus_per_node or 0
    return launcher.num_processes or (max(gpus, 1) if device != "cpu" else 1)
