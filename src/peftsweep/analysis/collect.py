"""Runs -> answers: the trials of studies as tables, plots and a short summary; how a study stands."""

from __future__ import annotations

import functools
import gc
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from peftsweep.analysis import export, interchange
from peftsweep.analysis.figures import page, plot
from peftsweep.analysis.statistics import trials as statistics_trials
from peftsweep.analysis.table import columns, naming
from peftsweep.analysis.table.columns import CALLED, NAME, PREDICTION_ERROR
from peftsweep.analysis.table.table import (
    BREAK_EVEN,
    COMPILE,
    RESULTS_FILE,
    SPEED_UP,
    STEPS_FILE,
    check_ending,
    newest,
    predictions,
    read,
    record_file,
    steps,
    together,
    trials,
    write,
    write_parquet,
)
from peftsweep.analysis.table.where import where
from peftsweep.analysis.text import halving_notes, report
from peftsweep.errors import InputError
from peftsweep.observe.display import show_table, size, summary
from peftsweep.study import claims as study_claims
from peftsweep.study import store, sweep_record
from peftsweep.study.record import Result, Status, counted, trials_in_words

NO_SETTINGS = ("choices.profiler", "choices.tracker", "choices.inference")  # that change nothing of a trial
SHOWN = 40  # trials that a printed table holds
Row = dict[Any, Any]  # of a table, by column


@dataclass(frozen=True)
class Options:
    """What ``peftsweep-collect`` is asked for."""

    studies: Sequence[str] = ()  # names or folders; none: all of them
    out: Path | None = None  # one table of the trials of all
    where: str | None = None  # of the trials that are shown and written to `out`
    plots: bool = True  # and report.html
    quality_loss: float = report.QUALITY_LOSS  # share of the best score that advice may give up for speed
    kind: str = "png"  # of the plots' files, or svg
    from_peft: Path | None = None  # result files of PEFT's comparison, which become a study
    to_peft: Path | None = None  # where the trials are written as such


@dataclass
class Collected:
    """A study as it was read."""

    folder: Path
    results: list[Result]
    table: pd.DataFrame = field(init=False)  # a row a trial

    def __post_init__(self) -> None:
        self.table = trials(self.results)


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Millions of values in no circle are read: to look for circles among them takes a sixth of all time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_without_garbage_collection()
def main(options: Options) -> int:
    """``peftsweep-collect``: tables, plots and reports into each study, and one table of all that was asked for."""
    if options.out is not None:
        check_ending(options.out)
    collected = [Collected(folder, read(folder)) for folder in _folders(options)]
    for one in collected:
        if not one.results:
            print(
                f"{one.folder}: no trial yet"
                + "".join(f"; running: {claim}" for claim in study_claims.running(one.folder))
            )
    collected, unwritten = [one for one in collected if one.results], list[Path]()
    every = together([one.table for one in collected])
    chosen = every[where(every, options.where)] if options.where else every
    for one in collected:
        called = one.table.assign(**{CALLED: columns.named_trials(one.table)})
        called = called.assign(**{NAME: columns.named(one.table)})
        mine = called[called["collected.record"].isin(chosen["collected.record"])]
        if len(mine):
            print_study(mine, str(one.folder), of=len(one.table))
        else:
            print(f"{one.folder}: --where chooses none of {trials_in_words(len(one.table))}")
        rows = predictions(one.folder)
        written, said = _write(one, called, rows, options)
        said = report.summary(mine, rows) if options.where or not written else said
        chosen_here = set(mine["collected.record"])
        for line in [
            *said,
            *halving_notes.notes([result for result in one.results if record_file(result) in chosen_here]),
        ]:
            print(line)
        whole = f", of all {trials_in_words(len(one.table))}" if len(mine) < len(one.table) else ""
        if written:
            print("wrote " + ", ".join(str(file) for file in written) + whole)
        else:
            unwritten.append(one.folder)
    if collected:
        _hand_over(chosen, [result for one in collected for result in one.results], options)
    return 2 if unwritten and options.out is None else 0


def _write(
    one: Collected, called: pd.DataFrame, rows: statistics_trials.Predictions, options: Options
) -> tuple[list[Path], list[str]]:
    """Write the tables, figures and reports of a study; gives the files and the summary, none where it is read-only."""
    logged = steps(one.results, dict(zip(called["run_info.trial"], called[CALLED], strict=True)))
    try:
        write_parquet(one.table, one.folder / RESULTS_FILE)
        write_parquet(logged, one.folder / STEPS_FILE)
        drawn = plot.study(one.table, logged, one.folder / "plots", options.kind, rows) if options.plots else []
        findings, said = report.write(one.folder, one.table, logged, drawn, rows, options.quality_loss)
        written = [one.folder / RESULTS_FILE, one.folder / STEPS_FILE, findings, *drawn]
        return written + ([page.write(one.table, logged, one.folder, rows)] if options.plots else []), said
    except OSError as error:
        if error.errno not in (*store.NO_ROOM, *store.NOT_WRITTEN):
            raise
        print(f"{one.folder}: nothing is written there: {error.strerror}", file=sys.stderr)
        return [], []


def _folders(options: Options) -> list[Path]:
    if options.from_peft is not None:
        if len(options.studies) > 1:
            raise InputError(f"--from-peft: fills one study, not {len(options.studies)}")
        return [interchange.from_peft(options.from_peft, *map(Path, options.studies))]
    found = [store.find(name) for name in options.studies] if options.studies else store.studies()
    if not found:
        raise InputError(f"no study under {store.ROOT}/; run peftsweep first, or name a study's folder")
    return found


def _hand_over(chosen: pd.DataFrame, results: Sequence[Result], options: Options) -> None:
    """Write the chosen trials of all studies to where else they were asked for."""
    if options.out is None and options.to_peft is None:
        return
    kept = newest(chosen)
    if (left := len(chosen) - len(kept)) > 0:
        print(f"{left} of {len(chosen)} trials have the same configuration as another one; the newest is kept")
    records = set(kept["collected.record"])
    mine = [result for result in results if record_file(result) in records]
    if options.out is not None:
        write(kept, options.out, lambda: steps(mine))
        print(f"wrote {options.out}")
    if options.to_peft is not None:
        for line in export.to_peft(mine, options.to_peft):
            print(line)


# ---- how a study stands ----------------------------------------------------------------------------


def status(names: Sequence[str]) -> int:
    """``peftsweep-collect --status``: counts by status, what runs, what failed and why; writes nothing."""
    for folder in [store.find(name) for name in names] if names else store.studies():
        results = read(folder)
        claims = study_claims.running(folder)
        print(f"{folder}: {counted(result.status.name for result in results)}, {len(claims)} running")
        for claim in claims:
            print(f"    running: {claim}")
        if cut_off := study_claims.cut_off(folder):
            print(f"    cut off, the same command continues: {', '.join(place.name for place in cut_off)}")
        if last := sweep_record.last(folder):
            outside = last["seconds_outside_trials"]
            print(f"    last sweep: {last['seconds']:.0f} s, {outside:.0f} s of them outside trials")
        for reason, labels in _failures(results).items():
            more = f" and {len(labels) - 3} more" if labels[3:] else ""
            print(f"    {reason}: {'; '.join(labels[:3])}{more}")
    return 0


def _failures(results: Sequence[Result]) -> dict[str, list[str]]:
    """Why trials did not succeed -> the names of those it befell."""
    found: dict[str, list[str]] = {}
    names = naming.of_trees([vars(result) for result in results])
    for result, name in zip(results, names, strict=True):
        if result.status is not Status.success:
            reason = summary(result)[0] if result.error else result.status.name
            found.setdefault(reason, []).append(name)
    return found


# ---- the short table -------------------------------------------------------------------------------


def print_study(table: pd.DataFrame, name: str, *, of: int) -> None:
    """The trials of a study, ``of`` which ``table`` holds those that were chosen: a row each, or the best of many."""
    tasks = statistics_trials.tasks(table)
    title = f"{name}: {counted(table['run_info.status'])}" + (f" ({of:,} in the study)" if len(table) < of else "")
    shown = _best(table, tasks)
    if len(shown) < len(table):
        by = {columns.score_name(score) for task in tasks.values() for score in columns.main_scores(task)[:1]}
        title += f"; the {len(shown)} " + (f"best by {', '.join(sorted(by))}" if by else "newest")
        title += " of each model and dataset" if len(tasks) > 1 else ""
    print_table(shown, title)
    print_generation(shown)
    for line in notes(table, shown):
        print(line)


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


def print_table(table: pd.DataFrame, title: str) -> None:
    """What differs between the trials, how they ended, what they score and cost."""
    names, metrics = columns.names_of_trials(table), columns.scores(table)
    differing = [c for c in dict.fromkeys([*varying(table), *names.settings]) if c in table]
    told = {c: names.key(c) for c in differing}
    for column in differing:
        table = table.assign(**{column: table[column].map(functools.partial(names.value, column))})
    show_table(title, [_short(row, told, metrics, named=not differing) for row in table.to_dict("records")])


def print_generation(table: pd.DataFrame) -> None:
    """How fast each trial generates: the medians over its categories, and the overheads with their 95% intervals."""
    columns = [c for c in table.columns if c.startswith("generation_info.overall.") or c == CALLED]
    rows = [
        _generated(row, variant)
        for row in table[columns].to_dict("records")
        for variant in ("base", "adapted", "merged")
        if pd.notna(row.get(f"generation_info.overall.{variant}.seconds_p50"))
    ]
    if rows:
        show_table("generation", rows)


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


def varying(table: pd.DataFrame) -> list[str]:
    """The choices and settings that differ between the trials."""
    columns = [c for c in table.columns if c.startswith("choices.") and c not in NO_SETTINGS]
    columns += ["config.method.r", "config.train.learning_rate", "config.train.steps", COMPILE, "config.seed"]
    return [c for c in columns if c in table and table[c].nunique(dropna=False) > 1]


def _short(row: Row, differing: Mapping[str, str], metrics: list[str], *, named: bool) -> dict[str, str]:
    def cell(column: str, form: str = "{}") -> str:
        value = row.get(column)
        return "" if value is None or pd.isna(value) else form.format(value)

    name = {"trial": str(row[CALLED])} if named else {}
    short = name | {said: cell(c) for c, said in differing.items()}
    measured = {
        columns.score_name(score): cell(score, "{:.3f}") + cell(f"{score.removesuffix('value')}stderr", " ± {:.3f}")
        for score in metrics
    }
    return short | {"status": row["run_info.status"]} | measured | _cost(row, cell)


def _cost(row: Row, cell: Any) -> dict[str, str]:
    peaks = [row.get(f"memory.train.{name}") for name in ("allocated_peak", "reserved_peak", "rss_peak")]
    peak = next((value for value in peaks if pd.notna(value)), None)
    return {
        "trainable": cell("train_info.trainable_parameters", "{:,}"),
        "adapter": size(row["train_info.adapter_bytes"]) if cell("train_info.adapter_bytes") else "",
        "peak memory": "" if peak is None else size(peak),
        "train s": cell("train_info.train_seconds", "{:.1f}"),
        "tokens/s": cell("train_info.tokens_per_second", "{:,.0f}"),
    }
