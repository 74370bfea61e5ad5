"""`fairexp doctor` on a real Slurm: what it asks the cluster, and its test job."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fairexp.launch import doctor

REPO = Path(__file__).parents[2]
CONFIG: dict[str, Any] = {"trainer": {"device": "auto", "num_workers": 0}, "tracker": {}}
ASKED: dict[str, Any] = {"kind": "slurm", "nodes": 2, "num_processes": 2, "cpus_per_process": 1, "timeout_min": 60}
ASKED |= {"partition": "grace", "signal_lead_s": 60, "mem_gb": 1, "exclude": [], "sbatch": {}, "setup": [], "env": {}}
CLUSTER = ["slurm", "partition", "accounting", "account", "time limit", "nodes", "preemption", "request", "test job"]


@pytest.fixture(autouse=True)
def on_cluster(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is one of the cluster's clients, in a folder of its own."""
    monkeypatch.setenv("SLURM_CONF", cluster.env["SLURM_CONF"])
    monkeypatch.setattr(doctor, "of_machine", lambda launcher, config: [])  # they have tests of their own
    monkeypatch.chdir(tmp_path)


def examined(launcher: dict[str, Any], runs_dir: Path, capfd: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    """The exit code, and the findings by their names."""
    code = doctor.doctor(launcher, CONFIG | {"launcher": launcher, "runs_dir": str(runs_dir)}, as_json=True)
    return code, {each.pop("check"): each for each in json.loads(capfd.readouterr().out)}


def jobs_of_doctor() -> str:
    """Those that are queued or running."""
    listed = subprocess.run(["squeue", "-h", "-o", "%j %T"], capture_output=True, text=True, check=True).stdout
    return "\n".join(line for line in listed.splitlines() if line.startswith("fairexp-doctor") and "COMPL" not in line)


def test_a_cluster_that_can_hold_the_run_passes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "runs/a-1"
    run.mkdir(parents=True)
    (run / "status.json").write_text(json.dumps({"save_s": 0.5}))
    code, found = examined(ASKED, tmp_path / "runs", capfd)
    assert list(found) == CLUSTER
    assert {name: each for name, each in found.items() if each["state"] == "fail"} == {}
    assert code == 0
    assert "cluster mini: MaxArraySize 10" in found["slurm"]["seen"]
    assert "GraceTime 15" in found["partition"]["seen"]
    assert "the slowest save took 0.5 s" in found["preemption"]["seen"]
    assert "accepted, to start at 20" in found["request"]["seen"]
    assert f"sees runs_dir, Python {doctor.this_python()}, torch 2." in found["test job"]["seen"]
    assert found["test job"]["state"] == "ok"
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["a-1"]


def test_what_no_node_can_hold_fails_in_its_own_words_and_in_slurms(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, found = examined(ASKED | {"mem_gb": 5000, "partition": "normal"}, tmp_path, capfd)
    assert code == 1
    assert {name for name, each in found.items() if each["state"] == "fail"} == {"nodes", "request"}
    assert "nodes that can hold it: 0" in found["nodes"]["advice"]
    assert "Requested node configuration is not available" in found["request"]["seen"]


def test_a_partition_that_is_not_there_ends_the_questions(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, found = examined(ASKED | {"partition": "norml"}, tmp_path, capfd)
    assert code == 1
    assert list(found) == ["slurm", "partition"]
    assert "nearest: normal" in found["partition"]["advice"]


@pytest.mark.parametrize(
    ("sbatch", "state", "words"),
    [({"hold": True}, "warn", "pending because: JobHeldUser"), ({"constraint": "x"}, "fail", "Invalid feature")],
)
def test_a_test_job_that_does_not_start_is_cancelled_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sbatch: dict[str, Any], state: str, words: str
) -> None:
    monkeypatch.setattr(doctor, "JOB_WAIT_S", 1.5)
    finding = doctor.test_job(ASKED | {"sbatch": sbatch}, {}, tmp_path)
    assert finding.state == state
    assert words in finding.seen
    assert jobs_of_doctor() == ""
    assert list(tmp_path.iterdir()) == []


def test_a_test_job_is_cancelled_when_its_check_runs_out_of_time(tmp_path: Path) -> None:
    def look() -> doctor.Finding:
        return doctor.test_job(ASKED | {"sbatch": {"hold": True}}, {}, tmp_path)

    [(_, finding)] = doctor.examine([doctor.Check("test job", look, "slurmctld", 2.0)])
    assert finding.seen == "no answer within 2 s"
    assert jobs_of_doctor() == ""
    assert list(tmp_path.iterdir()) == []


def test_without_launcher_slurm_the_cluster_is_only_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, found = examined({"kind": "local"}, tmp_path, capfd)
    assert code == 0
    assert list(found) == ["slurm"]


def test_a_run_that_asks_for_gpus_has_one_tried(tmp_path: Path) -> None:
    setup = [f"echo $SLURM_GPUS_ON_NODE > {tmp_path}/gpus"]
    doctor.test_job(ASKED | {"gpus_per_node": 2, "setup": setup}, {}, tmp_path)
    assert (tmp_path / "gpus").read_text() == "1\n"


def test_a_python_that_nodes_have_not_got_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    finding = doctor.test_job(ASKED, {}, tmp_path)
    assert finding.state == "fail"
    assert "/nonexistent/python: No such file or directory" in finding.seen
    assert finding.advice.startswith("make /nonexistent/python work there")


def test_a_runs_dir_that_nodes_do_not_see_fails(cluster: Any, tmp_path: Path) -> None:
    code = "import json, sys; from pathlib import Path; from fairexp.launch import doctor\n"
    code += f"print(doctor.test_job({ASKED!r}, {{}}, Path({str(tmp_path)!r})))"
    hidden = f'mount -t tmpfs -o size=1m ours {tmp_path} || exit 77; exec "$@"'  # nodes see what is below
    command = ["unshare", "--mount", "sh", "-c", hidden, "sh", sys.executable, "-c", code]
    env = os.environ | {"PYTHONPATH": str(REPO)}
    ended = subprocess.run(command, capture_output=True, text=True, env=env)
    if ended.returncode in (1, 77) and "Traceback" not in ended.stderr:
        pytest.skip("no mounts of our own here")
    assert ended.returncode == 0, ended.stderr
    assert "state='fail'" in ended.stdout
    assert f"what it wrote in {tmp_path} is not seen here" in ended.stdout
