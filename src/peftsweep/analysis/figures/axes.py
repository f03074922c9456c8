"""What the figures share: colours, axes, legends, names beside points."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from peftsweep.analysis.table import columns
from peftsweep.analysis.table.columns import Cost
from peftsweep.analysis.text import words
from peftsweep.study.record import trials_in_words

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9", "#7F7F7F")  # Okabe and Ito's
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (8, 3)))
INK, FADED, RULE = "#333333", "#9A9A9A", "#E3E3E3"
SERIES = len(COLOURS)  # that are told apart; the others are drawn in grey
BASES = 4  # untouched bases that have a line each; of more the lowest and the highest score are told
QUANTS = (
    *("none", "8bit", "int8_torchao", "int8_quanto", "fp8", "fp8_torchao"),
    *("4bit", "int4_torchao", "int4_quanto", "hqq", "8bit_offload"),
)  # in the order of figures


CALLED = ".called"  # a factor's column of what its levels are called


def series_labels(rows: pd.DataFrame, factors: Sequence[str]) -> pd.Series[Any]:
    """The name of each row's series, made of its values of ``factors``."""
    parts = zip(*(rows[f"{factor}{CALLED}"] for factor in factors), strict=True) if factors else [()] * len(rows)
    named = pd.Series([", ".join(filter(None, part)) or "default" for part in parts], rows.index, dtype=object)
    return columns.shortened(named)


def first_word_of(outcomes: pd.Series[Any]) -> str:
    """The commonest outcome in a word: "failed" of "2 failed, 1 oom"."""
    return str(outcomes.iloc[0]).partition(" ")[2].partition(",")[0]  # of "2 failed, 1 oom"


# ---- parts of figures ------------------------------------------------------------------------------

WIDTHS = {1: 5.0, 2: 3.5, 3: 2.6}  # of a panel, in inches, by how many there are
LEGEND = 0.95  # of a figure's width at most, as letters have other widths where it is written with more dots
LETTERS = 13  # of the size of marks, in an inch of a panel with its labels
NAME_SIZE = 6.5
LABEL_OFFSET: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 7}
LABEL_BOX = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.4}
LABEL_POSITIONS = ((5, 3), (5, -3), (-5, 3), (-5, -3), (0, 6), (0, -6), (6, 0), (-6, 0))  # a point, in points
NO_ROOM, OUTSIDE = 10.0, 50.0  # of _cover: over another name or out of the panel; out of it
GREY: dict[str, Any] = {"color": FADED, "marker": ".", "linestyle": "-"}


def series_styles(names: Sequence[str], best: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Colour, marker and line of the series that are told apart: the ``best`` ones, where there are many.

    They are dealt out in the order of ``names``, that of the table, so that a series looks the same in all figures.
    """
    chosen = set(list(dict.fromkeys(best or names))[:SERIES])
    looks = zip(COLOURS, MARKERS, LINES, strict=True)
    names_in_order = [name for name in dict.fromkeys(names) if name in chosen]
    return {n: {"color": c, "marker": m, "linestyle": s} for n, (c, m, s) in zip(names_in_order, looks, strict=False)}


def new_figure(panels: int, width: float, height: float, **options: Any) -> tuple[Any, list[Any]]:
    """A figure of ``panels`` beside each other, each ``width`` inches wide."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no pyplot: a figure is a file
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * panels, height))
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, panels, squeeze=False, **options)[0])


def panel_rows(rows: pd.DataFrame, what: str | Cost, x: pd.Series[Any], series: pd.Series[Any]) -> pd.DataFrame:
    """The rows of a panel for `draw_facets`: of a score with its interval, of a cost with its standard deviation."""
    column, name, factor = (what, columns.axis_name(what), 1.0) if isinstance(what, str) else (what.column, "", 1.0)
    value = rows[column].astype(float) if column in rows else pd.Series(np.nan, rows.index)
    if isinstance(what, Cost):
        factor, name = what.scale(value.max())
    below, above = error_bars(rows, column)
    parts = {"value": value / factor, "low": (value - below) / factor, "high": (value + above) / factor}
    mark = rows["outcome"].where(value.isna(), "")
    return pd.DataFrame({"panel": name, "x": x, "series": series, **parts, "mark": mark})


def best_first(rows: pd.DataFrame, score: str | None) -> list[Any]:
    """The positions of the rows, those with the best score first; in their order where there is no score."""
    if score is None or score not in rows:
        return list(rows.index)
    return list(rows[score].sort_values(ascending=columns.lower_is_better(score), na_position="last").index)


def room_for_names(merged: pd.DataFrame, room: int) -> tuple[pd.DataFrame, str]:
    """The ``room`` rows with the best score, and a note that says how many there are; all rows where they fit."""
    if len(merged) <= room:
        return merged, ""
    score = next(iter(columns.main_scores(merged)), None)
    which = f"the {room} of {len(merged)} configurations with the best {columns.score_name(score)}" if score else ""
    return merged.loc[best_first(merged, score)[:room]], which or f"the first {room} of {len(merged)} configurations"


def error_bars(rows: pd.DataFrame, column: str) -> Any:
    """How far the bars reach below and above the values, [2, rows]; NaN, which draws none, where that is not known.

    Of a score to the ends of its interval, of a cost one standard deviation: of two seeds' times a 95% interval
    would reach from below zero to many times their mean.
    """
    if column.endswith(".value") and f"{column}.low" in rows:
        arms = [rows[column] - rows[f"{column}.low"], rows[f"{column}.high"] - rows[column]]
    else:
        arms = [rows[f"{column}.std"] if f"{column}.std" in rows else pd.Series(np.nan, rows.index)] * 2
    return np.array(arms, dtype=float).clip(min=0)


def draw_facets(
    long: pd.DataFrame,
    styles: dict[str, dict[str, Any]],
    x_label: str,
    merged: pd.DataFrame,
    *,
    joined: bool,
    bases: Sequence[float] = (),
    note: str = "",
) -> Any:
    """A panel for each value of ``long.panel``, with the points of each series over x, ``joined`` by a line or not.

    Numeric x stand on a logarithmic axis, categories at even distances. Rows without a value show their ``mark``;
    ``bases`` are the scores of the untouched bases, for the first panel: each quantisation has one of its own.
    """
    from matplotlib.ticker import FuncFormatter

    long = long.reset_index(drop=True)
    panels = list(dict.fromkeys(long["panel"]))
    styles = {name: look if joined else look | {"linestyle": "none"} for name, look in styles.items()}
    figure, axes = new_figure(len(panels), WIDTHS.get(len(panels), 2.6), 3.3)
    numeric = not isinstance(long["x"].dtype, pd.CategoricalDtype)
    for ax, panel in zip(axes, panels, strict=True):
        rows = long[long["panel"] == panel]
        places = rows["x"].astype(float) if numeric else rows["x"].cat.codes.astype(float)
        _series_of(ax, rows, places, styles, dodge=0.12 if numeric else 0.0 if joined else 0.6)
        ax.set_ylabel(panel)
        ax.set_xlabel(x_label)
        share = rows[["value", "high"]].max().max() <= 1  # of an interval from 0.001 to 0.249 a linear axis tells more
        if not share and spans_a_decade(rows[["value", "low"]]):
            log_axis(ax.yaxis)
        elif rows["value"].max() >= 10_000:
            ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short_number(value)))
        if numeric:
            _rank_axis(ax, sorted(long["x"].unique()))
        else:
            _category_axis(ax, [str(name) for name in long["x"].cat.categories])
    if bases:
        _draw_bases(axes[0], bases)
    add_legend(figure, styles)
    others = long["series"].nunique() - len(styles)
    return with_caption(
        figure, merged, "; ".join(filter(None, [note, f"grey: {others} further" if others > 0 else ""]))
    )


def _rank_axis(ax: Any, ticks: Sequence[float]) -> None:
    from matplotlib.ticker import FuncFormatter

    if min(ticks) > 0 and max(ticks) / min(ticks) > 3:
        ax.set_xscale("log", base=2)
        ax.minorticks_off()
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
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


def _draw_bases(ax: Any, bases: Sequence[float]) -> None:
    """Draw a line at each untouched base's score; where it would stretch the axis too far, write the scores as text."""
    (low, high), lowest, highest = ax.get_ylim(), min(bases), max(bases)
    name = "untouched base" if lowest == highest else "untouched bases"
    on_axis = lowest > 0 or ax.get_yscale() != "log"
    if len(bases) <= BASES and on_axis and low - (high - low) <= lowest and highest <= high + (high - low) / 2:
        for base in bases:
            ax.axhline(base, color=INK, linestyle=":", linewidth=1)
        ax.annotate(name, (1, highest), (-2, 2), xycoords=("axes fraction", "data"),
                    textcoords="offset points", ha="right", va="bottom", fontsize=6.5, bbox=LABEL_BOX)  # fmt: skip
    else:
        ends = " to ".join(dict.fromkeys(map(words.number, (lowest, highest))))
        ax.set_title(f"{name}: {ends}", fontsize=7, loc="right")


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
        ax.errorbar(at, mine["value"], yerr=arms.clip(min=0), elinewidth=0.8, capsize=2, **look)
    missing = rows[rows["value"].isna() & rows["mark"].ne("")]
    room = WIDTHS.get(len(ax.figure.axes), 2.6) * LETTERS / max(places.nunique(), 1)
    sides = {places.min(): "left", places.max(): "right"} if by_factors and places.nunique() > 1 else {}
    for place, marks in missing["mark"].groupby(places[missing.index]):
        lines = list(dict.fromkeys(f"\N{MULTIPLICATION SIGN} {mark.partition(' ')[2]}" for mark in marks))
        upright = max(map(len, lines)) > room  # side by side they would cover each other
        look = {"ha": sides.get(place, "center"), "rotation": 90 if upright else 0, "fontsize": 7, "bbox": LABEL_BOX}
        ax.text(
            place,
            0.02,
            ("  " if upright else "\n").join(lines),
            transform=ax.get_xaxis_transform(),
            va="bottom",
            **look,
        )


def spans_a_decade(values: Any) -> bool:
    """Whether the largest of these positive values is at least ten times the smallest: then an axis is logarithmic."""
    # A column that pandas read of records may hold pd.NA, which numpy takes for no number.
    known = pd.DataFrame(values).astype("Float64").to_numpy(dtype=float, na_value=np.nan)
    known = known[np.isfinite(known)]
    return bool(len(known) and known.min() > 0 and known.max() >= 10 * known.min())


def _short_number(value: float) -> str:
    for factor, sign in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 10 * factor or (value >= factor and sign != "k"):
            return f"{value / factor:g}{sign}"
    return f"{value:g}"


def scale(cost: Cost, values: pd.Series[Any]) -> tuple[float, str, Callable[[float], str]]:
    """What to divide the values of an axis by, the name of the axis, and how a number on it is written.

    Bytes that span a decade have a unit each, 30 kB or 1 GB: in one unit most would begin with zeros.
    """
    if cost.unit == "bytes" and spans_a_decade(values):
        return 1.0, cost.name, _bytes
    return *cost.scale(values.max()), _three_digits


def log_axis(axis: Any, written: Callable[[float], str] = _short_number) -> None:
    """Make the axis logarithmic, with as many ticks as have room: plain numbers, or as ``written`` formats them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_data_interval()
    axis._set_axes_scale("log")
    axis.set_major_locator(
        LogLocator(subs=(1.0, 2.0, 5.0) if high < 12 * low else (1.0, 3.0) if high < 120 * low else (1.0,))
    )
    axis.set_major_formatter(FuncFormatter(lambda value, _: written(value)))
    axis.set_minor_formatter(NullFormatter())


def _bytes(value: float) -> str:
    for least, factor, sign in columns.UNITS["bytes"]:
        if value >= least:
            return f"{_three_digits(value / factor)} {sign}"
    return f"{_three_digits(value)} B"


def _three_digits(value: float) -> str:
    return f"{float(f'{value:.3g}'):g}"


def add_legend(figure: Any, styles: dict[str, dict[str, Any]]) -> None:
    """Write the legend above the panels, in as many columns as fit."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=name, **style) for name, style in styles.items()]
    if len(handles) > 1:
        width, height = figure.get_size_inches()
        for ncols in range(len(handles), 0, -1):
            legend = figure.legend(handles=handles, loc="outside upper center", ncols=ncols)
            if legend.get_window_extent(figure.canvas.get_renderer()).width < LEGEND * width * figure.dpi or ncols == 1:
                break
            legend.remove()
        figure.set_size_inches(width, height + 0.17 * math.ceil(len(handles) / ncols))  # its rows take no room


def with_caption(figure: Any, rows: pd.DataFrame, note: str = "") -> Any:
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


def of_several_places(rows: pd.DataFrame, shown: Sequence[str | Cost]) -> str:
    """A note that seconds cannot be compared, as they are of several devices; empty where none is ``shown``."""
    places = rows.attrs.get("places", "")
    timed = any(isinstance(one, Cost) and one.unit == "seconds" for one in shown)
    return f"seconds of several devices or conditions, not to be compared: {places}" if places and timed else ""


def name_points(ax: Any, x: Any, y: Any, names: Any, all_x: Any, all_y: Any) -> None:
    """Write the name of each point near it, where it covers no other name and little else; without room leave it out.

    Call it after everything else of the figure is drawn, because it fixes the layout.
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
        offsets = [(dx * far, dy * far) for far in (1, 2, 3.5, 5, 7) for dx, dy in LABEL_POSITIONS]
        boxes = np.array([_box(place, np.array(offset) * points, size) for offset in offsets])
        covered = [_cover(box, taken, dots, inside.extents) for box in boxes]
        best = int(np.argmin(covered))
        if covered[best] >= (NO_ROOM if len(taken) else OUTSIDE):
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
    return float(NO_ROOM * names + 2 * points + OUTSIDE * outside)


def _name(ax: Any, at: tuple[float, float], name: str, dx: float, dy: float) -> None:
    far = abs(dx) + abs(dy) > 14
    leader = {"arrowstyle": "-", "color": FADED, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2} if far else None
    side = "left" if dx > 0 else "right" if dx < 0 else "center"
    level = "center" if dy == 0 else "bottom" if dy > 0 else "top"
    options = {"fontsize": NAME_SIZE, "ha": side, "va": level, "color": INK, "arrowprops": leader, "bbox": LABEL_BOX}
    ax.annotate(name, at, (dx, dy), textcoords="offset points", **options).set_in_layout(False)
