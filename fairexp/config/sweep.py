"""From a command line that names several values, or a sweep's file, to the single runs, each composed and in order.

Hydra composes each choice of groups once (50 ms); the runs that differ only in values are copies of that with these
values in their place (0.2 ms), which is the same wherever no interpolation reads them, and else resolved anew.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, QuotedString, Transformer
from omegaconf import DictConfig, OmegaConf

from fairexp.config import schema
from fairexp.config.compose import Composed, compose_tree, config_folders, default_name, parse_sweep, resolved
from fairexp.config.diagnose import find_file, one_line, place
from fairexp.config.groups import groups
from fairexp.config.identity import NOT_IDENTITY
from fairexp.config.nearest import nearest
from fairexp.config.searching import searching
from fairexp.errors import UserError


@dataclass(frozen=True)
class Settings:
    """A sweep's own settings: the keys of configs/sweep/NAME.yaml, and `sweep.KEY=value` on the command line."""

    name: str | None = None
    overrides: list[str] | None = None  # of every run
    grid: dict[str, Any] | None = None  # key: its values, as on the command line or as a list
    runs: list[list[str]] | None = None  # each a run's own overrides, beside the grid
    sampler: Literal["grid", "tpe", "random"] = "grid"
    num_trials: schema.Positive | None = None
    metric: str = "eval/loss"
    direction: Literal["minimize", "maximize"] = "minimize"
    sampler_seed: int = 0


@dataclass(frozen=True)
class Point:
    """One run of a sweep: the values that are its own, the overrides that make it, its config."""

    label: str
    overrides: tuple[str, ...]
    composed: Composed


@dataclass(frozen=True)
class Sweep:
    """The runs of a sweep, or, when an optimizer chooses them, `search` and its corners, for validation."""

    name: str
    swept: tuple[str, ...]
    settings: Settings
    points: list[Point]
    failures: dict[
        str, list[str]
    ]  # what is wrong with the others: each problem, and the labels of the runs that have it
    search: Search | None = None


@dataclass(frozen=True)
class Search:
    """A search space: choices and intervals by key, and for each choice of groups the config whose values are replaced."""

    space: dict[str, dict[str, Any]]
    group_keys: list[str]
    bases: dict[str, dict[str, Any]]  # by the JSON of the chosen groups; {"config": unresolved, "choices": ...}


@dataclass(frozen=True)
class _Value:
    """One value of a swept override: as text, and as Hydra would assign it."""

    key: str
    text: str  # KEY=VALUE
    value: Any

    @property
    def label(self) -> str:
        return self.text.lstrip("+")


def expand(overrides: Sequence[str], config_dirs: Sequence[Path], config_name: str) -> Sweep:
    """Every run that the command line and the sweep's file name, and what is wrong with those that can't be composed.
    UserError where the sweep itself is wrong."""
    folders = config_folders(config_dirs)
    overrides, settings = _settings(overrides, folders)
    texts = [*(settings.overrides or []), *overrides, *_grid_overrides(settings.grid or {})]
    lists = settings.runs or [[]]
    with searching(folders):
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        parsed = parse_sweep(texts, parser)
        own = [parse_sweep(words, parser) for words in lists]
        known_groups = groups(folders)
        fixed = [override for override in parsed if not override.is_sweep_override()]
        swept = [override for override in parsed if override.is_sweep_override()]
        if problems := [
            f"{override.input_line}: names several values inside sweep.runs; write it into the grid"
            for override in itertools.chain.from_iterable(own)
            if override.is_sweep_override()
        ]:
            raise UserError(*problems)
        if not swept and settings.runs is None:
            raise UserError("-m: no override names several values, such as optimizer.lr=1e-3,3e-4")
        if settings.sampler == "grid" and (
            endless := [str(override.input_line) for override in swept if not override.is_discrete_sweep()]
        ):
            raise UserError(*(f"{text}: an interval needs sweep.sampler=tpe or random" for text in endless))
        composer = _Composer(folders, config_name, known_groups)
        values = {override.get_key_element(): _values(override) for override in swept}
        name = settings.name or _name(fixed, list(values), config_name)
        if settings.sampler != "grid":
            return _search(name, settings, fixed, swept, own, values, composer)
        points: list[Point] = []
        failures: dict[str, list[str]] = {}
        for words in own:
            for chosen in itertools.product(*values.values()):
                label = " ".join([*(str(word.input_line) for word in words), *(value.label for value in chosen)])
                try:
                    composed = composer.compose([*fixed, *words], chosen)
                except UserError as error:
                    for problem in error.problems:
                        failures.setdefault(problem, []).append(label)
                else:
                    points.append(Point(label, composed.overrides, composed))
    return Sweep(name, tuple(values), settings, points, failures)


def blame(failures: Mapping[str, Sequence[str]], total: int) -> list[str]:
    """One line a problem, with the runs that have it."""
    lines = []
    for problem, labels in failures.items():
        if len(labels) == total:
            which = f"all {total} runs" if total > 1 else "the run"
        else:
            which = "; ".join(labels[:3]) + (f"; and {len(labels) - 3} more" if len(labels) > 3 else "")
        lines.append(f"{problem}  [{which}]")
    return lines


def _settings(overrides: Sequence[str], folders: Sequence[Path]) -> tuple[list[str], Settings]:
    """The sweep's settings and the other overrides: `sweep=NAME` names a file, `sweep.KEY=value` sets one of its keys."""
    rest: list[str] = []
    given: dict[str, Any] = {}
    places: dict[str, str] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if key == "sweep" and equals:
            file = find_file(f"sweep/{value}", folders)
            if file is None:
                raise UserError(f"{text}: no such sweep{nearest(value, groups(folders).get('sweep', []))}")
            try:
                content = yaml.safe_load(file.read_text(encoding="utf-8"))
            except (yaml.YAMLError, UnicodeDecodeError) as error:
                raise UserError(one_line(error)) from error
            if not isinstance(content, dict):
                raise UserError(f"{place(file, 1)}: a sweep's file holds keys: {', '.join(schema.settings(Settings))}")
            given = {"name": value.replace("/", "_"), **content} | given
            places = dict.fromkeys(content, place(file, 1))
        elif key.startswith("sweep."):
            try:
                given[key.removeprefix("sweep.")] = yaml.safe_load(value)
            except yaml.YAMLError as error:
                raise UserError(f"{text}: {one_line(error)}") from error
            places[key.removeprefix("sweep.")] = "command line"
        else:
            rest.append(text)
    known = schema.settings(Settings)
    problems = []
    for key, value in given.items():
        at = f"sweep.{key} ({places.get(key, 'command line')})"
        if key not in known:
            problems.append(f"{at}: no such setting{nearest(key, known)}")
        elif not schema.fits(value, known[key]):
            problems.append(f"{at}: takes {schema.allowed(known[key])}, got {schema.shown(value)}")
    name = given.get("name")
    if isinstance(name, str) and (not name or name[0] == "." or set(name) & set("/\\\0\n")):
        problems.append(f"sweep.name: {name!r} can't be a folder's name")
    if given.get("sampler", "grid") != "grid" and not given.get("num_trials"):
        problems.append(f"sweep.sampler={given['sampler']}: needs sweep.num_trials, the number of runs")
    if problems:
        raise UserError(*problems)
    return rest, Settings(**given)


def _grid_overrides(grid: Mapping[str, Any]) -> list[str]:
    """`lr: [1e-3, 3e-4]` and `lr: 1e-3,3e-4` as `lr=1e-3,3e-4`; a single value is a sweep of one."""
    texts = []
    for key, values in grid.items():
        if isinstance(values, list):
            written = ",".join(_written(value) for value in values)
            texts.append(f"{key}={written}" if len(values) > 1 else f"{key}=choice({written})")
        else:
            texts.append(f"{key}={_written(values)}")
    return texts


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _values(override: Override) -> list[_Value]:
    """The values of a swept override, in Hydra's order; an interval's are its ends."""
    key = override.get_key_element()
    if not override.is_discrete_sweep():
        interval = override.value()
        assert isinstance(interval, IntervalSweep)
        assert interval.start is not None
        assert interval.end is not None
        number = int if _is_whole(override) else float
        return [_Value(key, f"{key}={number(end)}", number(end)) for end in (interval.start, interval.end)]
    texts = override.sweep_string_iterator()
    raw = override.sweep_iterator(transformer=Transformer.identity)
    return [_Value(key, f"{key}={text}", _plain(value)) for text, value in zip(texts, raw, strict=True)]


def _plain(value: Any) -> Any:
    """The parser's value as the config's: quotes fall."""
    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    return value


def _name(fixed: Sequence[Override], keys: Sequence[str], config_name: str) -> str:
    """The same fixed overrides and swept keys are the same sweep, whichever values are asked for today."""
    belongs = sorted(
        str(override.input_line)
        for override in fixed
        if override.key_or_group.partition(".")[0] not in NOT_IDENTITY and override.key_or_group not in NOT_IDENTITY
    )
    text = json.dumps([belongs, sorted(keys), config_name])
    short = "-".join(key.rpartition(".")[2].partition("@")[0].lstrip("+") for key in keys)[:40] or "runs"
    return f"{short.replace('/', '_')}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


class _Composer:
    """Composes each choice of groups once and replaces values."""

    def __init__(self, folders: tuple[Path, ...], config_name: str, known_groups: Mapping[str, Any]):
        self.folders = folders
        self.config_name = config_name
        self.known_groups = known_groups
        self.bases: dict[tuple[str, ...], _Base] = {}
        self.broken: dict[tuple[str, ...], list[UserError]] = {}
        self.parser = OverridesParser.create()

    def is_group(self, key: str) -> bool:
        return key.lstrip("+").partition("@")[0] in self.known_groups

    def compose(self, fixed: Sequence[Override], chosen: Sequence[_Value]) -> Composed:
        """The config of these overrides; UserError as compose.compose."""
        values = [value for value in chosen if not self.is_group(value.key)]
        choice = tuple(value.text for value in chosen if self.is_group(value.key))
        own = tuple(str(override.input_line) for override in fixed)
        keys = [override.key_or_group for override in fixed] + [value.key.lstrip("+~") for value in values]
        simple = len(keys) == len(set(keys)) and all(
            re.fullmatch(r"\+{0,2}[\w.]+", value.key)
            and not value.key.lstrip("+").startswith("hydra.")
            and not isinstance(value.value, dict)
            and not (isinstance(value.value, str) and "${" in value.value)
            for value in values
        )
        words = (*own, *(value.text for value in chosen))
        if not simple:
            return compose_tree(parse_sweep(words, self.parser), self.folders, self.config_name)[1]
        key = (*own, "", *choice)
        if key not in self.bases:
            errors = self.broken.setdefault(key, [])
            if len(errors) > 1 and errors[0].problems == errors[1].problems:
                raise errors[0]  # two values have it, so it isn't the value's: the others needn't be composed
            try:
                parsed = parse_sweep(words, self.parser)
                self.bases[key] = _Base(*compose_tree(parsed, self.folders, self.config_name))
            except UserError as error:
                errors.append(error)
                raise
        return self.bases[key].with_values({value.key.lstrip("+"): value.value for value in values}, words)


class _Base:
    """A composed config of which values are replaced."""

    def __init__(self, tree: DictConfig, composed: Composed):
        self.tree = tree
        self.composed = composed
        self.read = _interpolated(OmegaConf.to_container(tree, resolve=False))

    def with_values(self, values: Mapping[str, Any], overrides: tuple[str, ...]) -> Composed:
        composed = replace(self.composed, overrides=overrides)
        composed.__dict__.pop("sources", None)
        if any(self._is_read(key) for key in values):
            tree = copy.deepcopy(self.tree)
            for key, value in values.items():
                OmegaConf.update(tree, key, value, merge=True)
            return resolved(tree, composed)
        config = _copied(self.composed.config)
        for key, value in values.items():
            if value == "???":
                raise UserError(f"{key} (command line): ??? must be given: add {key}=...")
            _assign(config, key, value)
        if config.get("name") is None:
            config["name"] = default_name(self.composed.choices)
        return replace(composed, config=config)

    def _is_read(self, key: str) -> bool:
        """Whether an interpolation may lead to the key, above or below it."""
        return any(
            name == "*" or f"{name}.".startswith(f"{key}.") or f"{key}.".startswith(f"{name}.") for name in self.read
        )


def _copied(node: Any) -> Any:
    """A deep copy of plain values, in a tenth of copy.deepcopy's time."""
    if isinstance(node, dict):
        return {key: _copied(value) for key, value in node.items()}
    return [_copied(value) for value in node] if isinstance(node, list) else node


def _assign(config: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    node: Any = config
    for parent in parents:
        node = node[int(parent)] if isinstance(node, list) else node[parent]
    if isinstance(node, list):
        node[int(last)] = value
    else:
        node[last] = value


def _interpolated(node: Any) -> set[str]:
    """The keys that interpolations read; "*" for what can't be told: a relative one, or one inside another."""
    found: set[str] = set()
    for value in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        if isinstance(value, dict | list):
            found |= _interpolated(value)
        elif isinstance(value, str) and "${" in value:
            inner = re.findall(r"\$\{([^{}]*)\}", value)
            plain = value.count("${") == len(inner) and all(re.fullmatch(r"\w[\w.]*", name) for name in inner)
            found |= set(inner) if plain else {"*"}
    return found


# --- a search space ---


def _search(
    name: str,
    settings: Settings,
    fixed: Sequence[Override],
    swept: Sequence[Override],
    own: Sequence[Sequence[Override]],
    values: Mapping[str, list[_Value]],
    composer: _Composer,
) -> Sweep:
    """The space, its configs, and as points its corners: the first and last value of each key under each choice of groups."""
    if settings.runs is not None:
        raise UserError(
            f"sweep.runs: a list of runs has nothing to search; sweep.sampler={settings.sampler} takes a grid"
        )
    space: dict[str, dict[str, Any]] = {}
    for override in swept:
        key = override.get_key_element()
        sweep = override.value()
        if isinstance(sweep, IntervalSweep):
            assert sweep.start is not None
            assert sweep.end is not None
            whole = _is_whole(override)
            kind = "int" if whole else "float"
            low, high = (int(sweep.start), int(sweep.end)) if whole else (sweep.start, sweep.end)
            log = "log" in sweep.tags
            if low > high or (log and low <= 0):
                raise UserError(
                    f"{override.input_line}: takes low,high with low < high, and low > 0 under tag(log, ...)"
                )
            space[key] = {"kind": kind, "low": low, "high": high, "log": log}
        else:
            space[key] = {
                "kind": "choice",
                "texts": [value.text for value in values[key]],
                "values": [value.value for value in values[key]],
            }
    group_keys = [key for key in values if composer.is_group(key)]
    chosen_groups: Iterator[tuple[_Value, ...]] = itertools.product(*(values[key] for key in group_keys))
    points: list[Point] = []
    bases: dict[str, dict[str, Any]] = {}
    failures: dict[str, list[str]] = {}
    for choice in chosen_groups:
        first = [values[key][0] for key in values if key not in group_keys]
        corners = [[*choice, *first]]
        for index, value in enumerate(first):
            for other in values[value.key][1:]:
                corners.append([*choice, *first[:index], other, *first[index + 1 :]])
        for corner in corners:
            label = " ".join(value.label for value in corner)
            try:
                composed = composer.compose(fixed, corner)
                points.append(Point(label, composed.overrides, composed))
            except UserError as error:
                for problem in error.problems:
                    failures.setdefault(problem, []).append(label)
        base = composer.bases.get((*(str(word.input_line) for word in fixed), "", *(value.text for value in choice)))
        if base is not None:
            bases[json.dumps([value.text for value in choice])] = {
                "config": OmegaConf.to_container(base.tree, resolve=False),
                "choices": dict(base.composed.choices),
                "overrides": [*(str(word.input_line) for word in fixed), *(value.text for value in choice)],
                "name": base.composed.config["name"],
            }
        elif not failures:
            raise UserError(f"sweep.sampler={settings.sampler}: takes plain keys, and no key twice")
    return Sweep(name, tuple(values), settings, points, failures, Search(space, group_keys, bases))


def _is_whole(override: Override) -> bool:
    """Whether an interval's ends are written as integers; the parser makes floats of them."""
    inside = re.search(r"interval\(([^)]*)\)", str(override.input_line))
    return bool(inside and not re.search(r"[.eE]", inside[1]))
