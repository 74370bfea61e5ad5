"""From overrides and config folders to one resolved config of plain values. Hydra composes; config.diagnose has the
answers where it fails."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, MissingMandatoryValue, OmegaConf, open_dict
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from fairexp.config import diagnose
from fairexp.config.groups import OUR_CONFIGS
from fairexp.config.nearest import nearest
from fairexp.config.searching import searching
from fairexp.errors import UserError

PRESETS = ("experiment", "debug")
OPTIONAL = (*PRESETS, "mix")  # in the defaults list as null, so both `experiment=x` and `+experiment=x` mean it


@dataclass(frozen=True)
class Composed:
    """A composed config and how it came about."""

    config: dict[str, Any]
    choices: Mapping[str, str | None]
    overrides: tuple[str, ...]
    config_dirs: tuple[Path, ...]
    config_name: str

    def where(self, key: str) -> str:
        """`FILE:LINE`, or `command line`, of a dotted key, or of the nearest key below or above it that has a place."""
        while key:
            if source := next((self.sources[at] for at in self.sources if f"{at}.".startswith(f"{key}.")), ""):
                file, colon, line = source.rpartition(":")
                return diagnose.place(file, int(line)) if colon else source
            key = key.rpartition(".")[0]
        return self.config_name

    def at(self, key: str) -> str:
        """A message's beginning: the key and where it stands."""
        return f"{key} ({self.where(key)})"

    @cached_property
    def sources(self) -> Mapping[str, str]:
        """The place of each value, by its dotted key; read when the first is asked for."""
        from fairexp.config import provenance

        return provenance.sources(self.config_dirs, self.config_name, self.overrides)


def compose(overrides: Sequence[str], config_dirs: Sequence[Path] = (), config_name: str = "train") -> Composed:
    """The resolved config. UserError with every problem: unknown keys and options, wrong grammar, `???` left open."""
    return compose_tree(parse(overrides), config_folders(config_dirs), config_name)[1]


def config_folders(config_dirs: Sequence[Path]) -> tuple[Path, ...]:
    """Our configs and the user's. UserError where one is missing."""
    folders = (OUR_CONFIGS, *(folder.absolute() for folder in config_dirs))
    if missing := [f"--config-dir {folder}: no such folder" for folder in folders if not folder.is_dir()]:
        raise UserError(*missing)
    return folders


def compose_tree(
    parsed: Sequence[Override], folders: tuple[Path, ...], config_name: str
) -> tuple[DictConfig, Composed]:
    """The composed config before and after its interpolations are resolved."""
    overrides = tuple(str(override.input_line) for override in parsed)
    with searching(folders), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* is not available")  # a folder of hydra.searchpath: an error below
        try:
            tree = hydra_compose(config_name, list(overrides), return_hydra_config=True)
        except diagnose.WRONG as error:
            raise UserError(*diagnose.diagnose(parsed, folders, config_name, error)) from error
        searched = [Path(path.removeprefix("file://")) for path in tree.hydra.searchpath if path.startswith("file://")]
        if missing := [f"hydra.searchpath: no such folder: {path}" for path in searched if not path.is_dir()]:
            raise UserError(*missing)
        choices = dict(tree.hydra.runtime.choices)
        with open_dict(tree):
            del tree["hydra"]
    return tree, resolved(tree, Composed({}, choices, overrides, folders, config_name))


def resolved(tree: DictConfig, composed: Composed) -> Composed:
    """The tree's plain values, with a name; `composed` says how the tree came about. UserError for each `???` left open."""
    problems = list(unresolved(tree, composed))
    if problems:
        raise UserError(*problems)
    config = OmegaConf.to_container(tree, resolve=True)
    assert isinstance(config, dict)
    if config.get("name") is None:
        config["name"] = default_name(composed.choices)
    return replace(composed, config={str(key): value for key, value in config.items()})


def default_name(choices: Mapping[str, str | None]) -> str:
    """The experiment's name, else the model's and the data set's."""
    name = choices.get("experiment") or f"{choices.get('model')}_{choices.get('dataset')}"
    return name.replace("/", "_")  # an option may lie in a folder of its group


def parse(overrides: Sequence[str]) -> list[Override]:
    """The overrides of one run as Hydra's parser reads them, `+experiment=x` as `experiment=x`."""
    parsed = parse_sweep(overrides, OverridesParser.create())
    if problems := [
        f"{override.input_line}: names several values; add -m for a run of each, or quote it if it is one value"
        for override in parsed
        if override.is_sweep_override()
    ]:
        raise UserError(*problems)
    return parsed


def parse_sweep(overrides: Sequence[str], parser: OverridesParser) -> list[Override]:
    """As `parse`; an override may name several values."""
    parsed, problems = [], []
    for text in overrides:
        try:
            override = parser.parse_override(re.sub(rf"^\+({'|'.join(OPTIONAL)})=", r"\1=", text))
            override.config_loader = parser.config_loader  # a glob asks it for the group's options
            if not override.key_or_group:
                raise HydraException("no key")
        except HydraException as error:
            problems.append(diagnose.grammar(text, error))
            continue
        parsed.append(override)
    if problems:
        raise UserError(*problems)
    return parsed


def unresolved(node: Any, composed: Composed, prefix: str = "") -> Iterator[str]:
    """Each value that is `???` or an interpolation that leads nowhere."""
    for key in node if isinstance(node, DictConfig) else range(len(node)):
        dotted = prefix + str(key)
        try:
            value = node[key]
        except MissingMandatoryValue:
            yield f"{composed.at(dotted)}: ??? must be given: add {dotted}=..."
        except InterpolationToMissingValueError:
            continue  # the ??? that it leads to has its own line
        except OmegaConfBaseException as error:
            text = diagnose.one_line(error)
            lost = re.search(r"key '(.+)' not found", text)
            close = nearest(lost[1], composed.sources) if lost else ""
            yield f"{composed.at(dotted)}: {node._get_node(key)._value()} leads nowhere: {text}{close}"
        else:
            if isinstance(value, DictConfig | ListConfig):
                yield from unresolved(value, composed, f"{dotted}.")
