"""The columns of a table of trials: what was varied, what is a score or a cost, and its name in words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

from peftsweep.analysis.table import naming
from peftsweep.analysis.table.naming import Names
from peftsweep.study.record import HEADLINE, Status
from peftsweep.study.scores import TEXT_METRICS, is_minimized
from peftsweep.study.sweep_record import AT_ONCE_KEY

STATUS, WARNINGS, TARGETS = "run_info.status", "run_info.warnings", "choices.targets"
RANK, METHOD, QUANT = naming.RANK, naming.METHOD, naming.QUANT
NAME, CALLED = "name", "trial name"  # columns of what a trial's configuration is called, and a trial
LONGEST = 48  # characters of a label
MAIN_METRICS = ("accuracy", "acc_norm", "acc", "label_acc", "f1", "perplexity")  # of an evaluation, the first it has
WITHOUT_RESULT = (Status.failed.name, Status.oom.name, Status.refused.name, Status.cancelled.name)
NOT_SUCCESS = tuple(s.name for s in Status if s is not Status.success)
MEASURED = ("train_info.", "memory.", "eval_info.", "generation_info.")
FACTS = (
    "valid_fraction",
    "majority",
    "random",
    "seen_in_training",
    "similar_in_training",
    *TEXT_METRICS,
)  # that explain a score and are none
LESS = ("bytes", "parameters", "_peak", "_mean", "rss", "loss", "padding_fraction", "overhead.value")
MORE = ("tokens_per_second", "speed_up")
UNITS = {  # from which value on, how much of the column's unit one is, and its sign
    "bytes": ((1e9, 1e9, "GB"), (1e6, 1e6, "MB"), (1e3, 1e3, "kB")),
    "seconds": ((7200.0, 3600.0, "h"), (300.0, 60.0, "min"), (1.0, 1.0, "s"), (1e-3, 1e-3, "ms")),
}


@dataclass(frozen=True)
class Cost:
    """A column that is better when smaller; ``unit`` is bytes, seconds, or empty for a plain number."""

    column: str
    name: str
    unit: str = ""

    def scale(self, largest: float) -> tuple[float, str]:
        """What to divide values up to ``largest`` by, and the name with the unit they then have."""
        for least, factor, sign in UNITS.get(self.unit, ()):
            if largest >= least:
                return factor, f"{self.name} ({sign})"
        return 1.0, f"{self.name} ({self.unit})" if self.unit else self.name


DEVICE_MEMORY = Cost("memory.train.allocated_peak", "training memory, device", "bytes")
HOST_MEMORY = Cost("memory.train.rss_peak", "training memory, host", "bytes")
TRAINING_TIME = Cost("train_info.train_seconds", "training time", "seconds")
ADAPTER = Cost("train_info.adapter_bytes", "adapter on disk", "bytes")
TRAINABLE = Cost("train_info.trainable_parameters", "trainable parameters")
LATENCY = Cost("generation_info.overall.adapted.seconds_p50", "generation of a text, median", "seconds")
PREDICTED, PREDICTION_ERROR = "memory.predicted.peak_bytes", "memory.predicted.error"
# The first that is known; a process's memory is that of all it has imported, and of what ran in it before.
MEMORY = (DEVICE_MEMORY, Cost(PREDICTED, "training memory, predicted", "bytes"), HOST_MEMORY)
STAGES = (  # of a trial, in the order in which most of their work is done
    *("setup", "load", "data", "baseline", "attach", "compile", "train", "train_stage", "validate", "checkpoint"),
    *("save", "eval", "scales", "inference", "profile", "reload", "merge"),
)
NAMES = {
    RANK: "rank",
    METHOD: "method",
    QUANT: "quantisation",
    TARGETS: "target modules",
    "choices.train": "training recipe",
    "config.train.steps": "training steps",
    TRAINING_TIME.column: "training time",
    ADAPTER.column: "adapter size",
    DEVICE_MEMORY.column: "peak memory",
    PREDICTED: "predicted memory",
    HOST_MEMORY.column: "resident memory",
    LATENCY.column: "generation of a text (median)",
}
# The device that a trial ran on, and of a CPU the threads.
GPUS, PROCESSOR, THREADS = "meta_info.torch.gpus", "meta_info.system.processor", "meta_info.torch.threads"
AT_ONCE, TRAINED_BY = f"meta_info.system.{AT_ONCE_KEY}", "train_info.trained_by"
VERSION = "meta_info.packages.{}.version"
VERSIONS = ("torch", "transformers", "peft", "bitsandbytes")  # packages that decide how long a step takes
SEVERAL = " + "  # between the devices of one trial or configuration


def direction(column: str) -> int:
    """1 where more is better, -1 where less is, 0 where that is not known."""
    if column.startswith("eval_info.") and column.endswith(".value"):
        metric = column.removesuffix(".value").rpartition(".")[2].removeprefix("base_")
        return 0 if metric in FACTS else -1 if is_minimized(metric) else 1
    name = column.removeprefix("train_info.").removesuffix("_p50").removesuffix("_p95").removesuffix("_p99")
    if name.endswith(MORE):
        return 1
    less = name.endswith(LESS) or "seconds" in name or "time_to_" in name
    return -1 if less and column.startswith(MEASURED) else 0


def scores(table: pd.DataFrame) -> list[str]:
    """The columns of all scores, in the order of the record; without the base's, and those that explain another."""
    found = [c for c in table.columns if c.startswith("eval_info.") and c.endswith(".value")]
    own = [c for c in found if not evaluation(c)[1].startswith("base_") and evaluation(c)[1] not in (*FACTS, "loss")]
    return [c for c in own if table[c].notna().any()]


def evaluation(column: str) -> tuple[str, str]:
    """The evaluation and the metric of a score's column."""
    name, _, metric = column.removeprefix("eval_info.").removesuffix(".value").rpartition(".")
    return name, metric


def costs(table: pd.DataFrame) -> list[Cost]:
    """What the trials cost, as far as it is known."""
    memory = [c for c in MEMORY if measured(table, c.column)][:1]
    return [*memory, *(c for c in (TRAINING_TIME, ADAPTER, TRAINABLE, LATENCY) if measured(table, c.column))]


def measured(table: pd.DataFrame, column: str) -> bool:
    """Whether the column is there and holds a value."""
    return column in table and bool(table[column].notna().any())


def main_scores(table: pd.DataFrame) -> list[str]:
    """The score that each evaluation is judged by; first the one that the study is judged by unless told otherwise.

    That is the first in which more is better, if there is one.
    """
    found: dict[str, list[str]] = {}
    for column in scores(table):
        found.setdefault(evaluation(column)[0], []).append(column)
    order = {name: place for place, name in enumerate(MAIN_METRICS)}
    main = []
    for name, every in found.items():
        ranks = order | dict.fromkeys(_headlines(table, name), -1)
        main.append(min(every, key=lambda c, ranks=ranks: ranks.get(evaluation(c)[1], len(order))))  # type: ignore[misc]
    first = next((column for column in main if direction(column) > 0), None)
    return main if first is None else [first, *(column for column in main if column != first)]


def _headlines(table: pd.DataFrame, name: str) -> list[Any]:
    """The metric by which the trials say that an evaluation is judged; none where they do not agree."""
    column = f"eval_info.{name}.{HEADLINE}"
    values = list(table[column].dropna().unique()) if column in table else []
    return values if len(values) == 1 else []


def base_of(score: str) -> str:
    """The column of the untouched base's score."""
    name, metric = evaluation(score)
    return f"eval_info.{name}.base_{metric}.value"


def lower_is_better(score: str) -> bool:
    """Whether the smaller value of a score is the better one."""
    return direction(score) < 0


def better(score: str) -> Literal["higher", "lower"]:
    """The better side of a score, in words."""
    return "lower" if lower_is_better(score) else "higher"


def score_name(score: str) -> str:
    """Such as ``gsm8k accuracy``; ``perplexity`` alone where evaluation and metric are called the same."""
    judged, metric = evaluation(score)
    return judged if judged.endswith(metric) else f"{judged} {metric}"


def axis_name(score: str) -> str:
    """The name of a score for an axis, which says when less is better."""
    return score_name(score) + (" (lower is better)" if lower_is_better(score) else "")


def devices(table: pd.DataFrame) -> pd.Series[str]:
    """The device that each trial ran on, as far as it is recorded: the GPUs, or else the CPU and its threads.

    Seconds can be compared on one device alone; hosts with the same device count as one, and so do several GPUs of one
    model, as a trial runs on one of them. So the text also says how many trials shared the device, if they were
    several, and the versions of packages of which ``table`` has several.
    """
    gpus, processor, threads = (
        table[c].astype("string").fillna("") if c in table else pd.Series("", table.index, dtype="string")
        for c in (GPUS, PROCESSOR, THREADS)
    )
    on_cpu = processor.where(threads.eq("") | processor.eq(""), processor + ", " + threads + " threads")
    names = gpus.str.strip("[]").str.replace('"', "").str.split(", ")
    models = names.map(lambda all_names: ", ".join(dict.fromkeys(all_names)))
    found: pd.Series[str] = on_cpu.where(gpus.isin(["", "[]", "[null]"]), models)
    parts = [table[AT_ONCE].map(_at_once, na_action="ignore")] if AT_ONCE in table else []
    for package in VERSIONS:
        column = VERSION.format(package)
        if column in table and table[column].nunique() > 1:
            parts.append(f", {package} " + table[column].astype("string"))
    for part in parts:
        found = found.where(found.eq(""), found + part.astype("string").fillna(""))
    return _with_trained_by(table, found)


def _with_trained_by(table: pd.DataFrame, found: pd.Series[str]) -> pd.Series[str]:
    """The devices; of a trial that took an adapter trained on another, both, joined by ``SEVERAL``."""
    if TRAINED_BY not in table or "run_info.trial" not in table or table[TRAINED_BY].isna().all():
        return found
    by_name = dict(zip(table["run_info.trial"], found, strict=True))
    trained = table[TRAINED_BY].map(by_name, na_action="ignore").astype("string").fillna("")
    return found.where(trained.eq("") | trained.eq(found), trained + SEVERAL + found)


def _at_once(count: int) -> str:
    return f", {int(count)} at once" if count > 1 else ""


# ---- what was varied -------------------------------------------------------------------------------


def texts(table: pd.DataFrame, keys: Iterable[str]) -> dict[str, list[str]]:
    """Columns as text; empty where a trial has no such setting."""
    return {key: table[key].astype("string").fillna("").tolist() for key in keys}


def settings(table: pd.DataFrame) -> list[str]:
    """The columns that make a configuration: all choices and settings but the seed and what changes no number."""
    columns = [c for c in table.columns if c.startswith(naming.SETTINGS) and not c.startswith(naming.NO_SETTINGS)]
    # A trial with one evaluation more is the same configuration, unless the two disagree on one they share.
    return [c for c in columns if not c.startswith(naming.OF_SOME) or table[c].nunique(dropna=True) > 1]


def setting_columns(table: pd.DataFrame) -> list[str]:
    """The ``settings`` that differ between rows of ``table``."""
    return [c for c in settings(table) if table[c].nunique(dropna=False) > 1]


def names(table: pd.DataFrame, labelled: bool = True) -> Names:
    """What the settings and configurations of ``table`` are called, with the names some were given or without."""
    also = [c for c in (METHOD, naming.LABEL) if c in table and (labelled or c == METHOD)]
    return Names(texts(table, dict.fromkeys([*also, *setting_columns(table)])))


def named(table: pd.DataFrame) -> pd.Series[Any]:
    """What the configuration of each row is called."""
    return pd.Series(names(table).trials(), table.index, dtype=object)


def named_trials(table: pd.DataFrame) -> list[str]:
    """What each trial is called: its configuration, and its seed where seeds differ."""
    return names_of_trials(table).trials()


def names_of_trials(table: pd.DataFrame) -> Names:
    """What the settings and trials of ``table`` are called."""
    ours = [c for c in table.columns if c.startswith(naming.SETTINGS)]
    return naming.full_names(texts(table, ours))


def labels(table: pd.DataFrame, factors: Sequence[str], names: Names | None = None) -> pd.Series[Any]:
    """Each row's values of ``factors``, such as ``lora, 4bit, r=8``."""
    called = names or Names({})
    parts = [table[c].map(lambda value, c=c: called.setting(c, value)) for c in factors]
    rows = zip(*parts, strict=True) if parts else [()] * len(table)
    return pd.Series([", ".join(filter(None, row)) or "default" for row in rows], table.index, dtype=object)


def setting_in_words(factor: str, value: Any) -> str:
    """One value of a choice or setting; empty where the trial has no such setting."""
    return Names({}).setting(factor, value)


def level_name(factor: str, value: Any, names: Names | None = None) -> str:
    """One value of a choice or setting below the name of it."""
    return setting_in_words(QUANT, value) if factor == QUANT else (names or Names({})).value(factor, value)


def sortable(level: str) -> tuple[int, float, str]:
    """The key that sorts the levels of a factor: numbers by size, before words."""
    try:
        return 0, float(level), ""
    except ValueError:
        return 1, 0.0, level


def factor_name(column: str) -> str:
    """The name of a choice, a setting or a cost: ``target modules``, ``learning rate``."""
    return NAMES.get(column, column.rpartition(".")[2].replace("_", " "))


def file_mark(task: str) -> str:
    """What is added to the names of the figures of one of several tasks."""
    return "__" + re.sub(r"[^\w.]+", "-", task.lower()).strip("-")


def shortened(names: pd.Series[Any], longest: int = LONGEST) -> pd.Series[Any]:
    """Names in one line each, with the middle left out of long ones; different ones stay different."""
    every = list(dict.fromkeys(names))
    lines = naming.distinct([" ".join(str(name).split()) for name in every], longest)
    return names.map(dict(zip(every, lines, strict=True)))


def outcomes(merged: pd.DataFrame) -> pd.Series[Any]:
    """What did not succeed in each row of configurations, counted: ``2 failed, 1 oom``; empty where all did."""
    counts = merged[[name for name in NOT_SUCCESS if name in merged]].to_dict("records")
    return pd.Series([_counted(row) for row in counts], merged.index, dtype=object)


def outcome(rows: pd.DataFrame) -> str:
    """What did not succeed in all of these rows, of trials or of configurations, counted; empty where all did."""
    if STATUS in rows:
        return _counted(rows[STATUS].value_counts())
    return _counted(rows[[name for name in NOT_SUCCESS if name in rows]].sum())


def _counted(counts: Any) -> str:
    return ", ".join(f"{int(counts[name])} {name}" for name in NOT_SUCCESS if counts.get(name, 0))


def in_order_of_stages(found: Iterable[str]) -> list[str]:
    """Columns of stages (``memory.STAGE.x``, ``train_info.STAGE_seconds``) in the order of `STAGES`, others last."""
    places = {stage: place for place, stage in enumerate(STAGES)}
    return sorted(found, key=lambda c: places.get(c.split(".")[1].removesuffix("_seconds"), len(STAGES)))
