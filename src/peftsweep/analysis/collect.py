"""Runs -> answers: the trials of studies as tables, plots and a short summary; how a study stands."""

from __future__ import annotations

import gc
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from peftsweep.analysis import export, forecast_report, interchange, terminal
from peftsweep.analysis.answer import build, render, structure
from peftsweep.analysis.answer.structure import Answer
from peftsweep.analysis.figures import page, plot
from peftsweep.analysis.statistics import trials as statistics_trials
from peftsweep.analysis.statistics.task import study_tasks
from peftsweep.analysis.table import columns, naming
from peftsweep.analysis.table.columns import CALLED, NAME
from peftsweep.analysis.table.table import (
    RESULTS_FILE,
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
from peftsweep.analysis.text import halving_notes, recommendations, report
from peftsweep.errors import InputError
from peftsweep.observe.display import summary
from peftsweep.study import claims as study_claims
from peftsweep.study import record, store, sweep_record
from peftsweep.study.record import Result, Status, counted, trials_in_words


@dataclass(frozen=True)
class Options:
    """The options of ``peftsweep-collect``."""

    studies: Sequence[str] = ()  # names or folders; none: all of them
    out: Path | None = None  # one table of the trials of all
    where: str | None = None  # of the trials that are shown and written to `out`
    plots: bool = True  # and report.html
    quality_loss: float = recommendations.QUALITY_LOSS  # share of the best score that advice may give up for speed
    kind: str = "png"  # of the plots' files, or svg
    from_peft: Path | None = None  # result files of PEFT's comparison, which become a study
    to_peft: Path | None = None  # where the trials are written as such
    json: bool = False  # the answer as answer.json holds it on stdout, everything else on stderr


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
    """Reading makes millions of objects without reference cycles; looking for cycles would take a sixth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_without_garbage_collection()
def main(options: Options) -> int:
    """``peftsweep-collect``: tables, plots and reports into each study, and one table of all chosen trials."""
    if options.out is not None:
        check_ending(options.out)
    with redirect_stdout(sys.stderr) if options.json else nullcontext():  # stdout holds the JSON alone
        code, answers = _collected(options)
    if options.json:
        print(_one_or_all([structure.content(answer, render.plain) for answer in answers]))
    return code


def _collected(options: Options) -> tuple[int, list[Answer]]:
    """The exit code, and the answer of each study, of the trials that were chosen."""
    collected = [Collected(folder, read(folder)) for folder in _folders(options)]
    for one in collected:
        if not one.results:
            print(
                f"{one.folder}: no trial yet"
                + "".join(f"; running: {claim}" for claim in study_claims.running(one.folder))
            )
    collected, unwritten = [one for one in collected if one.results], list[Path]()
    every = together([one.table for one in collected])
    chosen, answers = every[where(every, options.where)] if options.where else every, list[Answer]()
    for one in collected:
        called = one.table.assign(**{CALLED: columns.named_trials(one.table)})
        called = called.assign(**{NAME: columns.named(one.table)})
        mine = called[called["collected.record"].isin(chosen["collected.record"])]
        rows = predictions(one.folder)
        written, answer = _write(one, called, rows, options)
        if options.where or answer is None:
            found = study_tasks(mine, rows)
            answer = build.answer(one.folder, mine, found, steps(one.results), options.quality_loss)
        answers.append(answer)
        if len(mine):
            terminal.print_study(mine, str(one.folder), answer, of=len(one.table))
        else:
            print(f"{one.folder}: --where chooses none of {trials_in_words(len(one.table))}")
        chosen_here = set(mine["collected.record"])
        chosen_results = [result for result in one.results if record_file(result) in chosen_here]
        time_error = forecast_report.line(chosen_results)
        for line in [*halving_notes.notes(chosen_results), *([time_error] if time_error else [])]:
            print(line)
        whole = f", of all {trials_in_words(len(one.table))}" if len(mine) < len(one.table) else ""
        if written:
            print("wrote " + " and ".join(str(file) for file in written) + whole)
        else:
            unwritten.append(one.folder)
    if collected:
        _hand_over(chosen, [result for one in collected for result in one.results], options)
    return 2 if unwritten and options.out is None else 0, answers


def _write(
    one: Collected, called: pd.DataFrame, rows: statistics_trials.Predictions, options: Options
) -> tuple[list[Path], Answer | None]:
    """Write the files of a study; gives those that a person opens, and the answer; none where it is read-only."""
    logged = steps(one.results, dict(zip(called["run_info.trial"], called[CALLED], strict=True)))
    try:
        write_parquet(one.table, one.folder / RESULTS_FILE)
        write_parquet(logged, one.folder / STEPS_FILE)
        tasks, plots = study_tasks(called, rows), one.folder / "plots"
        drawn = plot.study(one.table, logged, plots, options.kind, tasks=tasks) if options.plots else []
        results, answer = report.write(one.folder, called, logged, drawn, rows, options.quality_loss, tasks)
        pages = [page.write(one.table, logged, one.folder, rows, answer, tasks)] if options.plots else []
        return [*pages, results], answer
    except OSError as error:
        if error.errno not in (*store.NO_SPACE_ERRNOS, *store.UNWRITABLE_ERRNOS):
            raise
        print(f"{one.folder}: nothing is written there: {error.strerror}", file=sys.stderr)
        return [], None


def _one_or_all(found: Sequence[Any]) -> str:
    """JSON of the one study's, or a list of those of several."""
    return json.dumps(found[0] if len(found) == 1 else found, indent=1)


def _folders(options: Options) -> list[Path]:
    if options.from_peft is not None:
        if len(options.studies) > 1:
            raise InputError(f"--from-peft: fills one study, not {len(options.studies)}")
        return [interchange.from_peft(options.from_peft, *map(Path, options.studies))]
    found = store.chosen(options.studies)
    if not found:
        raise InputError(f"no study under {store.ROOT}/; run peftsweep first, or name a study's folder")
    return found


def _hand_over(chosen: pd.DataFrame, results: Sequence[Result], options: Options) -> None:
    """Write the chosen trials of all studies to the other outputs of the command."""
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


@dataclass(frozen=True)
class Standing:
    """How a study stands."""

    folder: str
    trials: dict[str, int]  # by status
    running: list[str]
    cut_off: list[str]  # that the same command continues
    last_sweep: dict[str, Any] | None
    failures: list[dict[str, Any]]  # of each cause the trials that it befell


def status(names: Sequence[str], as_json: bool = False) -> int:
    """``peftsweep-collect --status``: counts by status, what runs, what failed and why; writes nothing."""
    found = [_standing(folder) for folder in store.chosen(names)]
    if as_json:
        print(_one_or_all([record.plain(one) for one in found]))
        return 0
    for one in found:
        print(f"{one.folder}: {counts_in_words(one.trials)}, {len(one.running)} running")
        for claim in one.running:
            print(f"    running: {claim}")
        if one.cut_off:
            print(f"    cut off, the same command continues: {', '.join(one.cut_off)}")
        if last := one.last_sweep:
            outside = last["seconds_outside_trials"]
            print(f"    last sweep: {last['seconds']:.0f} s, {outside:.0f} s of them outside trials")
        for failure in one.failures:
            labels = failure["trials"]
            more = f" and {len(labels) - 3} more" if labels[3:] else ""
            print(f"    {failure['cause']}: {'; '.join(labels[:3])}{more}")
    return 0


def _standing(folder: Path) -> Standing:
    results = read(folder)
    failed = [{"cause": cause, "trials": trials} for cause, trials in _failures(results).items()]
    return Standing(
        folder.as_posix(),
        dict(Counter(result.status.name for result in results)),
        [str(claim) for claim in study_claims.running(folder)],
        [place.name for place in study_claims.cut_off(folder)],
        sweep_record.last(folder),
        failed,
    )


def counts_in_words(trials: Mapping[str, int]) -> str:
    """Counts by status: ``3 trials: 2 success, 1 failed``."""
    return counted(Counter(trials).elements())


def _failures(results: Sequence[Result]) -> dict[str, list[str]]:
    """Why trials did not succeed -> the names of those it befell."""
    found: dict[str, list[str]] = {}
    names = naming.trial_names([vars(result) for result in results])
    for result, name in zip(results, names, strict=True):
        if result.status is not Status.success:
            reason = summary(result)[0] if result.error else result.status.name
            found.setdefault(reason, []).append(name)
    return found
