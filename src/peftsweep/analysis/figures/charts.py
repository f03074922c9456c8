"""The interactive charts of report.html."""

from __future__ import annotations

import html
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from peftsweep.analysis.figures.axes import COLOURS, FADED, INK, RULE, spans_a_decade
from peftsweep.analysis.statistics import frontier
from peftsweep.analysis.statistics.task import Task
from peftsweep.analysis.table import columns
from peftsweep.analysis.table.columns import CALLED

BARS = 400  # configurations with their intervals: of more, they would be a fog
CURVES = 40  # trials whose curves are drawn: the best
CURVE_POINTS = 200  # of one curve
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x", "star")
TRIAL = "run_info.trial"
SPEED = "train_info.tokens_per_second"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"
TOOLS = {"displaylogo": False, "responsive": True, "modeBarButtonsToRemove": ["select2d", "lasso2d", "autoScale2d"]}


def plain_text(value: Any) -> str:
    """``value`` as text that no browser takes for markup."""
    return html.escape(str(value), quote=False)


def format_numbers(values: pd.Series[Any]) -> list[str]:
    """A column of numbers to four digits, zeros at the end included, large and whole ones whole; empty for none."""
    floats = values.astype(float).to_numpy(dtype=float, na_value=np.nan)
    known = floats[~np.isnan(floats)]
    form = ",.0f" if (known == known.round()).all() else "#.4g"
    return ["" if np.isnan(v) else f"{v:{form if abs(v) < 999.95 else ',.0f'}}" for v in floats.tolist()]


def format_number(value: float) -> str:
    """A number in four significant digits, thousands separated."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


# ---- quality and cost ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axis:
    """What an axis can show: a column of configurations, its name there, and what its numbers are divided by."""

    column: str
    name: str
    factor: float = 1.0

    def numbers(self, rows: pd.DataFrame, suffix: str = "") -> list[float | None]:
        """The values of ``rows``, to five digits; None where there is none."""
        if self.column + suffix not in rows:
            return [None] * len(rows)
        values = rows[self.column + suffix].astype(float) / self.factor
        return [None if np.isnan(value) else float(f"{value:.5g}") for value in values]


def _axes(task: Task) -> tuple[list[Axis], list[Axis]]:
    """What x and y can show: costs, and scores and the speed."""
    merged, across = task.configurations, []
    for cost in task.weighed_costs:
        factor, name = cost.scale(float(merged[cost.column].max()))
        across.append(Axis(cost.column, name, factor))
    up = [Axis(score, columns.axis_name(score)) for score in columns.scores(merged)]
    timed = columns.measured(merged, SPEED) and columns.TRAINING_TIME in task.weighed_costs
    return across, [*up, *([Axis(SPEED, "tokens a second in training")] if timed else [])]


def _named(task: str) -> str:
    return f"<h3>{plain_text(task)}</h3>\n" if task else ""


def frontier_chart(title: str, task: Task, name: str) -> str:
    """Every configuration with a score, on axes that two menus choose, the best trade-offs of each pair joined.

    A front belongs to a pair of axes, and is a trace of its own. The menu of one axis gives its x to the fronts of
    that axis and none to the others, the other menu does so with y; a trace without x or y is not drawn.
    """
    merged = task.configurations
    across, up = _axes(task)
    good = merged[merged["n"] > 0]
    if not across or not columns.scores(merged) or len(good) < 2:
        return ""
    series = columns.labels(good, task.factors[:1], task.names)
    groups = [(str(label), good.loc[places]) for label, places in good.groupby(series, sort=False).groups.items()]
    names = task.labels.loc[good.index]
    hover = dict(zip(good.index, _hover(good, names, [*up, *across]), strict=True))
    fronts = [(x, y, *_front(good, x, y)) for x, y in itertools.product(across, up)]

    def x_of(axis: Axis) -> dict[str, Any]:
        return {"x": [axis.numbers(rows) for _, rows in groups] + [xs if x == axis else [] for x, _, xs, _ in fronts]}

    def y_of(axis: Axis) -> dict[str, Any]:
        arms = [_arms(rows, axis) if len(good) <= BARS else ([], []) for _, rows in groups] + [([], [])] * len(fronts)
        bars = {"error_y.array": [arm[0] for arm in arms], "error_y.arrayminus": [arm[1] for arm in arms]}
        return {
            "y": [axis.numbers(rows) for _, rows in groups] + [ys if y == axis else [] for _, y, _, ys in fronts]
        } | bars

    start = x_of(across[0]) | y_of(up[0])
    looks = [_look(place, label, [hover[n] for n in rows.index]) for place, (label, rows) in enumerate(groups)]
    traces = [
        look | {"x": start["x"][place], "y": start["y"][place]}
        for place, look in enumerate(looks + [FRONT] * len(fronts))
    ]
    for place in range(len(groups)):
        parts = {"array": start["error_y.array"][place], "arrayminus": start["error_y.arrayminus"][place]}
        traces[place]["error_y"] = {"type": "data", "symmetric": False, "thickness": 1, "width": 3, **parts}
    scales = ["log" if spans_a_decade(good[axis.column].dropna()) else "linear" for axis in (across[0], up[0])]
    menus = [
        _menu("up", [(plain_text(axis.name), y_of(axis), {"yaxis.title.text": plain_text(axis.name)}) for axis in up]),
        _menu(
            "across",
            [(plain_text(axis.name), x_of(axis), {"xaxis.title.text": plain_text(axis.name)}) for axis in across],
        ),
        _scales("scale across", "xaxis", scales[0]),
        _scales("scale up", "yaxis", scales[1]),
    ]
    layout = _layout(across[0].name, up[0].name, *scales) | {"showlegend": len(groups) > 1}
    failed = columns.outcome(merged)
    bars = ", with its 95% interval" if len(good) <= BARS else ""
    note = f"A point is a configuration, the mean of its seeds{bars}. Ringed and joined: no other one "
    note += (
        "is better and cheaper. Hover for all figures; the menus choose the axes; a click in the legend hides a series."
    )
    note += f" Without a point: {failed}." if failed else ""
    return f"{_named(title)}<p class='note'>{note}</p>\n" + _plot(traces, layout, name, menus)


FRONT: dict[str, Any] = {
    "type": "scatter",
    "mode": "lines+markers",
    "line": {"color": INK, "width": 1, "dash": "dash"},
    "marker": {"symbol": "circle-open", "size": 15, "color": INK, "line": {"width": 1.5}},
    "hoverinfo": "skip",
    "showlegend": False,
}


def _front(merged: pd.DataFrame, x: Axis, y: Axis) -> tuple[list[float], list[float]]:
    """x and y of the configurations that no other is better and cheaper than, the cheapest first."""
    sign = columns.direction(y.column)
    both = merged[[x.column, y.column]].dropna().astype(float).sort_values(x.column, kind="stable")
    gain = both[y.column] * sign
    both = both[gain >= gain.cummax()]  # the few that come into question
    both = both[frontier.front(np.column_stack([both[x.column], -sign * both[y.column]]))]
    return (both[x.column] / x.factor).tolist(), (both[y.column] / y.factor).tolist()


def _arms(rows: pd.DataFrame, axis: Axis) -> tuple[list[float], list[float]]:
    """The lengths of the interval's bars above and below; 0 where it is not known, as for costs of one seed."""
    value, low, high = (np.array(axis.numbers(rows, part), dtype=float) for part in ("", ".low", ".high"))
    return np.nan_to_num(high - value).tolist(), np.nan_to_num(value - low).tolist()


def _look(place: int, name: str, hover: Sequence[str]) -> dict[str, Any]:
    """Name, colour and symbol of a series: 64 pairs, as each round of colours begins with another symbol."""
    symbol = SYMBOLS[(place + place // len(COLOURS)) % len(SYMBOLS)]
    marker = {"color": COLOURS[place % len(COLOURS)], "symbol": symbol, "size": 9}
    texts = {"text": list(hover), "hovertemplate": "%{text}<extra></extra>"}
    return {"type": "scatter", "mode": "markers", "name": plain_text(name), "marker": marker, **texts}


def _hover(good: pd.DataFrame, names: pd.Series[Any], axes: Sequence[Axis]) -> list[str]:
    """What the pointer shows of each configuration: its name, its seeds and all figures, with their intervals."""
    lines = [[f"<b>{plain_text(name)}</b>" for name in names], [f"seeds: {n}" for n in good["n"]]]
    for axis in axes:
        bounds = (axis.numbers(good, part) for part in ("", ".low", ".high"))
        lines.append([_figure_line(axis, *of_one) for of_one in zip(*bounds, strict=True)])
    return ["<br>".join(filter(None, parts)) for parts in zip(*lines, strict=True)]


def _figure_line(axis: Axis, value: float | None, low: float | None, high: float | None) -> str:
    if value is None:
        return ""
    interval = "" if low is None or high is None or low == high else f" [{format_number(low)}, {format_number(high)}]"
    return f"{plain_text(axis.name)}: {format_number(value)}{interval}"


# ---- learning curves -------------------------------------------------------------------------------


LOSSES, RATE = ("loss", "validation_loss"), "learning_rate"


def _shown(steps: pd.DataFrame) -> dict[str, list[str]]:
    """What a plot of curves can show, by name: the losses together, each other validation score, the learning rate."""
    found = {"loss": [c for c in LOSSES if columns.measured(steps, c)]}
    scores = [c for c in steps.columns if c.startswith("validation_") and c not in LOSSES]
    found |= {c.replace("_", " ", 1): [c] for c in scores if columns.measured(steps, c)}
    found |= {"learning rate": [RATE]} if columns.measured(steps, RATE) else {}
    return {name: every for name, every in found.items() if every}


def curves_chart(task: str, table: pd.DataFrame, steps: pd.DataFrame, name: str) -> str:
    """Losses, validation scores and learning rate by step, of the best trials; a menu chooses which."""
    kinds = _shown(steps)
    logged = [c for every in kinds.values() for c in every]
    if not logged:
        return ""
    score = next(iter(columns.main_scores(table)), None)
    best = table.sort_values(score, ascending=columns.direction(score) < 0, na_position="last") if score else table
    inside = best[best[TRIAL].isin(set(steps.loc[steps[logged].notna().any(axis=1), "trial"]))][:CURVES].sort_index()
    names = dict(zip(inside[TRIAL], inside[CALLED], strict=True))
    rows = steps[steps["trial"].isin(names)]
    drawn = [
        (column, curve)
        for place, (trial, label) in enumerate(names.items())
        for column in logged
        if (curve := _curve(rows[rows["trial"] == trial], column, place, label)) is not None
    ]
    if not drawn:
        return ""
    menu = _menu(
        "show",
        [
            (kind, _visible([c for c, _ in drawn], kinds[kind]), {"yaxis.title.text": plain_text(kind)})
            for kind in kinds
        ],
    )
    start = menu["options"][0]["args"][0]
    traces = [
        curve | {"visible": start["visible"][n], "showlegend": start["showlegend"][n]}
        for n, (_, curve) in enumerate(drawn)
    ]
    first = next(iter(kinds))
    scale = "log" if spans_a_decade(rows[kinds[first]]) else "linear"
    layout = _layout("step", first, "linear", scale) | {"hovermode": "closest"}
    note = "Lines: training; dotted, with marks: validation. A click in the legend hides a trial, a double "
    note += "click shows it alone."
    if len(table) > len(names):
        note += f" Shown: {len(names)} of {len(table)} trials, the best that have logged steps."
    menus = [menu, _scales("scale", "yaxis", scale)]
    return f"{_named(task)}<p class='note'>{note}</p>\n" + _plot(traces, layout, name, menus)


def _visible(drawn: Sequence[str], shown: Sequence[str]) -> dict[str, list[bool]]:
    """For each curve, drawn from the columns ``drawn``, whether it is in ``shown``; the legend names a trial once."""
    return {"visible": [c in shown for c in drawn], "showlegend": [c == shown[0] for c in drawn]}


def _curve(mine: pd.DataFrame, column: str, place: int, name: str) -> dict[str, Any] | None:
    points = mine[mine[column].notna()]
    if points.empty:
        return None
    points = points.iloc[np.unique(np.linspace(0, len(points) - 1, CURVE_POINTS).round().astype(int))]
    validation = column.startswith("validation_")
    kind = {"loss": "training loss"}.get(column, column.replace("_", " ", 1))
    return {
        "type": "scatter",
        "mode": "lines+markers" if validation or len(points) < 3 else "lines",
        "marker": {"symbol": SYMBOLS[(place + place // len(COLOURS)) % len(SYMBOLS)], "size": 7},
        "name": plain_text(name),
        "legendgroup": str(place),
        "line": {"color": COLOURS[place % len(COLOURS)], "width": 1.4, "dash": "dot" if validation else "solid"},
        "x": points["step"].astype(float).tolist(),
        "y": [float(f"{value:.5g}") for value in points[column].astype(float)],
        "hovertemplate": f"<b>{plain_text(name)}</b><br>step %{{x}}<br>{plain_text(kind)} %{{y}}<extra></extra>",
    }


# ---- plotly ----------------------------------------------------------------------------------------


def _menu(name: str, options: Sequence[tuple[str, dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    """A menu above a plot: of each option its label, and what it sets in traces and layout."""
    return {"name": name, "options": [{"label": label, "args": [data, layout]} for label, data, layout in options]}


TICKS = {"log": "D2", "linear": None}  # D2: at 1, 2 and 5 of each power of ten


def _scales(name: str, axis: str, first: str) -> dict[str, Any]:
    """A menu of the two scales of an axis, ``first`` the one it begins with."""
    kinds = sorted(("linear", "log"), key=lambda kind: kind != first)
    return _menu(name, [(kind, {}, {f"{axis}.type": kind, f"{axis}.dtick": TICKS[kind]}) for kind in kinds])


def _layout(x: str, y: str, x_scale: str, y_scale: str) -> dict[str, Any]:
    axis = {"gridcolor": RULE, "zeroline": False, "linecolor": INK, "ticks": "outside", "automargin": True}
    return {
        "xaxis": axis | {"title": {"text": plain_text(x)}, "type": x_scale, "dtick": TICKS[x_scale]},
        "yaxis": axis | {"title": {"text": plain_text(y)}, "type": y_scale, "dtick": TICKS[y_scale]},
        "font": {"family": FONT, "size": 13, "color": INK},
        "paper_bgcolor": "#fff",
        "plot_bgcolor": "#fff",
        "height": 520,
        "margin": {"l": 60, "r": 20, "t": 50, "b": 50},
        "legend": {"font": {"size": 11}},
        "hoverlabel": {"bgcolor": "#fff", "bordercolor": FADED, "font": {"color": INK, "size": 12}, "align": "left"},
    }


# A menu sets what its chosen option says. It is a list of the page, not of the plot: so it has room on a phone.
CHOOSE = """(() => {
  const plot = document.getElementById("NAME");
  const menus = JSON.parse(document.getElementById("NAME-menus").textContent);
  menus.forEach((menu, n) => {
    document.getElementById("NAME-menu-" + n).addEventListener("change", (event) => {
      const [traces, layout] = menu.options[event.target.value].args;
      Plotly.update(plot, structuredClone(traces), structuredClone(layout));
    });
  });
})();"""
# Plots are drawn for light paper. On a dark screen what is ink becomes light; on paper it is ink again.
THEME = """(() => {
  const screen = window.matchMedia("(prefers-color-scheme: dark)");
  const black = ["INK", "#000000", "#0072B2"], light = ["#e4e4e4", "#fefefe", "#3d9fdc"];
  const paint = (dark) => {
    document.documentElement.classList.toggle("dark", dark);
    const ink = dark ? light[0] : black[0], rule = dark ? "#3c4047" : "RULE", paper = dark ? "#16181c" : "#fff";
    const [from, to] = dark ? [black, light] : [light, black];
    const turned = (colour) => from.includes(colour) ? to[from.indexOf(colour)] : colour;
    document.querySelectorAll(".js-plotly-plot").forEach((plot) => {
      plot.data.forEach((trace, n) => {
        const change = {};
        if (trace.marker) change["marker.color"] = turned(trace.marker.color);
        if (trace.line) change["line.color"] = turned(trace.line.color);
        if (Object.keys(change).length) Plotly.restyle(plot, change, [n]);
      });
      const axes = {};
      ["xaxis", "yaxis"].forEach((axis) => { axes[axis + ".gridcolor"] = rule; axes[axis + ".linecolor"] = ink; });
      Plotly.relayout(plot, { "font.color": ink, paper_bgcolor: paper, plot_bgcolor: paper,
        "hoverlabel.bgcolor": paper, "hoverlabel.font.color": ink, ...axes });
    });
  };
  if (screen.matches) paint(true);
  screen.addEventListener("change", (event) => paint(event.matches));
  window.addEventListener("beforeprint", () => paint(false));
  window.addEventListener("afterprint", () => paint(screen.matches));
})();""".replace("INK", INK).replace("RULE", RULE)


def _plot(traces: Sequence[dict[str, Any]], layout: dict[str, Any], name: str, menus: Sequence[dict[str, Any]]) -> str:
    """The plot with its menus above it."""
    from plotly.io import to_html

    figure = {"data": list(traces), "layout": layout}
    made: str = to_html(figure, config=TOOLS, include_plotlyjs=False, full_html=False, div_id=name, validate=False)
    lists = "".join(
        f'<label>{menu["name"]} <select id="{name}-menu-{n}">'
        + "".join(f'<option value="{k}">{option["label"]}</option>' for k, option in enumerate(menu["options"]))
        + "</select></label> "
        for n, menu in enumerate(menus)
    )
    data = json.dumps(list(menus))
    for character in "<>&":  # nothing that could end the script or begin markup
        data = data.replace(character, f"\\u{ord(character):04x}")
    held = f'<script type="application/json" id="{name}-menus">{data}</script>'
    return f'<p class="menus">{lists}</p>\n{made}\n{held}\n<script>{CHOOSE.replace("NAME", name)}</script>'
