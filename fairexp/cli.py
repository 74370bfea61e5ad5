"""The command line: the verb comes off argv, the rest is Hydra's grammar. What is heavy is imported where it's used."""

from __future__ import annotations

import gc
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fairexp.errors import DISK, FAILED, INTERRUPTED, WRONG, UserError

HELP = """\
fairexp: config-driven experiments for PyTorch

  fairexp train [overrides]      run an experiment; the same command resumes it or shows its result
  fairexp train -m key=a,b ...   a sweep, also sweep=NAME; again: only what is missing
  fairexp list [RUNS]            the runs: state, step, metrics, job, age; --state failed: those
  fairexp show RUN               one run: its state, result, and error if it failed
  fairexp logs RUN [-f]          what its ranks printed
  fairexp watch RUN              its progress, wherever it runs; a sweep's as a live table
  fairexp cancel RUNS            end queued and running runs, for good; a running one saves first
  fairexp requeue RUNS           stop jobs of Slurm and put them back into its queue
  fairexp sync RUNS              send to W&B what their pages lack of metrics.jsonl
  fairexp compare RUNS           the results side by side; --over seed: mean and 95 % interval
  fairexp eval RUN [--step N]    evaluate a run's last checkpoint; key=value changes its config
  fairexp generate RUN           text from a run's language model: --prompt, --tokens, --top-k
  fairexp export RUN FOLDER      a language model's weights for transformers' from_pretrained
  fairexp checkpoints RUN        what it has saved, verified byte for byte; --quick: by size
  fairexp verify-resume [overrides]  prove that your training goes on bit for bit after a kill
  fairexp config [overrides]     print the resolved config, and where each value comes from
  fairexp doctor [overrides]     what a run here or on Slurm trips over; doctor RUN: why it died
  fairexp prep FILES --out DIR   text, JSONL or Parquet files -> token shards; --tokenizer bpe:8192

  RUN is a folder, a name, an id, the beginning of one, or a job; RUNS also a sweep.
  overrides are Hydra's grammar; --cfg job, --info, --hydra-help are answered by Hydra (train)
  --config-dir DIR, --trust PACKAGE  a paper's configs/; an installed package that configs may name
  --fresh            train: a new run beside the one that these settings have
  --dry-run          train: the jobs, the script and what they ask for; nothing is submitted
  --follow           train: stay, and show the progress of what was submitted
  --retry-failed, --prune  train -m: submit failed runs again; cancel what isn't asked for any more
  --runs-dir DIR, --json  where the runs are, for the verbs that take RUN; one JSON value on stdout

groups (fairexp train GROUP=OPTION):
{groups}

example:
  fairexp train -m model=vit,resnet18 optimizer.lr=1e-3,3e-4 seed='range(0,3)' launcher=slurm
"""
# Flags that Hydra answers by itself after `train`.
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
    except KeyboardInterrupt:
        print(
            "fairexp: interrupted; what was submitted goes on, and the same command submits the rest", file=sys.stderr
        )
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `fairexp list | head`
        return 0
    except OSError as error:
        if error.errno not in DISK or os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        print(
            f"fairexp: {error.filename}: {error.strerror}; the same command goes on when that is mended",
            file=sys.stderr,
        )
        return FAILED


def help_text() -> str:
    """One screen: the verbs and the options of each group."""
    from fairexp.config.groups import groups

    lines = [
        textwrap.fill(f"  {group:<11}{', '.join(options)}", 99, subsequent_indent=" " * 13, break_on_hyphens=False)
        for group, options in groups().items()
    ]
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
    """Composes, validates, freezes and launches a run, or the runs of a sweep."""
    if any(word.partition("=")[0] in HYDRA_FLAGS for word in arguments):
        return hydra_answers(arguments)
    switches = ("--fresh", "--json", "--dry-run", "--follow", "--retry-failed", "--prune", "--multirun", "-m")
    flags, overrides = take_flags(arguments, ("--config-dir", "--config-name", "--trust"), switches)
    config_dirs = [Path(folder) for folder in flags.get("--config-dir", [])]
    config_name = flags.get("--config-name", ["train"])[-1]
    if "-m" in flags or "--multirun" in flags or any(word.startswith(("sweep=", "sweep.")) for word in overrides):
        if "--fresh" in flags:
            raise UserError("--fresh: a sweep has one run of each; another seed makes other runs")
        from fairexp.launch.sweep import Asked, sweep

        asked = Asked(
            trusted=flags.get("--trust", []),
            retry_failed="--retry-failed" in flags,
            prune="--prune" in flags,
            follow="--follow" in flags,
            dry_run="--dry-run" in flags,
            as_json="--json" in flags,
        )
        return sweep(overrides, config_dirs, config_name, asked)
    if wrong := [flag for flag in ("--retry-failed", "--prune") if flag in flags]:
        raise UserError(f"{wrong[0]}: is for sweeps; add -m")
    from fairexp.launch.train import train

    return train(
        overrides,
        config_dirs,
        config_name,
        trusted=flags.get("--trust", []),
        fresh="--fresh" in flags,
        as_json="--json" in flags,
        follows="--follow" in flags,
        dry_run="--dry-run" in flags,
    )


def hydra_answers(arguments: Sequence[str]) -> int:
    """Hydra's own printing flags, answered by Hydra's own program on our configs."""
    import re
    import warnings

    import hydra

    from fairexp.config.groups import OUR_CONFIGS

    ours = ("--fresh", "--json", "--dry-run", "--follow", "--retry-failed", "--prune", "-m", "--multirun")
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
    flags, rest = take_flags(arguments, ("--state", "--runs-dir"), ("--json",))
    from fairexp.runs import find, state
    from fairexp.runs.table import show_table

    if wrong := [word for word in flags.get("--state", []) if word not in state.WORDS]:
        from fairexp.config.nearest import nearest

        raise UserError(f"--state {wrong[0]}: no such state{nearest(wrong[0], state.WORDS)}")
    if len(rest) > 1:
        raise UserError(f"list: takes one folder of runs or one sweep, got {' '.join(rest)}")
    folder = Path(flags.get("--runs-dir", ["runs"])[-1])
    labels: dict[str, str] = {}
    if not rest or (
        Path(rest[0]).is_dir() and not any((Path(rest[0]) / f"{of}.json").is_file() for of in ("sweep", "status"))
    ):
        runs = find.runs((Path(rest[0]) if rest else folder).absolute())
    else:
        if os.sep in rest[0] and not Path(rest[0]).exists():
            raise UserError(f"list: no such folder: {rest[0]}")
        runs, sweep = find.find_all(rest[0], folder)
        labels = sweep.labels() if sweep else {}
    where = (Path(rest[0]) if rest and not labels else folder).absolute()
    return show_table(runs, flags.get("--state", []), "--json" in flags, labels, where)


def one_run(verb: str, arguments: Sequence[str], values: Sequence[str], switches: Sequence[str]) -> tuple[Any, dict]:
    """The run that the verb's only word names, and the verb's flags."""
    flags, rest = take_flags(arguments, ("--runs-dir", *values), switches)
    if len(rest) != 1:
        raise UserError(f"{verb}: takes one run, by its folder, name or id; `fairexp list` lists them")
    from fairexp.runs.find import find

    return find(rest[0], Path(flags.get("--runs-dir", ["runs"])[-1])), flags


def show_run(arguments: Sequence[str]) -> int:
    """Prints one run."""
    run, flags = one_run("show", arguments, (), ("--json",))
    from fairexp.runs.table import show_one

    return show_one(run, as_json="--json" in flags)


def show_logs(arguments: Sequence[str]) -> int:
    """Prints what a run's ranks printed."""
    run, flags = one_run("logs", arguments, ("--rank", "--attempt"), ("-f", "--follow"))
    numbers = {}
    for flag in ("--rank", "--attempt"):
        text = flags.get(flag, [None])[-1]
        if text is not None and not text.isdigit():
            raise UserError(f"{flag}: takes a number, got {text}")
        numbers[flag] = None if text is None else int(text)
    from fairexp.runs.logs import logs

    return logs(run, numbers["--rank"], "-f" in flags or "--follow" in flags, numbers["--attempt"])


def watch(arguments: Sequence[str]) -> int:
    """Shows the progress of a run, or of a sweep's runs, until they end."""
    flags, rest = take_flags(arguments, ("--runs-dir",), ())
    if len(rest) != 1:
        raise UserError("watch: takes one run or sweep, by its folder, name or id; `fairexp list` lists them")
    from fairexp.launch import follow
    from fairexp.runs.find import find_all

    runs, sweep = find_all(rest[0], Path(flags.get("--runs-dir", ["runs"])[-1]))
    if sweep:
        from fairexp.launch.sweep import follow as follow_sweep

        return follow_sweep(sweep)
    if len(runs) > 1:
        raise UserError(f"{rest[0]}: several runs: {', '.join(run.path.name for run in runs)}")
    return follow.watch(runs[0])


def several_runs(verb: str, words: Sequence[str], flags: dict[str, list[str]]) -> list[Any]:
    """The runs that the words name."""
    if not words:
        raise UserError(f"{verb}: takes runs, sweeps or jobs; `fairexp list` lists them")
    from fairexp.runs.find import find_all

    folder = Path(flags.get("--runs-dir", ["runs"])[-1])
    return list({run.path: run for word in words for run in find_all(word, folder)[0]}.values())


def cancel_runs(arguments: Sequence[str]) -> int:
    """Ends queued and running runs."""
    flags, rest = take_flags(arguments, ("--runs-dir",), ())
    runs = several_runs("cancel", rest, flags)
    from fairexp.launch.control import cancel, cancel_search
    from fairexp.runs.find import find_all

    ended = cancel(runs)
    for word in rest:
        sweep = find_all(word, Path(flags.get("--runs-dir", ["runs"])[-1]))[1]
        if sweep and sweep.search():
            cancel_search(sweep)
    print(
        f"{len(ended)} of {len(runs)} runs cancelled" + ("" if ended else ": none was queued or running"),
        file=sys.stderr,
    )
    return 0


def requeue_runs(arguments: Sequence[str]) -> int:
    """Puts jobs back into Slurm's queue."""
    flags, rest = take_flags(arguments, ("--runs-dir",), ())
    runs = several_runs("requeue", rest, flags)
    from fairexp.launch.control import requeue

    done, refused = requeue(runs)
    for line in (*(f"{run.path.name}: back in the queue" for run in done), *refused):
        print(line, file=sys.stderr)
    return FAILED if refused else 0


def sync_runs(arguments: Sequence[str]) -> int:
    """Brings runs' W&B pages up to their metrics.jsonl."""
    flags, rest = take_flags(arguments, ("--runs-dir",), ())
    runs = several_runs("sync", rest, flags)
    from fairexp.launch.sync import sync
    from fairexp.lifetime import leave

    leave(sync(runs))


def compare_runs(arguments: Sequence[str]) -> int:
    """Prints results side by side."""
    flags, rest = take_flags(arguments, ("--runs-dir", "--over", "--metric"), ("--json",))
    runs = several_runs("compare", rest, flags)
    from fairexp.runs.compare import compare

    return compare(runs, flags.get("--over", [None])[-1], flags.get("--metric", []), "--json" in flags)  # type: ignore[arg-type]


def examine(arguments: Sequence[str]) -> int:
    """Looks for what a run would trip over, or for why one died or hangs."""
    flags, overrides = take_flags(arguments, ("--config-dir", "--config-name", "--runs-dir"), ("--json",))
    if named := [word for word in overrides if "=" not in word and not word.startswith("~")]:
        if len(overrides) > 1:
            raise UserError(f"doctor: takes one run or overrides, got {' '.join(overrides)}")
        from fairexp.runs import autopsy, find

        return autopsy.doctor(find.find(named[0], Path(flags.get("--runs-dir", ["runs"])[-1])), "--json" in flags)
    from fairexp.config.compose import compose
    from fairexp.config.validate import sections
    from fairexp.launch.doctor import doctor

    folders = [Path(folder) for folder in flags.get("--config-dir", [])]
    composed = compose(overrides, folders, flags.get("--config-name", ["train"])[-1])
    if problems := list(sections(composed)):
        raise UserError(*problems)
    return doctor(composed.config, "--json" in flags)


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


def generate(arguments: Sequence[str]) -> int:
    """Continues a text with a run's language model."""
    numbers = {"--tokens": "200", "--temperature": "0.8", "--top-k": None, "--seed": "0"}
    run, flags = one_run("generate", arguments, ("--prompt", "--step", "--trust", *numbers), ("--json",))
    given = {flag: flags.get(flag, [default])[-1] for flag, default in numbers.items()}
    for flag, text in given.items():
        least = 1 if flag in ("--tokens", "--top-k") else 0
        try:
            fits = text is None or (float if flag == "--temperature" else int)(text) >= least
        except ValueError:
            fits = False
        if not fits:
            raise UserError(f"{flag}: takes a number >= {least}, got {text}")
    from fairexp.launch.generate import generate

    return generate(
        run,
        prompt=flags.get("--prompt", [""])[-1],
        count=int(given["--tokens"] or 0),
        temperature=float(given["--temperature"] or 0),
        top_k=int(given["--top-k"]) if given["--top-k"] else None,
        seed=int(given["--seed"] or 0),
        step=flags.get("--step", [None])[-1],
        trusted=flags.get("--trust", []),
        as_json="--json" in flags,
    )


def export(arguments: Sequence[str]) -> int:
    """Writes a run's weights for other programs."""
    flags, rest = take_flags(arguments, ("--runs-dir", "--step"), ())
    if len(rest) != 2:
        raise UserError("export: takes a run, by its folder, name or id, and a new folder to write to")
    from fairexp.launch.export import export
    from fairexp.runs.find import find

    run = find(rest[0], Path(flags.get("--runs-dir", ["runs"])[-1]))
    return export(run, Path(rest[1]).expanduser(), flags.get("--step", [None])[-1])


def checkpoints(arguments: Sequence[str]) -> int:
    """Lists and verifies what a run has saved."""
    run, flags = one_run("checkpoints", arguments, (), ("--quick", "--json"))
    from fairexp.runs.checkpoints import show

    return show(run, thorough="--quick" not in flags, as_json="--json" in flags)


def verify_resume(arguments: Sequence[str]) -> int:
    """Proves that a run which was killed goes on bit for bit, or names the first state that doesn't."""
    flags, overrides = take_flags(arguments, ("--config-dir", "--config-name", "--trust", "--steps"), ())
    steps = flags.get("--steps", ["10"])[-1]
    if not steps.isdigit() or int(steps) < 1:
        raise UserError(f"--steps: takes a number of steps >= 1, got {steps}")
    from fairexp.launch.verify import verify

    folders = [Path(folder) for folder in flags.get("--config-dir", [])]
    return verify(overrides, folders, flags.get("--config-name", ["train"])[-1], flags.get("--trust", []), int(steps))


def prep(arguments: Sequence[str]) -> int:
    """Makes token shards of text files."""
    values = ("--out", "--tokenizer", "--field", "--split-on", "--encoding", "--end-of-document")
    numbers = ("--workers", "--shard-tokens", "--seed", "--valid")
    flags, rest = take_flags(arguments, (*values, *numbers), ())
    if not rest:
        raise UserError("prep: takes files, globs or URLs of text, .jsonl or .parquet, and --out DIR")
    if "--out" not in flags:
        raise UserError("prep: --out DIR is missing: where the shards go")
    given = {flag.removeprefix("--").replace("-", "_"): words[-1] for flag, words in flags.items()}
    from fairexp.prep.prep import Asked, prep
    from fairexp.prep.sources import Reading

    asked = Asked(
        sources=tuple(rest),
        out=Path(given["out"]).expanduser(),
        tokenizer=given.get("tokenizer", "bytes"),
        end=given.get("end_of_document"),
        reading=Reading(given.get("field", "text"), given.get("split_on"), given.get("encoding", "utf-8").lower()),
        valid=fraction("--valid", given.get("valid", "0.01")),
        seed=whole("--seed", given.get("seed", "0"), 0),
        shard_tokens=whole("--shard-tokens", given.get("shard_tokens", str(1 << 28)), 1),
        workers=whole("--workers", given.get("workers", str(len(os.sched_getaffinity(0)))), 1),
    )
    return prep(asked)


def whole(flag: str, text: str, least: int) -> int:
    """A flag's number; 1_000 and 1e6 are numbers too."""
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not (least <= number < 1 << 62 and number == int(number)):
        raise UserError(f"{flag}: takes a whole number >= {least}, got {text}")
    return int(text) if text.isdigit() else int(number)


def fraction(flag: str, text: str) -> float:
    """A flag's number in [0, 1)."""
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not 0 <= number < 1:
        raise UserError(f"{flag}: takes a fraction from 0 to below 1, got {text}")
    return number


VERBS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train,
    "eval": evaluate,
    "generate": generate,
    "export": export,
    "config": config,
    "list": list_runs,
    "show": show_run,
    "logs": show_logs,
    "watch": watch,
    "cancel": cancel_runs,
    "requeue": requeue_runs,
    "sync": sync_runs,
    "compare": compare_runs,
    "checkpoints": checkpoints,
    "verify-resume": verify_resume,
    "doctor": examine,
    "prep": prep,
}
