"""Where the time goes: traces of chosen steps, tokens a second, and the part of the GPU's peak that they make."""

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_methods import one_process

from fairexp.runtime import loop
from fairexp.runtime.peaks import PEAKS, of_name, peak_flops
from fairexp.runtime.profile import Profile

torch.set_num_threads(1)

SHORT = ("trainer.max_steps=6", "checkpoint.every=4", "trainer.eval_every=null", "model.depth=1")


def trained(folder: Path, *overrides: str) -> list[dict[str, Any]]:
    """The rows of the run's metrics; it goes on from the folder's last checkpoint."""
    run = one_process(folder, *SHORT, *overrides)
    loop.fit(run)
    run.saver.finish(run)
    run.tracker.finish(0)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def traces(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "profile").glob("*"))


def marks(folder: Path, name: str) -> set[str]:
    """The steps in a trace; all other names, too."""
    events = json.loads(gzip.decompress((folder / "profile" / name).read_bytes()))["traceEvents"]
    return {event.get("name") for event in events}


def losses(rows: list[dict[str, Any]]) -> list[float]:
    return [row["train/loss"] for row in rows if "train/loss" in row]


def test_the_chosen_steps_are_traced_and_change_no_loss(tmp_path: Path) -> None:
    plain = trained(tmp_path / "plain")
    assert traces(tmp_path / "plain") == []
    rows = trained(tmp_path / "run", "trainer.profile_steps=[2,3]")
    assert losses(rows) == losses(plain)
    assert traces(tmp_path / "run") == ["steps_2-3_rank_0.json.gz"]
    found = marks(tmp_path / "run", "steps_2-3_rank_0.json.gz")
    assert {name for name in found if str(name).startswith("step ")} == {"step 2", "step 3"}
    assert "aten::addmm" in found

    # resumed behind step 4: past [2, 3], within [4, 5], before [6, 9], whose run ends first
    shutil.rmtree(tmp_path / "run/profile")
    shutil.rmtree(tmp_path / "run/checkpoints/step_00000006")
    for steps, left in (
        ("[2,3]", []),
        ("[4,5]", ["steps_5-5_rank_0.json.gz"]),
        ("[6,9]", ["steps_6-6_rank_0.json.gz"]),
    ):
        copy = shutil.copytree(tmp_path / "run", tmp_path / steps)
        assert losses(trained(copy, f"trainer.profile_steps={steps}")) == losses(plain)
        assert traces(copy) == left


def test_a_trace_that_cannot_be_written_does_not_end_the_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "profile").touch()
    assert len(losses(trained(tmp_path, "trainer.profile_steps=[1,1]"))) == 6
    assert "profile/steps_1-1_rank_0: File exists; the run goes on" in capfd.readouterr().err


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_on_a_gpu_the_memory_is_recorded_for_the_same_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **how: calls.append(how))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).touch())
    run = one_process(tmp_path, *SHORT, "trainer.profile_steps=[2,3]")
    profile = Profile(run)
    profile.cuda = True
    for step in (1, 2):
        profile.begins(step)
        assert not profile.ends(step)
    assert calls == [{"max_entries": 100_000}]
    profile.begins(3)
    assert profile.ends(3)
    assert calls[1:] == [{"enabled": None}]
    assert traces(tmp_path) == ["steps_2-3_rank_0.json.gz", "steps_2-3_rank_0_memory.pickle"]


def test_steps_that_are_rolled_back_end_their_trace(tmp_path: Path) -> None:
    profile = Profile(one_process(tmp_path, *SHORT, "trainer.profile_steps=[2,4]"))
    for step in (2, 3):
        profile.begins(step)
    profile.begins(1)
    assert traces(tmp_path) == ["steps_2-3_rank_0.json.gz"]
    assert not profile.ends(1)


LANGUAGE = (
    "model=transformer",
    "dataset=synthetic_tokens",
    "task=next_token",
    "model.width=32",
    "model.hidden=64",
    "dataset.seq_len=16",
    "dataset.eval.num_samples=8",
    "trainer.global_batch_size=8",
)


def test_tokens_a_second_and_mfu_stand_where_they_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "peak_flops", lambda device: 1e12)
    row = trained(tmp_path / "tokens", *LANGUAGE)[0]
    assert row["perf/tokens_per_s"] == pytest.approx(16 * row["perf/samples_per_s"])
    flops = one_process(tmp_path / "tokens", *SHORT, *LANGUAGE).module.flops_per_token(16)
    assert row["perf/mfu"] == pytest.approx(flops * row["perf/tokens_per_s"] / 1e12)
    assert not {"perf/tokens_per_s", "perf/mfu"} & trained(tmp_path / "images")[0].keys()

    monkeypatch.undo()
    row = trained(tmp_path / "cpu", *LANGUAGE)[0]
    assert "perf/tokens_per_s" in row
    assert "perf/mfu" not in row


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA GH200 480GB", 989.5),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA L4", 121),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", None),  # another chip than the A10
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Tesla V100-SXM2-16GB", None),  # has no bfloat16
    ],
)
def test_peaks_go_by_the_words_of_a_name(name: str, teraflops: float | None) -> None:
    assert of_name(name) == (teraflops and pytest.approx(teraflops * 1e12))


def test_a_cpu_has_no_peak() -> None:
    assert peak_flops(torch.device("cpu")) is None
    assert len({model for model, _ in PEAKS}) == len(PEAKS)
