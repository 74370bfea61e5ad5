"""The verbs, run as a user runs them: what they print where, what Hydra answers, and which commands mean the same run."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fairexp import cli
from fairexp.config.compose import compose
from fairexp.config.groups import OUR_CONFIGS, groups
from fairexp.config.identity import run_id

Command = Callable[..., subprocess.CompletedProcess[str]]
HEAVY = {"torch", "numpy", "wandb", "submitit"}
SHORT = (
    "train",
    "model=mlp",
    "model.hidden=[8]",
    "trainer.max_steps=5",
    "trainer.max_epochs=null",
    "trainer.log_every=1",
    "trainer.device=cpu",
    "tracker=none",
    "launcher=inline",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with a config folder of the user's."""
    folder = tmp_path_factory.mktemp("folder")
    (folder / "theirs/experiment").mkdir(parents=True)
    (folder / "theirs/experiment/mine.yaml").write_text("# @package _global_\nmodel:\n  depth: 7\n")
    return folder


@pytest.fixture(scope="module")
def trained(fairexp: Command, folder: Path) -> subprocess.CompletedProcess[str]:
    """A finished run of five steps, as `train --json` left it in folder/runs."""
    return fairexp(*SHORT, "--json", cwd=folder)


@pytest.fixture
def run(trained: subprocess.CompletedProcess[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the finished run said of itself; the test works in its folder."""
    monkeypatch.chdir(folder)
    return json.loads(trained.stdout)


@pytest.fixture
def loaded(environment: dict[str, str], folder: Path) -> Callable[..., tuple[str, set[str]]]:
    """`loaded("--help")`: what a command that succeeds prints, and the top-level modules that it has loaded."""

    def call(*words: str) -> tuple[str, set[str]]:
        code = f"import sys; from fairexp.cli import main; main({list(words)}); print(*sys.modules, file=sys.stderr)"
        ended = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, env=environment
        )
        assert ended.returncode == 0, ended.stderr
        return ended.stdout, set(ended.stderr.split())

    return call


# --- help and Hydra's answers


def test_help_is_one_screen_with_the_verbs_and_the_options_of_each_group(fairexp: Command) -> None:
    shown = fairexp("--help").stdout
    lines = shown.splitlines()
    assert len(lines) <= 50
    assert max(map(len, lines)) < 100
    assert all(re.search(rf"^  fairexp {verb}\b", shown, re.MULTILINE) for verb in cli.VERBS)
    unwrapped = re.sub(r",\n {13}", ", ", shown)
    for group, options in groups().items():
        assert re.search(rf"^  {group} +{', '.join(options)}$", unwrapped, re.MULTILINE)
    assert fairexp().stdout == fairexp("-h").stdout == shown


def test_help_loads_neither_hydra_nor_torch(loaded: Callable[..., tuple[str, set[str]]]) -> None:
    _, modules = loaded("--help")
    assert not {"hydra", "omegaconf", "yaml", *HEAVY} & modules


@pytest.mark.parametrize(
    ("words", "there", "absent"),
    [
        ("--cfg job", "image_size: ${dataset.image_size}", "hydra:"),
        ("--cfg job --resolve", "model:\n  _target_: fairexp.models.vit.ViT\n  image_size: 8", "${"),
        ("-c job", "image_size: ${dataset.image_size}", "hydra:"),
        ("--cfg hydra", "hydra:\n  run:", "optimizer:\n"),
        ("--cfg all", "hydra:\n  run:", "no such"),
        ("--cfg job -p optimizer", "_target_: torch.optim.AdamW", "model:"),
        ("--cfg job --package optimizer optimizer=sgd", "_target_: torch.optim.SGD", "model:"),
        ("--info defaults", "| optimizer/adamw", "no such"),
        ("--info searchpath", f"file://{OUR_CONFIGS}", "no such"),
        ("--hydra-help", "--multirun", "no such"),
        ("--help", "experiment: lm_text, resnet_digits, vit_digits", "no such"),
        ("-h model=mlp", "_target_: fairexp.models.mlp.MLP", "ViT"),
        ("--config-dir theirs --cfg job experiment=mine", "depth: 7", "depth: 4"),
        ("--cfg job --config-dir=theirs +experiment=mine", "depth: 7", "depth: 4"),
        ("--cfg job +model.more=1 ~trainer model.depth=5", "more: 1", "trainer:"),
        ("--config-name train --cfg job", "seed: 0", "no such"),
        ("--cfg job --json", "seed: 0", "no such"),
    ],
)
def test_hydra_answers(
    words: str,
    there: str,
    absent: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [])
    assert cli.main(["train", *words.split()]) == 0
    shown = capsys.readouterr().out
    assert there in shown
    assert absent not in shown


@pytest.mark.parametrize("words", ["--cfg job --resolve", "--cfg all", "--info defaults", "--help", "--hydra-help"])
def test_hydra_answers_without_torch(words: str, loaded: Callable[..., tuple[str, set[str]]]) -> None:
    _, modules = loaded("train", *words.split())
    assert "hydra" in modules
    assert not HEAVY & modules


def test_what_hydra_refuses_is_the_users_mistake(fairexp: Command) -> None:
    ended = fairexp("train", "--cfg", "job", "model=vitt")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "Could not find 'model/vitt'" in ended.stderr


# --- config


def test_config_prints_each_value_with_its_place(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    assert cli.main(["config", "--config-dir", "theirs", "+experiment=mine", "optimizer.lr=0.5"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    values = [re.split(r"  +# ", line) for line in lines if not line.endswith(":")]
    places = {text.strip(): place for text, place in values}
    assert places["depth: 7"] == "theirs/experiment/mine.yaml:3"
    assert places["lr: 0.5"] == "command line"
    assert places["weight_decay: 0.05"].endswith("configs/optimizer/adamw.yaml:6")
    assert all(re.fullmatch(r"command line|.+\.yaml:\d+", place) for place in places.values())
    identity = run_id(compose(["+experiment=mine", "optimizer.lr=0.5"], [folder / "theirs"]).config)
    assert last == f"# id {identity}, run folder runs/mine-{identity}"


def test_config_as_json_is_the_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "--json", "model=mlp"]) == 0
    assert json.loads(capsys.readouterr().out) == compose(["model=mlp"]).config


# --- train


def test_train_as_json_prints_one_value_and_nothing_else_on_stdout(
    trained: subprocess.CompletedProcess[str], folder: Path
) -> None:
    assert trained.returncode == 0, trained.stderr
    result = json.loads(trained.stdout)
    assert list(result) == ["run_dir", "id", "state", "step", "metrics"]
    assert result["run_dir"] == f"{folder}/runs/mlp_digits-{result['id']}"
    assert (result["state"], result["step"]) == ("finished", 5)
    assert {"eval/loss", "eval/top1"} <= result["metrics"].keys()


def test_the_same_command_on_a_finished_run_shows_its_result(
    fairexp: Command, run: dict[str, Any], folder: Path
) -> None:
    before = contents(Path(run["run_dir"]))
    again = fairexp(*SHORT, "--json", cwd=folder)
    assert (again.returncode, json.loads(again.stdout)) == (0, run)
    assert "has finished; --fresh runs it anew" in again.stderr
    assert contents(Path(run["run_dir"])) == before
    assert [path.name for path in (folder / "runs").glob("*-*")] == [Path(run["run_dir"]).name]

    words = fairexp(*SHORT, "trainer.log_every=3", "tracker=wandb", "launcher=local", cwd=folder)
    assert (words.returncode, words.stdout) == (0, "")
    assert f"{Path(run['run_dir']).name}: finished, step 5 of 5" in words.stderr
    assert f"eval/top1 {run['metrics']['eval/top1']:.4f}" in words.stderr


def test_fresh_runs_anew_beside_it(fairexp: Command, run: dict[str, Any], folder: Path) -> None:
    copy = folder / "elsewhere"
    shutil.copytree(run["run_dir"], copy / Path(run["run_dir"]).name)
    fresh = fairexp(*SHORT, f"runs_dir={copy}", "--fresh", "--json", cwd=folder)
    result = json.loads(fresh.stdout)
    assert fresh.returncode == 0
    assert len(list(copy.glob("*-*"))) == 2
    assert result["run_dir"] != run["run_dir"]
    assert result["metrics"]["eval/loss"] == pytest.approx(run["metrics"]["eval/loss"], rel=1e-6)


def contents(folder: Path) -> dict[Path, bytes]:
    """Every file below, with what it holds."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- list, show, eval


def test_list_shows_the_runs(run: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list"]) == 0
    shown = capsys.readouterr().out
    assert re.search(rf"mlp_digits-{run['id']} +finished +5/5 +eval/loss [\d.]+ ", shown)

    assert cli.main(["list", "runs", "--json"]) == 0
    (listed,) = json.loads(capsys.readouterr().out)
    assert listed == listed | run

    assert cli.main(["list", "theirs"]) == 0
    assert capsys.readouterr().out == f"no runs in {folder}/theirs\n"


def test_show_finds_a_run_by_its_folder_name_id_and_their_beginnings(
    run: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"mlp_digits-{run['id']}"
    for what in (run["run_dir"], f"runs/{name}", f"runs/{name}/", name, run["id"], run["id"][:4], "mlp_digits", "mlp"):
        assert cli.main(["show", what, "--json"]) == 0
        shown = json.loads(capsys.readouterr().out)
        assert shown == shown | run


def test_show_says_how_a_run_stands_and_what_made_it(run: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", run["id"]]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"mlp_digits-{run['id']}: finished, step 5 of 5, attempt 1, {run['run_dir']}\n")
    assert f"fairexp {shlex.join([*SHORT, '--json'])}" in shown
    assert f"{run['run_dir']}/config.yaml" in shown
    assert f"{run['run_dir']}/checkpoints/step_00000005" in shown


@pytest.mark.parametrize("verb", ["show", "eval"])
def test_a_run_that_is_not_there_is_named_with_the_nearest(
    verb: str, run: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"mlp_digits-{run['id']}"
    assert cli.main([verb, "mlq_digits"]) == 2
    message = f"fairexp: mlq_digits: no such run in runs; nearest: {name}; there are: {name}\n"
    assert capsys.readouterr().err == message


def test_several_runs_that_begin_so_are_all_named(
    run: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("mlp-0000aaaa", "mlp-0000bbbb"):
        shutil.copytree(run["run_dir"], tmp_path / name)
    assert cli.main(["show", "mlp", f"--runs-dir={tmp_path}"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("fairexp: mlp: several runs: ")
    assert "mlp-0000aaaa" in message
    assert "mlp-0000bbbb" in message
    assert cli.main(["show", "0000b", "--runs-dir", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["id"] == "0000bbbb"


def test_eval_prints_the_numbers_of_the_final_evaluation(fairexp: Command, run: dict[str, Any], folder: Path) -> None:
    final = {name: value for name, value in run["metrics"].items() if name.startswith("eval/")}
    ended = fairexp("eval", run["id"], "--json", cwd=folder)
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout)
    assert (result["run_dir"], result["id"], result["step"]) == (run["run_dir"], run["id"], 5)
    assert result["metrics"] == pytest.approx(final, rel=1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--step 3", "--step 3: no such checkpoint; there are: 5"),
        ("dataset.eval", "dataset.eval: write key=value"),
        (
            "dataset.eval.splitt=train",
            "dataset.eval.splitt=train: the run's config has no dataset.eval.splitt; nearest: split",
        ),
    ],
)
def test_eval_names_what_is_not_there(
    words: str, message: str, run: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["eval", run["id"], *words.split()]) == 2
    assert capsys.readouterr().err.startswith(f"fairexp: {message}")


# --- which commands mean the same run


def identity(*overrides: str) -> str:
    """The id of the run that the overrides name."""
    return run_id(compose(["dataset=mnist_idx", "dataset.root=here", *overrides]).config)


@pytest.mark.parametrize(
    "override",
    [
        "name=other",
        "runs_dir=elsewhere",
        "launcher=inline",
        "launcher.num_processes=2",
        "tracker=none",
        "tracker.project=other",
        "checkpoint.every=7",
        "trainer.log_every=7",
        "trainer.num_workers=3",
        "trainer.device=cpu",
        "dataset.root=there",
        "guard.spike=stop",
        "guard.spike_window=7",
        "guard.max_events=7",
    ],
)
def test_the_run_is_the_same_whatever_its(override: str) -> None:
    assert identity(override) == identity()


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "model.depth=5",
        "optimizer.lr=0.5",
        "strategy=ddp",
        "trainer.max_steps=7",
        "trainer.global_batch_size=64",
        "trainer.precision=bf16",
        "dataset.train.mean=0.5",
        "guard.nonfinite=skip",
        "guard.spike=rollback",
    ],
)
def test_the_run_is_another_with(override: str) -> None:
    assert identity(override) != identity()


def test_an_experiment_is_the_same_run_with_and_without_a_plus() -> None:
    assert identity("experiment=vit_digits") == identity("+experiment=vit_digits")


@pytest.mark.parametrize(("limit", "code"), [(1000, 2), (2000, 1)])
def test_a_disk_that_takes_no_more_is_one_line_and_nothing_half_made(tmp_path: Path, limit: int, code: int) -> None:
    # a limit on the size of a file fails as a full disk does; at 1,000 bytes config.yaml doesn't fit, later environment.json
    program = f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); from fairexp.cli import main"
    words = ["train", "model=mlp", "launcher=inline", "tracker=none", "trainer.max_steps=2", "trainer.device=cpu"]
    command = [sys.executable, "-c", f"{program}; sys.exit(main({words!r}))"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert ended.returncode == code, ended.stderr
    assert "Traceback" not in ended.stderr
    assert "File too large" in ended.stderr
    if code == 2:
        assert [path.name for path in (tmp_path / "runs").iterdir()] == [".lock"]
