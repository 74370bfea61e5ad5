"""A run by its folder, its name or its id."""

from __future__ import annotations

from pathlib import Path

from fairexp.config.nearest import nearest
from fairexp.config.rundir import RunDir
from fairexp.errors import UserError


def runs(runs_dir: Path) -> list[RunDir]:
    """The runs of a folder, oldest first."""
    found = [RunDir(path.parent) for path in runs_dir.glob("*/status.json") if not path.parent.name.startswith(".")]
    return sorted(found, key=lambda run: run.status().get("created", 0.0))


def find(what: str, runs_dir: Path) -> RunDir:
    """The run of that folder, folder name, id or name; UserError where there is none or several."""
    if (Path(what) / "status.json").is_file():
        return RunDir(Path(what).absolute())
    known = runs(runs_dir)
    for matches in (
        [run for run in known if what in (run.path.name, run.id)],
        [run for run in known if run.path.name.startswith(what) or run.id.startswith(what)],
    ):
        if len(matches) == 1:
            return RunDir(matches[0].path.absolute())
        if matches:
            raise UserError(f"{what}: several runs: {', '.join(run.path.name for run in matches)}")
    raise UserError(f"{what}: no such run in {runs_dir}{nearest(what, [run.path.name for run in known])}")
