"""`fairexp doctor`: each check on this machine's real parts, and what it makes of those that this machine hasn't."""

import errno
import fcntl
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fairexp.config import schema
from fairexp.config.compose import compose
from fairexp.launch.doctor import cluster, machine, run
from fairexp.launch.doctor.check import Check, Finding, examine, judge
from fairexp.launch.doctor.run import doctor

KEY = "0123456789abcdef0123456789abcdef01234567"


@cache
def config(*overrides: str) -> dict[str, Any]:
    return compose(overrides).config


def slurm(**changes: Any) -> schema.Slurm:
    launcher = schema.launcher_of(config("launcher=slurm"))
    assert isinstance(launcher, schema.Slurm)
    return replace(launcher, **changes)


def trainer(**changes: Any) -> schema.Trainer:
    return replace(schema.Trainer(**config()["trainer"]), **changes)


def says(finding: Finding, state: str, words: str = "") -> None:
    assert finding.state == state, finding
    assert words in f"{finding.seen} -> {finding.advice}"


# --- the verb ---


def test_a_machine_is_looked_at_and_nothing_is_left_behind(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = doctor(config() | {"runs_dir": str(tmp_path / "runs")}, as_json=True)
    findings = json.loads(capfd.readouterr().out)
    states = {each["check"]: each["state"] for each in findings}
    assert list(states) == ["versions", "disk", "writes", "open files", "wandb", "git", "GPUs"]
    assert all(bool(each["advice"]) == (each["state"] != "ok") for each in findings)
    assert code == ("fail" in states.values())
    assert states["versions"] == states["writes"] == "ok"
    assert findings[0]["seen"].startswith(f"Python {sys.version.split()[0]}, fairexp 0.1.0, torch 2.")
    assert list(tmp_path.iterdir()) == []


def test_a_line_says_what_was_seen_and_what_to_do() -> None:
    assert run.line("one", Finding("ok", "all well")) == "ok    one         all well"
    assert run.line("two", Finding("warn", "a\nb\x1b[31m", "look")) == "warn  two         a b?[31m -> look"
    assert run.line("three", Finding("fail", "ill")) == "FAIL  three       ill"


def test_without_sbatch_launcher_slurm_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(run, "of_installation", lambda tracker, runs_dir: [])
    assert doctor(config("launcher=slurm"), as_json=False) == 1
    advice = "go to a login node of the cluster, or use launcher=local"
    assert capfd.readouterr().out == f"FAIL  slurm       no sbatch on PATH -> {advice}\n"


def test_a_mistake_in_the_launcher_is_told_as_train_tells_it(fairexp: Callable[..., Any]) -> None:
    ended = fairexp("doctor", "launcher.num_processes=0", "tracker=none")
    assert ended.returncode == 2
    assert "launcher.num_processes" in ended.stderr
    assert ended.stdout == ""


# --- how the checks are run ---


def test_a_check_that_hangs_ends_with_its_programs_and_the_others_are_not_kept_waiting(tmp_path: Path) -> None:
    def hangs() -> Finding:
        try:
            program = subprocess.Popen(["sleep", "60"])
            (tmp_path / "pid").write_text(str(program.pid))
            time.sleep(60)
        finally:
            (tmp_path / "tidied").touch()
        raise AssertionError

    def stubborn() -> Finding:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(60)
        raise AssertionError

    began = time.monotonic()
    well = Check("c", lambda: Finding("ok", "well"), "c")
    checks = [Check("a", hangs, "the server", 1.0), Check("b", stubborn, "the server", 1.0), well]
    hung = Finding("fail", "no answer within 1 s", "the server hangs")
    assert [finding for _, finding in examine(checks)] == [hung, hung, Finding("ok", "well")]
    assert time.monotonic() - began < 10
    assert (tmp_path / "tidied").exists()
    state = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
    assert not state.exists() or " Z " in state.read_text()


def test_a_check_that_dies_or_raises_fails() -> None:
    def dies() -> Finding:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    checks: Any = [Check("a", dies, "it"), Check("b", lambda: 1 / 0, "it")]  # type: ignore[arg-type,return-value]
    seen = [(finding.state, finding.seen) for _, finding in examine(checks)]
    assert seen == [("fail", "the check died"), ("fail", "ZeroDivisionError: division by zero")]


# --- this machine ---


def test_versions_outside_what_fairexp_requires_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    required = ["torch>=2.11", "hydra-core<1.5,>=1.3.8", 'pillow>=10; extra == "images"']
    found = {"fairexp": "0.1.0", "torch": "2.12.0.dev20260101+cu128", "hydra-core": "1.3.8"}
    monkeypatch.setattr(metadata, "requires", lambda name: required)
    monkeypatch.setattr(metadata, "version", lambda name: found[name])
    says(machine.versions(), "ok")
    found["torch"] = "2.9.1+cu126"
    says(machine.versions(), "warn", "-> torch 2.9.1+cu126: install torch>=2.11")


CPU = {"torch": "2.13.0+cpu", "cuda": None, "gpus": [], "shm": 8 * 2**30}
CUDA = CPU | {"torch": "2.13.0+cu130", "cuda": "13.0", "driver": 13000, "nccl": "2.28.9", "gpus": ["NVIDIA H100"] * 2}
H100S = "2 x NVIDIA H100; torch 2.13.0+cu130 for CUDA 13.0; driver for CUDA up to 13.0; NCCL 2.28.9; /dev/shm 8.0 GiB"


def sees(change: dict[str, Any], devices: int, **asked: Any) -> Finding:
    return judge(*machine.judge_probe(CPU | change, devices, trainer(**asked)))


def test_what_a_process_sees_of_the_gpus_and_shared_memory() -> None:
    says(sees({}, 0), "ok", "no GPU; torch 2.13.0+cpu for the CPU; /dev/shm 8.0 GiB free")
    says(sees({}, 0, device="cuda"), "fail", "set trainer.device=cpu")
    says(sees({}, 2), "fail", "torch can't use a GPU")
    says(sees({}, 2, device="cpu"), "ok", "for the CPU")
    says(sees(CUDA, 2), "ok", H100S)
    says(sees(CUDA | {"gpus": [], "driver": 12020}, 1), "fail", "driver for CUDA up to 12.2")
    says(sees({"error": "OSError: libcudart.so.13"}, 0), "fail", "libcudart")
    says(sees({"shm": 2**29}, 0, num_workers=8), "warn", "enlarge /dev/shm")
    says(sees({"shm": 2**26}, 0, num_workers=8), "fail", "enlarge /dev/shm")
    says(sees({"shm": 2**26}, 0, num_workers=0), "warn", "enlarge /dev/shm")


def test_ranks_sum_a_number_or_say_why_not() -> None:
    machine.ask(sys.executable, "-c", machine.REDUCE, "gloo", "2")
    with pytest.raises(RuntimeError, match="nonesuch"):
        machine.ask(sys.executable, "-c", machine.REDUCE, "nonesuch", "2")


def test_a_low_limit_of_open_files_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 4096))
    says(machine.open_files(), "warn", "up to 256 (hard limit 4096)")


def test_room_and_inodes(monkeypatch: pytest.MonkeyPatch) -> None:
    def disk(free_gib: float, inodes: int, counted: int = 10**7) -> Finding:
        found = SimpleNamespace(f_bavail=free_gib * 2**18, f_frsize=4096, f_files=counted, f_favail=inodes)
        monkeypatch.setattr(os, "statvfs", lambda path: found)
        return machine.disk(Path("runs").absolute())

    says(disk(900, 10**6), "ok", "runs: 900.0 GiB and 1,000,000 inodes free")
    says(disk(900, 0, counted=0), "ok")
    says(disk(3, 10**6), "warn", "checkpoints will fill it")
    says(disk(0.05, 10**6), "fail", "checkpoints will fill it")
    says(disk(900, 5_000), "warn", "inodes run out")
    says(disk(900, 20), "fail", "inodes run out")


def test_what_files_can_not_do_and_a_clock_that_is_off_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(file: Any, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    now = time.time
    says(machine.writes(tmp_path / "runs"), "ok", "rename, flock and delete work; clocks 0.0 s apart")
    says(machine.writes(Path("/proc/runs")), "fail", "/proc: can't make a folder: No such file or directory")
    monkeypatch.setattr(time, "time", lambda: now() - 8)
    says(machine.writes(tmp_path / "runs"), "warn", "-> clocks 8 s apart")
    monkeypatch.setattr(fcntl, "flock", flock)
    says(machine.writes(tmp_path / "runs"), "fail", f"{tmp_path}: can't lock a file (flock): Function not implemented")
    assert list(tmp_path.iterdir()) == []


def test_wandb_key_is_found_where_wandb_finds_it_and_never_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_") or name == "NETRC"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    tracker, file = config()["tracker"], tmp_path / ".netrc"
    says(machine.wandb(tracker), "warn", "runs are recorded offline: `wandb login`, or set WANDB_API_KEY")
    says(machine.wandb(tracker | {"mode": "offline"}), "ok")
    says(machine.wandb(config("tracker=none")["tracker"]), "ok")
    monkeypatch.setenv("WANDB_BASE_URL", "https://ml.example.org")
    for host in ("api.wandb.ai", "api.forge.coreweave.com", "wandb.example.org", "ml.example.org"):
        file.write_text(f"machine {host}\n  login user\n  password {KEY}\n")
        assert machine.wandb(tracker) == Finding("ok", f"online, with the key for {host} in {file}")
    file.write_text(f"machine api.wandb.ai\n  login user\n  {KEY}\n")  # `password` was forgotten
    assert KEY not in str(machine.wandb(tracker))
    says(machine.wandb(tracker), "warn", "can't be read")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert machine.wandb(tracker) == Finding("ok", "online, with the key of WANDB_API_KEY")


def test_git_says_what_a_run_can_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> None:
        subprocess.run(["git", "-c", "user.name=A", "-c", "user.email=a@b", *words], check=True, capture_output=True)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    says(machine.git(), "warn", "not a git repository")
    git("init")
    says(machine.git(), "warn")  # no commit yet
    Path("a.py").touch()
    git("add", ".")
    git("commit", "-m", "a")
    Path("a.py").write_text("1")
    says(machine.git(), "ok", "-dirty")
    monkeypatch.setenv("PATH", "")
    says(machine.git(), "warn")


# --- Slurm: what its programs printed (22.05.8) ---

SETTINGS = """\
Configuration data as of 2026-11-24T23:53:52
AccountingStorageEnforce = none
AccountingStorageType   = accounting_storage/slurmdbd
KillWait                = 5 sec
MinJobAge               = 300 sec
PowerPlugin             =\x20
PreemptMode             = REQUEUE

Slurmctld(primary) at vm is UP
"""
PARTITION = "PartitionName=%s AllowGroups=ALL Default=%s QoS=N/A GraceTime=%s MaxTime=%s PreemptMode=%s State=%s\n"
SAID = {
    "scontrol show config": SETTINGS,
    "scontrol show partition": PARTITION % ("normal", "YES", "0", "UNLIMITED", "OFF", "UP")
    + PARTITION % ("low", "NO", "0", "1-00:00:00", "REQUEUE", "UP")
    + PARTITION % ("grace", "NO", "15", "02:00:00", "REQUEUE", "DOWN")
    + PARTITION % ("cancel", "NO", "0", "UNLIMITED", "CANCEL", "INACTIVE"),
    "sinfo -h": "n1|idle|4|4000|gpu:4|none\nn2|mixed|4|4000|gpu:a100:2(S:0-1),gpu:2,shard:16|none\n"
    "doc1|drained|8|64000|(null)|bad gpu, ask Bob\nn4|idle*|4|4000|gpu:4|none\nn1|idle|4|4000|gpu:4|none",
    "sacct ": "",
    "sacctmgr -nP show assoc": "lab|long,normal",
    "sacctmgr -nP show qos": "normal|\nlong|2-00:00:00\nadmin|",
}


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What Slurm's programs say, by how the command begins."""
    monkeypatch.delenv("SBATCH_PARTITION", raising=False)
    texts = dict(SAID)
    monkeypatch.setattr(
        cluster, "ask", lambda *command: next(texts[words] for words in texts if " ".join(command).startswith(words))
    )
    return texts


@pytest.mark.usefixtures("said")
def test_the_partition_starts_such_jobs() -> None:
    texts = ("5 sec", "15", "00:10:00", "1-02:00:00", "UNLIMITED", "")
    assert [cluster.seconds(text) for text in texts] == [5, 15, 600, 93600, math.inf, math.inf]
    words = "normal UP, MaxTime UNLIMITED; asked: 240 min, saving 120 s before"
    says(cluster.partition(slurm()), "ok", words)
    says(cluster.partition(slurm(partition="low", timeout_min=1441)), "fail", "launcher.timeout_min to 1440 or less")
    says(cluster.partition(slurm(partition="low,normal", timeout_min=1441)), "ok")
    says(cluster.partition(slurm(timeout_min=3)), "fail", "a run stops at once")
    says(cluster.partition(slurm(partition="grace", timeout_min=60)), "warn", "starts no jobs now")
    says(cluster.partition(slurm(partition="grace,low", timeout_min=60)), "ok")


@pytest.mark.usefixtures("said")
def test_a_node_can_hold_what_is_asked() -> None:
    words = "2 of 4 up, with up to 8 CPUs, 62.5 GB, 4 GPUs; asked: 2 with 1 CPUs, 0 GPUs"
    says(cluster.nodes(slurm(nodes=2), 1), "ok", words)
    says(cluster.nodes(slurm(nodes=2, cpus_per_process=4, gpus_per_node=4, mem_gb=3.9), 1), "ok")
    says(cluster.nodes(slurm(nodes=2, cpus_per_process=2), 4), "fail", "nodes that can hold it: 1")
    says(cluster.nodes(slurm(cpus_per_process=2), 4), "warn", "waits for doc1, drained (bad gpu, ask Bob)")
    says(cluster.nodes(slurm(gpus_per_node=8), 1), "fail", "nodes that can hold it: 0")
    says(cluster.nodes(slurm(mem_gb=63), 1), "fail", "no job would start")
    says(cluster.nodes(slurm(nodes=3), 1), "warn", "n4, idle*")
    says(cluster.nodes(slurm(), 2), "warn", "launcher.cpus_per_process")


def test_account_and_qos_are_the_users(said: dict[str, str]) -> None:
    says(
        cluster.accounting(slurm()), "ok", "yours: lab; asked: account default, qos default; the cluster enforces none"
    )
    says(cluster.accounting(slurm(account="lab", qos="long")), "ok")
    says(cluster.accounting(slurm(account="lap")), "warn", "lap is not yours; nearest: lab")
    says(cluster.accounting(slurm(qos="longer")), "warn", "longer is not yours; nearest: long")
    says(cluster.accounting(slurm(qos="long", timeout_min=3000)), "warn", "launcher.timeout_min to 2880 or less")
    said["sacctmgr -nP show assoc"] = ""
    says(cluster.accounting(slurm()), "warn", "ask for an account")
    said["scontrol show config"] = SETTINGS.replace("accounting_storage/slurmdbd", "(null)")
    says(cluster.accounting(slurm()), "warn", "how a job ended is known for 300 sec")


@pytest.mark.usefixtures("said")
def test_a_save_fits_into_the_time_before_the_kill(tmp_path: Path) -> None:
    def preemption(name: str, **status: Any) -> Finding:
        for folder, content in {"a-1": status, "b-2": {"state": "queued"}, "c-3": {"save_s": 0.1}}.items():
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / "status.json").write_text(json.dumps(content))
        return cluster.preemption(slurm(partition=name, signal_lead_s=60), tmp_path)

    says(cluster.preemption(slurm(), tmp_path), "ok", "no save measured yet")
    says(preemption("low", save_s=3.0), "ok", "the slowest save took 3.0 s")
    says(preemption("low", save_s=8.0), "warn", "killed after 5 s")
    says(preemption("grace", save_s=8.0), "ok", "GraceTime and KillWait 20 s")
    says(preemption("normal", save_s=8.0), "ok", "PreemptMode OFF")
    says(preemption("normal", save_s=70.0), "fail", "launcher.signal_lead_s to 140 or more")
    says(preemption("cancel"), "warn", "does not requeue")


def test_what_a_node_sees_is_compared_with_this_machine() -> None:
    seen = json.loads(machine.ask(sys.executable, "-c", machine.PROBE))
    seen |= {"written": seen["time"], "shm": 8 * 2**30, "gpus": [], "cuda": None}
    says(cluster.judge_node(seen, slurm(), trainer()), "ok", f"{os.uname().nodename} sees runs_dir; Python 3.")
    for change, state, words in (
        ({"python": "3.10.1"}, "fail", "let nodes see the same"),
        ({"error": "OSError: libcuda"}, "fail", "install torch anew: OSError: libcuda"),
        ({"written": seen["time"] + 30}, "warn", "clocks 30 s apart"),
        ({"shm": 2**26}, "warn", "enlarge /dev/shm"),
    ):
        says(cluster.judge_node(seen | change, slurm(), trainer()), state, words)
    says(cluster.judge_node(seen, slurm(gpus_per_node=1), trainer()), "fail", "can't use a GPU")
