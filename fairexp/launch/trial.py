"""One trial of a search, in the job that runs it: asks Optuna for values, makes the run, and tells how it ended.

There is no process that watches over the search: each job asks when it starts, so a slot is used again as soon as it is free,
and what was killed is asked for again from the journal in the sweep's folder.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from fairexp.config import rundir
from fairexp.config.identity import run_id
from fairexp.config.rundir import RunDir, write_atomically
from fairexp.errors import RunError

MAKES_IN_TIME_S = 300.0


def run_dir_of(record: dict[str, Any], index: int, first: bool = True) -> RunDir:
    """The run of a submission's slot: the same one each time that the slot is started. `first`: this node makes it."""
    folder = Path(record["search"])
    slot = f"{record['uid']}_{index}"
    deadline = time.monotonic() + MAKES_IN_TIME_S
    while (found := _of_slot(folder, slot)) is None and not first:
        if time.monotonic() > deadline:
            raise RunError(f"the first node made no trial within {MAKES_IN_TIME_S:.0f} s")
        time.sleep(0.5)
    return found or _ask(folder, record, slot)


def tell(record: dict[str, Any], run_dir: RunDir) -> None:
    """Tells the study how the run ended, if it has ended."""
    _tell_what_ended(Path(record["search"]), only=run_dir.path.name)


def trials(folder: Path) -> list[dict[str, Any]]:
    """The trials that have a run, in order."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / "trials").glob("*.json"))]


def study(folder: Path, content: dict[str, Any]) -> Any:
    """The study in the sweep's folder. Its file is locked by a file beside it, which works on shared file systems too."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    journal = str(folder / "optuna.journal")
    storage = JournalStorage(JournalFileBackend(journal, lock_obj=JournalFileOpenLock(journal)))
    return optuna.create_study(
        study_name="search", storage=storage, direction=content["direction"], load_if_exists=True
    )


def sampler(content: dict[str, Any], number: int) -> Any:
    """What chooses the values of a trial. Each trial has a seed of its own: every job begins with a fresh sampler."""
    import optuna

    seed = content["sampler_seed"] * 100_003 + number
    if content["sampler"] == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    # constant_liar: values that are being tried count as bad, so parallel trials don't all try the same
    return optuna.samplers.TPESampler(seed=seed, constant_liar=True)


def _of_slot(folder: Path, slot: str) -> RunDir | None:
    return next(
        (RunDir(folder.parent.parent / trial["run"]) for trial in trials(folder) if trial["slot"] == slot), None
    )


def _ask(folder: Path, record: dict[str, Any], slot: str) -> RunDir:
    content = json.loads((folder / "search.json").read_text(encoding="utf-8"))
    _tell_what_ended(folder)
    known = study(folder, content)
    asked = known.ask()
    known.sampler = sampler(content, asked.number)
    texts: list[str] = []
    chosen: list[str] = []
    values: dict[str, Any] = {}
    for key, space in content["space"].items():
        if space["kind"] == "choice":
            text = asked.suggest_categorical(key, space["texts"])
            if key in content["group_keys"]:
                chosen.append(text)
            else:
                values[key.lstrip("+")] = space["values"][space["texts"].index(text)]
        else:
            suggest = asked.suggest_int if space["kind"] == "int" else asked.suggest_float
            value = suggest(key, space["low"], space["high"], log=space["log"])
            values[key.lstrip("+")] = value
            text = f"{key}={value!r}"
        texts.append(text)
    base = content["bases"][json.dumps(chosen)]
    config = _config(base, values)
    path = folder.parent.parent / f"{config['name']}-{run_id(config)}"
    overrides = [*base["overrides"], *(text for text in texts if text not in chosen)]
    if not (path / "status.json").exists():
        command = " ".join(["fairexp", "train", *overrides])
        code = {name: folder / "code" / name for name in content["code"]}
        try:
            rundir.create(path, config, command, content["launch"], code, submission=record["uid"])
        except OSError:
            if not (path / "status.json").exists():
                raise  # else another slot has asked for the same values just now
    else:
        RunDir(path).set_status(submission=record["uid"])
    trial = {
        "number": asked.number,
        "slot": slot,
        "run": path.name,
        "label": " ".join(text.lstrip("+") for text in texts),
        "overrides": overrides,
    }
    (folder / "trials").mkdir(exist_ok=True)
    write_atomically(folder / "trials" / f"{asked.number:05d}.json", json.dumps(trial, indent=1) + "\n")
    return RunDir(path)


def _config(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """The base with the values in place, resolved."""
    from omegaconf import OmegaConf

    tree = OmegaConf.create(base["config"])
    for key, value in values.items():
        OmegaConf.update(tree, key, value)
    config: Any = OmegaConf.to_container(tree, resolve=True)
    if config.get("name") is None:
        config["name"] = base["name"]
    return config


def _tell_what_ended(folder: Path, only: str | None = None) -> None:
    """Tells the study of each trial that has ended and isn't known to have: its job may have been killed before it could."""
    import optuna

    content = json.loads((folder / "search.json").read_text(encoding="utf-8"))
    known = study(folder, content)
    states = {trial.number: trial.state for trial in known.get_trials(deepcopy=False)}
    for trial in trials(folder):
        if only not in (None, trial["run"]) or states.get(trial["number"]) != optuna.trial.TrialState.RUNNING:
            continue
        run = RunDir(folder.parent.parent / trial["run"])
        state, summary = run.status().get("state"), run.summary()
        value = (summary or {}).get("final", {}).get(content["metric"])
        failed = optuna.trial.TrialState.FAIL
        try:
            if state == "finished" and isinstance(value, int | float) and math.isfinite(value):
                known.tell(trial["number"], float(value))
            elif state in ("finished", "failed", "cancelled"):
                if state == "finished":
                    print(f"{trial['run']}: summary.json has no {content['metric']}: {value}", flush=True)
                known.tell(trial["number"], state=failed)
        except (RuntimeError, ValueError):  # another job has told it meanwhile
            continue
