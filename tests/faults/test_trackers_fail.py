"""W&B is unreachable, fails in the middle or is killed: the run trains on with the same bits, and `fairexp sync` fills its page.

The client is the real one; the server is a stand-in, so what is seen here is the traffic and not W&B's own storage.
"""

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import STRATEGIES, TINY, Fairexp, Tiny, Trained
from wandb_standin import Run, StandIn

from fairexp.config.rundir import RunDir
from fairexp.errors import DONE, FAILED, INTERRUPTED
from fairexp.launch import sync

# Its training set strikes in the middle, in rank 0's own process.
THEIRS = """
import os
import time
from pathlib import Path

from fairexp.datasets.digits import Digits


class Scans(Digits):
    def __init__(self, split, strike=""):
        super().__init__(split)
        self.strike, self.reads = strike, 0

    def __getitems__(self, indices):
        self.reads += 1
        if self.reads == 6 and self.strike and not Path("struck").exists():
            Path("struck").touch()
            if self.strike != "server":
                children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
                (core,) = [pid for pid in children if b"wandb-core" in Path(f"/proc/{pid}/cmdline").read_bytes()]
                os.kill(int(core), int(self.strike))
                time.sleep(0.3)
                if self.strike == "15":  # as Slurm stops a step: every process of it
                    os.kill(os.getpid(), 15)
        return super().__getitems__(indices)
"""
RUN = (*TINY[:-1], *STRATEGIES["single"], "dataset.train._target_=theirs.Scans", "tracker=wandb")
WAITS = ("tracker.init_timeout_s=2", "tracker.finish_timeout_s=1")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "theirs.py").write_text(THEIRS)
    return tmp_path


def train(fairexp: Fairexp, folder: Path, strike: str, code: int, variables: dict[str, str]) -> tuple[Trained, str]:
    words = ("train", *RUN, *WAITS, f"+dataset.train.strike='{strike}'")
    done = fairexp(*words, cwd=folder, env=variables)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return Trained(next((folder / "runs").glob("*-*")), words), done.stderr


def of(run: Trained) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]


def assert_each_row_once(page: Run, run: Trained) -> None:
    """The page has the rows of metrics.jsonl and nothing more, in any order."""
    have = [{name: value for name, value in row.items() if name[0] != "_"} for row in page.history]
    want = [{("trainer/step" if name == "step" else name): value for name, value in row.items()} for row in of(run)]

    def count(rows: list[dict[str, Any]]) -> Counter[str]:
        return Counter(json.dumps({name: float(row[name]) for name in sorted(row)}) for row in rows)

    assert count(have) == count(want)
    last = {name: value for row in want for name, value in row.items()}
    assert {name: page.summary[name] for name in last} == last


def test_a_run_whose_server_was_away_is_filled_in_later_and_only_once(
    folder: Path, fairexp: Fairexp, tiny: Tiny
) -> None:
    away = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "local" + "0" * 40}
    run, said = train(fairexp, folder, "", DONE, away)
    assert run.losses == tiny("single").losses
    (line,) = [line for line in said.splitlines() if "wandb" in line]
    assert line.endswith(f"; recording offline; fairexp sync {run.path} fills the page from metrics.jsonl")

    def sync(variables: dict[str, str], code: int) -> str:
        done = fairexp("sync", run.path.name, cwd=folder, env=variables)
        assert done.returncode == code, done.stderr
        *pages, line = done.stderr.splitlines()
        assert all(page.startswith("wandb: http") for page in pages), done.stderr
        return line

    assert "no API key for http" in sync({}, FAILED)
    assert re.match(rf"{run.path.name}: .*http://127\.0\.0\.1:9", sync(away, FAILED))
    with StandIn() as server:
        assert sync(server.environment(), DONE) == f"{run.path.name}: 22 rows sent"
        page = server.runs[RunDir(run.path).id]
        assert_each_row_once(page, run)
        assert page.state == "finished"
        assert page.config["seed"]["value"] == 0
        assert sync(server.environment(), DONE) == f"{run.path.name}: its page has all"
        # a gap in the middle, as a tracker leaves that failed for a while
        del page.history[4:9]
        for number, row in enumerate(page.history):
            row["_step"] = number
        page.state = "running"
        assert sync(server.environment(), DONE) == f"{run.path.name}: 5 rows sent"
        assert_each_row_once(page, run)


@pytest.mark.parametrize("strike", ["server", "9"])
def test_what_fails_in_the_middle_changes_nothing_of_the_run_and_sync_sends_the_rest(
    folder: Path, fairexp: Fairexp, tiny: Tiny, strike: str
) -> None:
    def fail(method: str, path: str, operation: str) -> int | None:
        return 500 if (folder / "struck").exists() and strike == "server" else None

    with StandIn(fail) as server:
        run, said = train(fairexp, folder, strike, DONE, server.environment())
        assert run.losses == tiny("single").losses
        assert run.norms == tiny("single").norms
        (line,) = [line for line in said.splitlines() if "tracker off" in line]
        assert line.endswith(f"; fairexp sync {run.path} fills the page from metrics.jsonl")
        page = server.runs[RunDir(run.path).id]
        assert len(page.history) < len(of(run))
        server.fail = lambda method, path, operation: None
        done = fairexp("sync", RunDir(run.path).id, cwd=folder, env=server.environment())
        assert done.returncode == 0, done.stderr
        assert_each_row_once(page, run)
        assert page.state == "finished"


def test_a_resumed_run_fills_in_what_the_last_attempt_could_not_send(
    folder: Path, fairexp: Fairexp, tiny: Tiny
) -> None:
    with StandIn() as server:
        stopped, _ = train(fairexp, folder, "15", INTERRUPTED, server.environment())
        page = server.runs[RunDir(stopped.path).id]
        assert 0 < len(stopped.steps) < 20
        assert len(page.history) < len(of(stopped))
        run, _ = train(fairexp, folder, "15", DONE, server.environment())
        assert run.losses == tiny("single").losses
        assert_each_row_once(page, run)
        assert page.state == "finished"


def test_a_run_that_goes_on_online_is_left_alone(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    (tmp_path / "wandb").mkdir()
    assert not sync.sends_itself(run)
    for folder, itself in (("offline-run-20260101_000000-3f9a1c02", False), ("run-20260101_000000-3f9a1c02", True)):
        (tmp_path / "wandb/latest-run").symlink_to(folder)
        assert sync.sends_itself(run) == itself
        (tmp_path / "wandb/latest-run").unlink()


def test_a_run_without_a_page_is_refused(tiny: Tiny, tmp_path: Path, fairexp: Fairexp) -> None:
    shutil.copytree(tiny("single").path, tmp_path / "runs" / tiny("single").path.name)
    done = fairexp("sync", "vit", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == f"fairexp: {tiny('single').path.name}: no tracker=wandb, so no page to fill\n"
