"""Successive halving: all trials run to a first rung, and only the best of them go on to the next rung.

After Jamieson and Talwalkar (2016), in the notation of Li et al. (2018): of n trials the best n / factor^k go on
from rung k, which is at ``min_steps`` * factor^(k - 1) optimizer steps. The last ones run to their end. A trial has
a rung only at steps up to 1 / factor of its own.

With ``resource=rows`` a rung is a training on a share of the rows, ``min_fraction`` * factor^(k - 1) of them.

All decisions follow from the trials' records and steps, so that the same command makes the same decisions again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from itertools import count

from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig

from peftsweep.analysis.text.halving_notes import notes
from peftsweep.errors import InputError, NotRun
from peftsweep.schema import HalvingConfig, Resource
from peftsweep.study import rungs
from peftsweep.study.record import Result, Status
from peftsweep.study.rungs import TRAINED_STATUSES, course
from peftsweep.study.scores import is_minimized

Point = Sequence[str]  # the overrides of one point of the sweep
Launch = Callable[[list[list[str]], int], Sequence[JobReturn]]


def plan(cfg: DictConfig, points: Sequence[Point]) -> HalvingConfig | None:
    """The halving that the configuration of a sweep sets; None where every point runs to its end.

    Raises:
        InputError: the points have different ``halving`` keys.
    """
    if len({tuple(word for word in point if word.startswith("halving.")) for point in points}) > 1:
        raise InputError("halving: is of the sweep as a whole, and cannot be swept")
    values = {key: cfg.halving[key] for key in ("factor", "min_steps", "resource", "min_fraction")}
    config = HalvingConfig(metric=cfg.halving.metric or cfg.train.best_metric, **values)
    return None if rungs.begins(config) is None or cfg.dry_run else config


def run(launch: Launch, points: Sequence[Point], config: HalvingConfig, *, quiet: bool = False) -> list[JobReturn]:
    """Run ``points`` from rung to rung; the last job of each point, in the order of ``points``.

    ``launch`` runs points, numbered from its second argument on, and returns a job for each.
    """
    jobs: dict[tuple[str, ...], JobReturn] = {}
    records: dict[str, Result] = {}  # by trial: with resource=rows each rung of a point is a trial of its own
    remaining, overrides, started, entered = list(points), _rung_overrides(config, 1), 0, 0
    for rung in count(1):
        ended = launch([[*point, *overrides] for point in remaining], started)
        started += len(remaining)
        jobs |= {tuple(point): job for point, job in zip(remaining, ended, strict=True)}
        results = [_result(job) for job in ended]
        records |= {result.trial: result for result in results if result is not None}
        # A trial that was cancelled alone, such as one job of an array, has no result yet and has not failed.
        failed = sum(job.status is JobStatus.FAILED and not isinstance(job._return_value, NotRun) for job in ended)
        if missing := sum(result is None for result in results) - failed:
            _say(
                f"rung {rung} is not complete, {missing} of {len(remaining)} were not run; the same command continues",
                quiet,
            )
            break
        by_identity = {result.run_info["identity"]: result for result in results if result is not None}
        entered = entered or len(by_identity) + failed
        if not any(result.status is Status.stopped for result in by_identity.values()):
            break  # no trial stopped at this rung: all have ended
        best = ranked(by_identity, dataclasses.replace(config, rung=rung))[: rungs.going_on(config, entered, rung)]
        remaining = [
            point
            for point, result in zip(remaining, results, strict=True)
            if result and result.run_info["identity"] in best
        ]
        overrides = [*_rung_overrides(config, None if len(best) == 1 else rung + 1), "force=false"]
        _say(f"rung {rung}: the best {len(best)} of {len(by_identity) + failed} by {config.metric} go on", quiet)
    for line in notes(records.values()):
        _say(line, quiet)
    return [jobs[tuple(point)] for point in points]


def _rung_overrides(config: HalvingConfig, rung: int | None) -> list[str]:
    """The overrides with which a point runs to ``rung``; with None it runs to its end."""
    if config.resource is Resource.steps:
        return [f"halving.rung={'null' if rung is None else rung}"]
    fraction = 1.0 if rung is None else rungs.fraction(config, rung)
    return [f"dataset.fraction={fraction}", f"halving.rung={'null' if fraction == 1 else rung}"]


def _result(job: JobReturn) -> Result | None:
    """The record of a job; None where it failed or was not run."""
    return job._return_value if job.status is JobStatus.COMPLETED else None


def _say(line: str, quiet: bool) -> None:
    if not quiet:
        print(line, flush=True)


def ranked(results: dict[str, Result], config: HalvingConfig) -> list[str]:
    """The keys of the trials that reached the rung of ``config``, the best first.

    A trial that ended before that rung is ranked by its last validation. Ties are in the order of the keys; values that
    are not finite come last.
    """
    sign = 1 if is_minimized(str(config.metric)) else -1

    def as_loss(key: str) -> tuple[float, str]:
        value = next(reversed(course(results[key], config).values[: config.rung]), None)
        return (math.inf if value is None or not math.isfinite(value) else sign * value), key

    return sorted((key for key, result in results.items() if result.status in TRAINED_STATUSES), key=as_loss)
