"""`fairexp doctor RUN`: why a run died or hangs, in words."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import Fairexp

from fairexp.config.rundir import RunDir, create
from fairexp.runs.autopsy import autopsy

CONFIG = {"trainer": {"hang_timeout_s": 300}}


def run_of(folder: Path, log: str = "", **status: Any) -> RunDir:
    """A run folder as an attempt has left it."""
    run = create(folder / "runs" / "mine-1234abcd", CONFIG, "fairexp train model=mlp", {}, {})
    run.set_status(**{"attempts": 1, "step": 17, "max_steps": 40, "host": os.uname().nodename, **status})
    (run.logs / "rank_1.attempt_1.log").write_text(log)
    return run


def error_file(run: RunDir, rank: int, error: str, lost_peer: bool) -> None:
    record = {"rank": rank, "host": "n1", "time": time.time(), "lost_peer": lost_peer, "error": error, "traceback": ""}
    (run.logs / f"error_{rank}.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("error", "log", "words"),
    [
        ("rank 1 was killed by SIGKILL (out of memory?)", "", "the kernel kills so for want of memory"),
        ("rank 1 was killed by SIGSEGV", "Fatal Python error: Segmentation fault", "a library crashed"),
        ("rank 1: OutOfMemoryError: CUDA out of memory. Tried to", "", "trainer.micro_batch_size"),
        ("rank 1: OSError: [Errno 28] No space left on device", "", "the disk was full"),
        (
            "rank 1 ended with exit code 1",
            "DataLoader worker (pid 7) is killed by signal: Bus error",
            "/dev/shm was full",
        ),
        ("no progress in 3 attempts: rank 1 was killed by SIGKILL", "", "it failed again and again"),
    ],
)
def test_a_failure_is_explained(tmp_path: Path, error: str, log: str, words: str) -> None:
    run = run_of(tmp_path, log, state="failed", error=error)
    (run.checkpoints / "step_00000010").mkdir()
    found = autopsy(run)
    assert found.wrong
    assert found.state.startswith("failed, step 17 of 40, attempt 1, last sign 0s ago")
    assert found.reasons[0] == error
    assert any(words in reason for reason in found.reasons), found.reasons
    if log:
        assert f"  {log}" in found.reasons
    assert found.then == "the same command goes on after step 10: fairexp train model=mlp"


def test_the_ranks_own_error_comes_before_those_that_lost_it(tmp_path: Path) -> None:
    run = run_of(tmp_path, state="failed", error="rank 1 on n1: ValueError: a wrong turn")
    error_file(run, 0, "rank 0 lost another rank in a collective; that rank's log says why", lost_peer=True)
    error_file(run, 1, "ValueError: a wrong turn", lost_peer=False)
    assert [reason[:14] for reason in autopsy(run).reasons[1:3]] == ["rank 1 on n1: ", "rank 0 on n1: "]


def test_a_run_whose_process_has_gone_is_lost(tmp_path: Path) -> None:
    found = autopsy(run_of(tmp_path, state="running", pid=2**22 + 1, job_id=str(2**22 + 1)))
    assert found.wrong
    assert "it says running, but its process has gone: its machine went down, or" in found.reasons[0]
    assert found.then.startswith("the same command starts it again: there is no checkpoint")


def test_a_hang_is_told_with_where_its_stacks_are(tmp_path: Path) -> None:
    run = run_of(tmp_path, state="interrupted", signal=15)
    line = "rank 1 on n1 hangs in step 7, phase step, /x/mine.py:3 in forward: it is stopped by a signal"
    (run.logs / "hang.attempt_1.json").write_text(json.dumps({"rank": 1, "host": "n1", "line": line}))
    found = autopsy(run)
    assert not found.wrong
    assert found.reasons[:2] == ["it was told to stop by SIGTERM", f"attempt 1 hung: {line}"]
    assert found.reasons[2].endswith("logs/stacks_rank_*.attempt_1.txt")


def test_doctor_takes_a_run_or_overrides(fairexp: Fairexp, tmp_path: Path) -> None:
    run_of(tmp_path, state="finished")
    asked = fairexp("doctor", "mine", cwd=tmp_path)
    assert (asked.returncode, asked.stderr) == (0, "")
    assert "finished, step 17 of 40" in asked.stdout
    assert json.loads(fairexp("doctor", "1234", "--json", cwd=tmp_path).stdout)["wrong"] is False
    both = fairexp("doctor", "mine", "model=mlp", cwd=tmp_path)
    assert (both.returncode, both.stderr) == (2, "fairexp: doctor: takes one run or overrides, got mine model=mlp\n")
