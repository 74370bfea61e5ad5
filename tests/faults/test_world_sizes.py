"""A run that goes on with another number of ranks sees the samples that it would have seen."""

import json
from pathlib import Path

import pytest
from conftest import TINY, Fairexp, Tiny, Trained

from fairexp.runtime.dist import Place
from fairexp.runtime.order import TrainingOrder

HERE = Path(__file__).parent
WORDS = (
    *TINY,
    "strategy=fsdp",
    "dataset.train._target_=recording.Recorded",
    "checkpoint.every=6",
    "checkpoint.background=false",
)


def test_four_ranks_then_two_then_three_take_the_same_samples_in_the_same_order(
    fairexp: Fairexp, tiny: Tiny, tmp_path: Path
) -> None:
    record = tmp_path / "record"
    record.mkdir()
    worlds = ((4, 0, 6), (2, 6, 12), (3, 12, 20))  # ranks, from which step, to which
    for ranks, begin, end in worlds:
        ended = fairexp(
            *("train", *WORDS, f"launcher.num_processes={ranks}", f"runs_dir={tmp_path}/runs"),
            cwd=HERE,
            env={"RECORD": str(record), "DIES_AFTER": str(end - begin)},
        )
        assert ended.returncode == (0 if end == 20 else 1), ended.stderr
        assert ("resumed" in ended.stderr) == (begin > 0)
    (path,) = (tmp_path / "runs").glob("*-*")
    losses = Trained(path, ()).losses
    assert list(losses) == list(range(1, 21))
    assert losses == pytest.approx(tiny("fsdp4").losses, rel=1e-5)

    order = TrainingOrder(1437, 84, 84, Place(0, 1, 0, None), seed=0)  # type: ignore[arg-type]
    expected = [part.indices.tolist() for (part,), _ in zip(order.steps(0), range(20), strict=False)]
    seen = []
    for attempt, (ranks, begin, end) in enumerate(worlds, start=1):
        shares = [(record / f"{attempt}_{rank}.jsonl").read_text().splitlines() for rank in range(ranks)]
        for step in range(end - begin):
            seen.append([index for share in shares for index in json.loads(share[step])])
    assert seen == expected
    assert sorted(index for batch in seen[:18] for index in batch) == list(range(1437))  # an epoch: each exactly once


def test_a_resume_at_step_100_000_walks_over_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    permutation = TrainingOrder.permutation
    monkeypatch.setattr(
        TrainingOrder, "permutation", lambda self, epoch: drawn.append(epoch) or permutation(self, epoch)
    )
    order = TrainingOrder(1437, 84, 84, Place(0, 1, 0, None), seed=0)  # type: ignore[arg-type]
    next(order.steps(100_000))
    assert drawn == [100_000 // 18]
