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
    "trainer.bad_samples",  # a run that meets none is the same; one that does goes on, and has written down which
    "trainer.log_every",
    "trainer.profile_steps",
    "trainer.device",
    "trainer.activation_checkpointing",  # the same bits for less memory
    "guard.max_events",
    "trainer.hang_timeout_s",
}
CHANGING = ("skip", "rollback")  # the policies of the guard that change a run's numbers
# a data folder's path, layout and caches, in any section
NOT_IDENTITY_ANYWHERE = {"root", "expects", "cache_mb", "node_cache_gb"}


def run_id(config: Mapping[str, Any]) -> str:
    """Eight hex digits of the SHA-256 of what makes the experiment."""
    return hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode()).hexdigest()[:8]


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without what doesn't belong to the experiment."""
    return _without(NOT_IDENTITY | idle(config.get("guard")), config, "")


def idle(guard: Any) -> set[str]:
    """The guard's settings that change no number: a policy that stops the run leaves what it has computed as it is."""
    changes = {key for key in ("nonfinite", "spike") if isinstance(guard, Mapping) and guard.get(key) in CHANGING}
    unused = {"guard.nonfinite"} if "nonfinite" not in changes else set()
    unused |= {"guard.spike", "guard.spike_factor", "guard.spike_window"} if "spike" not in changes else set()
    return unused if changes else {"guard"}


def _without(less: set[str], node: Any, prefix: str) -> Any:
    if isinstance(node, Mapping):
        return {
            key: _without(less, value, f"{prefix}{key}.")
            for key, value in node.items()
            if f"{prefix}{key}" not in less and key not in NOT_IDENTITY_ANYWHERE
        }
    if isinstance(node, list):
        return [_without(less, value, f"{prefix}{index}.") for index, value in enumerate(node)]
    return node
