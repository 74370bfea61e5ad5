"""A loss or gradient norm gone wrong is one decision of all ranks, written down, and the same again after a kill."""

import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import STRATEGIES, TINY, Fairexp, Trained

from fairexp.config import schema
from fairexp.errors import RunError
from fairexp.runtime import dist
from fairexp.runtime.dist import Place
from fairexp.runtime.guard import Guard, spike_limit
from fairexp.runtime.order import Part, TrainingOrder
from fairexp.runtime.preempt import SIGNALS, Stop

# Digits of which some are multiplied by NaN, or by a number that makes a spike of their batch. A rank that is asked for the
# sample KILL_ON is killed, once.
DATASET = '''
import os
import signal

from torch import nn

from fairexp.datasets.digits import Digits


class Poisoned(Digits):
    def __init__(self, split, nan, large):
        super().__init__(split)
        self.images[nan] *= float("nan")
        self.images[large] *= 1e4

    def __getitems__(self, indices):
        if int(os.environ.get("KILL_ON", "-1")) in indices and not os.path.exists("killed"):
            open("killed", "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitems__(indices)


class Normed(nn.Module):
    """With a batch norm, whose statistics a forward pass changes."""

    def __init__(self, hidden, dropout):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))

    def forward(self, images):
        return self.layers(images)
'''
YAML = """\
defaults:
  - digits
  - _self_
train:
  _target_: poison.Poisoned
  nan: []
  large: []
"""
BATCH = 84  # samples; 18 batches an epoch
NAN_BATCH, LARGE_BATCH = 6, 11  # step 7 is the first to take the one; step 12 the other, where no batch is left out
WORLDS = {"single": ("launcher=inline",), "ddp2": STRATEGIES["ddp2"], "fsdp2": STRATEGIES["fsdp2"]}
SETTINGS = (
    *(word for word in TINY if not word.startswith("model")),
    "model=mlp",  # without the vit's layer norms, which make little of a large sample
    "model.hidden=[32]",
    "model.dropout=0.1",
    "dataset=poisoned",
    "trainer.max_steps=16",
    "trainer.eval_every=null",
    "checkpoint.every=4",
    "guard.spike_window=8",
    "guard.spike_factor=50",  # the first steps are restless
)


def order(world_size: int) -> TrainingOrder:
    return TrainingOrder(1437, BATCH, BATCH, Place(0, world_size, 0, torch.device("cpu")), seed=0)


def sample(batch: int) -> int:
    """One of the batch's last samples: rank 1 of 2 has it."""
    return order(1).samples(batch)[1][0][-3]


BAD = (f"dataset.train.nan=[{sample(NAN_BATCH)}]", f"dataset.train.large=[{sample(LARGE_BATCH)}]")


class Ended:
    """A command that has ended, and its run's folder."""

    def __init__(self, runs_dir: Path, code: int, said: str):
        self.path = next(runs_dir.glob("*-*"))
        self.code = code
        self.said = said

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.path / "events.jsonl").read_text().splitlines()]

    @property
    def decisions(self) -> list[tuple[int, str, str, int]]:
        return [(event["step"], event["what"], event["policy"], event["batch"]) for event in self.events]

    @property
    def trained(self) -> Trained:
        return Trained(self.path, ())

    @property
    def losses(self) -> dict[int, str]:
        """To the last bit."""
        return {step: float(loss).hex() for step, loss in self.trained.losses.items()}

    @property
    def checkpoints(self) -> list[int]:
        return sorted(int(path.name.rpartition("_")[2]) for path in (self.path / "checkpoints").glob("step_*"))


Train = Callable[..., Ended]


def training_in(folder: Path, fairexp: Fairexp) -> Train:
    """`train("ddp2", "guard.nonfinite=skip", kill_on=17)` in a folder with the data set; called again, it resumes."""
    (folder / "configs/dataset").mkdir(parents=True)
    (folder / "configs/dataset/poisoned.yaml").write_text(YAML)
    (folder / "poison.py").write_text(DATASET)
    (folder / "configs/model").mkdir()
    (folder / "configs/model/normed.yaml").write_text("_target_: poison.Normed\nhidden: null\ndropout: null\n")

    def train(world: str, *overrides: str, kill_on: int | None = None) -> Ended:
        words = ("train", "--config-dir", "configs", *SETTINGS, *WORLDS[world], *overrides)
        ended = fairexp(*words, cwd=folder, env={} if kill_on is None else {"KILL_ON": str(kill_on)})
        return Ended(folder / "runs", ended.returncode, ended.stderr)

    return train


@pytest.fixture
def train(fairexp: Fairexp, tmp_path: Path) -> Train:
    return training_in(tmp_path, fairexp)


@pytest.fixture(scope="session")
def whole(fairexp: Fairexp, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Ended]:
    """`whole("skip", "ddp2")`: the run with both bad batches that nothing interrupted; each is run once a session."""
    done: dict[tuple[str, str], Ended] = {}

    def get(policy: str, world: str) -> Ended:
        if (policy, world) not in done:
            train = training_in(tmp_path_factory.mktemp(f"{policy}_{world}"), fairexp)
            done[policy, world] = train(world, *BAD, *both(policy))
        return done[policy, world]

    return get


def both(policy: str) -> tuple[str, str]:
    return f"guard.nonfinite={policy}", f"guard.spike={policy}"


# --- stop


@pytest.mark.parametrize("world", ["ddp2", "fsdp2"])
def test_a_nan_on_one_rank_stops_the_run_before_it_is_applied_or_saved(train: Train, world: str) -> None:
    ended = train(world, *BAD)
    assert ended.code == 1
    file = ended.path / "events.jsonl"
    line = f"step 7: the loss is nan on rank 1 (guard.nonfinite=stop); the batch's samples are in {file}"
    assert line in ended.said
    assert "Traceback" not in ended.said
    assert ended.checkpoints == [4]
    (event,) = ended.events
    assert (event["step"], event["policy"], event["epoch"], event["batch"]) == (7, "stop", 0, NAN_BATCH)
    assert event["value"] == "NaN"
    assert [loss == "NaN" for loss in event["losses"]] == [False, True]
    assert event["samples"] == order(2).samples(NAN_BATCH)[1]
    assert sample(NAN_BATCH) in event["samples"][1]


def test_a_nan_that_no_norm_shows_stops_all_ranks_where_they_meet(train: Train) -> None:
    ended = train("ddp2", *BAD, "trainer.grad_clip_norm=null", "trainer.log_every=100", "checkpoint.every=5")
    assert ended.code == 1
    assert "step 7: the loss is nan on rank 1 (guard.nonfinite=stop)" in ended.said
    assert ended.checkpoints == [5]
    assert ended.events[0]["samples"] == order(2).samples(NAN_BATCH)[1]


def test_a_spike_stops_the_run(train: Train) -> None:
    ended = train("single", BAD[1], "guard.spike=stop")
    assert ended.code == 1
    assert "step 12: the loss is " in ended.said
    (event,) = ended.events
    assert event["value"] > event["limit"]
    assert f"above {event['limit']:.6g} (guard.spike=stop)" in ended.said


# --- skip and rollback


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_all_worlds_decide_alike(whole: Callable[[str, str], Ended], policy: str) -> None:
    # a batch that is left out moves the later ones forward by a step
    spike_at = LARGE_BATCH + (1 if policy == "skip" else 0)
    decisions = [(7, "loss", policy, NAN_BATCH), (spike_at, "loss", policy, LARGE_BATCH)]
    for world in WORLDS:
        ended = whole(policy, world)
        assert ended.code == 0, ended.said
        assert ended.decisions == decisions
        bad = {7, 12} if policy == "skip" else set()
        good = {step: loss for step, loss in ended.trained.losses.items() if step not in bad}
        assert list(ended.trained.losses) == list(range(1, 17))
        assert all(loss < 3 for loss in good.values())
        assert all(not float(loss) < 3 for step, loss in ended.trained.losses.items() if step in bad)


def test_a_rollback_is_as_if_the_batch_had_never_been_there(whole: Callable[[str, str], Ended], train: Train) -> None:
    elsewhere = train("single", *BAD, *both("rollback"), "checkpoint.every=3")
    assert elsewhere.losses == whole("rollback", "single").losses
    assert elsewhere.decisions == whole("rollback", "single").decisions
    order_of_run = order(1)
    order_of_run.left_out = [NAN_BATCH, LARGE_BATCH]
    assert elsewhere.trained.state(16)["guard"]["left_out"] == order_of_run.left_out


@pytest.mark.parametrize(
    ("policy", "world", "batch"),
    [
        ("rollback", "fsdp2", LARGE_BATCH + 1),  # right after the second rollback; the first is in the checkpoint
        ("skip", "ddp2", LARGE_BATCH + 2),  # the window and the count are in the checkpoint
    ],
)
def test_a_killed_run_ends_as_the_one_that_was_not(
    whole: Callable[[str, str], Ended], train: Train, policy: str, world: str, batch: int
) -> None:
    words = (world, *BAD, *both(policy), "launcher=local")
    killed = train(*words, kill_on=sample(batch))
    assert killed.code == 1
    assert "SIGKILL" in killed.said
    resumed = train(*words)
    assert resumed.code == 0, resumed.said
    assert "(resumed)" in resumed.said
    assert resumed.losses == whole(policy, world).losses
    assert set(resumed.decisions) == set(whole(policy, world).decisions)
    assert resumed.trained.state(16)["guard"] == whole(policy, world).trained.state(16)["guard"]


def test_the_event_after_the_last_allowed_one_stops_the_run(train: Train) -> None:
    ended = train("single", *BAD, *both("skip"), "guard.max_events=1")
    assert ended.code == 1
    assert "(guard.spike=skip, but guard.max_events=1 is reached)" in ended.said
    assert [policy for _, _, policy, _ in ended.decisions] == ["skip", "stop"]
    ended = train("single", *BAD, *both("skip"), "guard.max_events=2")  # the same run goes on
    assert ended.code == 0, ended.said
    assert [policy for _, _, policy, _ in ended.decisions] == ["skip", "stop", "skip"]


def test_there_may_be_no_checkpoint_to_go_back_to(train: Train) -> None:
    ended = train("single", *BAD, *both("rollback"), "checkpoint.every=null")
    assert ended.code == 1
    assert "(guard.nonfinite=rollback, but there is no checkpoint yet)" in ended.said
    assert ended.checkpoints == []


def test_a_skipped_step_leaves_no_trace_in_a_batch_norm(train: Train) -> None:
    ended = train("single", BAD[0], "guard.nonfinite=skip", "model=normed")
    assert ended.code == 0, ended.said
    assert ended.decisions == [(7, "loss", "skip", NAN_BATCH)]
    assert ended.trained.evals[16]["eval/loss"] < 3


def test_half_precision_overflows_without_an_event(train: Train) -> None:
    # the first scale, 65,536, makes some gradients infinite; the loss scaler skips those steps and comes down
    ended = train(
        "single", *BAD, *both("skip"), "trainer.precision=fp16", "trainer.max_steps=40", "guard.spike_factor=1000"
    )
    assert ended.code == 0, ended.said
    assert ended.decisions[0] == (7, "loss", "skip", NAN_BATCH)


def test_a_loss_that_is_not_a_number_has_not_overfitted_a_batch(train: Train) -> None:
    ended = train("single", f"dataset.train.nan=[{sample(0)}]", "debug=one_batch", "dataset.augment=null")
    assert ended.code == 1
    assert "loss nan -> nan" in ended.said
    assert "did not get below" in ended.said


# --- without a process


@pytest.fixture
def run_on_gpu(tmp_path: Path) -> Any:
    """As much of a run on a GPU as the guard asks for; its numbers are this machine's."""
    module = torch.nn.Linear(2, 2)
    run = SimpleNamespace(here=Place(0, 1, 0, torch.device("cuda")), trainer=SimpleNamespace(precision="fp32"), step=0)
    run.module, run.parameters = module, dict(module.named_parameters())
    run.training, run.dir = order(1), SimpleNamespace(path=tmp_path)
    run.guard = Guard(run, schema.Guard("stop", "off", 10.0, 100, 10))  # type: ignore[arg-type]
    return run


def test_what_was_not_read_at_once_names_the_first_bad_step_at_the_next_check(run_on_gpu: Any) -> None:
    one, bad = torch.tensor(1.0), torch.tensor(math.nan)
    for run_on_gpu.step in range(8):
        assert run_on_gpu.guard.accepts(one if run_on_gpu.step < 6 else bad, bad if run_on_gpu.step == 4 else one)
    with pytest.raises(
        RunError, match=r"^step 5: the gradient norm is nan \(guard.nonfinite=stop\); the batch's samples"
    ):
        run_on_gpu.guard.check_before_save()
    (event,) = map(json.loads, (run_on_gpu.dir.path / "events.jsonl").read_text().splitlines())
    assert event["samples"] == order(1).samples(4)[1]


def test_weights_that_are_not_finite_are_not_saved(run_on_gpu: Any) -> None:
    run_on_gpu.step = 3
    run_on_gpu.guard.check_before_save()
    with torch.no_grad():
        run_on_gpu.module.bias[1] = math.inf
    with pytest.raises(RunError, match=r"^step 3: the largest weight is inf"):
        run_on_gpu.guard.check_before_save()


def test_a_signal_is_noticed_at_once_after_a_return_to_an_earlier_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "alone", lambda: False)
    monkeypatch.setattr(dist, "max_over_ranks", lambda values: values)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        stop = Stop().listen()
        for step in range(1000, 1010):  # of quick steps it wouldn't look at the next hundred
            assert not stop.agreed(step)
        stop.goes_back()
        assert not stop.agreed(500)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed(501)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)


# --- pure functions


def test_the_limit_is_above_the_median_by_robust_deviations() -> None:
    values = torch.randn(10_001, generator=torch.Generator().manual_seed(0)).mul(2).add(5).tolist()
    assert spike_limit(values, 3) == pytest.approx(5 + 3 * 2, rel=0.02)
    assert spike_limit([1.0, 2.0, 3.0, 4.0, 100.0], 1) == pytest.approx(3 + 1.4826)


def test_outliers_hardly_move_the_limit() -> None:
    values = [math.sin(k) for k in range(100)]
    assert spike_limit([*values[:80], *[1e9] * 20], 5) < 2 * spike_limit(values, 5)


def test_after_a_flat_stretch_a_small_change_is_no_spike() -> None:
    assert spike_limit([2.0] * 10, 10) == pytest.approx(2.2)
    assert spike_limit([-2.0] * 10, 10) == pytest.approx(-1.8)


@pytest.mark.parametrize("left_out", [[], [0], [6, 11], [7, 6], [16, 17, 18, 19], [17, 40]])
def test_the_order_goes_on_without_what_is_left_out(left_out: list[int]) -> None:
    def batches(of: TrainingOrder, first: int, num: int) -> list[tuple[int, list[int]]]:
        steps = of.steps(first)
        return [flat(next(steps)) for _ in range(num)]

    def flat(parts: list[Part]) -> tuple[int, list[int]]:
        return parts[0].epoch, [index for part in parts for index in part.indices.tolist()]

    everything = batches(order(1), 0, 50)
    without = order(1)
    without.left_out = left_out
    wanted = [batch for number, batch in enumerate(everything) if number not in left_out]
    for first in (0, 5, 6, 16, 20):
        assert batches(without, first, 20) == wanted[first : first + 20]
        epoch, (samples,) = without.samples(without.batch_of(first))
        assert (epoch, samples) == wanted[first]
