"""A run's id: the same experiment has the same id, wherever and on however many processes it runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

# What doesn't change the experiment: where it runs, who watches, where its files lie, how often it speaks or saves.
# The strategy belongs to the experiment; the world size doesn't: the same run may resume on another.
NOT_IDENTITY = {
    "name",
    "runs_dir",
    "launcher",
    "tracker",
    "checkpoint",
    "trainer.num_workers",
    "trainer.log_every",
    "trainer.device",
}
NOT_IDENTITY_ANYWHERE = {"root", "expects"}  # a data folder's path and layout, in any section


def run_id(config: Mapping[str, Any]) -> str:
    """Eight hex digits of the SHA-256 of what makes the experiment."""
    return hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode()).hexdigest()[:8]


def identity(node: Any, prefix: str = "") -> Any:
    """The config without what doesn't belong to the experiment."""
    if isinstance(node, Mapping):
        return {
            key: identity(value, f"{prefix}{key}.")
            for key, value in node.items()
            if f"{prefix}{key}" not in NOT_IDENTITY and key not in NOT_IDENTITY_ANYWHERE
        }
    if isinstance(node, list):
        return [identity(value, f"{prefix}{index}.") for index, value in enumerate(node)]
    return node
