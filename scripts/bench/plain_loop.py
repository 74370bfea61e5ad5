"""The training loop that a researcher writes by hand, without any framework: what scripts/bench/overhead compares fairexp with.

Two processes with RANK, WORLD_SIZE and RENDEZVOUS_FILE in their environment train with DistributedDataParallel.
"""

import argparse
import itertools
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from marks import Marks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

from fairexp.datasets.digits import Digits  # plain torch classes: they import nothing from fairexp
from fairexp.models.mlp import MLP
from fairexp.models.vit import ViT

RANK, WORLD_SIZE = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=("mlp", "vit"), default="mlp")
    parser.add_argument("--batch-size", type=int, default=32, help="of all ranks together")
    parser.add_argument("--tuned", action="store_true", help="slices of whole tensors and the fused optimizer")
    parser.add_argument("--out", help="file for the times")
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--last", type=int, default=800)
    parser.add_argument(
        "--same-as", help="start and order of a recorded fairexp run: prints how far the final weights are"
    )
    args = parser.parse_args()
    recorded = torch.load(args.same_as) if args.same_as else None

    torch.manual_seed(0)
    digits = Digits("train")
    model: nn.Module
    if args.model == "mlp":
        model = MLP(image_size=8, in_channels=1, hidden=[128, 128], num_classes=10)
    else:
        model = ViT(
            image_size=8, patch_size=2, in_channels=1, num_classes=10, width=96, depth=4, num_heads=4, pool="mean"
        )
    if recorded:
        model.load_state_dict(recorded["start"])
    if WORLD_SIZE > 1:
        file = f"file://{os.environ['RENDEZVOUS_FILE']}"
        dist.init_process_group("gloo", init_method=file, rank=RANK, world_size=WORLD_SIZE)
        model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True if args.tuned else None)

    if recorded:
        train(model, optimizer, in_order(digits, args.batch_size, recorded["orders"]), None, args.last)
        differences = [(value - recorded["end"][name]).abs().max() for name, value in model.state_dict().items()]
        print(max(map(float, differences)))
    else:
        batches = tuned_batches if args.tuned else default_batches
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        marks = Marks(args.out, args.every, args.last, num_parameters)
        train(model, optimizer, batches(digits, args.batch_size), marks, args.last)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterator[Any], marks: Marks | None, steps: int
) -> None:
    for step, (images, labels) in enumerate(itertools.islice(batches, steps), start=1):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if marks:
            marks.after(step)


def default_batches(digits: Digits, batch_size: int) -> Iterator[list[Tensor]]:
    """A DataLoader as its documentation shows it: sample by sample."""
    dataset: Dataset[Any] = TensorDataset(digits.images, digits.labels)
    sampler: DistributedSampler[Any] | None = DistributedSampler(dataset) if WORLD_SIZE > 1 else None
    loader = DataLoader(dataset, batch_size // WORLD_SIZE, shuffle=sampler is None, sampler=sampler)
    for epoch in itertools.count():
        if sampler:
            sampler.set_epoch(epoch)
        yield from loader


def tuned_batches(digits: Digits, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Slices of the whole tensors; a rank's part of each."""
    generator = torch.Generator().manual_seed(0)
    for _ in itertools.count():
        for indices in torch.randperm(len(digits), generator=generator).split(batch_size):
            mine = indices.tensor_split(WORLD_SIZE)[RANK] if WORLD_SIZE > 1 else indices
            yield digits.images[mine], digits.labels[mine]


def in_order(digits: Digits, batch_size: int, orders: list[Tensor]) -> Iterator[list[Tensor]]:
    """The DataLoader again, in the order of a recorded run."""
    for order in orders:
        yield from DataLoader(TensorDataset(digits.images, digits.labels), batch_size, sampler=order.tolist())


if __name__ == "__main__":
    main()
