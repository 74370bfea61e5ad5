"""A sweep's folder: the runs that it asks for. The runs themselves lie beside it, and may belong to several sweeps."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairexp.config.rundir import RunDir


@dataclass(frozen=True)
class SweepDir:
    """RUNS_DIR/sweeps/NAME."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def runs_dir(self) -> Path:
        return self.path.parent.parent

    def content(self) -> dict[str, Any]:
        """sweep.json; {} before the first submission."""
        try:
            return json.loads((self.path / "sweep.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}

    def jobs(self) -> list[dict[str, Any]]:
        """Each run's label, overrides and folder name, in the sweep's order; for a search, its trials so far."""
        trials = sorted((self.path / "trials").glob("*.json"))
        return [*self.content().get("jobs", []), *(json.loads(path.read_text(encoding="utf-8")) for path in trials)]

    def search(self) -> dict[str, Any]:
        """search.json; {} where no optimizer chooses the runs."""
        try:
            return json.loads((self.path / "search.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}

    def runs(self) -> list[RunDir]:
        """Its runs that are there."""
        found = (RunDir(self.runs_dir / job["run"]) for job in self.jobs())
        return [run for run in found if (run.path / "status.json").exists()]

    def labels(self) -> dict[str, str]:
        """Each run's own settings, by its folder's name."""
        return {job["run"]: job["label"] for job in self.jobs()}


def sweeps(runs_dir: Path) -> list[SweepDir]:
    """The sweeps of a folder of runs."""
    return [SweepDir(path.parent) for path in sorted((runs_dir / "sweeps").glob("*/sweep.json"))]
