"""What a check is and how it's run: in a child process with a time limit. A process that hangs in the kernel, at a file
server that is gone, can be left behind; a thread can't."""

from __future__ import annotations

import json
import os
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Literal

from fairexp.lifetime import die_with

State = Literal["ok", "warn", "fail"]
Problems = list[tuple[State, str]]  # each with its advice


@dataclass(frozen=True)
class Finding:
    """What a check saw, and what to do about it."""

    state: State
    seen: str
    advice: str = ""


@dataclass(frozen=True)
class Check:
    """`blame`: what is at fault if `look` returns no finding."""

    name: str
    look: Callable[[], Finding]
    blame: str
    limit_s: float = 20.0


def judge(seen: str, problems: Problems) -> Finding:
    """A finding in the state of the gravest problem, with all their advice."""
    states = [state for state, _ in problems]
    state: State = "fail" if "fail" in states else "warn" if states else "ok"
    return Finding(state, seen, "; ".join(advice for _, advice in problems))


def ask(*command: str) -> str:
    """What the command prints. RuntimeError: its last words, where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        words = done.stderr.strip().rpartition("\n")[2] or f"exit code {done.returncode}"
        raise RuntimeError(f"{shlex.join(command[:2])}: {words}")
    return done.stdout.strip()


def examine(checks: Sequence[Check]) -> Generator[tuple[Check, Finding]]:
    """The findings, in the checks' order; all of them look at once."""
    began = time.monotonic()
    started = [(check, *_start(check)) for check in checks]
    try:
        for check, _, pipe in started:
            if not select.select([pipe], [], [], max(began + check.limit_s - time.monotonic(), 0))[0]:
                yield check, Finding("fail", f"no answer within {check.limit_s:g} s", f"{check.blame} hangs")
            elif text := os.read(pipe, 65536):
                yield check, Finding(**json.loads(text))
            else:
                yield check, Finding("fail", "the check died", f"see what is wrong with {check.blame}")
    finally:
        _end([pid for _, pid, _ in started])


def _start(check: Check) -> tuple[int, int]:
    """A child that writes what the check finds to a pipe: its id, and the pipe."""
    parent = os.getpid()
    reader, writer = os.pipe()
    if pid := os.fork():
        os.close(writer)
        return pid, reader
    try:
        os.setpgid(0, 0)  # its own programs end with it
        die_with(parent)
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # so that it tidies up
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):  # whoever reads our output would wait for a child that hangs
            os.dup2(null, descriptor)
        try:
            finding = check.look()
        except Exception as error:
            kind = "" if isinstance(error, RuntimeError | OSError) else f"{type(error).__name__}: "
            finding = Finding("fail", f"{kind}{error}", f"see what is wrong with {check.blame}")
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.write(writer, json.dumps(asdict(finding)).encode())
    finally:
        os._exit(0)


def _end(pids: list[int]) -> None:
    """Ends the children and what they started. One that can't be killed is left to init."""
    for number, patience_s in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 1.0)):
        for pid in pids:
            with suppress(ProcessLookupError):
                os.killpg(pid, number)
        until = time.monotonic() + patience_s
        while (pids := [pid for pid in pids if not os.waitpid(pid, os.WNOHANG)[0]]) and time.monotonic() < until:
            time.sleep(0.01)
