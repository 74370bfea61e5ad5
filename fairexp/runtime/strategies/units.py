"""The parts of a model that are sharded, compiled and recomputed one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from fairexp.errors import RunError


def units(model: nn.Module, patterns: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """The units by name: each element of each outermost nn.ModuleList, or the modules whose names match the globs."""
    if patterns is not None:
        chosen = {
            name: module
            for name, module in model.named_modules()
            if name and any(fnmatchcase(name, pattern) for pattern in patterns)
        }
        if not chosen:
            raise RunError(f"strategy.units: no module matches {list(patterns)}; modules: {names_of(model)}")
        return chosen
    chosen = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{unit}.") for unit in chosen)
        if isinstance(module, nn.ModuleList) and not inside:
            chosen.update({f"{name}.{key}" if name else key: part for key, part in module.named_children()})
    # a list of lists: the inner lists' elements are the units, a ModuleList itself has no forward
    return {
        name: module
        for outer, part in chosen.items()
        for name, module in (
            {f"{outer}.{key}": inner for key, inner in units(part).items()}
            if isinstance(part, nn.ModuleList)
            else {outer: part}
        ).items()
    }


def names_of(model: nn.Module) -> str:
    """The first twenty names of modules."""
    names = [name for name, _ in model.named_modules() if name]
    return ", ".join(names[:20]) + (" ..." if len(names) > 20 else "")
