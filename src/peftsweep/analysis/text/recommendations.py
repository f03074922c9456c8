"""What to use, for which need and GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd

from peftsweep.analysis.statistics.task import Task
from peftsweep.analysis.table import columns
from peftsweep.analysis.table.columns import HOST_MEMORY, PREDICTED
from peftsweep.analysis.text import findings, words
from peftsweep.analysis.text.words import ADAPTER, SECONDS
from peftsweep.observe.display import size

QUALITY_LOSS = 0.05  # of the best figure, which may be lost where speed goes before quality
GPUS = (8, 12, 16, 24, 40, 48, 80)  # GB, the common sizes
# What tells whether a trial fits on a device, the best source first, and what to call it.
MEMORY = (
    ("memory.train.reserved_peak", "memory the allocator held on the device while training"),
    (PREDICTED, "predicted training memory"),
    (HOST_MEMORY.column, "memory of the whole process on the host, as no device was measured"),
)


def section(task: Task, mark: str, quality_loss: float) -> Iterator[str]:
    """What to use for each need, as a table of the report."""
    judged = [score for score in task.scores if len(task.compare(score)) and not findings.no_gain(task, score)]
    if not judged:
        return
    if max(len(task.compare(score)) for score in judged) < 2:
        yield from _room(task)
        return
    yield f"## Recommendations{mark}"
    yield ""
    for score in judged:
        needs: dict[Any, list[tuple[str, str]]] = {}
        for need, number, why in uses(task, score, quality_loss):
            needs.setdefault(number, []).append((need, why))
        yield from words.table(
            [
                {
                    "use": task.labels[number],
                    columns.score_name(score): findings.value_of(task, score, number),
                    "for": "; ".join(f"{need} ({why})" for need, why in reasons),
                }
                for number, reasons in needs.items()
            ]
        )
    yield from _room(task)


def _room(task: Task) -> Iterator[str]:
    """Where every configuration fits into the smallest GPU."""
    column, name = _memory(task.configurations)
    known = task.configurations[column].dropna() if column else pd.Series(dtype=float)
    if len(known) and known.max() <= GPUS[0] * 1e9:
        all_known = "Every configuration" if len(known) == len(task.configurations) else "What succeeded"
        yield f"{all_known} fits into {GPUS[0]} GB: at most {size(known.max())} of {name}."
        yield ""


def _memory(configs: pd.DataFrame) -> tuple[str | None, str]:
    """The column that tells what a trial needs, and what it is."""
    return next(((c, name) for c, name in MEMORY if c in configs and configs[c].notna().any()), (None, ""))


def uses(task: Task, score: str, quality_loss: float) -> Iterator[tuple[str, Any, str]]:
    """What to use for each need: the need, the configuration, and why."""
    compared, configs = task.compare(score), task.configurations
    tied, near = task.tied(score), task.near(score)
    best, useful = compared.index[0], task.useful(score)
    if len(compared) == 1:
        yield "what was measured", best, "the only one with this score"
        return
    if best in useful:
        yield "quality", best, "the best figure" + (f", in a tie with {len(tied) - 1} more" if len(tied) > 1 else "")
    else:
        yield "quality", useful[0], "the best figure of those that are shown to be better than the untouched base"
    for need, column in (("small adapter", ADAPTER), ("fast training", SECONDS), ("little memory", task.memory)):
        known = configs.loc[near, column].dropna() if column and column in configs else pd.Series(dtype=float)
        if column == SECONDS and not task.one_place(known.index):
            continue
        if len(known) > 1 and column and known.max() > 1.01 * known.min():
            of = f", of the {len(known)} of {len(near)} whose figure is known" if len(known) < len(near) else ""
            yield f"{need} at that quality", known.idxmin(), f"{words.cost(column, known.min())}{of}"
    yield from _fitting(task, compared.loc[useful])
    yield from _faster(task, score, near, quality_loss)


def _faster(task: Task, score: str, near: pd.Index[Any], quality_loss: float) -> Iterator[tuple[str, Any, str]]:
    """The fastest configuration that loses no more quality than ``quality_loss``, a share of the best figure.

    The whole 95% interval of its loss must lie within that, and it must be better than the untouched base.
    """
    compared, configs, sign = task.compare(score), task.configurations, columns.direction(score) or 1
    if SECONDS not in configs or not compared["value"].gt(0).all():
        return
    best = compared.iloc[0]
    bound = quality_loss if best["scale"] == "ratio" else quality_loss * best["value"]
    loss = -compared["low"] if sign > 0 else compared["high"]
    enough = compared.index[(loss <= bound).to_numpy() & compared.index.isin(task.useful(score))]
    seconds = configs.loc[enough, SECONDS].dropna().astype(float)
    if seconds.empty or (fast := seconds.idxmin()) in near or seconds[fast] > configs.loc[near, SECONDS].min():
        return
    if not task.one_place(seconds.index.union(near)):
        return
    lost = f"at {words.difference(compared.loc[fast])} from the best"
    most = f"a loss of at most {words.amount(bound, best['scale'])} is accepted, {quality_loss:.0%} of the best"
    yield "speed before quality", fast, f"{words.cost(SECONDS, seconds[fast])}, {lost}; {most}"


def _fitting(task: Task, compared: pd.DataFrame) -> Iterator[tuple[str, Any, str]]:
    """The best configuration for each size of GPU, where the size makes a difference."""
    configs = task.configurations
    column, name = _memory(configs)
    if column is None or configs[column].max() <= GPUS[0] * 1e9:
        return
    need = configs.loc[compared.index, column]
    answers: list[tuple[int, Any]] = []
    for gigabytes in GPUS:
        fits = compared.index[(need <= gigabytes * 1e9).to_numpy(dtype=bool, na_value=False)]
        if len(fits) and (not answers or answers[-1][1] != fits[0]):
            answers.append((gigabytes, fits[0]))
    of = f", of the {need.count()} of {len(need)} whose memory is known" if need.isna().any() else ""
    for gigabytes, number in answers:
        yield f"{gigabytes} GB of memory", number, f"{size(need[number])} {name}{of}"
