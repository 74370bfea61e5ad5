"""`tracker=tensorboard`: scalars in RUN_DIR/tensorboard, for `tensorboard --logdir runs`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fairexp.errors import UserError


class TensorBoard:
    """One scalar a metric. Event files are appended to and never rewritten; a resumed run adds one to the folder."""

    def __init__(self, run_dir: Path, run_id: str, name: str, config: dict[str, Any], resumed: bool) -> None:
        try:
            # Here and not at the top: it takes a second or two, which only this choice should pay.
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                'tracker=tensorboard needs the tensorboard package: pip install "fairexp[tensorboard]", '
                f"or choose tracker=wandb or tracker=none ({error})"
            ) from error
        self._open = SummaryWriter
        self._folder = run_dir / "tensorboard"
        self._writer: SummaryWriter | None = None

    def log(self, record: Mapping[str, float], step: int) -> None:
        if self._writer is None:
            # purge_step hides what an earlier attempt wrote from this step on: the rows after the checkpoint.
            self._writer = self._open(str(self._folder), purge_step=step)
        for metric, value in record.items():
            self._writer.add_scalar(metric, value, step)
        self._writer.flush()  # else up to 120 s of scalars die with a killed process

    def finish(self, exit_code: int) -> None:
        if self._writer is not None:
            self._writer.close()
