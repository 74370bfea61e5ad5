"""A user's data set that writes down which samples it was asked for."""

import json
import os
import signal
from typing import Any

import torch
from torch import Tensor

from fairexp.datasets.digits import Digits


class Recorded(Digits):
    """Digits; each batch that is gathered is a line of $RECORD/<attempt>_<rank>.jsonl, and the one after $DIES_AFTER kills."""

    gathered = 0

    def __getitems__(self, indices: Tensor | list[int]) -> Any:
        if self.gathered == int(os.environ["DIES_AFTER"]):
            os.kill(os.getpid(), signal.SIGKILL)
        self.gathered += 1
        file = f"{os.environ['RECORD']}/{os.environ['FAIREXP_ATTEMPT']}_{os.environ['RANK']}.jsonl"
        with open(file, "a") as out:
            out.write(json.dumps(torch.as_tensor(indices).tolist()) + "\n")
        return super().__getitems__(indices)
