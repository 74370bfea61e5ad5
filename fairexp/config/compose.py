"""From overrides and config folders to one resolved config of plain values. Hydra composes; this adds answers where it fails."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, MissingMandatoryValue, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException


from fairexp.config.searching import searching
from fairexp.config.groups import OUR_CONFIGS, groups
from fairexp.config.nearest import nearest
from fairexp.errors import UserError

PRESETS = ("experiment", "debug")  # in the defaults list as null, so both `experiment=x` and `+experiment=x` mean it


@dataclass(frozen=True)
class Composed:
    """A composed config and how it came about."""

    config: dict[str, Any]
    choices: Mapping[str, str | None]
    overrides: tuple[str, ...]
    config_dirs: tuple[Path, ...]
    config_name: str

    def where(self, key: str) -> str:
        """`FILE:LINE`, or `command line`, for a dotted key or the nearest key above or below it that stands somewhere."""
        if not hasattr(self, "_sources"):
            from fairexp.config import provenance

            found = provenance.sources(self.config_dirs, self.config_name, self.overrides)
            object.__setattr__(self, "_sources", found)
        sources: Mapping[str, str] = self._sources  # type: ignore[attr-defined]
        while key:
            if key in sources:
                return sources[key]
            below = [source for other, source in sources.items() if other.startswith(f"{key}.")]
            if below:
                return below[0]
            key = key.rpartition(".")[0]
        return ""


def compose(overrides: Sequence[str], config_dirs: Sequence[Path] = (), config_name: str = "train") -> Composed:
    """The resolved config. UserError with every problem: unknown keys and options, wrong grammar, `???` left open."""
    folders = (OUR_CONFIGS, *(folder.absolute() for folder in config_dirs))
    missing = [f"--config-dir {folder}: no such folder" for folder in folders if not folder.is_dir()]
    if missing:
        raise UserError(*missing)
    parsed = parse(overrides)
    overrides = tuple(str(override.input_line) for override in parsed)
    with searching(folders):
        try:
            tree = hydra_compose(config_name, list(overrides), return_hydra_config=True)
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(*diagnose(parsed, folders, config_name, error)) from error
        choices = dict(tree.hydra.runtime.choices)
        with open_dict(tree):
            del tree["hydra"]
    composed = Composed({}, choices, overrides, folders, config_name)
    problems = list(unresolved(tree, composed))
    if problems:
        raise UserError(*problems)
    config = OmegaConf.to_container(tree, resolve=True)
    assert isinstance(config, dict)
    if config.get("name") is None:
        config["name"] = choices.get("experiment") or f"{choices.get('model')}_{choices.get('dataset')}"
    return Composed({str(key): value for key, value in config.items()}, choices, overrides, folders, config_name)


def parse(overrides: Sequence[str]) -> list[Override]:
    """The overrides as Hydra's parser reads them, `+experiment=x` as `experiment=x`."""
    parser = OverridesParser.create()
    parsed, problems = [], []
    for text in overrides:
        if text.startswith("--"):
            problems.append(f"{text}: no such flag of this verb; see `fairexp --help`")
            continue
        plain = re.sub(rf"^\+({'|'.join(PRESETS)})=", r"\1=", text)
        try:
            override = parser.parse_override(plain)
        except HydraException as error:
            problems.append(f"{text}: {str(error).splitlines()[0]}; write key=value, quoted where it has a space or a comma")
            continue
        if override.is_sweep_override():
            problems.append(f"{text}: names several values, and train takes one; quote it if it is one value")
        parsed.append(override)
    if problems:
        raise UserError(*problems)
    return parsed


def diagnose(parsed: Sequence[Override], folders: Sequence[Path], config_name: str, error: Exception) -> Iterator[str]:
    """Every override that can't be, each in a line; Hydra stops at the first."""
    known = groups(folders)
    problems = []
    good: list[str] = []
    values: list[Override] = []
    for override in parsed:
        group, option = str(override.key_or_group), override.value()
        if group in known:
            # an option may name a file below its group, and null chooses none
            if option is None or option in known[group] or any((folder / group / f"{option}.yaml").is_file() for folder in folders):
                good.append(str(override.input_line))
            else:
                problems.append(f"{override.input_line}: no such option of {group}{nearest(str(option), known[group])}")
        else:
            values.append(override)
    try:
        tree = hydra_compose(config_name, good)
    except (HydraException, OmegaConfBaseException) as inner:
        yield from problems or [_first_line(inner)]
        return
    for override in values:
        key = str(override.key_or_group)
        if override.is_add() or override.is_force_add():
            continue
        parent: Any = tree
        walked: list[str] = []
        for part in key.split("."):
            if isinstance(parent, DictConfig) and part not in parent:
                options = [str(name) for name in parent] + ([*known] if not walked else [])
                where = ".".join(walked) or "the config"
                close = nearest(part, options)
                problems.append(f"{override.input_line}: {where} has no '{part}'{close}; +{override.input_line} adds it")
                break
            if not isinstance(parent, DictConfig | ListConfig):
                problems.append(f"{override.input_line}: {'.'.join(walked)} is a value and has no keys")
                break
            walked.append(part)
            parent = parent._get_node(part) if isinstance(parent, DictConfig) else None
            if parent is not None and not isinstance(parent, DictConfig | ListConfig):
                parent = parent._value()
    yield from problems or [_first_line(error)]


def unresolved(node: Any, composed: Composed, prefix: str = "") -> Iterator[str]:
    """Each value that is `???` or an interpolation that leads nowhere."""
    keys = node.keys() if isinstance(node, DictConfig) else range(len(node))
    for key in keys:
        dotted = f"{prefix}{key}"
        try:
            value = node[key]
        except MissingMandatoryValue:
            yield f"{dotted} ({composed.where(dotted)}): ??? must be given: add {dotted}=..."
            continue
        except OmegaConfBaseException as error:
            yield from _open_interpolation(node, key, dotted, composed, error)
            continue
        if isinstance(value, DictConfig | ListConfig):
            yield from unresolved(value, composed, f"{dotted}.")


def _open_interpolation(node: Any, key: Any, dotted: str, composed: Composed, error: Exception) -> Iterator[str]:
    text = node._get_node(key)._value()
    if "MissingMandatory" in type(error).__name__ or "Missing mandatory" in str(error) or "InterpolationToMissing" in type(error).__name__:
        return  # the ??? that it leads to has its own line
    yield f"{dotted} ({composed.where(dotted)}): {text} leads nowhere: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
