"""How a run's processes end: together, with the real reason on the screen, and with no one left behind."""

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import REPO

from fairexp.launch.follow import Tail

TWO_RANKS = ["strategy=ddp", "launcher.num_processes=2", "trainer.device=cpu", "model=mlp", "tracker=none"]
FOREVER = [
    *TWO_RANKS,
    "trainer.max_steps=10000000",
    "trainer.log_every=20",
    "trainer.eval_every=null",
    "checkpoint.every=null",
]


class Command:
    """`fairexp train ...` in a folder of its own, with every process that descends from it known by a mark in its environment."""

    def __init__(self, folder: Path, *words: str, terminal: bool = False):
        self.folder = folder
        self.mark = uuid.uuid4().hex
        environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
        environment |= {"PYTHONPATH": str(REPO), "FAIREXP_TEST_MARK": self.mark, "COLUMNS": "150", "TERM": "xterm"}
        self.master, error = pty.openpty() if terminal else os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fairexp", "train", *words],
            cwd=folder,
            env=environment,
            stdin=error if terminal else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=error,
            start_new_session=True,
            preexec_fn=take_terminal if terminal else None,
        )
        os.close(error)
        self.output = ""
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        while True:
            try:
                part = os.read(self.master, 65536)
            except OSError:  # a terminal whose last user has gone
                return
            if not part:
                return
            self.output += part.decode(errors="replace")

    @property
    def seen(self) -> str:
        """Its standard error, less what a bar paints over."""
        return "\n".join(line.split("\x1b[2K")[-1] for line in self.output.replace("\r", "").splitlines())

    def wait(self, timeout: float = 60) -> int:
        code = self.process.wait(timeout)
        self.reader.join(5)
        return code

    def until(self, condition: Callable[[], bool], timeout: float = 60) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"not within {timeout} s; it said:\n{self.seen}"
            time.sleep(0.02)

    @property
    def run_dir(self) -> Path:
        (path,) = (path for path in (self.folder / "runs").iterdir() if not path.name.startswith("."))
        return path

    def status(self) -> dict:
        return json.loads((self.run_dir / "status.json").read_text())

    def steps(self) -> int:
        """The last step in metrics.jsonl."""
        try:
            rows = (self.run_dir / "metrics.jsonl").read_text().splitlines()
        except (ValueError, FileNotFoundError):
            return 0
        return json.loads(rows[-1])["step"] if rows else 0

    def trained(self, steps: int) -> bool:
        return (self.folder / "runs").exists() and self.steps() >= steps

    def trains(self) -> None:
        self.until(lambda: self.trained(20))

    def alive(self) -> dict[int, str]:
        """Its living processes: what they run by process id."""
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                    if state != "Z" and self.mark.encode() in (entry / "environ").read_bytes():
                        found[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
                except (FileNotFoundError, ProcessLookupError, PermissionError):
                    continue
        return found

    def close(self) -> None:
        """Kills what is left of it."""
        for pid in self.alive():
            with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
                os.kill(pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()
        self.reader.join(5)
        os.close(self.master)
        if self.process.stdout:
            self.process.stdout.close()

    def ranks(self) -> list[int]:
        """The rank processes: children of the job's process."""
        job = self.status()["pid"]
        return [pid for pid in self.alive() if _parent(pid) == job]


def take_terminal() -> None:
    """The new session's terminal is its standard input, so that ^C there interrupts it."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except FileNotFoundError:
        return 0


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    commands: list[Command] = []

    def start(*words: str, terminal: bool = False) -> Command:
        commands.append(Command(tmp_path, *words, terminal=terminal))
        return commands[-1]

    yield start
    for command in commands:
        command.close()


def test_ctrl_c_on_a_terminal_saves_and_exits_130(start: Callable[..., Command]) -> None:
    command = start(*FOREVER, terminal=True)
    command.trains()
    os.write(command.master, b"\x03")
    assert command.wait() == 130, command.seen
    assert command.status()["state"] == "interrupted"
    step = command.status()["step"]
    assert [path.name for path in (command.run_dir / "checkpoints").iterdir()] == [f"step_{step:08d}"]
    assert "Traceback" not in command.seen
    command.until(lambda: not command.alive(), 5)


def test_a_terminal_shows_a_bar_and_a_pipe_shows_lines(start: Callable[..., Command]) -> None:
    short = [*TWO_RANKS, "trainer.max_steps=60", "trainer.log_every=20", "trainer.eval_every=40"]
    on_terminal = start(*short, terminal=True)
    assert on_terminal.wait() == 0, on_terminal.seen
    assert re.search(r"60/60", on_terminal.seen)
    assert re.search(r"[━╸]", on_terminal.output)
    in_pipe = start(*short, "--fresh")
    assert in_pipe.wait() == 0, in_pipe.seen
    assert re.search(r"^step 40/60  loss \d", in_pipe.seen, re.M)
    assert re.search(r"^step 40/60  eval loss .* eval top1 ", in_pipe.seen, re.M)
    assert "\x1b" not in in_pipe.output


@pytest.mark.parametrize("grown", [False, True])
def test_who_follows_a_file_that_lost_rows_reads_whole_lines_of_the_new_one(tmp_path: Path, grown: bool) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text("one\n")
    tail = Tail(file)
    with open(file, "a") as rows:
        rows.write("two\nthree\n")
    assert tail.lines() == ["two", "three"]
    (tmp_path / "new").write_text("one\nanother two\n" if grown else "one\n")
    os.replace(tmp_path / "new", file)
    assert tail.lines() == []
    with open(file, "a") as rows:
        rows.write("four\n")
    assert tail.lines() == ["four"]
    assert tail.file
    tail.file.close()


def test_sigterm_saves_as_ctrl_c_does(start: Callable[..., Command]) -> None:
    command = start(*FOREVER)
    command.trains()
    command.process.send_signal(signal.SIGTERM)
    assert command.wait() == 130, command.seen
    assert len(list((command.run_dir / "checkpoints").glob("step_*"))) == 1


def test_a_signal_to_one_rank_stops_all_at_one_step(start: Callable[..., Command]) -> None:
    command = start(*FOREVER)
    command.trains()
    os.kill(command.ranks()[1], signal.SIGTERM)
    assert command.wait() == 130, command.seen
    assert len(list((command.run_dir / "checkpoints").glob("step_*"))) == 1


def test_a_rank_that_is_killed_takes_its_siblings_down_within_5_seconds(start: Callable[..., Command]) -> None:
    command = start(*FOREVER)
    command.trains()
    victim = command.ranks()[-1]
    os.kill(victim, signal.SIGKILL)
    assert command.wait(5) == 1
    assert "was killed by SIGKILL" in command.seen
    assert "ChildFailedError" not in command.seen
    assert command.status()["state"] == "failed"
    command.until(lambda: not command.alive(), 1)


def test_a_rank_frozen_beside_a_dead_one_is_ended_too(start: Callable[..., Command]) -> None:
    command = start(*FOREVER)
    command.trains()
    first, second = command.ranks()
    os.kill(first, signal.SIGSTOP)
    os.kill(second, signal.SIGKILL)
    assert command.wait(5) == 1
    command.until(lambda: not command.alive(), 1)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_real_exception_is_what_the_user_sees(start: Callable[..., Command], tmp_path: Path, rank: int) -> None:
    (tmp_path / "mine.py").write_text(
        f"""
import os
from torch import nn

class Breaks(nn.Linear):
    calls = 0

    def forward(self, images):
        self.calls += 1
        if self.calls == 10 and os.environ["RANK"] == "{rank}":
            raise ValueError("a wrong turn in the tenth step")
        return super().forward(images.flatten(1))
"""
    )
    (tmp_path / "configs" / "model").mkdir(parents=True)
    (tmp_path / "configs" / "model" / "breaks.yaml").write_text(
        "_target_: mine.Breaks\nin_features: 64\nout_features: 10\n"
    )
    command = start("--config-dir", "configs", *FOREVER, "model=breaks")
    assert command.wait() == 1
    lines = command.seen.splitlines()
    assert sum("ValueError: a wrong turn in the tenth step" in line for line in lines) == 2, (
        command.seen
    )  # trace and verdict
    assert command.seen.count("Traceback") == 1
    assert f"error    rank {rank}: ValueError: a wrong turn in the tenth step" in command.seen
    assert "ChildFailedError" not in command.seen
    assert f'File "{tmp_path}/mine.py", line 11, in forward' in command.seen
    command.until(lambda: not command.alive(), 5)


@pytest.mark.parametrize("who", ["the command", "the job", "submitit's controller"])
def test_kill_9_leaves_no_orphan(start: Callable[..., Command], who: str) -> None:
    command = start(*FOREVER)
    command.trains()
    status = command.status()
    assert len(command.alive()) == 5  # command, submitit's controller, job, two ranks
    pid = {
        "the command": command.process.pid,
        "the job": status["pid"],
        "submitit's controller": int(status["job_id"]),
    }[who]
    os.kill(pid, signal.SIGKILL)
    command.until(lambda: not set(command.alive()) - {command.process.pid}, 5)
    if who != "the command":
        assert command.wait(5) == 1
        assert command.status()["state"] == "failed"
    else:
        command.process.wait(5)


def test_a_second_ctrl_c_kills_at_once(start: Callable[..., Command]) -> None:
    command = start(*FOREVER)
    command.trains()
    for rank in command.ranks():
        os.kill(rank, signal.SIGSTOP)  # it can't answer the first
    command.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert command.process.poll() is None
    command.process.send_signal(signal.SIGINT)
    assert command.wait(5) == 1
    command.until(lambda: not command.alive(), 5)


def test_the_same_command_is_refused_while_the_run_goes_on_and_resumes_afterwards(
    start: Callable[..., Command],
) -> None:
    words = [
        *TWO_RANKS,
        "trainer.max_steps=2000",
        "trainer.log_every=20",
        "trainer.eval_every=null",
        "checkpoint.every=null",
    ]
    first = start(*words)
    first.trains()
    second = start(*words)
    assert second.wait(20) == 2
    assert f"is running: job {first.status()['job_id']}" in second.seen
    first.process.send_signal(signal.SIGINT)
    assert first.wait() == 130
    third = start(*words)
    assert third.wait() == 0, third.seen
    assert "resuming after step" in third.seen
    assert third.status()["attempts"] == 2
    steps = [json.loads(line)["step"] for line in (third.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    fourth = start(*words)
    assert fourth.wait(20) == 0
    assert "has finished" in fourth.seen
    assert fourth.status()["attempts"] == 2


def test_two_people_who_start_the_same_run_get_one(start: Callable[..., Command]) -> None:
    words = [*TWO_RANKS, "trainer.max_steps=1000", "trainer.eval_every=null", "checkpoint.every=null"]
    commands = [start(*words), start(*words)]
    codes = sorted(command.wait() for command in commands)
    assert codes == [0, 2], [command.seen for command in commands]
    assert commands[0].status()["attempts"] == 1


def test_one_machine_listens_to_no_one_outside(start: Callable[..., Command]) -> None:
    command = start(*FOREVER)
    command.trains()
    sockets = set()
    for pid in command.alive():
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            try:
                sockets.add(os.readlink(descriptor))
            except FileNotFoundError:
                continue
    for table, loopback in (("tcp", "0100007F"), ("tcp6", "00000000000000000000000001000000")):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            local, state, inode = line.split()[1], line.split()[3], line.split()[9]
            if state == "0A" and f"socket:[{inode}]" in sockets:
                assert local.startswith((loopback, "0000000000000000FFFF00000100007F")), f"listens on {local}"
