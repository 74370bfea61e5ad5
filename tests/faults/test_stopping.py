"""A run that is told to stop: whichever process hears it, all ranks save at one step and leave soon."""

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
from test_processes import FOREVER, Command

from fairexp.config.rundir import RunDir, create
from fairexp.errors import INTERRUPTED
from fairexp.launch.job import EndsInTime
from fairexp.launch.supervise import SIGNALS, supervise
from fairexp.runs import autopsy
from fairexp.runtime import dist
from fairexp.runtime.preempt import Stop
from faults.stopping import stop_once

SEED = 1
ROUNDS = 3
SOON_S = 15.0  # of two busy cores; scripts/faults/stops measures


def test_a_signal_to_any_process_at_any_time_ends_in_a_checkpoint_where_the_next_start_goes_on(tmp_path: Path) -> None:
    generator = random.Random(SEED)
    before = 0
    for _ in range(ROUNDS):
        run = stop_once(tmp_path, generator)
        assert run.code == 130, f"{run.told}: {run.seen}"
        assert run.resumed_at == before
        assert run.saved[-1] == run.step > before, run.told
        assert run.took_s < SOON_S, run.told
        before = run.step


def test_a_signal_is_noticed_while_the_rank_sits_in_a_collective(tmp_path: Path) -> None:
    command = Command(tmp_path, *FOREVER)
    try:
        command.trains()
        first, second = command.ranks()
        os.kill(second, signal.SIGSTOP)
        command.until(lambda: waits(first))
        os.kill(first, signal.SIGTERM)
        command.until(lambda: "SIGTERM at " in (command.run_dir / "logs" / "rank_0.attempt_1.log").read_text(), 10)
        code, said = doctor(command.run_dir)
        assert code == 1
        assert f"process {second} of a rank is stopped" in said
        os.kill(second, signal.SIGCONT)
        assert command.wait() == 130, command.seen
        assert len(list((command.run_dir / "checkpoints").glob("step_*"))) == 1
    finally:
        command.close()


def doctor(run: Path) -> tuple[int, str]:
    """What `fairexp doctor RUN` says, and its exit code."""
    output = StringIO()
    with redirect_stdout(output):
        code = autopsy.doctor(RunDir(run), as_json=False)
    return code, output.getvalue()


def waits(pid: int) -> bool:
    """Whether the process has used no time for a while."""

    def used() -> list[str]:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]

    before = used()
    time.sleep(0.5)
    return used() == before


@pytest.fixture
def stop() -> Iterator[Stop]:
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.getsignal(number) for number in signals}
    yield Stop().listen()
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_that_comes_while_the_ranks_compare_is_not_forgotten(
    stop: Stop, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compare(values: torch.Tensor) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGTERM)
        return values

    monkeypatch.setattr(dist, "max_over_ranks", compare)
    assert not stop.agreed(1)
    monkeypatch.undo()
    assert stop.agreed(2)
    assert stop.signal == signal.SIGTERM


def test_where_saves_are_slow_the_stop_begins_before_the_schedulers_signal(tmp_path: Path) -> None:
    run = create(tmp_path / "mine-1234abcd", {}, "", {}, {})
    in_time = EndsInTime(run, ends_at=time.time() + 150)  # Slurm's signal comes 120 s ahead
    assert not in_time()
    run.set_status(save_s=70.0)
    assert not in_time(), "it looks now and then"
    in_time.look_at = 0.0
    assert in_time()


def test_the_ranks_are_told_when_the_stop_has_to_begin(tmp_path: Path) -> None:
    def rank(k: int) -> int:
        return INTERRUPTED if signal.sigwait([signal.SIGUSR2]) else 1

    codes = supervise(2, lambda k: {}, lambda k: tmp_path / f"{k}.log", rank, None, ends=lambda: True)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    assert codes == {0: INTERRUPTED, 1: INTERRUPTED}
