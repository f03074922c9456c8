"""Figures of a study, each of one function of a table: quality, what it costs, and how it came about.

Series differ in colour and in marker and line, so that a figure in grey says the same. What has no number
because the trial failed, ran out of memory, was refused or stopped is marked by that word, or counted below.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from peftsweep.answer import columns, effects, stats
from peftsweep.answer.columns import QUANT, RANK, TARGETS, Cost
from peftsweep.answer.frontier import front as frontier_of
from peftsweep.atomic import replacing
from peftsweep.record import trials_in_words

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9", "#7F7F7F")  # Okabe and Ito's
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (8, 3)))
INK, FADED, RULE = "#333333", "#9A9A9A", "#E3E3E3"
SERIES = len(COLOURS)  # that are told apart; the others are drawn in grey
TASKS = 4  # pairs of model and dataset with figures: those of the most trials
EVALUATIONS = 4  # with figures of their own; report.html has all
BARS = 40  # configurations a figure of bars has room for
EACH = 400  # configurations of a frontier that are drawn one by one; of more, those it dominates are grey dots
NAMED = 160  # letters of names in a panel of a frontier, the best points first
CURVES = 100  # trials whose curves are drawn
QUANTS = ("none", "8bit", "4bit", "8bit_offload")  # in the order of figures
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


CALLED = ".called"  # a factor's column of what its levels are called
NAMES = (
    *("rank_", "frontier_", "modules_", "quantisation_", "heatmap_", "training_time", "adapter_size", "parameters"),
    *("latency", "memory_stages", "memory_predicted", "learning_curves"),
)


def study(
    table: pd.DataFrame,
    steps: pd.DataFrame,
    folder: Path,
    kind: str = "png",
    predictions: stats.Predictions | None = None,
) -> list[Path]:
    """Write the figures that ``table`` (a row a trial) and its ``steps`` have something to say for.

    Gives the files written, as .png of 300 dots an inch or as .svg (``kind``).
    """
    import matplotlib

    old = {file for name in NAMES for ending in KINDS for file in folder.glob(f"{name}*{ending}")}
    written = []
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a label may be in any script
        for name, figure in figures(table, steps, predictions):
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
    table: pd.DataFrame, steps: pd.DataFrame, predictions: stats.Predictions | None = None
) -> Iterator[tuple[str, Any]]:
    """Name and figure of everything that the study can show, apart for each model and dataset.

    A figure of a score carries its evaluation's name; where there are several tasks, each figure its task's.
    """
    tasks = stats.tasks(table)
    most = sorted(tasks, key=lambda name: len(tasks[name]), reverse=True)[:TASKS]
    for name in most:
        one = tasks[name].copy()
        one.attrs["task"] = name if len(tasks) > 1 else ""
        mark = columns.file_mark(name) if len(tasks) > 1 else ""
        mine = steps[steps["trial"].isin(one["run_info.trial"])] if "trial" in steps else steps
        yield from ((stem + mark, figure) for stem, figure in _of_task(one, mine, predictions))


def _of_task(
    table: pd.DataFrame, steps: pd.DataFrame, predictions: stats.Predictions | None
) -> Iterator[tuple[str, Any]]:
    merged = _configurations(table, predictions)
    by_score: dict[str, Callable[[pd.DataFrame, str], Any]] = {
        "rank": rank,
        "frontier": frontier,
        "modules": modules,
        "quantisation": quantisation,
        "heatmap": heatmap,
    }
    for score in columns.main_scores(table)[:EVALUATIONS]:
        for name, make in by_score.items():
            if (figure := make(merged, score)) is not None:
                yield f"{name}_{columns.evaluation(score)[0]}", figure
    of_all: dict[str, Callable[[pd.DataFrame], Any]] = {
        "training_time": functools.partial(bars, cost=columns.TRAINING_TIME),
        "adapter_size": functools.partial(bars, cost=columns.ADAPTER),
        "parameters": parameters,
        "latency": latency,
        "memory_stages": memory_stages,
        "memory_predicted": memory_predicted,
    }
    for name, plain in of_all.items():
        if (figure := plain(merged)) is not None:
            yield name, figure
    if (figure := learning_curves(table, steps)) is not None:
        yield "learning_curves", figure


def _configurations(table: pd.DataFrame, predictions: stats.Predictions | None) -> pd.DataFrame:
    """One row a configuration, its ``label``, and in ``outcome`` what did not succeed; its attrs hold the factors."""
    merged = stats.configurations(table, predictions).copy()
    plan = effects.design(table)
    merged = merged.assign(label=columns.shortened(effects.labels(table)), outcome=columns.outcomes(merged))
    # What levels are called, as columns, since pandas copies what is in attrs at every step.
    told = {
        f"{factor}{CALLED}": merged[factor].map(functools.partial(plan.names.setting, factor))
        for factor in plan.factors
    }
    merged = merged.assign(**told)
    moving = {factor: [plan.names.key(key) for key in plan.moving(factor)] for factor in (RANK, QUANT, TARGETS)}
    merged.attrs |= {"factors": plan.factors, "task": table.attrs["task"], "moving": moving}
    return merged


# ---- figures ---------------------------------------------------------------------------------------


def rank(merged: pd.DataFrame, score: str) -> Any:
    """Quality against rank, and the memory of training on a second panel."""
    return _against(merged, RANK, [score, columns.costs(merged)[0]]) if columns.costs(merged) else None


def modules(merged: pd.DataFrame, score: str) -> Any:
    """Quality by the modules that carry the adapter, and how many parameters that is."""
    names = [c for c in (TARGETS, "config.method.target_modules") if c in merged.attrs["factors"]]
    return _against(merged, names[0], [score, columns.TRAINABLE]) if names else None


def quantisation(merged: pd.DataFrame, score: str) -> Any:
    """Quality, memory and time of training by how the base is stored."""
    return _against(merged, QUANT, [score, *columns.costs(merged)[:2]])


def _against(merged: pd.DataFrame, factor: str, shown: Sequence[str | Cost]) -> Any:
    """A panel for each of ``shown`` over the values of ``factor``, a series for each setting of the other factors."""
    factors = merged.attrs["factors"]
    rows = merged[merged[factor].notna()] if factor in factors else merged[:0]
    if rows[factor].nunique() < 2 if factor in factors else True:
        return None
    others = [c for c in factors if c != factor]
    series = _labels(rows, others) if others else pd.Series("", rows.index)
    best = list(series[_best_first(rows, shown[0] if isinstance(shown[0], str) else None)])
    numeric = pd.api.types.is_numeric_dtype(rows[factor])
    x = rows[factor].astype(float) if numeric else rows[factor].map(lambda v: columns.level_name(factor, v))
    long = pd.concat([_panel(rows, what, x, series) for what in shown])
    if not numeric:
        first = [columns.in_words(QUANT, quant) for quant in QUANTS]
        by_size = rows.groupby(x)[columns.TRAINABLE.column].mean().sort_values().index  # of modules, the fewest first
        order = sorted(by_size, key=lambda name: first.index(name) if name in first else len(first))
        long["x"] = pd.Categorical(long["x"], order, ordered=True)
    base = None
    if isinstance(shown[0], str) and columns.measured(merged, columns.base_of(shown[0])):
        base = float(merged[columns.base_of(shown[0])].mean())
    styles = _styles(list(series), best)
    moving = ", ".join(merged.attrs["moving"].get(factor, []))
    note = SPREADS + (f"; with the {columns.factor_name(factor)} moved {moving}" if moving else "")
    return _facets(long, styles, columns.factor_name(factor), merged, base=base, joined=numeric, note=note)


def frontier(merged: pd.DataFrame, score: str) -> Any:
    """Quality against each cost: the best trade-offs joined and named, what they dominate faded."""
    shown = [cost for cost in columns.costs(merged) if cost is not columns.TRAINABLE][:3]
    good = merged[merged[score].notna()]
    shown = [cost for cost in shown if good[cost.column].nunique() > 1]
    if len(good) < 2 or not shown:
        return None
    factors = merged.attrs["factors"]
    series = _labels(good, factors[:1])
    styles = _styles(list(_labels(merged, factors[:1])), list(series[_best_first(good, score)]))
    figure, axes = _figure(len(shown), WIDTHS[len(shown)], 3.6, sharey=True)
    fronts = [_trade_off(ax, good.assign(series=series), c, score, styles) for ax, c in zip(axes, shown, strict=True)]
    axes[0].set_ylabel(columns.axis_name(score))
    if len(good) > EACH:
        series = series[sorted(set().union(*(line for *_, line in fronts)))]
    _legend(figure, {name: look | {"linestyle": "none"} for name, look in styles.items() if name in set(series)})
    grey = "; grey: what they dominate" if len(good) > EACH else ""
    _signed(figure, merged, f"filled and joined: nothing is both better and cheaper; bars: 95% interval{grey}")
    figure.draw_without_rendering()  # settles the layout, so that there is a room to write names in
    for ax, (x, y, names, _) in zip(axes, fronts, strict=True):
        _name_points(ax, x[names.index], y[names.index], names, x, y)
    return figure


def _trade_off(ax: Any, good: pd.DataFrame, cost: Cost, score: str, styles: dict[str, dict[str, Any]]) -> Any:
    """Draw one panel; gives x and y of all points, the names of the best on the front, and where the front is."""
    rows = good[good[cost.column].notna()]
    factor, name = cost.scale(rows[cost.column].max())
    x, y = rows[cost.column] / factor, rows[score]
    front = frontier_of(np.column_stack([x, y if columns.lower_is_better(score) else -y]).astype(float))
    ax.set_xlabel(name)
    ax.margins(x=0.12, y=0.1)
    if x.min() > 0 and x.max() / x.min() > 30:
        _log_axis(ax.xaxis)
    if columns.lower_is_better(score) and y.min() > 0 and y.max() / y.min() > 10:
        _log_axis(ax.yaxis)
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
            arms = _arms(rows.loc[chosen], score) if label in styles or on_it else None  # in grey they are a fog
            ax.errorbar(x[chosen], y[chosen], yerr=arms, elinewidth=0.8, **point, **look)
    line = x[front].sort_values()
    if len(line) > 1:
        ax.plot(line, y[line.index], color=INK, linewidth=0.9, linestyle="--", zorder=1.5)
    best = y[line.index].sort_values(ascending=columns.lower_is_better(score)).index
    names = rows["label"][best]
    return x, y, names[names.str.len().cumsum() <= NAMED], line.index


def bars(merged: pd.DataFrame, cost: Cost) -> Any:
    """One bar a configuration, the cheapest first; those without a number say why."""
    if not columns.measured(merged, cost.column) or merged[cost.column].nunique() < 2:
        return None
    rows, chosen = _room_for(merged, BARS)
    rows = rows.sort_values(cost.column, ascending=False, na_position="first")
    factor, name = cost.scale(rows[cost.column].max())
    values = rows[cost.column] / factor
    figure, (ax,) = _figure(1, 6.4, 0.9 + 0.19 * max(len(rows), 3))
    y = np.arange(len(rows))
    ax.barh(y, values.fillna(0.0), color=COLOURS[0], height=0.62)
    ax.errorbar(values, y, xerr=_arms(rows, cost.column) / factor, fmt="none", ecolor=INK, elinewidth=0.9, capsize=2)
    tops = values + _arms(rows, cost.column)[1] / factor
    for place, value, top, why in zip(y, values, tops, rows["outcome"], strict=True):
        text = why if pd.isna(value) else f"{value:.3g}" + (f"  ({why})" if why else "")
        ax.annotate(text, (0 if pd.isna(top) else top, place), (4, 0), **BESIDE)
    ax.set_yticks(y, rows["label"])
    ax.set_ylim(-0.6, len(rows) - 0.4)
    ax.grid(axis="y", visible=False)
    ax.margins(x=0.14)
    ax.set_xlabel(name)
    lines = "lines: standard deviation over seeds" if merged["n"].max() > 1 else ""
    return _signed(figure, merged, "; ".join(filter(None, [chosen, lines])))


def parameters(merged: pd.DataFrame) -> Any:
    """Trainable against all parameters of each configuration, on a logarithmic scale."""
    total = "train_info.total_parameters"
    trainable = columns.TRAINABLE.column
    if not columns.measured(merged, trainable) or merged[trainable].nunique() < 2 or total not in merged:
        return None
    rows, chosen = _room_for(merged[merged[trainable].gt(0).fillna(False)], BARS)
    rows = rows.sort_values(trainable, ascending=False)
    figure, (ax,) = _figure(1, 6.4, 1.2 + 0.19 * max(len(rows), 3))
    y = np.arange(len(rows))
    ax.hlines(y, rows[trainable], rows[total], color=FADED, linewidth=1)
    ax.plot(rows[trainable], y, "o", color=COLOURS[0], label="trainable")
    ax.plot(rows[total], y, "D", color=COLOURS[1], fillstyle="none", label="all")
    for place, some, everything in zip(y, rows[trainable], rows[total], strict=True):
        ax.annotate(f"{some / everything:.2%}", (everything, place), (7, 0), **BESIDE)
    _log_axis(ax.xaxis)
    ax.margins(x=0.12)
    ax.set_yticks(y, rows["label"])
    ax.set_ylim(-0.6, len(rows) - 0.4)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("parameters, and the trainable share of all")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return _signed(figure, merged, chosen)


def heatmap(merged: pd.DataFrame, score: str) -> Any:
    """The best score of each method on each quantisation, or the word for why there is none."""
    if not {columns.METHOD, QUANT} <= set(merged.attrs["factors"]):
        return None
    rows = merged.assign(gain=-merged[score] if columns.lower_is_better(score) else merged[score])
    pairs = [columns.METHOD, QUANT]
    best = rows.sort_values("gain", ascending=False).groupby(pairs)[score].first().unstack()
    why = rows[rows[score].isna()].groupby(pairs)["outcome"].agg(_first_word)
    order = best.mean(axis=1).sort_values(ascending=columns.lower_is_better(score), na_position="last").index
    quants = [q for q in QUANTS if q in best] + [q for q in best if q not in QUANTS]
    best = best.loc[order, quants]
    figure, (ax,) = _figure(1, 2.2 + 1.0 * len(quants), 1.1 + 0.2 * len(order))
    dark_is_good = "cividis_r" if not columns.lower_is_better(score) else "cividis"
    image = ax.imshow(np.ma.masked_invalid(best.astype(float)), cmap=dark_is_good, aspect="auto")
    for (row, method), (column, quant) in itertools.product(enumerate(order), enumerate(quants)):
        value: Any = best.iat[row, column]
        text = str(why.get((method, quant), "n/a")) if pd.isna(value) else f"{value:.3g}"
        shade = 0.0 if pd.isna(value) else float(np.dot(image.cmap(image.norm(value))[:3], (0.3, 0.6, 0.1)))
        colour = FADED if pd.isna(value) else "white" if shade < 0.5 else "black"
        ax.text(column, row, text, ha="center", va="center", fontsize=7, color=INK if pd.isna(value) else colour)
    ax.set_xticks(range(len(quants)), [columns.in_words(QUANT, quant) for quant in quants])
    ax.set_yticks(range(len(order)), list(columns.shortened(pd.Series(map(str, order)))))
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    ax.set_title(columns.axis_name(score), pad=8)
    several = merged.groupby(pairs).size().max() > 1
    return _signed(figure, merged, "the best configuration of each pair" if several else "")


def _labels(rows: pd.DataFrame, factors: Sequence[str]) -> pd.Series[Any]:
    parts = zip(*(rows[f"{factor}{CALLED}"] for factor in factors), strict=True) if factors else [()] * len(rows)
    named = pd.Series([", ".join(filter(None, part)) or "default" for part in parts], rows.index, dtype=object)
    return columns.shortened(named)


def _first_word(outcomes: pd.Series[Any]) -> str:
    return str(outcomes.iloc[0]).partition(" ")[2].partition(",")[0]  # of "2 failed, 1 oom"


def learning_curves(table: pd.DataFrame, steps: pd.DataFrame) -> Any:
    """Training loss by step, and validation loss beside it where trials were validated."""
    shown = [c for c in ("loss", "validation_loss") if columns.measured(steps, c)]
    rows = steps[steps["step"].notna()] if "step" in steps else steps[:0]
    if not shown or rows.groupby("trial")[shown[0]].count().max() < 2:
        return None
    names = table["configuration"].map(columns.shortened(effects.labels(table))).set_axis(table["run_info.trial"])
    score = next(iter(columns.main_scores(table)), None)
    best = names.to_numpy()[table.index.get_indexer(pd.Index(_best_first(table, score)))]
    styles = _styles(list(names), list(best))
    figure, axes = _figure(len(shown), WIDTHS[len(shown)], 3.3, sharey=True)
    trials = [trial for trial in dict.fromkeys(rows["trial"]) if trial in names.index]
    drawn = sorted(trials[:CURVES], key=lambda trial: names[trial] in styles)  # the named ones on top
    for ax, column in zip(axes, shown, strict=True):
        for trial, curve in rows[rows[column].notna() & rows["trial"].isin(drawn)].groupby("trial"):
            look = styles.get(names[trial], GREY | {"alpha": 0.4})
            points = {"marker": look["marker"], "markersize": 3} if len(curve) <= 12 else {"marker": ""}
            ax.plot(curve["step"].astype(float), curve[column].astype(float), **look | points, linewidth=1)
        ax.set_xlabel("step")
        ax.set_title({"loss": "training loss", "validation_loss": "validation loss"}[column])
    values = rows[shown].astype(float)
    if values.min().min() > 0 and values.max().max() / values.min().min() > 30:
        _log_axis(axes[0].yaxis)
    _legend(figure, styles)
    left_out = f"{len(trials) - CURVES} trials left out" if len(trials) > CURVES else ""
    others = len(set(names)) - len(styles)
    grey = f"grey: {others} other configurations" if others > 0 else ""
    return _signed(figure, table, "; ".join(filter(None, ["a line a trial", grey, left_out])))


def latency(merged: pd.DataFrame) -> Any:
    """Time of a text by category of prompts, and the overhead over the base with its interval."""
    suffix = ".adapted.seconds_p50"
    found = [c for c in merged.columns if c.startswith("generation_info.") and c.endswith(suffix)]
    kinds = [c.removeprefix("generation_info.").removesuffix(suffix) for c in found if columns.measured(merged, c)]
    kinds = [kind for kind in kinds if kind != "overall"]
    if not kinds:
        return None
    rows, chosen = _room_for(merged[merged[found].notna().any(axis=1)], (SERIES - 1) // 2)
    time, over = Cost("", "median time of a text", "seconds"), "overhead over the base (%)"
    prefix = "generation_info.{}.{}."
    largest = max(rows[prefix.format(kind, "adapted") + "seconds_p50"].max() for kind in kinds)
    factor, time_name = time.scale(largest)
    parts = []
    for kind, variant in itertools.product(kinds, ("base", "adapted", "merged")):
        column = prefix.format(kind, variant) + "seconds_p50"
        overhead = prefix.format(kind, variant) + "overhead."
        if column not in rows:
            continue
        of = rows if variant != "base" else rows[:1].assign(**{column: rows[column].mean()})
        series = of["label"] + f", {variant}" if variant != "base" else "untouched base"
        plain = {"x": kind, "series": series, "mark": ""}
        parts.append(pd.DataFrame({"value": of[column] / factor, "panel": time_name, **plain}))
        if overhead + "value" in of:
            percent = {part: (of[overhead + part] - 1) * 100 for part in ("value", "low", "high")}
            parts.append(pd.DataFrame({**percent, "panel": over, **plain}))
    long = pd.concat(parts).reindex(columns=["panel", "series", "x", "value", "low", "high", "mark"])
    long["x"] = pd.Categorical(long["x"], kinds, ordered=True)
    note = f"{chosen}; bars: 95% interval over paired runs".removeprefix("; ")
    return _facets(long, _styles(list(long["series"])), "category of prompts", rows, joined=True, note=note)


def memory_stages(merged: pd.DataFrame) -> Any:
    """The peak of memory in each stage of a trial."""
    device = columns.measured(merged, columns.DEVICE_MEMORY.column)
    ending = ".allocated_peak" if device else ".rss_peak"
    peaks = [c for c in merged.columns if c.startswith("memory.") and c.endswith(ending)]
    peaks = [c for c in peaks if columns.measured(merged, c)]
    if len(peaks) < 2:
        return None
    rows, chosen = _room_for(merged[merged[peaks].notna().any(axis=1)], SERIES)
    cost = Cost("", f"peak memory {'on the device' if device else 'of the process'}", "bytes")
    factor, name = cost.scale(rows[peaks].max().max())
    stages = {c: c.removeprefix("memory.").removesuffix(ending) for c in peaks}
    table = rows[["label", *peaks]].rename(columns=stages)
    long = table.melt("label", var_name="x", value_name="value").rename(columns={"label": "series"})
    long = long.assign(value=long["value"] / factor, low=np.nan, high=np.nan, mark="", panel=name)
    long["x"] = pd.Categorical(long["x"], list(stages.values()), ordered=True)
    return _facets(long, _styles(list(rows["label"])), "stage of a trial", merged, joined=True, note=chosen)


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
    series = _labels(rows, merged.attrs["factors"][:1])
    told = list(series) if series.nunique() <= SERIES else []
    styles = {name: look | {"linestyle": "none"} for name, look in _styles(told).items()}
    figure, (ax,) = _figure(1, 4.6, 4.4)
    for label, place in rows.groupby(series, sort=False).groups.items():
        look = styles.get(str(label), GREY | {"linestyle": "none"})
        ax.plot(measured[place] / factor, rows.loc[place, predicted] / factor, **look)
    top = 1.08 * largest / factor
    ax.plot([0, top], [0, top], color=INK, linewidth=0.9)
    ax.fill_between([0, top], [0, 0.9 * top], [0, 1.1 * top], color=RULE, zorder=0, linewidth=0)
    ax.set(xlim=(0, top), ylim=(0, top), aspect="equal", xlabel=f"measured {unit}", ylabel=f"predicted {unit}")
    _legend(figure, styles)
    return _signed(figure, merged, "on the line they agree, grey within 10%")


# ---- parts of figures ------------------------------------------------------------------------------

WIDTHS = {1: 5.0, 2: 3.5, 3: 2.6}  # of a panel, in inches, by how many there are
NAME_SIZE = 6.5
BESIDE: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 7}
PAPER = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.4}
AROUND = ((5, 3), (5, -3), (-5, 3), (-5, -3), (0, 6), (0, -6), (6, 0), (-6, 0))  # a point, in points
NO_ROOM = 10.0  # of _cover: over another name, or out of the panel
GREY: dict[str, Any] = {"color": FADED, "marker": ".", "linestyle": "-"}


def _styles(names: Sequence[str], best: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Colour, marker and line of the series that are told apart: the ``best`` ones, where there are many.

    They are dealt out in the order of ``names``, that of the table, so that a series looks the same in all figures.
    """
    chosen = set(list(dict.fromkeys(best or names))[:SERIES])
    looks = zip(COLOURS, MARKERS, LINES, strict=True)
    told = [name for name in dict.fromkeys(names) if name in chosen]
    return {n: {"color": c, "marker": m, "linestyle": s} for n, (c, m, s) in zip(told, looks, strict=False)}


def _figure(panels: int, width: float, height: float, **options: Any) -> tuple[Any, list[Any]]:
    """A figure of ``panels`` beside each other, each ``width`` inches wide."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no pyplot: a figure is a file
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * panels, height))
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, panels, squeeze=False, **options)[0])


def _panel(rows: pd.DataFrame, what: str | Cost, x: pd.Series[Any], series: pd.Series[Any]) -> pd.DataFrame:
    """The rows of a panel for `_facets`: of a score with its interval, of a cost with its standard deviation."""
    column, name, factor = (what, columns.axis_name(what), 1.0) if isinstance(what, str) else (what.column, "", 1.0)
    value = rows[column].astype(float) if column in rows else pd.Series(np.nan, rows.index)
    if isinstance(what, Cost):
        factor, name = what.scale(value.max())
    below, above = _arms(rows, column)
    parts = {"value": value / factor, "low": (value - below) / factor, "high": (value + above) / factor}
    mark = rows["outcome"].where(value.isna(), "")
    return pd.DataFrame({"panel": name, "x": x, "series": series, **parts, "mark": mark})


def _best_first(rows: pd.DataFrame, score: str | None) -> list[Any]:
    """Where the rows are, the best score first; in their order where there is none."""
    if score is None or score not in rows:
        return list(rows.index)
    return list(rows[score].sort_values(ascending=columns.lower_is_better(score), na_position="last").index)


def _room_for(merged: pd.DataFrame, room: int) -> tuple[pd.DataFrame, str]:
    """At most ``room`` rows, those of the best score, and the words that say so."""
    if len(merged) <= room:
        return merged, ""
    score = next(iter(columns.main_scores(merged)), None)
    words = f"the {room} of {len(merged)} configurations with the best {columns.score_name(score)}" if score else ""
    return merged.loc[_best_first(merged, score)[:room]], words or f"the first {room} of {len(merged)} configurations"


def _arms(rows: pd.DataFrame, column: str) -> Any:
    """How far the bars reach below and above the values, [2, rows]; 0 where that is not known.

    Of a score to the ends of its interval, of a cost one standard deviation: of two seeds' times a 95% interval
    would reach from below zero to many times their mean.
    """
    if column.endswith(".value") and f"{column}.low" in rows:
        arms = [rows[column] - rows[f"{column}.low"], rows[f"{column}.high"] - rows[column]]
    else:
        arms = [rows[f"{column}.std"] if f"{column}.std" in rows else pd.Series(0.0, rows.index)] * 2
    return np.nan_to_num(np.array(arms, dtype=float)).clip(min=0)


def _facets(
    long: pd.DataFrame,
    styles: dict[str, dict[str, Any]],
    x_label: str,
    merged: pd.DataFrame,
    *,
    joined: bool,
    base: float | None = None,
    note: str = "",
) -> Any:
    """A panel for each value of ``long.panel``, with the points of each series over x, ``joined`` by a line or not.

    Numeric x stand on a logarithmic axis, categories at even distances. Rows without a value show their ``mark``;
    ``base`` is the untouched base's score, for the first panel.
    """
    from matplotlib.ticker import FuncFormatter

    long = long.reset_index(drop=True)
    panels = list(dict.fromkeys(long["panel"]))
    styles = {name: look if joined else look | {"linestyle": "none"} for name, look in styles.items()}
    figure, axes = _figure(len(panels), WIDTHS.get(len(panels), 2.6), 3.3)
    numeric = not isinstance(long["x"].dtype, pd.CategoricalDtype)
    for ax, panel in zip(axes, panels, strict=True):
        rows = long[long["panel"] == panel]
        places = rows["x"].astype(float) if numeric else rows["x"].cat.codes.astype(float)
        _series_of(ax, rows, places, styles, dodge=0.12 if numeric else 0.0 if joined else 0.6)
        ax.set_ylabel(panel)
        ax.set_xlabel(x_label)
        if rows["value"].max() >= 10_000:
            ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short_number(value)))
        if numeric:
            _rank_axis(ax, sorted(long["x"].unique()))
        else:
            _category_axis(ax, [str(name) for name in long["x"].cat.categories])
    if base is not None:
        _draw_base(axes[0], base)
    _legend(figure, styles)
    others = long["series"].nunique() - len(styles)
    return _signed(figure, merged, "; ".join(filter(None, [note, f"grey: {others} further" if others > 0 else ""])))


def _rank_axis(ax: Any, ticks: Sequence[float]) -> None:
    if min(ticks) > 0 and max(ticks) / min(ticks) > 3:
        ax.set_xscale("log", base=2)
        ax.minorticks_off()
    if len(ticks) <= 12:
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])


def _category_axis(ax: Any, names: Sequence[str]) -> None:
    names = list(columns.shortened(pd.Series(names), 24))
    ax.set_xticks(range(len(names)), names)
    ax.set_xlim(-0.5, len(names) - 0.5)
    if sum(len(name) + 2 for name in names) > 11 * ax.figure.get_size_inches()[0] / len(ax.figure.axes):
        ax.tick_params(axis="x", rotation=40)
        for text in ax.get_xticklabels():
            text.set(ha="right", rotation_mode="anchor")


def _draw_base(ax: Any, base: float) -> None:
    """A line at the untouched base's score, or its number in words where it would flatten all that is compared."""
    low, high = ax.get_ylim()
    if low - (high - low) <= base <= high + (high - low) / 2:
        ax.axhline(base, color=INK, linestyle=":", linewidth=1)
        ax.annotate("untouched base", (1, base), (-2, 2), xycoords=("axes fraction", "data"),
                    textcoords="offset points", ha="right", va="bottom", fontsize=6.5)  # fmt: skip
    else:
        ax.set_title(f"untouched base: {base:.3g}", fontsize=7, loc="right")


def _series_of(ax: Any, rows: pd.DataFrame, places: Any, styles: Any, *, dodge: float) -> None:
    by_factors = not isinstance(rows["x"].dtype, pd.CategoricalDtype)  # on an axis of powers of two
    spread = np.linspace(-0.5, 0.5, len(styles)) * dodge if len(styles) > 1 else [0.0]
    shown = rows[rows["value"].notna()].assign(at=places)
    grey = shown[~shown["series"].isin(styles)].sort_values(["series", "at"])
    if len(grey):
        ends = grey["series"] != grey["series"].shift(-1)
        gaps = grey[ends].assign(value=np.nan)  # one line for all, broken between series
        line = pd.concat([grey, gaps]).sort_values(["series", "at"], kind="stable")
        look = GREY | {"alpha": 0.5, "linestyle": "-" if by_factors else "none"}
        ax.plot(line["at"], line["value"].astype(float), **look)
    for (name, look), shift in reversed(list(zip(styles.items(), spread, strict=True))):
        mine = shown[shown["series"] == name].sort_values("at")
        at = mine["at"] * 2**shift if by_factors else mine["at"] + shift
        arms = np.array([mine["value"] - mine["low"], mine["high"] - mine["value"]], dtype=float)
        ax.errorbar(at, mine["value"], yerr=np.nan_to_num(arms).clip(min=0), elinewidth=0.8, capsize=2, **look)
    missing = rows[rows["value"].isna() & rows["mark"].ne("")]
    for place, marks in missing["mark"].groupby(places[missing.index]):
        words = "\n".join(dict.fromkeys(f"\N{MULTIPLICATION SIGN} {mark.partition(' ')[2]}" for mark in marks))
        ax.text(place, 0.02, words, transform=ax.get_xaxis_transform(), ha="center", fontsize=7, bbox=PAPER)


def _log_axis(axis: Any) -> None:
    """A logarithmic axis whose ticks are plain numbers, as many as there is room for."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_data_interval()
    axis._set_axes_scale("log")
    axis.set_major_locator(
        LogLocator(subs=(1.0, 2.0, 5.0) if high < 12 * low else (1.0, 3.0) if high < 120 * low else (1.0,))
    )
    axis.set_major_formatter(FuncFormatter(lambda value, _: _short_number(value)))
    axis.set_minor_formatter(NullFormatter())


def _short_number(value: float) -> str:
    for factor, sign in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 10 * factor or (value >= factor and sign != "k"):
            return f"{value / factor:g}{sign}"
    return f"{value:g}"


def _legend(figure: Any, styles: dict[str, dict[str, Any]]) -> None:
    """The series above the panels, in as many columns as their names leave room for."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=name, **style) for name, style in styles.items()]
    if len(handles) > 1:
        longest = max(len(name) for name in styles)
        width, height = figure.get_size_inches()
        room = max(1, int(width * 16 / (longest + 8)))
        figure.set_size_inches(width, height + 0.17 * math.ceil(len(handles) / room))  # its rows take no panel's room
        figure.legend(handles=handles, loc="outside upper center", ncols=min(room, len(handles)))


def _signed(figure: Any, rows: pd.DataFrame, note: str = "") -> Any:
    """Write below the figure what it shows, how many trials stand behind it, and how many did not succeed."""
    parts = [rows.attrs.get("task", ""), note]
    if "n" in rows:
        several = f" of {len(rows)} configurations" if rows["n"].max() > 1 else ""
        parts.append(f"{trials_in_words(int(rows['n'].sum()))}{several}")
    else:
        parts.append(trials_in_words(len(rows)))
    parts += [columns.outcome(rows)] if columns.outcome(rows) else []
    text = textwrap.fill("; ".join(filter(None, parts)), int(19 * figure.get_size_inches()[0]))
    figure.supxlabel(text, x=0.01, ha="left", fontsize=6.5, color="#666666")
    return figure


def _name_points(ax: Any, x: Any, y: Any, names: Any, all_x: Any, all_y: Any) -> None:
    """Write the name of each point where it covers no name and little else, as near as there is room; or not at all.

    To be called when all else of the figure is drawn, as it settles the layout.
    """
    points = ax.figure.dpi / 72
    inside = ax.get_window_extent()
    dots = ax.transData.transform(np.column_stack([all_x, all_y]).astype(float))
    taken = np.empty((0, 4))
    for at, name in zip(zip(x, y, strict=True), names, strict=True):
        probe = ax.text(0, 0, name, fontsize=NAME_SIZE)
        size = probe.get_window_extent(ax.figure.canvas.get_renderer()).size
        probe.remove()
        place = ax.transData.transform(at)
        offsets = [(dx * far, dy * far) for far in (1, 2, 3.5, 5, 7) for dx, dy in AROUND]
        boxes = np.array([_box(place, np.array(offset) * points, size) for offset in offsets])
        covered = [_cover(box, taken, dots, inside.extents) for box in boxes]
        best = int(np.argmin(covered))
        if covered[best] >= NO_ROOM and len(taken):
            continue
        taken = np.vstack([taken, boxes[best]])
        _name(ax, at, name, *offsets[best])


def _box(place: Any, offset: Any, size: Any) -> Any:
    """Left, bottom, right and top, in dots, of a text of ``size`` that is written ``offset`` away from ``place``."""
    corner = place + offset - size * np.where(offset > 0, 0.0, np.where(offset < 0, 1.0, 0.5))
    return np.concatenate([corner, corner + size])


def _cover(box: Any, taken: Any, dots: Any, inside: Any) -> float:
    """How much is in the way of a text in ``box``: names, points, and the edge of the panel."""
    left, bottom, right, top = box
    names = ((taken[:, 0] < right) & (taken[:, 2] > left) & (taken[:, 1] < top) & (taken[:, 3] > bottom)).sum()
    points = ((dots > (left, bottom)) & (dots < (right, top))).all(axis=1).sum()
    outside = left < inside[0] or bottom < inside[1] or right > inside[2] or top > inside[3]
    return float(10 * names + 2 * points + 50 * outside)


def _name(ax: Any, at: tuple[float, float], name: str, dx: float, dy: float) -> None:
    far = abs(dx) + abs(dy) > 14
    leader = {"arrowstyle": "-", "color": FADED, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2} if far else None
    side = "left" if dx > 0 else "right" if dx < 0 else "center"
    level = "center" if dy == 0 else "bottom" if dy > 0 else "top"
    options = {"fontsize": NAME_SIZE, "ha": side, "va": level, "color": INK, "arrowprops": leader, "bbox": PAPER}
    ax.annotate(name, at, (dx, dy), textcoords="offset points", **options).set_in_layout(False)
