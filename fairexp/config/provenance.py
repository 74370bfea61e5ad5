"""Where each value of a composed config comes from: a file and its line, or the command line.

Hydra says which files it merged, in which order and under which keys; PyYAML says on which line of a file a key stands.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.defaults_list import create_defaults_list
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.plugins.config_source import ConfigSource

from fairexp.config.searching import searching

COMMAND_LINE = "command line"
_MERGE = "tag:yaml.org,2002:merge"
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # sixteen times as fast, where PyYAML was built with it


def sources(config_dirs: Sequence[Path], config_name: str, overrides: Sequence[str]) -> dict[str, str]:
    """`FILE:LINE` or `command line` for each dotted key that holds a value; a list counts as one value."""
    with searching(config_dirs):
        loader = GlobalHydra.instance().config_loader()
        assert isinstance(loader, ConfigLoaderImpl)
        # The first half of what Hydra's compose does, with the search path that hydra.searchpath may have added to.
        parsed, repository = loader._parse_overrides_and_create_caching_repo(config_name, list(overrides))
        merged = create_defaults_list(repository, config_name, parsed, prepend_hydra=True, skip_missing=False)
        folders = repository.get_sources()

    found: dict[str, str] = {}
    for default in merged.defaults:
        file = _file(default.config_path or "", folders)
        if file is not None:
            prefix = f"{default.package}." if default.package else ""
            for key, line, value in _keys(file):
                is_section = isinstance(value, yaml.MappingNode)
                if key != "defaults" and not (is_section and value.value):
                    _put(found, prefix + key, f"{file}:{line}", yields=is_section or value.value == "???")
    for override in merged.config_overrides:
        _apply(found, override)
    return {key: where for key, where in found.items() if key.partition(".")[0] != "hydra"}


def line_of(path: Path | str, dotted_key: str) -> int | None:
    """The line on which a value or a section stands in one YAML file; the key is the file's own, without a package."""
    return next((line for key, line, _ in reversed([*_keys(Path(path))]) if key == dotted_key), None)


def _file(config_path: str, folders: Sequence[ConfigSource]) -> Path | None:
    """The file that Hydra read: the first folder that has it wins. None for Hydra's own configs and for dataclasses."""
    name = config_path if config_path.endswith(".yaml") else f"{config_path}.yaml"
    first = next((folder for folder in folders if folder.is_config(config_path)), None)
    return Path(first.path) / name if first is not None and first.scheme() == "file" else None


def _keys(file: Path) -> Iterator[tuple[str, int, yaml.Node]]:
    """Every dotted key of a YAML file, sections before what they hold, with its line and its value."""
    return _keys_below(yaml.compose(file.read_text(encoding="utf-8"), Loader=_Loader), "")


def _keys_below(node: yaml.Node | None, prefix: str) -> Iterator[tuple[str, int, yaml.Node]]:
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    for key, value in sorted(pairs, key=lambda pair: pair[0].tag != _MERGE):  # what is written out wins over `<<`
        if key.tag == _MERGE:
            for anchored in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                yield from _keys_below(anchored, prefix)
        else:
            yield prefix + key.value, key.start_mark.line + 1, value
            yield from _keys_below(value, f"{prefix}{key.value}.")


def _put(found: dict[str, str], key: str, where: str, yields: bool = False) -> None:
    """A value replaces the section that stood there, a section the value. `yields`: `{}` and `???` replace nothing."""
    if yields and any(f"{other}.".startswith(f"{key}.") for other in found):
        return
    _remove(found, key)
    pieces = key.split(".")
    for depth in range(1, len(pieces)):
        found.pop(".".join(pieces[:depth]), None)
    found[key] = where


def _remove(found: dict[str, str], key: str) -> None:
    for other in [other for other in found if f"{other}.".startswith(f"{key}.")]:
        del found[other]


def _apply(found: dict[str, str], override: Override) -> None:
    key = re.sub(r"\[(\w+)\]", r".\1", override.key_or_group)  # Hydra 1.4 also reads a[b]
    parent, _, last = key.rpartition(".")
    if override.is_delete():
        _remove(found, key)
    elif last.isdigit() and parent in found:  # one item of a list
        found[parent] = COMMAND_LINE
    else:
        for leaf in _leaves(key, override.value()):
            _put(found, leaf, COMMAND_LINE)


def _leaves(key: str, value: object) -> Iterator[str]:
    if isinstance(value, Mapping) and value:
        for inner, item in value.items():
            yield from _leaves(f"{key}.{inner}", item)
    else:
        yield key
