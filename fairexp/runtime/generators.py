"""The states of the random generators that a step may draw from: torch's, Python's, numpy's, the GPU's."""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


def random_state(device: torch.device) -> dict[str, Tensor]:
    """This rank's generators as tensors."""
    version, keys, next_gauss = random.getstate()
    _, array, position, has_gauss, gauss = np.random.get_state(legacy=True)  # type: ignore[misc]
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *keys, *_as_ints(next_gauss)], dtype=torch.int64),
        "numpy": torch.tensor([*np.asarray(array).tolist(), position, *_as_ints(gauss if has_gauss else None)]),
    }
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


@dataclass(frozen=True)
class RandomState:
    """A rank's generators, of which it is known that they can be taken."""

    torch: Tensor
    python: tuple[Any, ...]
    numpy: tuple[Any, ...]
    cuda: Tensor | None

    @staticmethod
    def of(state: dict[str, Tensor]) -> RandomState:
        """From what `random_state` gave. Any exception: it can't be that."""
        version, *keys, has, bits = state["python"].tolist()
        python = (version, tuple(keys), _as_float(bits) if has else None)
        *array, position, has, bits = state["numpy"].tolist()
        numpy = ("MT19937", np.array(array, dtype=np.uint32), position, has, _as_float(bits))
        if not 0 <= position <= len(array):  # numpy would read there
            raise ValueError(f"a generator at {position} of {len(array)}")
        torch.Generator().set_state(state["torch"])  # these refuse what they can't take
        random.Random().setstate(python)
        np.random.RandomState().set_state(numpy)
        return RandomState(state["torch"], python, numpy, state.get("cuda"))

    def apply(self) -> None:
        """Gives them to this process: dropout goes on where it was."""
        torch.set_rng_state(self.torch)
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        if self.cuda is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(self.cuda)


def _as_ints(number: Any) -> tuple[int, int]:
    """Whether there is a number, and its bits: generators of normal numbers make two and keep one."""
    return (0, 0) if number is None else (1, struct.unpack("<q", struct.pack("<d", number))[0])


def _as_float(bits: int) -> float:
    return struct.unpack("<d", struct.pack("<q", bits))[0]
