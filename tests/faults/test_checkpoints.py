"""A checkpoint is whole or not there, is never half-believed, and runs no code; scripts/faults/checkpoints does more of it."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import Fairexp, Tiny, interrupted

from fairexp.errors import RunError
from fairexp.runtime import checkpoint
from faults import damage, disks, hostile, lab, torn
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


# --- disks ---


def test_a_full_disk_costs_a_save_and_nothing_else(tmp_path: Path) -> None:
    try:
        found = disks.fill_levels(tmp_path, disks.LEVELS[::3])
    except disks.NoMount as reason:
        pytest.skip(str(reason))
    assert wrong(found) == []
    assert len(found) == 7


@pytest.mark.parametrize("trouble", disks.TROUBLES)
def test_trouble_of_one_rank_ends_all_in_the_same_line(tmp_path: Path, trouble: str) -> None:
    ended = disks.trouble_on(1, trouble, tmp_path, on_error="stop")
    assert [one.code for one in ended] == [1, 1]
    (said,) = {one.said for one in ended}
    assert said.startswith("checkpoint of step 2: ")
    assert f"step_00000002/rank_00001.safetensors: {trouble}; a checkpoint needs " in said
    assert said.endswith(" files are free\n")
    assert lab.steps(next(tmp_path.glob("tiny-*"))) == [1]


@pytest.mark.parametrize("struck", [0, 1])
def test_with_on_error_continue_training_goes_on_and_a_later_save_succeeds(tmp_path: Path, struck: int) -> None:
    first, other = disks.trouble_on(struck, "File too large", tmp_path, on_error="continue", background=bool(struck))
    assert [first.value, other.value] == [[1, 4], [1, 4]], first.said + other.said
    assert other.said == ""
    (line,) = first.lines
    assert line.startswith("not saved, training goes on: checkpoint of step 2: ")


# --- what is kept ---


def test_the_last_ones_each_third_and_the_best_are_kept(tmp_path: Path) -> None:
    path = lab.new(tmp_path / "tiny")

    def work() -> dict[str, list[int]]:
        kept = {}
        for best_is in ("min", "max"):
            run = lab.begun(path, keep_last=1, keep_every=4, keep_best=2, best_metric="eval/loss", best_is=best_is)
            for loss in (0.5, 0.1, float("nan"), 0.9, 0.3, 0.2, 0.8, 0.7, 0.6, 0.65):
                lab.train(run)
                run.final["eval/loss"] = loss
                run.evaluated = run.step if run.step != 7 else 6  # an evaluation of another step counts for nothing
                lab.saved(run)
            kept[best_is] = lab.steps(path)
            for step in lab.steps(path):
                shutil.rmtree(path / STEP.format(step))
        return kept

    assert lab.value(lab.apart(work, tmp_path)) == {"min": [2, 4, 6, 8, 10], "max": [4, 8, 10]}


def test_a_save_in_the_background_writes_the_bits_of_one_in_the_foreground(tmp_path: Path) -> None:
    path = lab.new(tmp_path / "tiny")

    def work() -> list[dict[str, bytes]]:
        run = lab.begun(path, background=True)
        lab.train(run, 2)
        found = []
        for background in (True, False):
            vars(run.checkpoint)["background"] = background
            run.saver.step = 0
            checkpoint.save(run)
            if background:
                before = lab.state(run)
                lab.train(run, 3)  # while it is written
                run.saver.finish(run)
                shutil.move(path / STEP.format(2), tmp_path / "background" / "step_00000002")
                lab.again(run)
                checkpoint.load(run, tmp_path / "background" / "step_00000002")
                assert lab.state(run) == before
        for folder in (tmp_path / "background" / "step_00000002", path / STEP.format(2)):
            files = {file.name: file.read_bytes() for file in folder.iterdir()}
            body = json.loads(files.pop("manifest.json"))["body"]
            found.append(files | {"index": json.dumps([body["files"], body["tensors"]]).encode()})
        return found

    background, foreground = lab.value(lab.apart(work, tmp_path))
    assert background == foreground


def test_two_processes_save_the_bytes_that_one_does(tmp_path: Path) -> None:
    one, two = lab.new(tmp_path / "one"), lab.new(tmp_path / "two", num_ranks=2)

    def single() -> dict[str, str]:
        run = lab.begun(one)
        lab.train(run, 2)
        lab.saved(run)
        return lab.state(run)

    state = lab.value(lab.apart(single, tmp_path))
    shutil.copytree(one / STEP.format(2), two / STEP.format(2))

    def both() -> None:
        run = lab.begun(two)
        checkpoint.restore(run)
        lab.dist.any_rank(False)  # the other has read it, too
        if run.here.first:
            (two / STEP.format(2)).rename(tmp_path / "step_00000002")
        run.saver.step = 0
        lab.saved(run)

    for fork in lab.ranks([both, both], tmp_path):
        lab.value(fork.wait())
    assert len(list((two / STEP.format(2)).glob("*.safetensors"))) == 2

    def back() -> dict[str, str]:
        run = lab.begun(one)
        checkpoint.load(run, two / STEP.format(2))
        return lab.state(run)

    assert lab.value(lab.apart(back, tmp_path)) == state


def test_a_model_that_a_checkpoint_cannot_hold_is_told_in_words(tmp_path: Path) -> None:
    path = lab.new(tmp_path / "tiny")

    def work() -> None:
        run = lab.begun(path)
        run.module.register_buffer("phases", lab.torch.zeros(3, dtype=lab.torch.complex64))
        lab.train(run)
        with pytest.raises(RunError, match=r"model\.phases is of torch\.complex64, which a checkpoint doesn't hold"):
            checkpoint.save(run)

    lab.value(lab.apart(work, tmp_path))


def test_a_checkpoint_that_was_moved_behind_a_link_is_used_and_pruned(tmp_path: Path) -> None:
    path = lab.new(tmp_path / "tiny")

    def work() -> list[int]:
        run = lab.begun(path, keep_last=1)
        lab.train(run)
        lab.saved(run)
        shutil.move(path / STEP.format(1), tmp_path / "elsewhere")
        (path / STEP.format(1)).symlink_to(tmp_path / "elsewhere")
        lab.again(run)
        checkpoint.restore(run)
        lab.train(run)
        lab.saved(run)
        return lab.steps(path)

    assert lab.value(lab.apart(work, tmp_path)) == [2]
    assert (tmp_path / "elsewhere" / "manifest.json").exists()


def test_a_run_does_not_go_on_with_other_data_and_says_what_is_other(tmp_path: Path) -> None:
    path = lab.new(tmp_path / "tiny")

    def work() -> dict[str, object]:
        run = lab.begun(path)
        data = run.fetch_training.dataset
        lab.train(run)
        lab.saved(run)
        assert "data" not in json.loads((path / STEP.format(1) / "state.json").read_text())
        data.fingerprint = {"content": "abc", "tokens": 10}
        lab.again(run)
        checkpoint.restore(run)  # of a time when it said nothing
        lab.train(run)
        lab.saved(run)
        before = lab.state(run)
        data.fingerprint = {"content": "abc", "tokens": 11, "seq_len": 8}
        with pytest.raises(RunError, match="tokens was 10, is 11, seq_len was not there, is 8") as caught:
            checkpoint.restore(run)
        assert str(caught.value).startswith("dataset.train: not the data that step_00000002 was trained on: ")
        assert {what for what, value in lab.state(run).items() if value != before[what]} == {"scalars"}
        del data.fingerprint
        with pytest.raises(
            RunError, match=r"was trained on data with a fingerprint, and dataset\.train's Digits has none"
        ):
            checkpoint.restore(run)
        checkpoint.load(run, path / STEP.format(2))  # to evaluate it anything will do
        data.fingerprint = ["abc"]
        with pytest.raises(RunError, match="the fingerprint of Digits isn't a dict of texts and whole numbers"):
            checkpoint.restore(run)
        return json.loads((path / STEP.format(2) / "state.json").read_text())["data"]

    assert lab.value(lab.apart(work, tmp_path)) == {"content": "abc", "tokens": 10}
