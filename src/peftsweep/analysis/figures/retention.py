"""The figure of what adapters have cost elsewhere: quality against what was kept, by the adapter's scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from peftsweep.analysis.answer.structure import ScaleCurve
from peftsweep.analysis.figures.axes import GREY, INK, SERIES, add_legend, new_figure, series_styles, with_caption
from peftsweep.analysis.text import retention
from peftsweep.schema import Role


def kept(table: pd.DataFrame) -> Any:
    """A line a trial from the base to the whole adapter; a ring is where most is kept within the target's interval."""
    trials = [(name, found, both) for name, found in retention.table_curves(table) if (both := _both(found))]
    if not trials:
        return None
    names = [name for name, *_ in trials]
    styles = series_styles(names, names[:SERIES])
    figure, (ax,) = new_figure(1, 5.2, 3.8)
    for name, found, (target, old) in trials:
        points = {one.scale: (one.value, there.value) for one in old.points if (there := target.score_at(one.scale))}
        ax.plot(*zip(*points.values(), strict=True), **styles.get(name, GREY | {"alpha": 0.4}), linewidth=1)
        if (best := retention.keeps_most(found, old)) in points:
            ax.plot(*points[best], marker="o", markersize=11, fillstyle="none", color=INK, linestyle="none")
    target, old = trials[0][2]
    ax.set(xlabel=f"{old.evaluation} {old.metric}", ylabel=f"{target.evaluation} {target.metric}")
    add_legend(figure, styles)
    scales = "scales 0 (the base) to 1 (the whole adapter)"
    return with_caption(figure, table, f"{scales}; ring: keeps most within the interval at 1")


def _both(found: Sequence[ScaleCurve]) -> tuple[ScaleCurve, ScaleCurve] | None:
    """The first target and the first evaluation of what is to be kept; None where one is missing."""
    first = [next((one for one in found if one.role == role.value), None) for role in (Role.target, Role.retention)]
    return (first[0], first[1]) if first[0] and first[1] else None
