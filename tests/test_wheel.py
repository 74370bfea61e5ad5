"""The wheel works in an environment of its own, away from the checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment that holds our wheel; the dependencies are this environment's own files."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(CHECKOUT, source, ignore=shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "-q"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder / "dist"), str(source)]
    subprocess.run(build, check=True, timeout=120)
    (wheel,) = (folder / "dist").glob("fairexp-*.whl")
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    python = folder / "venv" / "bin" / "python"
    subprocess.run([*pip, "--python", str(python), "install", "--no-deps", str(wheel)], check=True, timeout=120)
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.parent


def run(installed: Path, *words: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "WANDB"))}
    return subprocess.run(
        [installed / words[0], *words[1:]], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )


def test_every_shipped_yaml_is_in_the_wheel(installed: Path) -> None:
    (site,) = installed.parent.glob("lib/python*/site-packages")
    shipped = {
        path.relative_to(site / "fairexp" / "configs") for path in (site / "fairexp" / "configs").rglob("*.yaml")
    }
    assert shipped == {path.relative_to(CHECKOUT / "configs") for path in (CHECKOUT / "configs").rglob("*.yaml")}


def test_every_module_is_in_the_wheel(installed: Path) -> None:
    (site,) = installed.parent.glob("lib/python*/site-packages")
    shipped = {path.relative_to(site / "fairexp") for path in (site / "fairexp").rglob("*.py")}
    assert shipped == {path.relative_to(CHECKOUT / "fairexp") for path in (CHECKOUT / "fairexp").rglob("*.py")}


def test_the_installed_program_composes_from_another_folder(installed: Path, tmp_path: Path) -> None:
    done = run(installed, "fairexp", "train", "--cfg", "job", "model=resnet18", "strategy=fsdp", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "_target_: fairexp.models.resnet.ResNet" in done.stdout
    module = run(installed, "python", "-m", "fairexp", "config", "--json", cwd=tmp_path)
    assert module.returncode == 0, module.stderr


def test_the_installed_program_trains_on_its_own_data(installed: Path, tmp_path: Path) -> None:
    words = ["train", "model=mlp", "trainer.max_steps=3", "trainer.device=cpu", "tracker=none", "launcher=inline"]
    done = run(installed, "fairexp", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (
        str(installed.parent)
        in run(installed, "python", "-c", "import fairexp; print(fairexp.__file__)", cwd=tmp_path).stdout
    )
    (run_dir,) = (tmp_path / "runs").glob("*-*")
    assert (run_dir / "summary.json").is_file()
