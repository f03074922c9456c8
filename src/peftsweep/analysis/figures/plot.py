"""Figures of a study, each of one function of a table: quality, what it costs, and how it came about.

Series differ in colour and in marker and line, so that a figure in grey says the same. What has no number
because the trial failed, ran out of memory, was refused or stopped is marked by that word, or counted below.
"""

from __future__ import annotations

import functools
import itertools
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from peftsweep.analysis.figures.axes import (
    CALLED,
    COLOURS,
    FADED,
    GREY,
    INK,
    LABEL_OFFSET,
    QUANTS,
    RULE,
    WIDTHS,
    add_legend,
    best_first,
    draw_facets,
    error_bars,
    first_word_of,
    log_axis,
    name_points,
    new_figure,
    of_several_places,
    panel_rows,
    room_for_names,
    scale,
    series_labels,
    series_styles,
    spans_a_decade,
    with_caption,
)
from peftsweep.analysis.figures.costs import latency, memory_predicted, memory_stages
from peftsweep.analysis.figures.retention import kept
from peftsweep.analysis.statistics import trials as statistics_trials
from peftsweep.analysis.statistics.frontier import front as frontier_of
from peftsweep.analysis.statistics.task import Task, study_tasks
from peftsweep.analysis.table import columns
from peftsweep.analysis.table.columns import QUANT, RANK, TARGETS, Cost
from peftsweep.analysis.text import words
from peftsweep.study.atomic import replacing

TASKS = 4  # pairs of model and dataset with figures: those of the most trials
EVALUATIONS = 4  # with figures of their own; report.html has all
BARS = 40  # configurations a figure of bars has room for
EACH = 400  # configurations of a frontier that are drawn one by one; of more, those it dominates are grey dots
NAMED = 160  # letters of names in a panel of a frontier, the best points first
CURVES = 100  # trials whose curves are drawn
SPREADS = "bars: 95% interval of scores, standard deviation of costs"
KINDS = ("png", "svg")
STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "figure.constrained_layout.use": True,
    "figure.dpi": 100,
    "font.size": 8,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.3,
    "lines.markersize": 5,
    "savefig.dpi": 300,
    "svg.hashsalt": "peftsweep",
    "text.parse_math": False,  # a label may hold a dollar
    "xtick.color": INK,
    "ytick.color": INK,
}
NAMES = (
    *("rank_", "frontier_", "modules_", "quantisation_", "heatmap_", "training_time", "adapter_size", "parameters"),
    *("latency", "memory_stages", "memory_predicted", "learning_curves", "retention"),
)


def study(
    table: pd.DataFrame,
    steps: pd.DataFrame,
    folder: Path,
    kind: str = "png",
    predictions: statistics_trials.Predictions | None = None,
    tasks: Sequence[Task] | None = None,
) -> list[Path]:
    """Write the figures that ``table`` (a row a trial) and its ``steps`` have something to say for.

    ``tasks`` are those of ``table``, where they are known.

    Gives the files written, as .png of 300 dots an inch or as .svg (``kind``).
    """
    import matplotlib

    old = {file for name in NAMES for ending in KINDS for file in folder.glob(f"{name}*{ending}")}
    written = []
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a label may be in any script
        for name, figure in figures(table, steps, predictions, tasks):
            # A record from elsewhere may call an evaluation anything: no name leads out of the folder.
            plain = re.sub(r"[^\w.-]+", "-", name)[:120]
            file = folder / f"{plain}.{kind}"
            with replacing(file) as temporary:
                figure.savefig(temporary, format=kind, metadata={"Date": None} if kind == "svg" else None)
            written.append(file)
    for file in old.difference(written):  # of a study as it was, which may have had other things to show
        file.unlink(missing_ok=True)  # another collect may have done so
    return written


def figures(
    table: pd.DataFrame,
    steps: pd.DataFrame,
    predictions: statistics_trials.Predictions | None = None,
    tasks: Sequence[Task] | None = None,
) -> Iterator[tuple[str, Any]]:
    """Name and figure of everything that the study can show, apart for each model and dataset.

    A figure of a score carries its evaluation's name; where there are several tasks, each figure its task's.
    """
    tasks = study_tasks(table, predictions) if tasks is None else tasks
    for task in sorted(tasks, key=lambda task: len(task.table), reverse=True)[:TASKS]:
        title = task.name if len(tasks) > 1 else ""
        mark = columns.file_mark(task.name) if len(tasks) > 1 else ""
        mine = steps[steps["trial"].isin(task.table["run_info.trial"])] if "trial" in steps else steps
        yield from ((stem + mark, figure) for stem, figure in _task_figures(task, mine, title))


def _task_figures(task: Task, steps: pd.DataFrame, title: str) -> Iterator[tuple[str, Any]]:
    for name, draw in drawings(task, steps, title):
        if (figure := draw()) is not None:
            yield name, figure


def drawings(task: Task, steps: pd.DataFrame, title: str = "") -> Iterator[tuple[str, Callable[[], Any]]]:
    """The name of every figure of a task, and the function that draws it, which gives None if there is nothing to show.

    ``steps`` are those of the task's trials; ``title`` is its name, if the study has others.
    """
    merged = _configurations(task, title)
    by_score: dict[str, Callable[[pd.DataFrame, str], Any]] = {
        "rank": rank,
        "frontier": frontier,
        "modules": modules,
        "quantisation": quantisation,
        "heatmap": heatmap,
    }
    for score in task.scores[:EVALUATIONS]:
        for name, make in by_score.items():
            yield f"{name}_{columns.evaluation(score)[0]}", functools.partial(make, merged, score)
    of_all: dict[str, Callable[[pd.DataFrame], Any]] = {
        "training_time": functools.partial(bars, cost=columns.TRAINING_TIME),
        "adapter_size": functools.partial(bars, cost=columns.ADAPTER),
        "parameters": parameters,
        "latency": latency,
        "memory_stages": memory_stages,
        "memory_predicted": memory_predicted,
    }
    for name, plain in of_all.items():
        yield name, functools.partial(plain, merged)
    table = task.table.copy()
    table.attrs["task"] = title
    yield "learning_curves", functools.partial(learning_curves, table, steps, task.labels)
    yield "retention", functools.partial(kept, table)


def _configurations(task: Task, title: str) -> pd.DataFrame:
    """One row a configuration, its ``label``, and in ``outcome`` what did not succeed; its attrs hold the factors."""
    merged, plan = task.configurations.copy(), task.design
    merged = merged.assign(label=columns.shortened(task.labels), outcome=columns.outcomes(merged))
    # What levels are called, as columns, since pandas copies what is in attrs at every step.
    columns_by_name = {
        f"{factor}{CALLED}": merged[factor].map(functools.partial(plan.names.setting, factor))
        for factor in plan.factors
    }
    merged = merged.assign(**columns_by_name)
    moving = {factor: [plan.names.key(key) for key in plan.moving(factor)] for factor in (RANK, QUANT, TARGETS)}
    merged.attrs |= {"factors": plan.factors, "task": title, "moving": moving, "weighed": task.weighed_costs}
    merged.attrs["places"] = task.several_places
    return merged


# ---- figures ---------------------------------------------------------------------------------------


def rank(merged: pd.DataFrame, score: str) -> Any:
    """Quality against rank, and the memory of training on a second panel."""
    return _scores_over_factor(merged, RANK, [score, columns.costs(merged)[0]]) if columns.costs(merged) else None


def modules(merged: pd.DataFrame, score: str) -> Any:
    """Quality by the modules that carry the adapter, and how many parameters that is."""
    names = [c for c in (TARGETS, "config.method.target_modules") if c in merged.attrs["factors"]]
    return _scores_over_factor(merged, names[0], [score, columns.TRAINABLE]) if names else None


def quantisation(merged: pd.DataFrame, score: str) -> Any:
    """Quality, memory and time of training by how the base is stored."""
    return _scores_over_factor(merged, QUANT, [score, *columns.costs(merged)[:2]])


def _scores_over_factor(merged: pd.DataFrame, factor: str, shown: Sequence[str | Cost]) -> Any:
    """A panel for each of ``shown`` over the values of ``factor``, a series for each setting of the other factors."""
    factors = merged.attrs["factors"]
    if factor not in factors or merged[factor].nunique() < 2:
        return None
    rows = merged[merged[factor].notna()]
    others = [c for c in factors if c != factor]
    series = series_labels(rows, others) if others else pd.Series("", rows.index)
    best = list(series[best_first(rows, shown[0] if isinstance(shown[0], str) else None)])
    numeric = pd.api.types.is_numeric_dtype(rows[factor])
    x = rows[factor].astype(float) if numeric else rows[factor].map(lambda v: columns.level_name(factor, v))
    long = pd.concat([panel_rows(rows, what, x, series) for what in shown])
    if not numeric:
        first = [columns.setting_in_words(QUANT, quant) for quant in QUANTS]
        by_size = rows.groupby(x)[columns.TRAINABLE.column].mean().sort_values().index  # of modules, the fewest first
        order = sorted(by_size, key=lambda name: first.index(name) if name in first else len(first))
        long["x"] = pd.Categorical(long["x"], order, ordered=True)
    bases: list[float] = []
    if isinstance(shown[0], str) and columns.measured(merged, columns.base_of(shown[0])):
        bases = [float(score) for score in merged[columns.base_of(shown[0])].dropna().unique()]
    styles = series_styles(list(series), best)
    moving = ", ".join(merged.attrs["moving"].get(factor, []))
    note = SPREADS + (f"; together with the {columns.factor_name(factor)} changed {moving}" if moving else "")
    note = "; ".join(filter(None, [note, of_several_places(merged, shown)]))
    return draw_facets(long, styles, columns.factor_name(factor), merged, bases=bases, joined=numeric, note=note)


def frontier(merged: pd.DataFrame, score: str) -> Any:
    """Quality against each cost: the best trade-offs joined and named, what they dominate faded."""
    shown = [cost for cost in merged.attrs["weighed"] if cost != columns.TRAINABLE][:3]
    good = merged[merged[score].notna()]
    shown = [cost for cost in shown if good[cost.column].nunique() > 1]
    if len(good) < 2 or not shown:
        return None
    factors = merged.attrs["factors"]
    series = series_labels(good, factors[:1])
    styles = series_styles(list(series_labels(merged, factors[:1])), list(series[best_first(good, score)]))
    figure, axes = new_figure(len(shown), WIDTHS[len(shown)], 3.6, sharey=True)
    fronts = [_trade_off(ax, good.assign(series=series), c, score, styles) for ax, c in zip(axes, shown, strict=True)]
    axes[0].set_ylabel(columns.axis_name(score))
    if len(good) > EACH:
        series = series[sorted(set().union(*(line for *_, line in fronts)))]
    add_legend(figure, {name: look | {"linestyle": "none"} for name, look in styles.items() if name in set(series)})
    grey = "; grey: what they dominate" if len(good) > EACH else ""
    with_caption(figure, merged, f"filled and joined: nothing is both better and cheaper; bars: 95% interval{grey}")
    figure.draw_without_rendering()  # settles the layout, so that there is a room to write names in
    for ax, (x, y, names, _) in zip(axes, fronts, strict=True):
        name_points(ax, x[names.index], y[names.index], names, x, y)
    return figure


def _trade_off(ax: Any, good: pd.DataFrame, cost: Cost, score: str, styles: dict[str, dict[str, Any]]) -> Any:
    """Draw one panel; gives x and y of all points, the names of the best on the front, and where the front is."""
    rows = good[good[cost.column].notna()]
    factor, name, written = scale(cost, rows[cost.column])
    x, y = rows[cost.column] / factor, rows[score]
    front = frontier_of(np.column_stack([x, y if columns.lower_is_better(score) else -y]).astype(float))
    ax.set_xlabel(name)
    ax.margins(x=0.12, y=0.1)
    if len(rows) > EACH:
        ax.plot(
            x[~front], y[~front], color=FADED, marker=".", markersize=3, alpha=0.3, linestyle="none", rasterized=True
        )
    for label, place in rows.groupby("series", sort=False).groups.items():
        style = styles.get(str(label), GREY)
        point = {"marker": style["marker"], "color": style["color"], "linestyle": "none"}
        for on_it, look in ((False, {"alpha": 0.35, "fillstyle": "none"}), (True, {})):
            if not on_it and len(rows) > EACH:
                continue
            chosen = place[front[rows.index.get_indexer(place)] == on_it]
            # Many grey bars would hide the points.
            arms = error_bars(rows.loc[chosen], score) if label in styles or on_it else None
            ax.errorbar(x[chosen], y[chosen], yerr=arms, elinewidth=0.8, **point, **look)
    line = x[front].sort_values()
    if len(line) > 1:
        ax.plot(line, y[line.index], color=INK, linewidth=0.9, linestyle="--", zorder=1.5)
    if spans_a_decade(x):  # now that the points are drawn, as their number of decades decides the ticks
        log_axis(ax.xaxis, written)
    if columns.lower_is_better(score) and spans_a_decade(y):
        log_axis(ax.yaxis)
    best = y[line.index].sort_values(ascending=columns.lower_is_better(score)).index
    names = rows["label"][best]
    return x, y, names[names.str.len().cumsum() <= NAMED], line.index


def bars(merged: pd.DataFrame, cost: Cost) -> Any:
    """One bar a configuration, the cheapest first, or a point on a logarithmic axis; those without a number say why."""
    if not columns.measured(merged, cost.column) or merged[cost.column].nunique() < 2:
        return None
    rows, chosen = room_for_names(merged, BARS)
    rows = rows.sort_values(cost.column, ascending=False, na_position="first")
    factor, name, written = scale(cost, rows[cost.column])
    values = rows[cost.column] / factor
    figure, (ax,) = new_figure(1, 6.4, 0.9 + 0.19 * max(len(rows), 3))
    y = np.arange(len(rows))
    if wide := spans_a_decade(values.dropna()):  # where the length of a bar would mean nothing
        ax.plot(values, y, "o", color=COLOURS[0])
        log_axis(ax.xaxis, written)
    else:
        ax.barh(y, values.fillna(0.0), color=COLOURS[0], height=0.62)
    ax.errorbar(
        values, y, xerr=error_bars(rows, cost.column) / factor, fmt="none", ecolor=INK, elinewidth=0.9, capsize=2
    )
    tops = values + np.nan_to_num(error_bars(rows, cost.column)[1]) / factor
    for place, value, top, why in zip(y, values, tops, rows["outcome"], strict=True):
        text = why if pd.isna(value) else written(value) + (f"  ({why})" if why else "")
        start = (values.min() if wide else 0.0) if pd.isna(top) else top
        ax.annotate(text, (start, place), (7 if wide else 4, 0), **LABEL_OFFSET)
    ax.set_yticks(y, rows["label"])
    ax.set_ylim(-0.6, len(rows) - 0.4)
    ax.grid(axis="y", visible=False)
    ax.margins(x=0.14)
    ax.set_xlabel(name)
    lines = "lines: standard deviation over seeds" if merged["n"].max() > 1 else ""
    return with_caption(figure, merged, "; ".join(filter(None, [chosen, lines, of_several_places(merged, [cost])])))


def parameters(merged: pd.DataFrame) -> Any:
    """Trainable against all parameters of each configuration, on a logarithmic scale."""
    total = "train_info.total_parameters"
    trainable = columns.TRAINABLE.column
    if not columns.measured(merged, trainable) or merged[trainable].nunique() < 2 or total not in merged:
        return None
    rows, chosen = room_for_names(merged[merged[trainable].gt(0).fillna(False)], BARS)
    rows = rows.sort_values(trainable, ascending=False)
    figure, (ax,) = new_figure(1, 6.4, 1.2 + 0.19 * max(len(rows), 3))
    y = np.arange(len(rows))
    ax.hlines(y, rows[trainable], rows[total], color=FADED, linewidth=1)
    ax.plot(rows[trainable], y, "o", color=COLOURS[0], label="trainable")
    ax.plot(rows[total], y, "D", color=COLOURS[1], fillstyle="none", label="all")
    for place, some, everything in zip(y, rows[trainable], rows[total], strict=True):
        ax.annotate(f"{some / everything:.2%}", (everything, place), (7, 0), **LABEL_OFFSET)
    log_axis(ax.xaxis)
    ax.margins(x=0.12)
    ax.set_yticks(y, rows["label"])
    ax.set_ylim(-0.6, len(rows) - 0.4)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("parameters, and the trainable share of all")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return with_caption(figure, merged, chosen)


def heatmap(merged: pd.DataFrame, score: str) -> Any:
    """The best score of each method on each quantisation, or the word for why there is none."""
    if not {columns.METHOD, QUANT} <= set(merged.attrs["factors"]):
        return None
    rows = merged.assign(gain=-merged[score] if columns.lower_is_better(score) else merged[score])
    pairs = [columns.METHOD, QUANT]
    best = rows.sort_values("gain", ascending=False).groupby(pairs)[score].first().unstack()
    why = rows[rows[score].isna()].groupby(pairs)["outcome"].agg(first_word_of)
    order = best.mean(axis=1).sort_values(ascending=columns.lower_is_better(score), na_position="last").index
    quants = [q for q in QUANTS if q in best] + [q for q in best if q not in QUANTS]
    best = best.loc[order, quants]
    figure, (ax,) = new_figure(1, 2.2 + 1.0 * len(quants), 1.1 + 0.2 * len(order))
    dark_is_good = "cividis_r" if not columns.lower_is_better(score) else "cividis"
    shown = np.ma.masked_invalid(best.astype(float))
    image = ax.imshow(shown, cmap=dark_is_good, aspect="auto")
    if shown.count():  # scores within an interval of each other, or equal ones, are not the extremes of the shades
        interval = error_bars(rows[rows[score].notna()], score).sum(axis=0)
        width = np.median(interval[interval > 0]) if (interval > 0).any() else 0.0
        beyond = max(0.0, width - (shown.max() - shown.min())) / 2
        room = beyond if beyond or shown.min() < shown.max() else 1.0
        image.set_clim(shown.min() - room, shown.max() + room)
    for (row, method), (column, quant) in itertools.product(enumerate(order), enumerate(quants)):
        value: Any = best.iat[row, column]
        text = str(why.get((method, quant), "n/a")) if pd.isna(value) else words.number(value)
        colour = INK
        if not pd.isna(value):
            shade = float(np.dot(image.cmap(image.norm(value))[:3], (0.3, 0.6, 0.1)))
            colour = "white" if shade < 0.5 else "black"
        ax.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
    ax.set_xticks(range(len(quants)), [columns.setting_in_words(QUANT, quant) for quant in quants])
    ax.set_yticks(range(len(order)), list(columns.shortened(pd.Series(map(str, order)))))
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    ax.set_title(columns.axis_name(score), pad=8)
    several = merged.groupby(pairs).size().max() > 1
    note = "the best configuration of each pair; " if several else ""
    return with_caption(figure, merged, f"{note}shades: at least a 95% interval wide")


def learning_curves(table: pd.DataFrame, steps: pd.DataFrame, labels: pd.Series[str]) -> Any:
    """Training loss by step, and validation loss beside it where trials were validated."""
    from matplotlib.ticker import MaxNLocator

    shown = [c for c in ("loss", "validation_loss") if columns.measured(steps, c)]
    rows = steps[steps["step"].notna()] if "step" in steps else steps[:0]
    if not shown or rows.groupby("trial")[shown[0]].count().max() < 2:
        return None
    names = table["configuration"].map(columns.shortened(labels)).set_axis(table["run_info.trial"])
    score = next(iter(columns.main_scores(table)), None)
    best = names.to_numpy()[table.index.get_indexer(pd.Index(best_first(table, score)))]
    styles = series_styles(list(names), list(best))
    figure, axes = new_figure(len(shown), WIDTHS[len(shown)], 3.3, sharey=True)
    trials = [trial for trial in dict.fromkeys(rows["trial"]) if trial in names.index]
    drawn = sorted(trials[:CURVES], key=lambda trial: names[trial] in styles)  # the named ones on top
    for ax, column in zip(axes, shown, strict=True):
        for trial, curve in rows[rows[column].notna() & rows["trial"].isin(drawn)].groupby("trial"):
            look = styles.get(names[trial], GREY | {"alpha": 0.4})
            points = {"marker": look["marker"], "markersize": 3} if len(curve) <= 12 else {"marker": ""}
            ax.plot(curve["step"].astype(float), curve[column].astype(float), **look | points, linewidth=1)
        ax.set_xlabel("step")
        ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
        ax.set_title({"loss": "training loss", "validation_loss": "validation loss"}[column])
    values = rows[shown].astype(float)
    if spans_a_decade(values):
        log_axis(axes[0].yaxis)
    add_legend(figure, styles)
    left_out = f"{len(trials) - CURVES} trials left out" if len(trials) > CURVES else ""
    others = len(set(names)) - len(styles)
    grey = f"grey: {others} other configurations" if others > 0 else ""
    return with_caption(figure, table, "; ".join(filter(None, ["one line for each trial", grey, left_out])))
