"""What `peftsweep-collect` prints of a study: the answer, and a table as wide as the terminal."""

from __future__ import annotations

import functools
import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table as Grid

from peftsweep.analysis.answer import render, tables
from peftsweep.analysis.answer.structure import Answer, Table
from peftsweep.analysis.statistics import trials as statistics_trials
from peftsweep.analysis.statistics.task import memory_of
from peftsweep.analysis.table import columns
from peftsweep.analysis.table.columns import CALLED, PREDICTION_ERROR
from peftsweep.analysis.table.table import BREAK_EVEN, COMPILE, SPEED_UP
from peftsweep.errors import printable
from peftsweep.observe.display import size
from peftsweep.study.record import Status, counted, trials_in_words

NO_SETTINGS = ("choices.profiler", "choices.tracker", "choices.inference")  # that change nothing of a trial
SHOWN = 40  # trials that a printed table holds
MAX_COLUMNS = 12  # of a table in a terminal, however wide that is
PIPE = 200  # characters of a line where there is no terminal, and COLUMNS does not say
MANY_TESTS = 3  # from which on the trials' table has their average, and a table of its own has each
PLUS_MINUS = "±"
NAMES = ("trial", "configuration", "status", "model", "method", "quant")  # columns of words
NARROWEST = 24  # characters of a column of names that is folded
Row = dict[Any, Any]  # of a table, by column


def console() -> Console:
    """Standard output, as wide as the terminal is; colours as NO_COLOR and the terminal allow."""
    found = Console(highlight=False, emoji=False)
    if not found.is_terminal and "COLUMNS" not in os.environ:
        found.width = PIPE
    return found


# ---- tables that fit ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """A column as text; of columns that find no room, those of the highest ``rank`` are left out first."""

    title: str
    cells: list[str]
    rank: int

    @property
    def least(self) -> int:
        """Characters that it needs: no number and no word of its title is broken; names may be folded."""
        longest = max(map(len, self.cells), default=1)
        longest = min(longest, NARROWEST) if self.title in NAMES else longest
        return max([len(word) for word in self.title.split()] + [longest])

    @property
    def most(self) -> int:
        """Characters at which no text in it is folded."""
        return max(len(self.title), *map(len, self.cells), 1)


def fitting(found: Sequence[Shown], width: int) -> list[Shown]:
    """The columns that have room in ``width`` characters, at most `MAX_COLUMNS`, in their order; at least one."""
    order = sorted(range(len(found)), key=lambda place: (found[place].rank, place))
    chosen: list[int] = []
    for place in order:
        with_it = _width([found[n].least for n in [*chosen, place]])
        if not chosen or (len(chosen) < MAX_COLUMNS and with_it <= width):
            chosen.append(place)
    return [found[place] for place in sorted(chosen)]


def _width(columns: Sequence[int]) -> int:
    """Characters of a line of a table of such columns, with what stands between them."""
    return sum(columns) + 3 * len(columns) + 1


def show(title: str, found: Sequence[Shown], to: Console) -> None:
    """Print the columns that fit as a table, and name those that did not."""
    kept = fitting(found, to.width)
    whole = _width([column.most for column in kept]) <= to.width
    to.print(title, markup=False, style="bold", soft_wrap=True)
    grid = Grid(header_style="bold")
    for column in kept:
        named = column.title in NAMES
        width = column.most if whole else None if named else column.least
        head = column.title if whole else "\n".join(_lines(column.title, column.least))
        grid.add_column(escape(head), justify="left" if named else "right", overflow="fold", min_width=width)
    for cells in zip(*(column.cells for column in kept), strict=True):
        grid.add_row(*(escape(printable(cell)) for cell in cells))
    to.print(grid)
    if left := [column.title for column in found if column not in kept]:
        to.print(f"Not shown: {', '.join(left)}; RESULTS.md has all.", markup=False, soft_wrap=True)


def _lines(title: str, width: int) -> list[str]:
    return textwrap.wrap(title, width, break_long_words=False, break_on_hyphens=False)


# ---- the answer --------------------------------------------------------------------------------------


def print_answer(answer: Answer, to: Console) -> None:
    """The sentences of the answer, wrapped between words in a terminal; a command stays one line."""
    for line in render.lines(answer):
        command = line.lstrip().startswith(render.TRAIN)
        style = "bold" if line.endswith(":") and not line.startswith(" ") else None
        to.print(line, markup=False, style=style, soft_wrap=command or not to.is_terminal)


# ---- the trials --------------------------------------------------------------------------------------


def print_study(table: pd.DataFrame, name: str, answer: Answer, *, of: int) -> None:
    """The answer, and the trials of a study, ``of`` which ``table`` holds those that were chosen."""
    to = console()
    print_answer(answer, to)
    tasks = statistics_trials.tasks(table)
    title = f"{name}: {counted(table['run_info.status'])}" + (f" ({of:,} in the study)" if len(table) < of else "")
    shown = _best(table, tasks)
    if len(shown) < len(table):
        by = {columns.score_name(score) for task in tasks.values() for score in columns.main_scores(task)[:1]}
        title += f"; the {len(shown)} " + (f"best by {', '.join(sorted(by))}" if by else "newest")
        title += " of each model and dataset" if len(tasks) > 1 else ""
    of_trials = _columns(shown, all_good=_all_good(table))
    if any(PLUS_MINUS in cell for column in of_trials for cell in column.cells):
        title += f"; {PLUS_MINUS} is one standard error over the test rows"
    show(title, of_trials, to)
    for section in answer.sections_named("table"):
        for found in section.tables[1:]:
            if len(found.columns) >= MANY_TESTS + 2:
                show(render.heading(section).replace(section.title, found.title), _answer_columns(found), to)
    print_generation(shown, to)
    for line in notes(table, shown):
        to.print(line, markup=False, soft_wrap=True)


def _answer_columns(table: Table) -> list[Shown]:
    """The columns of a table of the answer, without intervals."""
    rows = [{key: value for key, value in row.items() if not key.endswith((".low", ".high"))} for row in table.rows]
    return [
        Shown(column.title, [render.cell(row, column) for row in rows[:SHOWN]], place)
        for place, column in enumerate(table.columns)
    ]


def _best(table: pd.DataFrame, tasks: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """All rows of a short table; of a long one the best of each task by its main score, or its newest without one."""
    if len(table) <= SHOWN:
        return table
    chosen: list[Any] = []
    for task in tasks.values():
        values = task[next(iter(columns.main_scores(task)), "run_info.created_at")]
        down = columns.direction(str(values.name)) < 0
        best = values.sort_values(ascending=down, na_position="last", kind="stable").index
        chosen += list(best[: max(1, SHOWN // len(tasks))])
    return table.loc[chosen]


def _all_good(table: pd.DataFrame) -> bool:
    return bool(table["run_info.status"].eq(Status.success.name).all())


def _columns(table: pd.DataFrame, *, all_good: bool) -> list[Shown]:
    """What differs between the trials, how they ended, what they score and cost."""
    names = columns.names_of_trials(table)
    differing = [c for c in dict.fromkeys([*varying(table), *names.settings]) if c in table]
    called = Shown("trial", [str(name) for name in table[CALLED]], 0)
    settings = [_setting(table, names, column) for column in differing]
    room = MAX_COLUMNS // 2
    found = settings if 0 < len(settings) <= room else [called]
    if not all_good:
        found.append(Shown("status", [str(status) for status in table["run_info.status"]], 2))
    return [column for column in [*found, *_scores(table), *_costs(table)] if any(column.cells)]


def _setting(table: pd.DataFrame, names: Any, column: str) -> Shown:
    values = table[column].map(functools.partial(names.value, column))
    return Shown(_title(names.key(column), column), ["" if pd.isna(value) else str(value) for value in values], 0)


def _title(key: str, column: str) -> str:
    """What a setting's column is called: no single letter."""
    if len(key) > 1:
        return key
    return columns.NAMES.get(column, column.removeprefix("config."))


def _scores(table: pd.DataFrame) -> list[Shown]:
    """The headline of each evaluation with its standard error; of many tests the average alone."""
    headlines = columns.main_scores(table)
    tests = [c for c in headlines if statistics_trials.is_share(c, table[c].astype(float))]
    if len(tests) < MANY_TESTS:
        return [_score(table, score) for score in headlines]
    means = table[tests].astype(float).mean(axis=1, skipna=False)
    average = Shown(f"{tables.AVERAGE} of {len(tests)}", ["" if pd.isna(v) else f"{v:.3f}" for v in means], 1)
    return [average, *(_score(table, score) for score in headlines if score not in tests)]


def _score(table: pd.DataFrame, score: str) -> Shown:
    stem = score.removesuffix("value")
    errors, rows = (table.get(f"{stem}{part}", pd.Series(pd.NA, table.index)) for part in ("stderr", "n"))
    cells = [
        "" if pd.isna(value) else f"{value:.3f}" + _spread(error, n)
        for value, error, n in zip(table[score], errors, rows, strict=True)
    ]
    return Shown(columns.score_name(score), cells, 1)


def _spread(error: Any, rows: Any) -> str:
    """A standard error; the number of rows where all agree, as an error of 0 would claim more than is known."""
    if pd.isna(error):
        return ""
    return f" {PLUS_MINUS} {error:.3f}" if error > 0 or pd.isna(rows) else f" ({rows:,.0f} rows)"


def _costs(table: pd.DataFrame) -> list[Shown]:
    def cells(column: str, form: Any) -> list[str]:
        values = table[column] if column in table else pd.Series(pd.NA, table.index)
        return ["" if pd.isna(value) else form(value) for value in values]

    memory = memory_of(table)
    return [
        Shown("trainable", cells("train_info.trainable_parameters", "{:,}".format), 6),
        Shown("adapter", cells("train_info.adapter_bytes", size), 5),
        *([Shown(columns.factor_name(memory), cells(memory, size), 4)] if memory else []),
        Shown("train", cells("train_info.train_seconds", "{:,.1f} s".format), 3),
        Shown("tokens/s", cells("train_info.tokens_per_second", "{:,.0f}".format), 7),
    ]


def varying(table: pd.DataFrame) -> list[str]:
    """The choices and settings that differ between the trials."""
    found = [c for c in table.columns if c.startswith("choices.") and c not in NO_SETTINGS]
    found += ["config.method.r", "config.train.learning_rate", "config.train.steps", COMPILE, "config.seed"]
    return [c for c in found if c in table and table[c].nunique(dropna=False) > 1]


# ---- beside it ---------------------------------------------------------------------------------------


def print_generation(table: pd.DataFrame, to: Console) -> None:
    """How fast each trial generates: the medians over its categories, and the overheads with their 95% intervals."""
    columns = [c for c in table.columns if c.startswith("generation_info.overall.") or c == CALLED]
    rows = [
        _generated(row, variant)
        for row in table[columns].to_dict("records")
        for variant in ("base", "adapted", "merged")
        if pd.notna(row.get(f"generation_info.overall.{variant}.seconds_p50"))
    ]
    if rows:
        titles = list(dict.fromkeys(title for row in rows for title in row))
        show(
            "generation", [Shown(title, [row.get(title, "") for row in rows], n) for n, title in enumerate(titles)], to
        )


def _generated(row: Row, variant: str) -> dict[str, str]:
    prefix = f"generation_info.overall.{variant}."

    def cell(name: str, form: str, factor: float = 1.0) -> str:
        value = row.get(prefix + name)
        return "" if value is None or pd.isna(value) else form.format(value * factor)

    overhead, low, high = (row.get(f"{prefix}overhead.{part}") for part in ("value", "low", "high"))
    interval = "" if low is None or high is None or pd.isna(low) else f" [{low - 1:+.1%}, {high - 1:+.1%}]"
    sizes = sorted(
        int(name.split("_")[1].split(".")[0])
        for name in (c.removeprefix(prefix) for c in row if c.startswith(prefix))
        if name.startswith("batch_") and name.endswith(".tokens_per_second")
    )
    return {
        "trial": row[CALLED],
        "model": variant,
        "first token ms": cell("time_to_first_token_p50", "{:.1f}", 1000),
        "next token ms": cell("seconds_per_token_p50", "{:.2f}", 1000),
        "overhead": "" if overhead is None or pd.isna(overhead) else f"{overhead - 1:+.1%}{interval}",
        **{f"tokens/s at {n}": cell(f"batch_{n}.tokens_per_second", "{:,.0f}") for n in sizes},
    }


def notes(table: pd.DataFrame, shown: pd.DataFrame) -> list[str]:
    """What compiling gained the ``shown`` trials, and how far the predicted memory of all was from the measured."""
    lines = []
    for row in shown[shown[SPEED_UP].notna()].to_dict("records") if SPEED_UP in shown else []:
        pays = "never pays" if math.isinf(row[BREAK_EVEN]) else f"pays from step {row[BREAK_EVEN]:,.0f} on"
        lines.append(f"{row[CALLED]}: {row[COMPILE]} steps are {row[SPEED_UP]:.2f} times as fast as eager ones; {pays}")
    errors = table[PREDICTION_ERROR].dropna().astype(float) if PREDICTION_ERROR in table else pd.Series(dtype=float)
    if not errors.empty:
        spread = f"{errors.min():+.0%} to {errors.max():+.0%} over {trials_in_words(len(errors))}"
        lines.append(
            f"predicted training memory: median error {errors.median():+.0%} ({spread}), measured on the device"
        )
    return lines
