"""The rungs of halving: the steps at which trials are compared, and their entries in a record."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from peftsweep.errors import InputError
from peftsweep.schema import HalvingConfig, Resource
from peftsweep.study import record
from peftsweep.study.record import Result, Status
from peftsweep.study.scores import is_minimized

TRAINED_STATUSES = (Status.stopped, Status.success)
PATIENCE, PRUNED = "patience", "pruned"  # reasons to stop a trial early that are not a rung
PREFIX = "validation_"  # before the name of a metric in the rows of steps.jsonl


def rung_step(config: HalvingConfig, number: int) -> int:
    """The optimizer steps up to rung ``number``, counted from 1."""
    assert config.min_steps is not None
    return int(config.min_steps * config.factor ** (number - 1))


def stop_at(config: HalvingConfig, total: int) -> int | None:
    """The step at which a trial of ``total`` steps stops for its rung; None: it runs to its end, test rows included."""
    if config.rung is not None and config.resource is Resource.rows:
        return total  # with its part of the rows it takes all steps, and skips the test rows
    if config.rung is not None and config.min_steps is not None:
        step = rung_step(config, config.rung)
        if step * config.factor <= total:
            return step
    return None if config.test else total


def reached(config: HalvingConfig, done: Result) -> bool:
    """Whether the trial of the record ``done`` has reached the rung that is requested now."""
    if done.status is not Status.stopped:
        return True
    step = stop_at(config, course(done, config).total)
    return step is not None and bool(step <= done.run_info["rung"]["step"])


def going_on(config: HalvingConfig, trials: int, number: int) -> int:
    """How many of ``trials`` trials that began go on from rung ``number``, counted from 1; at least one."""
    return int(max(1, trials // config.factor**number))


def begins(config: HalvingConfig) -> float | None:
    """The steps, or the fraction of the rows, of the first rung; None if every trial runs to its end."""
    return config.min_fraction if config.resource is Resource.rows else config.min_steps


def fraction(config: HalvingConfig, number: int) -> float:
    """The fraction of the training rows at rung ``number``, counted from 1; 1 if it would exceed 1 / factor."""
    assert config.min_fraction is not None
    part = config.min_fraction * config.factor ** (number - 1)
    return part if part * config.factor <= 1 + 1e-9 else 1.0


@dataclass(frozen=True)
class Stage:
    """The part of a sweep between two rungs: how many trials train which part of their whole training."""

    trials: int
    begin: float  # share of the training that they have behind them
    end: float


def stages(config: HalvingConfig, trials: int, steps: int, *, in_epochs: bool = False) -> list[Stage]:
    """The stages of halving of ``trials`` trials of ``steps`` steps each, if all of them train.

    With ``resource=rows`` each stage begins anew; its steps follow from its rows only where they are set by epochs.
    """
    found: list[Stage] = []
    begin, left = 0.0, trials
    for number in count(1):
        rows = config.resource is Resource.rows
        end = fraction(config, number) if rows else rung_step(config, number) / steps if steps else 1.0
        if (left == 1 and number > 1) or end * config.factor > 1 + 1e-9:
            end = 1.0
        found.append(Stage(left, begin, 1.0 if rows and not in_epochs else end))
        if end == 1.0:
            return found
        begin, left = 0.0 if rows else end, going_on(config, trials, number)
    raise AssertionError


def stop(place: Path, why: str, step: int, metric: str) -> dict[str, Any]:
    """The record's entry for the trial in ``place`` that ended early at ``step``, for the reason ``why``."""
    key, known = f"{PREFIX}{metric}", _validations(place)
    values = {at: row[key] for at, row in known.items() if at <= step and row.get(key) is not None}
    sign = 1 if is_minimized(metric) else -1
    best = min(values, key=lambda at: (sign * values[at], at), default=None)
    facts = {"why": why, "step": step, "metric": metric, "value": values.get(step)}
    return facts | {"best_step": best, "best_value": None if best is None else values[best]}


def rung(config: HalvingConfig, place: Path, step: int) -> dict[str, Any]:
    """The record's entry for the rung at which the trial in ``place`` stopped: its number, step, metric and value.

    Raises:
        InputError: the validation does not have that metric.
    """
    known = validated(place, step)
    if config.metric not in known:
        raise InputError(f"halving.metric={config.metric}: the validation has {', '.join(known)}")
    number = next(n for n in count(1) if config.min_steps is None or rung_step(config, n) >= step)
    return {"number": number, "step": step, "metric": config.metric, "value": known[config.metric]}


def validated(place: Path, step: int) -> dict[str, float]:
    """The metrics of the validation after ``step`` steps of the trial in ``place``."""
    return validation_scores(_validations(place).get(step, {}))


def validation_scores(row: Mapping[str, Any]) -> dict[str, Any]:
    """The scores of the validation in a row of steps.jsonl, by their names; empty if the row is of none."""
    return {key.removeprefix(PREFIX): value for key, value in row.items() if key.startswith(PREFIX)}


def _validations(place: Path) -> dict[int, dict[str, Any]]:
    """The rows of the trial's validations in steps.jsonl, by step."""
    rows = record.usable_lines(place / record.STEPS, record.STEP)
    return {row["step"]: row for row in rows if f"{PREFIX}loss" in row}


@dataclass(frozen=True)
class Course:
    """The course of a trial: its total steps, and the metric at each passed rung and at its end."""

    total: int
    values: list[float | None]


def course(result: Result, config: HalvingConfig) -> Course:
    """The course of a trial by its validations."""
    place = (result.folder or Path()).parent / result.train_info.get("trained_by", result.trial)
    validations = _validations(place)
    total = next((int(row["steps"]) for row in validations.values()), 0)
    values: list[float | None] = []
    if config.resource is Resource.rows:
        row = validations.get(total)
        return Course(total, [] if row is None else [row.get(f"{PREFIX}{config.metric}")])
    for number in count(1):
        step = stop_at(dataclasses.replace(config, rung=number, test=True), total)
        if (row := validations.get(total if step is None else step)) is not None:
            values.append(row.get(f"{PREFIX}{config.metric}"))
        if step is None or row is None:
            return Course(total, values)
    raise AssertionError
