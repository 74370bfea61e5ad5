"""One config gives one curve, on whatever processes it runs: the heart of the suite. Real runs of the real command line."""

import json
from pathlib import Path

import pytest
import torch
from conftest import Fairexp, Tiny, Trained, interrupted
from torch import nn

from fairexp.errors import RunError
from fairexp.runtime.dist import Place
from fairexp.runtime.strategies.fsdp_tp import FSDPTP

FP32 = 1e-5  # relative: sums of the same numbers in another order

# 61 images in steps of 20, 41 to evaluate: the last step of an epoch has one image, and three of four ranks have none. No
# clipping: the norm is then taken for the log alone.
NEARLY_EMPTY = (
    "dataset=synthetic_images",
    "dataset.train.num_samples=61",
    "dataset.eval.num_samples=41",
    "dataset.image_size=8",
    "trainer.global_batch_size=20",
    "trainer.grad_clip_norm=null",
)
# As a user writes one: nothing of fairexp in it, its weights drawn by torch's own constructors.
PLAIN_MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.stem = nn.Linear(64, width)
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(depth)])
        self.scale = nn.Parameter(torch.rand(width))
        self.register_buffer("offset", torch.rand(64))
        self.head = nn.Linear(width, 10)

    def forward(self, images):
        x = self.stem(images.flatten(1) + self.offset)
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.head(x * self.scale)
"""
PLAIN = ("--config-dir=configs", "model=net")
# 205 texts in steps of 20, 41 to evaluate: unequal shares again. 61 words and a hidden width of 46 are cut into 31 and 30, 23
# and 23, and sharded unequally.
TEXT = (
    "model=transformer",
    "model.hidden=46",
    "model.tied=false",
    "task=next_token",
    "dataset=synthetic_tokens",
    "dataset.vocab_size=61",
    "dataset.seq_len=16",
    "dataset.train.num_samples=205",
    "dataset.eval.num_samples=41",
    "trainer.global_batch_size=20",
)


def same_curve(run: Trained, reference: Trained, relative: float = FP32) -> None:
    """Fails with the steps where the two part."""
    assert run.steps == reference.steps
    assert run.losses == pytest.approx(reference.losses, rel=relative)
    assert run.norms == pytest.approx(reference.norms, rel=10 * relative)
    assert run.evals.keys() == reference.evals.keys() != set()
    for step, metrics in reference.evals.items():
        assert run.evals[step] == pytest.approx(metrics, rel=relative)


@pytest.mark.parametrize("strategy", ["ddp2", "ddp4", "fsdp2", "fsdp4", "hybrid"])
def test_every_strategy_gives_the_curve_of_a_single_process(tiny: Tiny, strategy: str) -> None:
    same_curve(tiny(strategy), tiny("single"))


@pytest.mark.parametrize("strategy", ["single", "ddp2", "hybrid"])
def test_accumulation_gives_the_curve_of_whole_batches(tiny: Tiny, strategy: str) -> None:
    same_curve(tiny(strategy, "trainer.micro_batch_size=7"), tiny("single"))


@pytest.mark.parametrize("strategy", ["ddp4", "fsdp4"])
def test_ranks_without_a_sample_change_nothing(tiny: Tiny, strategy: str) -> None:
    same_curve(tiny(strategy, *NEARLY_EMPTY), tiny("single", *NEARLY_EMPTY))


@pytest.mark.parametrize("option", ["strategy.cpu_offload=true", "strategy.reshard_after_forward=false"])
def test_where_fsdp_keeps_its_parameters_changes_nothing(tiny: Tiny, option: str) -> None:
    same_curve(tiny("fsdp2", option), tiny("single"))


@pytest.mark.parametrize("strategy", ["ddp2", "fsdp2"])
def test_recomputed_activations_meet_the_same_dropout_masks(tiny: Tiny, strategy: str) -> None:
    dropout = "model.dropout=0.1"
    again, plain = tiny(strategy, dropout, "trainer.activation_checkpointing=blocks"), tiny(strategy, dropout)
    assert (again.losses, again.norms, again.evals) == (plain.losses, plain.norms, plain.evals)


def test_fsdp_in_bf16_stays_near_and_is_bf16(tiny: Tiny) -> None:
    bf16, fp32 = tiny("fsdp2", "strategy.param_dtype=bf16"), tiny("single")
    assert bf16.losses == pytest.approx(fp32.losses, rel=2e-2)
    apart = [abs(bf16.losses[step] / fp32.losses[step] - 1) for step in fp32.steps]
    assert max(apart) > 10 * FP32, "these are fp32's losses"


@pytest.mark.slow
@pytest.mark.parametrize("memory", [(), ("trainer.activation_checkpointing=blocks",)])
def test_compiled_blocks_give_the_same_curve(tiny: Tiny, memory: tuple[str, ...]) -> None:
    same_curve(tiny("fsdp2", "trainer.compile=blocks", *memory), tiny("single"))


@pytest.mark.parametrize("strategy", ["ddp2", "fsdp2"])
def test_the_averaged_weights_evaluate_alike_and_leave_the_training_alone(tiny: Tiny, strategy: str) -> None:
    # evaluated beside the checkpoints: saving one makes FSDP gather its weights again, and would hide stale ones
    every = "trainer.eval_every=7"
    averaged, plain = tiny("single", "trainer.ema_decay=0.9", every), tiny("single")
    same_curve(tiny(strategy, "trainer.ema_decay=0.9", every), averaged)
    assert averaged.losses == plain.losses
    assert averaged.evals[20]["eval/loss"] != pytest.approx(plain.evals[20]["eval/loss"], rel=10 * FP32)


@pytest.fixture(scope="session")
def paper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A paper's repository with a model that knows nothing of fairexp."""
    folder = tmp_path_factory.mktemp("paper")
    (folder / "paper").mkdir()
    (folder / "paper/__init__.py").touch()
    (folder / "paper/models.py").write_text(PLAIN_MODEL)
    (folder / "configs/model").mkdir(parents=True)
    (folder / "configs/model/net.yaml").write_text("_target_: paper.models.Net\nwidth: 48\ndepth: 2\n")
    return folder


@pytest.mark.parametrize("strategy", ["ddp2", "fsdp2"])
def test_a_plain_module_starts_and_trains_alike(tiny: Tiny, paper: Path, strategy: str) -> None:
    same_curve(tiny(strategy, *PLAIN, cwd=paper), tiny("single", *PLAIN, cwd=paper))


def test_layers_cut_over_ranks_give_the_curve_of_a_single_process(tiny: Tiny) -> None:
    same_curve(tiny("tp2x2", *TEXT), tiny("single", *TEXT))


def test_what_cut_layers_have_saved_resumes_on_another_mesh_and_is_evaluated_on_none(
    tiny: Tiny, fairexp: Fairexp, tmp_path: Path
) -> None:
    run = tiny("tp2x2", *TEXT)
    path = interrupted(run, tmp_path)
    ended = fairexp(*run.command, "launcher.num_processes=2", f"runs_dir={tmp_path}")
    assert ended.returncode == 0, ended.stderr
    assert "steps 10 -> 20 (resumed)" in ended.stderr
    same_curve(Trained(path, run.command), tiny("single", *TEXT))
    ended = fairexp("eval", str(run.path), "--json")
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["metrics"] == pytest.approx(run.evals[20], rel=FP32)


def test_with_dropout_ranks_of_a_group_draw_alike_and_resume_bit_for_bit(
    tiny: Tiny, fairexp: Fairexp, tmp_path: Path
) -> None:
    # the one state of generators that a group saves is each rank's: one that had drawn otherwise would go on otherwise
    run = tiny("tp2", *TEXT, "model.dropout=0.2")
    path = interrupted(run, tmp_path)
    ended = fairexp(*run.command, f"runs_dir={tmp_path}")
    assert ended.returncode == 0, ended.stderr
    assert "steps 10 -> 20 (resumed)" in ended.stderr
    assert Trained(path, run.command).losses == run.losses


def test_a_model_that_does_not_say_how_it_is_cut_is_told() -> None:
    here = Place(0, 1, 0, torch.device("cpu"))
    model = nn.ModuleDict({"a": nn.Linear(2, 2)})
    with pytest.raises(RunError, match=r"ModuleDict doesn't say how its layers are cut .* give strategy.plan: globs"):
        FSDPTP(1).cut(model, here)
    with pytest.raises(RunError, match=r"no module matches 'b'; modules: a"):
        FSDPTP(1, plan={"b": "colwise"}).cut(model, here)
    with pytest.raises(RunError, match="'a' has 'columns'; takes colwise, "):
        FSDPTP(1, plan={"a": "columns"}).cut(model, here)
