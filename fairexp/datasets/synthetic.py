"""Images and text made up on the spot, in any number and size: for measuring speed, and for a smoke test without data."""

import math

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


class SyntheticTokens:
    """Token ids that a language model can learn: after each token comes its one successor with probability 1 - `jump`, else
    any token. Rows of `seq_len` tokens and as many targets, by the batch contract of the task NextToken.

    The best loss is that of a model that knows the successors, `floor` nats a token. `seed` is the jumps'; the successors are
    always the same, so train and eval take different seeds. Row i begins at place i of one long text: 4 bytes a row in memory.
    """

    def __init__(self, num_samples: int, seq_len: int, vocab_size: int, seed: int, jump: float = 0.1) -> None:
        self.vocab_size = vocab_size
        self.fingerprint: dict[str, str | int] = {
            "made_of": f"jump={jump} seed={seed}",
            "num_tokens": num_samples + seq_len,
        }
        generator = torch.Generator().manual_seed(seed)
        jumps = torch.rand(num_samples + seq_len, generator=generator) < jump
        jumps[0] = True
        starts = torch.randint(vocab_size, jumps.shape, generator=generator)
        at = torch.arange(len(jumps))
        last = (at * jumps).cummax(0).values  # where the text jumped last
        cycle = torch.randperm(
            vocab_size, generator=torch.Generator().manual_seed(0)
        )  # a token's successor is the next in it
        text = cycle[(starts[last] + at - last) % vocab_size].int()
        self.rows = text.unfold(0, seq_len + 1, 1)  # a view: row i is text[i : i + seq_len + 1]
        right = 1 - jump + jump / vocab_size
        wrong = jump / vocab_size
        self.floor = -right * math.log(right) - (vocab_size - 1) * wrong * math.log(wrong)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: Tensor | list[int]) -> dict[str, Tensor]:
        rows = self.rows.index_select(0, torch.as_tensor(indices)).long()
        return {"tokens": rows[:, :-1].contiguous(), "targets": rows[:, 1:].contiguous()}
