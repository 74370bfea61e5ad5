"""kill -9 at random moments changes no bit of what a training gives; scripts/faults/kills does it by the hundred."""

from pathlib import Path

import pytest

from faults.kills import STEPS, difference, train

CASES = {
    "fsdp": (
        ("strategy=fsdp", "trainer.num_workers=2", "checkpoint.background=true"),
        ("a rank", "inside a save", "the launcher"),
    ),
    "ddp": (("strategy=ddp", "trainer.num_workers=0", "checkpoint.background=false"), ("all ranks", "inside a save")),
}


@pytest.mark.parametrize("case", CASES)
def test_a_training_that_was_killed_ends_with_the_bits_of_one_that_was_not(
    case: str, environment: dict[str, str], tmp_path: Path
) -> None:
    words, kills = CASES[case]
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    calm.mkdir()
    killed.mkdir()
    # the other number of workers and way of saving: they must change nothing either
    reference = train((words[0], "trainer.num_workers=0", "checkpoint.background=true"), calm, environment)
    result = train(words, killed, environment, kills, seed=len(case))
    assert result.kills == list(kills), "all came in time"
    assert list(result.losses) == list(range(1, STEPS + 1))
    assert difference(reference, result) is None
    assert result.recomputed <= len(kills) * 2 * 6, (
        "more than since the last checkpoint, or the one that was being written"
    )
