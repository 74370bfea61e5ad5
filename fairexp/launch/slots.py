"""Shares this machine's devices out among the runs of several pool daemons of one user: a slot is a locked file.

Kernel locks (flock) and no server: a lock belongs to an open file, which forked processes share, and the kernel frees it when
the last of them has closed it or died, however it died. So nothing here can go stale.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

from fairexp.errors import UserError

# sticky: systemd-tmpfiles then leaves the file alone, however old; a slot's file made anew would be a second slot
FILE_MODE = 0o1600
# seconds between two looks, which take less than 0.5 ms of CPU each (8 slots, 6 waiters)
FIRST_WAIT_S, LONGEST_WAIT_S = 0.02, 0.1


class Slots:
    """The slots of this machine with the given names, as one daemon sees them; daemons may see different ones.

    `names`: GPU ids as in CUDA_VISIBLE_DEVICES, or any words; a GPU must have the same name in all daemons. `folder`: where the
    locks are, else `default_folder()`; on a local disk. UserError where that can't be used.
    """

    def __init__(self, names: Sequence[str], folder: Path | None = None):
        self.names = tuple(dict.fromkeys(names))
        self.folder = private(default_folder()) if folder is None else folder
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def take(
        self, count: int, wanted: Callable[[], bool] | None = None, pause: Callable[[float], object] = time.sleep
    ) -> Taken | None:
        """Waits for `count` slots that are free at once, and takes them all; None when `wanted()`, asked ten times a
        second while waiting, says no. UserError: more than there are, or the folder can't be written. `pause`: waits so many
        seconds, or less where it knows of a slot that has come free.

        First come, first served: whoever waits leaves a ticket, a file locked by it alone with its slots' names inside. Numbers
        are given in turn, under a lock that is held for a moment, and nobody takes a slot that an earlier ticket names. So a
        run that wants many is not starved by those that want one, none holds a part while it waits for the rest, and daemons
        with other slots pass by. A dead waiter's ticket isn't locked any more: the next who looks removes it. Not simply a
        queue at one lock: blocked in flock, nobody can ask `wanted`; polling for it isn't first come, first served.

        A stopped waiter (^Z) keeps its place. A child forked by another thread meanwhile would keep the place, or the slots:
        take, fork and release in one thread.
        """
        assert count > 0
        if count > len(self.names):
            raise UserError(f"{count} slots wanted, there are {len(self.names)}: {', '.join(self.names) or 'none'}")
        wait_s = FIRST_WAIT_S
        with self._ticket() as ticket:
            while True:
                with self._turn():
                    if taken := self._take_now(count, ticket):
                        return taken
                if wanted is not None and not wanted():
                    return None
                pause(wait_s)
                wait_s = min(wait_s * 1.2, LONGEST_WAIT_S)

    def in_use(self) -> list[str]:
        """The names that anyone holds now."""
        with self._turn():  # a look is a lock for a moment: nobody who wants the slot may meet it
            return [name for name in self.names if not self._is_free(name)]

    def _is_free(self, name: str) -> bool:
        with _opened(self._file(name)) as descriptor:
            return _lock(descriptor)

    def _take_now(self, count: int, ticket: Path) -> Taken | None:
        claimed = self._claimed_before(ticket)
        descriptors: dict[str, int] = {}
        with ExitStack() as held:
            for name in self.names:
                if name in claimed:
                    continue
                descriptor = held.enter_context(_opened(self._file(name)))
                if _lock(descriptor):
                    descriptors[name] = descriptor
                if len(descriptors) == count:
                    break
            else:
                return None
            taken = {name: os.dup(descriptor) for name, descriptor in descriptors.items()}
        return Taken(tuple(taken), tuple(taken.values()))

    def _claimed_before(self, ticket: Path) -> set[str]:
        """The names in the tickets of those who came earlier and still wait. Removes the tickets of the dead."""
        claimed: set[str] = set()
        for earlier in self._tickets():
            if earlier >= ticket:
                break
            with suppress(FileNotFoundError), _opened(earlier, make=False) as descriptor:  # it has just got its slots
                if _lock(descriptor):
                    earlier.unlink()
                else:
                    claimed.update(json.loads(earlier.read_text()))
        return claimed

    @contextmanager
    def _ticket(self) -> Iterator[Path]:
        """A place at the end of the queue, while inside."""
        with ExitStack() as place:
            with self._turn():
                last = max((int(path.suffix[1:]) for path in self._tickets()), default=0)
                path = self.folder / f"ticket.{last + 1:012d}"
                descriptor = place.enter_context(_opened(path))
                place.callback(path.unlink, missing_ok=True)
                os.write(descriptor, json.dumps(self.names).encode())
                fcntl.flock(descriptor, fcntl.LOCK_EX)  # last: a locked ticket is a whole one, also on a full disk
            yield path

    def _tickets(self) -> list[Path]:
        return sorted(self.folder.glob("ticket.*"))

    def _file(self, name: str) -> Path:
        return self.folder / f"slot.{quote(name, safe='')}"  # two names never share a file

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Inside, no one else looks at the files, or changes them."""
        try:
            with _opened(self.folder / "turn") as descriptor:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                yield
        except OSError as error:  # the folder was removed, the disk is full
            raise UserError(f"{self.folder}: can't share devices out there: {error.strerror}") from error


class Taken:
    """Slots that this process holds, and every process that it forks until `release`, and their forks.

    They are free when all of those have released them or died. `fds`: the locked files; a program started by exec gets them
    only by `pass_fds`.
    """

    def __init__(self, names: tuple[str, ...], fds: tuple[int, ...]):
        self.names = names
        self.fds = fds

    def release(self) -> None:
        """Closes this process's copies. After a fork the child still holds the slots: that is how a daemon hands them over.
        A second call does nothing."""
        fds, self.fds = self.fds, ()
        for descriptor in fds:
            os.close(descriptor)  # not LOCK_UN: that would free the slot under the child

    def __enter__(self) -> Taken:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def default_folder() -> Path:
    """The same for all of a user's processes on this machine, whatever TMPDIR says (two terminals may differ in that). Not
    $XDG_RUNTIME_DIR, which systemd removes at the user's last logout, and a pool outlives that."""
    return Path(f"/tmp/fairexp-{os.getuid()}")


def private(folder: Path) -> Path:
    """That folder, made if it wasn't there; UserError if anyone but this user could write in it, or if it can't be made."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise UserError(f"{folder}: can't make this folder: {error.strerror}") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise UserError(f"{folder}: must be a folder (no link) of yours with mode 0700; another user may have made it")
    return folder


@contextmanager
def _opened(path: Path, make: bool = True) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | (os.O_CREAT if make else 0), FILE_MODE)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Locks the open file; False if another holds it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
