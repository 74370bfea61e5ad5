"""JPEG, PNG and other image files in ImageNet's layout, read with Pillow (the extra `images`).

`image` decodes and augments for every data set of images, whatever holds their bytes.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from torch import Tensor

# Pillow's readers that run no other program on the file: EPS, which it would recognise under any name, starts Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of RGB in 0..1

Box = tuple[float, float, float, float]  # left, top, right, bottom


class ImageFolder:
    """Images `root/<split>/<class>/<file>`, uint8 [3, image_size, image_size]; train's classes by name are 0, 1, ...
    `Normalize` makes floats of a batch.

    With `augment`: a random part of the image, mirrored half of the time, drawn from torch's global generator, which
    the loader seeds for each sample. Without: the central 7/8 of the short side. A file that can't be read is a
    ValueError.
    """

    def __init__(
        self, root: str | Path, split: Literal["train", "val"], image_size: int, num_classes: int, augment: bool
    ) -> None:
        need_pillow()
        if split not in ("train", "val"):
            raise ValueError(f"split={split!r}: ImageFolder has train and val")
        classes = class_names(Path(root, "train"))
        if len(classes) != num_classes:
            raise ValueError(f"num_classes={num_classes}, but {root}/train has {len(classes)} classes")
        names = class_names(Path(root, split))
        if unknown := sorted(set(names) - set(classes)):
            raise ValueError(f"{root}/{split} has classes that {root}/train lacks: {', '.join(unknown[:10])}")
        files = [(path, classes.index(name)) for name in names for path in image_files(Path(root, split, name))]
        if not files:
            raise ValueError(f"{root}/{split} has no images ({', '.join(SUFFIXES)})")
        # One array, not a million bytes objects: looking at an object writes its reference count, so each worker
        # process would end up with its own copy of the list.
        self.paths = np.array([path for path, _ in files])
        self.labels = torch.tensor([label for _, label in files])
        self.image_size, self.augment = image_size, augment

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        path = os.fsdecode(self.paths[index])
        return image(path, self.image_size, self.augment, path), self.labels[index]


def need_pillow() -> None:
    """An ImportError that names the extra: a run without it fails at its start, not at its first image."""
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise ImportError("reading image files needs Pillow: pip install 'fairexp[images]'") from error


class Normalize:
    """A batch with its images, [n, c, h, w] of 0..255, as float32: divided by 255, less the mean, over the standard deviation.

    For `dataset.on_device`: as bytes, images are a quarter as much on their way there, and a GPU needs next to nothing for
    what takes a data loading process a fifth of its time. `batch`: the images, or a tuple, list or dict with them, of which
    nothing else is changed. A batch without images of as many channels as `mean` has numbers is a ValueError.
    """

    def __init__(self, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> None:
        if len(mean) != len(std) or not all(std):
            raise ValueError(f"mean={list(mean)}, std={list(std)}: takes a number a channel, and no std of 0")
        self.mean, self.std = tuple(mean), tuple(std)

    def __call__(self, batch: Any) -> Any:
        if isinstance(batch, Tensor):
            return self((batch,))[0]
        parts = dict(batch) if isinstance(batch, Mapping) else dict(enumerate(batch))
        images = {key: self.normalized(value) for key, value in parts.items() if self.takes(value)}
        if not images:
            raise ValueError(f"Normalize has a mean of {len(self.mean)} channels, and the batch no images of as many")
        return parts | images if isinstance(batch, Mapping) else tuple((parts | images).values())

    def takes(self, value: Any) -> bool:
        """Whether these are images of as many channels."""
        return isinstance(value, Tensor) and value.ndim == 4 and value.shape[1] == len(self.mean)

    def normalized(self, images: Tensor) -> Tensor:
        """The images [n, c, h, w]."""
        mean, std = constants(self.mean, self.std, images.device)
        return (images / 255).sub_(mean).div_(std)


@cache
def constants(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation on the device. Copied once: such a copy waits for what the GPU has to do."""
    return torch.tensor(mean, device=device).view(-1, 1, 1), torch.tensor(std, device=device).view(-1, 1, 1)


class Told:
    """A text that is made when somebody asks: a sample's name takes longer than reading a small one."""

    def __init__(self, tell: Callable[[], str]) -> None:
        self.tell = tell

    def __str__(self) -> str:
        return self.tell()


def image(source: str | BinaryIO, size: int, augment: bool, name: object) -> Tensor:
    """An image file or its open bytes as uint8 [3, size, size]; a ValueError that begins with the name, which is asked for
    its str() only then.

    With `augment`, a random part of it, mirrored half of the time, by torch's global generator; without, the central 7/8
    of the short side.
    """
    try:
        pixels = load(source, size, random_box if augment else central_box)
    except Exception as error:  # a broken file makes Pillow raise nearly anything
        raise ValueError(f"{name}: can't read this image: {error}") from error
    return pixels.flip(-1) if augment and torch.rand(()) < 0.5 else pixels


def class_names(folder: Path) -> list[str]:
    """The folders in it by name, which is a class's number; not the hidden ones."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def image_files(folder: Path) -> list[bytes]:
    """Paths of the images in a folder, by name; not the hidden ones, such as the `._x.jpg` that a Mac leaves behind."""
    names = sorted(name for name in os.listdir(folder) if name.lower().endswith(SUFFIXES) and name[0] != ".")
    return [os.fsencode(folder / name) for name in names]


def load(source: str | BinaryIO, size: int, choose_box: Callable[[int, int], Box]) -> Tensor:
    """The chosen part of an image file in RGB, resized with antialiasing to uint8 [3, size, size]."""
    from PIL import Image

    with Image.open(source, formats=FORMATS) as file:
        width, height = file.size
        if Image.MAX_IMAGE_PIXELS and width * height > Image.MAX_IMAGE_PIXELS:  # Pillow itself only warns
            raise ValueError(f"{width} x {height} pixels are more than PIL.Image.MAX_IMAGE_PIXELS")
        left, top, right, bottom = choose_box(width, height)
        # A JPEG decodes at 1/2, 1/4 or 1/8 for less. Asking for 2 pixels where 1 is needed leaves the antialiasing
        # to the resize below.
        file.draft(None, (int(2 * size * width / (right - left)), int(2 * size * height / (bottom - top))))
        across, down = file.width / width, file.height / height
        box = (left * across, top * down, min(right * across, file.width), min(bottom * down, file.height))
        image = file.convert("RGB").resize((size, size), Image.Resampling.BILINEAR, box, reducing_gap=2.0)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def random_box(width: int, height: int) -> Box:
    """A random part with 8-100 % of the area and a width of 3/4 to 4/3 of its height (Inception's crop)."""
    for _ in range(10):
        area, stretch, x, y = torch.rand(4).tolist()
        area = (0.08 + 0.92 * area) * width * height
        ratio = (4 / 3) ** (2 * stretch - 1)
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if w <= width and h <= height:
            left, top = x * (width - w), y * (height - h)
            return left, top, left + w, top + h
    return centred(width, height, min(width, height * 4 / 3), min(height, width * 4 / 3))


def central_box(width: int, height: int) -> Box:
    """The square that is left when the short side is resized to 256 and the central 224 x 224 are cut out."""
    side = min(width, height) * 224 / 256
    return centred(width, height, side, side)


def centred(width: int, height: int, w: float, h: float) -> Box:
    """The box of that size in the middle of the image."""
    left, top = (width - w) / 2, (height - h) / 2
    return left, top, left + w, top + h
