"""Several trials trained at once on one frozen base: which can be, and the running of those that are.

What is alike in them is done once: the base is loaded, the rows are read, the base is scored. Then their
adapters are trained together (packed.py), and each is evaluated, saved and recorded as a trial alone is. Its numbers
are those of the trial alone within rounding, not to the bit (lanes.py says why).
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import cast

import torch
from peft import PeftModel

from peftsweep.config import build
from peftsweep.config.compose import Trial
from peftsweep.config.identity import content_hash
from peftsweep.forecast import forecast
from peftsweep.models import model, parts
from peftsweep.observe.display import Observer
from peftsweep.observe.measure import Meter, Stage, current, out_of_memory
from peftsweep.observe.tracker import Tracker
from peftsweep.study import claims as study_claims
from peftsweep.study import record, store
from peftsweep.study.record import Result, Status
from peftsweep.sweep.packing import shared_settings
from peftsweep.training import checkpoint, packed
from peftsweep.training.lanes import Pack
from peftsweep.trial import done as trial_done
from peftsweep.trial import outcome, task
from peftsweep.trial.session import Answers, Session

log = logging.getLogger(__name__)
MIN_PACK_SPEEDUP = 1.1  # in the probe, which leaves out what each lane does by itself in a step


# ---- the pack --------------------------------------------------------------------------------------


def run(
    trials: Sequence[Trial],
    observers: Sequence[Observer] | None = None,
    *,
    probe: bool = False,
    measure: bool = False,
) -> list[Result]:
    """Train and evaluate the trials of one pack; the record of each is written in any case.

    With ``probe`` they are trained together only if some steps, tried out, are faster so. With ``measure`` each takes
    some steps alone afterwards, for a speed and a memory of its own.

    Those that are done, or were trained before and need only be evaluated, do not join; those that were cut off go on
    with those at the same step. If what all share fails, two halves try it again where memory ran out, else each trial
    alone, so that no failure is put down to the wrong one.

    Raises:
        KeyboardInterrupt: the user interrupted it; those that had not ended are recorded as cancelled.
        study.Claimed: another process runs one of them.
    """
    told = dict(zip((one.identity for one in trials), observers or [Observer() for _ in trials], strict=True))
    done = {one.identity: found for one in trials if (found := trial_done.finished(one))}
    at_step: dict[int, list[Trial]] = {}
    for one in trials:
        if one.identity not in done and not _trained(one):
            at_step.setdefault(_step(one), []).append(one)
    for group in at_step.values():
        if len(group) > 1:
            done |= _together(group, told, probe=probe, measure=measure)
    rest = (one for one in trials if one.identity not in done)
    done |= {one.identity: task.run(one, told[one.identity]) for one in rest}
    return [done[one.identity] for one in trials]


def _together(trials: Sequence[Trial], told: dict[str, Observer], *, probe: bool, measure: bool) -> dict[str, Result]:
    """The records by identity, of none that each has to run alone."""
    names = [one.identity for one in trials]
    with ExitStack() as claims:
        for one in trials:
            claims.enter_context(study_claims.claim(trial_done.folder(one).parent, one.identity))
        try:
            return dict(zip(names, _Pack(trials, [told[name] for name in names], probe, measure).run(), strict=True))
        except _SharedFailure as failure:
            reason, memory = str(failure), failure.memory
    outcome.empty(model.device(trials[0].config.device))
    log.warning("the trials of a pack are not trained together: %s", reason)
    half = (len(trials) + 1) // 2 if memory else 0
    done: dict[str, Result] = {}
    for part in (trials[:half], trials[half:]) if half > 1 else ():
        ended = run(part, [told[one.identity] for one in part], probe=probe, measure=measure)
        done |= {one.identity: result for one, result in zip(part, ended, strict=True)}
    return done


def _trained(one: Trial) -> bool:
    """Whether its trained weights are there already."""
    ended = trial_done.folder(one) / store.CHECKPOINTS / checkpoint.TRAINED
    return trial_done.trained(one) is not None or (ended.exists() and not one.config.force)


def _step(one: Trial) -> int:
    """That of the checkpoint from which it would go on; 0 without one."""
    files = [] if one.config.force else (trial_done.folder(one) / store.CHECKPOINTS).glob("step-*.pt")
    return max((int(file.stem.partition("-")[2]) for file in files), default=0)


class NotWorthIt(Exception):
    """The trials are faster one by one."""


_SPEEDUPS: dict[str, float] = {}  # of packs that this process has tried out


class _SharedFailure(Exception):
    """What the lanes share has failed."""

    def __init__(self, error: Exception) -> None:
        super().__init__(record.one_line(error))
        self.memory = out_of_memory(error)


class _Everyone(Observer):
    """Tells every lane's observer what all do together."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = observers

    def stage(self, name: str) -> None:
        for observer in self._observers:
            observer.stage(name)


class _Lane:
    """One trial of a pack: its session, and how it has ended."""

    def __init__(self, name: str, one: Trial, observer: Observer, device: torch.device) -> None:
        self.name, self.trial, self.place = name, one, trial_done.folder(one)
        self.tracker, self.meter = Tracker(observer), Meter(device)
        sittings = outcome.Sittings(self.place, self.meter)
        self.result = outcome.begin(one, self.place)
        self.session = Session(one, self.result, self.meter, self.tracker, sittings)
        self.status: Status | None = None
        self.failure: dict[str, str] | None = None

    @contextmanager
    def own(self) -> Iterator[None]:
        """What fails in the block ends this trial and no other."""
        try:
            yield
        except study_claims.Claimed:  # it is another process's now
            raise
        except Exception as error:
            self.fail(error, self.meter.current)

    def fail(self, error: BaseException, stage: str | None) -> None:
        self.status = outcome.status_of(error)
        self.failure = outcome.failure_of(error, stage, self.trial.config)

    def save(self) -> None:
        with self.own():
            cast(PeftModel, self.session.adapted).set_adapter(self.name)
            self.session.save()

    def drop(self) -> None:
        """It runs again, in another pack or alone."""
        self.tracker.end({}, Status.cancelled.value)

    def end(self, start: float) -> Result:
        status = self.status or Status.success
        sittings = self.session.sittings
        outcome.end(self.result, self.place, self.meter, start, status, self.failure, self.tracker, sittings)
        return self.result


class _Pack:
    """Trials on their way together. The first one's session does, under a meter of the pack, what all share."""

    def __init__(self, trials: Sequence[Trial], observers: Sequence[Observer], probe: bool, measure: bool) -> None:
        self._probe, self._measure = probe, measure
        device = model.device(trials[0].config.device)
        self.start = time.perf_counter()
        self.meter = Meter(device)
        self.everyone = _Everyone(observers)
        self.lanes = [
            _Lane(f"lane{number}", one, observer, device)
            for number, (one, observer) in enumerate(zip(trials, observers, strict=True))
        ]

    def run(self) -> list[Result]:
        """The record of each trial.

        Raises:
            _SharedFailure: what they share has failed; nothing is recorded of those that it hit.
        """
        with outcome.logged(*(lane.place / "trial.log" for lane in self.lanes)), current(self.meter.device):
            for lane in self.lanes:
                if lane.trial.config.tracker:
                    lane.tracker.start(partial(build.tracker, lane.trial, lane.place), record.flat(lane.result.config))
                with lane.own():
                    lane.session.refuse()
            try:
                self._train()
                self._judge()
                for lane in self._alive():
                    lane.save()
                self._evaluate()
                answers = {lane.name: self._keep(lane) for lane in self._alive()}
                self._let_go()
                for lane in self._alive():
                    with lane.own():
                        lane.session.compare(answers[lane.name])
                        if self._measure:
                            lane.session.measure()
            except BaseException as error:
                for lane in self._alive():
                    lane.fail(error, self.meter.current or lane.meter.current)
                for lane in self.lanes:
                    lane.drop() if isinstance(error, _SharedFailure | study_claims.Claimed) else lane.end(self.start)
                raise
            results = [lane.end(self.start) for lane in self.lanes]
        outcome.empty(self.meter.device)
        return results

    def _train(self) -> None:
        lanes = self._alive()
        if not lanes:
            return
        lead = Session(lanes[0].trial, copy.deepcopy(lanes[0].result), self.meter, self.everyone)
        try:
            lead.load()
            lead.read()
            if any(lane.session.rung_step(len(lead.tokens)) is None for lane in lanes):
                lead.score_base()
            with lead.stage("attach"):
                lead.adapted = build.attach_lanes({lane.name: lane.trial for lane in lanes}, lead.base)
            predicted = forecast.together([lane.trial for lane in lanes], lead.tokens)
            if self._probe:
                self._try_out(lead, lanes)
            for lane in lanes:
                lane.session.share(lead)
                lane.session.info["coverage"] = build.coverage_of(lead.adapted, lane.name)
            ended = self._trained(lead, lanes)
        except Exception as error:
            raise _SharedFailure(error) from error
        for lane in lanes:
            self._note(lane, lanes, ended[lane.name])
            if predicted:
                lane.result.memory["packed_predicted"] = predicted.facts()

    def _try_out(self, lead: Session, lanes: Sequence[_Lane]) -> None:
        """Raise unless the lanes are faster together, by what was found for such a pack before, or by trying it."""
        key = content_hash([shared_settings(lead.trial), len(lanes)])
        if key not in _SPEEDUPS:
            with lead.stage("probe"):
                names, config = [lane.name for lane in lanes], lead.config.train
                _SPEEDUPS[key] = packed.speedup(
                    cast(PeftModel, lead.adapted), names, lead.tokens, config, pad_id=lead.pad_id, meter=self.meter
                )
        log.info("%d together are %.2f times as fast as one by one", len(lanes), _SPEEDUPS[key])
        if _SPEEDUPS[key] < MIN_PACK_SPEEDUP:
            raise NotWorthIt(f"together they would be {_SPEEDUPS[key]:.2f} times as fast as one by one")

    def _trained(self, lead: Session, lanes: Sequence[_Lane]) -> dict[str, packed.Ended]:
        with lead.stage("train"), ExitStack() as files:
            return packed.train_packed(
                cast(PeftModel, lead.adapted),
                lead.tokens,
                [
                    packed.Lane(
                        name=lane.name,
                        config=lane.trial.config.train,
                        checkpoints=lane.session.checkpoints(),
                        log=partial(lane.session.log_step, files.enter_context(lane.session.steps())),
                        validate=lane.session.validation(),
                        stop_at=lane.session.stop_at,
                        prune=lane.session.prune(),
                    )
                    for lane in lanes
                ],
                pad_id=lead.pad_id,
                seed=lead.config.seed,
                meter=self.meter,
            )

    def _note(self, lane: _Lane, lanes: Sequence[_Lane], ended: packed.Ended) -> None:
        """What the lane has come to. What it took is the pack's, and stands where no trial's own figure stands."""
        session, stages = lane.session, self.meter.stages
        cast(PeftModel, session.adapted).set_adapter(lane.name)
        trainable = parts.count(session.adapted).trainable
        lane.result.run_info["packed_with"] = [other.place.name for other in lanes if other is not lane]
        session.info |= {"trainable_parameters": trainable, "steps": ended.trained.steps}
        session.info["total_parameters"] = session.info["base_parameters"] + trainable
        session.info |= outcome.train_info(ended.trained)
        session.info |= outcome.train_cost(ended.trained)
        took = {f"{name}_seconds": one.seconds for name, one in stages.items() if name != "train"}
        session.info["packed"] = session.info.get("packed", {}) | took
        lane.result.memory |= {f"packed_{name}": one.memory() for name, one in stages.items()}
        if ended.error is not None:
            lane.fail(ended.error, "train")
            return
        session.note_stop(ended.trained)
        if session.stopped_early:
            lane.status = Status.stopped

    def _judge(self) -> None:
        """End those that have come to their rung."""
        for lane in self._alive():
            if lane.session.stop_at is not None:
                with lane.own():
                    lane.session.judge()
                    lane.status = Status.stopped

    def _evaluate(self) -> None:
        """Evaluate the lanes, what is asked of each asked of all at once; so what it took is the pack's."""
        lanes = self._alive()
        if not lanes:
            return
        together = Pack(cast(PeftModel, lanes[0].session.adapted), [lane.name for lane in lanes])
        try:
            for lane in lanes:
                with lane.own(), together.asked(lane.name):
                    lane.session.evaluate()
        finally:
            together.close()
        self._note_evaluations(lanes)

    def _note_evaluations(self, lanes: Sequence[_Lane]) -> None:
        """What they took, which was measured with the lane that asked first, is that of the pack."""
        whole = self.meter.stages["eval"] = Stage()
        for lane in lanes:
            whole.add(lane.meter.stages.pop("eval", Stage()))
        for lane in lanes:
            lane.session.info["packed"]["eval_seconds"] = whole.seconds
            lane.result.memory["packed_eval"] = whole.memory()
        for name in lanes[0].session.tests:
            found = [lane.result.eval_info[name] for lane in lanes]
            seconds = sum(one.pop("seconds", 0.0) for one in found)
            for one in found:
                one["packed_seconds"] = seconds
                for peak in ("allocated_peak", "rss_peak"):
                    one.pop(peak, None)

    def _keep(self, lane: _Lane) -> Answers | None:
        answers = None
        with lane.own():
            cast(PeftModel, lane.session.adapted).set_adapter(lane.name)
            lane.session.score_scaled()
            answers = lane.session.keep()
        return answers

    def _let_go(self) -> None:
        for lane in self.lanes:
            if hasattr(lane.session, "adapted"):  # which one that was refused has not
                lane.session.let_go()

    def _alive(self) -> list[_Lane]:
        return [lane for lane in self.lanes if lane.status is None]
