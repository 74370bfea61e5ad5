"""Images in MNIST's IDX format: MNIST itself, Fashion-MNIST, KMNIST, EMNIST and whatever follows them."""

import gzip
import math
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor


class IDX:
    """Grey images and labels from `root`, float32 [1, h, w], normalised by mean and std (of pixels in 0..1).

    Reads `{train,t10k}-images-idx3-ubyte` and `-labels-idx1-ubyte`, plain or `.gz`. Pixels stay bytes in memory and
    become float32 batch by batch. A damaged file is a ValueError.
    """

    def __init__(self, root: str | Path, split: Literal["train", "test"], mean: float, std: float) -> None:
        if split not in ("train", "test"):
            raise ValueError(f"split={split!r}: IDX has train and test")
        prefix = Path(root) / ("train" if split == "train" else "t10k")
        images, labels = find(f"{prefix}-images-idx3-ubyte"), find(f"{prefix}-labels-idx1-ubyte")
        self.images = read(images, num_dims=3).unsqueeze(1)
        self.labels = read(labels, num_dims=1).long()
        if len(self.images) != len(self.labels):
            raise ValueError(f"{images} has {len(self.images):,} images, but {labels} has {len(self.labels):,} labels")
        self.mean, self.std = mean, std

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.normalise(self.images[index]), self.labels[index]

    def __getitems__(self, indices: Tensor | list[int]) -> tuple[Tensor, Tensor]:
        indices = torch.as_tensor(indices)
        return self.normalise(self.images.index_select(0, indices)), self.labels.index_select(0, indices)

    def normalise(self, pixels: Tensor) -> Tensor:
        return pixels.float().div_(255).sub_(self.mean).div_(self.std)


def find(path: str) -> Path:
    for candidate in (Path(path), Path(f"{path}.gz")):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"neither {path} nor {path}.gz exists")


def read(path: Path, num_dims: int) -> Tensor:
    """The bytes of one IDX file as a uint8 tensor of the shape that its header states.

    The header is not believed: memory grows with the data found, and stops one byte after the stated size.
    """
    data, expected, broken = bytearray(), 4 + 4 * num_dims, ""
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
        try:
            header = file.read(expected)
            if header[:4] != bytes([0, 0, 8, num_dims]) or len(header) < expected:
                raise ValueError(f"{path}: not an IDX file of {num_dims}-dimensional bytes, starts with {header[:4]!r}")
            shape = np.frombuffer(header, ">u4")[1:].tolist()
            expected = math.prod(shape)
            while len(data) <= expected and (chunk := file.read1(min(expected + 1 - len(data), 1 << 20))):
                data += chunk
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            broken = f"; {error}"
    if broken or len(data) != expected:
        found = f"more than {expected:,}" if len(data) > expected else f"{len(data):,}"
        raise ValueError(f"{path}: damaged: expected {expected:,} bytes, found {found}{broken}")
    return torch.from_numpy(np.frombuffer(data, np.uint8).reshape(shape))
