"""Tables of all other measurements, which do not decide what to use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from peftsweep.analysis.answer.structure import Column, Section, Table, Unit, number
from peftsweep.analysis.answer.tables import best_first
from peftsweep.analysis.statistics import trials
from peftsweep.analysis.statistics.task import Task
from peftsweep.analysis.table import columns
from peftsweep.analysis.table.table import BREAK_EVEN, COMPILE, SPEED_UP
from peftsweep.analysis.text import words

MAX_ROWS = 12  # configurations of a table, the best first
FEWEST_STEPS = 6  # a speed-up gets an interval if each trial has at least this many logged steps
REDRAWS = 999
# How the figures of one kind end, and their unit; the first that fits.
UNITS: tuple[tuple[tuple[str, ...], Unit], ...] = (
    (("bytes", "bytes_above_start", "_peak", "rss"), "bytes"),
    (("share", "fraction", "utilisation"), "share"),
)
MEMORY = {  # of a stage, in the order of the tables
    "allocated_peak": "Device memory in use, peak",
    "allocated_mean": "Device memory in use, mean",
    "allocated_p99": "Device memory in use, 99th percentile",
    "reserved_peak": "Device memory reserved by the allocator, peak",
    "reserved_mean": "Device memory reserved by the allocator, mean",
    "reserved_p99": "Device memory reserved by the allocator, 99th percentile",
    "rss_peak": "Memory of the whole process on the host, peak",
}
# Of a variant of the model in one category of prompts: the column, its title, its unit.
GENERATED: tuple[tuple[str, str, Unit], ...] = (
    ("seconds_p50", "a text, median", "seconds"),
    ("seconds_p95", "a text, 95th percentile", "seconds"),
    ("time_to_first_token_p50", "first token, median", "seconds"),
    ("seconds_per_token_p50", "each further token, median", "seconds"),
    ("overhead", "time over the base", "change"),
    ("time_to_first_token_overhead", "first token over the base", "change"),
    ("seconds_per_token_overhead", "further token over the base", "change"),
    ("peak_bytes", "peak memory", "bytes"),
)
ROWS_OF = (  # of an evaluation
    *("truncated_prompts", "truncated_answers", "long_references", "unwritable_references"),
    "seen_in_training",
    "similar_in_training",
)
ROWS_TRAINED = (
    *("training_rows", "truncated_rows", "truncated_prompts", "truncated_answers"),
    *("tested_rows", "validated_rows", "duplicate_rows", "long_rows", "missing_rows", "padding_fraction"),
)


def sections(task: Task, steps: pd.DataFrame, name: str) -> Iterator[Section]:
    """A section for each kind of measurement that the study has; ``name`` is the task's, where there are several."""
    kinds = {
        "inference": ("Speed of generation", [*_generation(task), *_discovered(task, "generation_info.adapter.", "")]),
        "answers": ("Answers that were cut or could not be read", list(_answers(task))),
        "validation": ("Validation and learning rate", list(_validation(task, steps))),
        "compilation": ("Compilation", list(_compilation(task, steps))),
        "profile": ("Profile of a training step", list(_profiles(task))),
        "memory": ("Memory by stage", list(_memory(task))),
        "time": ("Time by stage", list(_stages(task))),
    }
    for kind, (title, found) in kinds.items():
        if found:
            yield Section(kind, title, [], tables=found, task=name)


def _table(task: Task, title: str, heads: Sequence[Column], rows: list[dict[str, Any]], note: str = "") -> list[Table]:
    """The table without its empty columns and rows; none where nothing is left."""
    kept = [head for head in heads if any(row.get(head.key) is not None for row in rows)]
    keys = {head.key for head in kept} - {"configuration", "category", "model", "evaluation", "trial"}
    rows = [row for row in rows if any(row.get(key) is not None for key in keys)]
    left_out = max(0, len(task.configurations) - MAX_ROWS) if rows else 0
    return [Table(title, kept, rows, note, left_out)] if keys and rows else []


def _plain(task: Task, title: str, keys: Iterable[tuple[str, str, Unit]]) -> list[Table]:
    """A row a configuration, of columns of the study: the column, its title, its unit."""
    found = [key for key in keys if columns.measured(task.configurations, key[0])]
    heads = [Column("configuration", "configuration"), *(Column(*key) for key in found)]
    rows = [
        {"configuration": task.labels[n]} | {key: number(task.configurations.at[n, key]) for key, *_ in found}
        for n in best_first(task)[:MAX_ROWS]
    ]
    return _table(task, title, heads, rows)


def _discovered(task: Task, prefix: str, title: str) -> list[Table]:
    """All figures whose columns begin with ``prefix``, a table for each unit."""
    found: dict[Unit, list[tuple[str, str, Unit]]] = {}
    for column in _own(task, prefix):
        name = column.removeprefix(prefix)
        found.setdefault(unit(name), []).append((column, name.replace("_", " ").replace(".", " "), unit(name)))
    of_units = {"seconds": "seconds", "bytes": "memory", "share": "shares", "count": "counts"}
    return [
        table
        for kind, keys in found.items()
        for table in _plain(task, ", ".join(filter(None, (title, of_units[kind]))), keys)
    ]


def _own(task: Task, prefix: str) -> list[str]:
    """The numeric columns of the trials that begin so, and hold a value."""
    return [
        c
        for c in task.table.columns
        if c.startswith(prefix) and c in task.configurations and columns.measured(task.configurations, c)
    ]


def unit(name: str) -> Unit:
    """The unit of a figure, by how its name ends."""
    if "seconds" in name.rpartition(".")[2]:
        return "seconds"
    return next((unit for endings, unit in UNITS if name.endswith(endings)), "count")


# ---- generation --------------------------------------------------------------------------------------


def _generation(task: Task) -> list[Table]:
    """How fast the base, the adapted and the merged model write, by category of prompts."""
    prefix = "generation_info."
    found = {c.removeprefix(prefix).split(".")[0] for c in _own(task, prefix) if c.endswith(".seconds_p50")}
    categories = [c for c in found if c != "overall"] + [c for c in ("overall",) if c in found]
    names = [str(c) for c in task.configurations.columns]
    batches = sorted(
        {c.split(".batch_")[1].split(".")[0] for c in names if c.startswith(prefix) and ".batch_" in c}, key=int
    )
    speeds: list[tuple[str, str, Unit]] = [
        (f"batch_{size}.tokens_per_second", f"tokens/s, batch of {size}", "count") for size in batches
    ]
    keys = [*GENERATED[:4], *speeds, *GENERATED[4:]]
    heads = [Column("configuration", "configuration"), Column("category", "prompts"), Column("model", "model")]
    heads += [Column(*key) for key in keys]
    rows = [
        {"configuration": task.labels[n], "category": category, "model": variant}
        | _variant_figures(task, n, f"{prefix}{category}.{variant}.", keys)
        for n in best_first(task)[:MAX_ROWS]
        for category in sorted(categories, key=lambda c: (c == "overall", c))
        for variant in ("base", "adapted", "merged")
    ]
    note = "Medians over texts. In brackets: the 95% interval of an overhead, over runs of base and adapted in turns."
    return _table(task, "", heads, rows, note)


def _variant_figures(task: Task, n: Any, prefix: str, keys: Sequence[tuple[str, str, Unit]]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for key, _, kind in keys:
        if kind == "change":
            for part, end in (("value", ""), ("low", ".low"), ("high", ".high")):
                ratio = number(_value_at(task, n, f"{prefix}{key}.{part}"))
                row[key + end] = None if ratio is None else ratio - 1
        else:
            row[key] = number(_value_at(task, n, prefix + key))
    return row


def _value_at(task: Task, n: Any, column: str) -> Any:
    return task.configurations.at[n, column] if column in task.configurations else None


# ---- prompts and predictions -------------------------------------------------------------------------


def _answers(task: Task) -> Iterator[Table]:
    """Rows that were cut, answers that could not be read, and rows that were left out of the training."""
    names = dict.fromkeys(columns.evaluation(score)[0] for score in columns.scores(task.table))
    rows, keys = [], dict.fromkeys(ROWS_OF)
    for n in best_first(task)[:MAX_ROWS]:
        for name in names:
            facts = task.facts(n, name)
            own = {key: number(facts[key]) for key in ROWS_OF if key in facts and number(facts[key])}
            valid = [k for k in facts if k.endswith("valid_fraction.value") and not k.startswith("base_")]
            own |= {key: number(facts[key]) for key in valid}
            keys |= dict.fromkeys(valid)
            rows.append({"configuration": task.labels[n], "evaluation": name, **own})
    heads = [Column("configuration", "configuration"), Column("evaluation", "evaluation")]
    for key in keys:
        title = key.removesuffix(".value").replace("_", " ").replace("valid fraction", "answers read")
        heads.append(Column(key, title, "share" if key.endswith("value") else "count"))
    yield from _table(task, "Test rows", heads, rows)
    trained: list[tuple[str, str, Unit]] = [
        (f"train_info.{name}", name.replace("_", " "), unit(name))
        for name in ROWS_TRAINED
        if (c := f"train_info.{name}") in task.configurations and task.configurations[c].fillna(0).gt(0).any()
    ]
    if any(("_rows" in c and not c.endswith("training_rows")) or "truncated" in c for c, *_ in trained):
        yield from _plain(task, "Training rows", trained)


# ---- validation --------------------------------------------------------------------------------------


def _validation(task: Task, steps: pd.DataFrame) -> Iterator[Table]:
    """The validation figures of each trial: first, best and last; and the course of the learning rate."""
    if "trial" not in steps:
        return
    order = {n: place for place, n in enumerate(best_first(task))}
    mine = task.table[[trials.TRIAL, "configuration"]]  # of few columns, as the table is wide
    mine = mine[mine[trials.TRIAL].isin(set(steps["trial"]))]
    mine = mine.iloc[mine["configuration"].map(order).argsort(kind="stable")].head(MAX_ROWS)
    metrics = [c for c in steps.columns if c.startswith("validation_") and steps[c].notna().any()]
    rates = "learning_rate" in steps and steps["learning_rate"].notna().any()
    if not metrics and not rates:
        return
    rows = []
    for trial, n in zip(mine[trials.TRIAL], mine["configuration"], strict=True):
        logged = steps[steps["trial"] == trial]
        row: dict[str, Any] = {"configuration": task.labels[n], "trial": trial}
        for metric in metrics:
            row |= _course(logged, metric)
        if rates and len(rate := logged["learning_rate"].dropna().astype(float)):
            row |= {"rate_highest": f"{rate.max():.3g}", "rate_last": f"{rate.iloc[-1]:.3g}"}
        rows.append(row)
    heads = [Column("configuration", "configuration")]
    for metric in metrics:
        name = metric.replace("_", " ", 1)
        heads += [
            Column(f"{metric}.first", f"{name}, first", "score"),
            Column(f"{metric}.best", f"{name}, best", "score"),
        ]
        heads += [Column(f"{metric}.step", "at step", "count"), Column(f"{metric}.last", f"{name}, last", "score")]
    heads += [Column("rate_highest", "learning rate, highest"), Column("rate_last", "learning rate, last")]
    yield from _table(task, "", heads, rows)


def _course(logged: pd.DataFrame, metric: str) -> dict[str, Any]:
    points = logged[logged[metric].notna()]
    if points.empty:
        return {}
    values = points[metric].astype(float)
    lower = columns.direction(f"eval_info.{metric.removeprefix('validation_')}.value") <= 0
    best = int(np.argmin(values) if lower else np.argmax(values))
    found = {"first": values.iloc[0], "best": values.iloc[best], "last": values.iloc[-1]}
    found["step"] = float(points["step"].iloc[best])
    return {f"{metric}.{name}": number(value) for name, value in found.items()}


# ---- compilation and profile -------------------------------------------------------------------------


def _compilation(task: Task, steps: pd.DataFrame) -> Iterator[Table]:
    """What compilation cost and gained: seconds, graphs, breaks, the speed-up of a step, and when it pays off."""
    facts = [c for c in _own(task, "train_info.") if "compile" in c and c not in (SPEED_UP, BREAK_EVEN)]
    if COMPILE not in task.table or not facts:
        return
    rows = []
    compiled = task.configurations.index[task.configurations[COMPILE].fillna("none").ne("none")]
    for n in [n for n in best_first(task) if n in set(compiled)][:MAX_ROWS]:
        row: dict[str, Any] = {"configuration": task.labels[n]} | {c: number(_value_at(task, n, c)) for c in facts}
        gain, even = number(_value_at(task, n, SPEED_UP)), _value_at(task, n, BREAK_EVEN)
        low, high = speed_up_interval(*_step_times(task, steps, n)) if gain is not None else (None, None)
        row |= {"speed": None if gain is None else gain - 1, "speed.low": low, "speed.high": high}
        never = even is not None and not pd.isna(even) and np.isinf(even)
        row["pays"] = None if gain is None else "never" if never or gain <= 1 else f"step {even:,.0f}"
        rows.append(row)
    heads = [Column("configuration", "configuration"), Column("speed", "steps a second over eager", "change")]
    heads += [Column("pays", "has paid from")]
    heads += [Column(c, c.removeprefix("train_info.").replace("_", " "), unit(c)) for c in facts]
    note = (
        "In brackets: the 95% interval over the logged steps of the two trials (bootstrap); other runs may differ more."
    )
    yield from _table(task, "", heads, rows, note)


def _step_times(task: Task, steps: pd.DataFrame, n: Any) -> tuple[list[float], list[float]]:
    """Seconds a step of the eager twin of configuration ``n``, and of its own first trial, by logged stretches."""
    same = [
        c for c in task.design.settings.columns if not c.startswith(("config.train.compile", "config.train.pad_to"))
    ]
    settings = task.design.settings
    twins = settings.index[(settings[same] == settings.loc[n, same]).all(axis=1)]
    eager = [t for t in twins if task.configurations.at[t, COMPILE] == "none"]
    found = []
    for number_of in (eager[0] if eager else None, n):
        names = task.table.loc[task.table["configuration"] == number_of, trials.TRIAL]
        found.append(_stretches(steps[steps["trial"] == names.iloc[0]]) if len(names) and "trial" in steps else [])
    return found[0], found[1]


def _stretches(logged: pd.DataFrame) -> list[float]:
    if "seconds" not in logged or "loss" not in logged:
        return []
    rows = logged[logged["seconds"].notna() & logged["loss"].notna()]
    seconds, step = np.diff(rows["seconds"].astype(float)), np.diff(rows["step"].astype(float))
    return [float(s / k) for s, k in zip(seconds, step, strict=True) if k > 0 and s > 0]


def speed_up_interval(eager: Sequence[float], compiled: Sequence[float]) -> tuple[float | None, float | None]:
    """The 95% interval of how much faster median steps are (0.5: half as fast again); None of fewer than six each."""
    if min(len(eager), len(compiled)) < FEWEST_STEPS:
        return None, None

    from scipy.stats import bootstrap  # a second of imports, that few studies need

    def gain(one: Any, other: Any, axis: int = -1) -> Any:
        return np.median(one, axis=axis) / np.median(other, axis=axis) - 1

    drawn = bootstrap((eager, compiled), gain, n_resamples=REDRAWS, method="percentile", rng=np.random.default_rng(0))
    return float(drawn.confidence_interval.low), float(drawn.confidence_interval.high)


def _profiles(task: Task) -> Iterator[Table]:
    """What the profilers found: seconds and shares of forward, backward and optimizer, FLOPs, memory, operators."""
    prefix = "train_info.profile."
    kinds = dict.fromkeys(c.removeprefix(prefix).split(".")[0] for c in task.table.columns if c.startswith(prefix))
    for kind in kinds:
        yield from _discovered(task, f"{prefix}{kind}.", f"profiler={kind}")
        texts = [c for c in task.table.columns if c.startswith(f"{prefix}{kind}.top_")]
        if texts:
            firsts = task.table.groupby("configuration")[texts].first()  # that any of its trials has
            heads = [Column("configuration", "configuration")]
            heads += [Column(c, c.removeprefix(f"{prefix}{kind}.top_").replace("_", " ")) for c in texts]
            rows = [
                {"configuration": task.labels[n]}
                | {c: str(firsts.at[n, c]) for c in texts if words.known(firsts.at[n, c])}
                for n in best_first(task)[:MAX_ROWS]
            ]
            yield from _table(task, f"profiler={kind}, the costliest operator", heads, rows)


# ---- stages ------------------------------------------------------------------------------------------


def _memory(task: Task) -> Iterator[Table]:
    """The memory of each stage, a table for each way of measuring it; of one stage alone a column for each."""
    own = columns.in_order_of_stages(_own(task, "memory."))
    found = {what: [c for c in own if c.endswith(f".{what}")] for what in MEMORY}
    stages = {c.split(".")[1] for every in found.values() for c in every}
    if len(stages) < 2:
        keys = [(c, MEMORY[what], "bytes") for what, every in found.items() for c in every]
        yield from _plain(task, f"Memory of the stage {', '.join(stages)}", keys) if len(keys) > 1 else []  # type: ignore[arg-type]
        return
    for what, every in found.items():
        of_stages = [(c, c.removeprefix("memory.").removesuffix(f".{what}").replace("_", " "), "bytes") for c in every]
        yield from _plain(task, MEMORY[what], of_stages)  # type: ignore[arg-type]


def _stages(task: Task) -> Iterator[Table]:
    """The seconds of each stage of a trial."""
    found = [c for c in _own(task, "train_info.") if c.endswith("_seconds") and c.count(".") == 1]
    found = columns.in_order_of_stages(found)
    keys = [(c, c.removeprefix("train_info.").removesuffix("_seconds").replace("_", " "), "seconds") for c in found]
    yield from _plain(task, "", keys) if len(keys) > 1 else []  # type: ignore[arg-type]
