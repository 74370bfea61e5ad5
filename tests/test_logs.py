"""The verb `logs`: which file it prints, and what it does while that file grows, ends, or isn't there."""

import contextlib
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fairexp.config import rundir
from fairexp.config.rundir import RunDir
from fairexp.errors import UserError
from fairexp.runs.logs import logs, spans

PROGRAM = """
import sys
from pathlib import Path
from fairexp.config.rundir import RunDir
from fairexp.runs.logs import logs
path, rank, follow, attempt = sys.argv[1:]
sys.exit(logs(RunDir(Path(path)), int(rank) if rank else None, bool(follow), int(attempt) if attempt else None))
"""


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run that has just been submitted."""
    return rundir.create(tmp_path / "runs/vit_digits-3f9a1c02", {"seed": 0}, "fairexp train", {"num_processes": 2}, {})


def write(run: RunDir, attempt: int, *texts: str, state: str = "finished") -> None:
    """The logs of an attempt's ranks."""
    for rank, text in enumerate(texts):
        (run.logs / f"rank_{rank}.attempt_{attempt}.log").write_text(text)
    run.set_status(state=state, attempts=attempt)


def append(run: RunDir, attempt: int, text: str | bytes, rank: int = 0) -> None:
    """As a rank does: opened once for all by O_APPEND; a byte counts from the moment it's written."""
    with open(run.logs / f"rank_{rank}.attempt_{attempt}.log", "ab") as file:
        file.write(text.encode() if isinstance(text, str) else text)


class Following:
    """`logs --follow` as a process, and what it has printed so far."""

    def __init__(self, run: RunDir, folder: Path, environment: dict[str, str], rank: str = "", attempt: str = ""):
        self.out, self.err = folder / "out", folder / "err"
        with open(self.out, "wb") as out, open(self.err, "wb") as err:
            command = [sys.executable, "-c", PROGRAM, str(run.path), rank, "yes", attempt]
            self.process = subprocess.Popen(command, stdout=out, stderr=err, env=environment | {"PYTHONUNBUFFERED": ""})

    def until(self, text: str, there: Path | None = None) -> None:
        """Waits for the text."""
        wait_for(lambda: text in (there or self.out).read_text(), f"no {text!r}")

    def end(self) -> tuple[int, str, str]:
        """Its exit code and output."""
        return self.process.wait(20), self.out.read_text(), self.err.read_text()


def wait_for(condition: Callable[[], bool], what: str) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until, what
        time.sleep(0.02)


@pytest.fixture
def following(run: RunDir, tmp_path: Path, environment: dict[str, str]) -> Iterator[Callable[..., Following]]:
    """Starts `logs --follow`; no process is left behind."""
    started: list[Following] = []

    def start(**words: str) -> Following:
        started.append(Following(run, tmp_path, environment, **words))
        return started[-1]

    yield start
    for each in started:
        each.process.kill()
        each.process.wait()


# ---------------------------------------------------------------------------------------------------------- which file


def test_rank_0_of_the_newest_attempt_is_printed(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    for attempt in (1, 2, 10):  # by number: 10 is newer than 2
        write(run, attempt, f"zero {attempt}\n", f"one {attempt}\n")
    (run.logs / "error_0.json").write_text("{}")
    cases: list[tuple[int | None, int | None, str]] = [
        (None, None, "zero 10\n"),
        (1, None, "one 10\n"),
        (None, 2, "zero 2\n"),
        (1, 1, "one 1\n"),
    ]
    for rank, attempt, expected in cases:
        for follow in (False, True):
            assert logs(run, rank, follow, attempt) == 0
            assert capsys.readouterr() == (expected, "")


def test_a_rank_or_attempt_that_is_not_there_is_answered_with_those_that_are(run: RunDir) -> None:
    write(run, 1, "zero", "one", "two", "three")
    (run.logs / "rank_7.attempt_1.log").touch()
    write(run, 2, "zero")
    for follow in (False, True):
        with pytest.raises(
            UserError, match=r"^--rank 5: has no log in attempt 1 of vit_digits-3f9a1c02; there are: 0-3, 7$"
        ):
            logs(run, 5, follow, 1)
        with pytest.raises(UserError, match=r"^--rank 1: has no log in attempt 2 .*; there are: 0$"):
            logs(run, 1, follow, None)
        for attempt in (3, 0, -1):
            with pytest.raises(UserError, match=rf"^--attempt {attempt}: .* has no such attempt; there are: 1, 2$"):
                logs(run, None, follow, attempt)


def test_ranks_are_listed_in_spans() -> None:
    assert spans([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"


def test_a_queued_run_says_so_in_one_line(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert logs(run, None, False, None) == 0
    assert capsys.readouterr() == (
        "",
        "fairexp: vit_digits-3f9a1c02 is queued: no attempt has begun, rank 0 has no log yet\n",
    )
    write(run, 1, "first\n", state="queued")
    assert logs(run, None, False, None) == 0
    assert capsys.readouterr() == ("first\n", "fairexp: vit_digits-3f9a1c02 is queued: attempt 2 has not begun\n")
    run.set_status(state="running", attempts=2)
    assert logs(run, None, False, None) == 0
    assert capsys.readouterr() == (
        "",
        "fairexp: vit_digits-3f9a1c02 is running: attempt 2 has no log of rank 0 yet; --attempt 1 is the one before\n",
    )


@pytest.mark.parametrize("follow", [False, True])
def test_where_no_rank_began_the_scheduler_has_the_word(
    run: RunDir, capsys: pytest.CaptureFixture[str], follow: bool
) -> None:
    (run.submit / "submissions").mkdir()
    for age, (name, text) in enumerate(
        {"7_0_log.out": "no\x1b module\n", "submissions/6.out": "killed", "5.out": ""}.items()
    ):
        (run.submit / name).write_text(text)
        os.utime(run.submit / name, (1000 - age, 1000 - age))
    run.set_status(state="failed", attempts=1)
    assert logs(run, None, follow, None) == 0
    assert capsys.readouterr() == (
        "--- submit/submissions/6.out\nkilled\n--- submit/7_0_log.out\nno\x1b module\n",
        "fairexp: vit_digits-3f9a1c02 is failed: attempt 1 has no log of rank 0\n",
    )


# ---------------------------------------------------------------------------------------------------------- its bytes


def test_what_is_not_utf_8_is_replaced_and_a_character_may_come_in_pieces(
    run: RunDir, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fairexp.runs.logs.CHUNK_BYTES", 1)
    write(run, 1)
    append(run, 1, b"caf\xc3\xa9 \xf0\x9f\x8e\xb2 \xff bar\r 2/3\n cut \xe2\x82")
    assert logs(run, None, False, None) == 0
    assert capfd.readouterr() == ("café 🎲 \ufffd bar\r 2/3\n cut \ufffd\n", "")


def test_a_large_log_is_not_read_into_memory(run: RunDir, environment: dict[str, str]) -> None:
    write(run, 1)
    with open(run.logs / "rank_0.attempt_1.log", "wb") as file:
        file.truncate(300 * 2**20)  # a hole: costs no disk
    command = [sys.executable, "-c", PROGRAM, str(run.path), "", "", ""]

    def small() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (200 * 2**20, 200 * 2**20))

    printing = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, preexec_fn=small)
    assert printing.stdout is not None
    with printing.stdout:
        length = sum(len(piece) for piece in iter(lambda: printing.stdout.read(1 << 20), b""))  # type: ignore[union-attr]
    assert (printing.wait(), length) == (0, 300 * 2**20 + 1)


# ------------------------------------------------------------------------------------------------------------ following


def test_following_prints_what_is_added_and_ends_with_the_run(run: RunDir, following: Callable[..., Following]) -> None:
    write(run, 1, "begun\n", "other\n", state="running")
    it = following()
    it.until("begun\n")
    append(run, 1, "step 1, a line in")
    it.until("step 1, a line in")  # before the line ends: a progress bar never ends one
    append(run, 1, b" two pieces \xe2\x82")
    append(run, 1, b"\xac\n")
    it.until("€")
    assert it.process.poll() is None
    append(run, 1, "last word\n")
    run.set_status(state="finished")
    assert it.end() == (0, "begun\nstep 1, a line in two pieces €\nlast word\n", "")


def test_a_word_after_the_end_is_printed_too(
    run: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(run, 1, "last word\n", state="finished")  # and then the interpreter shuts down, and complains
    monkeypatch.setattr("time.sleep", lambda seconds: append(run, 1, "one more\n"))
    assert logs(run, None, True, None) == 0
    assert capsys.readouterr() == ("last word\none more\n", "")


@pytest.mark.parametrize("state", ["finished", "failed", "cancelled", "interrupted"])
def test_following_ends_in_each_state_that_is_an_end(
    run: RunDir, capsys: pytest.CaptureFixture[str], state: str
) -> None:
    write(run, 1, "begun\n", state="running")
    thread = threading.Timer(0.3, lambda: (append(run, 1, "end\n"), run.set_status(state=state)))
    thread.start()
    assert logs(run, None, True, None) == 0
    thread.join()
    assert capsys.readouterr() == ("begun\nend\n", "")


def test_following_waits_for_a_queued_run_and_goes_over_to_its_next_attempts(
    run: RunDir, following: Callable[..., Following]
) -> None:
    it = following(rank="1")
    it.until("queued", it.err)
    run.set_status(state="running", attempts=1)
    write(run, 1, "zero\n", "one\n", state="running")
    it.until("one\n")
    append(run, 1, "preempted", rank=1)
    run.set_status(state="preempted")
    it.until("attempt 2", it.err)
    write(run, 2, "zero again\n", "one again\n", state="running")
    it.until("one again\n")
    write(run, 3, "zero", "one at last\n", state="running")
    write(run, 4, "zero", "the end\n", state="failed")
    code, out, err = it.end()
    assert code == 0
    assert out == ("one\npreempted\n--- attempt 2\none again\n--- attempt 3\none at last\n--- attempt 4\nthe end\n")
    assert err.splitlines() == [
        "fairexp: vit_digits-3f9a1c02 is queued: no attempt has begun, rank 1 has no log yet",
        "fairexp: vit_digits-3f9a1c02 is preempted: attempt 2 has not begun",
    ]


def test_a_chosen_attempt_is_followed_until_a_newer_one_begins(
    run: RunDir, following: Callable[..., Following]
) -> None:
    write(run, 1, "first\n", state="running")
    it = following(attempt="1")
    it.until("first\n")
    append(run, 1, "its end\n")
    write(run, 2, "second\n", state="running")
    assert it.end() == (0, "first\nits end\n", "")


def test_a_heart_that_stopped_is_told_once(run: RunDir, following: Callable[..., Following], monkeypatch: Any) -> None:
    write(run, 1, "begun\n", state="running")
    with monkeypatch.context() as patch:
        patch.setattr("time.time", lambda now=time.time: now() - 90)
        run.set_status(state="running")
    it = following()
    it.until("it may be lost", it.err)
    append(run, 1, "back\n")
    it.until("back\n")
    run.set_status(state="finished")
    assert it.end() == (
        0,
        "begun\nback\n",
        "fairexp: vit_digits-3f9a1c02 has had no heartbeat for a minute: it may be lost\n",
    )


def test_ctrl_c_ends_it_with_130_and_without_a_traceback(run: RunDir, following: Callable[..., Following]) -> None:
    write(run, 1, "begun\n", state="running")
    it = following()
    it.until("begun\n")
    it.process.send_signal(signal.SIGINT)
    assert it.end() == (130, "begun\n", "")


def test_a_reader_that_has_seen_enough_is_left_to_the_command_line(run: RunDir) -> None:
    write(run, 1, "line\n" * 100_000)
    here, there = os.pipe()
    os.close(here)
    with (
        contextlib.suppress(BrokenPipeError),  # closing it, too, finds nobody
        open(there, "w") as closed,
        contextlib.redirect_stdout(closed),
        pytest.raises(BrokenPipeError),
    ):
        logs(run, None, False, None)
