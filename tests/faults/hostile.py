"""Checkpoints that somebody has made to do harm, with digests that are right: each must end in a line, and run nothing."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import resource
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from fairexp.config import manifest
from fairexp.errors import RunError
from faults import lab
from faults.lab import STEP, Run

TENSORS = "rank_00000.safetensors"
WEIGHT = "model.layers.0.weight"  # 4 x 64
MARKER = "harm_was_done"
MOST_MEMORY = 1 << 30  # that a load may take on top of what the process has
MOST_S = 30


class Evil:
    """Makes the marker when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@contextmanager
def forged(folder: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The manifest's body and the state, to be changed; then the digests are made right again."""
    body = manifest.decode(manifest.text_of(folder), folder)
    state = manifest.read_json(folder / "state.json")
    yield body, state
    (folder / "state.json").write_text(json.dumps(state))
    sealed(folder, body)


def sealed(folder: Path, body: dict[str, Any]) -> None:
    """Writes the manifest with the sizes and digests that its files have."""
    files = body.get("files")
    for name in files if isinstance(files, dict) else ():
        if name in (TENSORS, "state.json") and isinstance(files[name], dict) and files[name].get("sha256"):
            data = (folder / name).read_bytes()
            files[name] = {"bytes": len(data), "sha256": manifest.digest(data)} | files[name].get("forged", {})
    (folder / manifest.FILE).write_text(manifest.encode(body))


Change = Callable[[dict[str, Any], dict[str, Any]], Any]
Attack = Callable[[Path], None]
ATTACKS: dict[str, Attack] = {}


def changed(name: str, change: Change) -> None:
    """An attack that changes the manifest's body and the state."""

    def attack(folder: Path) -> None:
        with forged(folder) as (body, state):
            change(body, state)

    ATTACKS[name] = attack


def raw(name: str) -> Callable[[Attack], Attack]:
    """An attack on the files."""

    def add(attack: Attack) -> Attack:
        ATTACKS[name] = attack
        return attack

    return add


def tensors(name: str, change: Callable[[dict[str, torch.Tensor]], Any], index: bool = True) -> None:
    """An attack that changes the stored tensors, and with `index` what the manifest says of them."""

    def attack(folder: Path) -> None:
        there = load_file(folder / TENSORS)
        change(there)
        save_file(there, folder / TENSORS)
        with forged(folder) as (body, _):
            if index:
                body["tensors"] = {
                    key: {
                        "dtype": str(t.dtype)
                        .replace("torch.float", "F")
                        .replace("torch.int", "I")
                        .replace("torch.uint", "U"),
                        "shape": list(t.shape),
                        "pieces": [[TENSORS, [0] * t.ndim, list(t.shape)]],
                    }
                    for key, t in there.items()
                }

    ATTACKS[name] = attack


# --- code ---


@raw("a pickle for the tensors")
def _(folder: Path) -> None:
    torch.save(Evil(folder.parents[1] / MARKER), folder / TENSORS)
    with forged(folder):
        pass


@raw("a bare pickle for the tensors")
def _(folder: Path) -> None:
    (folder / TENSORS).write_bytes(pickle.dumps(Evil(folder.parents[1] / MARKER)))
    with forged(folder):
        pass


@raw("a pickle for state.json")
def _(folder: Path) -> None:
    with forged(folder) as (body, _):
        pass
    (folder / "state.json").write_bytes(pickle.dumps(Evil(folder.parents[1] / MARKER)))
    sealed(folder, body)


@raw("a pickle for the manifest")
def _(folder: Path) -> None:
    (folder / manifest.FILE).write_bytes(pickle.dumps(Evil(folder.parents[1] / MARKER)))


@raw("torch.distributed.checkpoint's .metadata in place of the files")
def _(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    (folder / ".metadata").write_bytes(pickle.dumps(Evil(folder.parents[1] / MARKER)))
    (folder / "__0_0.distcp").write_bytes(pickle.dumps(Evil(folder.parents[1] / MARKER)))


CALL = {"_target_": "os.mkdir", "path": MARKER}
changed("a _target_ for each value of the state", lambda body, state: state.update(dict.fromkeys(state, CALL)))
changed("a _target_ for the best metrics", lambda body, state: state.update(best=CALL))
changed("a _target_ for the final metrics", lambda body, state: state.update(final=CALL))
changed("a _target_ in a parameter group", lambda body, state: state["param_groups"][0].update(lr=CALL))
changed("a _target_ for a tensor", lambda body, state: body["tensors"].update({WEIGHT: CALL}))


# --- other files ---

ENTRY = {"bytes": 1, "sha256": "0" * 64}
for word, path in {"absolute": "/etc/passwd", "above": "../step_00000001/state.json", "below": "x/state.json"}.items():
    changed(f"an {word} path as a file", lambda body, state, path=path: body["files"].update({path: ENTRY}))
    changed(
        f"an {word} path for a tensor",
        lambda body, state, path=path: body["tensors"][WEIGHT]["pieces"][0].__setitem__(0, path),
    )
changed("a tensor in a file without a digest", lambda b, s: b["files"].pop(TENSORS))
changed("a tensor in state.json", lambda b, s: b["tensors"][WEIGHT]["pieces"][0].__setitem__(0, "state.json"))
changed("a tensor in a file with no name", lambda b, s: b["tensors"][WEIGHT]["pieces"][0].__setitem__(0, None))
changed("no digest for state.json", lambda b, s: b["files"].pop("state.json"))


@raw("a pipe for a tensor")
def _(folder: Path) -> None:
    os.mkfifo(folder / "rank_00001.safetensors")
    with forged(folder) as (body, _):
        body["tensors"][WEIGHT]["pieces"][0][0] = "rank_00001.safetensors"


@raw("a link for the tensors")
def _(folder: Path) -> None:
    shutil.move(folder / TENSORS, folder.parents[1] / TENSORS)
    (folder / TENSORS).symlink_to(folder.parents[1] / TENSORS)


# --- the manifest ---

for step in (float("nan"), float("inf"), 10**30, -2, True, "2", None, [2], 2.5, "2\n\x1b[31mall is well"):
    changed(f"step {step!r} in the manifest", lambda body, state, step=step: body.update(step=step))
    changed(f"step {step!r} in the state", lambda body, state, step=step: state.update(step=step))
changed("another step in the state", lambda body, state: state.update(step=1))
for schema in (2, 99, None, "1", -1, [1]):
    changed(f"schema {schema!r}", lambda body, state, schema=schema: body.update(schema=schema))
for key in ("step", "schema", "files", "tensors"):
    changed(f"no {key} in the manifest", lambda body, state, key=key: body.pop(key))
for what in (None, [], "x", 3, {"x": 1}, [[[]]]):
    changed(f"files: {what!r}", lambda body, state, what=what: body.update(files=what))
    changed(f"a file's entry: {what!r}", lambda b, s, what=what: b["files"].update({TENSORS: what}))
    changed(f"tensors: {what!r}", lambda body, state, what=what: body.update(tensors=what))
    changed(f"a tensor's entry: {what!r}", lambda b, s, what=what: b["tensors"].update({WEIGHT: what}))
    changed(f"metrics: {what!r}", lambda body, state, what=what: body.update(metrics=what, step=3))
for size in (None, "9", True, -1, 1e300, float("nan"), 10**30, []):
    changed(f"a file of {size!r} bytes", lambda b, s, size=size: b["files"][TENSORS].update(forged={"bytes": size}))
    changed(f"a digest {size!r}", lambda b, s, size=size: b["files"][TENSORS].update(forged={"sha256": size}))


def deep(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    with forged_text(folder) as body:
        sealed(folder, body)


@contextmanager
def forged_text(folder: Path) -> Iterator[dict[str, Any]]:
    yield manifest.decode(manifest.text_of(folder), folder)


@raw("a state of 100,000 nested lists")
def _(folder: Path) -> None:
    deep(folder, "state.json", "[" * 100_000 + "]" * 100_000)


@raw("a manifest of 100,000 nested lists")
def _(folder: Path) -> None:
    text = '{"schema":1,"step":2,"files":' + "[" * 100_000 + "]" * 100_000 + "}"
    (folder / manifest.FILE).write_text(f'{{"sha256":"{manifest.digest(text.encode())}",\n"body":{text}}}\n')


@raw("a state that is a list")
def _(folder: Path) -> None:
    deep(folder, "state.json", "[1, 2, 3]")


@raw("a state with a number of 5,000 digits")
def _(folder: Path) -> None:
    deep(folder, "state.json", '{"step": ' + "9" * 5000 + "}")


@raw("a manifest that is a list")
def _(folder: Path) -> None:
    (folder / manifest.FILE).write_text(f'{{"sha256":"{manifest.digest(b"[1]")}",\n"body":[1]}}\n')


@raw("a manifest of 2 TiB")
def _(folder: Path) -> None:
    os.truncate(folder / manifest.FILE, 1 << 41)


@raw("a state of 1 TiB")
def _(folder: Path) -> None:
    with forged_text(folder) as body:
        body["files"]["state.json"] = {"bytes": 1 << 40, "sha256": "0" * 64}
        (folder / manifest.FILE).write_text(manifest.encode(body))
    os.truncate(folder / "state.json", 1 << 40)


# --- the index of the tensors ---


def entry(name: str, **values: Any) -> None:
    changed(name, lambda body, state: body["tensors"][WEIGHT].update(values))


def pieces(name: str, *boxes: Any) -> None:
    entry(name, pieces=[[TENSORS, *box] for box in boxes])


entry("another dtype", dtype="F16")
entry("no dtype", dtype="F31")
entry("a dtype that is a list", dtype=["F32"])
entry("another shape", shape=[64, 4])
entry("a shape of words", shape=["4", "64"])
entry("a negative shape", shape=[-4, -64])
entry("a shape of a trillion lists", shape=[10**9, 10**9, 10**9])
entry("a shape beyond 64 bits", shape=[1 << 70])
entry("a shape of a million dimensions", shape=[1] * 1_000_000)
entry("pieces that are no list", pieces=7)
entry("a piece that is no list", pieces=[7])
entry("a piece of two parts", pieces=[[TENSORS, [0, 0]]])
pieces("no pieces")
pieces("half of the pieces", ([0, 0], [2, 64]))
pieces("a piece twice, another never", ([0, 0], [2, 64]), ([0, 0], [2, 64]))
pieces("pieces that overlap", ([0, 0], [4, 64]), ([0, 0], [4, 64]))
pieces("a piece before the beginning", ([-2, 0], [6, 64]))
pieces("a piece beyond the end", ([0, 0], [5, 64]))
pieces("a piece far away", ([10**30, 0], [4, 64]), ([0, 0], [4, 64]))
pieces("a piece of another number of dimensions", ([0], [256]))
pieces("a piece at a fraction", ([0.5, 0], [4, 64]))
pieces("a piece at NaN", ([float("nan"), 0], [4, 64]))
pieces("a piece at true", ([False, False], [4, 64]))
pieces("a piece of words", ("00", "xy"))
pieces("an empty piece", ([0, 0], [0, 64]), ([0, 0], [4, 64]))


def bigger(key: str) -> None:
    """A tensor that fairexp makes room for by what the manifest says."""
    changed(
        f"{key} of 400 GB",
        lambda b, s: b["tensors"][key].update(shape=[10**11], pieces=[[TENSORS, [0], [10**11]]]),
    )
    changed(
        f"{key} of 8 EiB",
        lambda b, s: b["tensors"][key].update(shape=[1 << 31, 1 << 31], pieces=[[TENSORS, [0, 0], [1 << 31, 1 << 31]]]),
    )


bigger("optim.layers.0.weight.exp_avg")
bigger("optim.layers.0.weight.step")
bigger("rng.0.torch")
bigger("rng.0.numpy")


# --- the tensors ---


def header(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = (folder / TENSORS).read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    head = json.loads(data[8 : 8 + size])
    text = change(head) or json.dumps(head)
    (folder / TENSORS).write_bytes(struct.pack("<Q", len(text)) + text.encode() + data[8 + size :])
    with forged(folder):
        pass


@raw("two tensors at one place")
def _(folder: Path) -> None:
    header(folder, lambda head: head[WEIGHT].update(data_offsets=head["optim.layers.0.weight.exp_avg"]["data_offsets"]))


@raw("a tensor beyond the end of its file")
def _(folder: Path) -> None:
    header(folder, lambda head: head[WEIGHT].update(data_offsets=[10**12, 10**12 + 1024]))


@raw("a tensor at a negative place")
def _(folder: Path) -> None:
    header(folder, lambda head: head[WEIGHT].update(data_offsets=[-1024, 0]))


@raw("another shape in the file than in the manifest")
def _(folder: Path) -> None:
    header(folder, lambda head: head[WEIGHT].update(shape=[64, 4]))


@raw("another dtype in the file than in the manifest")
def _(folder: Path) -> None:
    header(folder, lambda head: head[WEIGHT].update(dtype="I32"))


@raw("a name twice in the file's header")
def _(folder: Path) -> None:
    other = '{"dtype":"F32","shape":[4,64],"data_offsets":[0,1024]}'
    header(folder, lambda head: json.dumps(head)[:-1] + f', "{WEIGHT}": {other}, "{WEIGHT}": {other}}}')


@raw("a header that is no JSON")
def _(folder: Path) -> None:
    header(folder, lambda head: "x" * 100)


@raw("a header of 100,000 nested lists")
def _(folder: Path) -> None:
    header(folder, lambda head: "[" * 100_000 + "]" * 100_000)


for size in (1 << 40, (1 << 64) - 1, 0):

    @raw(f"a header of {size} bytes")
    def _(folder: Path, size: int = size) -> None:
        data = (folder / TENSORS).read_bytes()
        (folder / TENSORS).write_bytes(struct.pack("<Q", size) + data[8:])
        with forged(folder):
            pass


NUMPY = "rng.0.numpy"
tensors("the model of another run", lambda t: t.update({"model.other.weight": t.pop(WEIGHT)}))
tensors("a weight of another shape", lambda t: t.update({WEIGHT: torch.zeros(5, 64)}))
tensors("a weight of another type", lambda t: t.update({WEIGHT: t[WEIGHT].double()}))
tensors("optimizer state of a parameter that isn't there", lambda t: t.update({"optim.other.exp_avg": torch.zeros(4)}))
tensors("optimizer state of no parameter", lambda t: t.update({"optim": torch.zeros(4)}))
tensors("no average of the weights", lambda t: t.pop("ema.layers.0.weight"))
tensors("a weight that only the manifest has", lambda t: t.pop(WEIGHT), index=False)
tensors("a generator of a few bytes", lambda t: t.update({"rng.0.torch": t["rng.0.torch"][:9].clone()}))
tensors("a generator of another type", lambda t: t.update({"rng.0.torch": t["rng.0.torch"].to(torch.int64)}))
tensors("a generator of ones", lambda t: t["rng.0.torch"].fill_(255))
tensors("no generator of Python", lambda t: t.pop("rng.0.python"))
tensors("an empty generator of Python", lambda t: t.update({"rng.0.python": torch.zeros(0, dtype=torch.int64)}))
tensors("a generator of Python of another version", lambda t: t["rng.0.python"].__setitem__(0, 7))
tensors("a generator of Python with large numbers", lambda t: t["rng.0.python"].fill_(1 << 60))
tensors("a generator of Python beyond its table", lambda t: t["rng.0.python"].__setitem__(-3, 1 << 30))
tensors("a generator of Python in many dimensions", lambda t: t.update({"rng.0.python": torch.zeros(9, 9, 9)}))
tensors("a generator of numpy beyond its table", lambda t: t[NUMPY].__setitem__(624, 1 << 30))
tensors("a generator of numpy before its table", lambda t: t[NUMPY].__setitem__(624, -(1 << 30)))
tensors("a generator of numpy with negative numbers", lambda t: t[NUMPY].fill_(-1))
tensors("a generator of numpy of a few numbers", lambda t: t.update({NUMPY: t[NUMPY][:5].clone()}))
tensors("a generator of numpy that is one number", lambda t: t.update({NUMPY: torch.tensor(1)}))


# --- the state ---

for key in ("step", "precision", "guard", "param_groups", "optimizer", "final", "best", "evaluated"):
    changed(f"no {key} in the state", lambda body, state, key=key: state.pop(key))
    for what in ("x", 1e400, [1], {"x": ["y"]}, {"layers.0.weight": 3}):
        if key not in ("precision", "final", "best") or what != {"layers.0.weight": 3}:  # a name with a number may be
            changed(f"{key}: {what!r}", lambda body, state, key=key, what=what: state.update({key: what}))
for key, what in (("windows", {"loss": ["x"], "gradient norm": []}), ("windows", {"other": []}), ("windows", [])):
    changed(f"the guard's {key}: {what!r}", lambda b, state, key=key, what=what: state["guard"].update({key: what}))
for what in ("x", [1.5], [-1], ["x"], None, [[1]]):
    changed(f"the guard's num_skipped: {what!r}", lambda b, s, what=what: s["guard"].update(num_skipped=what))
    changed(f"the guard's left_out: {what!r}", lambda b, s, what=what: s["guard"].update(left_out=what))
for what in ("x", 1, None, [1], {"x": ["y"]}, {"x": 1.5}, {"tokens": 3}):
    changed(f"data: {what!r}", lambda body, state, what=what: state.update(data=what))
changed("evaluated: null", lambda body, state: state.update(evaluated=None))
changed("no parameter groups", lambda body, state: state.update(param_groups=[]))
changed("a parameter group too many", lambda b, state: state["param_groups"].append({"params": []}))
changed("a parameter group without parameters", lambda b, state: state["param_groups"][0].pop("params"))
changed("a parameter twice", lambda b, state: state["param_groups"][0]["params"].append("layers.0.weight"))
changed("parameters of other types", lambda b, state: state["param_groups"][0].update(params=[1, None, {}]))
changed("the parameters in other groups", lambda b, state: state["param_groups"].reverse())
for what in ("fast", None, True, [1.0], {"a": 1}, 10**400):
    changed(f"lr: {what!r}"[:40], lambda b, state, what=what: state["param_groups"][0].update(lr=what))
    changed(f"betas: {what!r}"[:40], lambda b, state, what=what: state["param_groups"][0].update(betas=what))
changed("betas of words", lambda b, state: state["param_groups"][0].update(betas=["a", "b"]))
changed("the state of a parameter that isn't there", lambda b, s: s.update(optimizer={"other": {"step": 1}}))
changed("a number for a moment", lambda b, s: s.update(optimizer={"layers.0.weight": {"exp_avg": 3}}))
changed("a number for the count of steps", lambda b, s: s.update(optimizer={"layers.0.weight": {"step": "x"}}))
changed("a list for the optimizer's numbers", lambda b, s: s.update(optimizer={"layers.0.weight": {"k": [[1]]}}))


def attacks(folder: Path, names: list[str] | None = None) -> list[tuple[str, str, str]]:
    """Loads each; (name, what is wrong or "", what was said)."""
    path = lab.new(folder / "tiny-hostile")

    def work() -> list[tuple[str, str, str]]:
        run = lab.begun(path, keep_last=1)
        lab.build.track(run)
        for _ in range(2):
            lab.train(run)
            lab.saved(run)
        template = shutil.copytree(path, folder / "template")
        signal.signal(signal.SIGALRM, _hangs)
        now = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
        resource.setrlimit(resource.RLIMIT_AS, (now + MOST_MEMORY, now + MOST_MEMORY))
        with forged(path / STEP.format(2)):
            pass
        assert look(run)[0] == "it was loaded", (
            "what was changed in nothing must be: else all that follows shows nothing"
        )
        found = []
        for name in names or ATTACKS:
            shutil.rmtree(path)
            shutil.copytree(template, path)
            ATTACKS[name](path / STEP.format(2))
            found.append((name, *look(run)))
        return found

    return lab.value(lab.apart(work, folder, seconds=1800))


def look(run: Run) -> tuple[str, str]:
    """What is wrong with how the run takes its checkpoint or "", and what it says."""
    wrong, said = "it was loaded", io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            lab.again(run)
            signal.alarm(MOST_S)
            lab.back(run)
    except RunError as error:
        said.write(f"{error}\n")
        wrong = ""
    except (Exception, KeyboardInterrupt) as error:
        wrong = f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
    lines = said.getvalue().splitlines()
    if (run.dir.path / MARKER).exists():
        wrong = "code ran"
    elif len(lines) > 2 or any(len(line) > 500 or not line.isprintable() for line in lines):
        wrong = wrong or "more than a line"
    return wrong, "; ".join(lines)[:300]


def _hangs(number: int, frame: object) -> None:
    raise KeyboardInterrupt(f"more than {MOST_S} s")  # what nothing takes for an error of the checkpoint
