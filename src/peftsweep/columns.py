"""What the columns of a table of trials say: what was varied, what is a score or a cost, and its name in words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from peftsweep import stats
from peftsweep.record import Status

RANK, STATUS = "config.method.r", "run_info.status"
METHOD, QUANT, TARGETS = "choices.method", "choices.quant", "choices.targets"
SHORT = {"learning_rate": "lr", "target_modules": "modules"}
LONGEST = 48  # characters of a label
MAIN_METRICS = ("accuracy", "acc_norm", "acc", "label_acc", "f1", "perplexity")  # of an evaluation, the first it has
NOT_SUCCESS = tuple(s.name for s in Status if s is not Status.success)
UNITS = {
    "bytes": ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")),
    "seconds": ((7200.0, "h"), (300.0, "min"), (1.0, "s"), (1e-3, "ms")),
}


@dataclass(frozen=True)
class Cost:
    """A column that is better when smaller; ``unit`` is bytes, seconds, or empty for a plain number."""

    column: str
    name: str
    unit: str = ""

    def scale(self, largest: float) -> tuple[float, str]:
        """What to divide values up to ``largest`` by, and the name with the unit they then have."""
        for factor, sign in UNITS.get(self.unit, ()):
            if largest >= factor:
                return factor, f"{self.name} ({sign})"
        return 1.0, f"{self.name} ({self.unit})" if self.unit else self.name


DEVICE_MEMORY = Cost("memory.train.allocated_peak", "training memory, device", "bytes")
HOST_MEMORY = Cost("memory.train.rss_peak", "training memory, host", "bytes")
TRAINING_TIME = Cost("train_info.train_seconds", "training time", "seconds")
ADAPTER = Cost("train_info.adapter_bytes", "adapter on disk", "bytes")
TRAINABLE = Cost("train_info.trainable_parameters", "trainable parameters")
LATENCY = Cost("generation_info.overall.adapted.seconds_p50", "generation of a text, median", "seconds")


def costs(table: pd.DataFrame) -> list[Cost]:
    """What the trials cost, as far as it was measured; memory is the device's, and the process's on a CPU."""
    memory = DEVICE_MEMORY if measured(table, DEVICE_MEMORY.column) else HOST_MEMORY
    return [c for c in (memory, TRAINING_TIME, ADAPTER, TRAINABLE, LATENCY) if measured(table, c.column)]


def measured(table: pd.DataFrame, column: str) -> bool:
    """Whether the column is there and holds a value."""
    return column in table and bool(table[column].notna().any())


def main_scores(table: pd.DataFrame) -> list[str]:
    """One score an evaluation: the metric that it is judged by."""
    found: dict[str, list[str]] = {}
    for column in stats.scores(table):
        found.setdefault(stats.evaluation(column)[0], []).append(column)
    order = {name: place for place, name in enumerate(MAIN_METRICS)}
    return [min(every, key=lambda c: order.get(stats.evaluation(c)[1], len(order))) for every in found.values()]


def base_of(score: str) -> str:
    """The column of the untouched base's score."""
    evaluation, metric = stats.evaluation(score)
    return f"eval_info.{evaluation}.base_{metric}.value"


def lower_is_better(score: str) -> bool:
    """Whether the smaller value of a score is the better one."""
    return stats.direction(score) < 0


def score_name(score: str) -> str:
    """Such as ``gsm8k accuracy``, or ``perplexity (lower is better)``."""
    evaluation, metric = stats.evaluation(score)
    name = evaluation if evaluation.endswith(metric) else f"{evaluation} {metric}"
    return name + (" (lower is better)" if lower_is_better(score) else "")


# ---- what was varied -------------------------------------------------------------------------------


def labels(table: pd.DataFrame, factors: Sequence[str]) -> pd.Series[Any]:
    """What each row is called: its values of ``factors``, such as ``lora, 4bit, r=8``."""
    parts = [table[c].map(lambda value, c=c: in_words(c, value)) for c in factors]
    if not parts:
        names = table[METHOD] if METHOD in table else pd.Series("", table.index)
        return names.astype(str).map(shortened)
    rows = zip(*parts, strict=True)
    return pd.Series([shortened(", ".join(filter(None, row)) or "default") for row in rows], table.index, dtype=object)


def in_words(factor: str, value: Any) -> str:
    """One value of a choice or setting; empty where the trial has no such setting."""
    if pd.isna(value):
        return ""
    if factor == QUANT and value == "none":
        return "unquantised"
    if factor.startswith("choices."):
        return f"{factor.rpartition('.')[2]} {value}" if value in ("default", "none") else str(value)
    name = factor.rpartition(".")[2]
    text = f"{value:g}" if isinstance(value, float) else str(value)
    if isinstance(value, str) and value.startswith('["'):  # a list of names, kept as JSON
        text = "+".join(map(str, json.loads(value)))
    return f"{SHORT.get(name, name)}={text}"


def factor_name(factor: str) -> str:
    """The name of a choice or setting, for an axis."""
    return "rank" if factor == RANK else factor.rpartition(".")[2].replace("_", " ")


def shortened(text: str) -> str:
    """``text`` in one line, with its middle left out where it is long."""
    line = " ".join(text.split())
    half = LONGEST // 2
    return line if len(line) <= LONGEST else f"{line[: half - 1]}…{line[-half:]}"


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


def trials_in_words(count: int) -> str:
    """``1 trial``, ``2 trials``."""
    return f"{count} trial" + ("s" if count != 1 else "")
