"""The task function: one trial from its configuration to its record. ``run`` and ``_run`` list its stages in order."""

from __future__ import annotations

import logging
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from peftsweep.config import build, experiment
from peftsweep.config.compose import Trial
from peftsweep.models import model
from peftsweep.observe.display import Observer
from peftsweep.observe.measure import Meter, current
from peftsweep.observe.tracker import Tracker
from peftsweep.study import claims, record, store
from peftsweep.study.record import Result, Status
from peftsweep.training import compiled
from peftsweep.trial.done import done_before, finished, folder, lacks_answers_of_base, lacks_profile
from peftsweep.trial.outcome import (
    Attempts,
    begin,
    empty,
    end,
    failure_of,
    logged,
    progress_so_far,
    status_of,
    unwritten,
)
from peftsweep.trial.session import Session

log = logging.getLogger(__name__)


def run(trial: Trial, observer: Observer | None = None) -> Result:
    """Train and evaluate ``trial``, unless its study contains it already; the record is written in any case.

    If only the profile of a done trial is missing, only the profile is made. A failure is written into the record, with
    its stage and traceback, and is not raised.

    Raises:
        KeyboardInterrupt: the user interrupted the trial; it is recorded as cancelled.
        study.Claimed: another process runs the trial.
        Unwritable: the trial's folder cannot be written.
    """
    if done := finished(trial):
        return done
    place = folder(trial)
    with claims.claim(place.parent, trial.identity):
        return finished(trial) or _run_claimed(trial, place, observer or Observer())


def died(trial: Trial, status: Status, failure: dict[str, str], seconds: float) -> Result:
    """Write the record of a trial whose process died: its status and error, and the steps that it had logged.

    A trial that had finished before, of which only a profile or the answers of the base were missing, keeps its record.
    """
    place = folder(trial)
    with claims.claim(place.parent, trial.identity):
        if done := finished(trial):
            return done
        if done_before(trial):
            return unwritten(trial, status, failure, seconds)
        result = begin(trial, place)
        result.train_info |= progress_so_far(place)
        result.run_info |= {"status": status.value, "error": failure}
        result.run_info |= {"sitting_seconds": seconds, "total_seconds": seconds}
        result.write(place)
    return result


def _run_claimed(trial: Trial, place: Path, observer: Observer) -> Result:
    start = time.perf_counter()
    tracker = Tracker(observer)
    meter = Meter(model.device(trial.config.device))
    if held := done_before(trial):
        unprofiled = lacks_profile(trial, held)
        if unprofiled or lacks_answers_of_base(trial, held):
            return _complete(trial, held, Session(trial, held, meter, tracker), profile=unprofiled)
    attempts = Attempts(place, meter)
    with meter.stage("setup"):  # this stage also counts what happens between the other stages
        result = begin(trial, place)
    with logged(place / "trial.log"):
        if warning := experiment.unheeded(trial.experiment):
            log.warning(warning)
        if trial.config.tracker:
            tracker.start(partial(build.tracker, trial, place), record.flat(result.config))
        status, failure = Status.success, None
        try:
            with meter.stage("setup"), current(meter.device):
                status = _run(Session(trial, result, meter, tracker, attempts))
        except claims.Claimed:  # the other process writes the record
            tracker.end({}, Status.cancelled.value)
            raise
        except BaseException as error:
            status, failure = status_of(error), failure_of(error, meter.current, trial.config)
            full = store.unwritable(error)  # the next trial could not be written either
            if full or not isinstance(error, Exception):
                end(result, place, meter, start, status, failure, tracker, attempts)
                if full:
                    raise full from error
                raise
        end(result, place, meter, start, status, failure, tracker, attempts)
    empty(meter.device)
    return result


def _complete(trial: Trial, held: Result, session: Session, *, profile: bool) -> Result:
    """Make the ``profile``, or else the answers of the base, that a finished trial lacks.

    If that fails, the record of the trial stays as it is, and what is returned is not written.
    """
    place, start = folder(trial), time.perf_counter()
    with logged(place / ("profile.log" if profile else "base.log")), current(session.meter.device):
        try:
            if profile:
                session.profile(session.resume)
            else:
                session.score_base_again()
        except Exception as error:
            store.raise_unwritable(error)
            if isinstance(error, claims.Claimed):
                raise
            failure = failure_of(error, session.meter.current, trial.config)
            return unwritten(trial, status_of(error), failure, time.perf_counter() - start)
    held.write(place)
    return held


def _run(session: Session) -> Status:
    session.refuse()
    session.load()
    session.read()
    if session.stop_at is not None:
        session.adapt()
        session.judge()
        return Status.stopped
    session.score_base()
    with compiled.compile_once() if session.config.profiler else nullcontext():
        session.adapt()
        if session.stopped_early:
            return Status.stopped
        session.save()
        session.evaluate()
        session.score_scaled()
        answers = session.keep()
    session.let_go()  # a device whose memory one base nearly fills has no room for a second one
    session.compare(answers)
    return Status.success
