"""Who may import whom: the command line starts without torch, a worker without submitit, and the shelf stands alone."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import fairexp

PACKAGE = Path(fairexp.__file__).parent
BEFORE_THE_JOB = ("cli", "errors", "config", "launch", "runs", "__main__", "__init__")
SHELF = ("models", "datasets", "tasks", "optim")
# the job and what runs in its place: they load the runtime when they are called
STARTS_THE_RUNTIME = (
    "launch/job.py",
    "launch/pool.py",
    "launch/submit.py",
    "launch/evaluate.py",
    "launch/export.py",
    "launch/generate.py",
    "launch/sync.py",
)


@dataclass(frozen=True)
class Import:
    """One imported name, and where the import stands."""

    file: str
    line: int
    name: str
    inside: bool  # a function: executed when that is called

    def of(self, *packages: str) -> bool:
        """Whether it is one of the packages or lies in one."""
        return any(f"{self.name}.".startswith(f"{package}.") for package in packages)


def imports(folder: Path = PACKAGE) -> Iterator[Import]:
    """Every import of the package's modules, also those for type checkers alone."""
    for path in sorted(folder.rglob("*.py")):
        file = path.relative_to(folder).as_posix()
        for node, inside in nodes(ast.parse(path.read_text(encoding="utf-8")), False):
            match node:
                case ast.Import():
                    names = [alias.name for alias in node.names]
                case ast.ImportFrom():
                    package = ["fairexp", *path.relative_to(folder).parts[: -node.level]] if node.level else []
                    module = ".".join([*package, *([node.module] if node.module else [])])
                    names = [f"{module}.{alias.name}" for alias in node.names]
                case ast.Call(func=ast.Name(id="__import__") | ast.Attribute(attr="import_module")):
                    names = ["<computed>"]
                case _:
                    continue
            yield from (Import(file, node.lineno, name, inside) for name in names)


def nodes(node: ast.AST, inside: bool) -> Iterator[tuple[ast.AST, bool]]:
    """Every node below, and whether it stands in a function."""
    for child in ast.iter_child_nodes(node):
        yield child, inside
        yield from nodes(child, inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))


def room(found: Import) -> str:
    """The folder of fairexp that the import stands in, or the module at its top."""
    return found.file.partition("/")[0].removesuffix(".py")


def test_the_walk_sees_the_package() -> None:
    found = list(imports())
    assert len({each.file for each in found}) > 40
    assert any(each.of("torch") and each.file == "runtime/worker.py" for each in found)
    assert any(each.of("fairexp.runtime.worker") and each.file == "launch/job.py" and each.inside for each in found)


def test_nothing_before_the_job_imports_torch_or_what_holds_it() -> None:
    holds_torch = ("torch", "torchvision", "wandb", "tensorboard", "numpy", *(f"fairexp.{name}" for name in SHELF))
    assert [each for each in imports() if room(each) in BEFORE_THE_JOB and each.of(*holds_torch)] == []


def test_prep_imports_numpy_and_no_torch() -> None:
    others = ("torch", "hydra", "omegaconf", "submitit", *(f"fairexp.{name}" for name in ("runtime", "launch", *SHELF)))
    found = [each for each in imports() if room(each) == "prep"]
    assert [each for each in found if each.of(*others)] == []
    assert any(each.of("numpy") for each in found)


def test_only_the_job_imports_the_runtime_and_only_when_it_is_called() -> None:
    found = [each for each in imports() if room(each) in BEFORE_THE_JOB and each.of("fairexp.runtime")]
    assert [each for each in found if not each.inside or each.file not in STARTS_THE_RUNTIME] == []


def test_only_launch_imports_submitit_and_only_when_it_submits() -> None:
    assert [each for each in imports() if each.of("submitit") and not (room(each) == "launch" and each.inside)] == []


def test_the_runtime_knows_nothing_of_the_command_line_and_the_launcher() -> None:
    above = ("fairexp.cli", "fairexp.launch", "fairexp.runs", "submitit", "hydra.compose", "hydra.main")
    assert [each for each in imports() if room(each) == "runtime" and each.of(*above)] == []


def test_config_and_runs_know_nothing_of_the_launcher() -> None:
    assert [
        each for each in imports() if room(each) in ("config", "runs") and each.of("fairexp.launch", "fairexp.cli")
    ] == []


def test_the_shelf_imports_nothing_from_fairexp_but_data_sets_share_their_readers() -> None:
    found = [each for each in imports() if room(each) in SHELF and each.of("fairexp")]
    assert [each for each in found if not (room(each) == "datasets" and each.of("fairexp.datasets"))] == []


def test_no_import_before_the_job_is_computed() -> None:
    found = [each for each in imports() if room(each) in BEFORE_THE_JOB and each.name == "<computed>"]
    assert [each for each in found if each.file != "launch/pool.py"] == []  # its daemon loads what runs are made of


def test_the_command_line_has_not_loaded_torch_when_it_hands_the_run_over(
    environment: dict[str, str], tmp_path: Path
) -> None:
    code = """
import os, sys
import submitit.local.local
from fairexp import cli

def start(*args, **kwargs):
    print(*sys.modules, flush=True)
    os._exit(0)

submitit.local.local.start_controller = start
cli.main(["train", "launcher=local", "tracker=wandb"])
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    modules = set(ended.stdout.split())
    assert {"fairexp.launch.job", "hydra", "submitit"} <= modules
    assert not {"torch", "wandb", "numpy", "tensorboard"} & modules
    assert len(list(tmp_path.glob("runs/vit_digits-*/submit/*.pkl"))) == 1
