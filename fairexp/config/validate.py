"""Every problem of a composed config at once, each in one line: what, where, what is allowed, the nearest match.
Nothing is imported that the config names, and nothing is changed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from fairexp.config import hugging_face, schema, targets
from fairexp.config.compose import PRESETS, Composed
from fairexp.config.diagnose import find_file, place
from fairexp.config.groups import groups
from fairexp.config.nearest import nearest
from fairexp.config.schema import Section
from fairexp.config.trust import is_trusted, refusal
from fairexp.errors import UserError

# What the runtime adds to the arguments that stand in the config.
GIVEN_LATER: dict[str, tuple[str, ...]] = {
    "optimizer": ("params",),
    "loop": ("run",),
    "tracker": ("run_dir", "run_id", "name", "config", "resumed"),
}
TARGETS = ("model", "task", "optimizer", "schedule", "strategy", "tracker", "loop")  # sections that are one object
# with every *_size: at least one. Not every num_*: a model may have no register tokens, a reader no workers
COUNTS = ("depth", "width", "hidden", "num_heads", "num_layers", "num_blocks", "num_classes", "num_samples")
OURS = re.compile(r"(job[-_]name|array|output|error|wrap|parsable|requeue|no[-_]requeue|export.*|nodes|ntasks.*)")
SECRET = re.compile(r".*(KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL).*", re.IGNORECASE)
# a login before the host, or a query; a name alone isn't one: abfs://container@account.dfs.core.windows.net
CREDENTIALS = re.compile(r"https?://[^/]*@|\w+://[^/@]*:[^/]*@|\w+://.*\?")
RULES = "a list of {match: a parameter's name or glob, and an optimizer's argument such as lr: 1e-2}"
RATES = {
    **dict.fromkeys(("lr", "weight_decay", "momentum", "eps", "mixup_alpha", "cutmix_alpha"), schema.Bound(0)),
    **dict.fromkeys(("dropout", "label_smoothing", "prob"), schema.Bound(0, 1)),
}


def problems(composed: Composed, gpus: int, trusted: Collection[str], working_dir: Path) -> list[str]:
    """Why the config can't run; [] if it can. `gpus`: how many this machine shows."""
    return [
        *sections(composed),
        *numbers(composed, composed.config),
        *called(composed, trusted, working_dir),
        *param_groups(composed, working_dir),
        *lengths(composed),
        *batches(composed, gpus),
        *folders(composed),
        *credentials(composed),
        *weights(composed),
    ]


def sections(composed: Composed) -> Iterator[str]:
    """Unknown keys, missing keys, wrong types and values out of bounds in what fairexp itself reads."""
    config = composed.config
    scalars = schema.settings(schema.Scalars)
    choices = (*schema.SECTIONS, *TARGETS, "dataset")
    known = {*choices, *scalars}
    for key in config:
        if key in PRESETS:
            file = find_file(f"{key}/{composed.choices.get(key)}", composed.config_dirs)
            needs = "the file must begin with '# @package _global_' and hold 'key: value' lines"
            yield f"{key} ({place(file, 1) if file else composed.where(key)}): sets nothing of the run; {needs}"
        elif key not in known:
            yield f"{composed.at(key)}: no such section{nearest(key, known)}"
    for key in (key for key in choices if key not in config):
        yield f"{key}: missing{nearest('', groups(composed.config_dirs).get(key, []))}"
    yield from _section(composed, schema.Scalars, {key: config[key] for key in scalars if key in config}, "")
    for name in schema.SECTIONS:
        if isinstance(config.get(name), Mapping):
            yield from _section(composed, schema.section_of(name, config[name]), config[name], f"{name}.")
    for name in (name for name in choices if name in config and not isinstance(config[name], Mapping)):
        yield f"{composed.at(name)}: takes a section, got {schema.shown(config[name])}"
    objects: dict[str, Any] = {name: config[name] for name in TARGETS if name in config}
    if isinstance(config.get("dataset"), Mapping):
        for part in ("train", "eval", "augment", "mix", "on_device"):
            objects[f"dataset.{part}"] = value = config["dataset"].get(part)
            optional = part not in ("train", "eval")
            if not optional and part not in config["dataset"]:
                yield f"dataset.{part}: missing; takes a section with a _target_"
            elif not isinstance(value, Mapping) and (value is not None or not optional):
                yield f"{composed.at(f'dataset.{part}')}: takes a section with a _target_, got {schema.shown(value)}"
        if not isinstance(shuffle := config["dataset"].get("shuffle", True), bool):
            yield f"{composed.at('dataset.shuffle')}: takes true or false, got {schema.shown(shuffle)}"
    for key, value in objects.items():
        if isinstance(value, Mapping) and "_target_" not in value:
            yield f"{composed.at(key)}: has no _target_"
    yield from _slurm(composed)
    run_name = config.get("name")
    if isinstance(run_name, str) and (not run_name or run_name[0] == "." or set(run_name) & set("/\\\0\n")):
        yield f"{composed.at('name')}: {run_name!r} can't be part of a folder's name"


def _slurm(composed: Composed) -> Iterator[str]:
    """Options of sbatch that are not the user's to set, and secrets, which would stand in the run folder."""
    launcher = composed.config.get("launcher")
    if not isinstance(launcher, Mapping) or launcher.get("kind") != "slurm":
        return
    if ":" in str(Path(str(composed.config.get("runs_dir"))).absolute()):
        yield f"{composed.at('runs_dir')}: its path has a ':', and jobs import the code from there: PYTHONPATH can't hold that"
    for part, pattern, why in (
        ("sbatch", OURS, "is fairexp's own to set"),
        (
            "env",
            SECRET,
            "looks like a secret, which has no place in a config; export it in your shell: sbatch passes it on",
        ),
    ):
        given = launcher.get(part)
        for key in given if isinstance(given, Mapping) else ():
            if pattern.fullmatch(str(key)):
                yield f"{composed.at(f'launcher.{part}.{key}')}: {why}"


def _section(composed: Composed, section: type, values: Mapping[str, Any], prefix: str) -> Iterator[str]:
    settings = schema.settings(section)
    for key in values:
        if key not in settings:
            yield f"{composed.at(prefix + key)}: no such setting{nearest(key, settings)}"
    for key, annotation in settings.items():
        takes = f"takes {schema.allowed(annotation)}"
        if key not in values:
            yield f"{prefix}{key}: missing; {takes}"
        elif not schema.fits(values[key], annotation):
            yield f"{composed.at(prefix + key)}: {takes}, got {schema.shown(values[key])}"


def numbers(composed: Composed, node: Any, prefix: str = "") -> Iterator[str]:
    """NaN and infinities anywhere, and the sizes and rates that can't be negative."""
    for key, value in node.items() if isinstance(node, Mapping) else enumerate(node):
        dotted = f"{prefix}{key}"
        if isinstance(value, Mapping | list):
            yield from numbers(composed, value, f"{dotted}.")
        elif not isinstance(value, int | float) or isinstance(value, bool):
            continue
        elif not math.isfinite(value):
            yield f"{composed.at(dotted)}: takes a finite number, got {value}"
        elif dotted.partition(".")[0] not in schema.SECTIONS:
            name = str(key) if isinstance(node, Mapping) else prefix.rstrip(".").rpartition(".")[2]
            bound = schema.Bound(1) if name in COUNTS or name.endswith("_size") else RATES.get(name)
            if bound and not bound.holds(value):
                yield f"{composed.at(dotted)}: takes a number {bound}, got {value}"


def called(composed: Composed, trusted: Collection[str], working_dir: Path) -> Iterator[str]:
    """`_target_`s that don't exist, aren't trusted, or don't take the arguments that the config gives them."""
    for dotted, node in nodes(composed.config):
        for argument, problem in _call(dotted, node, trusted, working_dir):
            key = f"{dotted}.{argument}" if argument in node else f"{dotted}._target_"
            yield f"{composed.at(key)}: {problem}"


def _call(
    dotted: str, node: Mapping[str, Any], trusted: Collection[str], working_dir: Path
) -> Iterator[tuple[str, str]]:
    """The problems of one call, each with the argument that it stands at."""
    target = node["_target_"]
    if not isinstance(target, str):
        yield "_target_", f"{target!r} is not a dotted name"
        return
    try:
        signature = _signature(target, str(working_dir))
    except targets.TargetError as error:
        yield "_target_", str(error)
        return
    if not is_trusted(target, trusted):
        yield "_target_", refusal(target)
        return
    later = GIVEN_LATER.get(dotted, ())
    if dotted == "optimizer":
        node = {key: value for key, value in node.items() if key not in schema.OPTIMIZER}
    if node.get("_partial_"):
        later = (*later, *signature.parameters)  # the receiver gives the rest
    for problem in _unfit(signature, node, later):
        yield next((key for key in node if f"'{key}'" in problem), "_target_"), problem


def param_groups(composed: Composed, working_dir: Path) -> Iterator[str]:
    """What fairexp reads of the optimizer section: types, and the keys of a group, which are the optimizer's arguments."""
    node = composed.config.get("optimizer")
    if not isinstance(node, Mapping):
        return
    for key in (key for key in schema.OPTIMIZER if key in node):
        if not schema.fits(node[key], schema.OPTIMIZER[key]):
            takes = RULES if key == "groups" else schema.allowed(schema.OPTIMIZER[key])
            yield f"{composed.at(f'optimizer.{key}')}: takes {takes}, got {schema.shown(node[key])}"
    rules = node.get("groups")
    for number, group in enumerate(rules if schema.fits(rules, schema.OPTIMIZER["groups"]) and rules else []):
        where = composed.at(f"optimizer.groups.{number}")
        match = group.get("match")
        if not match or not schema.fits(match, str | list[str]):
            yield f"{where}: needs 'match', a parameter's name or glob such as head.*, or a list of them"
        elif len(group) == 1:
            yield f"{where}: changes nothing; add an argument of the optimizer, such as lr: 1e-2"
        try:
            signature = _signature(str(node.get("_target_")), str(working_dir))
        except targets.TargetError:
            return
        arguments = {key: value for key, value in group.items() if key != "match"}
        for problem in _unfit(signature, {**arguments, "_partial_": True}, ()):
            yield f"{where}: {problem}"


@cache
def _signature(target: str, working_dir: str) -> targets.Signature:
    """Read once for all jobs of a sweep."""
    return targets.find(target, [working_dir])


def _unfit(signature: targets.Signature, node: Mapping[str, Any], later: Collection[str]) -> list[str]:
    """What is wrong with the arguments."""
    found = targets.check_arguments(signature, node, later)
    if isinstance(node.get("lr"), str) and not any("'lr'" in problem for problem in found):
        # torch says `float | Tensor`, and what a Tensor may be made of is not read
        found.append(f"{signature.name}: 'lr' takes a number, got {node['lr']!r}")
    return found


def nodes(node: Any, prefix: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every mapping with a `_target_`, with its dotted key."""
    items = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        if isinstance(value, Mapping) and "_target_" in value:
            yield f"{prefix}{key}", value
        yield from nodes(value, f"{prefix}{key}.")


def lengths(composed: Composed) -> Iterator[str]:
    """A run without an end, a schedule that is longer than the run, and steps to trace that it doesn't have."""
    trainer = _readable(composed, "trainer", schema.Trainer)
    given = composed.config.get("trainer")
    if isinstance(given, Mapping) and all(given.get(key, 0) is None for key in ("max_steps", "max_epochs")):
        yield f"{composed.at('trainer.max_steps')}: null, and trainer.max_epochs too; give one of them"
    if (traced := trainer.profile_steps) is not None:
        where = composed.at("trainer.profile_steps")
        if len(traced) != 2 or traced[0] > traced[1]:
            yield f"{where}: takes [first, last], the steps to trace, such as [10, 12], got {traced}"
        elif trainer.max_steps and traced[0] > trainer.max_steps:
            yield f"{where}: {traced} begins after trainer.max_steps, which is {trainer.max_steps}"
    schedule = composed.config.get("schedule")
    if not isinstance(schedule, Mapping) or not str(schedule.get("_target_")).startswith("fairexp.optim.schedules."):
        return
    steps = 0
    for key in ("warmup", "decay"):
        value = schedule.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue  # the signature refuses it
        if value < 0 or (isinstance(value, float) and value >= 1):
            where = composed.at(f"schedule.{key}")
            yield f"{where}: takes steps (int >= 0) or a fraction of the run (float >= 0 and < 1), got {value}"
        elif trainer.max_steps:
            steps += round(value * trainer.max_steps) if isinstance(value, float) else value
            if steps > trainer.max_steps:
                where = composed.at(f"schedule.{key}")
                yield f"{where}: {value} makes {steps} steps, but trainer.max_steps is {trainer.max_steps}"


def batches(composed: Composed, gpus: int) -> Iterator[str]:
    """Batch sizes against processes, processes against strategy and devices."""
    trainer = _readable(composed, "trainer", schema.Trainer)
    given = composed.config.get("launcher")
    section = schema.section_of("launcher", given if isinstance(given, Mapping) else {})
    launcher: schema.Launcher = _readable(composed, "launcher", section)
    nodes = launcher.nodes or 1
    if nodes > 1 and launcher.kind != "slurm":
        yield f"{composed.at('launcher.nodes')}: {nodes}, but launcher={launcher.kind} has one node"
        return
    on_node = schema.num_ranks(launcher, trainer.device, gpus)
    processes = nodes * on_node
    if launcher.kind == "inline" and processes != 1:
        yield f"{composed.at('launcher.num_processes')}: {on_node}, but launcher=inline is this one process; use launcher=local"
    strategy = composed.config.get("strategy")
    strategy = strategy if isinstance(strategy, Mapping) else {}
    if strategy.get("_target_") == "fairexp.runtime.strategies.single.Single" and processes > 1:
        places = f"{on_node} on each of {nodes} nodes" if nodes > 1 else f"{on_node} processes"
        yield f"{composed.at('launcher.num_processes')}: {places} with strategy=single; add strategy=ddp or strategy=fsdp"
    yield from _devices(composed, launcher, trainer.device, gpus, on_node)
    readers, who = processes, f"{processes} processes"  # ranks, or groups of them that read the same samples
    tp_size = strategy.get("tp_size")
    if isinstance(tp_size, int):
        if tp_size < 1 or processes % tp_size:
            yield f"{composed.at('strategy.tp_size')}: {tp_size} does not divide {who}; takes {_divisors(processes)}"
            return
        yield from _heads(composed, tp_size)
        readers, who = processes // tp_size, f"{processes // tp_size} groups of {tp_size} processes"
    size = strategy.get("shard_size")
    if isinstance(size, int) and (size < 1 or readers % size):
        yield f"{composed.at('strategy.shard_size')}: {size} does not divide {who}; takes {_divisors(readers)}"
    batch, micro = trainer.global_batch_size, trainer.micro_batch_size
    if not batch:
        return
    if batch % readers:
        yield (
            f"{composed.at('trainer.global_batch_size')}: {batch} is not a multiple of {who}; "
            f"nearest: {_multiples(batch, readers)}"
        )
    elif micro and (batch // readers) % micro:
        yield (
            f"{composed.at('trainer.micro_batch_size')}: {micro} does not divide the {batch // readers} samples "
            f"a {'rank' if readers == processes else 'group'} of global_batch_size {batch}; nearest global_batch_size: "
            f"{_multiples(batch, readers * micro)}"
        )


def _heads(composed: Composed, tp_size: int) -> Iterator[str]:
    """Heads that tensor parallelism can't deal out; of models that have no such numbers it is known when they are built."""
    model = composed.config.get("model")
    for key in ("num_heads", "num_kv_heads"):
        heads = model.get(key) if isinstance(model, Mapping) else None
        if isinstance(heads, int) and heads > 0 and heads % tp_size:
            where = composed.at("strategy.tp_size")
            yield f"{where}: {tp_size} does not divide model.{key}={heads}; takes {_divisors(heads)}"


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


def _devices(composed: Composed, launcher: schema.Launcher, device: str, gpus: int, on_node: int) -> Iterator[str]:
    """More ranks than GPUs. `gpus`: what this machine shows; on Slurm what is asked of each node counts instead."""
    key = "launcher.num_processes"
    if isinstance(launcher, schema.Slurm):
        asked = launcher.gpus_per_node or 0
        if device == "cuda" and asked == 0:
            yield f"{composed.at('trainer.device')}: cuda, but launcher.gpus_per_node asks for no GPU"
        elif device != "cpu" and 0 < asked < on_node:
            yield f"{composed.at(key)}: {on_node}, but launcher.gpus_per_node is {asked}; or add trainer.device=cpu"
    elif device == "cuda" and gpus == 0:
        yield f"{composed.at('trainer.device')}: cuda, but this machine shows no GPU; use auto or cpu"
    elif device != "cpu" and 0 < gpus < on_node:
        shows = f"this machine shows {gpus} GPU{'s' if gpus > 1 else ''}"
        yield f"{composed.at(key)}: {on_node}, but {shows}; or add trainer.device=cpu"


def _readable(composed: Composed, name: str, section: type[Section]) -> Section:
    """The section, with None for each value that sections() refuses: the others are checked all the same."""
    values = composed.config.get(name)
    values = values if isinstance(values, Mapping) else {}
    given = ((key, values.get(key), kind) for key, kind in schema.settings(section).items())
    return schema.read(section, {key: value if schema.fits(value, kind) else None for key, value, kind in given})


def _multiples(value: int, step: int) -> str:
    below = value // step * step
    return f"{below} or {below + step}" if below else str(step)


def folders(composed: Composed) -> Iterator[str]:
    """A data folder, of one or several, that is missing or lacks what dataset.expects lists. What is behind a URL, the run
    itself looks up, if its data set reads URLs: of ours, that of Parquet files."""
    dataset = composed.config.get("dataset")
    if not isinstance(dataset, Mapping):
        return
    train = dataset.get("train")
    target = str(train.get("_target_")) if isinstance(train, Mapping) else ""
    local = target.startswith("fairexp.datasets.") and not target.startswith("fairexp.datasets.parquet.")
    patterns = [str(pattern) for pattern in dataset.get("expects") or []]
    roots = dataset.get("roots")
    keys = {"root": dataset.get("root")} | {
        f"roots.{number}": root for number, root in enumerate(roots if isinstance(roots, list) else [])
    }
    for key, root in keys.items():
        if isinstance(root, str) and (local or "://" not in root):
            yield from _folder(composed, f"dataset.{key}", Path(root).expanduser().absolute(), patterns)


def _folder(composed: Composed, key: str, root: Path, patterns: list[str]) -> Iterator[str]:
    absent = [pattern for pattern in patterns if next(root.glob(pattern), None) is None]
    layout = f"; expected there: {', '.join(patterns)}" if patterns else ""
    if root.is_dir() and not absent:
        return
    where = composed.at(key)
    if not root.is_dir():
        yield f"{where}: {root} is {'a file, not a folder' if root.exists() else 'no folder'}{layout}"
    elif absent == patterns:
        yield f"{where}: {root} holds nothing of the data{layout}"
    else:
        yield f"{where}: {root} lacks {', '.join(absent)}{layout}"


def credentials(composed: Composed) -> Iterator[str]:
    """A data folder's URL with a password or a token in it: the config stands in the run folder."""
    found: dict[str, str] = {}  # a URL and the first key that has it: the others refer to that one
    for key, value in _named(composed.config.get("dataset"), "dataset", "root"):
        if isinstance(value, str) and CREDENTIALS.search(value):
            found.setdefault(value, key)
    for key in found.values():
        yield (
            f"{composed.at(key)}: a URL with a password or a '?', which may hold a token, has no place in a config;"
            " docs/data.md says where else it can stand"
        )


def _named(node: Any, key: str, name: str) -> Iterator[tuple[str, Any]]:
    """The values of that name in a section and those below it, by their keys."""
    items = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    for part, value in items:
        if part == name:
            yield f"{key}.{part}", value
        yield from _named(value, f"{key}.{part}", name)


def weights(composed: Composed) -> Iterator[str]:
    """A folder of weights that is none, or of another model than the arguments make: that would compute something else."""
    model = composed.config.get("model")
    if not isinstance(model, Mapping) or model.get("_target_") != "fairexp.models.transformer.Transformer":
        return
    given = model.get("weights")
    if not isinstance(given, str):
        return
    where, folder = composed.at("model.weights"), Path(given).expanduser().absolute()
    files = [folder / name for name in ("model.safetensors", "model.safetensors.index.json")]
    if not any(file.is_file() for file in files):
        yield f"{where}: {folder} holds no model.safetensors, nor an index of several"
        return
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not a JSON object")
        found = hugging_face.differences(model, config)
    except OSError as error:
        yield f"{where}: {folder / 'config.json'}: {error.strerror}"
    except (ValueError, TypeError) as error:
        yield f"{where}: {folder / 'config.json'}: {error}"
    except UserError as error:
        yield f"{where}: {folder / 'config.json'}: {error}"
    else:
        for key, value in found.items():
            is_ = schema.shown(model.get(key))
            yield f"{composed.at(f'model.{key}')}: {is_}, but {folder / 'config.json'} says {schema.shown(value)}"
