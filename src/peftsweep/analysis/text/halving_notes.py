"""What a halving saved, and how well each rung predicted the next one."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from peftsweep.observe.display import size
from peftsweep.schema import HalvingConfig, Resource
from peftsweep.study import store
from peftsweep.study.record import Result, Status, trials_in_words
from peftsweep.study.rungs import TRAINED_STATUSES, course

MIN_PAIRS = 3  # pairs below which a correlation says nothing


# ---- what it cost, and what it may have missed -----------------------------------------------------


def notes(results: Iterable[Result]) -> list[str]:
    """Lines for each halving among the records: the steps that it saved, and how well each rung predicted the next."""
    sweeps: dict[tuple[Any, ...], list[Result]] = {}
    of_rows: dict[tuple[Any, ...], list[Result]] = {}
    for result in results:
        halving = result.config.get("halving") or {}
        if (
            halving.get("min_fraction") is not None
            and result.status in TRAINED_STATUSES
            and "steps" in result.train_info
        ):
            of_rows.setdefault((halving["metric"], halving["factor"], halving["min_fraction"]), []).append(result)
        if halving.get("min_steps") is not None and result.status in TRAINED_STATUSES and "steps" in result.train_info:
            sweeps.setdefault((halving["metric"], halving["factor"], halving["min_steps"]), []).append(result)
    lines = [line for halving, group in sweeps.items() for line in _notes(group, HalvingConfig(*halving))]
    for (metric, factor, part), group in of_rows.items():
        config = HalvingConfig(metric, factor, resource=Resource.rows, min_fraction=part)
        lines += _notes_of_rows(group, config)
    return lines


def _notes(results: Sequence[Result], config: HalvingConfig) -> list[str]:
    courses = [course(one, config) for one in results]
    # One that sweep=tune stopped at its end, before its test rows, could not have won otherwise.
    early = zip(results, courses, strict=True)
    stopped = [one for one, its in early if one.status is Status.stopped and one.train_info["steps"] < its.total]
    trained, total = sum(one.train_info["steps"] for one in results), sum(one.total for one in courses)
    files = [file for one in stopped if one.folder for file in one.folder.glob(f"{store.CHECKPOINTS}/*")]
    kept = size(sum(_bytes(file) for file in files))
    line = (
        f"halving by {config.metric}: {trained:,} of {total:,} steps trained ({trained / max(total, 1):.0%}); "
        f"{trials_in_words(len(stopped))} stopped, any of which may have won in the end; their checkpoints hold {kept}"
    )
    lines = [line] if stopped else []  # a league trains all to their ends
    for place in range(max(len(one.values) for one in courses) - 1):
        pairs = [(one.values[place], one.values[place + 1]) for one in courses if len(one.values) > place + 1]
        lines.append(f"rung {place + 1} against the next: {_correlation(pairs)}")
    return lines


def _notes_of_rows(results: Sequence[Result], config: HalvingConfig) -> list[str]:
    """As `_notes`, where each rung of a point is a trial of its own, on a fraction of the rows."""
    points: dict[str, dict[float, Result]] = {}
    for one in results:
        apart = {"dataset": one.config["dataset"] | {"fraction": None}, "halving": None, "label": None, "force": None}
        tree = one.config | apart  # what the rungs of a point have in common
        points.setdefault(json.dumps(tree, sort_keys=True), {})[float(one.config["dataset"]["fraction"])] = one
    trained = sum(one.train_info["steps"] for one in results)
    total = sum(max(one.train_info["steps"] / part for part, one in rungs.items()) for rungs in points.values())
    stopped = sum(max(rungs) < 1 for rungs in points.values())
    lines = [
        f"halving by {config.metric}, of rows: {trained:,} of about {total:,.0f} steps trained "
        f"({trained / max(total, 1):.0%}); {stopped} points were not trained on all rows, any of which may have won"
    ]
    parts = sorted({part for rungs in points.values() for part in rungs})
    for place, (part, following) in enumerate(itertools.pairwise(parts), start=1):
        both = [(rungs[part], rungs[following]) for rungs in points.values() if {part, following} <= rungs.keys()]
        pairs = [(_last(first, config), _last(then, config)) for first, then in both]
        lines.append(f"rung {place} ({part:.3g} of the rows) against the next: {_correlation(pairs)}")
    return lines


def _last(one: Result, config: HalvingConfig) -> float | None:
    return next(iter(course(one, config).values), None)


def _bytes(file: Path) -> int:
    """The size of the file; 0 where a running sweep has just deleted it."""
    try:
        return file.stat().st_size
    except OSError:
        return 0


def _correlation(pairs: Sequence[tuple[float | None, float | None]]) -> str:
    """Spearman's rank correlation of the two values, in words."""
    from peftsweep.analysis.statistics import rungs

    known = [[math.nan if value is None else value for value in pair] for pair in pairs]
    found = rungs.rank_correlation([pair[0] for pair in known], [pair[1] for pair in known])
    if found.n < MIN_PAIRS:
        return f"{found.n} trials went on, too few for a correlation"
    return f"rank correlation {found.rho:.2f} (Spearman, the {found.n} trials that went on)"
