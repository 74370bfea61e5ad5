"""The shipped experiments and data sets, through the real command line."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


def train(folder: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    """Runs `fairexp train --json`, on the CPU."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    environment |= {"HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}  # no netrc: wandb has no key
    command = [sys.executable, "-m", "fairexp", "train", *words, "trainer.device=cpu", "--json"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)


def result_of(done: "subprocess.CompletedProcess[str]") -> dict:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_quickstart_experiment_learns_and_wandb_records_it_offline_without_a_word_from_the_user(
    tmp_path: Path,
) -> None:
    words = ["experiment=vit_digits", "launcher.num_processes=2", "trainer.max_steps=100", "trainer.eval_every=null"]
    result = result_of(train(tmp_path, *words))
    assert result["metrics"]["eval/top1"] > 0.3
    run_dir = Path(result["run_dir"])
    (recorded,) = (run_dir / "wandb").rglob("run-*.wandb")
    assert recorded.name == f"run-{result['id']}.wandb"
    command = [Path(sys.executable).with_name("wandb"), "leet", "inspect", "--json", recorded]
    records = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "train/loss" in records
    assert "fairexp.runtime.strategies.ddp.DDP" in records  # the config, nested
    assert json.loads((run_dir / "status.json").read_text())["state"] == "finished"


def test_the_resnet_experiment_learns(tmp_path: Path) -> None:
    result = result_of(
        train(tmp_path, "experiment=resnet_digits", "trainer.max_steps=40", "tracker=none", "schedule.warmup=5")
    )
    assert result["metrics"]["eval/top1"] > 0.5


def test_one_batch_is_overfitted_and_a_model_that_cannot_is_told(tmp_path: Path) -> None:
    words = ["debug=one_batch", "model=mlp", "launcher=inline", "tracker=none"]
    done = train(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    assert "it can learn (below 0.01)" in done.stderr
    broken = train(tmp_path, *words, "optimizer.lr=0.0")
    assert broken.returncode == 1
    assert "it did not get below 0.01" in broken.stderr
    assert "Traceback" not in broken.stderr


@pytest.mark.system
@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason="needs Debian's dataset-fashion-mnist (scripts/test --system)")
def test_a_small_resnet_learns_from_the_real_fashion_images(tmp_path: Path) -> None:
    words = [
        "dataset=fashion_mnist",
        "model=resnet18",
        "model.stem=small",
        "model.width=8",
        "optimizer.lr=3e-3",
        "tracker=none",
    ]
    result = result_of(train(tmp_path, *words, "trainer.max_steps=80", "launcher.num_processes=2", "strategy=ddp"))
    assert result["metrics"]["eval/top1"] > 0.65


def test_a_folder_of_jpegs_trains_the_same_with_workers_and_without(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    generator = random.Random(0)
    for split, count in (("train", 12), ("val", 5)):
        for name, colour in (("ants", (200, 40, 40)), ("bees", (40, 40, 200)), ("ça va", (40, 200, 40))):
            folder = tmp_path / "my images" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                noisy = tuple(value + generator.randint(-30, 30) for value in colour)
                image.new("RGB", (48 + 4 * number, 64), noisy).save(
                    folder / f"{number}.{'png' if number % 2 else 'jpg'}"
                )
    words = [
        "dataset=image_folder",
        f"dataset.root='{tmp_path}/my images'",
        "dataset.num_classes=3",
        "dataset.image_size=32",
    ]
    words += [
        "model=resnet18",
        "model.stem=small",
        "model.width=8",
        "trainer.global_batch_size=12",
        "trainer.max_steps=8",
    ]
    words += ["trainer.log_every=1", "trainer.eval_every=null", "tracker=none"]
    losses = []
    for workers in (0, 2):
        result = result_of(train(tmp_path, *words, f"trainer.num_workers={workers}", f"runs_dir=runs{workers}"))
        rows = [json.loads(line) for line in (Path(result["run_dir"]) / "metrics.jsonl").read_text().splitlines()]
        losses.append([row["train/loss"] for row in rows if "train/loss" in row])
    assert losses[0] == losses[1]
