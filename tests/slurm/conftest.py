"""A real Slurm cluster of four nodes on this machine, and a paper's repository whose runs it takes."""

import fcntl
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

REPO = Path(__file__).parents[2]
SCRIPT = REPO / "scripts" / "slurm-cluster"
STATES = Path("/tmp")  # not pytest's folder: the path of a unix socket is short
NUM_NODES = 4
GRACE_S = 15  # of the partition `grace`
KILL_WAIT_S = 5  # between SIGTERM and SIGKILL
MAX_ARRAY_SIZE = 101  # so the largest index is 100, and a longer sweep has to be split
LETTERS = iter("npqrs")  # one a cluster of this process

Seen = TypeVar("Seen")


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker("slurm")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Iterator[None]:
    """Without a cluster the tests that are skipped are one line of the summary, with the one reason."""
    try:
        return (yield)
    except pytest.skip.Exception as skipped:  # a fixture's counts as the test's own, at the test's line
        pytest.skip(str(skipped))


class Cluster:
    """A cluster that is up, asked and told by Slurm's own commands. Jobs are "123", or "123_4" for an element of an array."""

    def __init__(self, state: Path, nodes: tuple[str, ...]):
        self.folder = state
        self.nodes = nodes
        self.env = {"SLURM_CONF": str(state / "etc" / "slurm.conf")}  # all that a client needs
        self.damaged: dict[str, str] = {}  # the last action on a node, until it is back

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Any command as the cluster's client; that it fails is the test's failure, with what it said."""
        done = subprocess.run(command, env=outside() | self.env, capture_output=True, text=True, timeout=120)
        assert not check or done.returncode == 0, f"{' '.join(command)}:\n{done.stdout}{done.stderr}"
        return done

    def squeue(self, *args: str) -> list[str]:
        """Lines without the header; without arguments "JOB STATE REASON" of what is pending or running, elements one by one."""
        return self.run("squeue", "-h", *(args or ("-r", "-o", "%i %T %r"))).stdout.splitlines()

    def scontrol(self, *args: str) -> str:
        return self.run("scontrol", *args).stdout

    def sacct(self, job: str, *args: str, fields: str = "JobID,State,ExitCode") -> list[dict[str, str]]:
        """A row a job or element, some seconds late; with "-D" also a row an attempt that was requeued."""
        command = ("sacct", "-n", "-P", "-X", "-j", job, "-o", fields, *args)
        names = fields.split(",")
        return [dict(zip(names, line.split("|"), strict=True)) for line in self.run(*command).stdout.splitlines()]

    def states(self, job: str) -> dict[str, str]:
        """The state of a job, or of each element of an array, as the controller has it now (it forgets after 5 minutes)."""
        rows = self.squeue("-r", "-t", "all", "-j", job, "-o", "%i %T")
        return dict(sorted(row.split() for row in rows))

    def state(self, job: str) -> str:
        """Of a single job or element."""
        (state,) = self.states(job).values()
        return state

    def show(self, job: str) -> dict[str, str]:
        """`scontrol show job` of a single job or element: JobState, Reason, Restarts, NodeList, TimeLimit, ..."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.scontrol("show", "job", "-o", job)))

    def submit(self, *options: str, script: str = "sleep 600") -> str:
        """A plain job by sbatch, for instance `submit("-p", "low", "--array=0-3")`; its id."""
        return self.run("sbatch", "--parsable", "-o", "/dev/null", *options, "--wrap", script).stdout.strip()

    def occupy(self, partition: str = "normal", nodes: int = NUM_NODES) -> str:
        """A job that takes whole nodes, once it runs; in `high` it preempts those of low, grace and cancel. Its id."""
        return self.submit("-p", partition, "-N", str(nodes), "--exclusive")

    def hold(self, job: str) -> None:
        self.scontrol("hold", job)

    def release(self, job: str) -> None:
        self.scontrol("release", job)

    def requeue(self, job: str) -> None:
        self.scontrol("requeue", job)

    def time_out(self, job: str, seconds: int = 1) -> None:
        """Ends a running job as its time limit would: with TIMEOUT, within half a minute after these seconds."""
        self.scontrol("update", f"jobid={job}", f"EndTime=now+{seconds}")

    def cancel(self, job: str) -> None:
        self.run("scancel", job)

    def cancel_all(self, timeout: float = 60) -> None:
        """Returns when nothing is pending, running or completing."""
        if jobs := self.squeue("-o", "%A"):
            self.run("scancel", *sorted(set(jobs)), check=False)  # one may have ended meanwhile
            self.wait(lambda: not self.squeue(), timeout, "an empty queue")

    def node(self, action: str, name: str) -> None:
        """What scripts/slurm-cluster does to a node: fail, kill, stop, start, cut or join it."""
        self.damaged[name] = action
        self.run(str(SCRIPT), "node", "-d", str(self.folder), action, name)
        if action == "start":
            del self.damaged[name]

    def node_states(self) -> dict[str, str]:
        """idle, mixed, allocated, completing, down, drained, ...; with a mark such as * while a node doesn't answer."""
        return dict(
            line.split() for line in self.run("sinfo", "-h", "-N", "-p", "normal", "-o", "%N %T").stdout.splitlines()
        )

    def restore(self) -> None:
        """Every node is in use again, and the queue is empty. Takes no time where that is so already."""
        # nodes first: a job on a node that doesn't answer stays in the queue
        broken = {name for name, state in self.node_states().items() if re.search(r"^down|^drain|\*", state)}
        for name in sorted(broken | set(self.damaged)):
            # refused by a node that isn't down
            self.run("scontrol", "update", f"nodename={name}", "state=resume", check=False)
            if self.damaged.get(name) == "cut":
                self.node("join", name)
            self.node("start", name)
        self.cancel_all()

    def wait(self, condition: Callable[[], Seen], timeout: float = 60, what: str = "the condition") -> Seen:
        """The condition's first true value; after so many seconds the test fails and shows the queue."""
        deadline = time.monotonic() + timeout
        while not (seen := condition()):
            queue = "\n".join(self.squeue()) if time.monotonic() > deadline else None
            assert queue is None, f"{what}: not within {timeout} s; in the queue:\n{queue}"
            time.sleep(0.1)
        return seen


def outside(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment, less what would point Slurm's commands elsewhere or change what they print."""
    names = re.compile(r"(SLURM|SBATCH|SQUEUE|SINFO|SCONTROL|SACCT|SALLOC|SRUN)_")
    return {name: value for name, value in environment.items() if not names.match(name)}


def slurm_cluster(*words: str, state: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """scripts/slurm-cluster, in a session of its own: a Ctrl-C is for pytest, which then takes the cluster down."""
    environment = outside() | {f"SLURM_CLUSTER_{name}": value for name, value in settings.items()}
    command = [SCRIPT, *words, "-d", state]
    return subprocess.run(command, env=environment, capture_output=True, text=True, start_new_session=True)


@contextmanager
def running_cluster(**settings: str) -> Iterator[Cluster]:
    """A cluster of its own, down again at the end; the settings are the script's, for instance `NET="netns"`."""
    letter = next(LETTERS)
    state = STATES / f"fairexp-slurm-{os.getpid()}{letter}"
    prefix = f"{os.getpid():x}{letter}"  # of the node names, which other clusters on this machine mustn't have
    settings = {
        "PREFIX": prefix,
        "SUBNET": f"10.{ord(letter)}.{os.getpid() % 256}",
        "GRACE": str(GRACE_S),
        "KILL_WAIT": str(KILL_WAIT_S),
        "EXTRA_CONF": f"MaxArraySize={MAX_ARRAY_SIZE}",
        **settings,
    }
    state.mkdir()
    with open(state / "session", "w") as session:
        fcntl.flock(session, fcntl.LOCK_EX)  # the kernel unlocks it when this process is gone
        try:
            up = slurm_cluster("up", str(NUM_NODES), state=state, **settings)
            if up.returncode:
                said = [" ".join(line.split()) for line in up.stderr.splitlines()[-3:]]
                pytest.skip(f"scripts/slurm-cluster up failed: {' / '.join(said)}")
            yield Cluster(state, tuple(f"{prefix}{k + 1}" for k in range(NUM_NODES)))
        finally:
            down = slurm_cluster("down", "--purge", state=state)
            assert down.returncode == 0, down.stderr


def take_down_leftovers() -> None:
    """Clusters of test sessions that were killed."""
    for state in STATES.glob("fairexp-slurm-*"):
        if state.stat().st_uid != os.geteuid() or not (state / "session").exists():
            continue
        with open(state / "session") as session:
            try:
                fcntl.flock(session, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            down = slurm_cluster("down", "--purge", state=state)
            assert down.returncode == 0, down.stderr


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Four nodes of four CPUs and four GPUs that only exist on paper; partitions normal, low, grace, cancel and high. They
    share this host's name and network; SLURM_CLUSTER_NET=netns gives each its own."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("a Slurm cluster on this machine needs Linux and root")
    absent = subprocess.run([SCRIPT, "missing"], capture_output=True, text=True, check=True).stdout.split()
    if absent:
        pytest.skip(f"{', '.join(absent)}: not here; scripts/test --system installs Slurm")
    take_down_leftovers()
    with running_cluster(NET=os.environ.get("SLURM_CLUSTER_NET", "host")) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def unused(cluster: Cluster) -> Iterator[None]:
    """Each test leaves the next one an empty queue and four nodes."""
    yield
    cluster.restore()


NET = '''"""A network of the paper's own."""

import time

from torch import Tensor, nn


class MyNet(nn.Module):
    """Class scores (batch, num_classes) from images (batch, 1, side, side); each forward pass takes `delay_s` longer."""

    def __init__(self, side: int, width: int, num_classes: int, delay_s: float = 0.0) -> None:
        super().__init__()
        self.delay_s = delay_s
        self.first = nn.Linear(side * side, width)
        self.second = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        time.sleep(self.delay_s)
        return self.second(self.first(images.flatten(1)).relu())
'''
MODEL_YAML = """\
_target_: mypaper.nets.MyNet
side: ${dataset.image_size}
width: 16
num_classes: ${dataset.num_classes}
delay_s: 0.0
"""
EXPERIMENT_YAML = """\
# @package _global_
defaults:
  - override /model: mynet
  - override /dataset: digits
  - override /tracker: none
trainer:
  max_steps: 40
  max_epochs: null
  global_batch_size: 64
  log_every: 1
  eval_every: null
  device: cpu
checkpoint:
  every: 10
"""


class Project:
    """A paper's repository, committed: configs/model/mynet.yaml, configs/experiment/mine.yaml, mypaper/nets.py."""

    def __init__(self, path: Path, environment: dict[str, str]):
        self.path = path
        self.env = environment
        self.runs_dir = path / "runs"
        files = {
            ".gitignore": "runs/\n__pycache__/\n",
            "mypaper/__init__.py": "",
            "mypaper/nets.py": NET,
            "configs/model/mynet.yaml": MODEL_YAML,
            "configs/experiment/mine.yaml": EXPERIMENT_YAML,
        }
        for name, text in files.items():
            self.write(name, text)
        self.git("init", "-q")
        self.commit("The paper's first experiment")

    def write(self, name: str, text: str) -> None:
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        (self.path / name).write_text(text, encoding="utf-8")

    def git(self, *words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=self.path, env=self.env, check=True, capture_output=True, text=True
        ).stdout

    def commit(self, message: str) -> None:
        self.git("add", "-A")
        self.git("-c", "user.name=Ada", "-c", "user.email=ada@example.org", "commit", "-q", "-m", message)

    def fairexp(
        self, *words: str, env: dict[str, str] | None = None, timeout: float = 240
    ) -> subprocess.CompletedProcess[str]:
        """`fairexp("train", "--config-dir", "configs", "experiment=mine")` in the repository: the finished process."""
        return subprocess.run(
            self.command(*words),
            cwd=self.path,
            env=self.env | (env or {}),
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "fairexp", *words]

    @property
    def runs(self) -> list[Path]:
        """The run folders, the oldest first."""
        folders = {path.parent for path in self.runs_dir.glob("*/status.json")}
        return sorted(folders, key=lambda path: json.loads((path / "status.json").read_text())["created"])

    @property
    def run(self) -> Path:
        """The folder of the one run that there is."""
        (path,) = self.runs
        return path

    def status(self, run: Path | None = None) -> dict[str, Any]:
        return json.loads(((run or self.run) / "status.json").read_text())


@pytest.fixture
def project(cluster: Cluster, environment: dict[str, str], tmp_path: Path) -> Project:
    """A paper's repository on the cluster's submitting host, with a home folder of its own."""
    (home := tmp_path / "home").mkdir()
    return Project(tmp_path / "a paper, été", outside(environment) | cluster.env | {"HOME": str(home)})
