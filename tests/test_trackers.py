"""What a run's metrics survive: kills, resumes, failing trackers, absent servers.

wandb is the real client, in processes of its own, with a home folder in which nothing can be written.
"""

import inspect
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from wandb_standin import KEY, StandIn

from fairexp.errors import UserError
from fairexp.runtime import track
from fairexp.runtime.track import Metrics
from fairexp.runtime.trackers.nothing import Nothing
from fairexp.runtime.trackers.tensorboard import TensorBoard
from fairexp.runtime.trackers.wandb import Wandb

REPO = Path(__file__).parents[1]
CONFIG = {"name": "digits", "optimizer": {"_target_": "torch.optim.AdamW", "lr": 0.001, "betas": [0.9, 0.95]}}

# A run that logs its steps, waits for a line on stdin if told to, and leaves as a worker does.
RUN = """
import json, os, sys, time
from pathlib import Path
from fairexp.runtime.track import Metrics
from fairexp.runtime.trackers.wandb import Wandb
run_dir, asked = Path(sys.argv[1]), json.loads(sys.argv[2])
resumed = asked["first"] > 1
metrics = Metrics(run_dir, Wandb(run_dir, "3f9a1c02", "digits", asked["config"], resumed, **asked["settings"]))
for step in range(asked["first"], asked["last"] + 1):
    metrics.log({"train/loss": 1 / step}, step)
print("logged", flush=True)
if asked["wait"]:
    sys.stdin.readline()
    metrics.log({"train/loss": 0.0}, asked["last"] + 1)
    metrics.log({"train/loss": 0.0}, asked["last"] + 2)
metrics.finish(asked["exit_code"])
print("finished", flush=True)
os._exit(0)
"""


def defaults(tracker: str) -> dict[str, Any]:
    loaded = OmegaConf.to_container(OmegaConf.load(REPO / f"configs/tracker/{tracker}.yaml"))
    assert isinstance(loaded, dict)
    return {str(key): value for key, value in loaded.items() if key != "_target_"}


def command(
    run_dir: Path, first: int = 1, last: int = 5, wait: bool = False, exit_code: int = 0, **settings: Any
) -> list[str]:
    settings = {**defaults("wandb"), "init_timeout_s": 1, "finish_timeout_s": 1, **settings}
    asked = {"config": CONFIG, "settings": settings, "first": first, "last": last, "wait": wait, "exit_code": exit_code}
    return [sys.executable, "-c", RUN, str(run_dir), json.dumps(asked)]


def environment(**variables: str) -> dict[str, str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "XDG_", "NETRC"))}
    return {**inherited, "HOME": "/dev/null/home", "PYTHONPATH": str(REPO), **variables}


def train(run_dir: Path, variables: dict[str, str] | None = None, **asked: Any) -> str:
    """Runs to the end; returns what it said on stderr."""
    done = subprocess.run(
        command(run_dir, **asked),
        env=environment(**(variables or {})),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, "logged\nfinished\n"), done.stderr
    return done.stderr


def start(run_dir: Path, variables: dict[str, str] | None = None, **asked: Any) -> "subprocess.Popen[str]":
    """A run that has logged its steps and waits."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command(run_dir, wait=True, **asked),
        env=environment(**(variables or {})),
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "logged\n"
    return process


def wandb_command(run_dir: Path, *words: str, **variables: str) -> str:
    """What wandb's own command line says of a run's last attempt."""
    return subprocess.run(
        [str(Path(sys.executable).parent / "wandb"), *words, str((run_dir / "wandb/latest-run").resolve())],
        env=environment(WANDB_CACHE_DIR=str(run_dir / "wandb/cache"), **variables),
        cwd=run_dir,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=60,
    ).stdout


def recorded(run_dir: Path) -> list[dict[str, Any]]:
    """The history rows that the last attempt left on the disk."""
    records = [json.loads(line) for line in wandb_command(run_dir, "leet", "inspect", "--json").splitlines()]
    return [record["history"]["item"] for record in records if "history" in record]


def upload(run_dir: Path, server: StandIn) -> None:
    """What a run that could not send its rows tells its user to do."""
    wandb_command(run_dir, "sync", "--include-online", **server.environment())


def steps(rows: list[dict[str, Any]]) -> list[int]:
    return [row["trainer/step"] for row in rows]


@pytest.fixture
def server() -> Iterator[StandIn]:
    with StandIn() as standin:
        yield standin


class Recorder:
    """A tracker that remembers, and fails when told to."""

    def __init__(self, failing: bool = False) -> None:
        self.calls: list[Any] = []
        self.failing = failing

    def log(self, record: Any, step: int) -> None:
        self.calls.append((step, dict(record)))
        if self.failing:
            raise ConnectionResetError("the other side\nhas gone")

    def finish(self, exit_code: int) -> None:
        self.calls.append(exit_code)
        if self.failing:
            raise TimeoutError("still not gone")


# metrics.jsonl


def test_a_row_is_one_json_object_and_goes_to_the_tracker_too(tmp_path: Path) -> None:
    tracker = Recorder()
    metrics = Metrics(tmp_path, tracker)
    metrics.log({"train/loss": 0.5, "train/lr": 0.1}, 100)
    metrics.finish(0)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 100, "train/loss": 0.5, "train/lr": 0.1}\n'
    assert tracker.calls == [(100, {"train/loss": 0.5, "train/lr": 0.1}), 0]


def test_a_kill_loses_no_row_that_was_logged(tmp_path: Path) -> None:
    program = f"""
import os
from pathlib import Path
from fairexp.runtime.track import Metrics
from fairexp.runtime.trackers.nothing import Nothing
metrics = Metrics(Path({str(tmp_path)!r}), Nothing())
for step in range(1, 1001):
    metrics.log({{"train/loss": 1 / step}}, step)
os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", program], env=environment()).returncode == -9
    assert track.read(tmp_path / "metrics.jsonl") == [{"step": step, "train/loss": 1 / step} for step in range(1, 1001)]


def test_what_is_not_a_number_is_json_for_every_reader_and_reads_back_as_a_float(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, Nothing())
    metrics.log({"train/loss": float("nan"), "up": float("inf"), "down": float("-inf"), "train/lr": 0.1}, 1)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"step": 1, "train/loss": "NaN", "up": "Infinity", "down": "-Infinity", "train/lr": 0.1}\n'
    assert (
        str(track.read(tmp_path / "metrics.jsonl"))
        == "[{'step': 1, 'train/loss': nan, 'up': inf, 'down': -inf, 'train/lr': 0.1}]"
    )


def test_steps_never_decrease(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, Nothing())
    metrics.log({"train/loss": 0.5}, 2)
    with pytest.raises(ValueError, match="step 1 came after those of step 2"):
        metrics.log({"train/loss": 0.5}, 1)


def test_training_and_evaluation_share_a_step_but_a_metric_stands_once(tmp_path: Path) -> None:
    tracker = Recorder()
    metrics = Metrics(tmp_path, tracker)
    metrics.log({"train/loss": 0.5}, 2)
    metrics.log({"eval/loss": 0.6}, 2)
    metrics.log({"eval/loss": 0.7, "eval/top1": 0.9}, 2)
    metrics.log({"eval/loss": 0.8}, 2)
    rows = [{"train/loss": 0.5}, {"eval/loss": 0.6}, {"eval/top1": 0.9}]
    assert track.read(tmp_path / "metrics.jsonl") == [{"step": 2, **row} for row in rows]
    assert tracker.calls == [(2, row) for row in rows]


def test_a_resume_drops_the_rows_after_the_checkpoint_and_a_torn_line(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, Nothing())
    for step in (1, 2, 3):
        metrics.log({"train/loss": float("nan")}, step)
        metrics.log({"eval/loss": 0.25}, step)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "train/lo')
    assert [row["step"] for row in track.read(tmp_path / "metrics.jsonl")] == [1, 1, 2, 2, 3, 3]

    resumed = Metrics(tmp_path, Nothing())
    resumed.drop_after(2)
    resumed.log({"eval/loss": 0.5}, 2)  # the checkpoint is evaluated again
    resumed.log({"train/loss": 0.125}, 3)
    kept = ['"step": 1, "train/loss": "NaN"', '"step": 1, "eval/loss": 0.25', '"step": 2, "train/loss": "NaN"']
    kept += ['"step": 2, "eval/loss": 0.25', '"step": 3, "train/loss": 0.125']
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(f"{{{row}}}\n" for row in kept)
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_run_that_starts_over_drops_every_row(tmp_path: Path) -> None:
    Metrics(tmp_path, Nothing()).log({"train/loss": 0.5}, 1)
    metrics = Metrics(tmp_path, Nothing())
    metrics.drop_after(0)
    metrics.log({"train/loss": 0.25}, 1)
    assert track.read(tmp_path / "metrics.jsonl") == [{"step": 1, "train/loss": 0.25}]


def test_a_tracker_that_fails_is_reported_in_one_line_and_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = Recorder(failing=True)
    metrics = Metrics(tmp_path, tracker)
    for step in (1, 2, 3):
        metrics.log({"train/loss": 0.5}, step)
    metrics.finish(0)
    assert tracker.calls == [(1, {"train/loss": 0.5})]
    assert [row["step"] for row in track.read(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    reason = "Recorder.log: ConnectionResetError: the other side has gone"
    assert capsys.readouterr().err == f"tracker off, the run and metrics.jsonl go on: {reason}\n"


def test_a_tracker_that_fails_at_the_end_does_not_fail_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Metrics(tmp_path, Recorder(failing=True)).finish(0)
    assert "Recorder.finish: TimeoutError: still not gone\n" in capsys.readouterr().err


# the configuration


@pytest.mark.parametrize(
    ("tracker", "constructor"), [("wandb", Wandb), ("tensorboard", TensorBoard), ("none", Nothing)]
)
def test_a_yaml_names_its_class_and_every_argument_in_the_constructors_order(tracker: str, constructor: type) -> None:
    target = OmegaConf.load(REPO / f"configs/tracker/{tracker}.yaml")._target_
    assert target == f"{constructor.__module__}.{constructor.__name__}"
    parameters = inspect.signature(constructor).parameters.values()
    assert list(defaults(tracker)) == [
        parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY
    ]


def test_wandb_and_torch_are_imported_by_whoever_chose_them_only() -> None:
    program = """
import sys
import fairexp.runtime.track, fairexp.runtime.trackers.wandb, fairexp.runtime.trackers.tensorboard
print([name for name in ("wandb", "torch", "tensorboard") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_an_unknown_mode_is_refused_with_those_that_exist(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tracker\.mode is 'of'; choose auto, online, offline or disabled"):
        Wandb(tmp_path, "3f9a1c02", "digits", CONFIG, False, **{**defaults("wandb"), "mode": "of"})


# wandb without a server


def test_without_a_key_wandb_records_offline(tmp_path: Path) -> None:
    said = train(tmp_path)
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 1
    assert said.count("\n") == 1
    assert "no API key for https://" in said
    assert said.endswith(f"recording offline; fairexp sync {tmp_path} fills the page from metrics.jsonl\n")
    assert steps(recorded(tmp_path)) == [1, 2, 3, 4, 5]


def test_on_a_terminal_wandb_asks_nothing(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command(tmp_path), env=environment(TERM="xterm"), stdin=theirs, stdout=theirs, stderr=theirs
    )
    try:
        assert process.wait(timeout=20) == 0
        said = os.read(ours, 10_000).decode().splitlines()
    finally:
        process.kill()
        os.close(ours)
        os.close(theirs)
    assert "no API key" in said[0]
    assert said[1:] == ["logged", "finished"]


@pytest.mark.parametrize(
    ("mode", "variable", "folders"),
    [
        ("auto", "offline", ["offline"]),
        ("auto", "disabled", []),
        ("online", "offline", ["run"]),
        ("offline", "online", ["offline"]),
    ],
)
def test_the_mode_is_the_configs_unless_that_leaves_it_to_the_environment(
    tmp_path: Path, server: StandIn, mode: str, variable: str, folders: list[str]
) -> None:
    train(tmp_path, {**server.environment(), "WANDB_MODE": variable}, mode=mode)
    assert [folder.name.split("-")[0] for folder in tmp_path.glob("wandb/*run-*")] == folders
    assert bool(server.requests) == (folders == ["run"])


@pytest.mark.parametrize("variable", [{"WANDB_INIT_TIMEOUT": "soon"}, {"WANDB_MODE": "of"}])
def test_wandb_that_cannot_start_at_all_leaves_the_run_alone(tmp_path: Path, variable: dict[str, str]) -> None:
    said = train(tmp_path, variable)
    assert said.startswith("wandb is off, the run and metrics.jsonl go on: ValidationError")
    assert said.count("\n") == 1
    assert len(track.read(tmp_path / "metrics.jsonl")) == 5


# wandb with a server


def test_online_the_server_gets_the_rows_the_config_and_the_end(tmp_path: Path, server: StandIn) -> None:
    run_dir, home = tmp_path / "run", tmp_path / "home"
    run_dir.mkdir()
    home.mkdir()
    names = {"project": "paper", "entity": "local", "notes": "why"}
    settings = {**names, "group": "seeds", "job_type": "train", "tags": ["a", "b"]}
    said = train(run_dir, {**server.environment(), "HOME": str(home)}, **settings)
    run = server.runs["3f9a1c02"]
    assert said == f"wandb: {server.url}/local/paper/runs/3f9a1c02\n"
    assert [row["train/loss"] for row in run.history] == [1 / step for step in steps(run.history)]
    assert steps(run.history) == [1, 2, 3, 4, 5]
    assert {key: part["value"] for key, part in run.config.items() if key != "_wandb"} == CONFIG
    shown = {**names, "displayName": "digits", "groupName": "seeds", "jobType": "train"}
    assert run.about.items() >= shown.items()
    assert (run.tags, run.state, run.output) == (["a", "b"], "finished", [])
    axis = {(metric.get("1") or metric.get("2"), metric.get("5")) for metric in run.config["_wandb"]["value"]["m"]}
    assert ("trainer/step", None) in axis
    assert ("*", 1) in axis  # the first of the list, which is the step
    assert list(home.rglob("*")) == []


def test_a_key_in_netrc_is_enough(tmp_path: Path, server: StandIn) -> None:
    (tmp_path / ".netrc").write_text(f"machine {server.url.removeprefix('http://')} login user password {KEY}\n")
    train(tmp_path, {"WANDB_BASE_URL": server.url, "HOME": str(tmp_path)})
    assert server.runs["3f9a1c02"].state == "finished"


def test_a_resumed_run_goes_on_under_its_id_and_repeats_no_row_that_arrived(tmp_path: Path, server: StandIn) -> None:
    train(tmp_path, server.environment(), last=6, exit_code=130)
    run = server.runs["3f9a1c02"]
    assert (run.state, run.preempting) == ("failed", True)  # which the real server shows as "preempted"
    train(tmp_path, server.environment(), first=4, last=9)  # the checkpoint was of step 3
    assert list(server.runs) == ["3f9a1c02"]
    # The last one that arrived comes again: its evaluation may not have been sent.
    assert steps(run.history) == [1, 2, 3, 4, 5, 6, 6, 7, 8, 9]
    assert [row["_step"] for row in run.history] == list(range(10))
    assert run.state == "finished"


def test_attempts_of_which_some_were_offline_make_one_run_when_uploaded(tmp_path: Path, server: StandIn) -> None:
    train(tmp_path, server.environment(), last=3)
    train(tmp_path, first=4, last=6)
    upload(tmp_path, server)
    train(tmp_path, server.environment(), first=7, last=9)
    assert steps(server.runs["3f9a1c02"].history) == list(range(1, 10))


def test_a_killed_run_keeps_what_it_logged_two_seconds_before(tmp_path: Path, server: StandIn) -> None:
    processes = []
    for mode in ("offline", "online"):
        (tmp_path / mode).mkdir()
        processes.append(start(tmp_path / mode, server.environment(), mode=mode, last=20))
    time.sleep(2)
    for process in processes:
        process.kill()
        process.communicate()
    assert steps(recorded(tmp_path / "offline")) == list(range(1, 21))
    assert steps(recorded(tmp_path / "online")) == list(range(1, 21))


def refusing() -> socket.socket:
    """A port that nobody listens on."""
    port = socket.socket()
    port.bind(("127.0.0.1", 0))
    return port


def silent() -> socket.socket:
    """A port that takes connections and never answers."""
    port = refusing()
    port.listen()
    return port


@pytest.mark.parametrize("listener", [refusing, silent])
def test_a_server_that_is_away_means_offline_in_bounded_time(tmp_path: Path, listener: Any) -> None:
    with listener() as port:
        begun = time.monotonic()
        url = f"http://127.0.0.1:{port.getsockname()[1]}"
        said = train(tmp_path, {"WANDB_BASE_URL": url, "WANDB_API_KEY": KEY})
    assert time.monotonic() - begun < 10  # of which 1 is init_timeout_s
    assert said.startswith("wandb: CommError: ")
    assert "; recording offline; fairexp sync " in said
    assert said.count("\n") == 1
    assert steps(recorded(tmp_path)) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(("key", "status", "reason"), [("short", None, "must have 40+ characters"), (KEY, 401, "401")])
def test_a_bad_key_means_offline(tmp_path: Path, server: StandIn, key: str, status: int | None, reason: str) -> None:
    server.fail = lambda method, path, operation: status
    said = train(tmp_path, {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": key})
    assert reason in said
    assert "recording offline" in said
    assert said.count("\n") == 1
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 1


@pytest.mark.parametrize("end", ["answers 500", "goes away"])
def test_a_server_that_fails_midway_delays_the_end_by_the_time_out_and_loses_nothing(tmp_path: Path, end: str) -> None:
    with StandIn() as server:
        process = start(tmp_path, server.environment())
        if end == "answers 500":
            server.fail = lambda method, path, operation: 500
            out, said = process.communicate("go on\n", timeout=30)
    if end == "goes away":
        out, said = process.communicate("go on\n", timeout=30)
    assert (process.returncode, out) == (0, "finished\n")
    off = "tracker off, the run and metrics.jsonl go on: Wandb.finish: Unsent: TimeoutError: "
    assert said.splitlines()[1].startswith(off)
    assert said.endswith(f"; fairexp sync {tmp_path} fills the page from metrics.jsonl\n")
    assert said.count("\n") == 2

    with StandIn() as server:
        upload(tmp_path, server)
        assert steps(server.runs["3f9a1c02"].history) == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP])
def test_the_run_goes_on_when_wandbs_own_process_dies_or_freezes(tmp_path: Path, by: signal.Signals) -> None:
    process = start(tmp_path)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    [core] = [int(child) for child in children if b"wandb-core" in Path(f"/proc/{child}/cmdline").read_bytes()]
    os.kill(core, by)
    time.sleep(0.2)
    assert process.stdin is not None
    process.stdin.write("go on\n")
    process.stdin.flush()
    try:
        process.wait(timeout=30)
    finally:
        if by == signal.SIGSTOP:
            os.kill(core, signal.SIGKILL)  # it holds our pipes
    out, said = process.communicate(timeout=10)
    assert (process.returncode, out) == (0, "finished\n")
    assert re.match(r"tracker off, the run and metrics\.jsonl go on: Wandb\.\w+: Unsent: ", said.splitlines()[1])
    assert said.count("\n") == 2
    assert len(track.read(tmp_path / "metrics.jsonl")) == 7


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_no_secret_of_the_command_line_or_the_environment_is_stored_or_sent(
    tmp_path: Path, server: StandIn, mode: str
) -> None:
    canary = "c4n4ry-of-the-"
    key = "local" + "c4n4ry" * 8
    source = tmp_path / "source"  # a checkout with a token in its remote, and the run in it as by default
    run_dir = source / "runs/digits-3f9a1c02"
    run_dir.mkdir(parents=True)
    (source / "train.py").write_text(RUN + f"# {canary}source\n")
    author = ["-c", "user.name=x", "-c", "user.email=x@localhost"]
    for words in (
        ["init", "-q"],
        ["add", "train.py"],
        [*author, "commit", "-q", "-m", "x"],
        ["remote", "add", "origin", f"https://u:{canary}remote@localhost/x"],
    ):
        subprocess.run(["git", *words], cwd=source, check=True)
    arguments = [*command(run_dir, mode=mode)[3:], f"token={canary}argument"]
    variables = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": key, "HF_TOKEN": f"{canary}variable"}
    program = [sys.executable, "train.py", *arguments]
    subprocess.run(program, env=environment(**variables), cwd=source, check=True, capture_output=True, timeout=60)
    files = [file for file in run_dir.rglob("*") if file.is_file()]
    assert len(files) >= 5
    assert [file for file in files if b"c4n4ry" in file.read_bytes()] == []
    assert [body for body in server.requests if b"c4n4ry" in body] == []
    assert bool(server.requests) == (mode == "online")
    for run in server.runs.values():
        assert run.about.keys() & {"commit", "repo"} == set()
        assert run.about["program"] == "fairexp"


# TensorBoard


def test_tensorboard_hides_what_a_killed_attempt_wrote_after_its_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for attempt, first, last in ((1, 1, 6), (2, 4, 9)):
        tracker = TensorBoard(tmp_path, "3f9a1c02", "digits", CONFIG, resumed=attempt > 1)
        for step in range(first, last + 1):
            tracker.log({"train/loss": float(attempt), "train/lr": 0.5}, step)
        if attempt == 2:
            tracker.finish(0)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    scalars = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert scalars == [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2), (7, 2), (8, 2), (9, 2)]
    assert events.Tags()["scalars"] == ["train/loss", "train/lr"]


def test_without_the_tensorboard_package_the_error_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r'pip install "fairexp\[tensorboard\]"'):
        TensorBoard(tmp_path, "3f9a1c02", "digits", CONFIG, resumed=False)
