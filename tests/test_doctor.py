"""`fairexp doctor`: each check on this machine's real parts, and what it makes of those that this machine hasn't."""

import errno
import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fairexp.launch import doctor
from fairexp.launch.doctor import GIB, MIB, Check, Finding, Node, examine

REPO = Path(__file__).parents[1]
KEY = "0123456789abcdef0123456789abcdef01234567"
CONFIG: dict[str, Any] = {
    "trainer": {"device": "auto", "precision": "fp32", "num_workers": 0},
    "tracker": {"_target_": "fairexp.runtime.trackers.wandb.Wandb", "mode": "auto"},
}
MACHINE = ["versions", "GPUs", "cores", "memory", "shared memory", "open files", "runs_dir", "writes", "clock", "home"]
MACHINE += ["wandb", "git"]


def look(function: Callable[[], Finding], limit_s: float = 20, worst: doctor.State = "fail") -> Finding:
    """What the check finds in its process: what it changes there stays there."""
    return next(examine([Check("it", function, "the thing", limit_s, worst)]))[1]


def found(finding: Finding) -> tuple[str, str]:
    return finding.state, finding.advice


# --- the verb ---


def test_a_machine_is_looked_at_and_nothing_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    code = doctor.doctor({"kind": "local"}, CONFIG | {"runs_dir": str(tmp_path / "runs")}, as_json=True)
    findings = json.loads(capfd.readouterr().out)
    assert [each["check"] for each in findings] == MACHINE
    assert all(set(each) == {"check", "state", "seen", "advice"} and each["seen"] for each in findings)
    assert all(bool(each["advice"]) == (each["state"] != "ok") for each in findings)
    assert code == any(each["state"] == "fail" for each in findings)
    assert [each["state"] for each in findings if each["check"] in ("versions", "writes", "clock")] == ["ok"] * 3
    assert list(tmp_path.iterdir()) == []


def test_lines_say_what_was_seen_and_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    checks = [
        Check("one", lambda: Finding("ok", "all well"), "it"),
        Check("two", lambda: Finding("warn", "a\nb\x1b[31m", "look"), "it"),
    ]
    monkeypatch.setattr(doctor, "of_machine", lambda launcher, config: checks)
    assert doctor.doctor({"kind": "local"}, {}, as_json=False) == 0
    assert capfd.readouterr().out == "ok    one            all well\nwarn  two            a b?[31m -> look\n"
    checks.append(Check("three", lambda: 1 / 0, "the sum"))  # type: ignore[arg-type,return-value]
    assert doctor.doctor({"kind": "local"}, {}, as_json=False) == 1
    last = capfd.readouterr().out.splitlines()[-1]
    assert last == "FAIL  three          ZeroDivisionError: division by zero -> see what is wrong with the sum"


def test_without_sbatch_launcher_slurm_fails_and_others_do_not_mind(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(doctor, "of_machine", lambda launcher, config: [])
    assert doctor.doctor({"kind": "local"}, {}, as_json=True) == 0
    assert json.loads(capfd.readouterr().out) == []
    assert doctor.doctor({"kind": "slurm"}, {}, as_json=True) == 1
    assert [(each["check"], each["seen"]) for each in json.loads(capfd.readouterr().out)] == [
        ("slurm", "no sbatch on PATH")
    ]


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

    began = time.monotonic()
    checks = [Check("a", hangs, "the server", 1.0), Check("b", lambda: Finding("ok", "b"), "b")]
    assert [finding for _, finding in examine(checks)] == [
        Finding("fail", "no answer within 1 s", "the server hangs"),
        Finding("ok", "b"),
    ]
    assert time.monotonic() - began < 10
    assert (tmp_path / "tidied").exists()
    state = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
    assert not state.exists() or " Z " in state.read_text()


def test_a_check_that_dies_fails_and_none_is_graver_than_it_may_be() -> None:
    def dies() -> Finding:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    assert look(dies) == Finding("fail", "the check died", "see what is wrong with the thing")
    assert look(dies, worst="warn").state == "warn"
    assert look(lambda: Finding("ok", "well"), worst="warn") == Finding("ok", "well")


def test_the_gravest_problem_comes_first() -> None:
    assert doctor.judge("it", [("warn", "a"), ("fail", "b")]) == Finding("fail", "it", "b; a")
    assert doctor.judge("it", []) == Finding("ok", "it")


# --- this machine ---


def test_versions_are_read_without_importing_what_is_heavy(environment: dict[str, str]) -> None:
    code = "import sys; from fairexp.launch import doctor; print(doctor.versions().seen); print(*sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    seen, modules = ended.stdout.splitlines()
    assert seen.startswith(f"Python {sys.version.split()[0]}, fairexp 0.1.0, torch 2.")
    assert not {"torch", "wandb", "numpy", "hydra", "submitit"} & set(modules.split())


def test_versions_outside_what_fairexp_requires_are_told() -> None:
    required = ["Python>=3.11", "torch>=2.11", "hydra-core<1.5,>=1.3.8", 'pillow>=10; extra == "images"']
    good = {"Python": "3.12.1", "torch": "2.12.0.dev20260101+cu128", "hydra-core": "1.3.8"}
    assert doctor.judge_versions(required, good).state == "ok"
    old = doctor.judge_versions(required, good | {"torch": "2.9.1+cu126", "hydra-core": "1.5.0"})
    assert found(old) == (
        "warn",
        "torch 2.9.1+cu126: install torch>=2.11; hydra-core 1.5.0: install hydra-core<1.5,>=1.3.8",
    )
    missing = doctor.judge_versions(required, {"Python": "3.12.1", "hydra-core": "1.3.8"})
    assert found(missing) == ("fail", "install torch>=2.11")
    assert "torch missing" in missing.seen


H100 = {"name": "NVIDIA H100 80GB HBM3", "bf16": True}
CUDA = {"torch": "2.13.0+cu130", "cuda": "13.0", "driver_cuda": 13000, "driver": "580.95.05", "nccl": "2.28.9"}


@pytest.mark.parametrize(
    ("seen", "devices", "trainer", "state", "words"),
    [
        ({"torch": "2.13.0+cpu", "cuda": None, "gpus": []}, 0, {}, "ok", "none, so runs use the CPU"),
        ({"torch": "2.13.0+cpu", "cuda": None, "gpus": []}, 0, {"device": "cuda"}, "fail", "use auto or cpu"),
        ({"torch": "2.13.0+cpu", "cuda": None, "gpus": []}, 2, {}, "fail", "torch can't use the 2 here"),
        ({"torch": "2.13.0+cpu", "cuda": None, "gpus": []}, 2, {"device": "cpu"}, "ok", "for the CPU"),
        (CUDA | {"gpus": [], "driver_cuda": 12020}, 1, {}, "fail", "takes CUDA up to 12.2"),
        (
            CUDA | {"gpus": [H100, H100]},
            2,
            {"precision": "bf16"},
            "ok",
            "2 x NVIDIA H100 80GB HBM3; torch 2.13.0+cu130",
        ),
        (CUDA | {"gpus": [H100, H100], "reduce_error": "no NVLink"}, 2, {}, "fail", "all_reduce over them: no NVLink"),
        (
            CUDA | {"gpus": [{"name": "V100", "bf16": False}]},
            1,
            {"precision": "bf16"},
            "warn",
            "trainer.precision=fp16",
        ),
        ({"torch_error": "OSError: libcudart.so.13", "gpus": []}, 1, {}, "fail", "libcudart"),
    ],
)
def test_what_torch_sees_of_the_gpus(
    seen: dict[str, Any], devices: int, trainer: dict[str, Any], state: str, words: str
) -> None:
    finding = doctor.judge_gpus(seen, devices, trainer)
    assert finding.state == state
    assert words in f"{finding.seen} -> {finding.advice}"


def test_the_nvidia_driver_is_read_of_both_kinds() -> None:
    closed = (
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023\nGCC version: 12.3\n"
    )
    opened = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (dvs-builder@U16-I3)\n"
    assert [doctor.nvidia_driver(text) for text in (closed, opened, "")] == ["535.129.03", "570.86.15", ""]


def test_ranks_sum_a_number_or_say_why_not() -> None:
    assert doctor.all_reduce("gloo", 2) == ""
    assert "nonesuch" in doctor.all_reduce("nonesuch", 2)


def test_control_groups_of_both_versions_limit_memory(tmp_path: Path) -> None:
    groups = ["", "user/job_1", "memory", "memory/slurm/job_1"]
    for group in groups:
        (tmp_path / group).mkdir(parents=True, exist_ok=True)
    (tmp_path / "user/job_1/memory.max").write_text("max\n")
    (tmp_path / "user/memory.max").write_text(f"{8 * GIB}\n")
    (tmp_path / "memory/memory.limit_in_bytes").write_text("9223372036854771712\n")
    (tmp_path / "memory/slurm/memory.limit_in_bytes").write_text(f"{4 * GIB}\n")
    assert doctor.cgroup_limit("0::/user/job_1\n", tmp_path) == 8 * GIB
    assert doctor.cgroup_limit("8:pids:/\n4:memory:/slurm/job_1\n0::/\n", tmp_path) == 4 * GIB
    assert doctor.cgroup_limit("4:memory:/docker/of_the_host\n", tmp_path) == 9223372036854771712
    assert doctor.cgroup_limit("8:pids:/\n", tmp_path) is None
    assert doctor.judge_memory(20 * GIB, 24 * GIB, 9223372036854771712) == Finding("ok", "20.0 GiB free of 24.0 GiB")
    assert doctor.judge_memory(20 * GIB, 24 * GIB, GIB).state == "warn"


@pytest.mark.parametrize(
    ("free", "workers", "state"),
    [(8 * GIB, 8, "ok"), (GIB // 2, 8, "warn"), (64 * MIB, 8, "fail"), (64 * MIB, 0, "warn")],
)
def test_workers_need_room_in_shared_memory(free: int, workers: int, state: str) -> None:
    assert doctor.judge("it", doctor.shm_problems(free, workers)).state == state


def test_a_low_limit_of_open_files_is_told() -> None:
    def limited() -> Finding:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
        return doctor.open_files()

    finding = look(limited)
    assert finding.state == "warn"
    assert finding.seen == "up to 256 (hard limit 256)"


def test_more_ranks_than_cores_are_told() -> None:
    many = len(os.sched_getaffinity(0)) + 1
    assert doctor.cores({"kind": "local", "num_processes": many}).state == "warn"
    assert doctor.cores({"kind": "slurm", "num_processes": many}).state == "ok"
    assert doctor.cores({"kind": "local", "num_processes": None}).state == "ok"


# --- the folders ---

# Small, full and read-only file systems, in mounts of its own.
SMALL = """
import json, os
from dataclasses import asdict
from pathlib import Path
from fairexp.launch import doctor

Path("room/runs").mkdir()
for number in range(60):
    Path(f"full/{number}").touch()
looks = [doctor.disk(Path("room/runs"), True), doctor.disk(Path("full"), False), doctor.writes(Path("ro/runs"))]
looks += [doctor.shared_memory(2), doctor.home()]
print(json.dumps([asdict(each) for each in looks]))
"""
MOUNTS = """
mkdir room full ro && mount -t tmpfs -o size=6g room room && mount -t tmpfs -o size=1m,nr_inodes=70 full full &&
mount -t tmpfs -o ro ro ro && mount -t tmpfs -o size=32m shm /dev/shm || exit 77
"""


def test_small_full_and_read_only_file_systems_are_told(environment: dict[str, str], tmp_path: Path) -> None:
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", f'{MOUNTS} exec "$@"', "sh"]
    env = environment | {"HOME": str(tmp_path / "ro")}
    ended = subprocess.run(
        [*command, sys.executable, "-c", SMALL], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    if ended.returncode in (1, 77) and "Traceback" not in ended.stderr:
        pytest.skip("no mounts of our own here")
    assert ended.returncode == 0, ended.stderr
    room, full, read_only, shm, home = (Finding(**each) for each in json.loads(ended.stdout))
    assert room.state == "warn"
    assert "on tmpfs (" in room.seen
    assert "share" in room.advice
    assert full.state == "fail"
    assert "inodes" in full.advice
    assert "checkpoints will fill it" in full.advice
    assert read_only.state == "fail"
    assert "ro: can't make a folder: Read-only file system" in read_only.seen
    assert shm.state == "fail"
    assert "/dev/shm: 32 MiB free of 32 MiB" in shm.seen
    assert home.state == "warn"
    assert "Read-only file system" in home.seen


def test_the_file_system_is_the_one_that_df_names(tmp_path: Path) -> None:
    for path in (tmp_path, Path("/dev/shm"), Path("/proc/self")):
        words = subprocess.run(["df", "--output=fstype,target", path], capture_output=True, text=True).stdout.split()
        assert list(doctor.file_system(Path("/proc/self/mountinfo").read_text(), path.resolve())) == words[-2:]


def test_mounts_with_spaces_and_mounts_over_mounts() -> None:
    mountinfo = r"""27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard,resv_strict
25 24 0:23 / /dev/shm rw,relatime - tmpfs tmpfs rw,size=24684096k
30 25 0:27 / /data rw,relatime - nfs4 server:/data rw
31 25 0:28 / /data rw,relatime shared:1 - lustre 10.0.0.1@tcp:/scratch rw,flock
32 25 0:29 / /my\040data rw,relatime - xfs /dev/sdb rw
"""
    assert doctor.file_system(mountinfo, Path("/data/runs")) == ("lustre", "/data")
    assert doctor.file_system(mountinfo, Path("/database")) == ("ext4", "/")
    assert doctor.file_system(mountinfo, Path("/my data/x")) == ("xfs", "/my data")


@pytest.mark.parametrize(
    ("place", "kind", "free", "inodes", "on_slurm", "state"),
    [
        ("/data", "nfs4", 900 * GIB, None, True, "ok"),
        ("/tmp/x", "ext4", 900 * GIB, 10**6, True, "warn"),
        ("/tmp/x", "ext4", 900 * GIB, 10**6, False, "ok"),
        ("/data", "nfs4", 3 * GIB, 10**6, True, "warn"),
        ("/data", "nfs4", 50 * MIB, 10**6, True, "fail"),
        ("/data", "nfs4", 900 * GIB, 20, True, "fail"),
        ("/data", "nfs4", 900 * GIB, 5_000, True, "warn"),
    ],
)
def test_room_inodes_and_whether_nodes_see_it(
    place: str, kind: str, free: int, inodes: int | None, on_slurm: bool, state: str
) -> None:
    assert doctor.judge_disk("it", Path(place), kind, free, inodes, on_slurm).state == state


def test_a_runs_dir_that_is_a_file_fails(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    assert look(lambda: doctor.disk(tmp_path / "runs", False)).seen == f"{tmp_path}/runs is not a folder"


@pytest.mark.parametrize("lustre", ["without flock", "with localflock that isn't"])
def test_a_file_system_without_locks_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lustre: str) -> None:
    def flock(file: Any, operation: int) -> None:
        if lustre == "without flock":
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    assert doctor.writes(tmp_path / "runs").state == "ok"
    monkeypatch.setattr(fcntl, "flock", flock)
    finding = doctor.writes(tmp_path / "runs")
    assert finding.state == "fail"
    assert ("Function not implemented" if lustre == "without flock" else "two got the same lock") in finding.seen
    assert list(tmp_path.iterdir()) == []


def test_a_clock_that_is_off_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.clock(tmp_path / "runs").state == "ok"
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() - 8)
    finding = doctor.clock(tmp_path / "runs")
    assert finding.state == "warn"
    assert finding.seen.startswith("8.0 s between")


# --- wandb and git ---


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("WANDB_") or name == "NETRC"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_wandb_key_is_found_where_wandb_finds_it_and_never_shown(
    own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = CONFIG["tracker"]
    assert found(doctor.wandb(tracker)) == ("warn", "runs are recorded offline: `wandb login`, or set WANDB_API_KEY")
    assert doctor.wandb(tracker | {"mode": "offline"}).state == "ok"
    assert doctor.wandb({"_target_": "fairexp.runtime.trackers.nothing.Nothing"}).state == "ok"
    netrc = own_home / ".netrc"
    netrc.touch(mode=0o600)
    netrc.write_text(f"machine api.wandb.ai\n  login user\n  password {KEY}\n")
    shown = [doctor.wandb(tracker)]
    assert shown[-1] == Finding("ok", f"a key in {netrc}, tracker.mode=auto, WANDB_MODE not set")
    netrc.chmod(0o644)
    shown.append(doctor.wandb(tracker))
    assert found(shown[-1]) == ("warn", f"others can read the key: chmod 600 {netrc}")
    (own_home / ".config/wandb").mkdir(parents=True)
    (own_home / ".config/wandb/settings").write_text("[default]\nbase_url = https://wandb.example.org\n")
    assert "no key" in doctor.wandb(tracker).seen  # the other server's
    netrc.write_text(f"machine wandb.example.org\n  login user\n  {KEY}\n")  # `password` was forgotten
    shown.append(doctor.wandb(tracker))
    assert shown[-1].state == "warn"
    assert f"of {netrc}: it can't be read" in shown[-1].advice
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_MODE", "online")
    shown.append(doctor.wandb(tracker))
    assert shown[-1] == Finding("ok", "a key in WANDB_API_KEY, tracker.mode=auto, WANDB_MODE online")
    assert not any(KEY in str(each) for each in shown)


def test_git_says_what_a_run_can_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*words: str) -> None:
        subprocess.run(["git", "-c", "user.name=A", "-c", "user.email=a@b", *words], check=True, capture_output=True)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert doctor.git().state == "warn"
    assert "not a git repository" in doctor.git().seen
    run("init")
    assert doctor.git().state == "warn"
    assert "no commit yet" in doctor.git().seen
    Path("a.py").touch()
    run("add", ".")
    run("commit", "-m", "a")
    Path("a.py").write_text("1")
    Path("b.py").touch()
    assert doctor.git().state == "ok"
    assert doctor.git().seen.endswith(", 1 changed and 1 new files")
    monkeypatch.setenv("PATH", "")
    assert doctor.git().seen == "no git on PATH"


# --- Slurm: what its programs printed (22.05.8) ---

SETTINGS = """\
Configuration data as of 2026-11-24T23:53:52
AccountingStorageEnforce = none
AccountingStorageType   = accounting_storage/slurmdbd
AuthInfo                = socket=/run/munge.sock,cred_expire=9
ClusterName             = mini
JobRequeue              = 1
KillWait                = 5 sec
MaxArraySize            = 1001
MinJobAge               = 300 sec
PowerPlugin             = 
PreemptMode             = REQUEUE
SlurmctldHost[0]        = vm(127.0.0.1)

Slurmctld(primary) at vm is UP
"""  # noqa: W291
PARTITION = (
    "PartitionName=%s AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL AllocNodes=ALL Default=%s QoS=N/A "
    "DefaultTime=00:10:00 DisableRootJobs=NO ExclusiveUser=NO GraceTime=%s Hidden=NO MaxNodes=UNLIMITED MaxTime=%s "
    "MinNodes=0 LLN=NO MaxCPUsPerNode=UNLIMITED Nodes=n[1-4] PriorityJobFactor=1 PriorityTier=1 RootOnly=NO ReqResv=NO "
    "OverSubscribe=NO OverTimeLimit=NONE PreemptMode=%s State=%s TotalCPUs=16 TotalNodes=4 SelectTypeParameters=NONE "
    "JobDefaults=(null) DefMemPerNode=UNLIMITED MaxMemPerNode=UNLIMITED TRES=cpu=16,mem=16000M,node=4,gres/gpu=16\n"
)
PARTITIONS = doctor.parse_partitions(
    PARTITION % ("normal", "YES", "0", "UNLIMITED", "OFF", "UP")
    + PARTITION % ("low", "NO", "0", "1-00:00:00", "REQUEUE", "UP")
    + PARTITION % ("grace", "NO", "15", "02:00:00", "REQUEUE", "DOWN")
    + PARTITION % ("cancel", "NO", "0", "UNLIMITED", "CANCEL", "INACTIVE")
)
ROWS = {row["PartitionName"]: row for row in PARTITIONS}
NODES = doctor.parse_nodes(
    "n1|idle|4|4000|gpu:4|none\nn2|mixed|4|4000|gpu:4|none\ndoc1|drained|8|64000|(null)|bad gpu, ask Bob\n"
    "n4|idle*|4|4000|gpu:4|none\nn1|idle|4|4000|gpu:4|none\n"
)


def test_slurm_settings_are_read() -> None:
    settings = doctor.parse_settings(SETTINGS)
    assert settings["KillWait"] == "5 sec"
    assert settings["PowerPlugin"] == ""
    assert settings["MaxArraySize"] == "1001"
    assert settings["AuthInfo"] == "socket=/run/munge.sock,cred_expire=9"
    assert doctor.has_accounting(settings)
    assert not doctor.has_accounting({"AccountingStorageType": "accounting_storage/none"})
    assert not doctor.has_accounting({"AccountingStorageType": "(null)"})  # as Slurm 23 says it


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("5 sec", 5),
        ("15", 15),
        ("00:10:00", 600),
        ("1-02:00:00", 93600),
        ("UNLIMITED", None),
        ("NONE", None),
        ("", None),
    ],
)
def test_times_are_read_as_slurm_writes_them(text: str, amount: int | None) -> None:
    assert doctor.seconds(text) == amount


@pytest.mark.parametrize(
    ("asked", "state", "advice"),
    [
        (None, "ok", ""),
        ("low", "ok", ""),
        ("normle", "fail", "set launcher.partition; nearest: normal; there are: cancel, grace, low, normal"),
        ("low,nope", "fail", "set launcher.partition; there are: cancel, grace, low, normal"),
        ("cancel", "fail", "it takes no jobs: set another launcher.partition"),
        ("grace", "warn", "it starts no jobs now, they wait"),
        ("grace,low", "ok", ""),
    ],
)
def test_the_partition_is_there(asked: str | None, state: str, advice: str) -> None:
    assert found(doctor.judge_partition({"partition": asked}, PARTITIONS)) == (state, advice)


def test_without_a_default_partition_one_must_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.judge_partition({}, [ROWS["low"]]).seen == "the cluster has no default one"
    monkeypatch.setenv("SBATCH_PARTITION", "low")
    assert doctor.judge_partition({}, [ROWS["low"]]).state == "ok"


@pytest.mark.parametrize(
    ("minutes", "lead_s", "partitions", "state", "words"),
    [
        (240, 120, ["normal"], "ok", ""),
        (1441, 120, ["low"], "fail", "launcher.timeout_min to 1440 or less"),
        (1441, 120, ["low", "normal"], "ok", ""),
        (2, 120, ["normal"], "fail", "a run stops at once"),
        (3, 120, ["normal"], "warn", "a run may stop at once"),
        (None, None, ["normal"], "ok", ""),
    ],
)
def test_the_time_limit_fits(
    minutes: int | None, lead_s: int | None, partitions: list[str], state: str, words: str
) -> None:
    finding = doctor.judge_time({"timeout_min": minutes, "signal_lead_s": lead_s}, [ROWS[name] for name in partitions])
    assert finding.state == state
    assert words in finding.advice


def test_nodes_are_read_once_each_with_their_state_and_gpus() -> None:
    assert NODES[2] == Node("doc1", "drained", 8, 64000, 0, "bad gpu, ask Bob")
    assert [node.up for node in NODES] == [True, True, False, False]
    gres = ["gpu:4", "gpu:a100:4(S:0-1)", "gpu:a100:4(S:0,1),gpu:2,shard:16", "gpu:4g.20gb:2", "(null)", "license:3"]
    assert [doctor.parse_gpus(text) for text in gres] == [4, 4, 6, 2, 0, 0]


@pytest.mark.parametrize(
    ("asked", "state", "words"),
    [
        ({}, "ok", "2 x"),
        ({"cpus_per_process": 4, "gpus_per_node": 4, "num_processes": 1, "mem_gb": 3.9}, "ok", ""),
        ({"num_processes": 4, "cpus_per_process": 2}, "fail", "nodes that can hold it: 1"),
        ({"nodes": 1, "num_processes": 4, "cpus_per_process": 2}, "warn", "waits for doc1, drained (bad gpu, ask Bob)"),
        ({"gpus_per_node": 8, "cpus_per_process": 1}, "fail", "nodes that can hold it: 0"),
        ({"mem_gb": 63}, "fail", "wait for ever"),
        ({"nodes": 3}, "warn", "n4, idle*"),
        ({"nodes": 5}, "fail", "nodes that can hold it: 4"),
        ({"num_processes": 2}, "warn", "launcher.cpus_per_process"),
    ],
)
def test_a_node_can_hold_what_is_asked(asked: dict[str, Any], state: str, words: str) -> None:
    finding = doctor.judge_nodes({"nodes": 2, "num_processes": None, "partition": None} | asked, NODES)
    assert finding.state == state, finding
    assert words in f"{finding.seen} -> {finding.advice}"


@pytest.mark.parametrize(
    ("asked", "enforced", "state", "words"),
    [
        ({}, "associations,limits,qos,safe", "ok", "yours: lab; asked: account default, qos default"),
        ({"account": "lab", "qos": "long", "timeout_min": 60}, "associations,limits,qos,safe", "ok", ""),
        ({"account": "lap"}, "associations", "fail", "lap is not yours; nearest: lab"),
        ({"account": "lap"}, "none", "warn", "lap is not yours"),
        ({"qos": "longer"}, "qos", "fail", "there is no longer; nearest: long"),
        ({"qos": "admin"}, "qos", "fail", "admin is not yours"),
        ({"qos": "long", "timeout_min": 3000}, "limits", "fail", "launcher.timeout_min to 2880 or less"),
    ],
)
def test_account_and_qos_are_the_users(asked: dict[str, Any], enforced: str, state: str, words: str) -> None:
    limits = {"normal": "", "long": "2-00:00:00", "admin": ""}
    finding = doctor.judge_account(asked, [("lab", ["long", "normal"])], limits, enforced)
    assert finding.state == state
    assert words in f"{finding.seen} -> {finding.advice}"
    assert doctor.judge_account({}, [], limits, enforced).state == ("warn" if enforced == "none" else "fail")


@pytest.mark.parametrize(
    ("partition", "save_s", "state", "words"),
    [
        ("low", None, "ok", "no save measured yet"),
        ("low", 3.0, "ok", "the slowest save took 3.0 s"),
        ("low", 8.0, "warn", "killed after 5 s"),
        ("grace", 8.0, "ok", "GraceTime 15 s, KillWait 5 s"),
        ("normal", 8.0, "ok", "PreemptMode OFF"),
        ("normal", 70.0, "fail", "launcher.signal_lead_s to 140 or more"),
        ("cancel", None, "warn", "not requeued"),
    ],
)
def test_a_save_fits_into_the_time_before_the_kill(
    tmp_path: Path, partition: str, save_s: float | None, state: str, words: str
) -> None:
    for name, status in {"a-1": {"save_s": save_s}, "b-2": {"state": "queued"}, "c-3": {"save_s": 0.1}}.items():
        if save_s is not None or name == "b-2":
            (tmp_path / name).mkdir()
            (tmp_path / name / "status.json").write_text(json.dumps(status))
    (tmp_path / "d-4").mkdir()
    (tmp_path / "d-4/status.json").write_text('{"save')
    slowest = doctor.slowest_save(tmp_path)
    assert slowest == save_s
    settings = doctor.parse_settings(SETTINGS)
    finding = doctor.judge_preemption({"signal_lead_s": 60}, [ROWS[partition]], settings, slowest)
    assert finding.state == state
    assert words in f"{finding.seen} -> {finding.advice}"


def test_a_job_is_asked_for_as_the_launcher_says() -> None:
    launcher = {
        "partition": "low",
        "account": None,
        "exclude": ["n1", "n2"],
        "sbatch": {"exclusive": True, "mail_user": "a"},
    }
    flags = ["--partition=low", "--exclude=n1,n2", "--exclusive", "--mail-user=a", "--time=1"]
    assert doctor.options(launcher, time=1, gpus_per_node=None) == flags
    assert doctor.options({}) == []


def test_the_script_of_the_test_job_quotes_what_it_is_given(tmp_path: Path) -> None:
    folder = tmp_path / "a b$(touch X)"
    folder.mkdir()
    (folder / "probe.py").write_text("import os; print(os.environ['WORDS'])")
    launcher = {"env": {"WORDS": "$(touch Y) 'z'"}, "setup": ['export WORDS="$WORDS!"']}
    subprocess.run(["bash"], input=doctor.job_script(launcher, folder), cwd=tmp_path, text=True, check=True)
    assert (folder / "seen.json").read_text() == "$(touch Y) 'z'!\n"
    assert sorted(path.name for path in folder.iterdir()) == ["host", "probe.py", "seen.json"]
    assert list(tmp_path.iterdir()) == [folder]


def test_what_a_node_sees_is_compared_with_this_machine() -> None:
    ended = subprocess.run([sys.executable, "-c", doctor.PROBE], capture_output=True, text=True, check=True)
    seen = {**json.loads(ended.stdout), "written": time.time(), "shm_free": 8 * GIB}
    well = doctor.judge_node("job 7 after 1 s", seen, {}, {})
    assert well.state == "ok"
    assert well.seen.startswith(f"job 7 after 1 s on {os.uname().nodename}: sees runs_dir, Python 3.")
    changes: list[tuple[dict[str, Any], doctor.State, str]] = [
        ({"python": "3.10.1"}, "fail", "here: install one where all nodes see it"),
        ({"executable": "/opt/python"}, "warn", "/opt/python there"),
        ({"torch_error": "OSError: libcuda"}, "fail", "mend torch there: OSError: libcuda"),
        ({"gpus": []}, "fail", "can't use the GPU there"),
        ({"cwd": "/tmp/elsewhere"}, "warn", "start runs from a folder that all nodes share"),
        ({"written": time.time() + 30}, "warn", "its clock is -30 s off"),
        ({"shm_free": 64 * MIB}, "fail", "enlarge /dev/shm"),
    ]
    for change, state, words in changes:
        launcher = {"gpus_per_node": 1} if "gpus" in change else {}
        finding = doctor.judge_node("job 7", seen | change, launcher, {"num_workers": 4})
        assert finding.state == state, finding
        assert words in finding.advice
