"""Why Hydra can't read or compose the user's overrides and files, one line a problem. Hydra itself stops at the first
and says it in many lines; config.compose calls this then."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fairexp.config.groups import groups
from fairexp.config.nearest import nearest
from fairexp.config.schema import SECTIONS

# ValueError: Hydra's for `group=3`, and Python's for a file that is not UTF-8
WRONG = (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError)


def place(file: Path | str, line: int) -> str:
    """`FILE:LINE`, from the working folder where that is shorter."""
    path, short = str(file), os.path.relpath(file)
    return f"{short if len(short) < len(path) else path}:{line}"


def one_line(error: Exception) -> str:
    """An error of Hydra, OmegaConf or PyYAML in one line, with the place where it has one."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        mark, begin = error.problem_mark, error.context_mark
        since = f", in what begins on line {begin.line + 1}" if begin and begin.line != mark.line else ""
        return f"{place(mark.name, mark.line + 1)}: {error.problem}{since}"
    lines = [line.strip() for line in str(error).splitlines()]
    return next(filter(None, lines), type(error).__name__)


# --- one override that Hydra's parser refuses ---


def grammar(text: str, error: Exception) -> str:
    """Why the text is no override, and how it could be one."""
    sign, key, equals, value = re.fullmatch(r"([+~]*)([^=]*)(=?)(.*)", text, re.DOTALL).groups()  # type: ignore[union-attr]
    if not text.strip():
        return "'': an empty override; write key=value"
    if odd := next((letter for letter in key if not letter.isascii()), None):
        return f"{text}: {odd!r} is {unicodedata.name(odd, 'no ASCII letter')} (U+{ord(odd):04X}), not ASCII"
    if not key.strip():
        return f"{text}: has no key before the '='; write key=value"
    if not equals and re.fullmatch(r"[\w.@/]+", key):
        return f"{text}: has no value; write {sign}{key}=VALUE"
    for opening, closing in ("[]", "{}", "()"):
        if value.count(opening) != value.count(closing):
            return f"{text}: '{opening}' and '{closing}' don't match"
    for quote in "'\"":
        if value.count(quote) % 2:
            return f"{text}: a {quote} is not closed"
    return f"{text}: {one_line(error)}; quote what has more than letters, digits and _-+.:/ as \"{sign}{key}='...'\""


# --- overrides and files that don't fit together ---


def diagnose(parsed: Sequence[Override], folders: Sequence[Path], config_name: str, error: Exception) -> list[str]:
    """Every override and every entry of a defaults list that can't be; at least one line."""
    for override in parsed:
        if override.key_or_group == "hydra.searchpath" and isinstance(paths := override.value(), list):
            folders = [*folders, *(Path(str(path).removeprefix("file://")) for path in paths)]
    known = groups(folders)
    if not find_file(config_name, folders):
        names = {file.stem for folder in folders for file in folder.glob("*.yaml")}
        return [f"--config-name {config_name}: no such config{nearest(config_name, names)}"]
    problems = []
    good: dict[str, Override] = {}
    values: list[Override] = []
    for override in parsed:
        group, option = override.key_or_group.partition("@")[0], override.value()
        if group not in known:
            values.append(override)
        elif override.is_delete() or isinstance(option, list) or find_file(f"{group}/{option}", folders):
            good[group] = override
        else:
            problems.append(f"{override.input_line}: no such option of {group}{nearest(str(option), known[group])}")
    problems += _defaults_problems(config_name, good, folders, known)
    try:
        tree = hydra_compose(config_name, [str(override.input_line) for override in good.values()])
    except WRONG as inner:
        return problems or [one_line(inner)]
    for override in values:
        if override.is_add() and OmegaConf.select(tree, override.key_or_group) is not None:
            key, there = str(override.input_line), override.key_or_group
            problems.append(f"{key}: there is a {there} already; write {key.removeprefix('+')}")
        elif not override.is_add() and not override.is_force_add():
            problems += _missing_key(override, tree, known)
    return problems or [one_line(error)]


def _missing_key(override: Override, tree: DictConfig, known: dict[str, list[str]]) -> Iterator[str]:
    """The first part of the override's key that the config lacks."""
    node: Any = tree
    walked: list[str] = []
    for part in override.key_or_group.split("."):
        above = ".".join(walked)
        if isinstance(node, ListConfig) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        elif isinstance(node, DictConfig) and part in node.keys():  # noqa: SIM118  `in` leaves out what is still ???
            node = node._get_node(part)
            node = node if isinstance(node, DictConfig | ListConfig) else node._value()
        elif isinstance(node, DictConfig):
            options = {*map(str, node), *(known if not walked else ())}
            # what has a schema takes no more keys; a section that is a call may, if its signature does
            may_take = walked and walked[0] not in SECTIONS and not override.is_delete()
            add = f"; +{override.input_line} adds it" if may_take else ""
            yield f"{override.input_line}: {above or 'the config'} has no '{part}'{nearest(part, options)}{add}"
            return
        else:
            kind = f"a list of {len(node)}" if isinstance(node, ListConfig) else "a value"
            yield f"{override.input_line}: {above} is {kind} and has no '{part}'"
            return
        walked.append(part)


# --- defaults lists ---


@dataclass(frozen=True)
class Entry:
    """`- override /model: vit` of a defaults list, and where it stands; `- vit` has no group."""

    where: str
    above: str  # the group of the file that it stands in
    words: tuple[str, ...]  # override, optional
    group: str
    option: str

    @property
    def full_group(self) -> str:
        """The group as Hydra understands it: below the file's own, unless it begins with a slash."""
        return self.group[1:] if self.group.startswith("/") else f"{self.above}/{self.group}".strip("/")


def _defaults_problems(
    config_name: str, chosen: dict[str, Override], folders: Sequence[Path], known: dict[str, list[str]]
) -> Iterator[str]:
    """What can't be in the defaults lists of the files that make the config; the command line's choices win."""
    files = [config_name]
    for group, override in chosen.items():
        options = override.value()
        files += [f"{group}/{option}" for option in (options if isinstance(options, list) else [options])]
    entries: list[Entry] = []
    for name in files:  # grows
        file = find_file(name, folders)
        try:
            found = list(_entries(file, name.rpartition("/")[0])) if file else []
        except UnicodeDecodeError as error:
            newlines = error.object.count(b"\n", 0, error.start)
            yield f"{place(file or name, newlines + 1)}: is not UTF-8"
            continue
        except yaml.YAMLError as error:
            yield one_line(error)
            continue
        entries += [entry for entry in found if not entry.group or entry.full_group not in chosen]
        files += [path for entry in found if (path := f"{entry.full_group}/{entry.option}".strip("/")) not in files]
    taken = [entry.full_group for entry in entries if entry.group and "override" not in entry.words]
    for entry in entries:
        group, option = entry.full_group, entry.option
        if not option or option.startswith(("$", "???")) or "optional" in entry.words:
            continue
        if not find_file(f"{group}/{option}".strip("/"), folders):
            if group in known or not entry.group:
                yield f"{entry.where}: no such option of {group}: {option}{nearest(option, known.get(group, []))}"
            else:
                absolute = " ".join((*entry.words, f"/{entry.group}"))
                close = f"; write '{absolute}'" if entry.group in known else nearest(group, known)
                yield f"{entry.where}: no such group: {group}{close}"
        elif "override" in entry.words and group not in taken:
            yield f"{entry.where}: nothing chooses {group} that this could override; write '/{group}'"
        elif "override" not in entry.words and entry.group and entry.above and taken.count(group) > 1:
            yield f"{entry.where}: {group} is chosen already; write 'override /{group}'"


def _entries(file: Path, above: str) -> Iterator[Entry]:
    with open(file, encoding="utf-8") as stream:
        root = yaml.compose(stream, Loader=yaml.SafeLoader)
    top = {key.value: value for key, value in root.value} if isinstance(root, yaml.MappingNode) else {}
    for item in top["defaults"].value if isinstance(top.get("defaults"), yaml.SequenceNode) else []:
        where = place(file, item.start_mark.line + 1)
        if isinstance(item, yaml.ScalarNode) and item.value != "_self_":
            yield Entry(where, above, (), "", item.value)
        for key, value in item.value if isinstance(item, yaml.MappingNode) else []:
            *words, group = key.value.split() or [""]
            option = value.value if isinstance(value, yaml.ScalarNode) and not value.tag.endswith("null") else ""
            yield Entry(where, above, tuple(words), group.partition("@")[0], option)


def find_file(name: str, folders: Sequence[Path]) -> Path | None:
    """The file of a config's name: the first folder that has it wins, as in Hydra."""
    files = (folder / f"{name.removesuffix('.yaml')}.yaml" for folder in folders)
    return next((file for file in files if file.is_file()), None)
