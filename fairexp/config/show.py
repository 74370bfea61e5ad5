"""The verb `config`: the resolved config, each value with the place that it comes from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fairexp.config.compose import Composed, compose
from fairexp.config.identity import run_id


def show(overrides: Sequence[str], config_dirs: Sequence[Path], config_name: str, as_json: bool) -> int:
    """Prints it."""
    composed = compose(overrides, config_dirs, config_name)
    if as_json:
        print(json.dumps(composed.config))
        return 0
    rows = list(lines(composed, composed.config))
    width = min(max(len(text) for text, _ in rows), 60)
    print("\n".join(f"{text:<{width}}  # {where}" if where else text for text, where in rows))
    config, identity = composed.config, run_id(composed.config)
    print(f"# id {identity}, run folder {config['runs_dir']}/{config['name']}-{identity}")
    return 0


def lines(composed: Composed, node: Mapping[str, Any], prefix: str = "", indent: str = "") -> Iterator[tuple[str, str]]:
    """The config as YAML lines, each leaf with its place."""
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield f"{indent}{key}:", ""
            yield from lines(composed, value, f"{prefix}{key}.", indent + "  ")
        else:
            text = yaml.safe_dump(value, default_flow_style=True, width=1000, allow_unicode=True)
            yield f"{indent}{key}: {text.strip().removesuffix('...').strip()}", composed.where(f"{prefix}{key}")
