"""Files behind a URL that fsspec knows, such as `hf://...`, for data sets that are read in place over the network."""

import os
import re
import time
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any, TypeVar

# seconds before each try after the first: a minute in all, in which a server restarts
WAITS: tuple[float, ...] = (1, 2, 4, 8, 16, 32)
# what the same question would get again: a package or a name that isn't there, a login that isn't let in
SETTLED = (PermissionError, ValueError, TypeError, AttributeError, NotImplementedError)

Answer = TypeVar("Answer")


class Remote:
    """The folder behind a URL: which files it has, and each opened for reading. As a text, its URL without secrets.

    What fails is tried again for a minute, then an OSError of one line. Who has waited in vain doesn't wait again, until
    something has been read: a loader that then asks for each sample of a batch shall not wait a minute for each.
    """

    def __init__(self, root: str) -> None:
        self.root, self.waits = root.rstrip("/"), WAITS
        self._clients: list[tuple[int, Any, str]] = []  # (process, file system, the folder's path in it)
        self._client()

    def __str__(self) -> str:
        return without_secrets(self.root)

    def _client(self) -> tuple[Any, str]:
        """This process's own file system: those of fsspec have threads and connections, which don't survive a fork.

        What was inherited isn't let go, either: closing it would take its connections from the parent's event loop.
        """
        if not self._clients or self._clients[-1][0] != os.getpid():
            self._clients.append((os.getpid(), *connect(self.root)))
        return self._clients[-1][1:]

    def find(self, pattern: str) -> dict[str, int | None]:
        """The files below it that match, by name in `Path`'s order, and their sizes where the listing tells them."""
        from fsspec.utils import glob_translate

        fixed = re.split(r"[*?[]", pattern)[0].rpartition("/")[0]  # the folders before the first wildcard
        depth = None if "**" in pattern else pattern[len(fixed) :].strip("/").count("/") + 1
        matches = re.compile(glob_translate(pattern)).match

        def listed() -> dict[str, int | None]:
            fs, folder = self._client()
            # not fs.glob: it takes a folder that it failed to list for an empty one
            infos = [
                info
                for _, _, files in fs.walk(
                    f"{folder}/{fixed}".rstrip("/"), maxdepth=depth, on_error="raise", detail=True
                )
                for info in files.values()
            ]
            sizes = {info["name"][len(folder) + 1 :]: info.get("size") for info in infos}
            return {name: sizes[name] for name in sorted(sizes, key=PurePosixPath) if matches(name)}

        return self._patiently(listed)

    def read(self, name: str, size: int | None, how: Callable[[Any], Answer]) -> Answer:
        """What `how` makes of the open file. Each of its reads is one request. With the size, opening it is none."""

        def once() -> Answer:
            fs, folder = self._client()
            with fs.open(f"{folder}/{name}", "rb", size=size, cache_type="none") as file:
                return how(file)

        return self._patiently(once)

    def _patiently(self, what: Callable[[], Answer]) -> Answer:
        for wait in (*self.waits, None):
            try:
                answer = what()
            except Exception as error:  # each file system has its own
                if wait is None:
                    self.waits = ()
                if wait is None or settled(error):
                    raise OSError(one_line(error)) from None
                time.sleep(wait)
            else:
                self.waits = WAITS
                return answer
        raise AssertionError


def connect(root: str) -> tuple[Any, str]:
    """A file system of its own for a URL, and the path in it. A ValueError names the package that is missing."""
    from fsspec.core import url_to_fs

    try:
        fs, folder = url_to_fs(root, skip_instance_cache=True)
        return fs, folder.rstrip("/")
    except ImportError as error:
        package = getattr(error.__cause__, "name", None) or one_line(error)
        raise ValueError(f"{without_secrets(root)}: needs {package}: pip install {package}") from None
    except Exception as error:  # each file system has its own
        raise ValueError(f"{without_secrets(root)}: {one_line(error)}") from None


def settled(error: BaseException) -> bool:
    """Whether trying again is in vain: what was asked for isn't there, isn't ours or isn't Parquet."""
    if isinstance(error, FileNotFoundError):  # fsspec also raises it from whatever kept it from looking
        return error.__cause__ is None or settled(error.__cause__)
    # aiohttp's and huggingface_hub's; 408 is a timeout, 429 too many requests
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None) or 0
    return isinstance(error, SETTLED) or (400 <= status < 500 and status not in (408, 429))


def one_line(error: Exception) -> str:
    """The error's type and its text, cut to what a person reads, without secrets."""
    return without_secrets(" ".join(f"{type(error).__name__}: {error}".split()))[:300]


def without_secrets(text: str) -> str:
    """The text with its URLs less `user:password@` and `?token=...`."""
    text = re.sub(r"(https?://)[^/?#\s]*@|(://)[^/?#\s@]*:[^/?#\s]*@", r"\1\2", text)
    return re.sub(r"(://[^\s?'\"]*)\?[^\s'\")]*", r"\1", text)
