"""From a config node with `_target_` to the object it names."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from fairexp.config.trust import is_trusted, refusal
from fairexp.errors import RunError

_trusted: tuple[str, ...] = ()


def trust(packages: Collection[str]) -> None:
    """Lets configs name these packages; the run folder says which its user trusted."""
    global _trusted
    _trusted = tuple(packages)


def make(node: Any, **runtime: Any) -> Any:
    """What the node describes: `_target_` called with the node's other keys and `runtime`, its inner nodes made first.

    `_partial_: true` leaves the call to the receiver. Hydra's `instantiate` does the same job; this is shorter than keeping
    it from calling what wasn't trusted, and the same for hydra-core 1.3 and 1.4.
    """
    if isinstance(node, list):
        return [make(part) for part in node]
    if not isinstance(node, Mapping):
        return node
    arguments = {key: make(value) for key, value in node.items() if key not in ("_target_", "_partial_", "_args_")}
    if "_target_" not in node:
        return arguments
    function = locate(node["_target_"])
    positional = make(node.get("_args_", []))
    if node.get("_partial_", False):
        return partial(function, *positional, **arguments, **runtime)
    return function(*positional, **arguments, **runtime)


def locate(dotted: str) -> Any:
    """The class or function of that dotted name. An ImportError inside the user's module is shown as itself."""
    parts = dotted.split(".")
    for length in range(len(parts) - 1, 0, -1):
        module_name = ".".join(parts[:length])
        try:
            found: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
                continue  # this prefix is not a module: a class, perhaps
            raise
        for name in parts[length:]:
            if not hasattr(found, name):
                raise RunError(f"{'.'.join(parts[:length])} has no '{name}' (_target_: {dotted})")
            found = getattr(found, name)
        # what a name leads to counts, not how it is spelled: torch.utils.data.dataloader.os.system is posix.system
        home = f"{getattr(found, '__module__', '')}.{getattr(found, '__qualname__', '')}"
        if not (is_trusted(dotted, _trusted) and is_trusted(home, _trusted)):
            raise RunError(refusal(dotted))
        return found
    raise RunError(f"no module for _target_: {dotted}")
