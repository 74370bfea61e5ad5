"""Saving and restoring a run's whole state, in one format for every strategy and world size (torch.distributed.checkpoint).

A folder under checkpoints/ that has its final name is complete: it is written under another name and renamed at the end.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fairexp.config.rundir import RunDir, write_atomically
from fairexp.errors import RunError
from fairexp.runtime.dist import share_buffers

if TYPE_CHECKING:
    from fairexp.runtime.build import Run


def folders(run_dir: RunDir) -> list[Path]:
    """The complete checkpoints, oldest first."""
    return sorted(run_dir.checkpoints.glob("step_????????*"))


def save(run: Run) -> None:
    """Writes the state after `run.step`; all ranks take part. The oldest beyond checkpoint.keep_last go afterwards."""
    # imported at the first save: 2 s of CPU, which the start of a run shouldn't pay
    import torch.distributed.checkpoint as dcp

    final = run.dir.checkpoints / f"step_{run.step:08d}"
    if final.exists():
        return
    began = time.monotonic()
    draft = run.dir.checkpoints / f".{final.name}.partial"
    if run.here.first and draft.exists():
        shutil.rmtree(draft)  # what a killed save left
    _barrier()
    share_buffers(run.module)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch.distributed")
        dcp.save(_tensors(run), checkpoint_id=draft, no_dist=not dist.is_initialized())
    if run.here.first:
        write_atomically(draft / "state.json", json.dumps(_scalars(run), indent=1) + "\n")
        _sync_folder(draft)
        os.rename(draft, final)
        _sync_folder(final.parent)
        # the longest so far: `fairexp doctor` compares it with the time that a scheduler gives
        seconds = round(time.monotonic() - began, 3)
        run.dir.set_status(save_s=max(seconds, run.dir.status().get("save_s", 0.0)))
        for old in folders(run.dir)[: -run.checkpoint.keep_last]:
            trash = old.with_name(f".{old.name}.old")
            os.rename(old, trash)  # first the name: a half-deleted folder must not look complete
            shutil.rmtree(trash)
    _barrier()


def load(run: Run, folder: Path) -> None:
    """Gives the run the state of the checkpoint; all ranks take part. Any strategy and world size may have written it."""
    import torch.distributed.checkpoint as dcp

    scalars = json.loads((folder / "state.json").read_text())
    reader = _reader(folder)
    stored = reader.read_metadata().state_dict_metadata
    wanted: dict[str, Tensor] = {f"model.{name}": tensor for name, tensor in run.module.state_dict().items()}
    if run.ema:
        wanted |= {f"ema.{name}": tensor for name, tensor in run.ema.shadow.items()}
    if missing := sorted(wanted.keys() - stored.keys()):
        raise RunError(f"{folder} was written by another model: it has no {', '.join(missing[:3])}")
    optimizer_state: dict[str, dict[str, Tensor]] = {}
    for key, metadata in stored.items():
        kind, _, rest = key.partition(".")
        name, _, what = rest.rpartition(".")
        if kind == "optim":
            tensor = _empty_like_stored(metadata, run.parameters[name])
            optimizer_state.setdefault(name, {})[what] = wanted[key] = tensor
        elif kind == "rng" and name == str(run.here.rank):
            wanted[key] = torch.empty(metadata.size, dtype=metadata.properties.dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch.distributed")
        dcp.load(wanted, storage_reader=reader, no_dist=not dist.is_initialized())
    _load_optimizer(run, optimizer_state, scalars["param_groups"])
    _set_random_state({key.rpartition(".")[2]: tensor for key, tensor in wanted.items() if key.startswith("rng.")})
    run.precision.load(scalars["precision"])
    run.step, run.final, run.best = scalars["step"], scalars["final"], scalars["best"]


def _tensors(run: Run) -> dict[str, Tensor]:
    """Everything that is a tensor, by name. DTensors are saved shard by shard, what all ranks hold alike once."""
    state = {f"model.{name}": tensor for name, tensor in run.module.state_dict().items()}
    for name, parameter in run.parameters.items():
        for what, value in run.optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                state[f"optim.{name}.{what}"] = value
    if run.ema:
        state |= {f"ema.{name}": tensor for name, tensor in run.ema.shadow.items()}
    return state | {f"rng.{run.here.rank}.{name}": tensor for name, tensor in _random_state(run.here.device).items()}


def _scalars(run: Run) -> dict[str, Any]:
    names = {id(parameter): name for name, parameter in run.parameters.items()}
    groups = [
        {
            "params": [names[id(parameter)] for parameter in group["params"]],
            **{key: value for key, value in group.items() if isinstance(value, bool | int | float | str | None)},
        }
        for group in run.optimizer.param_groups
    ]
    return {
        "step": run.step,
        "world_size": run.here.world_size,
        "precision": run.precision.state(),
        "param_groups": groups,
        "final": run.final,
        "best": run.best,
        "torch": torch.__version__,
    }


def _load_optimizer(run: Run, state: dict[str, dict[str, Tensor]], groups: list[dict[str, Any]]) -> None:
    full = run.optimizer.state_dict()
    order = [name for group in groups for name in group["params"]]
    index = {id(p): i for i, p in enumerate(p for group in run.optimizer.param_groups for p in group["params"])}
    if sorted(order) != sorted(name for name, parameter in run.parameters.items() if id(parameter) in index):
        raise RunError("the checkpoint's optimizer has other parameters than this run's")
    full["state"] = {index[id(run.parameters[name])]: values for name, values in state.items()}
    for group, saved in zip(full["param_groups"], groups, strict=True):
        group.update({key: value for key, value in saved.items() if key != "params"})
    run.optimizer.load_state_dict(full)


def _empty_like_stored(metadata: Any, parameter: Tensor) -> Tensor:
    """Room for a stored optimizer tensor: sharded as its parameter where it has the parameter's shape (moments), else whole."""
    dtype = metadata.properties.dtype
    if metadata.size == parameter.shape:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    return torch.empty(metadata.size, dtype=dtype, device="cpu")


def _random_state(device: torch.device) -> dict[str, Tensor]:
    """This rank's generators as tensors: dropout goes on where it was."""
    version, keys, _ = random.getstate()
    array, position = np.random.get_state(legacy=True)[1:3]  # type: ignore[index]
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *keys], dtype=torch.int64),
        "numpy": torch.cat([torch.from_numpy(np.asarray(array).astype(np.int64)), torch.tensor([position])]),
    }
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def _set_random_state(state: dict[str, Tensor]) -> None:
    """Takes this rank's generators; a rank that the saving world didn't have keeps its own."""
    if "torch" not in state:
        return
    torch.set_rng_state(state["torch"])
    version, *keys = state["python"].tolist()
    random.setstate((version, tuple(keys), None))
    *array, position = state["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(array, dtype=np.uint32), position, 0, 0.0))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _reader(folder: Path) -> Any:
    """DCP's reader, less its pickle.load: a checkpoint from elsewhere can't run code."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import StorageMeta

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            with open(folder / ".metadata", "rb") as file:
                metadata = _MetadataUnpickler(file).load()
            if getattr(metadata, "storage_meta", None) is None:
                metadata.storage_meta = StorageMeta()
            metadata.storage_meta.load_id = self.load_id
            return metadata

    return Reader(folder)


class _MetadataUnpickler(pickle.Unpickler):
    ALLOWED: ClassVar = {
        "torch.distributed.checkpoint.metadata": {
            "Metadata",
            "TensorStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "MetadataIndex",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
        "torch": {
            "Size",
            "device",
            "float64",
            "float32",
            "float16",
            "bfloat16",
            "int64",
            "int32",
            "uint8",
            "bool",
            "strided",
        },
        "torch.serialization": {"_get_layout"},
        "collections": {"OrderedDict"},
        "pathlib": {"PosixPath"},
        "pathlib._local": {"PosixPath"},
    }

    def find_class(self, module: str, name: str) -> Any:
        if name not in self.ALLOWED.get(module, ()):
            raise RunError(
                f"the checkpoint's .metadata names {module}.{name}: not a checkpoint of fairexp; nothing was run"
            )
        return super().find_class(module, name)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _barrier() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()
