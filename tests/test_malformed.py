"""What is wrong with a command line or a config is said in one line a problem: what, where, what is allowed, the nearest
match; before anything starts, with exit code 2. Beside each mistake stands the mended command, which passes."""

import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fairexp import cli
from fairexp.config.compose import compose
from fairexp.config.diagnose import place
from fairexp.config.groups import OUR_CONFIGS, groups
from fairexp.config.provenance import line_of
from fairexp.config.validate import problems
from fairexp.launch import submit

TABLE = Path(__file__).with_name("malformed.txt")
IDX = [f"{part}-{kind}" for part in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
FILES = {
    "net.py": "class Net:\n    def __init__(self, topk: list[int], depth: int): ...\n",
    "file": "",
    "theirs/dataset/part/one.yaml": "x: 1\n",
    **{f"idx/{name}": "" for name in IDX},
    "images/train/cat/1.png": "",
    "images/val/cat/1.png": "",
    "half/train/cat/1.png": "",
    "tokens/meta.json": "",
}


@dataclass
class Case:
    """A mistake, what is said about it, and the mended command; with the texts of theirs/experiment/mine.yaml."""

    line: int
    mistaken: str = ""
    mended: str = ""
    mistaken_file: str = ""
    mended_file: str = ""
    messages: str = ""


def cases() -> Iterator[Case]:
    """The table's blocks."""
    line = 1
    for block in TABLE.read_text(encoding="utf-8").split("\n\n"):
        case, file = Case(line), ""
        line += block.count("\n") + 2
        for text in block.strip("\n").split("\n"):
            match text[:2]:
                case "| ":
                    file += text[2:].replace("\\t", "\t") + "\n"
                case "$ ":
                    case.mistaken, case.mistaken_file, file = text[2:], file, ""
                case "> ":
                    case.mended, case.mended_file = text[2:], file
                case _:
                    case.messages += text + "\n"
        if case.mistaken:
            yield case


CASES = [pytest.param(case, id=f"{TABLE.name}:{case.line} {case.mistaken}") for case in cases()]
MENDED = {(case.mended, case.mended_file): pytest.param(case, id=f"{case.line} {case.mended}") for case in cases()}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a module and configs of the user's, and data that is whole, half and absent."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "empty").mkdir()
    (tmp_path / "theirs/experiment").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return tmp_path


def write(folder: Path, text: str) -> None:
    """The user's experiment."""
    if text:
        (folder / "theirs/experiment/mine.yaml").write_text(text)


def contents(folder: Path) -> set[Path]:
    """Every file and folder below."""
    return set(folder.rglob("*"))


def expected(messages: str, folder: Path) -> list[str]:
    """The table's messages with the places and options that <...> stands for, as regular expressions."""

    def stands_for(match: re.Match[str]) -> str:
        word, _, key = match[1].partition(" ")
        if word == "cwd":
            return str(folder)
        if key:
            return place(OUR_CONFIGS / word, line_of(OUR_CONFIGS / word, key) or 0)
        return ", ".join(groups()[word])

    return [re.sub(r"<([\w/. ]*)>", stands_for, line) for line in messages.splitlines()]


def said(text: str) -> list[str]:
    """The messages on stderr; a run's id changes with the defaults."""
    return [re.sub(r"-[0-9a-f]{8}\b", "-ID", line.removeprefix("fairexp: ")) for line in text.splitlines()]


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_named_and_nothing_is_started(
    case: Case, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*args: object) -> None:
        raise AssertionError("validation has passed, and a run was started")

    monkeypatch.setattr(submit, "submit", start)
    monkeypatch.setattr(submit, "run_inline", start)
    write(folder, case.mistaken_file)
    before = contents(folder)

    code = cli.main(shlex.split(case.mistaken))

    shown = capsys.readouterr()
    assert said(shown.err) == expected(case.messages, folder)
    assert (code, shown.out) == (2, "")
    assert contents(folder) == before


@pytest.mark.parametrize("case", MENDED.values())
def test_the_mended_command_passes(case: Case, folder: Path) -> None:
    write(folder, case.mended_file)
    verb, *words = shlex.split(case.mended)
    if verb != "train":
        assert cli.main([verb, *words]) == 0
        return
    switches = ("--fresh", "--json", "--dry-run")
    flags, overrides = cli.take_flags(words, ("--config-dir", "--config-name", "--trust"), switches)
    composed = compose(overrides, [Path(path) for path in flags.get("--config-dir", [])])
    assert problems(composed, 0, [*flags.get("--trust", []), "net"], folder) == []


def test_the_table_is_whole() -> None:
    assert len(CASES) >= 40
    for case in cases():
        assert case.mistaken
        assert case.mended
        assert case.messages
        assert bool(case.mistaken_file) == bool(case.mended_file) == ("experiment=mine" in case.mistaken)


@pytest.mark.alone
@pytest.mark.parametrize(
    "command",
    [
        "train model=vitt",
        "train optimizer.lr=nan +model.widht=3",
        "train model._target_=torch.nn.Linaer",
        "train launcher.num_processes=2",
        "train --frehs",
    ],
)
def test_a_mistake_is_named_within_three_seconds_and_without_torch(
    command: str, folder: Path, environment: dict[str, str]
) -> None:
    code = f"import sys; from fairexp import cli; code = cli.main({shlex.split(command)}); print(*sys.modules); sys.exit(code)"
    began = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert time.monotonic() - began < 3
    assert (ended.returncode, ended.stderr.count("fairexp: ")) == (2, len(ended.stderr.splitlines()))
    assert not {"torch", "wandb", "submitit", "numpy"} & set(ended.stdout.split())


def test_a_file_that_is_not_utf8_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "theirs/experiment/mine.yaml").write_bytes("# @package _global_\nname: Müller\n".encode("latin-1"))
    assert cli.main(["train", "--config-dir", "theirs", "experiment=mine"]) == 2
    assert said(capsys.readouterr().err) == ["theirs/experiment/mine.yaml:2: is not UTF-8"]


def test_hydra_full_error_shows_the_trace(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(Exception, match="no such option of model") as caught:
        cli.main(["train", "model=vitt"])
    assert "vitt" in str(caught.value.__cause__)
