"""Checkpoints that a disk or a person has damaged: what is loaded, and what is said?"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fairexp.config.manifest import Damaged
from fairexp.runtime import checkpoint
from faults import lab
from faults.lab import STEP, Run

FILES = ("rank_00000.safetensors", "state.json", "manifest.json")


# --- one damage each: takes the newest checkpoint's folder and random numbers, returns what is to be named ---


def a_file(folder: Path, dice: random.Random) -> Path:
    return folder / dice.choice(FILES)


def bit(folder: Path, dice: random.Random) -> Path:
    file = a_file(folder, dice)
    data = bytearray(file.read_bytes())
    data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    file.write_bytes(data)
    return file


def truncated(folder: Path, dice: random.Random) -> Path:
    file = a_file(folder, dice)
    os.truncate(file, dice.randrange(file.stat().st_size))
    return file


def longer(folder: Path, dice: random.Random) -> Path:
    file = a_file(folder, dice)
    with open(file, "ab") as opened:
        opened.write(dice.randbytes(dice.randrange(1, 100)))
    return file


def block_of_zeros(folder: Path, dice: random.Random) -> Path:
    file = a_file(folder, dice)
    data = file.read_bytes()
    begin = dice.randrange(len(data) - 64)
    file.write_bytes(data[:begin] + bytes(64) + data[begin + 64 :])
    return file


def empty(folder: Path, dice: random.Random) -> Path:
    file = a_file(folder, dice)
    os.truncate(file, 0)
    return file


def deleted(folder: Path, dice: random.Random) -> Path:
    file = a_file(folder, dice)
    file.unlink()
    return file


def of_another_step(folder: Path, dice: random.Random) -> Path:
    """A whole file, of the checkpoint before."""
    file = a_file(folder, dice)
    shutil.copyfile(folder.with_name("step_00000002") / file.name, file)
    return folder if file.name == "manifest.json" else file


def swapped(folder: Path, dice: random.Random) -> Path:
    one, other = dice.sample([folder / name for name in FILES], 2)
    aside = folder / "aside"
    one.rename(aside)
    other.rename(one)
    aside.rename(other)
    return folder  # either file may be named


def renamed_step(folder: Path, dice: random.Random) -> Path:
    """The checkpoint before, whole, under a newer step's name."""
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("step_00000002"), folder)
    return folder / "manifest.json"


def link(folder: Path, dice: random.Random) -> Path:
    """To a file that holds just what it should."""
    file = a_file(folder, dice)
    there = folder.parents[1] / f"elsewhere_{file.name}"
    shutil.move(file, there)
    file.symlink_to(there)
    return file


def dangling(folder: Path, dice: random.Random) -> Path:
    file = a_file(folder, dice)
    file.unlink()
    file.symlink_to("nowhere")
    return file


def pipe(folder: Path, dice: random.Random) -> Path:
    file = a_file(folder, dice)
    file.unlink()
    os.mkfifo(file)
    return file


def a_folder(folder: Path, dice: random.Random) -> Path:
    file = a_file(folder, dice)
    file.unlink()
    file.mkdir()
    return file


def file_for_folder(folder: Path, dice: random.Random) -> Path:
    shutil.rmtree(folder)
    folder.write_text("a checkpoint")
    return folder


def empty_folder(folder: Path, dice: random.Random) -> Path:
    shutil.rmtree(folder)
    folder.mkdir()
    return folder / "manifest.json"


def link_for_folder(folder: Path, dice: random.Random) -> Path:
    shutil.rmtree(folder)
    folder.symlink_to("nowhere")
    return folder


def link_to_itself(folder: Path, dice: random.Random) -> Path:
    shutil.rmtree(folder)
    folder.symlink_to(folder.name)
    return folder


Damage = Callable[[Path, random.Random], Path]
DAMAGES: tuple[Damage, ...] = (
    bit,
    truncated,
    longer,
    block_of_zeros,
    empty,
    deleted,
    of_another_step,
    swapped,
    renamed_step,
    link,
    dangling,
    pipe,
    a_folder,
    file_for_folder,
    empty_folder,
    link_for_folder,
    link_to_itself,
)


def kinds(count: int, dice: random.Random) -> list[Damage]:
    """Each kind once, then at random, bits above all."""
    return ([*DAMAGES] + [bit if dice.random() < 0.5 else dice.choice(DAMAGES) for _ in range(count)])[:count]


def random_damage(folder: Path, count: int, seed: int) -> list[tuple[str, str]]:
    """Damages the newest of three checkpoints, again and again. (which damage of what, what is wrong or "")."""
    path = lab.new(folder / "tiny-damaged")
    dice = random.Random(seed)

    def work() -> list[tuple[str, str]]:
        run = lab.begun(path, keep_last=3)
        lab.build.track(run)
        states = {}
        for _ in range(3):
            lab.train(run)
            lab.saved(run)
            states[run.step] = lab.state(run)
        template = shutil.copytree(path, folder / "template")
        found = []
        for damage in kinds(count, dice):
            shutil.rmtree(path)
            shutil.copytree(template, path)
            newest = path / STEP.format(3)
            what = damage(newest, dice)
            found.append((f"{damage.__name__} {what.name}", look(run, newest, what, states, folder)))
        return found

    return lab.value(lab.apart(work, folder, seconds=1800))


def look(run: Run, newest: Path, what: Path, states: dict[int, dict[str, str]], folder: Path) -> str:
    """What is wrong with how a damaged checkpoint is taken; "" if nothing is."""

    def refuse() -> None:
        lab.train(run)
        before = lab.state(run)
        with pytest.raises(Damaged) as damage:
            checkpoint.load(run, newest)
        assert lab.state(run) == before, "parts of it were loaded"
        assert str(what) in str(damage.value), f"not named: {damage.value}"

    def fall_back() -> str:
        lab.again(run)
        if lab.back(run) != states[2]:
            return "another state than that of step 2"
        lab.train(run)
        lab.saved(run)  # a new step 3; the damaged one lies aside
        return "" if lab.state(run) == states[3] else "step 3 came out differently"

    ended = lab.apart(refuse, folder, seconds=20)
    if ended.code:
        return ended.lines[-1]
    ended = lab.apart(fall_back, folder, seconds=20)
    if ended.code or ended.value:
        return ended.value or ended.lines[-1]
    if len(ended.lines) != 1 or not (str(what) in ended.said and "not used, now damaged_step_00000003" in ended.said):
        return f"it said: {ended.said}"
    there = lab.steps(run.dir.path)
    return "" if there == [1, 2, 3] else f"{there} are there"
