"""Figures of what trials cost: latency, memory by stage, memory predicted."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pandas as pd

from peftsweep.analysis.figures.axes import (
    GREY,
    INK,
    RULE,
    SERIES,
    add_legend,
    draw_facets,
    new_figure,
    of_several_places,
    room_for_names,
    series_labels,
    series_styles,
    with_caption,
)
from peftsweep.analysis.table import columns
from peftsweep.analysis.table.columns import Cost


def latency(merged: pd.DataFrame) -> Any:
    """Time of a text by category of prompts, and the overhead over the base with its interval."""
    suffix = ".adapted.seconds_p50"
    found = [c for c in merged.columns if c.startswith("generation_info.") and c.endswith(suffix)]
    kinds = [c.removeprefix("generation_info.").removesuffix(suffix) for c in found if columns.measured(merged, c)]
    kinds = [kind for kind in kinds if kind != "overall"]
    if not kinds:
        return None
    rows, chosen = room_for_names(merged[merged[found].notna().any(axis=1)], (SERIES - 1) // 2)
    time, over = Cost("", "median time of a text", "seconds"), "overhead over the base (%)"
    prefix = "generation_info.{}.{}."
    largest = max(rows[prefix.format(kind, "adapted") + "seconds_p50"].max() for kind in kinds)
    factor, time_name = time.scale(largest)
    drawn = []
    for kind, variant in itertools.product(kinds, ("base", "adapted", "merged")):
        column = prefix.format(kind, variant) + "seconds_p50"
        overhead = prefix.format(kind, variant) + "overhead."
        if column not in rows:
            continue
        of = rows if variant != "base" else _bases(rows, column)
        series = of["label"] + f", {variant}" if variant != "base" else of["label"]
        plain = {"x": kind, "series": series, "mark": ""}
        drawn.append(pd.DataFrame({"value": of[column] / factor, "panel": time_name, **plain}))
        if overhead + "value" in of:
            known = [part for part in ("value", "low", "high") if overhead + part in of]  # few runs have no interval
            percent = {part: (of[overhead + part].astype(float) - 1) * 100 for part in known}
            drawn.append(pd.DataFrame({**percent, "panel": over, **plain}))
    long = pd.concat(drawn).reindex(columns=["panel", "series", "x", "value", "low", "high", "mark"])
    long["x"] = pd.Categorical(long["x"], kinds, ordered=True)
    parts = [chosen, "bars: 95% interval over paired runs", of_several_places(merged, [time])]
    note = "; ".join(filter(None, parts))
    return draw_facets(long, series_styles(list(long["series"])), "category of prompts", rows, joined=True, note=note)


def _bases(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """A row for the untouched base of each quantisation, with the mean of what was measured of it."""
    if columns.QUANT not in rows or rows[columns.QUANT].nunique() < 2:
        return rows[:1].assign(label="untouched base", **{column: rows[column].mean()})
    means = rows.groupby(columns.QUANT)[column].transform("mean")
    found = rows.assign(**{column: means}).drop_duplicates(columns.QUANT)
    names = [f"untouched base, {columns.setting_in_words(columns.QUANT, quant)}" for quant in found[columns.QUANT]]
    return found.assign(label=names)


def memory_stages(merged: pd.DataFrame) -> Any:
    """The peak of memory in each stage of a trial."""
    device = columns.measured(merged, columns.DEVICE_MEMORY.column)
    ending = ".allocated_peak" if device else ".rss_peak"
    peaks = [c for c in merged.columns if c.startswith("memory.") and c.endswith(ending)]
    peaks = columns.in_order_of_stages(c for c in peaks if columns.measured(merged, c))
    if len(peaks) < 2:
        return None
    rows, chosen = room_for_names(merged[merged[peaks].notna().any(axis=1)], SERIES)
    cost = Cost("", f"peak memory {'on the device' if device else 'of the process'}", "bytes")
    factor, name = cost.scale(rows[peaks].max().max())
    held = "" if device else "with the libraries, and what trials before it in the process left allocated"
    note = "; ".join(filter(None, [chosen, held]))
    stages = {c: c.removeprefix("memory.").removesuffix(ending) for c in peaks}
    table = rows[["label", *peaks]].rename(columns=stages)
    long = table.melt("label", var_name="x", value_name="value").rename(columns={"label": "series"})
    long = long.assign(value=long["value"] / factor, low=np.nan, high=np.nan, mark="", panel=name)
    long["x"] = pd.Categorical(long["x"], list(stages.values()), ordered=True)
    return draw_facets(long, series_styles(list(rows["label"])), "stage of a trial", merged, joined=True, note=note)


def memory_predicted(merged: pd.DataFrame) -> Any:
    """Predicted against measured training memory; on the line they agree."""
    predicted, error = columns.PREDICTED, columns.PREDICTION_ERROR
    if not columns.measured(merged, error):
        return None
    rows = merged[merged[error].notna() & merged[predicted].notna()]
    measured = rows[predicted] / (1 + rows[error])
    if len(rows) < 2:
        return None
    largest = max(rows[predicted].max(), measured.max())
    factor, _ = Cost("", "", "bytes").scale(largest)
    unit = Cost("", "", "bytes").scale(largest)[1].strip()
    series = series_labels(rows, merged.attrs["factors"][:1])
    levels = list(series) if series.nunique() <= SERIES else []
    styles = {name: look | {"linestyle": "none"} for name, look in series_styles(levels).items()}
    figure, (ax,) = new_figure(1, 4.6, 4.4)
    for label, place in rows.groupby(series, sort=False).groups.items():
        look = styles.get(str(label), GREY | {"linestyle": "none"})
        ax.plot(measured[place] / factor, rows.loc[place, predicted] / factor, **look)
    top = 1.08 * largest / factor
    ax.plot([0, top], [0, top], color=INK, linewidth=0.9)
    ax.fill_between([0, top], [0, 0.9 * top], [0, 1.1 * top], color=RULE, zorder=0, linewidth=0)
    ax.set(xlim=(0, top), ylim=(0, top), aspect="equal", xlabel=f"measured {unit}", ylabel=f"predicted {unit}")
    add_legend(figure, styles)
    return with_caption(figure, merged, "on the line they agree, grey within 10%")
