"""Starts the ranks of one node and ends them together.

Its own 120 lines and not torch's elastic agent: the agent's store listens on the network, it doesn't notice the death of
whoever submitted the job, and it would be imported (0.6 s) by every run to restart nothing. One task a node and not one a rank:
torch is imported once and the ranks are forked from it (10 ms against 1.3 s each), before anything has started a thread.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType

from fairexp.errors import DONE, INTERRUPTED
from fairexp.lifetime import die_with

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
GRACE_S = 2.0  # between SIGTERM and SIGKILL for the siblings of a rank that died


def supervise(
    num_processes: int,
    environment: Callable[[int], dict[str, str]],
    log: Callable[[int], Path],
    rank: Callable[[int], int],
    owner: int | None,
    told: Callable[[], bool] = lambda: False,
    hangs: Callable[[Mapping[int, int], bool], bool] = lambda pids, last: False,
    ends: Callable[[], bool] | None = None,
) -> dict[int, int]:
    """Runs `rank(k)` in `num_processes` forked processes; their exit codes by local rank in the order of their ends, negative
    for a signal.

    `environment(k)`: variables of the k-th process; `log(k)`: the file that takes its output. When one ends with another code
    than 0, the others are ended too: SIGTERM, and SIGKILL after two seconds. SIGNALS to this process are passed on.
    When `owner` (a process id) dies, everything dies.

    `told()` is called after such a signal has been passed on, and says whether the ranks will be killed soon. `hangs` is asked
    twice a second, with the living ranks' process ids and that; where it says so, all are killed, and if they had been told to
    stop their code is INTERRUPTED. Where `ends()` says so they get SIGUSR2, as ahead of a time limit.
    """
    signal.pthread_sigmask(
        signal.SIG_BLOCK, SIGNALS
    )  # one that comes while a rank starts waits until its handler stands
    processes = {_fork(k, environment(k), log(k), rank): k for k in range(num_processes)}
    alive = {os.pidfd_open(pid): pid for pid in processes}
    owner_fd = _open_owner(owner)
    codes: dict[int, int] = {}
    kill_at = float("inf")
    came: list[int] = []
    passed_on = 0
    last = hung = False

    def send(number: int) -> None:
        for descriptor in alive:
            signal.pidfd_send_signal(descriptor, number)

    def pass_on(number: int, frame: FrameType | None) -> None:
        send(number)
        came.append(number)

    for number in SIGNALS:
        signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    while alive:
        watched = [*alive, owner_fd] if owner_fd is not None else [*alive]
        ready, _, _ = select.select(watched, [], [], 0.5)  # a signal doesn't end it
        if ends and not came and ends():
            pass_on(signal.SIGUSR2, None)
        if len(came) > passed_on:
            passed_on = len(came)
            last = told()
        if owner_fd in ready:
            owner_fd = None
            send(signal.SIGKILL)
        for descriptor in set(ready) & alive.keys():
            pid = alive.pop(descriptor)
            os.close(descriptor)
            _, status = os.waitpid(pid, 0)
            code = codes[processes[pid]] = INTERRUPTED if hung and came else os.waitstatus_to_exitcode(status)
            if code not in (DONE, INTERRUPTED) and kill_at == float("inf"):
                kill_at = time.monotonic() + GRACE_S
                send(signal.SIGTERM)
        pids = {processes[pid]: pid for pid in alive.values()}
        if pids and kill_at == float("inf") and hangs(pids, last):
            hung, kill_at = True, 0.0
        if time.monotonic() > kill_at:
            send(signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # one that comes now is for the next attempt's ranks
    return codes


def _fork(k: int, environment: dict[str, str], log: Path, rank: Callable[[int], int]) -> int:
    parent = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    code = 1
    try:
        die_with(parent)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(output, 1)
        os.dup2(output, 2)
        signal.signal(signal.SIGCONT, signal.SIG_DFL)  # submitit's handler says a line to it
        os.environ.update(environment)
        code = rank(k)
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError):  # a full disk; without an end here the child would go on as its parent
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)  # no finalization: gloo's threads race it, and up to one good run in ten would abort


def _open_owner(owner: int | None) -> int | None:
    if owner is None:
        return None
    try:
        return os.pidfd_open(owner)
    except ProcessLookupError:
        os.kill(os.getpid(), signal.SIGKILL)
        raise
