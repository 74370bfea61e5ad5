"""Sweeps on this machine: real daemons that share its devices, outlive their terminal, and go on after any of their parts died.

All of it in a folder whose name has spaces and letters that aren't ASCII.
"""

import json
import os
import pty
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from test_processes import take_terminal

from fairexp.config import rundir
from fairexp.config.rundir import RunDir
from fairexp.launch.pool import Pool
from fairexp.launch.slots import Slots, default_folder
from fairexp.runs.state import own_process

# A rank holds a mark of its own for its device, which relies on no lock of the pool's: two that share one meet there, and
# the kernel takes the mark from whoever dies. What it notes is in one write, whole.
MINE = '''
import fcntl, json, os, signal, time
from pathlib import Path

import torch
from torch import nn

VERSION = 1
marks = []


def note(**words):
    run = Path(os.readlink("/proc/self/fd/1")).parents[1].name
    words |= {"run": run, "rank": int(os.environ["RANK"]), "pid": os.getpid(), "at": time.monotonic()}
    with open("journal", "a") as journal:
        journal.write(json.dumps(words) + "\\n")


def parent(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


class Noted(nn.Linear):
    """A model that notes which devices it was given and who started it."""

    def __init__(self, step_s):
        super().__init__(64, 10)
        self.step_s = step_s
        devices = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
        marks.append(open(f"marks/{devices[int(os.environ['LOCAL_RANK'])]}", "w"))
        alone = True
        try:
            fcntl.flock(marks[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            alone = False
        daemon = parent(os.getppid())
        note(
            devices=devices,
            alone=alone,
            version=VERSION,
            job=os.getppid(),
            daemon=daemon,
            threads=len(os.listdir(f"/proc/{daemon}/task")),
            command=[Path(f"/proc/{pid}/cmdline").read_text() for pid in (os.getpid(), os.getppid(), daemon)],
            torch=id(torch),
        )

    def forward(self, images):
        while Path("hold").exists():
            time.sleep(0.01)
        time.sleep(self.step_s)
        return super().forward(images.flatten(1))


class Dies(Noted):
    def forward(self, images):
        os.kill(os.getpid(), signal.SIGKILL)


class Breaks(Noted):
    def forward(self, images):
        raise ValueError("a wrong turn")


def nothing(run):
    """A training loop without a step."""
'''
SWEEP = (
    "-m",
    "--config-dir",
    "configs",
    "model=noted",
    "name='naïve run'",
    "trainer.device=cpu",
    "trainer.max_epochs=null",
    "trainer.max_steps=40",
    "trainer.eval_every=null",
    "checkpoint.every=10",
    "launcher.threads_per_process=1",
    "tracker=none",
)
TWO_RANKS = ("strategy=ddp", "launcher.num_processes=2")
FOREVER = ("trainer.max_steps=1000000", "checkpoint.every=null")


@dataclass(frozen=True)
class Begin:
    """What a rank noted when its model was made."""

    run: str
    rank: int
    pid: int
    at: float
    devices: list[str]
    alone: bool
    version: int
    job: int
    daemon: int
    threads: int
    command: list[str]
    torch: int


class Paper:
    """A folder with a paper's code, and `fairexp` in it on slots that no other test has."""

    def __init__(self, folder: Path, environment: dict[str, str], slots: int):
        self.folder = folder
        self.names = [f"{os.getpid()}{number:03d}" for number in range(slots)]
        self.mark = uuid.uuid4().hex
        own = {"FAIREXP_TEST_MARK": self.mark, "CUDA_VISIBLE_DEVICES": ",".join(self.names)}
        self.environment = environment | own
        self.commands: list[subprocess.Popen[str]] = []
        (folder / "configs/model").mkdir(parents=True)
        (folder / "marks").mkdir()
        self.write("mine.py", MINE)
        for name in ("Noted", "Dies", "Breaks"):
            self.write(f"configs/model/{name.lower()}.yaml", f"_target_: mine.{name}\nstep_s: 0.01\n")

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text, encoding="utf-8")

    def start(self, *words: str, **how: Any) -> subprocess.Popen[str]:
        """`fairexp WORDS` as a process."""
        how = {"stderr": subprocess.PIPE, "start_new_session": True} | how
        command = [sys.executable, "-m", "fairexp", *words]
        process = subprocess.Popen(
            command, cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, text=True, **how
        )
        self.commands.append(process)
        return process

    def fairexp(self, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        """`fairexp WORDS`, ended with that exit code."""
        process = self.start(*words)
        out, error = process.communicate(timeout=60)
        assert process.returncode == code, error
        return subprocess.CompletedProcess(words, code, out, error)

    def kill(self, process: subprocess.Popen[str]) -> None:
        """kill -9 of a command."""
        process.kill()
        process.communicate()
        self.commands.remove(process)

    def submit(self, *words: str) -> str:
        """Submits a sweep; what the command said."""
        return self.fairexp("train", *SWEEP, *words).stderr

    @property
    def runs(self) -> list[Path]:
        return sorted(path.parent for path in (self.folder / "runs").glob("[!.]*/status.json"))

    def run(self, **values: Any) -> Path:
        """The one run with these values in its config."""
        text = [f"{key}: {value}\n" for key, value in values.items()]
        (found,) = (run for run in self.runs if all(part in (run / "config.yaml").read_text() for part in text))
        return found

    def status(self, run: Path) -> dict[str, Any]:
        return json.loads((run / "status.json").read_text(encoding="utf-8"))

    def states(self) -> list[str]:
        return [self.status(run)["state"] for run in self.runs]

    def listed(self) -> dict[str, str]:
        """What `fairexp list` says of each run's state."""
        return {Path(run["run_dir"]).name: run["state"] for run in json.loads(self.fairexp("list", "--json").stdout)}

    def pools(self) -> list[int]:
        """The daemons' process ids, in the order of submission."""
        files = sorted((self.folder / "runs/submissions").glob("*/submission.json"))
        records = sorted((json.loads(file.read_text(encoding="utf-8")) for file in files), key=lambda it: it["created"])
        return [record["pid"] for record in records]

    def journal(self, run: Path | None = None) -> list[Begin]:
        try:
            lines = (self.folder / "journal").read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return []
        begins = [Begin(**json.loads(line)) for line in lines]
        return [begin for begin in begins if run is None or begin.run == run.name]

    def until(self, condition: Callable[[], object], timeout: float = 60) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            for command in self.commands:
                assert not command.poll(), command.communicate()[1]
            if time.monotonic() > deadline:
                logs = sorted((self.folder / "runs").glob("*/logs/*.log"))
                logs += sorted((self.folder / "runs/submissions").glob("*/pool.out"))
                told = "".join(f"{log}:\n{log.read_text(errors='replace')[-1000:]}" for log in logs)
                pytest.fail(f"not within {timeout} s; {self.states()}\n{told}")
            time.sleep(0.05)

    def until_all(self, *words: str) -> None:
        """Waits until every run has ended so, and every daemon is gone."""
        self.until(lambda: all(state in words for state in self.states()) and not self.alive())

    def has_saved(self, run: Path) -> bool:
        return any((run / "checkpoints").glob("step_*"))

    def alive(self) -> list[int]:
        """The living processes of all that was started here."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                    if state not in "ZX" and self.mark.encode() in (entry / "environ").read_bytes():
                        found.append(int(entry.name))
                except (FileNotFoundError, ProcessLookupError, PermissionError):
                    continue
        return found

    def close(self) -> None:
        """Ends what is left."""
        while left := self.alive():
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        for process in self.commands:
            process.communicate()
        for name in self.names:
            (default_folder() / f"slot.{name}").unlink(missing_ok=True)


@pytest.fixture
def paper(tmp_path: Path, environment: dict[str, str]) -> Iterator[Callable[[int], Paper]]:
    papers: list[Paper] = []

    def make(slots: int) -> Paper:
        papers.append(Paper(tmp_path / "Łukasz's paper — ünïcode", environment, slots))
        return papers[-1]

    yield make
    for made in papers:
        made.close()


def test_two_sweeps_share_four_devices_and_a_killed_run_resumes(paper: Callable[[int], Paper]) -> None:
    it = paper(4)
    one_slot = it.start("train", *SWEEP, "seed=range(0,10)", "model.step_s=0.02")
    two_slots = it.start("train", *SWEEP, "seed=10,11", "model.step_s=0.02", *TWO_RANKS, "launcher=local")
    slots, most = Slots(it.names), 0
    victim = None

    def all_have_ended() -> bool:
        nonlocal most, victim
        most = max(most, len(slots.in_use()))
        if victim is None:
            single = {begin.run for begin in it.journal() if len(begin.devices) == 1}
            saved = [run for run in it.runs if run.name in single and it.has_saved(run)]
            victim = next((run for run in saved if it.status(run)["state"] == "running"), None)
            if victim:
                with suppress(ProcessLookupError):
                    os.kill(it.status(victim)["pid"], signal.SIGKILL)
                if it.status(victim)["state"] != "running":  # it had just finished
                    victim = None
        return one_slot.poll() == two_slots.poll() == 0 and it.states() == ["finished"] * 12 and not it.alive()

    it.until(all_have_ended)
    begins = it.journal()
    assert all(begin.alone for begin in begins)
    assert all(set(begin.devices) < set(it.names) for begin in begins)
    assert most == 4
    assert {begin.daemon for begin in begins} == set(it.pools())
    assert len(it.pools()) == 2
    ranks = {run.name: len(it.journal(run)[0].devices) for run in it.runs}
    assert sorted(ranks.values()) == [1] * 10 + [2] * 2
    assert victim is not None
    for run in it.runs:
        attempts = 2 if run == victim else 1
        assert it.status(run)["attempts"] == attempts
        assert len(it.journal(run)) == attempts * ranks[run.name]
    assert "(resumed)" in (victim / "logs/rank_0.attempt_2.log").read_text()


def test_the_slots_of_a_killed_job_are_free_at_once(paper: Callable[[int], Paper]) -> None:
    it = paper(2)
    it.submit(*FOREVER, *TWO_RANKS, "seed=0,1")
    it.until(lambda: len(it.journal()) == 2)
    killed, other = it.run(seed=0), it.run(seed=1)
    os.kill(it.status(killed)["pid"], signal.SIGKILL)
    it.until(lambda: len(it.journal(other)) == 2, 10)
    assert all(begin.alone for begin in it.journal())
    assert not {begin.pid for begin in it.journal(killed)} & set(it.alive())
    assert it.status(killed)["state"] == "running"  # nobody was left to say that it isn't
    assert it.listed() == {killed.name: "queued", other.name: "running"}


def test_a_ctrl_c_and_the_end_of_the_terminal_are_not_for_the_pool(paper: Callable[[int], Paper]) -> None:
    it = paper(2)
    (it.folder / "hold").touch()
    master, terminal = pty.openpty()
    fairexp = [sys.executable, "-m", "fairexp", "train", *SWEEP, "seed=0,1,2"]
    shell = subprocess.Popen(
        ["sh", "-c", '"$@" && touch submitted; sleep 1000', "sh", *fairexp],
        cwd=it.folder,
        env=it.environment,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        preexec_fn=take_terminal,
    )
    os.close(terminal)
    it.until(lambda: (it.folder / "submitted").exists() and len(it.journal()) == 2)
    os.write(master, b"\x03")
    assert shell.wait(10) == -signal.SIGINT
    os.close(master)  # SIGHUP to whoever has it as the terminal
    assert {begin.pid for begin in it.journal()} < set(it.alive())
    (it.folder / "hold").unlink()
    it.until_all("finished")
    assert [it.status(run)["attempts"] for run in it.runs] == [1, 1, 1]


def test_after_a_kill_9_of_the_daemon_the_same_command_runs_what_has_not_finished(
    paper: Callable[[int], Paper],
) -> None:
    it = paper(2)
    words = ["seed=0,1", "trainer.max_steps=10,50", "model.step_s=0.02"]
    it.submit(*words)

    def one_has_finished_and_one_has_saved() -> bool:
        running = [run for run in it.runs if it.status(run)["state"] == "running"]
        return "finished" in it.states() and any(it.has_saved(run) for run in running)

    it.until(one_has_finished_and_one_has_saved)
    (it.folder / "hold").touch()  # nothing ends by itself now
    (daemon,) = it.pools()
    os.kill(daemon, signal.SIGKILL)
    it.until(lambda: not it.alive(), 5)
    (it.folder / "hold").unlink()
    before = {run: it.status(run) for run in it.runs}
    saved = [run for run in it.runs if it.has_saved(run) and before[run]["state"] == "running"]
    finished = [run for run in it.runs if before[run]["state"] == "finished"]
    assert it.listed() == {run.name: "finished" if run in finished else "lost" for run in it.runs}
    said = it.submit(*words)
    assert f"4 runs: {len(finished)} finished, {4 - len(finished)} submitted as pool" in said
    it.until_all("finished")
    for run in it.runs:
        assert it.status(run)["attempts"] == before[run]["attempts"] + (run not in finished)
        assert len(it.journal(run)) <= 2
    for run in saved:
        assert "(resumed)" in (run / "logs/rank_0.attempt_2.log").read_text()


def test_a_terminated_daemon_lets_its_runs_save_and_begins_no_other(paper: Callable[[int], Paper]) -> None:
    it = paper(1)
    it.submit(*FOREVER, "seed=0,1")
    it.until(lambda: len(it.journal()) == 1)
    (daemon,) = it.pools()
    os.kill(daemon, signal.SIGTERM)
    it.until(lambda: not it.alive(), 20)
    assert it.listed() == {it.run(seed=0).name: "interrupted", it.run(seed=1).name: "lost"}
    assert it.has_saved(it.run(seed=0))
    assert len(it.journal()) == 1


def test_a_submitter_killed_at_any_moment_leaves_no_run_undone_or_done_twice(paper: Callable[[int], Paper]) -> None:
    it = paper(2)
    words = ["train", *SWEEP, "seed=range(0,40)", "loop._target_=mine.nothing"]
    submissions = it.folder / "runs/submissions"
    moments: list[Callable[[], bool]] = [
        lambda: any(submissions.glob("*/submission.json")),
        lambda: len(it.runs) > 0,
        lambda: len(it.runs) > 9,
        lambda: len(it.runs) > 30,
    ]
    for comes in moments:
        command = it.start(*words)
        while not comes():
            assert command.poll() is None, command.communicate()[1]
        it.kill(command)
    it.submit(*words[1 + len(SWEEP) :])
    it.until_all("finished")
    assert len(it.runs) == 40
    assert sorted(begin.run for begin in it.journal()) == sorted(run.name for run in it.runs)
    assert {it.status(run)["attempts"] for run in it.runs} == {1}


def test_queued_and_running_runs_and_the_whole_sweep_are_cancelled(paper: Callable[[int], Paper]) -> None:
    it = paper(2)
    it.submit(*FOREVER, "seed=0,1,2,3", "sweep.name=all")
    it.until(lambda: len(it.journal()) == 2)
    first, second, third, fourth = (it.run(seed=seed) for seed in range(4))
    it.fairexp("cancel", third.name)
    it.fairexp("cancel", first.name)
    it.until(lambda: len(it.journal()) == 3)  # the fourth has the first one's slot
    assert it.status(first)["state"] == it.status(third)["state"] == "cancelled"
    assert [path.name for path in (first / "checkpoints").iterdir()] == [f"step_{it.status(first)['step']:08d}"]
    assert {begin.run for begin in it.journal()} == {first.name, second.name, fourth.name}
    assert it.listed() == {
        first.name: "cancelled",
        second.name: "running",
        third.name: "cancelled",
        fourth.name: "running",
    }
    # what cancel does with a run that began while it went through a long list: it was queued when it looked
    RunDir(second).set_status(cancel=True)
    RunDir(second).set_status(state="cancelled")
    it.until(lambda: it.listed()[second.name] == "cancelled" and it.journal(second)[0].pid not in it.alive(), 20)
    assert "1 of 4 runs cancelled" in it.fairexp("cancel", "all").stderr
    it.until_all("cancelled")
    assert not it.journal(third)
    assert not it.has_saved(third)
    assert all(it.has_saved(run) for run in (first, second, fourth))


def test_a_run_that_always_kills_itself_is_given_up_and_one_that_raises_fails_once(
    paper: Callable[[int], Paper],
) -> None:
    it = paper(2)
    it.submit("model=dies,breaks,noted")
    it.until_all("finished", "failed")
    for name, state, attempts, error in (
        ("Dies", "failed", 3, "no progress in 3 attempts: rank 0 was killed by SIGKILL (out of memory?)"),
        ("Breaks", "failed", 1, "rank 0: ValueError: a wrong turn"),
        ("Noted", "finished", 1, None),
    ):
        run = it.run(_target_=f"mine.{name}")
        status = it.status(run)
        assert (status["state"], status["attempts"], status["error"]) == (state, attempts, error)
        assert len(it.journal(run)) == attempts


def test_runs_are_forked_from_one_process_that_holds_torch_and_has_no_thread(paper: Callable[[int], Paper]) -> None:
    it = paper(1)
    it.submit("seed=0,1,2", "trainer.max_steps=2")
    it.until_all("finished")
    begins = it.journal()
    assert len(begins) == 3
    assert [begin.daemon for begin in begins] == it.pools() * 3
    assert len({begin.job for begin in begins}) == 3
    assert all(len(set(begin.command)) == 1 and "import torch" in begin.command[0] for begin in begins)  # no exec
    assert len({begin.torch for begin in begins}) == 1  # address space is random: only in forks torch lies in one place
    assert {begin.threads for begin in begins} == {1}


def test_what_is_edited_after_the_submission_changes_nothing(paper: Callable[[int], Paper]) -> None:
    it = paper(1)
    (it.folder / "hold").touch()
    it.submit("seed=0,1,2", "trainer.max_steps=2")
    it.until(lambda: len(it.journal()) == 1)
    it.write("mine.py", MINE.replace("VERSION = 1", "VERSION = 2"))
    it.write("configs/model/noted.yaml", "_target_: mine.Breaks\nstep_s: 5.0\n")
    (it.folder / "hold").unlink()
    it.until_all("finished")
    assert [begin.version for begin in it.journal()] == [1, 1, 1]
    assert all("step_s: 0.01\n" in (run / "config.yaml").read_text() for run in it.runs)


def test_a_run_too_large_for_the_pool_and_a_sweep_inline_are_refused(paper: Callable[[int], Paper]) -> None:
    it = paper(2)
    for words, problem in (
        (["strategy=ddp", "launcher.num_processes=4"], "4 ranks, but the pool has 2 slots"),
        (["strategy=ddp", "launcher.num_processes=2", "launcher.max_parallel=1"], "2 ranks, but the pool has 1 slot"),
        (["launcher=inline"], "launcher=inline: a sweep takes launcher=local or launcher=slurm"),
    ):
        refused = it.fairexp("train", *SWEEP, "seed=0,1", *words, code=2)
        assert problem in refused.stderr
        assert len(refused.stderr.splitlines()) == 1
        assert not (it.folder / "runs").exists()


def test_a_daemon_that_cannot_start_says_why_in_its_log(paper: Callable[[int], Paper]) -> None:
    it = paper(1)
    (it.folder / "broken").mkdir()
    breaks = "import sys\nif '-c' in sys.orig_argv:\n    sys.modules['torch'] = None\n"  # not for the command itself
    it.write("broken/sitecustomize.py", breaks)
    it.environment["PYTHONPATH"] = f"{it.folder}/broken:{it.environment['PYTHONPATH']}"
    it.submit("seed=0,1")
    it.until(lambda: not it.alive())
    assert set(it.listed().values()) == {"lost"}
    (log,) = (it.folder / "runs/submissions").glob("*/pool.out")
    assert "ModuleNotFoundError: import of torch halted" in log.read_text()


@pytest.fixture
def runs(tmp_path: Path) -> list[RunDir]:
    """Two run folders of an earlier submission: one was cancelled, the other's pool was killed."""
    found = []
    for name, state in (("a-1", "cancelled"), ("b-2", "running")):
        found.append(rundir.create(tmp_path / name, {}, "fairexp", {"num_processes": 1}, {}, submission="earlier"))
        found[-1].set_status(state=state)
    return found


def pool_of(runs: list[RunDir], submitter: dict[str, Any]) -> Pool:
    """A pool that is to run them, not started."""
    paths = [str(run.path) for run in runs]
    return Pool({"uid": "later", "runs": paths, "slots": 0, "devices": ["none"], "submitter": submitter})


def test_a_pool_waits_until_runs_from_before_are_readied_for_it(runs: list[RunDir]) -> None:
    pool = pool_of(runs, own_process())
    assert not pool._is_ready(runs[0].path)
    assert [*pool.queue] == [run.path for run in runs]
    runs[0].set_status(submission="later", state="queued")
    assert pool._is_ready(runs[0].path)


def test_a_pool_leaves_runs_alone_that_its_killed_submitter_has_not_readied(runs: list[RunDir]) -> None:
    pool = pool_of(runs, own_process() | {"started": 0.0})
    assert not pool._is_ready(runs[0].path)
    assert [*pool.queue] == [runs[1].path]
    assert runs[0].status()["state"] == "cancelled"


def test_a_pool_does_not_begin_again_what_was_cancelled_as_it_died(runs: list[RunDir]) -> None:
    pool = pool_of(runs, own_process())
    runs[0].set_status(submission="later", state="preempted", cancel=True)
    assert not pool._is_ready(runs[0].path)
    assert [*pool.queue] == [runs[1].path]
    assert runs[0].status()["state"] == "cancelled"
