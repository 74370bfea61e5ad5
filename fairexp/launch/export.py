"""The verb `export`: a run's weights as a folder that `from_pretrained` of transformers loads."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from fairexp.config.hugging_face import config_json
from fairexp.config.manifest import Damaged
from fairexp.config.rundir import RunDir
from fairexp.errors import FAILED, RunError, UserError
from fairexp.launch.evaluate import chosen

TRANSFORMER = "fairexp.models.transformer.Transformer"


def export(run_dir: RunDir, folder: Path, step: str | None) -> int:
    """Writes the last checkpoint's weights, or `step`'s, and a config.json into the folder, which must be new or empty."""
    model = run_dir.config()["model"]
    if model["_target_"] != TRANSFORMER:
        raise UserError(f"export: {run_dir.path} has a {model['_target_']}; it knows how to write a {TRANSFORMER}")
    number, checkpoint = chosen(run_dir, step)
    try:
        config = config_json(model)
    except UserError as error:
        raise UserError(f"export: {error}") from None
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"export: {folder} isn't empty; name a new folder")
    draft = folder.with_name(f".{folder.name}.{os.getpid()}")  # it gets its name when it is whole
    try:
        draft.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"export: {error.filename}: {error.strerror}") from error
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    from fairexp.runtime.export import write

    try:
        what, size = write(model, config, checkpoint, draft)
        draft.rename(folder)
    except OSError as error:
        print(f"fairexp: export: {folder}: {error.strerror or error}", file=sys.stderr)
        return FAILED
    except (RunError, Damaged) as error:
        raise UserError(f"export: {error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    print(f"{run_dir.path.name} step {number}: {what}, {size / 2**20:,.1f} MiB -> {folder}", file=sys.stderr)
    return 0
