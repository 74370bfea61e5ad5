"""Arrow tables that one process of a node has fetched, on the node's disk for the others."""

import fcntl
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


class NodeCache:
    """Tables by name in a folder of the user's own below TMPDIR, up to `most_gb` GiB of them and half of what is free there:
    those that were read last. Ranks and data loading processes go through the data together, so a few windows are enough
    for each to be fetched once a node; what holds all of it is fetched once at all.

    Where nothing can be written, each process fetches its own.
    """

    def __init__(self, most_gb: float) -> None:
        self.most_bytes = int(most_gb * 2**30)
        self.folder = Path(tempfile.gettempdir(), f"fairexp-{os.getuid()}-row-groups")
        self._unchecked = self.most_bytes  # bytes stored since the folder was last measured

    def get(self, name: str, fetch: Callable[[], Any]) -> Any:
        """The table of that name, or what `fetch` gives; who asks for it meanwhile waits for that."""
        path = self.folder / f"{name}.arrow"
        try:
            self._own()
            if (found := load(path)) is not None:
                return found
            lock = open(self.folder / f"{name[:2]}.lock", "wb")  # noqa: SIM115
        except OSError:
            return fetch()
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # let go by closing it, and by the end of the process
            found = load(path)
            if found is None:
                found = fetch()
                self._store(path, found)
        return found

    def _own(self) -> None:
        """An OSError, unless the folder is there and nobody else can write to it: a place below /tmp is there for anybody."""
        if not self.most_bytes:
            raise OSError
        self.folder.mkdir(mode=0o700, exist_ok=True)
        found = self.folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
            raise PermissionError

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
        files = [(entry.stat(), entry.path) for entry in os.scandir(self.folder) if not entry.name.endswith(".lock")]
        files.sort(key=lambda file: file[0].st_mtime_ns)
        used, disk = sum(state.st_size for state, _ in files), os.statvfs(self.folder)
        most = min(self.most_bytes, (used + disk.f_bavail * disk.f_frsize) // 2)
        for state, path in files:
            if used + size <= most:
                break
            Path(path).unlink(missing_ok=True)  # another process may have done it
            used -= state.st_size
        self._unchecked = 0
        return used + size <= most


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
