"""Many trials: check all of them first, then run what is missing."""

from __future__ import annotations

import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

from peftsweep.analysis.table import naming
from peftsweep.config import build, evaluations, experiment, repeat
from peftsweep.config.compose import Trial
from peftsweep.errors import InputError, NotRun, SweepFailed, printable, say_once, suggest
from peftsweep.forecast import forecast, timing, work
from peftsweep.forecast.duration import Span
from peftsweep.forecast.forecast import Forecast
from peftsweep.forecast.timing import Timing, in_words, money
from peftsweep.observe import streams
from peftsweep.observe.display import Display, size, summary
from peftsweep.schema import Dtype
from peftsweep.study import record, store
from peftsweep.study.atomic import remove_partials
from peftsweep.study.record import Result, Status, counted, trials_in_words
from peftsweep.study.sweep_record import SweepRecord, command_ends, plans
from peftsweep.sweep import engine, packing, processes, workers
from peftsweep.sweep.engine import Launch
from peftsweep.sweep.workers import Budget, Options
from peftsweep.trial import done as trial_done
from peftsweep.trial import outcome, task

SIZES_MESSAGE = "sizes are known of {} trials"
MIN_PROBED_DEADLINE_SECONDS = 600.0  # for a shorter deadline the device's speed is not measured, only read
MAX_RECORDS_READ = 400  # records of a study that are read for the names of a sweep that goes on in it


def run(
    trials: Sequence[Trial],
    options: Options | None = None,
    budget: Budget | None = None,
    launch: Launch | None = None,
    sweep_record: SweepRecord | None = None,
    queued: engine.Queued = engine.nothing_queued,
) -> list[Result | None]:
    """Run those of ``trials`` that are not done; the record of each trial, None for one that was not reached.

    Every trial is checked before the first one starts. Points with the same identity are trained once. They run in
    workers of this machine as ``options`` says, or where ``launch`` places them. ``budget`` is the rest of limit and
    deadline, if it is shared with other sweeps of the command. ``sweep_record`` collects what the command has run,
    ``queued`` finds jobs that are in the launcher's queue already.

    Raises:
        InputError: a trial is wrong; nothing was trained.
        SweepFailed: a repeated trial has other results than the original.
        KeyboardInterrupt: the user interrupted it.
    """
    _check(trials, launch)
    options = options or Options(workers=0)
    config, trials = trials[0].config, _named(trials)
    sweep_record = sweep_record or SweepRecord(store.folder(config.study), [], options.workers)
    goes_on = sweep_record.resume_forced() if any(one.config.force for one in trials) else None
    if config.dry_run:
        _dry_run(trials, options, launch)
        return [None] * len(trials)
    known = streams.progress(forecast.ahead(trials), SIZES_MESSAGE, len(trials), quiet=config.quiet)
    stand_ins = _stand_ins(trials, [forecast.check(one) for one in known])  # raises before anything is written
    results: list[Result | None] = [trial_done.finished(one) for one in trials]
    for done in _once(results):
        _share(done, trials, results, stand_ins)
    missing = {stand_ins[n].identity: stand_ins[n] for n, done in enumerate(results) if done is None}
    for one in missing.values():
        build.check_available(one)
        evaluations.check_conversations(one.config)
    if missing:
        with suppress(OSError):  # the first trial that writes will report the error
            remove_partials(store.folder(config.study))
            sweep_record.begin_forced()
    with Display(len(missing), quiet=config.quiet) as display, terminable():
        if goes_on:
            display.say(goes_on)
        _say_what_runs(display, results, list(missing.values()))
        todo, budget = list(missing.values()), budget or Budget(options)
        budget.expected |= {} if launch else _expected(todo, options)
        ended = engine.run(todo, launch, display, queued) if launch else workers.run(todo, options, budget, display)
        try:
            for _, result in ended:
                sweep_record.add(result)
                _share(result, trials, results, stand_ins)
                if config.stop_on_failure and not result.status.good:
                    display.say("stopped at the first failure, as stop_on_failure=true says")
                    break
        except KeyboardInterrupt:
            _share_cancelled(missing.values(), trials, results, stand_ins)
            display.console.print(_counted(results, config.study), markup=False)
            raise
        finally:
            sweep_record.leave(_left(results))
            with suppress(OSError):  # a full disk, which the trials have reported
                sweep_record.write()
        _summarise(display, trials, results, config.study)
        same = [
            _compared(display, one, result) for one, result in zip(trials, results, strict=True) if one.config.repeat
        ]
    if not all(same):
        raise SweepFailed("a repeated trial is not the same")
    return results


def _say_what_runs(display: Display, results: Sequence[Result | None], missing: Sequence[Trial]) -> None:
    """Print which trials were done before, and which run again and why."""
    for held in _once(results):
        display.say(f"done before: {held.trial} ({held.status.name})")
    if again := sum(trial_done.resumes_full(one) for one in missing):
        display.say(f"{trials_in_words(again)} that halving stopped will go on to the end")
    again_for = Counter(reason for one in missing if (reason := trial_done.outdated(one)))
    for reason, count in again_for.items():
        display.say(f"{trials_in_words(count)} run again, as the numbers of an earlier version were wrong: {reason}")
    for one in missing:
        if reason := trial_done.damaged(one):
            display.say(f"{one.name} is run again, as a file of it is damaged: {reason}")
        if warning := experiment.unheeded(one.experiment):
            display.say(f"{one.name}: {warning}")


def _check(trials: Sequence[Trial], launch: Launch | None) -> None:
    """Check the trials of the sweep together."""
    if not trials:
        raise InputError("the sweep is empty: a glob in it matches no option")
    if launch and trials[0].config.stop_on_failure:
        raise InputError("stop_on_failure=true: only with hydra/launcher=local; others are given all trials at once")
    timing.check(trials[0].config)


def _expected(trials: Sequence[Trial], options: Options) -> dict[str, float]:
    """The seconds that trials will take, by their identities, where a deadline asks for them."""
    if options.deadline is None or not trials:
        return {}
    times = _timing(trials, options, None)
    return times.expected(trials) if options.deadline >= MIN_PROBED_DEADLINE_SECONDS or times.device.take_kept() else {}


def _named(trials: Sequence[Trial]) -> list[Trial]:
    """The trials with names that tell them apart, also from those that the study holds already."""
    own = {one.identity for one in trials}
    held = store.records(store.folder(trials[0].config.study), MAX_RECORDS_READ)
    others = [vars(result) for result in held if result.run_info.get("identity") not in own]
    trees = [{"choices": one.choices, "config": one.tree} for one in trials]
    if len(trees) + len(others) < 2:
        return list(trials)
    return [
        replace(one, told_by=name) for one, name in zip(trials, naming.trial_names([*trees, *others]), strict=False)
    ]


def _compared(display: Display, one: Trial, result: Result | None) -> bool:
    """Print the comparison of the trial with the one that it repeats; returns whether they are the same."""
    if result is None:
        return True  # not reached
    comparison = repeat.compare(repeat.original(str(one.config.repeat)), result)
    repeat.write(comparison, result)
    display.say(f"repeat of {comparison.of}:")
    for line in comparison.lines():
        display.say(f"    {line}")
    if one.config.quiet and not comparison.same:  # else the exit code 1 would have no reason
        print(f"peftsweep: repeat of {comparison.of}: {printable(comparison.lines()[-1])}", file=sys.stderr)
    return comparison.same


def answer(one: Trial, result: Result | None) -> Any:
    """The value of a trial for a sweeper: its record, the numbers of ``objective``, or an exception if it failed.

    Raises:
        InputError: ``objective`` names no number of the record.
    """
    columns = one.config.objective
    if result is None:
        return None if columns is None else NotRun(f"{one.name}: not run")
    if result.status is Status.cancelled:
        return NotRun(f"{result.trial}: cancelled")
    if not result.status.good or (columns is not None and result.status is not Status.success):
        return SweepFailed(f"{result.trial}: {result.status.name}")
    if columns is None:
        return result
    row = record.flat(record.plain({key: getattr(result, key) for key in record.SECTIONS}))
    for column in [columns] if isinstance(columns, str) else columns:
        if column not in row:
            raise InputError(f"objective={column}: no such column; {suggest(column, list(row))}")
    return row[columns] if isinstance(columns, str) else tuple(row[column] for column in columns)


@contextmanager
def terminable() -> Iterator[None]:
    """In the block SIGTERM (of schedulers) and SIGHUP interrupt like Ctrl-C, so that running trials are recorded.

    A hangup that is ignored, as under nohup, stays ignored, because the command is meant to outlive the terminal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    wanted = [signal.SIGTERM, *([signal.SIGHUP] if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL else [])]
    before = {number: signal.signal(number, interrupt) for number in wanted}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stand_ins(trials: Sequence[Trial], forecasts: Sequence[Forecast]) -> list[Trial]:
    """For each trial the one that is trained instead of it: itself, or one that trains the same parameters.

    Of several equal trials it is the first, unless another one has a record already.
    """
    chosen: dict[str, Trial] = {}
    keys = [forecast.twin_key(one, foreseen) for one, foreseen in zip(trials, forecasts, strict=True)]
    for one, key in zip(trials, keys, strict=True):
        held = chosen.setdefault(key, one)
        if held.identity != one.identity and not trial_done.finished(held) and trial_done.finished(one):
            chosen[key] = one
    return [chosen[key] for key in keys]


def _share(result: Result, trials: Sequence[Trial], results: list[Result | None], stand_ins: Sequence[Trial]) -> None:
    """Use the record for all points of the sweep that it stands for, and add their labels to it."""
    for number, other in enumerate(trials):
        known = result.run_info["identity"], (result.run_info.get("recognised") or {}).get("identity")
        if results[number] is None and stand_ins[number].identity in known:
            results[number] = result
            if other.label not in result.run_info["labels"] and result.folder is not None:
                result.run_info["labels"].append(other.label)
                result.write(result.folder)


def _share_cancelled(
    ran: Iterable[Trial], trials: Sequence[Trial], results: list[Result | None], stand_ins: Sequence[Trial]
) -> None:
    """Share the records that interrupted trials have written."""
    for one in ran:
        with suppress(InputError, OSError):
            if (held := store.result(trial_done.folder(one))) and held.status is Status.cancelled:
                _share(held, trials, results, stand_ins)


def _left(results: Sequence[Result | None]) -> int:
    """The number of points of the sweep that were not run, or not to their end."""
    return sum(result is None or result.status is Status.cancelled for result in results)


def _once(results: Sequence[Result | None]) -> list[Result]:
    return list({result.trial: result for result in results if result is not None}.values())


def _summarise(display: Display, trials: Sequence[Trial], results: Sequence[Result | None], name: str) -> None:
    reached = _once(results)
    names = {result.trial: one.name for one, result in zip(trials, results, strict=True) if result is not None}
    bad = [result for result in reached if not result.status.good]
    for result in bad if len(reached) > 1 else []:
        display.say(f"{names[result.trial]}: {summary(result)[0]}")
    display.console.print(_counted(results, name), markup=False)


def _counted(results: Sequence[Result | None], name: str) -> str:
    """``3 trials: 2 success, 1 failed, 1 not run  (multirun/default)``."""
    text, left = counted(result.status.name for result in _once(results)), sum(result is None for result in results)
    return text + (f", {left} not run" if left else "") + f"  ({store.folder(name)})"


def _timing(trials: Sequence[Trial], options: Options, launch: Launch | None) -> Timing:
    """The predicted seconds of ``trials`` on the workers that ``options`` or ``launch`` run them on."""
    if launch or options.workers == 0:
        return Timing(trials, None if launch else 1)
    places = processes.places(options.workers, options.devices, [one.config.device for one in trials])
    return Timing(trials, len(places), len(set(places)))


def _dry_run(trials: Sequence[Trial], options: Options, launch: Launch | None) -> None:
    """Print one line for each trial as soon as it is predicted, and write all of them to the study's plan.json.

    Points with the same identity and label are listed once.
    """
    config, forecasts = trials[0].config, list[Forecast]()
    listed: dict[tuple[str, str], Trial] = {}
    for one in trials:
        listed.setdefault((one.identity, one.label), one)
    trials = list(listed.values())
    first: dict[str, Trial] = {}  # the first one of trials that train the same parameters
    width, printed, times = max(len(one.name) for one in trials), [], _timing(trials, options, launch)
    times.measure()
    for one in forecast.ahead(trials, forecast.prediction, times.trace, caches=work.CACHES):
        evaluations.check_conversations(one.config)
        forecasts.append(foreseen := forecast.check(one))
        stand_in = first.setdefault(forecast.twin_key(one, foreseen), one)
        printed.append(row := _plan_row(one, foreseen, stand_in, times))
        if not config.quiet:
            print(_plan_line(row, width), flush=True)
            if warning := experiment.unheeded(one.experiment):
                print(f"  {one.name}: {warning}", flush=True)
    stand_ins = _stand_ins(trials, forecasts)
    rows = [_plan_row(*row, times) for row in zip(trials, forecasts, stand_ins, strict=True)]
    file = store.folder(config.study) / store.PLAN
    record.write_json(file, rows)
    plans.append(file)
    if not config.quiet:
        for row, before in zip(rows, printed, strict=True):
            if row != before:  # another point of the sweep, which came later, has its record already
                print(_plan_line(row, width))
        for line in dict.fromkeys(row["coverage"] for row in rows if row["coverage"]):
            same = [row["name"] for row in rows if row["coverage"] == line]
            others = f" and {len(same) - 1} more" if len(same) > 1 else ""  # names hold commas, and are many
            print(f"{same[0]}{others}: {line}")
        print(_disk_line(rows))
        new_ones = {one.identity: one for one, row in zip(trials, rows, strict=True) if _to_run(row)}
        jobs = [[one] for one in new_ones.values()]
        if options.pack:
            fits = partial(packing.fits_memory, at_once=times.device.at_once)
            jobs = packing.plan([*new_ones.values()], options.pack, fits)
        for line in times.lines(jobs):
            print(line)
    new = sum(row["state"] == "new" for row in rows)
    print(f"{trials_in_words(len(rows))}, {new} new; nothing was trained ({file})")


def _to_run(row: dict[str, Any]) -> bool:
    return row["state"] == "new" and not row["refused"]


def _disk_line(rows: Sequence[dict[str, Any]]) -> str:
    """A line about the disk space that the trials to be run will take, each counted once."""
    left = {row["trial"]: row["disk_bytes"] for row in rows if _to_run(row)}
    known = [count for count in left.values() if count is not None]
    least = "at least " if len(known) < len(left) else ""
    return f"on the disk: {least}{size(sum(known))} of adapters and merged models, beside records and predictions"


def _disk_bytes(one: Trial, foreseen: Forecast) -> int | None:
    """The bytes of the adapter and the merged model, if they are kept; None where a size is unknown."""
    config = one.config
    adapter = foreseen.adapter_bytes if config.adapter.save and config.adapter.path is None else 0
    merged: int | None = 0
    if config.adapter.merge and config.method:
        total, trainable = foreseen.total_parameters, foreseen.trainable_parameters
        width = 4 if config.model.dtype is Dtype.float32 else 2
        merged = None if total is None or trainable is None else (total - trainable) * width
    return None if adapter is None or merged is None else adapter + merged


def _plan_line(row: dict[str, Any], width: int) -> str:
    trainable = "?" if row["trainable_parameters"] is None else f"{row['trainable_parameters']:,}"
    return (
        f"{row['name']:{width}}  {row['state']:8}  {trainable:>13} trainable  "
        f"{size(row['adapter_bytes']):>9}  memory {size(row['predicted_memory_bytes']):>9}"
        + _time_cell(row)
        + "".join(f"  {row[key]}" for key in ("refused", "oversized", "same_as", "outdated") if row[key])
    )


def _time_cell(row: dict[str, Any]) -> str:
    if row["refused"]:
        return ""
    if row["predicted_seconds"] is None:
        return f"  time ? ({row['no_time_because']})"
    cost = "" if row["predicted_cost"] is None else f"  cost {money(row['predicted_cost'])}"
    return f"  time {in_words(Span(*(row[f'predicted_seconds{end}'] for end in ('', '_low', '_high'))))}{cost}"


def run_alone(one: Trial, words: Sequence[str]) -> Result:
    """Run one trial in this process, without output, and return its record; ``words`` are those of ``peftsweep.run``.

    With ``force=true`` it goes on where the same words were cut off, as a command does.
    """
    command = SweepRecord(store.folder(one.config.study), words, None)
    goes_on = command.resume_forced() if one.config.force else None
    if one.config.dry_run:
        return planned(one)
    forecast.check(one)
    if trial_done.finished(one) is None:
        build.check_available(one)
    if goes_on:
        say_once(goes_on)
    with terminable():
        with suppress(OSError):  # the trial will report the error
            command.begin_forced()
        result = task.run(one)
    command_ends()
    return result


def planned(one: Trial) -> Result:
    """The plan of one trial, as a record of status ``planned`` that is not written; nothing is trained.

    Of a trial that is done it is its record.
    """
    run([one])
    return trial_done.finished(one) or outcome.planned(one, record.plain(vars(forecast.check(one))))


def _plan_row(one: Trial, foreseen: Forecast, stand_in: Trial, times: Timing) -> dict[str, Any]:
    same = stand_in is not one
    how = "attaches the same as" if stand_in.identity != one.identity else "is the same trial as"
    held, outdated = store.result(trial_done.folder(stand_in)), trial_done.outdated(stand_in)
    predicted = forecast.prediction(one)
    return {
        "trial": trial_done.folder(stand_in).name,
        "label": one.label,
        "name": one.name,
        "state": held.status.name if held and not trial_done.anew(one) and not outdated else "same" if same else "new",
        "outdated": outdated,
        "trainable_parameters": foreseen.trainable_parameters,
        "total_parameters": foreseen.total_parameters,
        "adapter_bytes": foreseen.adapter_bytes,
        "disk_bytes": _disk_bytes(one, foreseen),
        "coverage": foreseen.coverage,
        "same_as": f"{how} {stand_in.name}" if same else None,
        "refused": foreseen.refused,
        "predicted_memory_bytes": None if predicted is None else predicted.peak_bytes,
        "oversized": forecast.oversized(one, at_once=times.device.at_once),
        **times.row(one),
    }
