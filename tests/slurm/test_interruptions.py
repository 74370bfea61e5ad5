"""What interrupts a job on a real Slurm, and how its run goes on: saved where there is time, back in the queue exactly when it
should be, and at the end with the bits of a run that nothing interrupted."""

import json
import os
import re
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

STEPS = 40
MINE = (
    *("train", "--config-dir", "configs", "experiment=mine", "launcher=slurm"),
    *(f"trainer.max_steps={STEPS}", "trainer.eval_every=20", "model.delay_s=0.3"),
)
# one rank a node: the sum of two gradients doesn't depend on how DDP has packed them, which a restart changes
TWO_NODES = ("launcher.nodes=2", "launcher.num_processes=1", "strategy=ddp")
REFERENCES: dict[tuple[str, ...], list[tuple[int, str, str]]] = {}


def rows(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl, less a line that is being written."""
    try:
        text = (run / "metrics.jsonl").read_text()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.split("\n")[:-1]]


def step(run: Path) -> int:
    """The last logged step."""
    return max((row["step"] for row in rows(run)), default=0)


def curve(run: Path) -> list[tuple[int, str, str]]:
    """Every loss and every evaluation metric to the last bit, by step."""
    return [
        (row["step"], name, float(value).hex())
        for row in rows(run)
        for name, value in row.items()
        if name in ("train/loss", "train/grad_norm") or name.startswith("eval/")
    ]


def submit(project: Any, *words: str) -> Path:
    """The folder of a run that was submitted."""
    done = project.fairexp(*MINE, *words, "--json")
    assert done.returncode == 0, done.stderr
    return Path(json.loads(done.stdout)["run_dir"])


def job_of(project: Any, run: Path) -> str:
    """The run's job, by `fairexp list`."""
    return listed(project, run)["job"]


def listed(project: Any, run: Path) -> dict[str, Any]:
    """The run as `fairexp list --json` has it."""
    found = json.loads(project.fairexp("list", "--json").stdout)
    return next(each for each in found if each["run_dir"] == str(run))


def under_way(cluster: Any, runs: Sequence[Path], first: int = 12) -> None:
    """Waits until each has a checkpoint behind it and steps after that."""
    cluster.wait(lambda: all(step(run) >= first for run in runs), 90, "the runs are under way")


def finished(project: Any, cluster: Any, runs: Sequence[Path]) -> None:
    """Waits until each has ended as it should."""

    def over() -> bool:
        states = [project.status(run)["state"] for run in runs]
        assert "failed" not in states, [project.status(run).get("error") for run in runs]
        return all(state == "finished" for state in states)

    cluster.wait(over, 120, "the runs have finished")


def uninterrupted(project: Any, *words: str) -> list[tuple[int, str, str]]:
    """The curve of the same run on this machine, in one piece; without the delay, which changes no number, as a name."""
    if words in REFERENCES:
        return REFERENCES[words]
    here = [word for word in MINE if not word.startswith(("launcher", "model.delay_s"))]
    done = project.fairexp(*here, *words, "runs_dir=reference", "launcher.threads_per_process=1", "--json", "--fresh")
    assert done.returncode == 0, done.stderr
    REFERENCES[words] = curve(Path(json.loads(done.stdout)["run_dir"]))
    return REFERENCES[words]


def test_a_preempted_run_saves_and_goes_on_with_and_without_grace(project: Any, cluster: Any) -> None:
    workers = "trainer.num_workers=2"  # Slurm signals them too, and the save still needs them
    low = submit(project, "launcher.partition=low", "name=low", workers)
    grace = submit(project, "launcher.partition=grace", "name=grace")
    lossy = submit(project, "launcher.partition=cancel", "name=lossy")  # PreemptMode=CANCEL: Slurm won't requeue it
    swept = project.fairexp(
        *MINE, "-m", "launcher.partition=low", "name=a,b", "sweep.name=pair", "tracker=wandb", "tracker.mode=offline"
    )
    assert swept.returncode == 0, swept.stderr
    pair = [
        project.runs_dir / job["run"]
        for job in json.loads((project.runs_dir / "sweeps/pair/sweep.json").read_text())["jobs"]
    ]
    runs = [low, grace, lossy, *pair]
    under_way(cluster, runs)
    wide = cluster.occupy("high")
    cluster.wait(lambda: cluster.state(wide) == "RUNNING", 60, "the other job has the nodes")
    for run in runs:
        status = project.status(run)
        assert status["state"] == "preempted", (run.name, status)
        saved = max(int(path.name.partition("_")[2]) for path in (run / "checkpoints").glob("step_*"))
        assert saved == step(run) == status["step"], "no step is lost: there was time to save"
        assert listed(project, run)["state"] == "queued"
    cluster.cancel(wide)
    finished(project, cluster, runs)
    for run in runs:
        status = project.status(run)
        assert (status["attempts"], status["failures"], status["failed_hosts"]) == (2, 0, [])
        assert curve(run) == uninterrupted(project)
    ids = {re.search(r"-([0-9a-f]{8})$", str(path))[1] for path in pair[0].glob("wandb/offline-run-*")}
    assert ids == {pair[0].name.rpartition("-")[2]}, "both attempts are one run of wandb"


def test_a_stop_is_a_requeue_or_an_end_as_it_was_meant(project: Any, cluster: Any) -> None:
    hard = submit(project, "name=hard", "model.delay_s=1.0")
    runs = out_of_time, requeued, by_hand, by_us = [submit(project, f"name={name}") for name in "tqhu"]
    under_way(cluster, [hard], 1)
    cluster.time_out(job_of(project, hard))  # within half a minute
    under_way(cluster, runs)
    jobs = {run: job_of(project, run) for run in runs}
    cluster.run("scancel", "--signal=USR2", jobs[out_of_time])  # as --signal sends it before the time limit
    assert project.fairexp("requeue", requeued.name).returncode == 0
    cluster.cancel(jobs[by_hand])
    assert "1 of 1 runs cancelled" in project.fairexp("cancel", jobs[by_us]).stderr
    cancelled = [by_hand, by_us]
    cluster.wait(
        lambda: all(project.status(run)["state"] == "cancelled" for run in cancelled), 20, "they are cancelled"
    )
    finished(project, cluster, [out_of_time, requeued, hard])
    for run in (out_of_time, requeued, hard):
        # Slurm keeps the limit that the test has cut short, so that run may meet it again
        assert project.status(run)["attempts"] == 2 or run == hard
        assert project.status(run)["failures"] == 0
        assert curve(run) == uninterrupted(project)
    for run in cancelled:  # ten seconds have passed: a naive requeue would have brought them back
        assert listed(project, run)["state"] == "cancelled"
        assert jobs[run] not in " ".join(cluster.squeue())
        assert (run / "checkpoints" / f"step_{step(run):08d}").is_dir()
    assert submit(project, "name=h") == by_hand  # who asks again gets it again
    finished(project, cluster, [by_hand])
    assert curve(by_hand) == uninterrupted(project)


def test_after_a_nodes_failure_the_run_goes_on_elsewhere(project: Any, cluster: Any) -> None:
    wide = submit(project, *TWO_NODES)
    narrow = submit(project, f"launcher.exclude=[{','.join(cluster.nodes[:2])}]")
    under_way(cluster, [wide, narrow])
    hosts = project.status(wide)["hosts"]
    lost = [hosts[1], project.status(narrow)["host"]]
    for host in lost:
        cluster.node("fail", host)
    cluster.node("start", lost[0])
    cluster.run("scontrol", "update", f"nodename={lost[0]}", "state=resume", check=False)
    finished(project, cluster, [wide, narrow])
    assert project.status(narrow)["host"] != lost[1]
    assert project.status(narrow)["failed_hosts"] == [lost[1]]
    assert curve(wide) == uninterrupted(project, "strategy=ddp", "launcher.num_processes=2")
    assert curve(narrow) == uninterrupted(project)
    assert {project.status(run)["attempts"] for run in (wide, narrow)} == {2}


def test_a_rank_that_is_killed_takes_all_nodes_down_and_all_go_on(project: Any, cluster: Any) -> None:
    run = submit(project, *TWO_NODES)
    under_way(cluster, [run])
    os.kill(ranks_of(run)[1], signal.SIGKILL)
    finished(project, cluster, [run])
    status = project.status(run)
    assert status["attempts"] == 2
    assert len(status["failed_hosts"]) == 1
    assert curve(run) == uninterrupted(project, "strategy=ddp", "launcher.num_processes=2")


def ranks_of(run: Path) -> dict[int, int]:
    """The processes of a run's ranks, by rank: their standard output is the rank's log."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            log = os.readlink(entry / "fd" / "1")
        except OSError:
            continue
        if log.startswith(f"{run}/logs/rank_") and "worker" not in (entry / "cmdline").read_text():
            found.setdefault(int(re.search(r"rank_(\d+)\.", log)[1]), int(entry.name))
    return found


DIES = """
import os, signal
from mypaper.nets import MyNet


class Dies(MyNet):
    calls = 0

    def __init__(self, side: int = 8, width: int = 16, num_classes: int = 10, how: str = "kill", delay_s: float = 0.0):
        super().__init__(side, width, num_classes)
        self.how = how

    def forward(self, images):
        self.calls += 1
        if self.calls == 3 and self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.calls == 3:
            raise ValueError("a wrong turn")
        return super().forward(images)
"""


def test_a_crash_loop_stops_and_an_error_of_the_users_code_is_not_repeated(project: Any, cluster: Any) -> None:
    project.write("mypaper/dies.py", DIES)
    project.write("configs/model/dies.yaml", "_target_: mypaper.dies.Dies\nhow: kill\ndelay_s: 0.0\n")
    loops = submit(project, "model=dies", "launcher.max_failures=2")
    raises = submit(project, "model=dies", "model.how=raise", *TWO_NODES)
    cluster.wait(lambda: project.status(raises)["state"] == "failed", 40, "the error is seen")
    cluster.wait(lambda: project.status(loops)["state"] == "failed", 60, "the loop is stopped")
    cluster.wait(lambda: not cluster.squeue(), 30, "nothing is left in the queue")
    status = project.status(raises)
    assert status["attempts"] == 1
    assert re.fullmatch(r"rank \d: ValueError: a wrong turn", status["error"])
    assert project.fairexp("logs", raises.name, "--rank", "1").stdout.count("ValueError: a wrong turn") >= 1
    status = project.status(loops)
    assert status["attempts"] == 2
    assert status["error"].startswith("no progress in 2 attempts: rank 0 was killed by SIGKILL")
    assert len(status["failed_hosts"]) == 2


def test_a_node_that_a_run_failed_on_twice_is_left_out(project: Any, cluster: Any) -> None:
    run = submit(project, "+launcher.sbatch.hold=true")
    bad = cluster.nodes[0]
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps(status | {"failed_hosts": [bad, bad]}))
    job = job_of(project, run)
    cluster.scontrol("update", f"jobid={job}", f"nodelist={bad}")
    cluster.release(job)
    cluster.wait(lambda: cluster.show(job).get("ExcNodeList") == bad, 30, "the node is left out")
    cluster.scontrol("update", f"jobid={job}", "nodelist=")
    finished(project, cluster, [run])
    assert project.status(run)["host"] != bad
    submission = project.runs_dir / "submissions" / project.status(run)["submission"]
    assert bad not in (submission / "job.sh").read_text()


def test_a_job_lost_without_a_word_is_lost_and_the_same_command_goes_on(project: Any, cluster: Any) -> None:
    run = submit(project)
    under_way(cluster, [run])
    os.kill(project.status(run)["pid"], signal.SIGKILL)  # its ranks die with it, and none can say anything
    cluster.wait(lambda: not cluster.squeue(), 30, "the job is gone")
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "running"
    (run / "status.json").write_text(json.dumps(status | {"heartbeat": time.time() - 100}))
    assert listed(project, run)["state"] == "lost"
    assert "lost" in project.fairexp("show", run.name).stdout
    assert submit(project) == run
    finished(project, cluster, [run])
    assert curve(run) == uninterrupted(project)
