"""Successive halving: all trials run to a first rung, and only the best of them on to the next.

As of Jamieson and Talwalkar (2016), in the notation of Li et al. (2018): of n trials the best
n / factor^k go on from rung k, which lies at ``min_steps`` * factor^(k - 1) optimizer steps, and the last
of them run to their end. A trial has a rung only where at most a factor-th of its steps are done.

With ``resource=rows`` a rung is a training on a part of the rows, ``min_fraction`` * factor^(k - 1) of them.

Everything is decided from the trials' records and steps, so the same command decides the same again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from itertools import count

from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig

from peftsweep.analysis.text.halving_notes import notes
from peftsweep.errors import InputError
from peftsweep.schema import HalvingConfig, Resource
from peftsweep.study import rungs
from peftsweep.study.record import Result, Status
from peftsweep.study.rungs import TRAINED_STATUSES, course
from peftsweep.study.scores import is_minimized

# ---- a sweep of them -------------------------------------------------------------------------------

Point = Sequence[str]  # its overrides
Launch = Callable[[list[list[str]], int], Sequence[JobReturn]]


def plan(cfg: DictConfig, points: Sequence[Point]) -> HalvingConfig | None:
    """The halving that the configuration of a sweep asks for; None where every point is to run to its end.

    Raises:
        InputError: points differ in it.
    """
    if len({tuple(word for word in point if word.startswith("halving.")) for point in points}) > 1:
        raise InputError("halving: is of the sweep as a whole, and cannot be swept")
    said = {key: cfg.halving[key] for key in ("factor", "min_steps", "resource", "min_fraction")}
    config = HalvingConfig(metric=cfg.halving.metric or cfg.train.best_metric, **said)
    return None if rungs.begins(config) is None or cfg.dry_run else config


def run(launch: Launch, points: Sequence[Point], config: HalvingConfig, *, quiet: bool = False) -> list[JobReturn]:
    """Run ``points`` from rung to rung and give the last that is known of each.

    ``launch`` runs points, numbered from its second argument on, and returns a job for each.
    """
    jobs: dict[tuple[str, ...], JobReturn] = {}
    known: dict[str, Result] = {}  # by name: of rows each rung of a point is a trial of its own
    going, words, started, entered = list(points), _words(config, 1), 0, 0
    for number in count(1):
        ended = launch([[*point, *words] for point in going], started)
        started += len(going)
        jobs |= {tuple(point): job for point, job in zip(going, ended, strict=True)}
        results = [_result(job) for job in ended]
        known |= {result.trial: result for result in results if result is not None}
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
            break  # all have ended
        best = ranked(by_identity, dataclasses.replace(config, rung=number))[: max(1, entered // config.factor**number)]
        going = [point for point, one in zip(going, results, strict=True) if one and one.run_info["identity"] in best]
        words = [*_words(config, None if len(best) == 1 else number + 1), "force=false"]
        _say(f"rung {number}: the best {len(best)} of {len(by_identity) + failed} by {config.metric} go on", quiet)
    for line in notes(known.values()):
        _say(line, quiet)
    return [jobs[tuple(point)] for point in points]


def _words(config: HalvingConfig, number: int | None) -> list[str]:
    """The words that send a point to rung ``number``; None: to its end."""
    if config.resource is Resource.steps:
        return [f"halving.rung={'null' if number is None else number}"]
    part = 1.0 if number is None else rungs.fraction(config, number)
    return [f"dataset.fraction={part}", f"halving.rung={'null' if part == 1 else number}"]


def _result(job: JobReturn) -> Result | None:
    """The record of a job; None where it failed or was not run."""
    return job._return_value if job.status is JobStatus.COMPLETED else None


def _say(line: str, quiet: bool) -> None:
    if not quiet:
        print(line, flush=True)


def ranked(results: dict[str, Result], config: HalvingConfig) -> list[str]:
    """The keys of the trials that reached the rung of ``config``, the best first.

    Trials that ended before it are judged by their end. Ties are in the order of the keys, what is no number is last.
    """
    sign = 1 if _lower_is_better(config) else -1

    def badness(key: str) -> tuple[float, str]:
        value = next(reversed(course(results[key], config).values[: config.rung]), None)
        return (math.inf if value is None or not math.isfinite(value) else sign * value), key

    return sorted((key for key, one in results.items() if one.status in TRAINED_STATUSES), key=badness)


def _lower_is_better(config: HalvingConfig) -> bool:
    return is_minimized(str(config.metric))
