"""Where a process stands that can't answer: faulthandler writes its stacks inside a signal handler of C, also in a collective,
and where a thread never gives up the GIL."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import re
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

SIGNAL = signal.SIGQUIT
SETTLES_S = 1.0


class Frame(NamedTuple):
    """A line that is being executed."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} in {self.function}"


def offer(path: Path) -> None:
    """From now on SIGQUIT makes this process, and those that it forks, append their stacks to the file."""
    file = open(path, "a", encoding="utf-8")  # noqa: SIM115  # faulthandler keeps it
    faulthandler.register(SIGNAL, file=file, all_threads=True, chain=False)


def take(wanted: Sequence[tuple[int, Path, str]]) -> list[list[Frame]]:
    """The main thread's frames, innermost first, of each process that offers them, none of another; with a heading in its
    file. A process that was stopped runs again after this: only then can it answer."""
    begins = []
    for pid, path, heading in wanted:
        with open(path, "ab") as file:
            file.write(f"--- {heading}\n".encode())
            begins.append(file.tell())
        if _catches(pid):
            # to the main thread: once it runs, it does this before it gets on. Another thread would be too late
            ctypes.CDLL(None).tgkill(pid, pid, SIGNAL)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    deadline, before = time.monotonic() + SETTLES_S, [""] * len(wanted)
    while True:
        time.sleep(0.1)
        texts = [_from(path, begin) for (_, path, _), begin in zip(wanted, begins, strict=True)]
        if time.monotonic() > deadline or (texts == before and all(texts)):
            return [main_thread(text) for text in texts]
        before = texts


def main_thread(text: str) -> list[Frame]:
    """The frames of the thread that was interrupted, in faulthandler's words."""
    _, _, thread = text.partition("Current thread 0x")
    found = re.findall(r'^  File "(.*)", line (\d+) in (.*)$', thread.partition("\n\n")[0], flags=re.MULTILINE)
    return [Frame(_unescaped(file), int(line), function) for file, line, function in found]


def _unescaped(text: str) -> str:
    """faulthandler writes ASCII: é is \\xe9."""
    return re.sub(
        r"\\(?:x(..)|u(....)|U(........))", lambda found: chr(int(found[1] or found[2] or found[3], 16)), text
    )


def _catches(pid: int) -> bool:
    """Whether the process has a handler for the signal: it would end another."""
    try:
        caught = re.search(r"^SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except (FileNotFoundError, ProcessLookupError):
        return False
    return bool(caught and int(caught[1], 16) >> (SIGNAL - 1) & 1)


def _from(path: Path, begin: int) -> str:
    with open(path, "rb") as file:
        file.seek(begin)
        return file.read().decode(errors="replace")
