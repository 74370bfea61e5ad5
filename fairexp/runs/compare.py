"""Runs beside each other: what differs in their settings, and what came out; over seeds as a mean with its interval."""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fairexp.config.identity import identity
from fairexp.config.nearest import nearest
from fairexp.config.rundir import RunDir
from fairexp.errors import DONE, FAILED, UserError

TARGET = "._target_"
LOWER_IS_BETTER = ("loss", "perplexity", "error", "time_s", "wait_frac")
NEITHER_IS_BETTER = ("train/lr", "train/grad_norm")


class Absent:
    """A key that a config doesn't have; None is a value."""

    def __repr__(self) -> str:
        return "-"


ABSENT = Absent()


@dataclass
class Result:
    """A run as it is compared: flat configs, and its metrics once it has finished."""

    name: str
    settings: dict[str, Any]  # of the experiment: without launcher, tracker, paths ...
    everything: dict[str, Any]
    metrics: dict[str, float] | None


@dataclass
class Row:
    """The runs that share a line of the table."""

    settings: dict[str, Any] = field(default_factory=dict)
    finished: list[Result] = field(default_factory=list)
    unfinished: list[Result] = field(default_factory=list)

    def values(self, metric: str) -> list[float]:
        """The metric of each finished run that has it."""
        return [run.metrics[metric] for run in self.finished if run.metrics and metric in run.metrics]


def compare(runs: Sequence[RunDir], over: str | None, metrics: Sequence[str], as_json: bool) -> int:
    """Prints a table of the runs: a row a run, or, with `over`, a row for those that differ in that key alone.

    Metrics are the final ones, `best/eval/top1` is the best of a run; none given: the evaluation's, else the training loss.
    Only finished runs have metrics, the others are counted. Exit code 1 where none has finished.
    """
    results = [read(run) for run in {run.path.resolve(): run for run in runs}.values()]
    finished = [result for result in results if result.metrics is not None]
    rows = rows_of(results, over)
    names = choose_metrics(finished, metrics) if finished else []
    if as_json:
        print(json.dumps([as_record(row, names) for row in rows]))
    elif finished:
        show(rows, names, over)
    if twins := same_twice(rows, over):
        say(f"the same experiment twice, and both count: {'; '.join(', '.join(names) for names in twins)}")
    if finished:
        return DONE
    say(f"nothing to compare: none of {len(results)} runs has finished" if results else "no runs to compare")
    return FAILED


def read(run: RunDir) -> Result:
    """A run's settings and metrics from its folder."""
    config, summary = run.config(), run.summary()
    metrics = None
    if summary is not None and run.status().get("state") == "finished":
        named = {**summary["final"], **{f"best/{name}": value for name, value in summary.get("best", {}).items()}}
        metrics = {name: each for name, value in named.items() if (each := as_number(value)) is not None}
    return Result(run.path.name, flatten(identity(config)), flatten(config), metrics)


def as_number(value: Any) -> float | None:
    """A metric's value, also where JSON had to say "NaN"; None for what is no number."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def flatten(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}. A list is one value: `optimizer.betas`."""
    flat: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def rows_of(results: Sequence[Result], over: str | None) -> list[Row]:
    """The rows in the order of their first runs, with the settings that tell them apart."""
    averaged = keys_over(results, over) if over is not None else set()
    rows: dict[str, Row] = {}
    first: list[dict[str, Any]] = []
    for result in results:
        settings = {key: value for key, value in result.settings.items() if key not in averaged}
        together = text(settings) if over is not None else result.name
        if together not in rows:
            rows[together] = Row()
            first.append(settings)
        row = rows[together]
        (row.unfinished if result.metrics is None else row.finished).append(result)
    for column, values in differing(first).items():
        for row, value in zip(rows.values(), values, strict=True):
            if value is not ABSENT:
                row.settings[column] = value
    return list(rows.values())


def keys_over(results: Sequence[Result], over: str) -> set[str]:
    """The keys that `over` names: itself, what lies below it, and what only repeats it (`split_seed: ${seed}`)."""
    known = dict.fromkeys(key for result in results for key in result.everything)
    chosen = {key for key in known if key == over or key.startswith(f"{over}.")}
    if results and not chosen:
        namesakes = [key for key in known if key.endswith(f".{over}")]  # `lr` is too short for a nearest match
        hint = f"; nearest: {', '.join(namesakes)}" if namesakes else nearest(over, known)
        raise UserError(f"--over {over}: no run has this key{hint}")

    def column(key: str) -> list[Any]:
        return [result.everything.get(key, ABSENT) for result in results]

    if vary(column(over)):
        chosen |= {key for key in known if says_the_same(key, over) and follows(column(key), column(over))}
    return chosen


def differing(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The keys of flat configs that tell them apart, each with the value in every config, ABSENT where it has none.

    Where the configs choose different _target_s, `model` stands for the choice (ViT, ResNet). What else stands in that section
    is shown where all configs have it (a scalar: `model.depth`), or where it differs among those of one choice; the rest only
    follows from the choice. Of keys that repeat each other (`model.image_size: ${dataset.image_size}`) one is shown.
    """
    keys = list(dict.fromkeys(key for config in configs for key in config))

    def column(key: str) -> list[Any]:
        return [config.get(key, ABSENT) for config in configs]

    choices = {key.removesuffix(TARGET): column(key) for key in keys if key.endswith(TARGET) and vary(column(key))}
    found: dict[str, list[Any]] = {}
    for key in keys:
        name = key.removesuffix(TARGET)
        values = choice(choices[name], column(name)) if name in choices else column(key)
        if name in choices:
            decisive = [targets for group, targets in choices.items() if name.startswith(f"{group}.")]
        else:
            decisive = [targets for group, targets in choices.items() if section(group) == section(key)]
        chosen: dict[str, list[Any]] = {}
        for number, value in enumerate(values):
            chosen.setdefault(text([targets[number] for targets in decisive]), []).append(value)
        everywhere = vary(values) and not any(value is ABSENT or isinstance(value, list | dict) for value in values)
        if everywhere or any(vary(alike) for alike in chosen.values()):
            found[name] = values
    return {name: found[name] for name in found if name not in repeated(found, choices)}


def choice(targets: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    """The last part of each _target_, whole where two would read the same; what stands in its place where there is none."""
    distinct = {target for target in targets if isinstance(target, str)}
    short = {target.rpartition(".")[2] for target in distinct}
    return [
        other if target is ABSENT else target.rpartition(".")[2] if len(short) == len(distinct) else target
        for target, other in zip(targets, others, strict=True)
    ]


def section(key: str) -> str:
    """model.head.width -> model"""
    return key.partition(".")[0]


def repeated(columns: Mapping[str, Sequence[Any]], choices: Mapping[str, Any]) -> set[str]:
    """The columns that another one makes needless: it has their values and their word, or is a choice beside theirs, as
    dataset.train and dataset.eval are. The one kept is nearest to the root, and not the model's, which takes its sizes from
    the data set."""

    def rank(name: str) -> tuple[int, int, bool]:
        return sum(value is ABSENT for value in columns[name]), name.count("."), section(name) == "model"

    def akin(name: str, other: str) -> bool:
        if name in choices and other in choices:
            return name.rpartition(".")[0] == other.rpartition(".")[0] != ""
        return name not in choices and other not in choices and says_the_same(name, other)

    kept: list[str] = []
    for name in sorted(columns, key=rank):
        if not any(akin(name, other) and follows(columns[name], columns[other]) for other in kept):
            kept.append(name)
    return columns.keys() - set(kept)


def says_the_same(key: str, other: str) -> bool:
    """Whether the key may be the other one again, by its last word: model.in_channels and dataset.channels."""
    word, of = key.rpartition(".")[2], other.rpartition(".")[2]
    return word == of or word.endswith(f"_{of}")


def follows(values: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether the values are the others, where there are any."""
    return all(value is ABSENT or text(value) == text(other) for value, other in zip(values, others, strict=True))


def vary(values: Sequence[Any]) -> bool:
    """Whether there are two different values."""
    return len({text(value) for value in values}) > 1


def text(value: Any) -> str:
    """JSON of a setting, the ground on which settings are equal: true isn't 1, NaN is NaN, "null" isn't null."""
    return json.dumps(value, default=repr, ensure_ascii=False, sort_keys=True)


def cell(value: Any) -> str:
    """A setting for the table, as a command line would have it: cosine, null, [0.9, 0.999]."""
    return value if isinstance(value, str) and value else repr(value) if value is ABSENT else text(value)


def choose_metrics(finished: Sequence[Result], wanted: Sequence[str]) -> list[str]:
    """The wanted metrics, or those that a person compares; UserError for those that no run has."""
    known = list(dict.fromkeys(name for run in finished for name in run.metrics or {}))
    if unknown := [name for name in wanted if name not in known]:
        raise UserError(*(f"{name}: no run has this metric{nearest(name, known)}" for name in unknown))
    if wanted:
        return list(dict.fromkeys(wanted))
    evaluation = [name for name in known if name.startswith("eval/")]
    return evaluation or [name for name in known if name == "train/loss"]


def same_twice(rows: Sequence[Row], over: str | None) -> list[list[str]]:
    """The finished runs of a row that don't differ in `over` either: their mean's interval is narrower than it should be."""
    alike: dict[str, list[str]] = {}
    for row in rows if over is not None else ():
        for run in row.finished:
            varied = {key: value for key, value in run.everything.items() if f"{key}.".startswith(f"{over}.")}
            alike.setdefault(text([run.settings, varied]), []).append(run.name)
    return [names for names in alike.values() if len(names) > 1]


def estimate(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and the half width of its 95 % confidence interval (Student's t); None for a single value."""
    if not all(map(math.isfinite, values)):
        return sum(values) / len(values), math.nan if len(values) > 1 else None
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    return mean, t_95(len(values) - 1) * statistics.stdev(values, mean) / math.sqrt(len(values))


def t_95(df: int) -> float:
    """The t that has 95 % of Student's distribution between -t and t, for whole degrees of freedom."""
    low, high = 1.9, 12.8  # the normal distribution's 1.96, and that of df = 1
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _between(middle, df) < 0.95 else (low, middle)
    return high


def _between(t: float, df: int) -> float:
    """The probability of (-t, t): the finite sums of Abramowitz & Stegun 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(df))
    odd = df % 2
    term, total = 1.0, 0.0
    for k in range(1 + odd, df, 2):  # df // 2 terms
        total += term
        term *= k / (k + 1) * math.cos(angle) ** 2
    if not odd:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + math.sin(angle) * math.cos(angle) * total)


def best_of(metric: str, means: Sequence[float | None]) -> float | None:
    """The best of the means; None where nothing can be said: all the same, or a metric that isn't a merit."""
    numbers = {mean for mean in means if mean is not None and not math.isnan(mean)}
    if len(numbers) < 2 or metric in NEITHER_IS_BETTER:
        return None
    return min(numbers) if metric.endswith(LOWER_IS_BETTER) else max(numbers)


def as_record(row: Row, metrics: Sequence[str]) -> dict[str, Any]:
    """A row for programs. `runs`: first the finished ones, in the order of `values`."""
    named: dict[str, Any] = {}
    for metric in metrics:
        values = row.values(metric)
        mean, ci95 = estimate(values) if values else (None, None)
        named[metric] = {"mean": mean, "ci95": ci95, "values": values}
    record = {
        "settings": row.settings,
        "n": len(row.finished),
        "metrics": named,
        "runs": [run.name for run in [*row.finished, *row.unfinished]],
        "unfinished": len(row.unfinished),
    }
    return _without_nan(record)


def _without_nan(value: Any) -> Any:
    """The value with NaN and the infinities as strings: JSON has no word for them."""
    match value:
        case dict():
            return {key: _without_nan(each) for key, each in value.items()}
        case list():
            return [_without_nan(each) for each in value]
        case float() if not math.isfinite(value):
            return json.dumps(value)
    return value


def show(rows: Sequence[Row], metrics: Sequence[str], over: str | None) -> None:
    """Prints the table, and below it what its signs mean."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    unfinished = sum(len(row.unfinished) for row in rows)
    settings = list(dict.fromkeys(column for row in rows for column in row.settings))
    means = {
        metric: [estimate(values)[0] if (values := row.values(metric)) else None for row in rows] for metric in metrics
    }
    best = {metric: best_of(metric, means[metric]) for metric in metrics}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in [*(["run"] if over is None else []), *settings]:
        table.add_column(Text(name), overflow="fold")
    counts = [*(["n"] if over is not None else []), *(["unfinished"] if unfinished else [])]
    for name in [*counts, *metrics]:
        table.add_column(Text(name), justify="right", overflow="fold")
    for row in rows:
        cells = [Text(run.name) for run in [*row.finished, *row.unfinished]] if over is None else []
        cells += [Text(cell(row.settings.get(column, ABSENT))) for column in settings]
        cells += [Text(str(len(row.finished)))] if over is not None else []
        cells += [Text(str(len(row.unfinished) or ""))] if unfinished else []
        for metric in metrics:
            values = row.values(metric)
            leads = bool(values) and estimate(values)[0] == best[metric]
            cells.append(Text(words(values, len(row.finished), leads), style="bold" if leads else ""))
        table.add_row(*cells)
    terminal = sys.stdout.isatty()
    Console(highlight=False, soft_wrap=True, width=None if terminal else 10_000).print(
        table
    )  # a file is as wide as it takes
    if over is not None:
        print(f"mean ± half width of the 95 % confidence interval (Student t) over {over}")
    if any(value is not None for value in best.values()):
        print("* the best of its column")
    if unfinished:
        total = unfinished + sum(len(row.finished) for row in rows)
        print(f"unfinished: {unfinished} of {total} runs, in none of the numbers")


def words(values: Sequence[float], n: int, best: bool) -> str:
    """0.9583 ± 0.0042*; (2) where only two of the row's runs have this metric. The star has its place in every cell, so that
    numbers stand below each other."""
    if not values:
        return "- "
    mean, ci95 = estimate(values)
    interval = f" ± {number(ci95)}" if ci95 is not None else ""
    return f"{number(mean)}{interval}{f' ({len(values)})' if len(values) < n else ''}{'*' if best else ' '}"


def number(value: float) -> str:
    """Four places, or four digits where those would say nothing."""
    if not math.isfinite(value):
        return str(value)
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}"
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.1f}"


def say(line: str) -> None:
    """Human words go to stderr."""
    print(f"fairexp: {line}", file=sys.stderr)
