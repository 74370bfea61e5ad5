"""The command line as real processes, and tiny runs that several test files read."""

import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).parents[1]
# a shell starts what it puts into the background with ^C ignored, and children inherit that: here it works in any case
signal.signal(signal.SIGINT, signal.default_int_handler)
STRATEGIES = {
    "single": ("strategy=single", "launcher.num_processes=1"),
    "ddp2": ("strategy=ddp", "launcher.num_processes=2"),
    "ddp4": ("strategy=ddp", "launcher.num_processes=4"),
    "fsdp2": ("strategy=fsdp", "launcher.num_processes=2"),
    "fsdp4": ("strategy=fsdp", "launcher.num_processes=4"),
    "tp2": ("strategy=fsdp_tp", "launcher.num_processes=2"),
    "tp2x2": ("strategy=fsdp_tp", "launcher.num_processes=4"),
    "hybrid": ("strategy=fsdp", "strategy.shard_size=2", "launcher.num_processes=4"),
}
# 1,437 digits in steps of 84 are 18 steps an epoch: step 18 has only 9 samples, an unequal share for 2 and for 4 ranks,
# and steps 19 and 20 are of the second epoch.
TINY = (
    "model=vit",
    "model.width=32",
    "model.depth=2",
    "dataset=digits",
    "optimizer.lr=3e-3",
    "trainer.max_steps=20",
    "trainer.max_epochs=null",
    "trainer.global_batch_size=84",
    "trainer.log_every=1",
    "trainer.eval_every=10",
    "trainer.grad_clip_norm=0.4",  # some steps are clipped, some are not
    "trainer.device=cpu",
    "checkpoint.every=10",
    "launcher.threads_per_process=1",
    "tracker=none",
)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Of a user's test processes the others wait while one has a test that is marked `alone`: it says how long a command may
    take, and beside four ranks of another test a command of half a second takes three. The waiting doesn't count."""
    place, alone = Path(tempfile.gettempdir(), f"fairexp-tests-{os.getuid()}"), item.get_closest_marker("alone")
    with open(f"{place}.next", "w") as next_one, open(f"{place}.room", "w") as room:
        try:
            fcntl.flock(next_one, fcntl.LOCK_EX)  # who waits for an empty room lets nobody in before
            fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
            if not alone:
                fcntl.flock(next_one, fcntl.LOCK_UN)
            return (yield)
        finally:  # in so many words: a process that the test has forked holds the files, too
            fcntl.flock(room, fcntl.LOCK_UN)
            fcntl.flock(next_one, fcntl.LOCK_UN)


def pytest_sessionfinish() -> None:
    """A data loading process that a failed test left behind would keep this one from ending: Python waits for it."""
    for child in multiprocessing.active_children():
        child.kill()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of several test processes one runs a whole file, whose tests share their runs; and one all that share the cluster."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "slurm" if "/slurm/" in nodeid else nodeid.split("::")[0]

    return ByFile(config, log)


Fairexp = Callable[..., subprocess.CompletedProcess[str]]
Tiny = Callable[..., "Trained"]


class Trained:
    """A run's folder and what stands in it."""

    def __init__(self, path: Path, command: tuple[str, ...]):
        self.path = path
        self.command = command  # the words that made it, less runs_dir
        rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        self.steps = [row["step"] for row in rows if "train/loss" in row]
        self.losses = {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
        self.norms = {row["step"]: row["train/grad_norm"] for row in rows if "train/loss" in row}
        self.evals = {row["step"]: metrics for row in rows if (metrics := part(row, "eval/"))}

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint holds besides tensors."""
        return json.loads((self.path / f"checkpoints/step_{step:08d}/state.json").read_text())


def part(row: dict[str, Any], prefix: str) -> dict[str, float]:
    """The metrics whose names begin so."""
    return {name: value for name, value in row.items() if name.startswith(prefix)}


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a process of fairexp sees: this checkout, one thread, a home folder of its own, no word of wandb's."""
    ours = {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "HOME": str(tmp_path_factory.mktemp("home"))}
    return {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")} | ours


@pytest.fixture(scope="session")
def fairexp(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Fairexp:
    """`fairexp("train", "seed=1", cwd=folder, env={"MORE": "1"})`: the finished process with its exit code and output."""
    elsewhere = tmp_path_factory.mktemp("cwd")

    def call(*words: str, cwd: Path = elsewhere, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "fairexp", *words]
        return subprocess.run(
            command, cwd=cwd, env=environment | (env or {}), capture_output=True, text=True, timeout=240
        )

    return call


@pytest.fixture(scope="session")
def tiny(fairexp: Fairexp, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """`tiny("fsdp2", "trainer.ema_decay=0.9", cwd=folder)`: a tiny run that has finished; each is run once a session."""
    done: dict[tuple[str, ...], Trained] = {}

    def train(strategy: str, *overrides: str, **where: Any) -> Trained:
        words = ("train", *TINY, *STRATEGIES[strategy], *overrides)
        if words not in done:
            runs_dir = tmp_path_factory.mktemp(strategy)
            ended = fairexp(*words, f"runs_dir={runs_dir}", **where)
            assert ended.returncode == 0, ended.stderr
            done[words] = Trained(next(runs_dir.glob("*-*")), words)
        return done[words]

    return train


def interrupted(run: Trained, runs_dir: Path, checkpoint: Path | None = None) -> Path:
    """A copy of the run as an interruption right after step 10 would have left it; with the checkpoint of another run in
    place of its own, if one is given."""
    copy = runs_dir / run.path.name
    shutil.copytree(run.path, copy)
    (copy / "summary.json").unlink()
    shutil.rmtree(copy / "checkpoints")
    source = checkpoint or run.path / "checkpoints/step_00000010"
    shutil.copytree(source, copy / "checkpoints" / source.name)
    status = json.loads((copy / "status.json").read_text())
    (copy / "status.json").write_text(json.dumps(status | {"state": "interrupted", "step": 10}))
    return copy
