"""What the data sets on the shelf promise, on real files: their images, their errors, and their randomness."""

import gzip
import importlib
import inspect
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, default_collate

from fairexp.datasets.augment import RandomAffine, affine_matrices, uniform
from fairexp.datasets.digits import MEAN, STD, Digits
from fairexp.datasets.idx import IDX
from fairexp.datasets.image_folder import ImageFolder, Normalize, central_box, random_box
from fairexp.datasets.synthetic import SyntheticImages

CONFIGS = Path(__file__).parents[1] / "configs" / "dataset"
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")

torch.set_num_threads(1)


# Digits


def test_digits_are_the_1797_scans_of_uci() -> None:
    train, test = Digits("train"), Digits("test")
    assert (len(train), len(test)) == (1437, 360)
    assert train.labels.bincount().tolist() == [143, 146, 142, 146, 144, 145, 144, 143, 141, 143]
    assert test.labels.bincount().tolist() == [35, 36, 35, 37, 37, 37, 37, 36, 33, 37]


def test_digits_have_17_grey_levels_normalised_over_the_train_split() -> None:
    images, test_images = Digits("train").images, Digits("test").images
    assert images.dtype == torch.float32
    assert images.shape == (1437, 1, 8, 8)
    levels = (torch.cat([images, test_images]).unique() * STD + MEAN) * 16
    torch.testing.assert_close(levels, torch.arange(17.0), atol=1e-5, rtol=0)
    assert abs(images.mean()) < 1e-3
    assert abs(images.std() - 1) < 1e-3


def test_first_digit_is_a_zero() -> None:
    image, label = Digits("train")[0]
    assert label == 0
    rows = ((image[0] * STD + MEAN) * 16).round().int().tolist()
    assert rows[:3] == [[0, 0, 5, 13, 9, 1, 0, 0], [0, 0, 13, 15, 10, 15, 5, 0], [0, 3, 15, 2, 0, 11, 8, 0]]


# Data sets in memory


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    data = header + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def write_mnist(root: Path, suffix: str = "") -> tuple[np.ndarray, np.ndarray]:
    """Seven random 5x4 images with labels, as both splits."""
    images = np.random.default_rng(0).integers(0, 256, (7, 5, 4), np.uint8)
    labels = np.arange(7, dtype=np.uint8)
    for split in ("train", "t10k"):
        write_idx(root / f"{split}-images-idx3-ubyte{suffix}", images)
        write_idx(root / f"{split}-labels-idx1-ubyte{suffix}", labels)
    return images, labels


@pytest.fixture(params=["digits", "idx", "synthetic"])
def in_memory(request: pytest.FixtureRequest, tmp_path: Path) -> Digits | IDX | SyntheticImages:
    if request.param == "digits":
        return Digits("test")
    if request.param == "synthetic":
        return SyntheticImages(num_samples=20, image_size=6, channels=3, num_classes=4, seed=0)
    write_mnist(tmp_path)
    return IDX(tmp_path, "train", mean=0.3, std=0.2)


@pytest.mark.parametrize("as_tensor", [True, False])
def test_a_gathered_batch_equals_its_collated_samples(in_memory, as_tensor: bool) -> None:
    indices = [3, 0, 6, 3, len(in_memory) - 1]
    images, labels = in_memory.__getitems__(torch.tensor(indices) if as_tensor else indices)
    expected_images, expected_labels = default_collate([in_memory[index] for index in indices])
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert images.ndim == 4
    assert torch.equal(images, expected_images)
    assert torch.equal(labels, expected_labels)


def test_a_plain_dataloader_reads_it_with_an_identity_collate(in_memory) -> None:
    batches = list(DataLoader(in_memory, batch_size=8, collate_fn=lambda batch: batch))
    assert torch.equal(torch.cat([labels for _, labels in batches]), in_memory.__getitems__(range(len(in_memory)))[1])


def test_changing_a_batch_leaves_the_data_set_alone(in_memory) -> None:
    before = in_memory[0][0].clone()
    in_memory.__getitems__([0, 1])[0].zero_()
    assert torch.equal(in_memory[0][0], before)


# IDX


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_reads_plain_and_gzipped_files(tmp_path: Path, suffix: str) -> None:
    images, labels = write_mnist(tmp_path, suffix)
    data = IDX(tmp_path, "test", mean=0.5, std=0.25)
    batch, classes = data.__getitems__(range(7))
    np.testing.assert_allclose(batch[:, 0], (images / 255 - 0.5) / 0.25, atol=1e-6)
    assert classes.tolist() == labels.tolist()
    assert data.images.dtype == torch.uint8


def cut(data: bytes) -> bytes:
    return data[:-10]


def lengthen(data: bytes) -> bytes:
    return data + b"\0\0\0"


def claim_an_exabyte(data: bytes) -> bytes:
    return data[:4] + b"\xff\xff\xff\xff" * 3 + data[16:]


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (cut, "expected 140 bytes, found 130"),
        (lengthen, "expected 140 bytes, found more than 140"),
        (claim_an_exabyte, f"expected {(2**32 - 1) ** 3:,} bytes, found 140"),
        (lambda data: b"not an image", "not an IDX file of 3-dimensional bytes, starts with b'not '"),
        (lambda data: data[:9], "not an IDX file of 3-dimensional bytes, starts with"),
        (lambda data: b"", "not an IDX file of 3-dimensional bytes, starts with b''"),
    ],
)
def test_a_damaged_idx_file_is_named_with_both_sizes(tmp_path: Path, suffix: str, damage, expected: str) -> None:
    write_mnist(tmp_path, suffix)
    path = tmp_path / f"train-images-idx3-ubyte{suffix}"
    data = path.read_bytes()
    path.write_bytes(gzip.compress(damage(gzip.decompress(data))) if suffix else damage(data))
    with pytest.raises(ValueError, match="train-images") as caught:
        IDX(tmp_path, "train", mean=0, std=1)
    assert str(caught.value).startswith(f"{path}: ")
    assert expected in str(caught.value)


@pytest.mark.parametrize("damage", [cut, lambda data: data[:40] + bytes(20) + data[60:], lambda data: b"plain text"])
def test_a_damaged_gzip_stream_is_named(tmp_path: Path, damage) -> None:
    write_mnist(tmp_path, ".gz")
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz: damaged: expected .* found .*; "):
        IDX(tmp_path, "train", mean=0, std=1)


def test_idx_without_its_files_says_what_it_looked_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither .*train-images-idx3-ubyte nor .*ubyte\.gz exists"):
        IDX(tmp_path, "train", mean=0, std=1)


def test_idx_with_fewer_labels_than_images_is_refused(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.zeros(6, np.uint8))
    with pytest.raises(ValueError, match=r"has 7 images, but .* has 6 labels"):
        IDX(tmp_path, "train", mean=0, std=1)


@pytest.mark.system
@pytest.mark.skipif(not FASHION_MNIST.exists(), reason="needs Debian's dataset-fashion-mnist")
def test_fashion_mnist_has_its_sizes_classes_and_normalisation() -> None:
    config = yaml.safe_load((CONFIGS / "fashion_mnist.yaml").read_text())
    for section, length in (("train", 60_000), ("eval", 10_000)):
        arguments = {**config[section], "root": config["root"]}
        arguments.pop("_target_")
        data = IDX(**arguments)
        assert data.images.shape == (length, 1, 28, 28)
        assert data.labels.bincount().tolist() == [length // 10] * 10
        images, _ = data.__getitems__(torch.arange(0, length, 10))
        assert abs(images.mean()) < 0.01
        assert abs(images.std() - 1) < 0.01


# Image folder


def write_images(root: Path) -> Path:
    """Two classes; JPEG, PNG with alpha, greyscale and palette; noise on a gradient, so that crops differ."""
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number, (width, height) in enumerate([(90, 60), (50, 80), (64, 64)]):
                ramp = np.linspace(0, 200, width)[None, :, None] * np.ones((height, 1, 3))
                image = Image.fromarray((ramp + random.integers(0, 50, ramp.shape)).astype(np.uint8))
                image.save(folder / f"{number}.jpeg", quality=95)
            image.convert("RGBA").save(folder / "3.PNG")
            image.convert("L").save(folder / "4.jpg")
            image.convert("P").save(folder / "5.png")
            (folder / "notes.txt").write_text("not an image")
            (folder / "._0.jpeg").write_bytes(b"what a Mac leaves behind")
    return root


def folder(root: Path, split: str = "train", augment: bool = False, image_size: int = 32) -> ImageFolder:
    return ImageFolder(root, split, image_size, num_classes=2, augment=augment)


def seeded(data: ImageFolder, index: int, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return data[index][0]


def test_an_image_folder_is_sorted_and_skips_what_is_not_an_image(tmp_path: Path) -> None:
    data = folder(write_images(tmp_path))
    names = [Path(os.fsdecode(path)).relative_to(tmp_path).as_posix() for path in data.paths]
    assert names[:6] == [f"train/cat/{file}" for file in ("0.jpeg", "1.jpeg", "2.jpeg", "3.PNG", "4.jpg", "5.png")]
    assert len(data) == 12
    assert data.labels.tolist() == [0] * 6 + [1] * 6


@pytest.mark.parametrize("augment", [False, True])
def test_every_kind_of_image_becomes_normalised_rgb(tmp_path: Path, augment: bool) -> None:
    data = folder(write_images(tmp_path), augment=augment)
    read, _ = batch = default_collate([data[index] for index in range(len(data))])
    assert read.shape == (12, 3, 32, 32)
    assert read.dtype == torch.uint8
    images, labels = Normalize()(batch)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert images.min() > -2.2
    assert images.max() < 2.7


def test_images_are_normalised_channel_by_channel_and_nothing_else_is() -> None:
    normalize = Normalize(mean=[0.0, 0.5, 1.0], std=[1.0, 0.5, 0.25])
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 1, 1, 3).expand(2, 3, 1, 3)
    expected = torch.tensor([[0, 0.2, 1], [-1, -0.6, 1], [-4, -3.2, 0]]).view(3, 1, 3).expand(2, 3, 1, 3)
    labels, masks, text = torch.ones(2, 3), torch.ones(2, 4, 1, 3, dtype=torch.uint8), ["a", "b"]
    torch.testing.assert_close(normalize(images), expected)
    torch.testing.assert_close(normalize([images, labels])[0], expected)
    assert normalize((images, labels))[1] is labels
    batch = normalize({"image": images.float(), "masks": masks, "text": text})  # mixed ones are floats already
    torch.testing.assert_close(batch["image"], expected)
    assert batch["masks"] is masks
    assert batch["text"] is text
    with pytest.raises(ValueError, match="a mean of 3 channels, and the batch no images of as many"):
        normalize((images[:, :1], labels))
    with pytest.raises(ValueError, match=r"mean=\[0.5\], std=\[0.0\]: takes a number a channel, and no std of 0"):
        Normalize([0.5], [0.0])


def test_augmentation_follows_torch_seed_and_nothing_else(tmp_path: Path) -> None:
    data = folder(write_images(tmp_path), augment=True)
    first = seeded(data, 0, seed=1)
    np.random.seed(5)
    assert torch.equal(seeded(data, 0, seed=1), first)
    assert not torch.equal(seeded(data, 0, seed=2), first)


def test_evaluation_is_resize_256_then_centre_crop_224(tmp_path: Path) -> None:
    ramp = np.add.outer(np.linspace(0, 120, 300), np.linspace(0, 120, 400))
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.fromarray(ramp.astype(np.uint8)).convert("RGB").save(tmp_path / split / name / "x.png")
    image, _ = folder(tmp_path, "val", image_size=224)[0]
    resized = Image.open(tmp_path / "val/a/x.png").resize((341, 256), Image.Resampling.BILINEAR)
    expected = torch.from_numpy(np.array(resized.crop((58, 16, 282, 240)))).permute(2, 0, 1) / 255
    torch.testing.assert_close(image / 255, expected, atol=1.5 / 255, rtol=0)


def test_random_boxes_lie_inside_and_keep_area_and_ratio() -> None:
    torch.manual_seed(0)
    areas = []
    for _ in range(500):
        left, top, right, bottom = random_box(100, 80)
        assert 0 <= left < right <= 100 + 1e-9
        assert 0 <= top < bottom <= 80 + 1e-9
        areas.append((right - left) * (bottom - top) / 8000)
        assert 3 / 4 - 1e-9 <= (right - left) / (bottom - top) <= 4 / 3 + 1e-9
    assert min(areas) >= 0.08 - 1e-9
    assert max(areas) > 0.8


def test_boxes_of_odd_images() -> None:
    assert random_box(1000, 10) == pytest.approx((500 - 20 / 3, 0, 500 + 20 / 3, 10))  # no crop fits: centred, 4/3
    assert central_box(512, 256) == (144, 16, 368, 240)


@pytest.mark.parametrize("size", [(1, 1), (2, 700), (5000, 3), (3000, 2000)])
@pytest.mark.parametrize("augment", [False, True])
def test_images_of_any_size_are_read(tmp_path: Path, size: tuple[int, int], augment: bool) -> None:
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", size, (200, 0, 0)).save(tmp_path / split / name / "x.jpg")
    data = folder(tmp_path, augment=augment)
    for seed in range(5):
        image = seeded(data, 0, seed)
        assert image.shape == (3, 32, 32)
        assert Normalize()(image[None])[0, 0].std() < 0.05


def test_a_large_jpeg_is_decoded_small(tmp_path: Path) -> None:
    write_images(tmp_path)
    ramp = np.add.outer(np.linspace(0, 120, 1600), np.linspace(0, 120, 1600)).astype(np.uint8)
    for suffix in ("jpg", "png"):
        Image.fromarray(ramp).convert("RGB").save(tmp_path / f"train/cat/9.{suffix}", quality=98)
    data = folder(tmp_path)
    jpeg, png = data[6][0], data[7][0]
    both = Normalize()(torch.stack([jpeg, png]))
    torch.testing.assert_close(both[0], both[1], atol=0.05, rtol=0)


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"text"])
@pytest.mark.parametrize("name", ["2.jpeg", "3.PNG"])
def test_a_damaged_image_is_named(tmp_path: Path, name: str, damage) -> None:
    path = write_images(tmp_path) / "train" / "dog" / name
    path.write_bytes(damage(path.read_bytes()))
    data = folder(tmp_path)
    with pytest.raises(ValueError, match=f"train/dog/{name}: can't read this image: "):
        data[6 + int(name[0])]


def test_a_decompression_bomb_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = folder(write_images(tmp_path))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 90 * 60 - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with pytest.raises(ValueError, match=r"0\.jpeg: can't read this image: 90 x 60 pixels are more than"):
            data[0]


def test_val_may_lack_classes_but_keeps_their_ids(tmp_path: Path) -> None:
    write_images(tmp_path)
    for file in (tmp_path / "val" / "cat").iterdir():
        file.unlink()
    (tmp_path / "val" / "cat").rmdir()
    assert folder(tmp_path, "val").labels.tolist() == [1] * 6
    (tmp_path / "val" / "wolf").mkdir()
    with pytest.raises(ValueError, match=r"val has classes that .*train lacks: wolf"):
        folder(tmp_path, "val")


def test_a_wrong_number_of_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"num_classes=1000, but .*train has 2 classes"):
        ImageFolder(write_images(tmp_path), "train", 32, num_classes=1000, augment=False)


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
    with pytest.raises(ValueError, match="train has no images"):
        folder(tmp_path)


def test_without_pillow_the_error_names_the_extra(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['PIL'] = None\n"
        "from fairexp.datasets.image_folder import ImageFolder\n"
        f"ImageFolder({str(tmp_path)!r}, 'train', 32, 2, False)"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False)
    assert "ImportError: reading image files needs Pillow: pip install 'fairexp[images]'" in done.stderr


# Synthetic images


def test_synthetic_classes_are_the_same_for_every_seed_and_easy_to_tell_apart() -> None:
    train = SyntheticImages(num_samples=400, image_size=12, channels=3, num_classes=10, seed=0)
    test = SyntheticImages(num_samples=200, image_size=12, channels=3, num_classes=10, seed=1)
    images, labels = train.__getitems__(range(400))
    means = torch.stack([images[labels == label].mean(0) for label in range(10)])
    images, labels = test.__getitems__(range(200))
    nearest = torch.cdist(images.flatten(1), means.flatten(1)).argmin(1)
    assert (nearest == labels).float().mean() == 1
    assert not torch.equal(train[0][0], test[0][0])


def test_synthetic_images_all_differ() -> None:
    data = SyntheticImages(num_samples=300, image_size=8, channels=1, num_classes=3, seed=0)
    images, labels = data.__getitems__(range(300))
    assert len(images.flatten(1).unique(dim=0)) == 300
    assert labels.bincount().tolist() == [100, 100, 100]


# Augmentation


@pytest.mark.parametrize("kind", ["consecutive", "random", "negative", "spaced"])
def test_uniform_numbers_are_uniform_and_uncorrelated(kind: str) -> None:
    num = 20_000
    seeds = {
        "consecutive": torch.arange(num),
        "random": torch.randint(0, 2**62, (num,), generator=torch.Generator().manual_seed(0)),
        "negative": -torch.arange(num) - 1,
        "spaced": torch.arange(num) * -7046029254386353131,  # splitmix64's own increment
    }[kind]
    draws = uniform(seeds, 4)
    assert draws.shape == (num, 4)
    assert draws.dtype == torch.float32
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = torch.stack([torch.histc(column, 20, 0, 1) for column in draws.T])
    chi_squared = ((counts - num / 20) ** 2 / (num / 20)).sum(1)  # 19 degrees of freedom: above 50 once in 10,000
    assert chi_squared.max() < 50
    neighbours = torch.cat([draws[:-1], draws[1:]], 1).T  # columns of one sample, and of the next
    correlation = torch.corrcoef(neighbours) - torch.eye(8)
    assert correlation.abs().max() < 5 / num**0.5


def test_uniform_numbers_of_seed_0_are_splitmix64s_published_sequence() -> None:
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert uniform(torch.tensor([0]), 3)[0].tolist() == [(number >> 40) / 2**24 for number in published]


def test_uniform_numbers_depend_on_the_samples_own_seed_only() -> None:
    seeds = torch.tensor([5, -3, 2**62, 5])
    draws = uniform(seeds, 6)
    assert torch.equal(draws[0], draws[3])
    for row, seed in zip(draws, seeds, strict=True):
        assert torch.equal(uniform(seed[None], 6)[0], row)
    assert torch.equal(uniform(seeds, 3), draws[:, :3])


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 28, 28), (1, 12, 20)])
def test_a_sample_is_augmented_alike_in_any_batch(shape: tuple[int, int, int]) -> None:
    augment = RandomAffine(degrees=15, translate=0.2, scale=[0.8, 1.2], shear=10, flip=True)
    images, labels, seeds = torch.randn(9, *shape), torch.arange(9), torch.arange(100, 109)
    together, same_labels = augment((images, labels), seeds)
    assert torch.equal(same_labels, labels)
    assert not torch.equal(together, images)
    order = torch.tensor([4, 0, 8, 7])
    fewer, _ = augment((images[order], labels[order]), seeds[order])
    assert torch.equal(fewer, together[order])
    alone = torch.cat([augment((images[i : i + 1], labels[i : i + 1]), seeds[i : i + 1])[0] for i in range(9)])
    assert torch.equal(alone, together)


def move(image: Tensor, **motion: float) -> Tensor:
    still = {"angle": 0.0, "right": 0.0, "down": 0.0, "zoom": 1.0, "shear": 0.0} | motion
    angle, right, down, zoom, shear = (torch.tensor([value]) for value in still.values())
    matrices = affine_matrices(angle, torch.stack([right, down], 1), zoom, shear)
    grid = F.affine_grid(matrices, [1, 1, *image.shape], align_corners=False)
    return F.grid_sample(image[None, None], grid, align_corners=False)[0, 0]


def test_affine_motions_go_where_they_say() -> None:
    image = torch.zeros(8, 8)
    image[1, 2] = 1

    def place(moved: Tensor) -> tuple[int, int]:
        assert moved.max() > 0.9
        return divmod(int(moved.argmax()), 8)

    assert torch.allclose(move(image), image)
    assert place(move(image, right=2 / 8, down=3 / 8)) == (4, 4)
    assert place(move(image, angle=torch.pi / 2)) == (2, 6)  # clockwise: the top left goes to the top right
    block = torch.zeros(8, 8)
    block[3:5, 3:5] = 1
    assert move(block, zoom=2.0)[2:6, 2:6].min() > 0.5
    assert move(block, zoom=2.0).sum() == pytest.approx(16, rel=0.05)
    post = torch.zeros(8, 8)
    post[:, 3:5] = 1
    leaning = move(post, shear=torch.pi / 4)
    assert leaning[1].argmax() < leaning[6].argmax()  # down is right


def test_flip_mirrors_about_half_of_the_images() -> None:
    images = torch.randn(200, 1, 6, 6)
    flipped, _ = RandomAffine(flip=True)((images, torch.zeros(200)), torch.arange(200))
    mirrored = torch.isclose(flipped, images.flip(-1), atol=1e-5).flatten(1).all(1)
    same = torch.isclose(flipped, images, atol=1e-5).flatten(1).all(1)
    assert (mirrored | same).all()
    assert 70 < mirrored.sum() < 130


def test_no_strength_is_no_change() -> None:
    images = torch.randn(5, 3, 9, 9)
    unchanged, _ = RandomAffine()((images, torch.zeros(5)), torch.arange(5))
    torch.testing.assert_close(unchanged, images, atol=1e-5, rtol=1e-5)


# Configs


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_config_arguments_stand_in_the_constructors_order(path: Path) -> None:
    config = yaml.safe_load(path.read_text())
    if base := config.get("defaults"):
        config = yaml.safe_load(path.with_name(f"{base[0]}.yaml").read_text()) | config
    sizes = {"vocab_size", "seq_len"} if "vocab_size" in config else {"image_size", "channels", "num_classes"}
    assert {"train", "eval", "augment", *sizes} <= config.keys()
    assert ("expects" in config) == bool({"root", "roots"} & config.keys())
    for section in ("train", "eval", "augment", "on_device"):
        if config.get(section):
            target, *arguments = config[section]
            assert target == "_target_"
            module, name = config[section]["_target_"].rsplit(".", 1)
            signature = inspect.signature(getattr(importlib.import_module(module), name))
            signature.bind(**dict.fromkeys(arguments))
            assert arguments == [parameter for parameter in signature.parameters if parameter in arguments]
