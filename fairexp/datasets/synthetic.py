"""Images made up on the spot, in any number and size: for measuring speed, and for a smoke test without data."""

import torch
from torch import Tensor


class SyntheticImages:
    """Images that a model can learn, float32 [channels, image_size, image_size]: each class has its own horizontal
    stripes, and an image is the stripes of class i % num_classes in noise of std 1.

    `seed` is the noise's; the stripes are always the same, so train and eval take different seeds. Image i reads its
    noise from place i of one long sequence: one number an image in memory, and a batch is a gather.
    """

    def __init__(self, num_samples: int, image_size: int, channels: int, num_classes: int, seed: int) -> None:
        self.shape = (channels, image_size, image_size)
        self.stripes = torch.randn(num_classes, channels, image_size, 1, generator=torch.Generator().manual_seed(0))
        num_pixels = channels * image_size**2
        noise = torch.randn(num_samples + num_pixels - 1, generator=torch.Generator().manual_seed(seed))
        self.noise = noise.unfold(0, num_pixels, 1)  # a view: row i is noise[i : i + num_pixels]

    def __len__(self) -> int:
        return len(self.noise)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Tensor | list[int]) -> tuple[Tensor, Tensor]:
        indices = torch.as_tensor(indices)
        labels = indices % len(self.stripes)
        images = self.noise.index_select(0, indices).view(-1, *self.shape)
        return images.add_(self.stripes.index_select(0, labels)), labels
