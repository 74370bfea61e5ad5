"""Optimizers and training methods in whole runs: the same curve under every strategy, the same bits after an interruption.

The runs of several ranks are one sweep, whose pool starts its processes once; those of one process are made in this one.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import STRATEGIES, TINY, Fairexp, Trained
from test_strategies import FP32, same_curve

from fairexp.config import attempt
from fairexp.config.compose import compose
from fairexp.config.rundir import RunDir
from fairexp.errors import RunError
from fairexp.runtime import build, checkpoint, data, dist, loop, order
from fairexp.runtime.evaluation import evaluate_checkpoint
from fairexp.runtime.preempt import Stop

torch.set_num_threads(1)

METHODS = {
    "muon": ("optimizer=muon", "optimizer.layer_decay=0.8", "optimizer.groups=[{match:head.*,lr:5e-3}]"),
    "schedule_free": ("optimizer=schedule_free_adamw", "schedule=constant", "schedule.warmup=5"),
}
every_method = pytest.mark.parametrize("method", METHODS)


def one_process(folder: Path, *overrides: str) -> build.Run:
    """A tiny run of this process, ready to train; it goes on from the folder's last checkpoint."""
    for made in ("checkpoints", "logs", "submit"):
        (folder / made).mkdir(parents=True, exist_ok=True)
    run_dir = RunDir(folder, attempt.workspace(folder, attempt.take(folder)))
    config = compose([*TINY, *STRATEGIES["single"], *overrides]).config
    run = build.build(run_dir, config, dist.place("cpu"), Stop())
    checkpoint.restore(run)
    build.track(run)
    return run


def test_an_evaluation_of_a_run_with_workers_reads_in_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_by(folder: Path, *overrides: str) -> tuple[dict[str, float], int]:
        run = one_process(folder, *overrides)
        digits, note = run.fetch_evaluation.dataset, folder / "processes"

        class OneByOne:
            def __len__(self) -> int:
                return 40

            def __getitem__(self, index: int) -> Any:
                with open(note, "a") as file:
                    file.write(f"{os.getpid()}\n")
                images, labels = digits.__getitems__(torch.tensor([index]))
                return images[0], labels[0]

        run.fetch_evaluation = data.Fetcher(OneByOne(), None, 0)
        run.evaluation = order.EvaluationOrder(40, 8, run.here)
        return loop.evaluate(run), len(set(note.read_text().split()) - {str(os.getpid())})

    alone, none = read_by(tmp_path / "0")
    shared, two = read_by(tmp_path / "2", "trainer.num_workers=2")
    assert (none, two) == (0, 2)
    assert shared == alone


def train(folder: Path, *overrides: str) -> Trained:
    """The tiny run, trained to its end in this process."""
    run = one_process(folder, *overrides)
    loop.fit(run)
    run.saver.finish(run)
    run.tracker.finish(0)
    return Trained(folder, (*TINY, *STRATEGIES["single"], *overrides))


def end(run: Trained) -> dict[str, Any]:
    """The digests of its last checkpoint's tensors: weights, optimizer and generators."""
    manifest = (run.path / "checkpoints/step_00000020/manifest.json").read_text()
    return {name: entry for name, entry in json.loads(manifest)["body"]["files"].items() if name.startswith("rank_")}


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    """Each method in one process."""
    return {name: train(tmp_path_factory.mktemp(name), *words) for name, words in METHODS.items()}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The command that trains each method under DDP and FSDP on 2 ranks."""
    folder = tmp_path_factory.mktemp("sweep")
    runs = [[*STRATEGIES[strategy], *words] for strategy in ("ddp2", "fsdp2") for words in METHODS.values()]
    (folder / "configs/sweep").mkdir(parents=True)
    (folder / "configs/sweep/methods.yaml").write_text(json.dumps({"overrides": TINY, "runs": runs}))
    return ("train", "-m", f"--config-dir={folder}/configs", "sweep=methods", f"runs_dir={folder}/runs", "--follow")


@pytest.fixture(scope="module")
def ranks(fairexp: Fairexp, sweep: tuple[str, ...]) -> dict[tuple[str, str], Trained]:
    """The sweep's runs by strategy and method."""
    ended = fairexp(*sweep)
    assert ended.returncode == 0, ended.stderr
    found = {}
    for path in Path(sweep[-2].removeprefix("runs_dir=")).glob("*-*"):
        config = RunDir(path).config()
        method = "muon" if "muon" in config["optimizer"]["_target_"] else "schedule_free"
        found[config["strategy"]["_target_"].rpartition(".")[2], method] = Trained(path, sweep)
    assert len(found) == 4
    return found


@every_method
def test_a_method_gives_the_same_curve_under_every_strategy(
    single: dict[str, Trained], ranks: dict[tuple[str, str], Trained], method: str
) -> None:
    # Muon rounds to bfloat16, where a last bit of another gradient may become a larger one
    relative = 1e-4 if method == "muon" else FP32
    for strategy in ("DDP", "FSDP"):
        same_curve(ranks[strategy, method], single[method], relative)


@every_method
def test_an_interrupted_method_goes_on_to_the_same_bits(
    single: dict[str, Trained], tmp_path: Path, method: str
) -> None:
    whole = single[method]
    shutil.copytree(whole.path, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy/checkpoints/step_00000020")
    resumed = train(tmp_path / "copy", *METHODS[method])
    assert resumed.losses == whole.losses
    assert end(resumed) == end(whole)


def test_sharded_methods_go_on_to_the_same_bits(
    fairexp: Fairexp, sweep: tuple[str, ...], ranks: dict[tuple[str, str], Trained]
) -> None:
    before = {key: (run.losses, run.evals, end(run)) for key, run in ranks.items() if key[0] == "FSDP"}
    for key in before:
        path = ranks[key].path
        (path / "summary.json").unlink()
        shutil.rmtree(path / "checkpoints/step_00000020")
        status = json.loads((path / "status.json").read_text())
        (path / "status.json").write_text(json.dumps(status | {"state": "interrupted", "step": 10}))
    ended = fairexp(*sweep)
    assert ended.returncode == 0, ended.stderr
    for key, (losses, evals, files) in before.items():
        resumed = Trained(ranks[key].path, sweep)
        assert (resumed.losses, resumed.evals) == (losses, evals)
        assert end(resumed) == files


def test_how_often_a_schedule_free_run_evaluates_and_saves_changes_no_bit(
    single: dict[str, Trained], tmp_path: Path
) -> None:
    often = train(tmp_path, *METHODS["schedule_free"], "trainer.eval_every=3", "checkpoint.every=4")
    assert often.losses == single["schedule_free"].losses
    assert often.evals[20] == single["schedule_free"].evals[20]


def test_a_schedule_free_run_is_evaluated_at_the_average_also_from_its_checkpoint(
    single: dict[str, Trained], tmp_path: Path
) -> None:
    run = single["schedule_free"]
    config = compose(run.command).config
    metrics = evaluate_checkpoint(RunDir(run.path), config, run.path / "checkpoints/step_00000020", [])
    assert metrics == run.evals[20]
    live = one_process(tmp_path, *METHODS["schedule_free"])
    checkpoint.load(live, run.path / "checkpoints/step_00000020")
    weight, z = live.module.head.weight, live.optimizer.state[live.module.head.weight]["z"]
    held = weight.clone()
    with live.averaged():
        torch.testing.assert_close(weight * 0.9 + z * 0.1, held)  # y = beta x + (1 - beta) z
        assert not torch.equal(weight, held)
    assert torch.equal(weight, held)
    with pytest.raises(RunError, match=r"trainer.ema_decay: the optimizer averages the weights itself"):
        one_process(tmp_path, *METHODS["schedule_free"], "trainer.ema_decay=0.9")


def test_groups_and_layers_have_their_learning_rates_times_the_schedule(single: dict[str, Trained]) -> None:
    groups = single["muon"].state(10)["param_groups"]
    of = {name: group for group in groups for name in group["params"]}
    assert of["head.weight"]["initial_lr"] == 5e-3
    assert of["norm.weight"]["initial_lr"] == 3e-3
    assert of["blocks.0.attn.qkv.weight"]["initial_lr"] == pytest.approx(3e-3 * 0.8**2)
    assert of["pos_embed"]["initial_lr"] == pytest.approx(3e-3 * 0.8**3)
    assert len({group["lr"] / group["initial_lr"] for group in groups}) == 1
    assert [of[name]["muon"] for name in ("blocks.1.mlp.fc1.weight", "head.weight")] == [True, False]
