"""A checkpoint is whole or not there, is never half-believed, and runs no code; scripts/faults/checkpoints does more of it."""

from pathlib import Path

import pytest
from conftest import Fairexp, Tiny, interrupted

from fairexp.runtime import checkpoint
from faults import damage, hostile, lab, torn
from faults.lab import STEP, Calls

TENSORS = "rank_00000.safetensors"


def wrong(found: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(what, how) for what, how in found if how]


# --- torn ---


@pytest.mark.parametrize("keep_last", [1, 2])
def test_a_save_that_is_killed_at_any_call_leaves_its_state_or_the_one_before(tmp_path: Path, keep_last: int) -> None:
    found = torn.saves(tmp_path, keep_last)
    steps = [how for _, how in found]
    assert set(steps) == {"2", "3"}, [each for each in found if each[1] not in ("2", "3")]
    assert steps == sorted(steps), "a later kill went further back"
    calls = {call.split()[0] for call, _ in found}
    assert calls == {"mkdir", "open", "write", "fsync", "rename", "unlink", "rmdir"}
    assert len(found) > 40


def test_a_start_that_is_killed_at_any_call_changes_nothing_for_the_next(tmp_path: Path) -> None:
    found = torn.starts(tmp_path)
    assert {how for _, how in found} == {"2"}, found
    assert len(found) > 10


def test_a_save_of_two_ranks_of_which_one_is_killed_leaves_its_state_or_the_one_before(tmp_path: Path) -> None:
    found = torn.two_ranks(tmp_path, [(0, 0.3), (0, 0.75), (0, 0.9), (1, 0.5), (1, 1.0)])
    assert {how for _, how in found} == {"2", "3"}, found


def test_what_a_save_does_comes_in_an_order_that_survives_a_power_failure(tmp_path: Path) -> None:
    path = lab.new(tmp_path / "tiny")

    def work() -> list[tuple[str, str]]:
        run = lab.begun(path, keep_last=1)
        lab.build.track(run)
        lab.train(run)
        lab.saved(run)
        lab.train(run)
        calls = Calls(path)
        with calls.watched():
            lab.saved(run)
        return calls.log

    log = lab.value(lab.apart(work, tmp_path))
    draft = "attempts/0001/work/step_00000002"
    order = [
        ("fsync", f"{draft}/{TENSORS}"),
        ("fsync", f"{draft}/state.json"),
        ("fsync", f"{draft}/manifest.json"),  # last: it says what the others are
        ("fsync", draft),
        ("fsync", "metrics.jsonl"),  # the rows outlive what the checkpoint outlives
        ("rename", draft),
        ("fsync", "checkpoints"),
        ("rename", "checkpoints/step_00000001"),  # only now the one before
        ("unlink", f"attempts/0001/work/trash_1/{TENSORS}"),
    ]
    assert [log.index(call) for call in order] == sorted(log.index(call) for call in order)
    written = {file for call, file in log if call == "open" and draft in file}
    assert written == {file for call, file in order[:3]}, "a file that never reached the disk"


# --- damaged ---


def test_random_damage_is_seen_before_anything_is_loaded_and_the_checkpoint_before_is_used(tmp_path: Path) -> None:
    found = damage.random_damage(tmp_path, len(damage.DAMAGES) + 11, seed=1)
    assert wrong(found) == []
    assert len(found) == len(damage.DAMAGES) + 11


def test_where_none_is_whole_the_run_says_so_each_time_and_does_not_begin_anew(
    tiny: Tiny, fairexp: Fairexp, tmp_path: Path
) -> None:
    path = interrupted(tiny("single"), tmp_path)
    data = (path / STEP.format(10) / TENSORS).read_bytes()
    (path / STEP.format(10) / TENSORS).write_bytes(data[:-1])
    rows = (path / "metrics.jsonl").read_text()
    for attempt in (1, 2):
        ended = fairexp(*tiny("single").command, f"runs_dir={tmp_path}")
        assert ended.returncode == 1
        assert "Traceback" not in ended.stderr
        assert "no checkpoint is whole; remove the damaged ones to start from step 0" in ended.stderr
        assert (path / "metrics.jsonl").read_text() == rows, f"attempt {attempt} began anew"
    assert [folder.name for folder in (path / "checkpoints").iterdir()] == ["damaged_step_00000010"]


def test_a_checkpoint_of_a_later_fairexp_is_not_taken_for_a_damaged_one(tmp_path: Path) -> None:
    path = lab.new(tmp_path / "tiny")

    def work() -> None:
        run = lab.begun(path)
        lab.train(run)
        lab.saved(run)
        hostile.ATTACKS["schema 99"](path / STEP.format(1))
        checkpoint.restore(run)

    ended = lab.apart(work, tmp_path)
    assert (ended.code, len(ended.lines)) == (1, 1), ended.said
    assert "manifest.json: written in format 99, this fairexp's is 1" in ended.said
    assert (path / STEP.format(1)).is_dir()


# --- hostile ---


def test_every_hostile_checkpoint_ends_in_a_line_and_runs_nothing(tmp_path: Path) -> None:
    found = hostile.attacks(tmp_path)
    assert [each for each in found if each[1]] == []
    assert len(found) > 200


@pytest.mark.parametrize("attack", ["a pickle for the tensors", "an above path as a file"])
def test_a_hostile_checkpoint_ends_the_command_in_words(
    tiny: Tiny, fairexp: Fairexp, tmp_path: Path, attack: str
) -> None:
    path = interrupted(tiny("single"), tmp_path)
    hostile.ATTACKS[attack](path / STEP.format(10))
    for words, code in ((("eval", str(path)), 2), ((*tiny("single").command, f"runs_dir={tmp_path}"), 1)):
        ended = fairexp(*words)
        assert ended.returncode == code
        assert "Traceback" not in ended.stderr
        assert str(path / STEP.format(10)) in ended.stderr
    assert not list(path.rglob(hostile.MARKER))
