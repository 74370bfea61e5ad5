"""`fairexp doctor` on a real Slurm: what it asks the cluster, and its test job."""

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fairexp.config import schema
from fairexp.config.compose import compose
from fairexp.launch.doctor import cluster as ours
from fairexp.launch.doctor import run
from fairexp.launch.doctor.check import Check, Finding, examine

REPO = Path(__file__).parents[2]
ASKED = ["launcher=slurm", "launcher.partition=grace", "launcher.nodes=2", "launcher.num_processes=2"]
ASKED += ["launcher.cpus_per_process=1", "launcher.mem_gb=1", "launcher.timeout_min=60", "launcher.signal_lead_s=60"]


@pytest.fixture(autouse=True)
def on_cluster(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is one of the cluster's clients, in a folder of its own."""
    monkeypatch.setenv("SLURM_CONF", cluster.env["SLURM_CONF"])
    monkeypatch.setattr(run, "of_installation", lambda tracker, runs_dir: [])  # they have tests of their own
    monkeypatch.chdir(tmp_path)


def examined(runs_dir: Path, capfd: pytest.CaptureFixture[str], *overrides: str) -> dict[str, dict[str, str]]:
    """The findings by their names."""
    run.doctor(compose([*ASKED, *overrides, f"runs_dir='{runs_dir}'"]).config, as_json=True)
    return {each["check"]: each for each in json.loads(capfd.readouterr().out)}


def job(runs_dir: Path, *overrides: str) -> Finding:
    config = compose([*ASKED, *overrides]).config
    launcher, trainer = schema.launcher_of(config), schema.Trainer(**config["trainer"])
    assert isinstance(launcher, schema.Slurm)
    return ours.test_job(launcher, 2, trainer, runs_dir)


def jobs_of_doctor() -> str:
    """Those that are queued or running."""
    listed = subprocess.run(["squeue", "-h", "-o", "%j %T"], capture_output=True, text=True, check=True).stdout
    return "\n".join(line for line in listed.splitlines() if line.startswith("fairexp-doctor") and "COMPL" not in line)


def test_a_cluster_that_can_hold_the_run_passes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    runs_dir = tmp_path / "my runs$(touch X)"
    (runs_dir / "a-1").mkdir(parents=True)
    (runs_dir / "a-1/status.json").write_text(json.dumps({"save_s": 0.5}))
    found = examined(runs_dir, capfd)
    assert list(found) == ["slurm", "accounting", "partition", "nodes", "preemption", "test job"]
    assert {name: each for name, each in found.items() if each["state"] != "ok"} == {}
    assert "cluster mini: MaxArraySize 10" in found["slurm"]["seen"]
    assert "GraceTime and KillWait 20 s" in found["preemption"]["seen"]
    assert "the slowest save took 0.5 s" in found["preemption"]["seen"]
    assert "4 of 4 up" in found["nodes"]["seen"]
    assert "sees runs_dir; Python 3." in found["test job"]["seen"]
    assert "torch 2." in found["test job"]["seen"]
    assert [path.name for path in runs_dir.iterdir()] == ["a-1"]


def test_a_partition_that_is_not_there_ends_the_questions(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = examined(tmp_path, capfd, "launcher.partition=norml")
    assert list(found) == ["slurm"]
    assert "nearest: normal" in found["slurm"]["advice"]


def test_a_controller_that_hangs_does_not_hang_doctor(cluster: Any) -> None:
    controller = int((cluster.folder / "run/slurmctld.pid").read_text().split()[0])
    launcher: Any = schema.launcher_of(compose(ASKED).config)
    os.kill(controller, signal.SIGSTOP)
    try:
        ((_, finding),) = examine([Check("slurm", partial(ours.slurm, launcher), "slurmctld", 2.0)])
    finally:
        os.kill(controller, signal.SIGCONT)
    assert finding == Finding("fail", "no answer within 2 s", "slurmctld hangs")


def test_a_job_that_does_not_start_is_cancelled_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "JOB_WAIT_S", 1.5)
    finding = job(tmp_path, "+launcher.sbatch.hold=true")
    assert finding.state == "warn"
    assert "PENDING JobHeldUser" in finding.seen
    refused = job(tmp_path, "launcher.constraint=x")
    assert refused.state == "fail"
    assert refused.seen.startswith("sbatch would refuse a run: Invalid feature")
    assert jobs_of_doctor() == ""
    assert list(tmp_path.iterdir()) == []


def test_a_job_is_cancelled_when_its_check_runs_out_of_time(tmp_path: Path) -> None:
    look = partial(job, tmp_path, "+launcher.sbatch.hold=true")
    ((_, finding),) = examine([Check("test job", look, "slurmctld", 3.0)])
    assert finding.seen == "no answer within 3 s"
    assert jobs_of_doctor() == ""
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_asks_for_gpus_has_one_tried(tmp_path: Path) -> None:
    finding = job(
        tmp_path, "launcher.gpus_per_node=2", f"launcher.setup=['echo $SLURM_GPUS_ON_NODE > {tmp_path}/gpus']"
    )
    assert (tmp_path / "gpus").read_text() == "1\n"
    assert "torch can't use a GPU" in finding.advice  # they only exist on paper


def test_a_python_that_nodes_have_not_got_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    finding = job(tmp_path)
    assert finding.state == "fail"
    assert "/nonexistent/python: not found" in finding.seen
    assert finding.advice.startswith("make /nonexistent/python work there")


def test_a_runs_dir_that_nodes_do_not_see_fails(tmp_path: Path) -> None:
    code = "from tests.slurm.test_doctor import Path, job\n"
    code += f"print(job(Path({str(tmp_path)!r})))"
    hidden = f'mount -t tmpfs -o size=1m ours {tmp_path} || exit 77; exec "$@"'  # nodes see what is below
    command = ["unshare", "--mount", "sh", "-c", hidden, "sh", sys.executable, "-c", code]
    env = os.environ | {"PYTHONPATH": str(REPO)}
    ended = subprocess.run(command, capture_output=True, text=True, env=env)
    if ended.returncode in (1, 77) and "Traceback" not in ended.stderr:
        pytest.skip("no mounts of our own here")
    assert ended.returncode == 0, ended.stderr
    assert "state='fail'" in ended.stdout
    assert f"what it wrote in {tmp_path} is not seen here" in ended.stdout
