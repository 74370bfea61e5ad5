"""Runs that Slurm, a person or a failing machine stops: they save, are queued again exactly where they belong, and end with
the numbers of a run that nothing stopped, bit for bit.

The scenes of a stage are played at the same time, since each waits some ten seconds for Slurm to start a job again; each test
looks at one of them.
"""

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fairexp.config.rundir import RunDir
from fairexp.launch.node import expand
from fairexp.runs.state import alive
from slurm.conftest import KILL_WAIT_S, Cluster, Project, outside, running_cluster

STEPS = 100
PACED = '''"""A network that goes slowly, hangs or dies while there is a file of that name in the folder $ORDERS."""

import os
import signal
import time
from pathlib import Path

from torch import Tensor, nn

from mypaper.nets import MyNet

RANK = os.environ.get("RANK", "0")


def ordered(what: str) -> bool:
    return (Path(os.environ["ORDERS"]) / what).exists()


def said(what: str) -> None:
    (Path(os.environ["ORDERS"]) / what).touch()


class Paced(MyNet):
    """MyNet with dropout: a run that lost its random state would have other losses."""

    def __init__(self, side: int, width: int, num_classes: int) -> None:
        super().__init__(side, width, num_classes)
        self.dropout = nn.Dropout(0.1)
        self.steps = 0
        said("building")
        (Path(os.environ["ORDERS"]) / f"pid {RANK}").write_text(str(os.getpid()))
        while ordered("build slowly"):
            time.sleep(0.05)

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.steps += 1
            self.obey()
        return self.dropout(super().forward(images))

    def obey(self) -> None:
        if ordered("slow"):
            time.sleep(0.05 if self.steps < 12 else 1.0)
        if ordered("hang"):
            said("hanging")
            time.sleep(600)
        if self.steps == 3 and (ordered("raise") or ordered(f"raise {RANK}")):
            raise ValueError("no luck today")
        if self.steps == 3 and ordered("die"):
            os.kill(os.getpid(), signal.SIGKILL)
        if ordered(f"die {RANK}"):
            (Path(os.environ["ORDERS"]) / f"die {RANK}").unlink()
            os.kill(os.getpid(), signal.SIGKILL)
'''
LATE = '''"""fairexp's loop, which returns when it is told to."""

import time

from fairexp.runtime import loop
from mypaper.paced import ordered, said


def fit(run: loop.Run) -> None:
    loop.fit(run)
    said("fitted")
    while ordered("return late"):
        time.sleep(0.05)
'''
PACED_YAML = """\
_target_: mypaper.paced.Paced
side: ${dataset.image_size}
width: 16
num_classes: ${dataset.num_classes}
"""
TRAIN = ("train", "--config-dir", "configs", "experiment=mine", "model=paced", f"trainer.max_steps={STEPS}")
TRAIN = (*TRAIN, "trainer.eval_every=25", "launcher.threads_per_process=1", "--json")
TWO_NODES = ("strategy=ddp", "launcher.nodes=2")


class Run:
    """A run on the cluster that goes slowly until `go_on`, and what is done to it."""

    def __init__(self, stage: "Stage", name: str, *words: str, orders: str | None = None):
        self.stage = stage
        self.name = name
        self.words = (f"name={name}", "launcher=slurm", *words)
        self.orders = stage.project.path / "orders" / (orders or name)
        self.orders.mkdir(parents=True, exist_ok=True)
        self.env = {"ORDERS": str(self.orders)}
        self.path = Path()
        self.order("slow")

    def order(self, what: str) -> None:
        (self.orders / what).touch()

    def go_on(self, what: str = "slow") -> None:
        (self.orders / what).unlink(missing_ok=True)

    def said(self, what: str) -> bool:
        return (self.orders / what).exists()

    def submit(self) -> "Run":
        """By `fairexp train`; the same command each time."""
        done = self.stage.project.fairexp(*TRAIN, *self.words, "--json", env=self.env)
        assert done.returncode == 0, done.stderr
        self.path = Path(json.loads(done.stdout)["run_dir"])
        return self

    def start(self) -> "Run":
        """Submits it and waits until it trains and has saved once: the next save takes no time."""
        with self.stage.starts:
            self.submit()
            self.trains()
        return self

    def trains(self) -> None:
        self.wait(lambda: self.saved() and self.steps()[-1] > self.saved(), "it trains and has saved")

    def status(self) -> dict[str, Any]:
        return json.loads((self.path / "status.json").read_text())

    @property
    def submission(self) -> Path:
        return self.path.parent / "submissions" / self.status()["submission"]

    @property
    def job(self) -> str:
        """As Slurm calls it: "123", or "123_4"."""
        return self.status().get("job_id") or json.loads((self.submission / "submission.json").read_text())["job_id"]

    def rows(self) -> list[dict[str, Any]]:
        file = self.path / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().split("\n")[:-1]] if file.exists() else []

    def steps(self) -> list[int]:
        return [row["step"] for row in self.rows() if "train/loss" in row] or [0]

    def saved(self) -> int:
        """The step of the newest checkpoint."""
        return max((int(path.name[5:]) for path in (self.path / "checkpoints").glob("step_*")), default=0)

    def fairexp(self, verb: str) -> None:
        done = self.stage.project.fairexp(verb, self.path.name)
        assert done.returncode == 0, done.stderr

    def listed(self) -> str:
        """The state that `fairexp list --json` gives it."""
        done = self.stage.project.fairexp("list", "--json")
        assert done.returncode == 0, done.stderr
        (state,) = (row["state"] for row in json.loads(done.stdout) if row["run_dir"] == str(self.path))
        return state

    def wait(self, condition: Callable[[], Any], what: str, timeout: float = 120) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            late = time.monotonic() > deadline
            assert not late, (
                f"{self.name}: {what}: not within {timeout} s\n{self.status()}\n{self.stage.cluster.squeue()}"
            )
            time.sleep(0.1)

    def in_queue(self) -> bool:
        time.sleep(0.4)  # squeue takes a part of two cores that others need
        return bool(self.stage.cluster.squeue("-j", self.job, "-o", "%i"))

    def stops(self, state: str = "preempted") -> None:
        """It comes to this state, and has saved its last step."""
        self.wait(lambda: self.status()["state"] == state, f"it is {state}", 60)
        assert self.saved() == self.steps()[-1] > 10, (self.name, self.saved(), self.steps())

    def ends(self, *states: str) -> dict[str, Any]:
        """It comes to one of these states, and its job to its end; status.json then."""
        self.wait(lambda: self.status()["state"] in ("finished", "failed", "cancelled"), "it ends")
        assert self.status()["state"] in states, self.status()
        self.wait(lambda: not self.in_queue(), "its job leaves the queue", 30)
        assert self.status()["state"] in states, self.status()
        return self.status()

    def finishes(self, attempts: int, failures: int = 0, world_size: int = 1) -> dict[str, Any]:
        """It ends as the run that nothing stopped; status.json then."""
        status = self.ends("finished")
        assert (status["attempts"], status["failures"]) == (attempts, failures), status
        order = [row["step"] for row in self.rows()]
        assert order == sorted(order)
        assert self.steps() == list(range(1, STEPS + 1))
        whole = self.stage.whole(world_size)
        assert numbers(self.path) == numbers(whole)
        assert final(self.path) == final(whole)
        return status


def exact(row: Mapping[str, float]) -> dict[str, float]:
    """The numbers of the experiment, less those of the machine."""
    return {key: value for key, value in row.items() if not key.startswith("perf/")}


def numbers(path: Path) -> dict[int, dict[str, float]]:
    """All metrics by step."""
    found: dict[int, dict[str, float]] = {}
    for line in (path / "metrics.jsonl").read_text().splitlines():
        row = exact(json.loads(line))
        found.setdefault(int(row["step"]), {}).update(row)
    return found


def final(path: Path) -> dict[str, float]:
    return exact(json.loads((path / "summary.json").read_text())["final"])


class Stage:
    """The cluster and a paper's repository, for scenes that are played at the same time."""

    def __init__(self, cluster: Cluster, project: Project):
        self.cluster = cluster
        self.project = project
        self.starts = threading.Semaphore(4)  # more imports of torch at once only slow each other down
        self.turn = threading.Lock()  # and a save has KillWait, on two cores
        self.rest = f"launcher.exclude=[{','.join(cluster.nodes[:2])}]"  # nodes of which nobody takes the whole
        self._computing = threading.Lock()
        self._whole: dict[int, Path] = {}
        project.write("mypaper/paced.py", PACED)
        project.write("mypaper/late.py", LATE)
        project.write("configs/model/paced.yaml", PACED_YAML)
        project.commit("A network that obeys")

    def whole(self, world_size: int) -> Path:
        """The same run on this machine, with nothing to stop it."""
        with self._computing:
            if world_size not in self._whole:
                ranks = ["launcher=inline"]
                if world_size > 1:
                    ranks = ["launcher=local", f"launcher.num_processes={world_size}", "strategy=ddp"]
                (orders := self.project.path / "orders" / f"whole_{world_size}").mkdir(parents=True)
                words = (f"name=whole_{world_size}", "runs_dir=whole", *ranks, "--json")
                done = self.project.fairexp(*TRAIN, *words, env={"ORDERS": str(orders)})
                assert done.returncode == 0, done.stderr
                self._whole[world_size] = Path(json.loads(done.stdout)["run_dir"])
            return self._whole[world_size]

    def anywhere(self, run: Run) -> None:
        """Waits until a run that was to be on a certain node is back in the queue, and lets it run on the others."""
        run.wait(lambda: self.cluster.show(run.job)["JobState"] == "PENDING", "it is requeued")
        self.cluster.scontrol("update", f"JobId={run.job}", "ReqNodeList=")

    def preempt(self, node: str) -> None:
        """A short job of `high` takes the whole node from the jobs of low, grace and cancel."""
        self.cluster.submit("-p", "high", "-w", node, "--exclusive", script="sleep 1")


Scene = Callable[[Stage], Any]


def together(*calls: Callable[[], Any]) -> list[Any]:
    """Their results, in order."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def play(scenes: Mapping[str, Scene], request: pytest.FixtureRequest, stage: Stage) -> Iterator[Callable[[str], Any]]:
    """Plays the scenes that tests of this session look at, before the first one; a function that gives what a scene gave."""
    params = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    wanted = {found["scene"] for found in params if "scene" in found}
    with ThreadPoolExecutor(len(scenes)) as pool:
        played = {name: pool.submit(scene, stage) for name, scene in scenes.items() if name in wanted}
    yield lambda name: played[name].result()


@pytest.fixture(scope="module")
def stage(cluster: Cluster, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return Stage(cluster, new_project(cluster, environment, tmp_path_factory.mktemp("interruptions")))


def new_project(cluster: Cluster, environment: dict[str, str], folder: Path) -> Project:
    (home := folder / "home").mkdir()
    return Project(folder / "paper", outside(environment) | cluster.env | {"HOME": str(home)})


def on(node: str, partition: str = "normal") -> tuple[str, str]:
    return f"launcher.partition={partition}", f"+launcher.sbatch.nodelist='{node}'"


# --- a stop: Slurm or a person says so, and the run can save ---


def low(stage: Stage) -> dict[str, Run]:
    """Runs in `low` whose node a job of `high` takes: Slurm requeues them by itself."""
    node = on(stage.cluster.nodes[0], "low")
    plain = Run(stage, "low", *node)
    workers = Run(stage, "workers", *node, "trainer.num_workers=2")
    tracked = Run(stage, "tracked", *node, "tracker=wandb", "tracker.mode=offline")
    _, _, _, (element, other) = together(plain.start, workers.start, tracked.start, lambda: array(stage))
    runs = {"plain": plain, "workers": workers, "tracked": tracked, "element": element}
    with stage.turn:
        stage.preempt(stage.cluster.nodes[0])
        for run in runs.values():
            run.stops()
            run.go_on()
    for run in runs.values():
        run.finishes(attempts=2)
    other.ends("finished")
    return runs | {"other": other}


def array(stage: Stage) -> list[Run]:
    """An array of two runs, one on the node that is taken away and one elsewhere."""
    asked = ("name=array", "launcher=slurm", "launcher.partition=low", "+launcher.sbatch.hold=true", "-m", "seed=0,1")
    orders = Run(stage, "array").orders
    with stage.starts:
        done = stage.project.fairexp(*TRAIN, *asked, "--json", env={"ORDERS": str(orders)})
        assert done.returncode == 0, done.stderr
        (job,) = json.loads(done.stdout)["jobs"]
        runs = []
        for index, node in enumerate((stage.cluster.nodes[0], stage.cluster.nodes[3])):
            stage.cluster.scontrol("update", f"JobId={job}_{index}", f"ReqNodeList={node}")
            stage.cluster.release(f"{job}_{index}")
            (folder,) = (
                path.parent
                for path in stage.project.runs_dir.glob("array-*/config.yaml")
                if f"\nseed: {index}\n" in path.read_text()
            )
            runs.append(Run(stage, f"element {index}", orders="array"))
            runs[-1].path = folder
        for run in runs:
            run.trains()
    return runs


def grace(stage: Stage) -> None:
    """In `grace` and `cancel` a job that only ends is gone: these requeue themselves."""
    node = stage.cluster.nodes[1]
    runs = [Run(stage, f"in_{partition}", *on(node, partition)) for partition in ("grace", "cancel")]
    unready = Run(stage, "unready", *on(node, "low"))
    unready.order("build slowly")
    together(*(run.start for run in runs), unready.submit)
    unready.wait(lambda: unready.said("building"), "it builds its model")
    with stage.turn:
        stage.preempt(node)
        for run in runs:
            run.stops()
            run.go_on()
    time.sleep(KILL_WAIT_S)
    unready.go_on("build slowly")
    for run in runs:
        run.finishes(attempts=2)
    unready.go_on()  # killed before it could save, which is not its failure
    assert unready.finishes(attempts=2)["failed_hosts"] == []


def early_signal(stage: Stage) -> None:
    """What --signal sends some time before the time limit."""
    run = Run(stage, "early_signal", stage.rest).start()
    with stage.turn:
        stage.cluster.run("scancel", "--signal=USR2", run.job)
        run.stops()
    run.go_on()
    run.finishes(attempts=2)


def early_signal_while_torch_is_imported(stage: Stage) -> None:
    run = Run(stage, "import", stage.rest)
    with stage.starts:
        run.submit()
        run.wait(lambda: run.status()["attempts"] == 1, "it begins")
        stage.cluster.run("scancel", "--signal=USR2", run.job)
        assert not run.said("building")
        run.wait(lambda: run.status()["state"] == "preempted", "it stops")
    assert run.saved() == run.steps()[-1] in (1, 2, 3)
    run.go_on()
    run.finishes(attempts=2)


def time_limit(stage: Stage) -> None:
    """The limit itself, without an earlier signal."""
    run = Run(stage, "time_limit", stage.rest).start()
    stage.cluster.time_out(run.job)
    run.stops()
    stage.cluster.scontrol("update", f"JobId={run.job}", "TimeLimit=10")  # it was cut short
    run.go_on()
    run.finishes(attempts=2)


def time_limit_in_a_long_step(stage: Stage) -> None:
    """It can't save in time, and goes on from its last checkpoint."""
    run = Run(stage, "long_step", stage.rest).start()
    run.order("hang")
    run.wait(lambda: run.said("hanging"), "it hangs")
    stage.cluster.time_out(run.job)
    run.wait(lambda: stage.cluster.show(run.job)["Restarts"] == "1", "it is requeued")
    stage.cluster.scontrol("update", f"JobId={run.job}", "TimeLimit=10")
    time.sleep(KILL_WAIT_S + 1)
    run.go_on("hang")
    run.go_on()
    assert run.finishes(attempts=2, failures=1)["failed_hosts"] == []


def requeue(stage: Stage) -> None:
    """`fairexp requeue`."""
    run = Run(stage, "requeue", stage.rest).start()
    with stage.turn:
        run.fairexp("requeue")
        run.stops()
    run.go_on()
    run.finishes(attempts=2)


def cancelled(stage: Stage, run: Run, cancel: Callable[[], None]) -> None:
    with stage.turn:
        cancel()
        run.stops("cancelled")
    step = run.saved()
    run.ends("cancelled")
    time.sleep(10)
    assert not run.in_queue()
    assert run.listed() == "cancelled"
    run.go_on()
    run.submit()
    run.wait(lambda: run.status()["attempts"] == 2, "it begins again")
    assert run.status()["resumed_at"] == step
    run.finishes(attempts=2)


def scancel(stage: Stage) -> None:
    run = Run(stage, "scancel", stage.rest).start()
    cancelled(stage, run, lambda: stage.cluster.cancel(run.job))


def cancel(stage: Stage) -> None:
    """`fairexp cancel`."""
    run = Run(stage, "cancel", stage.rest).start()
    cancelled(stage, run, lambda: run.fairexp("cancel"))


def scancel_after_the_last_step(stage: Stage) -> None:
    run = Run(stage, "late", stage.rest, "loop._target_=mypaper.late.fit")
    run.order("return late")
    run.go_on()
    with stage.starts:
        run.submit()
        run.wait(lambda: run.said("fitted"), "it has done its steps")
    with stage.turn:
        stage.cluster.cancel(run.job)
        time.sleep(1)
        run.go_on("return late")
        run.finishes(attempts=1)


def crash_loop(stage: Stage) -> None:
    """A rank that is killed at step 3 each time, on the only node there is for it."""
    others = [node for node in stage.cluster.nodes if node != stage.cluster.nodes[2]]
    run = Run(stage, "crash_loop", f"launcher.exclude=[{','.join(others)}]")
    run.order("die")
    run.go_on()
    with stage.starts:
        run.submit()
    status = run.ends("failed")
    assert status["attempts"] == status["failures"] == 3
    assert status["error"] == "no progress in 3 attempts: rank 0 was killed by SIGKILL (out of memory?)"
    assert run.listed() == "failed"


def exception(stage: Stage) -> None:
    run = Run(stage, "exception", stage.rest)
    run.order("raise")
    with stage.starts:
        run.submit()
        status = run.ends("failed")
    assert (status["attempts"], status["error"]) == (1, "rank 0: ValueError: no luck today")
    assert status["host"] in stage.cluster.nodes[2:]
    assert not run.in_queue()


def no_gpu(stage: Stage) -> None:
    """What a rank can't do before it builds anything is an error too, and no reason to try again."""
    if Path("/dev/nvidia0").exists():
        pytest.skip("this machine has a GPU")
    run = Run(stage, "no_gpu", stage.rest, "trainer.device=cuda", "launcher.gpus_per_node=1")
    with stage.starts:
        run.submit()
        status = run.ends("failed")
    assert status["attempts"] == 1
    assert "cuda" in status["error"].lower()


def a_node_fails_the_run_twice(stage: Stage) -> None:
    run = Run(stage, "twice", stage.rest).start()
    bad = run.status()["host"]
    RunDir(run.path).set_status(failed_hosts=[bad])  # as if it had been so before
    with stage.turn:
        run.order("die 0")
        run.wait(lambda: run.status()["state"] == "preempted", "its rank is killed")
    assert run.status()["failed_hosts"] == [bad, bad]
    excluded = sorted({*stage.cluster.nodes[:2], bad})
    run.wait(lambda: expand(stage.cluster.show(run.job)["ExcNodeList"]) == excluded, "it excludes the node")
    run.fairexp("cancel")  # and submitted anew it keeps away too
    run.ends("cancelled")
    run.go_on()
    run.submit()
    run.finishes(attempts=2)
    assert run.status()["host"] not in excluded


def sent_back_to_a_bad_node(stage: Stage) -> None:
    run = Run(stage, "back", stage.rest).start()
    bad = run.status()["host"]
    with stage.turn:
        run.fairexp("requeue")
        run.stops()
    RunDir(run.path).set_status(failed_hosts=[bad, bad])
    run.go_on()
    run.finishes(attempts=2)
    assert run.status()["host"] != bad


def killed_without_a_word(stage: Stage) -> None:
    run = Run(stage, "killed", stage.rest).start()
    os.kill(run.status()["pid"], signal.SIGKILL)
    run.wait(lambda: not run.in_queue(), "its job leaves the queue")
    assert run.status()["state"] == "running"
    run.wait(lambda: run.listed() == "lost", "`fairexp list` notices", 20)
    run.go_on()
    run.submit()
    run.finishes(attempts=2)


STOPS: dict[str, Scene] = {
    function.__name__: function
    for function in (
        time_limit,  # the longest first: Slurm looks at time limits twice a minute
        time_limit_in_a_long_step,
        crash_loop,
        low,
        grace,
        sent_back_to_a_bad_node,
        a_node_fails_the_run_twice,
        scancel,
        cancel,
        killed_without_a_word,
        early_signal,
        early_signal_while_torch_is_imported,
        requeue,
        scancel_after_the_last_step,
        exception,
        no_gpu,
    )
}


@pytest.fixture(scope="module")
def stops(request: pytest.FixtureRequest, stage: Stage) -> Iterator[Callable[[str], Any]]:
    yield from play(STOPS, request, stage)


@pytest.mark.parametrize("scene", [name for name in STOPS if name != "low"])
def test_a_run_on_one_node(scene: str, stops: Callable[[str], Any]) -> None:
    stops(scene)


@pytest.mark.parametrize("scene", ["low"])
class TestPreempted:
    """Without grace time: Slurm requeues by itself, and kills soon."""

    def test_runs_are_requeued_and_go_on_where_they_stopped(self, scene: str, stops: Callable[[str], Any]) -> None:
        for run in stops(scene).values():
            assert run.status()["failed_hosts"] == []

    def test_data_loading_workers_live_until_the_save(self, scene: str, stops: Callable[[str], Any]) -> None:
        run = stops(scene)["workers"]  # Slurm signals each process of a job
        assert "num_workers: 2" in (run.path / "config.yaml").read_text()
        assert run.status()["attempts"] == 2

    def test_the_attempts_are_one_run_of_wandb(self, scene: str, stops: Callable[[str], Any]) -> None:
        run = stops(scene)["tracked"]
        folders = sorted((run.path / "wandb").glob("offline-run-*"))
        assert [folder.name.rpartition("-")[2] for folder in folders] == [run.path.name.rpartition("-")[2]] * 2

    def test_the_other_elements_of_an_array_go_on(self, scene: str, stops: Callable[[str], Any]) -> None:
        runs = stops(scene)
        element, other = runs["element"], runs["other"]
        assert [run.job.partition("_")[2] for run in (element, other)] == ["0", "1"]
        assert [run.status()["attempts"] for run in (element, other)] == [2, 1]


# --- a failure: a node's, or one of several nodes' ---


def node_fails(stage: Stage) -> None:
    """A run on that node alone goes on elsewhere, one that has another node too when both are there again."""
    nodes = stage.cluster.nodes[:2]
    alone = Run(stage, "alone", *on(nodes[0]))
    pair = Run(stage, "pair", *TWO_NODES, *on(",".join(nodes)))
    together(alone.start, pair.start)
    stage.cluster.node("fail", nodes[0])
    for run in (alone, pair):
        run.go_on()
    stage.anywhere(alone)
    status = alone.finishes(attempts=2, failures=1)
    assert status["failed_hosts"] == [nodes[0]] != [status["host"]]
    pair.wait(lambda: stage.cluster.show(pair.job)["JobState"] == "PENDING", "it is requeued")
    assert pair.listed() == "queued", pair.status()
    stage.cluster.node("start", nodes[0])
    status = pair.finishes(attempts=2, failures=1, world_size=2)
    assert status["failed_hosts"] == [nodes[0]]


def lost_from_sight(stage: Stage) -> None:
    """Slurm can't see the node any more, where the run lives on while it is started elsewhere."""
    node = stage.cluster.nodes[3]
    run = Run(stage, "lost_from_sight", *on(node)).start()
    rank, job = int((run.orders / "pid 0").read_text()), run.status()["pid"]
    stage.cluster.node("stop", node)
    stage.cluster.scontrol("update", f"nodename={node}", "state=down", "reason=test")
    stage.anywhere(run)
    assert alive(rank, None)
    run.wait(lambda: run.status()["attempts"] == 2, "it begins elsewhere")
    run.wait(lambda: not alive(rank, None), "the old one ends", 5)
    run.wait(lambda: not alive(job, None), "and its job, in silence", 10)
    assert run.status()["state"] == "running"
    run.go_on()
    status = run.finishes(attempts=2, failures=1)
    assert status["failed_hosts"] == [node]


def rank_killed(stage: Stage) -> None:
    """One rank of two, where the scheduler takes its time to answer: the other node's part mustn't end the job before."""
    nodes = stage.cluster.nodes[1:3]
    run = Run(stage, "rank_killed", *TWO_NODES, *on(",".join(nodes)))
    slow = run.orders / "scontrol"
    slow.write_text(f'#!/bin/sh\nsleep 3\nexec {shutil.which("scontrol")} "$@"\n')
    slow.chmod(0o755)
    run.env["PATH"] = f"{run.orders}:{os.environ['PATH']}"
    run.start()
    run.order("die 1")
    run.wait(lambda: not run.said("die 1"), "rank 1 is killed")
    first = int((run.orders / "pid 0").read_text())
    run.wait(lambda: not alive(first, None), "rank 0 ends too", 5)
    run.wait(lambda: run.status()["state"] == "preempted", "it is requeued", 10)
    assert f"rank 1 on {nodes[1]} was killed by SIGKILL" in run.status()["error"]
    run.go_on()
    status = run.finishes(attempts=2, failures=1, world_size=2)
    assert status["failed_hosts"] == [nodes[1]]


def rank_raises(stage: Stage) -> None:
    nodes = stage.cluster.nodes[1:3]
    run = Run(stage, "rank_raises", *TWO_NODES, *on(",".join(nodes)))
    run.order("raise 1")
    with stage.starts:
        run.submit()
        status = run.ends("failed")
    assert (status["attempts"], status["error"]) == (1, f"rank 1 on {nodes[1]}: ValueError: no luck today")


def cancelled_in_the_queue(stage: Stage) -> None:
    """Slurm may start a run of several nodes once more after it was cancelled."""
    nodes = stage.cluster.nodes[1:3]
    run = Run(stage, "called_off", *TWO_NODES, *on(",".join(nodes)), "+launcher.sbatch.hold=true")
    with stage.starts:
        run.submit()
        RunDir(run.path).set_status(state="cancelled")
        stage.cluster.release(run.job)
        run.wait(lambda: not run.in_queue(), "its nodes see that there is nothing to do", 20)
    assert run.status()["attempts"] == 0


FAILURES: dict[str, Scene] = {
    function.__name__: function
    for function in (node_fails, lost_from_sight, rank_killed, rank_raises, cancelled_in_the_queue)
}


@pytest.fixture(scope="module")
def failures(request: pytest.FixtureRequest, stage: Stage) -> Iterator[Callable[[str], Any]]:
    yield from play(FAILURES, request, stage)


@pytest.mark.parametrize("scene", FAILURES)
def test_a_failure(scene: str, failures: Callable[[str], Any]) -> None:
    failures(scene)


# --- nodes that don't share this host's name and network ---


def test_two_nodes_with_addresses_of_their_own(
    environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    with running_cluster(NET="netns", GPUS="0") as apart:
        stage = Stage(apart, new_project(apart, environment, tmp_path_factory.mktemp("apart")))
        run = Run(stage, "apart", *TWO_NODES).start()
        assert tuple(run.status()["hosts"]) == apart.nodes[:2]
        assert json.loads((run.path / "environment.json").read_text())["host"] == apart.nodes[0]
        (meeting,) = (json.loads(path.read_text()) for path in (run.path / "submit").glob("meeting_*"))
        assert not meeting["address"].startswith("127.")
        apart.run("scancel", "--signal=USR2", run.job)
        run.stops()
        run.go_on()
        run.finishes(attempts=2, world_size=2)
