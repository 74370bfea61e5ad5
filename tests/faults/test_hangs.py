"""A run that hangs says on which rank, where and why, and goes on by itself; one that is only slow is left alone."""

import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from test_processes import Command

from faults.hanging import FAULTS, LIMIT_S, Hung, ended, live_through, start_hanging, start_innocent

WHY = {
    "stops": "it is stopped by a signal",
    "holds the GIL": "it computes without an end",
    "skips": "it missed a collective",
    "worker stops": "its data loading worker, process",
}
# a line of its source, and what it's in
PLACE = {
    "stops": ("            os.kill(os.getpid(), signal.SIGSTOP)", "forward"),
    "holds the GIL": ('    re.match(r"(a?){40}a{40}", "a" * 40)', "hold_the_gil"),
    "skips": ("            dist.all_reduce(torch.zeros(1), group=self.group)", "forward"),
    "worker stops": ("            os.kill(os.getpid(), signal.SIGSTOP)", "__getitems__"),
}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Hung | Command]]:
    """What was seen of a run with each fault on rank 1, and of one without; all at once, since most of their time is waiting."""
    commands: list[Command] = []

    folders = {fault: tmp_path_factory.mktemp("hangs") for fault in (*FAULTS, "nothing")}

    def hang(fault: str) -> Hung:
        command = start_hanging(folders[fault], fault, rank=1)
        commands.append(command)
        return ended(command, fault, rank=1)

    def live() -> Command:
        command = start_innocent(folders["nothing"])
        commands.append(command)
        live_through(command)
        command.wait()
        return command

    try:
        with ThreadPoolExecutor() as pool:
            innocent = pool.submit(live)
            found: dict[str, Hung | Command] = dict(zip(FAULTS, pool.map(hang, FAULTS), strict=True))
            found["nothing"] = innocent.result()
        yield found
    finally:
        for command in commands:
            command.close()


@pytest.mark.parametrize("fault", FAULTS)
def test_the_rank_that_holds_the_others_up_is_named_and_the_run_goes_on(seen: dict[str, Hung], fault: str) -> None:
    run = seen[fault]
    assert run.named == 1, run.line or run.seen
    assert WHY[fault] in run.line
    assert place_of(fault) in run.line
    assert re.match(rf"rank 1 on {os.uname().nodename} hangs in step \d+, phase \w+, /\S+:\d+ in ", run.line)
    assert ("phase data" if fault == "worker stops" else "phase step") in run.line
    assert "; rank 0 waits in step " in run.line
    assert run.within_s < LIMIT_S
    assert (run.code, run.status["state"], run.status["step"], run.status["attempts"]) == (0, "finished", 40, 2), (
        run.seen
    )
    assert "(resumed)" in run.seen  # also on the screen


def place_of(fault: str) -> str:
    lines = Path(__file__).with_name("faulty.py").read_text().splitlines()
    text, function = PLACE[fault]
    start = next(k for k, line in enumerate(lines) if f"def {function}(" in line)
    return f"faulty.py:{lines.index(text, start) + 1} in {function}"


def test_a_hang_is_told_in_the_log_in_status_json_and_in_stacks(seen: dict[str, Hung]) -> None:
    run = seen["holds the GIL"]
    assert run.line in run.seen
    assert run.status["hang"] == run.line
    for rank in (0, 1):
        assert run.line in (run.path / "logs" / f"rank_{rank}.attempt_1.log").read_text()
        stacks = (run.path / "logs" / f"stacks_rank_{rank}.attempt_1.txt").read_text()
        assert "in fit" in stacks
        assert not (run.path / "logs" / f"stacks_rank_{rank}.attempt_2.txt").exists()
    assert "in hold_the_gil" in (run.path / "logs" / "stacks_rank_1.attempt_1.txt").read_text()


def test_a_slow_first_step_evaluation_and_save_and_a_suspended_run_are_no_hang(seen: dict[str, Command]) -> None:
    command = seen["nothing"]
    assert command.process.returncode == 130, command.seen
    assert command.status()["attempts"] == 1
    assert not list((command.run_dir / "logs").glob("hang*"))
