"""Arrow tables that one process of a node has fetched, on the node's disk for the others."""

import fcntl
import os
import stat
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

PATIENCE_S = 60.0


class NodeCache:
    """Tables by name in a folder of the user's own below TMPDIR, up to `most_gb` GiB of them and half of what is free there:
    those that were read last. Ranks and data loading processes go through the data together, so a few windows are enough
    for each to be fetched once a node; what holds all of it is fetched once at all.

    Where nothing can be written, or nothing came of waiting for another process, each fetches its own.
    """

    def __init__(self, most_gb: float) -> None:
        if isinstance(most_gb, str) or not most_gb >= 0:
            raise ValueError(f"node_cache_gb={most_gb!r}: takes a number of GiB, 0 for none")
        self.most_bytes = int(most_gb * 2**30)
        self._unchecked = self.most_bytes  # bytes stored since the folder was last measured

    def get(self, name: str, fetch: Callable[[], Any]) -> Any:
        """The table of that name, or what `fetch` gives; who asks for it meanwhile waits for that."""
        if not self.most_bytes:
            return fetch()
        try:
            path = own_folder() / f"{name}.arrow"
            if (found := load(path)) is not None:
                return found
            lock = open(path.with_name(f"{name[:2]}.lock"), "wb")  # noqa: SIM115
        except OSError:
            return fetch()
        with lock:  # let go by closing it, and by the end of the process
            wait_for(lock)
            found = load(path)
            if found is None:
                found = fetch()
                self._store(path, found)
        return found

    def _store(self, path: Path, table: Any) -> None:
        import pyarrow as pa

        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            if self._has_room(table.nbytes):
                with open(temporary, "wb") as file, pa.ipc.new_file(file, table.schema) as out:
                    out.write_table(table)
                os.replace(temporary, path)
        except (OSError, pa.ArrowException):  # a full disk
            temporary.unlink(missing_ok=True)

    def _has_room(self, size: int) -> bool:
        """Whether a table of that size may be stored, after what was read longest ago has made room."""
        self._unchecked += size
        if self._unchecked <= self.most_bytes // 256:
            return True
        folder = own_folder()
        files = [(entry.stat(), entry.path) for entry in os.scandir(folder) if not entry.name.endswith(".lock")]
        files.sort(key=lambda file: file[0].st_mtime_ns)
        used, disk = sum(state.st_size for state, _ in files), os.statvfs(folder)
        most = min(self.most_bytes, (used + disk.f_bavail * disk.f_frsize) // 2)
        for state, path in files:
            if used + size <= most:
                break
            Path(path).unlink(missing_ok=True)  # another process may have done it
            used -= state.st_size
        self._unchecked = 0
        return used + size <= most


def own_folder() -> Path:
    """The folder of the tables. An OSError, where it can't be made or isn't the user's alone: below /tmp anybody can make one."""
    folder = Path(tempfile.gettempdir(), f"fairexp-{os.getuid()}-row-groups")
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise PermissionError(folder)
    return folder


def wait_for(lock: IO[bytes]) -> None:
    """Takes the lock, or has waited for a minute, as long as a fetch is tried: a process that was stopped, perhaps of another
    run, holds up nobody else for good."""
    ends = time.monotonic() + PATIENCE_S
    while time.monotonic() < ends:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(0.01)


def load(path: Path) -> Any:
    """The table in that file; None where there is none, or a damaged one."""
    import pyarrow as pa

    try:
        with pa.OSFile(str(path)) as file:
            table = pa.ipc.open_file(file).read_all()
        os.utime(path)
    except (OSError, pa.ArrowException):
        return None
    return table
