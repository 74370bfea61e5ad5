"""The config folders and what can be chosen in them. Imports nothing heavy: `--help` shows it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

_checkout = Path(__file__).parents[2] / "configs"
# in a checkout the configs lie at the top, in a wheel inside the package
OUR_CONFIGS = _checkout if (_checkout / "train.yaml").is_file() else Path(__file__).parents[1] / "configs"


def groups(folders: Sequence[Path] = (OUR_CONFIGS,)) -> dict[str, list[str]]:
    """The config groups and their options, over all config folders."""
    found: dict[str, set[str]] = {}
    for folder in folders:
        for file in folder.rglob("*.yaml"):
            group = file.parent.relative_to(folder).as_posix()
            if group != ".":
                found.setdefault(group, set()).add(file.stem)
    return {group: sorted(found[group]) for group in sorted(found)}
