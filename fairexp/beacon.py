"""Where a rank is: a few bytes of memory that it shares with the process that watches it, which reads them at any time."""

from __future__ import annotations

import mmap
import struct
import time
from dataclasses import dataclass

# step, number of marks, whether it may take long, time.monotonic() (one clock for all processes of a machine), phase. Not read
# or written in one piece: who watches looks again and again, and judges a rank that has stood still.
RECORD = struct.Struct("<qqqd16s")
SLOW = ("start", "save", "end")


@dataclass(frozen=True)
class Mark:
    """A rank's last sign. `slow`: what it does now may take ten times as long as a step."""

    step: int
    count: int
    slow: bool
    time: float
    phase: str


class Beacon:
    """One rank's signs; `of`: the memory to leave them in, and its place there."""

    def __init__(self, of: tuple[mmap.mmap | bytearray, int] | None = None):
        self._memory, self._offset = of or (bytearray(RECORD.size), 0)
        self._count = 0
        self._first: dict[str, int] = {}
        self.at("start", 0)

    def at(self, phase: str, step: int) -> None:
        """The rank begins this phase of the step now, or gets on in it (0.9 us). What it does for the first time may take
        long: it compiles, opens files, starts processes."""
        self._count += 1
        slow = phase in SLOW or self._first.setdefault(phase, step) == step
        RECORD.pack_into(
            self._memory, self._offset, step, self._count, slow, time.monotonic(), phase.encode("ascii", "replace")
        )

    def last(self) -> Mark:
        """Where the rank is, also for another process."""
        step, count, slow, when, phase = RECORD.unpack_from(self._memory, self._offset)
        return Mark(step, count, bool(slow), when, phase.rstrip(b"\0").decode())


def beacons(count: int) -> list[Beacon]:
    """Beacons that processes forked from this one share with it."""
    memory = mmap.mmap(-1, RECORD.size * count)
    return [Beacon((memory, RECORD.size * k)) for k in range(count)]
