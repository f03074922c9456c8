"""What adapters kept of what the base could do, as a section of the answer: a curve a trial over its scales."""

from __future__ import annotations

from typing import Any

import pandas as pd

from peftsweep.analysis.answer.structure import (
    RETENTION,
    Column,
    Kept,
    Retention,
    ScaleCurve,
    Section,
    Table,
)
from peftsweep.analysis.text import retention, words
from peftsweep.schema import Role

MAX_ROWS = 100  # rows of the table


def section(table: pd.DataFrame) -> Section | None:
    """The scales and the one that keeps most, of each trial that was scored so; None where none was."""
    trials = [(name, found) for name, found in retention.table_curves(table) if found]
    if not trials:
        return None
    rows = [row for name, found in trials for row in _rows(name, found)]
    columns = [Column("trial", "trial"), Column("scale", "scale", "score")]
    columns += [Column(key, key, "score") for key in dict.fromkeys(_key(one) for _, found in trials for one in found)]
    note = "Scale 0 is the untouched base, 1 the adapter as it was trained; in brackets: 95% intervals."
    shown = Table("Scores by the adapter's scale", columns, rows[:MAX_ROWS], note, max(0, len(rows) - MAX_ROWS))
    sentences = [words.escaped(line) + "." for line in retention.notes(trials)]
    return Section(RETENTION, "What was kept", sentences, Retention([_facts(*one) for one in trials]), [shown])


def _rows(name: str, found: list[ScaleCurve]) -> list[dict[str, Any]]:
    """A row a scale, with each evaluation's score and its interval."""
    rows = []
    for scale in sorted({point.scale for curve in found for point in curve.points}):
        row: dict[str, Any] = {"trial": name, "scale": scale}
        for curve in found:
            if (point := curve.score_at(scale)) is not None:
                key = _key(curve)
                row[key] = point.value
                if point.stderr is not None:
                    half = retention.Z * point.stderr
                    row |= {f"{key}.low": point.value - half, f"{key}.high": point.value + half}
        rows.append(row)
    return rows


def _key(curve: ScaleCurve) -> str:
    return f"{curve.evaluation} {curve.metric} ({curve.role})"


def _facts(name: str, found: list[ScaleCurve]) -> Kept:
    most = {one.evaluation: retention.keeps_most(found, one) for one in found if one.role == Role.retention.value}
    return Kept(name, most, found)
