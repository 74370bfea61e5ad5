"""Weights that a model starts from: a folder of safetensors as Hugging Face has them, read without pickle."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fairexp.errors import RunError

INDEX = "model.safetensors.index.json"
# what old files hold besides weights; and a head that is the embedding's matrix, stored a second time
NO_WEIGHTS = re.compile(r"(.+\.)?(attn\.(masked_)?bias|rotary_emb\.inv_freq)|lm_head\.weight")
Names = Mapping[str, tuple[str, bool, int | None]]


class Pretrained:
    """The folder's tensors under the model's own names. Opened files are mapped: each rank reads only what it holds.

    RunError: a file is missing or no safetensors, or the tensors aren't the model's.
    """

    def __init__(self, folder: Path, model: nn.Module, wanted: Iterable[tuple[str, Tensor]]):
        self.folder = folder
        self.names: Names = getattr(model, "published_names", {})
        self.files: dict[str, Any] = {}
        try:
            self.files = self._open()
        except (OSError, SafetensorError, ValueError, AttributeError) as error:
            raise RunError(f"model.weights: {folder}: {error}") from error
        problems, used = [], set()
        for name, tensor in wanted:
            theirs, transposed, third = self._theirs(name)
            used.add(theirs)
            shape = list(tensor.shape) if third is None else [3 * tensor.shape[0], *tensor.shape[1:]]
            shape = shape[::-1] if transposed else shape
            if theirs not in self.files:
                problems.append(f"has no {theirs} for the model's {name}")
            elif (there := self.files[theirs].get_slice(theirs).get_shape()) != shape:
                problems.append(f"{theirs} is {there} there, and the model's {name} takes {shape}")
        left = sorted(name for name in self.files.keys() - used if not NO_WEIGHTS.fullmatch(name))
        problems += [f"has {name}, for which the model has no place" for name in left]
        if problems:
            more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise RunError(f"model.weights: {folder}: {'; '.join(problems[:3])}{more}")

    def _open(self) -> dict[str, Any]:
        index = self.folder / INDEX
        if not index.exists():
            file = safe_open(self.folder / "model.safetensors", framework="pt")
            return dict.fromkeys(file.keys(), file)
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if outside := [name for name in files.values() if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name)]:
            raise ValueError(f"{INDEX} names {outside[0]!r}, which is no file of this folder")
        opened = {name: safe_open(self.folder / name, framework="pt") for name in sorted(set(files.values()))}
        return {name: opened[file] for name, file in files.items()}

    def _theirs(self, name: str) -> tuple[str, bool, int | None]:
        theirs, transposed, third = self.names.get(name, (name, False, None))
        if theirs not in self.files:  # the model without a head has the same names, less the first word
            bare = theirs.partition(".")[2]
            theirs = bare if bare in self.files else theirs
        return theirs, transposed, third

    @torch.no_grad()
    def read(self, name: str, full: torch.Size, where: list[tuple[int, int]]) -> Tensor:
        """The box of the tensor: `where` has its begin and end in each dimension of `full`."""
        theirs, transposed, third = self._theirs(name)
        if third is not None:
            where = [(begin + third * full[0], end + third * full[0]) for begin, end in where[:1]] + where[1:]
        box = tuple(slice(begin, end) for begin, end in (where[::-1] if transposed else where))
        values = self.files[theirs].get_slice(theirs)[box]
        return values.T if transposed else values
