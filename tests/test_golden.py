"""Losses that stand in files: a change of the arithmetic shows as a changed digit in the commit that made it.

Compared with a relative 1e-5, since the CPU kernels of another machine or another torch sum in another order; over these
few steps that is all they change. `python tests/test_golden.py` writes the files anew.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Fairexp

FOLDER = Path(__file__).parent / "golden"
SHORT = (
    "dataset=digits",
    "strategy=single",
    "trainer.max_epochs=null",
    "trainer.log_every=1",
    "trainer.eval_every=null",
    "trainer.device=cpu",
    "launcher.num_processes=1",
    "launcher.threads_per_process=1",
    "tracker=none",
)
CONFIGS = {
    "vit_adamw_cosine": (
        "model=vit",
        "model.width=32",
        "model.depth=2",
        "trainer.max_steps=20",
        "trainer.global_batch_size=84",
    ),
    "resnet18_sgd_linear": (
        "model=resnet18",
        "model.stem=small",
        "model.width=8",
        "optimizer=sgd",
        "schedule=linear",
        "trainer.max_steps=12",
        "trainer.global_batch_size=32",
        "trainer.grad_clip_norm=null",
    ),
    "mlp_wsd_ema": (
        "model=mlp",
        "model.hidden=[64,64]",
        "schedule=wsd",
        "schedule.decay=0.3",
        "task.label_smoothing=0.1",
        "trainer.max_steps=20",
        "trainer.global_batch_size=48",
        "trainer.micro_batch_size=16",
        "trainer.ema_decay=0.9",
    ),
}


def golden_lines(name: str, fairexp: Callable[..., subprocess.CompletedProcess[str]], runs_dir: Path) -> list[str]:
    """A line with step and loss for each step of the run, then the loss of its evaluation."""
    ended = fairexp("train", *SHORT, *CONFIGS[name], f"runs_dir={runs_dir}")
    assert ended.returncode == 0, ended.stderr
    path = next(runs_dir.glob("*-*")) / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        f"{row['step']} {row['train/loss']!r}" if "train/loss" in row else f"eval {row['eval/loss']!r}" for row in rows
    ]


def numbers(lines: list[str]) -> dict[str, float]:
    return {step: float(loss) for step, loss in (line.split() for line in lines)}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_losses_are_the_committed_ones(fairexp: Fairexp, tmp_path: Path, name: str) -> None:
    golden = (FOLDER / f"{name}.txt").read_text().splitlines()
    assert numbers(golden_lines(name, fairexp, tmp_path)) == pytest.approx(numbers(golden), rel=1e-5)


def write_anew() -> None:
    """Makes the files what this checkout computes."""

    def fairexp(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "fairexp", *words]
        return subprocess.run(command, cwd=FOLDER.parents[1], capture_output=True, text=True)

    for name in CONFIGS:
        with tempfile.TemporaryDirectory() as folder:
            (FOLDER / f"{name}.txt").write_text("\n".join(golden_lines(name, fairexp, Path(folder))) + "\n")
        print(FOLDER / f"{name}.txt")


if __name__ == "__main__":
    write_anew()
