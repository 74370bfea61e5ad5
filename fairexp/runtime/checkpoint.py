"""Saving and restoring a run's whole state, in one format for every strategy and world size.

A save stops the loop for a copy; a thread a rank then writes it (shards.py), and rank 0 publishes the folder when all are
done: manifest last, then one rename, which fails if a later attempt has the run. Nothing is ever overwritten.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fairexp import __version__
from fairexp.config import manifest
from fairexp.config.attempt import publish
from fairexp.config.manifest import Damaged
from fairexp.config.rundir import sync_folder
from fairexp.errors import FAILED, Fenced, RunError
from fairexp.lifetime import leave
from fairexp.runtime import dist, shards
from fairexp.runtime.generators import RandomState, random_state
from fairexp.runtime.track import one_line

if TYPE_CHECKING:
    from fairexp.runtime.build import Run

SPARE_BYTES = 1 << 20  # left free beside a checkpoint: for metrics, logs and the manifest
SCALAR = bool | int | float | str | None


def save(run: Run) -> None:
    """Writes the state after `run.step`; all ranks take part. Returns when it has been copied, or with checkpoint.background
    off when it is on the disk. RunError on all ranks, where this save or the one before it failed."""
    if run.step == run.saver.step:
        return
    run.saver.finish(run)
    run.saver.start(run)
    if not run.checkpoint.background:
        run.saver.finish(run)


class Saver:
    """The save that is under way, if one is, and what it has in common with the next."""

    def __init__(self, device: torch.device):
        self.staging = shards.Staging(device)
        self.step = 0  # of the newest state that is safe, or on its way
        self.safe = 0  # the one before it, until it has arrived
        self.thread: threading.Thread | None = None
        self.error: str | None = None
        self.need = ""  # in words

    def start(self, run: Run) -> None:
        """Copies the state, and starts to write it."""
        began = time.monotonic()
        dist.share_buffers(run.module)
        tensors = _tensors(run)
        state = json.dumps(_scalars(run), indent=1) + "\n"  # now: the loop goes on changing what it was made from
        draft = run.dir.workspace / f"step_{run.step:08d}"  # type: ignore[operator]
        self.need = f"a checkpoint needs {_size(tensors) / 2**20:.1f} MiB and {run.here.world_size + 4} files"
        if run.here.first:
            self.error = self._prepare(draft, _size(tensors), run.here.world_size + 4)
        if dist.any_rank(self.error is not None):
            self.safe = self.step
            self._refuse(run)
            return
        pieces = shards.mine(tensors, run.here)
        if run.checkpoint.background:
            pieces = self.staging.copy(pieces)
        self.safe, self.step = self.step, run.step
        index = {
            name: {"dtype": shards.NAMES[t.dtype], "shape": list(t.shape), "pieces": []} for name, t in tensors.items()
        }
        self.thread = threading.Thread(
            target=self._write, args=(run, run.step, draft, pieces, index, state, began), name="save", daemon=True
        )
        self.thread.start()

    def finish(self, run: Run) -> None:
        """Waits until the save that is under way is complete; all ranks call it. RunError on all of them where it failed."""
        if self.thread is None:
            return
        self.join()
        if dist.any_rank(self.error is not None):
            self._refuse(run)

    def join(self) -> None:
        """Waits for this rank's part, on its way out after an error: the state is worth having."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def _refuse(self, run: Run) -> None:
        text = dist.said_by_any(self.error or "")
        self.error = None
        if run.checkpoint.on_error == "stop":
            raise RunError(text)
        self.step = self.safe
        if run.here.first:
            print(f"not saved, training goes on: {text}", file=sys.stderr, flush=True)

    def _write(
        self,
        run: Run,
        step: int,
        draft: Path,
        pieces: dict[str, shards.Piece],
        index: dict[str, Any],
        state: str,
        began: float,
    ) -> None:
        try:
            file = f"rank_{run.here.rank:05d}.safetensors"
            try:
                part = {
                    "file": file,
                    "entry": shards.write(draft / file, pieces),
                    "pieces": {
                        name: [shards.NAMES[values.dtype], offset, list(values.shape)]
                        for name, (values, offset) in pieces.items()
                    },
                }
            except Exception as error:  # of whatever kind: rank 0 waits for this rank's word
                why = str(error.strerror) if isinstance(error, OSError) else one_line(error)
                part = {"error": [str(draft / file), why]}
            parts = dist.collect(f"save/{step}", part)
            if parts is None:
                return  # rank 0 publishes
            if errors := [each["error"] for each in parts if "error" in each]:
                file, why = errors[0]
                raise OSError(0, why, file)
            for each in parts:
                for name, (dtype, offset, shape) in each["pieces"].items():
                    # what is new here are another rank's generators
                    entry = index.setdefault(name, {"dtype": dtype, "shape": shape, "pieces": []})
                    entry["pieces"].append([each["file"], offset, shape])
            _commit(run, draft, {each["file"]: each["entry"] for each in parts}, index, state)
            # the longest so far: `fairexp doctor` compares it with the time that a scheduler gives
            seconds = round(time.monotonic() - began, 3)
            run.dir.set_status(save_s=max(seconds, run.dir.status().get("save_s", 0.0)))
            _prune(run)
        except Exception as error:
            if isinstance(error, Fenced) or _is_gone(run.dir.workspace):  # type: ignore[arg-type]
                print(Fenced(draft.name), file=sys.stderr, flush=True)
                leave(FAILED)
            why = one_line(error)
            if isinstance(error, OSError):
                why = f"{error.filename or draft}: {error.strerror}; {self.need}, {_room(draft.parent)}"
            shutil.rmtree(draft, ignore_errors=True)
            self.error = f"checkpoint of step {step}: {why}"
            if run.checkpoint.on_error == "stop":
                run.stop.trouble = True  # all ranks learn of it at the next step boundary at which they compare notes

    def _prepare(self, draft: Path, size: int, files: int) -> str | None:
        """Makes the folder; why a checkpoint has no place, if it hasn't."""
        try:
            room = os.statvfs(draft.parent)
            if room.f_bavail * room.f_frsize < size or (room.f_files and room.f_favail < files):
                return f"{draft.parent}: {self.need}, {_room(draft.parent)}"
            shutil.rmtree(draft, ignore_errors=True)  # what a failed save left
            draft.mkdir()
        except FileNotFoundError:
            print(Fenced(draft.name), file=sys.stderr, flush=True)
            leave(FAILED)
        except OSError as error:
            return f"{error.filename}: {error.strerror}; {self.need}, {_room(draft.parent)}"
        return None


def _size(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values()) + SPARE_BYTES


def _room(folder: Path) -> str:
    try:
        room = os.statvfs(folder)
    except OSError as error:
        return f"{folder}: {error.strerror}"
    return f"{room.f_bavail * room.f_frsize / 2**20:.1f} MiB and {room.f_favail} files are free"


def _is_gone(workspace: Path) -> bool:
    """Whether a later attempt has taken it away; a disk that fails hasn't."""
    try:
        os.stat(workspace)
    except OSError as error:
        return isinstance(error, FileNotFoundError)
    return False


def _commit(run: Run, draft: Path, files: dict[str, Any], index: dict[str, Any], state: str) -> None:
    """Makes the draft a checkpoint: from the rename on it is one, before it is nothing."""
    scalars = json.loads(state)
    files["state.json"] = _write_text(draft / "state.json", state)
    body = {
        "schema": manifest.SCHEMA,
        "step": scalars["step"],
        "time": time.time(),
        "metrics": {
            name: value
            for name, value in scalars["final"].items()
            if name.startswith("eval/") and scalars["evaluated"] == scalars["step"]
        },
        **_made_by(run),
        "files": files,
        "tensors": index,
    }
    _write_text(draft / manifest.FILE, manifest.encode(body))
    sync_folder(draft)
    run.tracker.sync()  # the rows up to here must outlive what the checkpoint outlives
    final = run.dir.checkpoints / draft.name
    publish(draft, final)
    sync_folder(final.parent)


def _made_by(run: Run) -> dict[str, Any]:
    """What the last bits depend on, besides the config."""
    return {
        "world_size": run.here.world_size,
        "strategy": run.config["strategy"]["_target_"],
        "device": run.here.device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "fairexp": __version__,
    }


def _write_text(file: Path, text: str) -> dict[str, Any]:
    data = text.encode()
    with open(file, "xb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())
    return {"bytes": len(data), "sha256": manifest.digest(data)}


def _prune(run: Run) -> None:
    """Removes what checkpoint.keep_* don't ask for; its successor is on the disk by now."""
    there = manifest.committed(run.dir.checkpoints)
    for step in there.keys() - kept(there, run):
        trash = run.dir.workspace / f"trash_{step}"  # type: ignore[operator]
        publish(there[step], trash)  # first the name: a half-deleted folder must not look complete
        if trash.is_symlink():  # somebody has moved it to another disk
            trash.unlink()
        else:
            shutil.rmtree(trash)


def kept(there: dict[int, Path], run: Run) -> set[int]:
    """Which of the steps stay: the last ones, each keep_every-th, and the best by a metric."""
    rules = run.checkpoint
    steps = list(there)
    keep = set(steps[-rules.keep_last :])
    if rules.keep_every:
        keep |= {step for step in steps if step % rules.keep_every == 0}
    if rules.keep_best:
        values = {step: _metric(folder, rules.best_metric) for step, folder in there.items()}
        known = sorted((value, step) for step, value in values.items() if value is not None)
        keep |= {
            step for _, step in (known[-rules.keep_best :] if rules.best_is == "max" else known[: rules.keep_best])
        }
    return keep


def _metric(folder: Path, name: str | None) -> float | None:
    try:
        value = manifest.decode(manifest.text_of(folder), folder)["metrics"].get(name)
    except (Damaged, RunError):
        return None
    return None if value is None or value != value else value  # NaN is the best of nothing


# --- back ---


def restore(run: Run) -> None:
    """Gives the run the state of the newest checkpoint that is whole; a damaged one is put aside, in words. RunError, where
    there are some and none is whole."""
    run.saver.finish(run)
    steps = list(manifest.committed(run.dir.checkpoints)) if run.here.first else []
    steps = json.loads(dist.said_by_first(json.dumps(steps)))
    for step in reversed(steps):
        folder = run.dir.checkpoints / f"step_{step:08d}"
        try:
            load(run, folder, goes_on=True)
            return
        except Damaged as damage:
            if run.here.first:
                aside = folder.with_name(f"damaged_{folder.name}")
                shutil.rmtree(aside, ignore_errors=True)
                publish(folder, aside)
                print(f"{damage}: not used, now {aside.name}", file=sys.stderr, flush=True)
    # also after an earlier start has put them aside: this one isn't to begin anew in silence
    if steps or any(run.dir.checkpoints.glob("damaged_*")):
        raise RunError(f"{run.dir.checkpoints}: no checkpoint is whole; remove the damaged ones to start from step 0")


def load(run: Run, folder: Path, goes_on: bool = False) -> None:
    """Gives the run the state of the checkpoint; all ranks take part. Any strategy and world size may have written it.
    Damaged on all ranks, where a file isn't what was written: before anything of the run has changed. With `goes_on`, on
    the data that it was trained on: RunError, where dataset.train is known to be other data."""
    try:
        body = _verified(run, folder)
        scalars = manifest.read_json(folder / "state.json")
        if goes_on:
            _check_data(run, folder, scalars)
        _take(run, folder, body, scalars)
    except (RunError, Damaged):
        raise
    except OSError as error:
        raise RunError(f"{error.filename or folder}: {error.strerror or error}") from error
    except Exception as error:  # of whatever kind: a checkpoint from elsewhere can hold anything
        if dist.is_lost_peer(error):
            raise
        raise RunError(f"{folder}: not a checkpoint of this run ({one_line(error)!r})") from error
    run.saver.step = run.step
    if goes_on and run.here.first and run.step and (changed := _changed(body, _made_by(run))):
        print(f"not bit for bit as before: {changed}", file=sys.stderr, flush=True)


def _verified(run: Run, folder: Path) -> dict[str, Any]:
    """The manifest, the same on all ranks, after they have shared the work of checking its files."""
    trouble, text = "", ""
    if run.here.first:
        try:
            text = manifest.text_of(folder)
            manifest.decode(text, folder)
        except Damaged as damage:
            trouble = str(damage)
    if trouble := dist.said_by_first(trouble):
        raise Damaged(trouble)
    body = manifest.decode(dist.said_by_first(text), folder)
    for number, (name, entry) in enumerate(body["files"].items()):
        if number % run.here.world_size == run.here.rank and not trouble:
            try:
                manifest.check(folder / name, entry["bytes"], entry["sha256"])
            except Damaged as damage:
                trouble = str(damage)
    if trouble := dist.said_by_any(trouble):
        raise Damaged(trouble)
    return body


def _take(run: Run, folder: Path, body: dict[str, Any], scalars: dict[str, Any]) -> None:
    wrong = [key for key, fits in STATE.items() if key not in scalars or not fits(scalars[key])]
    if wrong or not _is_guards(scalars["guard"], run.guard.windows):
        wrong = wrong or ["guard"]
        raise RunError(f"{folder / 'state.json'}: its {' and '.join(wrong[:3])} can't be what fairexp wrote")
    if scalars["step"] != body["step"]:
        raise RunError(f"{folder / 'state.json'}: belongs to step {scalars['step']}")
    stored = shards.Stored(folder, body["tensors"], body["files"])
    wanted: dict[str, Tensor] = {f"model.{name}": tensor for name, tensor in _module_state(run).items()}
    if run.ema:
        wanted |= {f"ema.{name}": tensor for name, tensor in run.ema.shadow.items()}
    if missing := sorted(wanted.keys() - stored.tensors.keys()):
        raise RunError(f"{folder} was written by another model: it has no {', '.join(missing[:3])}")
    for name, tensor in wanted.items():
        stored.fits(name, tensor)
    optimizer_state: dict[str, dict[str, Any]] = {}
    generators: dict[str, Tensor] = {}
    for key in stored.tensors:
        kind, _, rest = key.partition(".")
        name, _, what = rest.rpartition(".")
        if kind == "optim":
            if name not in run.parameters:
                raise RunError(f"{folder}: its optimizer has a state of {name!r}, which is no parameter here")
            tensor = _room_for(stored.shape(key), stored.dtype(key), run.parameters[name])
            optimizer_state.setdefault(name, {})[what] = wanted[key] = tensor
        elif kind == "rng" and name == str(run.here.data_rank):
            generators[what] = torch.empty(stored.shape(key), dtype=stored.dtype(key))
            stored.read(key, stored.parts(key, generators[what]))
    _check_optimizer(run, folder, optimizer_state, scalars)
    if generators and (missing := sorted({"torch", "python", "numpy"} - generators.keys())):
        raise RunError(f"{folder}: has no state of rank {run.here.data_rank}'s generators of {' and '.join(missing)}")
    random_state = RandomState.of(generators) if generators else None
    parts = {name: stored.parts(name, tensor) for name, tensor in wanted.items()}
    for name in wanted:  # from here on the run changes
        stored.read(name, parts[name])
    for name, values in scalars["optimizer"].items():
        optimizer_state.setdefault(name, {}).update(values)
    _load_optimizer(run, optimizer_state, scalars["param_groups"])
    if random_state:  # a rank that the saving world didn't have keeps its own
        random_state.apply()
    run.precision.load(scalars["precision"])
    run.guard.load(scalars["guard"])
    run.step, run.final, run.best = scalars["step"], scalars["final"], scalars["best"]
    run.evaluated = scalars["evaluated"]


def _check_data(run: Run, folder: Path, scalars: dict[str, Any]) -> None:
    """RunError, where the data set isn't the one that the checkpoint was trained on, as far as both say what they are."""
    there, here = scalars.get("data", {}), _fingerprint(run)
    if not _is_fingerprint(there):
        raise RunError(f"{folder / 'state.json'}: its data can't be what fairexp wrote")
    if not there:
        return
    if not here:
        raise RunError(f"{folder}: was trained on data with a fingerprint, and dataset.train's {_kind(run)} has none")
    if other := [key for key in {**there, **here} if there.get(key) != here.get(key)]:
        said = ", ".join(
            f"{key} was {there.get(key, 'not there')}, is {here.get(key, 'not there')}" for key in other[:5]
        )
        raise RunError(f"dataset.train: not the data that {folder.name} was trained on: {said}")


def _fingerprint(run: Run) -> dict[str, str | int]:
    """What the training data set says of its content; nothing, where it says nothing."""
    found = getattr(run.fetch_training.dataset, "fingerprint", {})
    if not _is_fingerprint(found):
        raise RunError(f"dataset.train: the fingerprint of {_kind(run)} isn't a dict of texts and whole numbers")
    return found


def _kind(run: Run) -> str:
    return type(run.fetch_training.dataset).__qualname__


def _is_fingerprint(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(key, str) and (isinstance(fact, str) or manifest.is_int(fact)) for key, fact in value.items()
    )


# what state.json says: a _target_ or a text where the loop expects a number would surface there, as somebody else's error
STATE = {
    "step": manifest.is_int,
    "evaluated": manifest.is_int,
    "final": manifest.are_numbers,
    "best": manifest.are_numbers,
    "precision": manifest.are_numbers,
    "param_groups": lambda value: isinstance(value, list),
    "optimizer": lambda value: isinstance(value, dict),
    "guard": lambda value: isinstance(value, dict),
}


def _is_guards(state: dict[str, Any], windows_here: Iterable[str]) -> bool:
    match state:
        case {"windows": dict(windows), "num_skipped": skipped, "left_out": list(left_out)}:
            return (
                set(windows) == set(windows_here)
                and all(isinstance(each, list) and all(map(manifest.is_number, each)) for each in windows.values())
                and all(manifest.is_int(number) and number >= 0 for number in [skipped, *left_out])
            )
    return False


def _check_optimizer(run: Run, folder: Path, tensors: dict[str, dict[str, Any]], scalars: dict[str, Any]) -> None:
    """RunError, where the optimizer's groups and values aren't of this run's kind."""
    names = {id(parameter): name for name, parameter in run.parameters.items()}
    here, there = run.optimizer.param_groups, scalars["param_groups"]
    if [sorted(names[id(p)] for p in group["params"]) for group in here] != [sorted(g["params"]) for g in there]:
        raise RunError(f"{folder}: its optimizer has other parameters than this run's")
    for now, saved in zip(here, there, strict=True):
        for key in saved.keys() - {"params"}:
            if not _is_like(saved[key], now.get(key)):
                raise RunError(f"{folder}: its optimizer's {key!r} is of another kind than this run's")
    for name, values in scalars["optimizer"].items():
        for what, value in values.items():
            if name not in run.parameters or what in tensors.get(name, {}) or not _is_like(value, None):
                raise RunError(f"{folder}: its optimizer's {what!r} of {name!r} can't be what fairexp wrote")


def _is_like(saved: Any, now: Any) -> bool:
    """Whether a stored value may take the place of this one; of None any that a checkpoint holds may."""
    if isinstance(now, bool | str):
        return type(saved) is type(now)
    if isinstance(now, int | float | Tensor):
        return manifest.is_number(saved)
    if isinstance(now, tuple | list):
        return isinstance(saved, list) and len(saved) == len(now) and all(map(_is_like, saved, now))
    if isinstance(saved, list):
        return all(isinstance(each, SCALAR) for each in saved)
    return manifest.is_number(saved) or isinstance(saved, bool | str | None)


def _changed(there: dict[str, Any], here: dict[str, Any]) -> str:
    keys = ("world_size", "strategy", "device", "threads", "torch")
    return ", ".join(f"{key} was {there.get(key)}, is {here[key]}" for key in keys if there.get(key) != here[key])


# --- what the state is ---


def _module_state(run: Run) -> dict[str, Tensor]:
    state = run.module.state_dict()
    if other := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise RunError(f"model: its state dict holds {other[0]}, which is no tensor: make it a buffer")
    return state


def _tensors(run: Run) -> dict[str, Tensor]:
    """Everything that is a tensor, by name."""
    state = {f"model.{name}": tensor for name, tensor in _module_state(run).items()}
    for name, parameter in run.parameters.items():
        for what, value in run.optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                state[f"optim.{name}.{what}"] = value
    if run.ema:
        state |= {f"ema.{name}": tensor for name, tensor in run.ema.shadow.items()}
    if run.here.model_rank == 0:  # the others of a model's group have the same, as they must: they share activations
        state |= {f"rng.{run.here.data_rank}.{name}": tensor for name, tensor in random_state(run.here.device).items()}
    if other := [name for name, tensor in state.items() if tensor.dtype not in shards.NAMES]:
        raise RunError(f"{other[0]} is of {state[other[0]].dtype}, which a checkpoint doesn't hold")
    return state


def _scalars(run: Run) -> dict[str, Any]:
    """Everything else, as JSON values."""
    names = {id(parameter): name for name, parameter in run.parameters.items()}
    groups = [
        {
            "params": [names[id(parameter)] for parameter in group["params"]],
            **{
                key: _json(value, f"group's {key}")
                for key, value in group.items()
                if key not in ("params", "param_names")
            },
        }
        for group in run.optimizer.param_groups
    ]
    optimizer = {}
    for parameter, values in run.optimizer.state.items():
        name = names[id(parameter)]
        plain = {what: _json(v, f"{what} of {name}") for what, v in values.items() if not isinstance(v, Tensor)}
        if plain:
            optimizer[name] = plain
    return {
        "step": run.step,
        "precision": run.precision.state(),
        "guard": run.guard.state(),
        "param_groups": groups,
        "optimizer": optimizer,
        "final": run.final,
        "best": run.best,
        "evaluated": run.evaluated,
        **({"data": data} if (data := _fingerprint(run)) else {}),
    }


def _json(value: Any, what: str) -> Any:
    """The value, if JSON holds it exactly; a tensor of one number as that."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, tuple | list) and all(isinstance(each, SCALAR) for each in value):
        return list(value)
    if not isinstance(value, SCALAR):
        raise RunError(f"optimizer: its {what} is a {type(value).__name__}, which a checkpoint doesn't hold")
    return value


def _load_optimizer(run: Run, state: dict[str, dict[str, Any]], groups: list[dict[str, Any]]) -> None:
    full = run.optimizer.state_dict()
    index = {id(p): i for i, p in enumerate(p for group in run.optimizer.param_groups for p in group["params"])}
    full["state"] = {index[id(run.parameters[name])]: values for name, values in state.items()}
    for group, saved in zip(full["param_groups"], groups, strict=True):
        for key in saved.keys() - {"params"}:
            value = group.get(key)
            if isinstance(value, Tensor):
                value.fill_(saved[key])
            else:
                group[key] = tuple(saved[key]) if isinstance(value, tuple) else saved[key]
    run.optimizer.load_state_dict(full)
    for name, values in state.items():  # it casts to the parameter's type: float64 moments would lose bits
        loaded = run.optimizer.state[run.parameters[name]]
        for what, value in values.items():
            if isinstance(value, Tensor) and loaded[what].dtype != value.dtype:
                loaded[what] = value.to(loaded[what].device)


def _room_for(shape: torch.Size, dtype: torch.dtype, parameter: Tensor) -> Tensor:
    """Room for a stored optimizer tensor: sharded as its parameter where it has the parameter's shape (moments), else whole."""
    if shape == parameter.shape:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    return torch.empty(shape, dtype=dtype, device="cpu")
