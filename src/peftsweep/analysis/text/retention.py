"""How much an adapter lost in other abilities, and at which of its scales the most of them is kept.

A trial with evaluations of both roles holds its scores at fractions of the adapter's scale (``train_info.scales``);
the base is at 0 and the adapter as it was trained at 1.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pandas as pd
from scipy import special

from peftsweep.analysis.answer.structure import ScaleCurve, ScaleScore
from peftsweep.analysis.statistics.intervals import ALPHA
from peftsweep.analysis.table import columns
from peftsweep.schema import Role
from peftsweep.study.scores import is_minimized

SCALES = "train_info.scales"
Z = float(special.ndtri(1 - ALPHA / 2))  # standard errors to each side of a 95% interval


def curves(record: Mapping[str, Any], evaluations: Mapping[str, Mapping[str, Any]]) -> list[ScaleCurve]:
    """The curves of a trial, from ``train_info`` and ``eval_info`` of its record.

    There are none where it was not scored at several scales.
    """
    rows = record.get("scales") or []
    found = []
    for name, role, metric in dict.fromkeys((row["eval"], row["role"], row["metric"]) for row in rows):
        points = [
            ScaleScore(row["scale"], row["value"], row["stderr"])
            for row in rows
            if (row["eval"], row["metric"]) == (name, metric) and row["value"] is not None
        ]
        facts = evaluations.get(name, {})
        for scale, key in ((0.0, f"base_{metric}"), (1.0, metric)):
            if (score := facts.get(key)) and score["value"] is not None:
                points.append(ScaleScore(scale, score["value"], score["stderr"]))
        better: Any = "lower" if is_minimized(metric) else "higher"
        found.append(ScaleCurve(name, metric, role, better, sorted(points, key=lambda one: one.scale)))
    return found


def keeps_most(found: Iterable[ScaleCurve], retention: ScaleCurve) -> float | None:
    """The scale at which ``retention`` is best, of those at which each target's score is within its interval at 1."""
    targets = [one for one in found if one.role == Role.target.value]
    scales = [one.scale for one in retention.points if all(_within(target, one.scale) for target in targets)]
    values = {one.scale: retention.sign * one.value for one in retention.points}
    return max(scales, key=lambda scale: (values[scale], scale), default=None)


def _within(curve: ScaleCurve, scale: float) -> bool:
    """Whether the score at ``scale`` is no worse than the lower end of the 95% interval at 1."""
    here, whole = curve.score_at(scale), curve.score_at(1.0)
    if here is None or whole is None:
        return False
    return curve.sign * (here.value - whole.value) >= -Z * (whole.stderr or 0.0)


def table_curves(table: pd.DataFrame) -> Iterator[tuple[str, list[ScaleCurve]]]:
    """The name and curves of each trial of the table that was scored at several scales."""
    if SCALES not in table:
        return
    for (_, row), name in zip(table.iterrows(), columns.named_trials(table), strict=True):
        if not isinstance(row[SCALES], str):
            continue
        rows, scores = json.loads(row[SCALES]), dict[str, dict[str, Any]]()
        for name_of, metric in {(one["eval"], one["metric"]) for one in rows}:
            for key in (metric, f"base_{metric}"):
                parts = {part: row.get(f"eval_info.{name_of}.{key}.{part}") for part in ("value", "stderr")}
                if pd.notna(parts["value"]):
                    scores.setdefault(name_of, {})[key] = parts
        yield str(name), curves({"scales": rows}, scores)


def notes(trials: Iterable[tuple[str, list[ScaleCurve]]]) -> Iterator[str]:
    """A line for each trial (its name and curves) and each of its evaluations with the role ``retention``."""
    for name, found in trials:
        for retention in (one for one in found if one.role == Role.retention.value):
            if (scale := keeps_most(found, retention)) is not None:
                yield _line(name, found, retention, scale)


def _line(name: str, found: Iterable[ScaleCurve], retention: ScaleCurve, scale: float) -> str:
    def value(curve: ScaleCurve, at: float) -> str:
        point = curve.score_at(at)
        return "?" if point is None else f"{point.value:.3f}"

    targets = [one for one in found if one.role == Role.target.value]
    quality = ", ".join(
        f"{one.evaluation} {one.metric} {value(one, scale)} (whole {value(one, 1.0)})" for one in targets
    )
    kept = f"{retention.evaluation} {retention.metric} {value(retention, scale)}"
    beside = f"whole {value(retention, 1.0)}, base {value(retention, 0.0)}"
    if scale == 1.0:
        base = value(retention, 0.0)
        return f"{name}: keeps most of {retention.evaluation} as it is: {kept} (base {base}); {quality}"
    where = "without the adapter" if scale == 0.0 else f"at {scale:g} of its scale"
    return (
        f"{name}: keeps most of {retention.evaluation} {where}: {kept} ({beside}), with {quality}, within the interval"
    )
