"""The run folder: its files, its creation, its status. The files are the truth about a run; everything else reads them."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml

from fairexp.config.attempt import publish
from fairexp.errors import Fenced

LOCK_S = 5.0  # a change of status.json takes some milliseconds
_patience_s = LOCK_S


def write_atomically(path: Path, text: str, workspace: Path | None = None) -> None:
    """The file holds `text`, or what it held before: also after a crash in the middle. `workspace`: the writing attempt's;
    Fenced where a later one has begun."""
    temporary = (workspace or path.parent) / f".{path.name}.{os.getpid()}"
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:  # a full disk
        if workspace and not workspace.exists():
            raise Fenced(path) from None
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None
    if workspace:
        publish(temporary, path)
    else:
        os.replace(temporary, path)


def sync_folder(folder: Path) -> None:
    """The names in the folder outlive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class RunDir:
    """A run folder's paths and its small files. `workspace`: of the attempt that writes, if one does."""

    path: Path
    workspace: Path | None = None

    @property
    def id(self) -> str:
        """The run's id, the last part of the folder's name."""
        return self.path.name.rpartition("-")[2]

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def submit(self) -> Path:
        return self.path / "submit"

    def config(self) -> dict[str, Any]:
        """The frozen config."""
        return yaml.load(self.config_file.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)

    def launch(self) -> dict[str, Any]:
        """How the run was submitted: working folder, import path, trusted packages."""
        return json.loads((self.submit / "launch.json").read_text(encoding="utf-8"))

    def status(self) -> dict[str, Any]:
        """status.json; {} in a folder that has none."""
        try:
            return json.loads((self.path / "status.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}

    def set_status(self, **changes: Any) -> None:
        """Changes keys of status.json, atomically, also when another process of this machine changes others just now."""
        with open(self.submit / "status.lock", "w") as lock:
            _wait_for(lock)
            status = {**self.status(), **changes, "heartbeat": time.time()}
            self.write("status.json", json.dumps(status, indent=1) + "\n")

    def write(self, name: str, text: str) -> None:
        """Writes one of the run's files atomically. Fenced: a later attempt has the run."""
        write_atomically(self.path / name, text, self.workspace)

    def last_rows(self) -> list[dict[str, Any]]:
        """The newest rows of metrics.jsonl: of its last 16 KiB, so that a table of many long runs is quick."""
        try:
            with open(self.metrics_file, "rb") as file:
                file.seek(max(os.fstat(file.fileno()).st_size - 16384, 0))
                lines = file.read().split(b"\n")[:-1]
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines if line.startswith(b'{"step"')]

    def summary(self) -> dict[str, Any] | None:
        """summary.json, once the run has finished."""
        try:
            return json.loads((self.path / "summary.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None


def _wait_for(lock: IO[str]) -> None:
    """Takes the lock, or goes on without it: a process that was stopped, or its lost node, may hold it for ever."""
    global _patience_s
    deadline = time.monotonic() + _patience_s
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _patience_s = LOCK_S
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                _patience_s = 0.1  # once is enough
                return
            time.sleep(0.01)


def create(
    path: Path,
    config: Mapping[str, Any],
    command: str,
    launch: Mapping[str, Any],
    code: Mapping[str, str | Path],
    **status: Any,
) -> RunDir:
    """A new run folder with the frozen config, the command line, how to launch it and the state of the code; it appears whole
    or not at all. `code`: texts, or files to share with other runs; `status`: more keys of status.json.

    OSError: the folder exists, or can't be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        for folder in ("", "code", "logs", "checkpoints", "submit"):
            (draft / folder).mkdir()
        run = RunDir(draft)
        run.config_file.write_text(as_yaml(config), encoding="utf-8")
        (draft / "command.txt").write_text(command + "\n", encoding="utf-8")
        write_code(run, code)
        (run.submit / "launch.json").write_text(json.dumps(launch, indent=1) + "\n", encoding="utf-8")
        now = time.time()
        first = {"state": "queued", "step": 0, "attempts": 0, "created": now, **status, "heartbeat": now}
        (draft / "status.json").write_text(json.dumps(first, indent=1) + "\n", encoding="utf-8")
        os.rename(draft, path)  # onto a folder that is not empty: ENOTEMPTY
    except OSError:
        shutil.rmtree(draft, ignore_errors=True)  # a full disk, too, leaves nothing half-made
        raise
    return RunDir(path)


def write_code(run: RunDir, code: Mapping[str, str | Path]) -> None:
    """Writes the state of the code into the run's folder `code`; a Path is linked: a sweep's runs share one patch."""
    for name, content in code.items():
        file = run.path / "code" / name
        if isinstance(content, Path):
            file.unlink(missing_ok=True)
            try:
                os.link(content, file)
            except OSError:  # a file system without links
                shutil.copyfile(content, file)
        else:
            file.write_text(content, encoding="utf-8", errors="surrogateescape")


def as_yaml(config: Mapping[str, Any]) -> str:
    """The text of config.yaml."""
    return yaml.dump(dict(config), Dumper=yaml.CSafeDumper, sort_keys=False, allow_unicode=True, width=120)
