"""Which `_target_`s a config may name. YAML from elsewhere is data until the user trusts the package that it calls."""

from __future__ import annotations

import sys
from collections.abc import Collection

# Classes and pure functions of tensors. Not torch itself: torch.load and torch.hub.load run code out of a file.
ALWAYS = ("fairexp", "torch.nn", "torch.optim", "torch.utils.data")


def is_trusted(dotted: str, trusted: Collection[str]) -> bool:
    """Whether the dotted name lies in fairexp, in torch's shelves, or in a package that the user trusted."""
    return any(dotted == prefix or dotted.startswith(prefix + ".") for prefix in (*ALWAYS, *trusted))


def refusal(dotted: str) -> str:
    """Why the name isn't called, and what to do."""
    package = dotted.partition(".")[0]
    allowed = f"'{dotted}' is not called: configs may name {', '.join(ALWAYS)} and packages in the working folder"
    if package in (*sys.stdlib_module_names, "torch"):
        return allowed
    return f"{allowed}; if you trust everything in {package}, add --trust {package}"
