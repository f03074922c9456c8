"""report.html: a study as one page that opens offline, with its table, its frontier, its curves and each trial.

The page needs nothing but itself. DataTables (through itables) sorts and filters, plotly draws and hovers, and the
rest is HTML and CSS: a trial's panel is shown by following the link to it. All text of the records is escaped.
"""

from __future__ import annotations

import html
import itertools
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from peftsweep.answer import columns, effects, frontier, paired, stats
from peftsweep.answer.columns import CALLED, STATUS, WARNINGS
from peftsweep.answer.plot import COLOURS, FADED, INK, RULE
from peftsweep.reading import read_yaml, usable
from peftsweep.record import counted, trials_in_words, write_text

REPORT = "report.html"
PANELS = 2000  # trials with a panel of their own: the newest
TASKS = 6  # pairs of model and dataset with plots: those of the most trials
BARS = 400  # configurations with their intervals: of more, they would be a fog
MEMBERS = 40  # configurations whose rows can be compared: the best
TEXTS, EACH = 200, 4  # rows whose texts are there, of all scores together; and of each two of them
PROMPT, TEXT = 400, 300  # characters of a prompt, and of an answer
CURVES = 40  # trials whose curves are drawn: the best
CURVE_POINTS = 200  # of one curve
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x", "star")
TRIAL = "run_info.trial"
SPEED = "train_info.tokens_per_second"
FIGURES = tuple(  # of a trial's panel, beside its scores
    f"train_info.{name}"
    for name in (
        *("trainable_parameters", "total_parameters", "adapter_bytes", "steps", "epochs", "tokens", "final_loss"),
        *("best_loss", "train_seconds", "tokens_per_second", "eval_seconds"),
    )
)
ERROR = ("run_info.error.stage", "run_info.error.type", "run_info.error.message")
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"
TOOLS = {"displaylogo": False, "responsive": True, "modeBarButtonsToRemove": ["select2d", "lasso2d", "autoScale2d"]}
STYLE = f"""
body {{ font: 15px/1.5 {FONT}; color: {INK}; background: #fff; margin: 0 auto; max-width: 1240px; padding: 1.5rem; }}
h1 {{ font-size: 1.6rem; margin: 0 0 .3rem; }} h2 {{ font-size: 1.15rem; margin: 2.2rem 0 .4rem; }}
p {{ margin: .3rem 0 .8rem; max-width: 46rem; }} .note {{ color: #666; font-size: .87rem; }}
a {{ color: #0b5394; }} code, pre {{ font: 13px/1.45 ui-monospace, Menlo, Consolas, monospace; }}
pre {{ background: #f6f6f4; padding: .7rem .9rem; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; }}
table.dataTable {{ font-size: 13px; font-variant-numeric: tabular-nums; }}
.trial {{ display: none; border: 1px solid {RULE}; border-left: 3px solid #0072B2; padding: .4rem 1.2rem 1rem; }}
.trial:target {{ display: block; }} .trial h3 {{ font-size: 1.05rem; margin: .6rem 0; overflow-wrap: anywhere; }}
dl {{ display: grid; grid-template-columns: minmax(8rem, max-content) 1fr; gap: .1rem 1.2rem; }}
dl {{ margin: 0; font-size: 13px; }}
dt {{ color: #666; overflow-wrap: anywhere; }} dd {{ margin: 0; overflow-wrap: anywhere; }}
#common dl {{ display: block; columns: 22rem; }} #common dt {{ float: left; clear: left; margin-right: .6rem; }}
.pair {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(22rem, 1fr)); gap: 1.5rem; }}
.texts {{ border-collapse: collapse; font-size: 13px; width: 100%; table-layout: fixed; }}
.texts td, .texts th {{ border: 1px solid {RULE}; padding: .2rem .5rem; text-align: left; vertical-align: top; }}
.texts td {{ white-space: pre-wrap; overflow-wrap: anywhere; }} .texts th:first-child {{ width: 3rem; }}
details p {{ max-width: none; font-size: 13px; }} label {{ margin-right: .8rem; }} select {{ max-width: 24rem; }}
@media print {{ body {{ max-width: none; padding: 0; font-size: 11px; }} .dt-layout-row:not(.dt-layout-table),
  .modebar-container {{ display: none !important; }} section {{ break-inside: avoid; }} }}
"""
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
{scripts}
</head>
<body>
{body}
</body>
</html>
"""


def write(table: pd.DataFrame, steps: pd.DataFrame, folder: Path, predictions: stats.Predictions | None = None) -> Path:
    """Write the page of the study in ``folder``: ``table`` has a row a trial, ``steps`` a row a logged step."""
    shared, differing = _settings(table)
    table = table.assign(**{CALLED: columns.named_trials(table)})
    every = stats.tasks(table)
    tasks = dict(sorted(every.items(), key=lambda task: -len(task[1]))[:TASKS])
    left = f"<p class='note'>The {TASKS} of {len(every)} models and datasets with the most trials.</p>"
    drawn = [(name if len(every) > 1 else "", part) for name, part in tasks.items()]
    fronts = [
        _frontier(name, stats.configurations(part, predictions), part, f"frontier-plot-{n}")
        for n, (name, part) in enumerate(drawn)
    ]
    curves = [_curves(name, part, steps, f"curves-plot-{n}") for n, (name, part) in enumerate(drawn)]
    more = left if len(every) > len(tasks) else ""
    sections = [
        ("Trials", "trials", _trials(table, effects.factors(table))),
        ("Quality and cost", "frontier", more + "\n".join(fronts) if any(fronts) else ""),
        ("Rows won and lost", "rows", more + _rows(tasks, folder, predictions) if predictions else ""),
        ("Learning curves", "curves", more + "\n".join(curves) if any(curves) else ""),
        ("A trial", "trial", _panels(table, differing, folder)),
        ("What all trials have in common", "common", f"<div>{_definitions(shared)}</div>" if shared else ""),
    ]
    shown = [(heading, name, text) for heading, name, text in sections if text]
    body = "\n".join(f'<section id="{name}"><h2>{heading}</h2>\n{text}</section>' for heading, name, text in shown)
    file = folder / REPORT
    title = f"{folder.name}: {trials_in_words(len(table))}"
    content = {
        "title": html.escape(title),
        "style": STYLE,
        "scripts": _scripts(),
        "body": _heading(table, folder) + body,
    }
    write_text(file, PAGE.format(**content))
    return file


def _scripts() -> str:
    """The two libraries, whole."""
    from itables import options
    from itables.javascript import generate_init_offline_itables_html
    from plotly.offline import get_plotlyjs

    options.display_logo_when_loading = False
    tables = generate_init_offline_itables_html(options.dt_bundle).partition("<div")[0]
    return f"<script>{get_plotlyjs()}</script>\n{tables}"


def _heading(table: pd.DataFrame, folder: Path) -> str:
    parts = [counted(table[STATUS])]
    for column, name in (("meta_info.torch.version", "torch"), ("meta_info.packages.peft.version", "PEFT")):
        if columns.measured(table, column):
            parts.append(f"{name} " + ", ".join(map(str, table[column].dropna().unique())))
    newest = table["run_info.created_at"].dropna().max() if "run_info.created_at" in table else None
    parts.append(f"newest of {newest}" if isinstance(newest, str) else "")
    said = html.escape("; ".join(filter(None, parts)))
    return f"<h1>{html.escape(folder.name)}</h1>\n<p class='note'>{said}</p>\n"


# ---- the table -------------------------------------------------------------------------------------


def _trials(table: pd.DataFrame, found: Sequence[str]) -> str:
    """The table of all trials, with a search of each column in its head."""
    import itables

    linked = set(table[TRIAL].tail(PANELS))
    names = [
        f'<a href="#{html.escape(trial)}">{_text(label)}</a>' if trial in linked else _text(label)
        for trial, label in zip(table[TRIAL], table[CALLED], strict=True)
    ]
    seeds = ["config.seed"] if "config.seed" in table and table["config.seed"].nunique() > 1 else []
    cells = {"trial": names, "status": [_text(value) for value in table[STATUS]]}
    for column in [*found, *seeds]:
        values = (value if pd.isna(value) or column != columns.RANK else int(value) for value in table[column])
        cells[_fresh(_text(columns.factor_name(column)), cells)] = ["" if pd.isna(v) else _text(v) for v in values]
    for column in columns.scores(table):
        cells[_fresh(_text(columns.score_name(column)), cells)] = _numbers(table[column])
    for cost in columns.costs(table):
        factor, name = cost.scale(float(table[cost.column].max()))
        cells[_fresh(_text(name), cells)] = _numbers(table[cost.column] / factor)
    head = [{"target": 0, "content": ["order"]}, {"target": 1, "content": ["search"]}]
    made: str = itables.to_html_datatable(
        pd.DataFrame(cells),
        table_id="all-trials",
        connected=False,
        allow_html=True,  # the links; everything else is escaped above
        maxBytes=0,
        maxColumns=0,
        showIndex=False,
        classes="display compact nowrap",
        style="width:100%",
        scrollX=True,
        pageLength=25,
        lengthMenu=[25, 100, 1000],
        columnControl=head,
        ordering={"indicators": False, "handlers": False},
        buttons=["csvHtml5", "colvis"],
        layout={
            "topStart": "buttons",
            "topEnd": "search",
            "bottomStart": "info",
            "bottomEnd": ["pageLength", "paging"],
        },
    )
    return f"<p class='note'>A name leads to the trial's configuration and its command.</p>\n{made}"


def _text(value: Any) -> str:
    """``value`` as text that no browser takes for markup."""
    return html.escape(str(value), quote=False)


def _fresh(name: str, taken: Mapping[str, Any]) -> str:
    """``name``, or with a number where a column is called so already."""
    return name if name not in taken else next(n for k in itertools.count(2) if (n := f"{name} {k}") not in taken)


def _numbers(values: pd.Series[Any]) -> list[str]:
    """Numbers to four digits, large ones whole; empty where there is none."""
    floats = values.astype(float).to_numpy(dtype=float, na_value=np.nan)
    return ["" if np.isnan(value) else _number(float(value)) for value in floats]


def _number(value: float) -> str:
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


def _axes(merged: pd.DataFrame) -> tuple[list[Axis], list[Axis]]:
    """What x and y can show: costs, and scores and the speed."""
    across = []
    for cost in columns.costs(merged):
        factor, name = cost.scale(float(merged[cost.column].max()))
        across.append(Axis(cost.column, name, factor))
    up = [Axis(score, columns.axis_name(score)) for score in columns.scores(merged)]
    return across, [*up, *([Axis(SPEED, "tokens a second in training")] if columns.measured(merged, SPEED) else [])]


def _named(task: str) -> str:
    return f"<h3>{_text(task)}</h3>\n" if task else ""


def _frontier(task: str, merged: pd.DataFrame, table: pd.DataFrame, name: str) -> str:
    """Every configuration with a score, on axes that two menus choose, the best trade-offs of each pair joined.

    A front belongs to a pair of axes, and is a trace of its own. The menu of one axis gives its x to the fronts of
    that axis and none to the others, the other menu does so with y; a trace without x or y is not drawn.
    """
    found = effects.factors(table)
    across, up = _axes(merged)
    good = merged[merged["n"] > 0]
    if not across or not columns.scores(merged) or len(good) < 2:
        return ""
    series = columns.labels(good, found[:1], columns.names(table, labelled=False))
    groups = [(str(label), good.loc[places]) for label, places in good.groupby(series, sort=False).groups.items()]
    names = effects.labels(table).loc[good.index]
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
    menus = [
        _menu(0.0, [(_text(axis.name), y_of(axis), {"yaxis.title.text": _text(axis.name)}) for axis in up]),
        _menu(0.36, [(_text(axis.name), x_of(axis), {"xaxis.title.text": _text(axis.name)}) for axis in across]),
        _menu(0.8, [(f"x {kind}", {}, {"xaxis.type": kind}) for kind in ("linear", "log")]),
    ]
    layout = _layout(across[0].name, up[0].name) | {"updatemenus": menus, "showlegend": len(groups) > 1}
    failed = columns.outcome(merged)
    bars = ", with its 95% interval" if len(good) <= BARS else ""
    note = f"A point is a configuration, the mean of its seeds{bars}. Ringed and joined: no other one "
    note += (
        "is better and cheaper. Hover for all figures; the menus choose the axes; a click in the legend hides a series."
    )
    note += f" Without a point: {failed}." if failed else ""
    return f"{_named(task)}<p class='note'>{note}</p>\n" + _plot(traces, layout, name)


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
    return {"type": "scatter", "mode": "markers", "name": _text(name), "marker": marker, **texts}


def _hover(good: pd.DataFrame, names: pd.Series[Any], axes: Sequence[Axis]) -> list[str]:
    """What the pointer shows of each configuration: its name, its seeds and all figures, with their intervals."""
    lines = [[f"<b>{_text(name)}</b>" for name in names], [f"seeds: {n}" for n in good["n"]]]
    for axis in axes:
        bounds = (axis.numbers(good, part) for part in ("", ".low", ".high"))
        lines.append([_figure_line(axis, *of_one) for of_one in zip(*bounds, strict=True)])
    return ["<br>".join(filter(None, parts)) for parts in zip(*lines, strict=True)]


def _figure_line(axis: Axis, value: float | None, low: float | None, high: float | None) -> str:
    if value is None:
        return ""
    interval = "" if low is None or high is None or low == high else f" [{_number(low)}, {_number(high)}]"
    return f"{_text(axis.name)}: {_number(value)}{interval}"


# ---- rows won and lost -----------------------------------------------------------------------------

CHOICE = """<p class='note'>Any two of the untouched base and the {count} best configurations. A row is won where more
seeds answer it rightly, or the loss a token is smaller. The answers shown are those of the first seed, and rows are
numbered as the lines of its file.</p>
<p><label>score <select id="rows-score"></select></label> <label>of <select id="rows-first"></select></label>
<label>against <select id="rows-second"></select></label></p>
<div id="rows-shown"></div>
<script type="application/json" id="rows-data">{data}</script>
<script>{script}</script>"""
# Text of the records is put into the page as text (textContent), never as HTML.
CHOOSE = """(() => {
  const known = JSON.parse(document.getElementById("rows-data").textContent);
  const [score, first, second, shown] = ["score", "first", "second", "shown"].map(
    (name) => document.getElementById("rows-" + name));
  const add = (parent, kind, text) => {
    const made = document.createElement(kind);
    if (text !== undefined) made.textContent = text;
    parent.appendChild(made);
    return made;
  };
  const fill = (select, names, place) => {
    select.replaceChildren();
    names.forEach((name, n) => { add(select, "option", name).value = n; });
    select.value = place;
  };
  const figure = (of, member, row) => {
    const value = of.figures[member][row], seeds = of.members[member].seeds;
    if (of.losses) return value.toFixed(3) + " nats a token";
    return seeds > 1 ? Math.round(value * seeds) + " of " + seeds + " seeds right" : value ? "right" : "wrong";
  };
  const rows = (of, won, title, pair) => {
    add(shown, "h3", title + ": " + won.length + " of " + of.figures[0].length + " rows");
    const written = won.filter((row) => row in of.texts).slice(0, of.each);
    if (written.length) {
      const table = add(shown, "table"), head = add(table, "tr");
      table.className = "texts";
      ["row", "prompt", "answer", ...pair.map((m) => of.members[m].name)].forEach((name) => add(head, "th", name));
      written.forEach((row) => {
        const line = add(table, "tr"), [prompt, answer, said] = of.texts[row];
        [row + 1, prompt, answer, ...pair.map((m) => figure(of, m, row) + "\\n" + said[m])].forEach(
          (text) => add(line, "td", text));
      });
    }
    if (won.length) {
      const every = add(shown, "details");
      add(every, "summary", "all of these rows");
      add(every, "p", won.map((row) => row + 1).sort((a, b) => a - b).join(", "));
    }
  };
  const show = () => {
    const of = known[score.value], a = +first.value, b = +second.value;
    const sign = of.losses ? -1 : 1;
    const apart = of.figures[a].map((value, row) => sign * (value - of.figures[b][row]));
    const ahead = (side) => [...apart.keys()].filter((row) => side * apart[row] > 1e-6).sort(
      (one, other) => side * (apart[other] - apart[one]) || one - other);
    shown.replaceChildren();
    add(shown, "p", "Answers shown: " + [a, b].map((m) => of.members[m].file).join(" and ")).className = "note";
    rows(of, ahead(1), "won by " + of.members[a].name, [a, b]);
    rows(of, ahead(-1), "won by " + of.members[b].name, [a, b]);
  };
  const choose = () => {
    const of = known[score.value], names = of.members.map((member) => member.name);
    fill(first, names, of.start[0]);
    fill(second, names, of.start[1]);
    show();
  };
  fill(score, known.map((of) => of.title), 0);
  score.addEventListener("change", choose);
  [first, second].forEach((select) => select.addEventListener("change", show));
  choose();
})();"""


def _rows(tasks: Mapping[str, pd.DataFrame], folder: Path, predictions: stats.Predictions) -> str:
    """A choice of two configurations or bases, and the rows that either of them wins."""
    found: list[tuple[str, paired.Rows]] = []
    for task, table in tasks.items():
        names = effects.labels(table)
        for score in columns.main_scores(table):
            measured = stats.measure(table, score)
            best = measured.numbers[np.argsort(-columns.direction(score) * measured.means, kind="stable")]
            called = dict(zip(names.index.tolist(), names.tolist(), strict=True))
            rows = paired.rows(table, score, predictions, called, best[:MEMBERS].tolist())
            title = f"{columns.score_name(score)}, {task}" if len(tasks) > 1 else columns.score_name(score)
            found += [(title, rows)] if rows is not None else []
    if not found:
        return ""
    data = json.dumps([_pairs_of(title, rows, folder, most=max(TEXTS // len(found), 4)) for title, rows in found])
    for character in "<>&":  # nothing that could end the script or begin markup
        data = data.replace(character, f"\\u{ord(character):04x}")
    return CHOICE.format(count=MEMBERS, data=data, script=CHOOSE)


def _pairs_of(title: str, rows: paired.Rows, folder: Path, most: int) -> dict[str, Any]:
    """What the page knows of a score's rows; of ``most`` of them also what was said."""
    digits = 4 if rows.losses else 3
    places = [*rows.pairs(), *itertools.combinations(range(len(rows.members)), 2)]
    shown = paired.examples(rows, places, each=EACH, most=most)
    every = (paired.texts(folder, rows, place) for place in range(len(rows.members)))
    written = [{row: of[row].cut(PROMPT, TEXT) for row in shown} for of in every]
    return {
        "title": title,
        "losses": rows.losses,
        "each": EACH,
        "start": (rows.pairs() or [(0, 1)])[0],
        "members": [{"name": m.name, "seeds": m.seeds, "file": m.file(rows.column)} for m in rows.members],
        "figures": [[round(value, digits) for value in figures] for figures in rows.figures.tolist()],
        "texts": {n: [written[0][n].prompt, written[0][n].answer, [of[n].said for of in written]] for n in shown},
    }


# ---- learning curves -------------------------------------------------------------------------------


def _curves(task: str, table: pd.DataFrame, steps: pd.DataFrame, name: str) -> str:
    """Loss and validation loss by step, of the best trials."""
    shown = [c for c in ("loss", "validation_loss") if columns.measured(steps, c)]
    if not shown:
        return ""
    score = next(iter(columns.main_scores(table)), None)
    best = table.sort_values(score, ascending=columns.direction(score) < 0, na_position="last") if score else table
    inside = best[best[TRIAL].isin(set(steps.loc[steps[shown].notna().any(axis=1), "trial"]))][:CURVES].sort_index()
    names = dict(zip(inside[TRIAL], inside[CALLED], strict=True))
    rows = steps[steps["trial"].isin(names)]
    traces = []
    for place, (trial, label) in enumerate(names.items()):
        mine = rows[rows["trial"] == trial]
        for column in shown:
            traces += _curve(mine, column, place, label)
    if not traces:
        return ""
    scales: list[Any] = [(f"loss {kind}", {}, {"yaxis.type": kind}) for kind in ("linear", "log")]
    layout = _layout("step", "loss") | {"updatemenus": [_menu(0.0, scales)], "hovermode": "closest"}
    note = "Lines: training loss; dotted, with marks: validation loss. A click in the legend hides a trial, a double "
    note += "click shows it alone."
    if len(table) > len(names):
        note += f" Shown: {len(names)} of {len(table)} trials, the best that have logged steps."
    return f"{_named(task)}<p class='note'>{note}</p>\n" + _plot(traces, layout, name)


def _curve(mine: pd.DataFrame, column: str, place: int, name: str) -> list[dict[str, Any]]:
    points = mine[mine[column].notna()]
    if points.empty:
        return []
    points = points.iloc[np.unique(np.linspace(0, len(points) - 1, CURVE_POINTS).round().astype(int))]
    validation = column != "loss"
    kind = "validation" if validation else "training"
    look = {"color": COLOURS[place % len(COLOURS)], "width": 1.4, "dash": "dot" if validation else "solid"}
    return [
        {
            "type": "scatter",
            "mode": "lines+markers" if validation or len(points) < 3 else "lines",
            "marker": {"symbol": SYMBOLS[(place + place // len(COLOURS)) % len(SYMBOLS)], "size": 7},
            "name": _text(name),
            "legendgroup": str(place),
            "showlegend": not validation,
            "line": look,
            "x": points["step"].astype(float).tolist(),
            "y": [float(f"{value:.5g}") for value in points[column].astype(float)],
            "hovertemplate": f"<b>{_text(name)}</b><br>step %{{x}}<br>{kind} loss %{{y}}<extra></extra>",
        }
    ]


# ---- plotly ----------------------------------------------------------------------------------------


def _menu(x: float, options: Sequence[tuple[str, dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    """A menu above the plot, at ``x`` of its width: of each option its label, and what it sets in traces and layout."""
    buttons = [{"label": label, "method": "update", "args": [data, layout]} for label, data, layout in options]
    where = {"x": x, "xanchor": "left", "y": 1.02, "yanchor": "bottom", "direction": "down", "pad": {"b": 6}}
    return {
        "buttons": buttons,
        "showactive": True,
        "bgcolor": "#fff",
        "bordercolor": RULE,
        "font": {"size": 12},
        **where,
    }


def _layout(x: str, y: str) -> dict[str, Any]:
    axis = {"gridcolor": RULE, "zeroline": False, "linecolor": INK, "ticks": "outside", "automargin": True}
    return {
        "xaxis": axis | {"title": {"text": _text(x)}},
        "yaxis": axis | {"title": {"text": _text(y)}},
        "font": {"family": FONT, "size": 13, "color": INK},
        "paper_bgcolor": "#fff",
        "plot_bgcolor": "#fff",
        "height": 520,
        "margin": {"l": 60, "r": 20, "t": 50, "b": 50},
        "legend": {"font": {"size": 11}},
        "hoverlabel": {"bgcolor": "#fff", "bordercolor": FADED, "font": {"color": INK, "size": 12}, "align": "left"},
    }


def _plot(traces: Sequence[dict[str, Any]], layout: dict[str, Any], name: str) -> str:
    from plotly.io import to_html

    figure = {"data": list(traces), "layout": layout}
    made: str = to_html(figure, config=TOOLS, include_plotlyjs=False, full_html=False, div_id=name, validate=False)
    return made


# ---- the trials one by one -------------------------------------------------------------------------


def _settings(table: pd.DataFrame) -> tuple[dict[str, Any], list[str]]:
    """The choices and settings that are the same in all trials, with their values, and those that are not."""
    ours = [c for c in table.columns if c.startswith(("choices.", "config."))]
    first = table.iloc[0]
    same = {c for c in ours if table[c].nunique(dropna=False) <= 1}
    return {c: first[c] for c in ours if c in same and not pd.isna(first[c])}, [c for c in ours if c not in same]


def _panels(table: pd.DataFrame, differing: Sequence[str], folder: Path) -> str:
    """A panel a trial, hidden until the page is asked for it."""
    figures = [c for c in table.columns if c.startswith("eval_info.") and c.endswith(".value")]
    figures += [c for c in FIGURES if c in table]
    rows = table.tail(PANELS)
    text = "<p class='note'>A name in the table above shows a trial here, with what sets it apart and the command "
    text += "that repeats it; what is the same in all trials stands below."
    if len(table) > PANELS:
        text += f" The newest {PANELS} trials have a panel; the records of all are in the study's folder."
    parts = [f"{text}</p>"]
    kept = rows[[TRIAL, STATUS, *(c for c in (*ERROR, WARNINGS) if c in rows), *differing, *figures]]
    for name, row in zip(rows[CALLED], kept.to_dict("records"), strict=True):
        own = {c: row[c] for c in differing if not pd.isna(row[c])}
        found = {c: row[c] for c in figures if not pd.isna(row[c])}
        problem = ": ".join(str(row[c]) for c in ERROR if c in row and not pd.isna(row[c]))
        parts.append(
            f'<article class="trial" id="{html.escape(str(row[TRIAL]))}"><h3>{_text(name)}</h3>'
            f"<p>{_text(row[STATUS])}{': ' + _text(problem) if problem else ''}</p>"
            f"{_warned(row.get(WARNINGS))}<pre>{_text(_command(folder / str(row[TRIAL])))}</pre>"
            f'<div class="pair"><div><h4>Its own settings</h4>{_definitions(own)}</div>'
            f"<div><h4>Figures</h4>{_definitions(found)}</div></div></article>"
        )
    return "\n".join(parts)


def _warned(lines: Any) -> str:
    """What makes the trial's scores say less than they seem to."""
    found = [] if not isinstance(lines, str) else json.loads(lines)
    return "".join(f'<p class="note">Warning: {_text(line)}.</p>' for line in found)


def _command(trial: Path) -> str:
    """The command that runs the trial again, from the overrides that Hydra kept."""
    file = trial / ".hydra" / "overrides.yaml"
    words = usable(lambda: read_yaml(file, [str])) if os.path.lexists(file) else None
    return f"# {trial} holds no .hydra/overrides.yaml" if words is None else "peftsweep " + shlex.join(words)


def _definitions(values: Mapping[str, Any]) -> str:
    """Names and values as a list in two columns."""
    rows = [f"<dt>{_text(_plain_name(c))}</dt><dd>{_text(_plain_value(v))}</dd>" for c, v in values.items()]
    return f"<dl>{''.join(rows)}</dl>" if rows else ""


def _plain_name(column: str) -> str:
    return column.removeprefix("config.").removeprefix("eval_info.").removeprefix("train_info.").removesuffix(".value")


def _plain_value(value: Any) -> str:
    return _number(value) if isinstance(value, float) and value >= 1e-3 else str(value)
