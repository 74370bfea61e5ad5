"""A run on several nodes that hangs: its nodes agree on it, name the rank, and the run starts again; a suspended job is left
alone."""

import json
import subprocess
import time

from slurm.conftest import Cluster, Project

LIMIT_S = 8.0
STOPS = '''"""A network that stops its own process once, in its fifteenth step on rank 1."""

import os
import signal

from torch import Tensor

from mypaper.nets import MyNet


class Stops(MyNet):
    steps = 0

    def forward(self, images: Tensor) -> Tensor:
        self.steps += self.training
        if self.steps == 15 and os.environ["RANK"] == "1" and os.environ["FAIREXP_ATTEMPT"] == "1":
            os.kill(os.getpid(), signal.SIGSTOP)
        return super().forward(images)
'''
TRAIN = ("train", "--config-dir", "configs", "experiment=mine", "launcher=slurm", "--follow")
TWO_NODES = ("strategy=ddp", "launcher.nodes=2", "launcher.threads_per_process=1")


def test_a_hang_on_two_nodes_names_the_rank_and_its_host_and_the_run_is_requeued(
    cluster: Cluster, project: Project
) -> None:
    project.write("mypaper/stops.py", STOPS)
    model = (
        "_target_: mypaper.stops.Stops\nside: ${dataset.image_size}\nwidth: 16\nnum_classes: ${dataset.num_classes}\n"
    )
    project.write("configs/model/stops.yaml", model)
    ended = project.fairexp(*TRAIN, *TWO_NODES, "model=stops", f"trainer.hang_timeout_s={LIMIT_S}")
    assert ended.returncode == 0, ended.stderr
    status = project.status()
    assert (status["state"], status["attempts"], status["step"]) == ("finished", 2, 40)
    verdict = json.loads((project.run / "logs" / "hang.attempt_1.json").read_text())
    assert verdict["rank"] == 1
    assert verdict["host"] in cluster.nodes
    assert verdict["host"] != verdict["ranks"][0]["host"]
    assert "it is stopped by a signal; rank 0 waits in step 15" in verdict["line"]
    assert "stops.py:17 in forward" in verdict["line"]
    assert verdict["time"] - max(rank["since"] for rank in verdict["ranks"]) < LIMIT_S
    assert status["hang"] == verdict["line"]
    assert status["failed_hosts"] == [verdict["host"]]
    for rank in (0, 1):
        assert verdict["line"] in (project.run / "logs" / f"rank_{rank}.attempt_1.log").read_text()
        assert "in fit" in (project.run / "logs" / f"stacks_rank_{rank}.attempt_1.txt").read_text()


def test_a_suspended_job_is_no_hang(cluster: Cluster, project: Project) -> None:
    words = ("model.delay_s=0.05", "trainer.max_steps=200", f"trainer.hang_timeout_s={LIMIT_S}")
    process = subprocess.Popen(
        project.command(*TRAIN, *TWO_NODES, *words),
        cwd=project.path,
        env=project.env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        cluster.wait(lambda: project.runs and project.status()["state"] == "running" and project.status()["step"] > 5)
        job = project.status()["job_id"]
        cluster.scontrol("suspend", job)
        time.sleep(LIMIT_S + 2)
        cluster.scontrol("resume", job)
        assert process.wait(120) == 0
    finally:
        process.kill()
        process.wait()
    assert (project.status()["state"], project.status()["attempts"]) == ("finished", 1)
