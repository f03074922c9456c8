"""Successive halving: all trials run to a first rung, and only the best of them on to the next.

As of Jamieson and Talwalkar (2016), in the notation of Li et al. (2018): of n trials the best
n / factor^k go on from rung k, which lies at ``min_steps`` * factor^(k - 1) optimizer steps, and the last
of them run to their end. A trial has a rung only where at most a factor-th of its steps are done.

Everything is decided from the trials' records and steps, so the same command decides the same again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig

from peftsweep import record, study
from peftsweep.display import size
from peftsweep.errors import InputError
from peftsweep.metrics import LOWER_IS_BETTER
from peftsweep.record import Result, Status
from peftsweep.schema import HalvingConfig

HAVE_TRAINED = (Status.stopped, Status.success)
FEWEST = 3  # pairs below which a correlation says nothing
MARK = "validation_"  # before a metric's name, in the rows of steps.jsonl


# ---- one trial -------------------------------------------------------------------------------------


def rung_step(config: HalvingConfig, number: int) -> int:
    """The optimizer steps until rung ``number``, from 1 on."""
    assert config.min_steps is not None
    return int(config.min_steps * config.factor ** (number - 1))


def stop_at(config: HalvingConfig, total: int) -> int | None:
    """The step at which a trial of ``total`` steps stops for the rung it is sent to; None: at its end."""
    if config.min_steps is None or config.rung is None:
        return None
    step = rung_step(config, config.rung)
    return step if step * config.factor <= total else None


def reached(config: HalvingConfig, done: Result) -> bool:
    """Whether the trial of the record ``done`` has come as far as it is sent now."""
    if done.status is not Status.stopped:
        return True
    if config.min_steps is None or config.rung is None:
        return False
    return bool(rung_step(config, config.rung) <= done.run_info["rung"]["step"])


def rung(config: HalvingConfig, place: Path, step: int) -> dict[str, Any]:
    """What a record says of the rung at which the trial in ``place`` stopped: its number, step, metric and value.

    Raises:
        InputError: the validation does not have that metric.
    """
    known = {key.removeprefix(MARK): value for key, value in _validations(place)[step].items() if key.startswith(MARK)}
    if config.metric not in known:
        raise InputError(f"halving.metric={config.metric}: the validation has {', '.join(known)}")
    return {"number": config.rung, "step": step, "metric": config.metric, "value": known[config.metric]}


def _validations(place: Path) -> dict[int, dict[str, Any]]:
    """The rows of the validations of the trial in ``place``, by their steps."""
    rows = record.usable_lines(place / record.STEPS, record.STEP, whole=False)
    return {row["step"]: row for row in rows if f"{MARK}loss" in row}


@dataclass(frozen=True)
class Course:
    """How a trial has come along: its steps, were it to end, and the metric at each rung passed and at its end."""

    total: int
    values: list[float | None]


def course(result: Result, config: HalvingConfig) -> Course:
    """What the validations of the trial say at its rungs."""
    place = (result.folder or Path()).parent / result.train_info.get("trained_by", result.trial)
    validations = _validations(place)
    total = next((int(row["steps"]) for row in validations.values()), 0)
    values: list[float | None] = []
    for number in count(1):
        step = stop_at(dataclasses.replace(config, rung=number), total)
        if (row := validations.get(total if step is None else step)) is not None:
            values.append(row.get(f"{MARK}{config.metric}"))
        if step is None or row is None:
            return Course(total, values)
    raise AssertionError


# ---- a sweep of them -------------------------------------------------------------------------------

Point = Sequence[str]  # its overrides
Launch = Callable[[list[list[str]], int], Sequence[JobReturn]]


def plan(cfg: DictConfig, points: Sequence[Point]) -> HalvingConfig | None:
    """The halving that the configuration of a sweep asks for; None where every point is to run to its end.

    Raises:
        InputError: points differ in it.
    """
    said = {tuple(word for word in point if word.startswith("halving.")) for point in points}
    if len(said) > 1:
        raise InputError("halving: is of the sweep as a whole, and cannot be swept")
    if cfg.halving.min_steps is None or cfg.dry_run:
        return None
    return HalvingConfig(cfg.halving.metric or cfg.train.best_metric, cfg.halving.factor, cfg.halving.min_steps)


def run(launch: Launch, points: Sequence[Point], config: HalvingConfig, *, quiet: bool = False) -> list[JobReturn]:
    """Run ``points`` from rung to rung and give the last that is known of each.

    ``launch`` runs points, numbered from its second argument on, and answers with a job for each.
    """
    jobs: dict[tuple[str, ...], JobReturn] = {}
    going, words, started, entered = list(points), ["halving.rung=1"], 0, 0
    for number in count(1):
        ended = launch([[*point, *words] for point in going], started)
        started += len(going)
        jobs |= {tuple(point): job for point, job in zip(going, ended, strict=True)}
        results = [_result(job) for job in ended]
        failed = sum(job.status is JobStatus.FAILED for job in ended)
        if missing := sum(result is None for result in results) - failed:
            _say(
                f"rung {number} is not complete, {missing} of {len(going)} were not run; the same command continues",
                quiet,
            )
            break
        by_identity = {result.run_info["identity"]: result for result in results if result is not None}
        entered = entered or len(by_identity) + failed
        if not any(result.status is Status.stopped for result in by_identity.values()):
            break  # each has come to its end
        best = ranked(by_identity, dataclasses.replace(config, rung=number))[: max(1, entered // config.factor**number)]
        going = [point for point, one in zip(going, results, strict=True) if one and one.run_info["identity"] in best]
        words = ["halving.rung=null" if len(best) == 1 else f"halving.rung={number + 1}", "force=false"]
        _say(f"rung {number}: the best {len(best)} of {len(by_identity) + failed} by {config.metric} go on", quiet)
    for line in notes(filter(None, map(_result, jobs.values()))):
        _say(line, quiet)
    return [jobs[tuple(point)] for point in points]


def _result(job: JobReturn) -> Result | None:
    """The record of a job; None where it failed or was not run."""
    return job._return_value if job.status is JobStatus.COMPLETED else None


def _say(line: str, quiet: bool) -> None:
    if not quiet:
        print(line, flush=True)


def ranked(results: dict[str, Result], config: HalvingConfig) -> list[str]:
    """The keys of the trials that came to the rung of ``config``, the best first.

    Trials that ended before it are judged by their end. Ties are in the order of the keys, what is no number is last.
    """
    sign = 1 if _lower_is_better(config) else -1

    def badness(key: str) -> tuple[float, str]:
        value = next(reversed(course(results[key], config).values[: config.rung]), None)
        return (math.inf if value is None or not math.isfinite(value) else sign * value), key

    return sorted((key for key, one in results.items() if one.status in HAVE_TRAINED), key=badness)


def _lower_is_better(config: HalvingConfig) -> bool:
    return str(config.metric).rpartition(".")[2] in LOWER_IS_BETTER


# ---- what it cost, and what it may have missed -----------------------------------------------------


def notes(results: Iterable[Result]) -> list[str]:
    """Of each halving among the records: the steps it spared, and how far its rungs foretold what came after."""
    sweeps: dict[tuple[Any, ...], list[Result]] = {}
    for result in results:
        said = result.config.get("halving") or {}
        if said.get("min_steps") is not None and result.status in HAVE_TRAINED and "steps" in result.train_info:
            sweeps.setdefault((said["metric"], said["factor"], said["min_steps"]), []).append(result)
    return [line for said, group in sweeps.items() for line in _notes(group, HalvingConfig(*said))]


def _notes(results: Sequence[Result], config: HalvingConfig) -> list[str]:
    stopped = [one for one in results if one.status is Status.stopped]
    courses = [course(one, config) for one in results]
    trained, total = sum(one.train_info["steps"] for one in results), sum(one.total for one in courses)
    files = [file for one in stopped if one.folder for file in one.folder.glob(f"{study.CHECKPOINTS}/*")]
    kept = size(sum(_bytes(file) for file in files))
    lines = [
        f"halving by {config.metric}: {trained:,} of {total:,} steps trained ({trained / max(total, 1):.0%}); "
        f"{len(stopped)} trials stopped, any of which may have won in the end; their checkpoints hold {kept}"
    ]
    for place in range(max(len(one.values) for one in courses) - 1):
        pairs = [(one.values[place], one.values[place + 1]) for one in courses if len(one.values) > place + 1]
        lines.append(f"rung {place + 1} and what came next: {_correlation(pairs)}")
    return lines


def _bytes(file: Path) -> int:
    """How many the file holds, which a running sweep may just have deleted."""
    try:
        return file.stat().st_size
    except OSError:
        return 0


def _correlation(pairs: Sequence[tuple[float | None, float | None]]) -> str:
    """Spearman's rank correlation of the two values, in words."""
    from peftsweep.answer import rungs

    known = [(math.nan if first is None else first, math.nan if then is None else then) for first, then in pairs]
    found = rungs.rank_correlation(*zip(*known, strict=True))
    if found.n < FEWEST:
        return f"{found.n} trials went on, too few for a correlation"
    return f"rank correlation {found.rho:.2f} (Spearman, the {found.n} trials that went on)"
