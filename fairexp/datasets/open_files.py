"""Files that are read at places, of which only so many are open at once."""

import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MOST = 128  # descriptors in each process


class OpenFiles:
    """Reads parts of the files by their numbers; those that were read last stay open. No position is kept, so processes that
    were forked may share the descriptors; another process opens its own.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        self.descriptors: OrderedDict[int, int] = OrderedDict()

    def read(self, number: int, size: int, offset: int) -> bytes:
        """That part of the file; less, where it ends before."""
        if number not in self.descriptors:
            while len(self.descriptors) >= MOST:
                os.close(self.descriptors.popitem(last=False)[1])
            self.descriptors[number] = os.open(self.paths[number], os.O_RDONLY)
        self.descriptors.move_to_end(number)
        return os.pread(self.descriptors[number], size, offset)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"descriptors": OrderedDict()}

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("descriptors", {}).values():
            os.close(descriptor)
