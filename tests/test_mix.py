"""mixup and CutMix: what becomes of a sample follows from seed, epoch and index; its label says what it is made of."""

import inspect
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fairexp.config.compose import compose
from fairexp.datasets.augment import RandomAffine
from fairexp.datasets.mix import Mix, beta
from fairexp.errors import RunError
from fairexp.runtime.bad_samples import BadSamples
from fairexp.runtime.data import Batches, Fetcher
from fairexp.runtime.dist import Place
from fairexp.runtime.order import Part, TrainingOrder
from fairexp.tasks.classification import Classification

torch.set_num_threads(1)

LENGTH, CLASSES = 24, 5


class Images:
    """Image i is full of the number i + 1, its class is i % 5; those in `bad` can't be read."""

    def __init__(self, bad: tuple[int, ...] = ()) -> None:
        self.bad = bad

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index in self.bad:
            raise OSError(f"image_{index}.jpg is truncated")
        return torch.full((1, 8, 8), index + 1.0), torch.tensor(index % CLASSES)


class Gathered(Images):
    """The same, a whole batch at once."""

    def __getitems__(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        images, classes = zip(*(self[index] for index in indices.tolist()), strict=True)
        return torch.stack(images), torch.stack(classes)


def take(
    logs: Path, dataset: Images, mix: Mix, world_size: int = 1, micro: int = 8, workers: int = 0, most: int = 0
) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
    """Image and label of each (epoch, index), of two epochs."""
    got = {}
    for rank in range(world_size):
        here = Place(rank, world_size, rank, torch.device("cpu"))
        order = TrainingOrder(LENGTH, 8, micro, here, 0)
        augment = RandomAffine(translate=0.3, padding="zeros")
        batches = Batches(Fetcher(dataset, augment, 0, BadSamples(logs, rank, most), mix), order, here, workers, 0)
        for parts, step in zip(order.steps(0), batches, strict=False):
            for part, batch in zip(parts, step, strict=True):
                for place, index in enumerate(part.indices[: part.weight].tolist()):
                    got[part.epoch, index] = batch.batch[0][place], batch.batch[1][place]
            if parts[0].step == 6:
                break
        batches.close()
    assert len(got) == 2 * LENGTH
    return got


def same(first: dict[Any, tuple[Tensor, Tensor]], second: dict[Any, tuple[Tensor, Tensor]]) -> bool:
    return all(torch.equal(a, b) for key in first for a, b in zip(first[key], second[key], strict=True))


@pytest.mark.parametrize("alphas", [(0.2, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_a_sample_becomes_the_same_blend_in_any_company(tmp_path: Path, alphas: tuple[float, float]) -> None:
    mix = Mix(CLASSES, *alphas, prob=0.8)
    alone = take(tmp_path, Gathered(), mix)
    assert same(take(tmp_path, Images(), mix), alone)
    assert same(take(tmp_path, Images(), mix, world_size=3, micro=1), alone)
    assert same(take(tmp_path, Gathered(), mix, world_size=2, micro=3), alone)
    epochs = [torch.stack([alone[epoch, index][0] for index in range(LENGTH)]) for epoch in (0, 1)]
    assert not torch.equal(*epochs)
    assert all(label.sum().item() == pytest.approx(1) for _, label in alone.values())
    blends = sum(label.max().item() < 1 for _, label in alone.values())
    assert 0.4 * len(alone) < blends < 0.9 * len(alone)


def test_workers_blend_alike(tmp_path: Path) -> None:
    mix = Mix(CLASSES, 0.8, 1.0)
    assert same(take(tmp_path, Images(), mix, workers=2), take(tmp_path, Images(), mix))


@pytest.mark.parametrize("dataset", [Images((3, 20)), Gathered((3, 20))])
def test_a_partner_that_cannot_be_read_is_replaced_and_counted_as_any_sample(tmp_path: Path, dataset: Images) -> None:
    mix = Mix(CLASSES, 1.0, 0.0)
    runs = []
    for name, world_size in (("alone", 1), ("ranks", 2)):
        (tmp_path / name).mkdir()
        runs.append(take(tmp_path / name, dataset, mix, world_size, most=2))
        rows = [json.loads(line) for file in (tmp_path / name).iterdir() for line in file.read_text().splitlines()]
        assert {(row["epoch"], row["index"], row["instead"]) for row in rows} == {
            (epoch, *pair) for epoch in (0, 1) for pair in ((3, 4), (20, 21))
        }
    assert same(*runs)
    fetcher = Fetcher(dataset, None, 0, BadSamples(tmp_path, 0, 0), mix)
    seeds = fetcher.seeds(Part(torch.arange(LENGTH), LENGTH, 1.0, 0))
    (index,) = (mix.partners(seeds, LENGTH) == 20).nonzero()[0].tolist()
    with pytest.raises(RunError, match=r"dataset\.train: sample 20 \(step 7, epoch 0\) can't be read: OSError"):
        fetcher[Part(torch.tensor([index]), 1, 1.0, 0, 7)]


SEEDS = torch.arange(4000) * 977


def blend(mix: Mix) -> tuple[Tensor, Tensor]:
    """Images of ones, of class 0, blended with images of zeros, of class 1."""
    num = len(SEEDS) + len(mix.partners(SEEDS, 10))
    images, classes = torch.ones(num, 3, 12, 20), torch.zeros(num, dtype=torch.int64)
    images[len(SEEDS) :], classes[len(SEEDS) :] = 0, 1
    return mix((images, classes), SEEDS)


def test_mixup_averages_image_and_label_alike() -> None:
    images, labels = blend(Mix(2, mixup_alpha=0.4, cutmix_alpha=0.0))
    assert torch.equal(images.amax((1, 2, 3)), images.amin((1, 2, 3)))
    assert torch.equal(labels[:, 0], images[:, 0, 0, 0])
    assert labels[:, 0].var().item() == pytest.approx(1 / (4 * 1.8), rel=0.05)


@pytest.mark.parametrize("alphas", [(0.4, 0.0), (0.0, 1.0)])
def test_bytes_are_blended_as_floats_of_the_same_values_are(alphas: tuple[float, float]) -> None:
    images = torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8)
    seeds, classes = torch.arange(6), torch.arange(12) % CLASSES
    mix, affine = Mix(CLASSES, *alphas), RandomAffine(degrees=30, translate=0.2)
    for change in (lambda x: mix((x, classes), seeds)[0], lambda x: affine((x, classes), torch.arange(12))[0]):
        assert change(images).dtype == torch.float32
        assert torch.equal(change(images), change(images.float()))


def test_cutmix_pastes_a_rectangle_and_weighs_the_label_by_its_area() -> None:
    images, labels = blend(Mix(2, mixup_alpha=0.0, cutmix_alpha=1.0))
    assert set(images.unique().tolist()) == {0.0, 1.0}
    assert labels[:, 0].tolist() == pytest.approx(images.mean((1, 2, 3)).tolist())
    for image in images[:200, 0]:
        rows, columns = (image == 0).any(1), (image == 0).any(0)
        assert torch.equal(image == 0, rows[:, None] & columns[None])
        assert (rows.int().diff() > 0).sum() <= 1
    centre, corner = images[:, 0, 6, 10].mean(), images[:, 0, 0, 0].mean()
    assert centre < corner < 1, "rectangles are cut off at the edges"
    pasted = 1 - labels[:, 0]
    assert pasted.min() == 0
    assert pasted.max() > 0.7


def test_both_take_half_of_the_blended_part_each() -> None:
    images, labels = blend(Mix(2, mixup_alpha=1.0, cutmix_alpha=1.0, prob=0.5))
    averaged = ((images > 0) & (images < 1)).flatten(1).any(1)
    assert averaged.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert (labels.amax(1) == 1).float().mean().item() == pytest.approx(0.5, abs=0.06)


def test_the_weights_are_betas() -> None:
    u, v = torch.rand(2, 50_000, generator=torch.Generator().manual_seed(0))
    for alpha in (0.1, 0.5, 1.0, 3.0):
        drawn = beta(torch.full_like(u, alpha), u, v).double()
        assert drawn.mean().item() == pytest.approx(0.5, abs=0.01)
        assert drawn.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.02)
    arcsine = beta(torch.full_like(u, 0.5), u, v)
    for x in (0.01, 0.2, 0.6):
        assert (arcsine < x).double().mean().item() == pytest.approx(2 / math.pi * math.asin(math.sqrt(x)), abs=0.01)
    assert not beta(torch.full((2,), 1e-3), torch.tensor([0.0, 0.5]), torch.tensor([0.1, 0.6])).isnan().any()


def test_a_blends_loss_is_the_blend_of_the_losses() -> None:
    model, logits = torch.nn.Identity(), torch.randn(4, CLASSES)
    first, second, part = torch.tensor([0, 1, 2, 3]), torch.tensor([4, 4, 2, 0]), torch.tensor([0.1, 0.5, 0.3, 1.0])
    soft = torch.zeros(4, CLASSES)
    for row in range(4):
        soft[row, first[row]] += part[row]
        soft[row, second[row]] += 1 - part[row]
    task = Classification(label_smoothing=0.1)
    expected = sum(
        w * task(model, (row[None], own[None]))[0] + (1 - w) * task(model, (row[None], other[None]))[0]
        for w, row, own, other in zip(part, logits, first, second, strict=True)
    )
    torch.testing.assert_close(task(model, (logits, soft))[0], expected / 4)


@pytest.mark.parametrize("option", ["mixup", "cutmix", "mixup_cutmix"])
def test_its_options_are_the_constructors(option: str) -> None:
    config = compose(["dataset=image_folder", "dataset.root=/", "dataset.num_classes=7", f"mix={option}"]).config
    section = config["dataset"]["mix"]
    assert list(section) == ["_target_", *inspect.signature(Mix).parameters]
    assert section["num_classes"] == 7
    assert "mix" not in compose(["dataset=digits"]).config["dataset"]
    with pytest.raises(ValueError, match="one must be above 0"):
        Mix(10, 0.0, 0.0)
