"""Sharing devices between daemons: real processes that take slots, hand them to forked jobs, wait, and are killed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fairexp.errors import UserError
from fairexp.launch.slots import Slots, Taken, default_folder, private

pytestmark = pytest.mark.timeout(60)  # a slot that never comes free
PROLOGUE = """
import os, sys, time
from pathlib import Path
from fairexp.launch.slots import Slots

marks, names = Path(sys.argv[1]), sys.argv[2].split(",")
slots = Slots(names, marks / "locks")

def say(*words):
    print(*words, flush=True)

def listen():
    if not sys.stdin.readline():
        os._exit(1)

def waiting():
    if not told:
        told.append(True)
        say("waiting")
    return True

told = []

def note(line):
    with open(marks / "journal", "a") as file:
        file.write(line + "\\n")

def start_job(taken, seconds):
    if pid := os.fork():
        taken.release()
        return pid
    try:
        for name in taken.names:
            # a mark of its own, which relies on no lock: two holders of a slot meet here
            os.close(os.open(marks / name, os.O_CREAT | os.O_EXCL))
            note("+")
        time.sleep(seconds)
        for name in taken.names:
            note("-")
            os.unlink(marks / name)
    except BaseException as error:
        note(repr(error))
    finally:
        os._exit(0)
"""
# Says "waiting" if it has to. Holds what it got until it is told to let go.
TAKE = """
taken = slots.take({}, waiting)
say("took", *taken.names)
listen()
taken.release()
say("released")
listen()
"""
# As a daemon does: takes, forks the job, releases.
START_A_JOB = """
taken = slots.take(2)
pid = start_job(taken, 1000)
say("job", pid)
listen()
"""
RUN_SIX_JOBS = """
jobs = [start_job(slots.take(count), 0.1) for count in (1, 1, 2, 1, 1, 1)]
for pid in jobs:
    os.waitpid(pid, 0)
"""
STREAM = """
say("streams")
while True:
    os.waitpid(start_job(slots.take(1), 0.1), 0)
"""


class Daemon:
    """A process that takes slots of its own view of the machine."""

    def __init__(self, marks: Path, names: str, program: str):
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROLOGUE + program, marks, names],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def hear(self) -> list[str]:
        """The words of its next line."""
        assert self.process.stdout
        return self.process.stdout.readline().split()

    def tell(self) -> None:
        """Lets it go on."""
        assert self.process.stdin
        print(file=self.process.stdin, flush=True)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


Start = Callable[[str, str], Daemon]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    daemons: list[Daemon] = []

    def start(names: str, program: str) -> Daemon:
        daemons.append(Daemon(tmp_path, names, program))
        return daemons[-1]

    yield start
    for daemon in daemons:
        daemon.kill()
        for pipe in (daemon.process.stdin, daemon.process.stdout):
            assert pipe
            pipe.close()


def here(tmp_path: Path, names: str) -> Slots:
    """What this very process sees of the daemons' slots."""
    return Slots(names.split(","), tmp_path / "locks")


def got(taken: Taken | None) -> tuple[str, ...]:
    """The names; nothing is held afterwards."""
    assert taken
    taken.release()
    return taken.names


def times_asked(number: int) -> Callable[[], bool]:
    """A `wanted` that says yes so many times."""
    answers = iter([True] * number)
    return lambda: next(answers, False)


def test_the_jobs_of_two_daemons_never_share_a_slot(start: Start, tmp_path: Path) -> None:
    daemons = [start("0,1,2", RUN_SIX_JOBS) for _ in range(2)]
    assert [daemon.process.wait(30) for daemon in daemons] == [0, 0]
    lines = (tmp_path / "journal").read_text().split("\n")[:-1]
    assert sorted(lines) == ["+"] * 14 + ["-"] * 14  # 10 jobs with a slot, 2 with two
    in_use = [lines[: end + 1].count("+") - lines[: end + 1].count("-") for end in range(len(lines))]
    assert 2 <= max(in_use) <= 3
    assert here(tmp_path, "0,1,2").in_use() == []


def test_a_run_that_wants_two_slots_is_not_starved_by_a_stream_that_wants_one(start: Start, tmp_path: Path) -> None:
    streams = [start("0,1", STREAM) for _ in range(3)]
    assert [stream.hear() for stream in streams] == [["streams"]] * 3
    until(lambda: (tmp_path / "journal").exists() and (tmp_path / "journal").read_text().count("-") >= 4)
    assert got(here(tmp_path, "0,1").take(2, times_asked(20))) == ("0", "1")
    before = (tmp_path / "journal").read_text().count("+")
    until(lambda: (tmp_path / "journal").read_text().count("+") > before)  # the streams have not ended


def test_slots_come_in_the_order_of_asking(start: Start, tmp_path: Path) -> None:
    waiters = [start("0,1", TAKE.format(2))]
    assert waiters[0].hear() == ["took", "0", "1"]
    for count in (2, 1, 2, 1):
        waiters.append(start("0,1", TAKE.format(count)))
        assert waiters[-1].hear() == ["waiting"]
    for k, took in enumerate([["0", "1"], ["0"], ["0", "1"], ["0"]]):
        waiters[k].tell()
        assert waiters[k].hear() == ["released"]
        assert waiters[k + 1].hear() == ["took", *took]
    assert here(tmp_path, "0,1").in_use() == ["0"]


def test_kill_9_of_a_holder_frees_its_slots(start: Start, tmp_path: Path) -> None:
    holder = start("0,1", TAKE.format(2))
    assert holder.hear() == ["took", "0", "1"]
    slots = here(tmp_path, "0,1")
    assert slots.in_use() == ["0", "1"]
    holder.kill()
    assert slots.in_use() == []
    assert got(slots.take(2)) == ("0", "1")


def test_kill_9_of_a_waiter_lets_the_next_one_pass(start: Start, tmp_path: Path) -> None:
    holder = start("0,1", TAKE.format(1))
    assert holder.hear() == ["took", "0"]
    first = start("0,1", TAKE.format(2))
    assert first.hear() == ["waiting"]
    slots = here(tmp_path, "0,1")
    assert slots.take(1, times_asked(2)) is None  # slot 1 is free, and kept for the one who came first
    first.kill()
    assert got(slots.take(1)) == ("1",)
    assert list((tmp_path / "locks").glob("ticket.*")) == []


def test_who_gives_up_leaves_the_queue(start: Start, tmp_path: Path) -> None:
    holder = start("0,1", TAKE.format(1))
    assert holder.hear() == ["took", "0"]
    slots = here(tmp_path, "0,1")
    assert slots.take(2, times_asked(3)) is None
    assert list((tmp_path / "locks").glob("ticket.*")) == []
    assert slots.in_use() == ["0"]
    assert got(slots.take(1)) == ("1",)


def test_an_error_in_wanted_leaves_the_queue_too(tmp_path: Path) -> None:
    slots = here(tmp_path, "0,1")
    taken = slots.take(1)
    with pytest.raises(ZeroDivisionError):
        slots.take(2, lambda: 1 // 0 > 0)
    assert got(taken) == ("0",)
    assert got(slots.take(2)) == ("0", "1")


def test_a_forked_job_keeps_its_slots_after_the_daemon_released_them_and_died(start: Start, tmp_path: Path) -> None:
    daemon = start("0,1,2", START_A_JOB)
    word, pid = daemon.hear()
    assert word == "job"
    try:
        slots = here(tmp_path, "0,1,2")
        assert slots.in_use() == ["0", "1"]
        daemon.kill()
        assert slots.in_use() == ["0", "1"]
        assert got(slots.take(1)) == ("2",)
        assert slots.take(2, times_asked(2)) is None
    finally:
        os.kill(int(pid), signal.SIGKILL)
    assert got(slots.take(3)) == ("0", "1", "2")


def test_a_waiter_keeps_back_only_those_who_could_take_its_slots(start: Start, tmp_path: Path) -> None:
    holder = start("0,1", TAKE.format(1))
    assert holder.hear() == ["took", "0"]
    waiter = start("0,1", TAKE.format(2))
    assert waiter.hear() == ["waiting"]
    assert got(here(tmp_path, "2,3").take(2)) == ("2", "3")
    assert got(here(tmp_path, "1,2,3").take(2)) == ("2", "3")  # not 1, which is free
    assert here(tmp_path, "1,2").take(2, times_asked(2)) is None
    holder.tell()
    assert holder.hear() == ["released"]
    assert waiter.hear() == ["took", "0", "1"]


def test_taken_slots_are_free_after_the_with_block(tmp_path: Path) -> None:
    slots = Slots(["GPU-3f9a/1", "GPU-3f9a_1", "..", "cpu_0"], tmp_path / "deep" / "locks")
    taken = slots.take(4)
    assert taken
    with taken:
        assert taken.names == slots.names
        assert slots.in_use() == list(slots.names)
    taken.release()
    assert slots.in_use() == []
    assert taken.fds == ()


def test_more_slots_than_there_are_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="3 slots wanted, there are 2: 0, 1"):
        here(tmp_path, "0,1,1").take(3)
    with pytest.raises(UserError, match="1 slots wanted, there are 0: none"):
        Slots([], tmp_path).take(1)


def test_a_folder_that_has_gone_is_an_error_and_not_a_second_set_of_slots(tmp_path: Path) -> None:
    slots = here(tmp_path, "0")
    (tmp_path / "locks").rmdir()
    with pytest.raises(UserError, match="locks: can't share devices out there: No such file"):
        slots.take(1)


def test_the_folder_is_the_same_in_all_terminals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert default_folder() == Path(f"/tmp/fairexp-{os.getuid()}")


def foreign(tmp_path: Path) -> Path:
    """A folder of another user."""
    if os.getuid() != 0:
        return Path("/usr")
    (tmp_path / "foreign").mkdir(mode=0o700, exist_ok=True)
    os.chown(tmp_path / "foreign", 1, -1)
    return tmp_path / "foreign"


def test_a_folder_that_another_user_could_have_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("mine")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "file").touch(mode=0o600)
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o770)
    assert private(tmp_path / "mine") == tmp_path / "mine"
    for name in ("link", "dangling", "file", "open"):
        with pytest.raises(UserError, match=f"^{tmp_path}/{name}: "):
            private(tmp_path / name)
    with pytest.raises(UserError, match="another user may have made it"):
        private(foreign(tmp_path))


def until(condition: Callable[[], bool], timeout: float = 20) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
