"""The command line: the verb comes off argv, the rest is Hydra's grammar. What is heavy is imported where it's used."""

from __future__ import annotations

import errno
import gc
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from fairexp.errors import FAILED, WRONG, UserError

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # the machine's fault, told in a line

HELP = """\
fairexp: config-driven experiments for PyTorch

  fairexp train [overrides]     run an experiment; the same command resumes it or shows its result
  fairexp eval RUN [key=value]  evaluate a run's last checkpoint
  fairexp config [overrides]    print the resolved config, and where each value comes from
  fairexp list [RUNS_DIR]       the runs: state, step, metrics, age
  fairexp show RUN              one run: its state, result, and error if it failed

  overrides are Hydra's: group=option, key=value, +key=value, ~key
  --config-dir DIR   a folder with more config groups (a paper's own configs/)
  --trust PACKAGE    let configs name classes of an installed package
  --fresh            train: a new run beside the one that these settings have
  --runs-dir DIR     show, eval: where the runs are; runs
  --step N           eval: the checkpoint of that step; the last one
  --json             one JSON value on stdout, for programs
  --cfg job|hydra|all, --resolve, --info, --hydra-help: answered by Hydra (train)

groups (fairexp train GROUP=OPTION):
{groups}

examples:
  fairexp train experiment=vit_digits launcher.num_processes=2
  fairexp train model=resnet18 model.stem=small optimizer=sgd trainer.max_steps=500
  fairexp train experiment=vit_digits strategy=fsdp trainer.precision=bf16 launcher.num_processes=2
"""
# Flags that Hydra answers by itself after `train`; -m would need the sweeper.
HYDRA_FLAGS = ("--cfg", "-c", "--info", "-i", "--help", "-h", "--hydra-help", "--version", "--shell-completion", "-sc")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    gc.disable()  # imports and composing make no garbage worth a sixth of their time; the training loop enables it
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # `python -m fairexp` has it, the console script hasn't
    verb, *rest = arguments or ["--help"]
    try:
        if verb in ("--help", "-h", "help"):
            print(help_text(), end="")
            return 0
        if verb == "--version":
            from fairexp import __version__

            print(__version__)
            return 0
        if verb not in VERBS:
            from fairexp.config.nearest import nearest

            raise UserError(f"{verb}: no such verb{nearest(verb, VERBS)}")
        return VERBS[verb](rest)
    except UserError as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        for problem in error.problems:
            print(f"fairexp: {problem}", file=sys.stderr)
        return WRONG
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `fairexp list | head`
        return 0
    except OSError as error:
        if error.errno not in DISK or os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        print(f"fairexp: {error.filename}: {error.strerror}; the same command goes on when that is mended", file=sys.stderr)
        return FAILED


def help_text() -> str:
    """One screen: the verbs and the options of each group."""
    from fairexp.config.groups import groups

    lines = [f"  {group:<11}{', '.join(options)}" for group, options in groups().items()]
    return HELP.format(groups="\n".join(lines))


def take_flags(
    arguments: Sequence[str], values: Sequence[str], switches: Sequence[str]
) -> tuple[dict[str, list[str]], list[str]]:
    """The known flags and the rest. A flag of `values` takes a value, `--flag x` or `--flag=x`, perhaps repeatedly."""
    found: dict[str, list[str]] = {}
    rest: list[str] = []
    queue = list(arguments)
    while queue:
        word = queue.pop(0)
        flag, equals, value = word.partition("=")
        if flag in values:
            if not equals and not queue:
                raise UserError(f"{flag}: needs a value")
            found.setdefault(flag, []).append(value if equals else queue.pop(0))
        elif word in switches:
            found[word] = [""]
        elif word.startswith("-"):
            from fairexp.config.nearest import nearest

            raise UserError(f"{word}: no such flag of this verb{nearest(flag, [*values, *switches])}")
        else:
            rest.append(word)
    return found, rest


def train(arguments: Sequence[str]) -> int:
    """Composes, validates, freezes and launches a run."""
    if any(word.partition("=")[0] in HYDRA_FLAGS for word in arguments):
        return hydra_answers(arguments)
    if any(word in ("-m", "--multirun") for word in arguments):
        raise UserError("-m: train takes one run at a time")
    flags, overrides = take_flags(arguments, ("--config-dir", "--config-name", "--trust"), ("--fresh", "--json"))
    from fairexp.launch.train import train

    return train(
        overrides,
        config_dirs=[Path(folder) for folder in flags.get("--config-dir", [])],
        config_name=flags.get("--config-name", ["train"])[-1],
        trusted=flags.get("--trust", []),
        fresh="--fresh" in flags,
        as_json="--json" in flags,
    )


def hydra_answers(arguments: Sequence[str]) -> int:
    """Hydra's own printing flags, answered by Hydra's own program on our configs."""
    import re
    import warnings

    import hydra

    from fairexp.config.groups import OUR_CONFIGS

    ours = ("--fresh", "--json")
    words = [re.sub(r"^\+(experiment|debug)=", r"\1=", word) for word in arguments if word not in ours]
    sys.argv = ["fairexp train", *words]
    warnings.filterwarnings("ignore", message="The version_base parameter")  # hydra-core 1.4 announces 1.5
    try:
        hydra.main(version_base="1.3", config_path=str(OUR_CONFIGS), config_name="train")(lambda config: None)()
    except SystemExit as error:
        return WRONG if error.code else 0
    return 0


def config(arguments: Sequence[str]) -> int:
    """Prints the resolved config with the place of each value."""
    flags, overrides = take_flags(arguments, ("--config-dir", "--config-name"), ("--json",))
    from fairexp.config.show import show

    return show(
        overrides,
        config_dirs=[Path(folder) for folder in flags.get("--config-dir", [])],
        config_name=flags.get("--config-name", ["train"])[-1],
        as_json="--json" in flags,
    )


def list_runs(arguments: Sequence[str]) -> int:
    """Prints a table of the runs."""
    flags, rest = take_flags(arguments, (), ("--json",))
    if len(rest) > 1:
        raise UserError(f"list: takes one folder of runs, got {' '.join(rest)}")
    if rest and not Path(rest[0]).is_dir():
        raise UserError(f"list: no such folder: {rest[0]}")
    from fairexp.runs.table import show_table

    return show_table(Path(rest[0] if rest else "runs").absolute(), as_json="--json" in flags)


def show_run(arguments: Sequence[str]) -> int:
    """Prints one run."""
    flags, rest = take_flags(arguments, ("--runs-dir",), ("--json",))
    if len(rest) != 1:
        raise UserError("show: takes one run, by its folder, name or id; `fairexp list` lists them")
    from fairexp.runs.find import find
    from fairexp.runs.table import show_one

    return show_one(find(rest[0], Path(flags.get("--runs-dir", ["runs"])[-1])), as_json="--json" in flags)


def evaluate(arguments: Sequence[str]) -> int:
    """Evaluates a run's checkpoint."""
    flags, rest = take_flags(arguments, ("--runs-dir", "--step", "--trust"), ("--json",))
    if not rest:
        raise UserError("eval: takes a run, by its folder, name or id; `fairexp list` lists them")
    from fairexp.launch.evaluate import evaluate
    from fairexp.runs.find import find

    return evaluate(
        find(rest[0], Path(flags.get("--runs-dir", ["runs"])[-1])),
        overrides=rest[1:],
        step=flags.get("--step", [None])[-1],
        trusted=flags.get("--trust", []),
        as_json="--json" in flags,
    )


VERBS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train,
    "eval": evaluate,
    "config": config,
    "list": list_runs,
    "show": show_run,
}
