"""From a checkpoint of any strategy to Hugging Face's safetensors, a few GB of memory at a time."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fairexp.config import manifest
from fairexp.errors import RunError
from fairexp.runtime import shards
from fairexp.runtime.make import make
from fairexp.runtime.pretrained import INDEX

MOST_BYTES = 5_000_000_000  # of a file, as transformers cuts them


def write(
    model: Mapping[str, Any], config: Mapping[str, Any], checkpoint: Path, folder: Path, most_bytes: int = MOST_BYTES
) -> tuple[str, int]:
    """Writes model.safetensors, or several and their index, and config.json; whose weights they are, in words, and how many
    bytes. Where the run has kept an average of its weights, it's that which its evaluations were of, and which is written.

    RunError, Damaged: the checkpoint isn't whole, or another model's. OSError: the folder takes no more.
    """
    body = manifest.check_all(checkpoint)
    stored = shards.Stored(checkpoint, body["tensors"], body["files"])
    averaged = any(name.startswith("ema.") for name in body["tensors"])
    with torch.device("meta"):
        built = make({key: value for key, value in model.items() if key != "weights"})
    theirs: dict[str, list[tuple[int, str, bool]]] = defaultdict(list)
    for name, _ in built.named_parameters():
        published, transposed, third = built.published_names[name]
        theirs[published].append((third or 0, name, transposed))
    sizes = {name: sum(built.get_parameter(part).nbytes for _, part, _ in parts) for name, parts in theirs.items()}
    files: list[list[str]] = [[]]
    size = 0
    for name in theirs:
        if files[-1] and size + sizes[name] > most_bytes:
            files.append([])
            size = 0
        files[-1].append(name)
        size += sizes[name]
    where: dict[str, str] = {}
    for number, names in enumerate(files, 1):
        file = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        where |= dict.fromkeys(names, file)
        tensors = {name: _joined(stored, averaged, theirs[name]) for name in names}
        try:
            save_file(tensors, folder / file, {"format": "pt"})
        except SafetensorError as error:  # of a full disk too
            raise OSError(str(error)) from error
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    return "averaged weights" if averaged else "weights", sum(sizes.values())


def _joined(stored: shards.Stored, averaged: bool, parts: list[tuple[int, str, bool]]) -> Tensor:
    """The published tensor from those of ours that it holds."""
    tensors = []
    for _, name, transposed in sorted(parts):
        key = f"{'ema' if averaged else 'model'}.{name}"
        if key not in stored.tensors:
            raise RunError(f"{stored.folder} has no {key}: it is another model's")
        full = torch.empty(stored.shape(key), dtype=stored.dtype(key))
        stored.read(key, stored.parts(key, full))
        tensors.append(full.T if transposed else full)
    return (torch.cat(tensors, dim=-1) if len(tensors) > 1 else tensors[0]).contiguous()
