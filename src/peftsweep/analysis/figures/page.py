"""report.html: a study as one page that opens offline, with its table, its frontier, its curves and each trial.

The page needs nothing but itself. DataTables (through itables) sorts and filters, plotly draws and hovers, and the
rest is HTML and CSS: a trial's panel is shown by following the link to it. All text of the records is escaped.
"""

from __future__ import annotations

import dataclasses
import html
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from peftsweep.analysis.answer import build, render
from peftsweep.analysis.answer.structure import Answer
from peftsweep.analysis.figures.axes import INK, RULE
from peftsweep.analysis.figures.charts import (
    FONT,
    THEME,
    TRIAL,
    curves_chart,
    format_number,
    format_numbers,
    frontier_chart,
    plain_text,
)
from peftsweep.analysis.statistics import effects, trials
from peftsweep.analysis.statistics import measured as statistics_measured
from peftsweep.analysis.statistics.task import Task, study_tasks
from peftsweep.analysis.table import columns
from peftsweep.analysis.table.columns import CALLED, STATUS, WARNINGS
from peftsweep.analysis.text import paired
from peftsweep.study.record import counted, trials_in_words, write_text

REPORT = "report.html"
PANELS = 2000  # trials with a panel of their own: the newest
TASKS = 6  # pairs of model and dataset with plots: those of the most trials
MEMBERS = 40  # configurations whose rows can be compared: the best
TEXTS, EACH = 200, 4  # rows whose texts are there, of all scores together; and of each two of them
PROMPT, TEXT = 400, 300  # characters of a prompt, and of an answer
FIGURES = tuple(  # of a trial's panel, beside its scores
    f"train_info.{name}"
    for name in (
        *("trainable_parameters", "total_parameters", "adapter_bytes", "steps", "epochs", "tokens", "final_loss"),
        *("best_loss", "train_seconds", "tokens_per_second", "eval_seconds"),
    )
)
ERROR = ("run_info.error.stage", "run_info.error.type", "run_info.error.message")
STYLE = f"""
:root {{ color-scheme: light dark; --ink: {INK}; --paper: #fff; --rule: {RULE}; --soft: #f6f6f4; --note: #666;
  --link: #0b5394; }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e4e4e4; --paper: #16181c; --rule: #3c4047; --soft: #22252b;
  --note: #a2a6ad; --link: #8ab8f0; }} }}
body {{ font: 15px/1.5 {FONT}; color: var(--ink); background: var(--paper); margin: 0 auto; max-width: 1240px;
  padding: 1.5rem; }}
h1 {{ font-size: 1.6rem; margin: 0 0 .3rem; }} h2 {{ font-size: 1.15rem; margin: 2.2rem 0 .4rem; }}
h3 {{ font-size: 1rem; margin: 1rem 0 .3rem; }}
p {{ margin: .3rem 0 .8rem; max-width: 46rem; overflow-wrap: anywhere; }}
.note {{ color: var(--note); font-size: .87rem; }}
a {{ color: var(--link); }} code, pre {{ font: 13px/1.45 ui-monospace, Menlo, Consolas, monospace; }}
pre, p code {{ background: var(--soft); }} p code {{ padding: .1rem .25rem; }}
pre {{ padding: .7rem .9rem; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; }}
section.answer {{ border-left: 3px solid #0072B2; padding-left: 1rem; margin-top: 1.2rem; }}
section.answer h2 {{ margin-top: 0; }} section.use p:first-of-type {{ font-size: 1.15rem; }}
.wide {{ overflow-x: auto; }} .printed {{ display: none; }}
table.plain {{ border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }}
table.plain td, table.plain th {{ border-bottom: 1px solid var(--rule); padding: .2rem .6rem; text-align: right; }}
table.plain td:first-child, table.plain th:first-child {{ text-align: left; }}
table.dataTable {{ font-size: 13px; font-variant-numeric: tabular-nums; }}
.trial {{ display: none; border: 1px solid var(--rule); border-left: 3px solid #0072B2; padding: .4rem 1.2rem 1rem; }}
.trial:target {{ display: block; }} .trial h3 {{ font-size: 1.05rem; margin: .6rem 0; overflow-wrap: anywhere; }}
dl {{ display: grid; grid-template-columns: minmax(8rem, max-content) 1fr; gap: .1rem 1.2rem; }}
dl {{ margin: 0; font-size: 13px; }}
dt {{ color: var(--note); overflow-wrap: anywhere; }} dd {{ margin: 0; overflow-wrap: anywhere; }}
#common dl {{ display: block; columns: 22rem; }} #common dt {{ float: left; clear: left; margin-right: .6rem; }}
.pair {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); gap: 1.5rem; }}
.texts {{ border-collapse: collapse; font-size: 13px; width: 100%; table-layout: fixed; }}
.texts td, .texts th {{ border: 1px solid var(--rule); padding: .2rem .5rem; text-align: left; vertical-align: top; }}
.texts td {{ white-space: pre-wrap; overflow-wrap: anywhere; }} .texts th:first-child {{ width: 3rem; }}
details p {{ max-width: none; font-size: 13px; }} label {{ margin-right: .8rem; }}
select {{ max-width: min(24rem, 60vw); font: inherit; font-size: 13px; }}
@media (max-width: 700px) {{ body {{ padding: .7rem; }} section.answer {{ padding-left: .6rem; }}
  .texts {{ display: block; overflow-x: auto; table-layout: auto; }} dl {{ grid-template-columns: 1fr; }}
  dd {{ margin-bottom: .3rem; }} }}
@media print {{ :root {{ --ink: #000; --paper: #fff; --rule: #bbb; --soft: #f4f4f4; --note: #444; --link: #000; }}
  body {{ max-width: none; padding: 0; font-size: 11px; }} .menus, .modebar-container, label, #trials > .note,
  #trials .dt-container {{ display: none !important; }} tr, .js-plotly-plot, section.answer {{ break-inside: avoid; }}
  .printed {{ display: block; }} .note {{ font-size: 10px; }}
  h2, h3 {{ break-after: avoid; }} .wide {{ overflow: visible; }} table.plain {{ font-size: 9px; }} }}
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
<script>{theme}</script>
</body>
</html>
"""


def write(
    table: pd.DataFrame,
    steps: pd.DataFrame,
    folder: Path,
    predictions: trials.Predictions | None = None,
    answer: Answer | None = None,
    tasks: Sequence[Task] | None = None,
) -> Path:
    """Write the page of the study in ``folder``: ``table`` has a row a trial, ``steps`` a row a logged step.

    It opens with the ``answer``, which is made here where it is not given, as are the ``tasks`` of ``table``.
    """
    shared, differing = _settings(table)
    table = table.assign(**{CALLED: columns.named_trials(table)})
    every = study_tasks(table, predictions) if tasks is None else tasks
    answer = answer or build.answer(folder, table, every, steps)
    most = sorted(every, key=lambda task: -len(task.table))[:TASKS]
    left = f"<p class='note'>The {TASKS} of {len(every)} models and datasets with the most trials.</p>"
    drawn = [(task.name if len(every) > 1 else "", task) for task in most]
    fronts = [frontier_chart(title, task, f"frontier-plot-{n}") for n, (title, task) in enumerate(drawn)]
    curves = [curves_chart(title, task.table, steps, f"curves-plot-{n}") for n, (title, task) in enumerate(drawn)]
    more = left if len(every) > len(most) else ""
    sections = [
        ("Trials", "trials", _trials(table, effects.factors(table)) + _printed(answer)),
        ("Quality and cost", "frontier", more + "\n".join(fronts) if any(fronts) else ""),
        ("Rows won and lost", "rows", more + _rows(most, folder, predictions) if predictions else ""),
        ("Learning curves", "curves", more + "\n".join(curves) if any(curves) else ""),
        ("A trial", "trial", _panels(table, differing, folder)),
    ]
    common = _section("What all trials have in common", "common", _definitions(shared)) if shared else ""
    body = "\n".join([*_answer(answer), *(_section(*part) for part in sections if part[2]), *_measured(answer), common])
    file = folder / REPORT
    title = f"{folder.name}: {trials_in_words(len(table))}"
    content = {
        "title": html.escape(title),
        "style": STYLE,
        "scripts": _scripts(),
        "body": _heading(table, folder) + body,
        "theme": THEME,
    }
    write_text(file, PAGE.format(**content))
    return file


def _answer(answer: Answer) -> list[str]:
    """The sections of the answer, in their order, and the tables of scores where there are several tests."""
    with_sentences = [part for part in answer.sections if part.sentences]
    scores = [part for part in answer.sections_named("table") if len(part.tables) > 1]
    return [
        f'<section class="answer {html.escape(part.name)}"><h2>{html.escape(render.heading(part))}</h2>\n'
        f"{render.as_html(part)}</section>"
        for part in [*with_sentences, *scores]
    ]


def _printed(answer: Answer) -> str:
    """The table that is printed in place of the one of trials, which scrolls: scores and costs of configurations."""
    tables = [dataclasses.replace(part, tables=part.tables[:1]) for part in answer.sections_named("table")]
    return f'<div class="printed">{"".join(map(render.as_html, tables))}</div>'


def _measured(answer: Answer) -> list[str]:
    """A section for everything else that was measured."""
    found = [part for part in answer.sections if not part.sentences and part.name != "table"]
    return [
        _section(html.escape(render.heading(part)), f"measured-{n}", render.as_html(part))
        for n, part in enumerate(found)
    ]


def _section(heading: str, name: str, text: str) -> str:
    return f'<section id="{name}"><h2>{heading}</h2>\n{text}</section>'


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
    text = html.escape("; ".join(filter(None, parts)))
    return f"<h1>{html.escape(folder.name)}</h1>\n<p class='note'>{text}</p>\n"


# ---- the table -------------------------------------------------------------------------------------


def _trials(table: pd.DataFrame, found: Sequence[str]) -> str:
    """The table of all trials, with a search of each column in its head."""
    import itables

    linked = set(table[TRIAL].tail(PANELS))
    names = [
        f'<a href="#{html.escape(trial)}">{plain_text(label)}</a>' if trial in linked else plain_text(label)
        for trial, label in zip(table[TRIAL], table[CALLED], strict=True)
    ]
    seeds = ["config.seed"] if "config.seed" in table and table["config.seed"].nunique() > 1 else []
    cells = {"trial": names, "status": [plain_text(value) for value in table[STATUS]]}
    for column in [*found, *seeds]:
        values = (value if pd.isna(value) or column != columns.RANK else int(value) for value in table[column])
        cells[_fresh(plain_text(columns.factor_name(column)), cells)] = [
            "" if pd.isna(v) else plain_text(v) for v in values
        ]
    for column in columns.scores(table):
        cells[_fresh(plain_text(columns.score_name(column)), cells)] = format_numbers(table[column])
    for cost in columns.costs(table):
        factor, name = cost.scale(float(table[cost.column].max()))
        cells[_fresh(plain_text(name), cells)] = format_numbers(table[cost.column] / factor)
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


def _fresh(name: str, taken: Mapping[str, Any]) -> str:
    """``name``, with a number where there is a column of that name already."""
    return name if name not in taken else next(n for k in itertools.count(2) if (n := f"{name} {k}") not in taken)


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
        const line = add(table, "tr"), [prompt, answer, predictions] = of.texts[row];
        [row + 1, prompt, answer, ...pair.map((m) => figure(of, m, row) + "\\n" + predictions[m])].forEach(
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


def _rows(tasks: Sequence[Task], folder: Path, predictions: trials.Predictions) -> str:
    """A choice of two configurations or bases, and the rows that either of them wins."""
    found: list[tuple[str, paired.Rows]] = []
    for task in tasks:
        names = task.labels
        for score in task.scores:
            measured = statistics_measured.measure(task.table, score)
            best = measured.numbers[np.argsort(-columns.direction(score) * measured.means, kind="stable")]
            called = dict(zip(names.index.tolist(), names.tolist(), strict=True))
            rows = paired.rows(task.table, score, predictions, called, best[:MEMBERS].tolist())
            title = f"{columns.score_name(score)}, {task.name}" if len(tasks) > 1 else columns.score_name(score)
            found += [(title, rows)] if rows is not None else []
    if not found:
        return ""
    data = json.dumps([_pairs_of(title, rows, folder, most=max(TEXTS // len(found), 4)) for title, rows in found])
    for character in "<>&":  # nothing that could end the script or begin markup
        data = data.replace(character, f"\\u{ord(character):04x}")
    return CHOICE.format(count=MEMBERS, data=data, script=CHOOSE)


def _pairs_of(title: str, rows: paired.Rows, folder: Path, most: int) -> dict[str, Any]:
    """The rows of a score as the page holds them; of at most ``most`` of them the texts too."""
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
        "texts": {n: [written[0][n].prompt, written[0][n].answer, [of[n].output for of in written]] for n in shown},
    }


# ---- the trials one by one -------------------------------------------------------------------------


def _settings(table: pd.DataFrame) -> tuple[dict[str, Any], list[str]]:
    """The choices and settings that are the same in all trials, with their values, and those that are not."""
    ours = [c for c in table.columns if c.startswith(("choices.", "config."))]
    first = table.iloc[0]
    same = {c for c in ours if table[c].nunique(dropna=False) <= 1}
    return {c: first[c] for c in ours if c in same and not pd.isna(first[c])}, [c for c in ours if c not in same]


def _panels(table: pd.DataFrame, differing: Sequence[str], folder: Path) -> str:
    """A panel for each trial, which is hidden until its trial is chosen."""
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
            f'<article class="trial" id="{html.escape(str(row[TRIAL]))}"><h3>{plain_text(name)}</h3>'
            f"<p>{plain_text(row[STATUS])}{': ' + plain_text(problem) if problem else ''}</p>"
            f"{_warned(row.get(WARNINGS))}<pre>{plain_text(_command(folder / str(row[TRIAL])))}</pre>"
            f'<div class="pair"><div><h4>Its own settings</h4>{_definitions(own)}</div>'
            f"<div><h4>Figures</h4>{_definitions(found)}</div></div></article>"
        )
    return "\n".join(parts)


def _warned(lines: Any) -> str:
    """The warnings in the trial's record."""
    found = [] if not isinstance(lines, str) else json.loads(lines)
    return "".join(f'<p class="note">Warning: {plain_text(line)}.</p>' for line in found)


def _command(trial: Path) -> str:
    """The command that runs the trial again, or that none is known."""
    return build.command(trial) or f"# {trial} holds no .hydra/overrides.yaml"


def _definitions(values: Mapping[str, Any]) -> str:
    """Names and values as a list in two columns."""
    rows = [f"<dt>{plain_text(_plain_name(c))}</dt><dd>{plain_text(_plain_value(v))}</dd>" for c, v in values.items()]
    return f"<dl>{''.join(rows)}</dl>" if rows else ""


def _plain_name(column: str) -> str:
    return column.removeprefix("config.").removeprefix("eval_info.").removeprefix("train_info.").removesuffix(".value")


def _plain_value(value: Any) -> str:
    return format_number(value) if isinstance(value, float) and value >= 1e-3 else str(value)
