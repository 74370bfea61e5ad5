"""Only the newest attempt writes, whatever became of those before; scripts/faults/checkpoints does more of it."""

import fcntl
import time
from pathlib import Path

import pytest

from fairexp.config import rundir
from faults import fences, lab


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> tuple[fences.Result, int]:
    return fences.undisturbed(tmp_path_factory.mktemp("calm") / "run", 1)


# just begun, in the middle, about to say how it ended
@pytest.mark.parametrize(("part", "goes_on"), [(0.04, 2), (0.3, 0), (0.6, 1), (0.99, 2)])
def test_an_attempt_that_lives_on_leaves_no_trace(
    tmp_path: Path, calm: tuple[fences.Result, int], part: float, goes_on: int
) -> None:
    where, wrong = fences.split_brain(tmp_path / "split", 1, part, fences.GOES_ON[goes_on], calm)
    assert wrong == "", where


def test_nor_does_one_of_two_ranks(tmp_path: Path) -> None:
    ((where, wrong),) = fences.split_brains(tmp_path, count=1, num_ranks=2, seed=5)
    assert wrong == "", where


def test_no_two_attempts_have_a_number_and_only_the_newest_publishes(tmp_path: Path) -> None:
    found = fences.contended(tmp_path, processes=8, takes=10)
    assert sorted(one.number for one in found) == list(range(1, 81))
    published = [one for one in found if one.published]
    for one in published:
        later = [other for other in found if other.number > one.number and other.returned < one.tried]
        assert later == [], "it published although a later one had begun"
    assert max(one.number for one in published) == 80
    names = {file.name for file in (tmp_path / "contended").glob("published_*")}
    assert names == {f"published_{one.number}" for one in published}


def test_a_stopped_process_that_holds_the_lock_of_the_status_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = lab.RunDir(lab.new(tmp_path / "tiny"))
    monkeypatch.setattr(rundir, "_patience_s", 0.5)

    def change() -> float:
        began = time.monotonic()
        for step in range(20):
            run.set_status(step=step)
        return time.monotonic() - began

    with open(run.submit / "status.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        seconds = lab.value(lab.apart(change, tmp_path, seconds=30))
    assert 0.5 < seconds < 9, "it waited for each change"
    assert run.status()["step"] == 19
