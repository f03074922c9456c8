"""Run several trials at once on one frozen base.

What is alike in them is done once: the base is loaded, the rows are read, the base is scored. Then their
adapters are trained together (packed.py), and each is evaluated, saved and recorded as a trial alone is. Its numbers
are those of the trial alone within rounding, not to the bit (slots.py says why).
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
from peftsweep.training import checkpoint, length, packed
from peftsweep.training.slots import Pack
from peftsweep.trial import done as trial_done
from peftsweep.trial import foreseen, outcome, task
from peftsweep.trial.session import Answers, Session

log = logging.getLogger(__name__)
MIN_PACK_SPEEDUP = 1.1  # of whole steps; the margin covers the noise of the probe's few steps


# ---- the pack --------------------------------------------------------------------------------------


def run(
    trials: Sequence[Trial],
    observers: Sequence[Observer] | None = None,
    *,
    probe: bool = False,
    measure: bool = False,
) -> list[Result]:
    """Train and evaluate the trials of one pack; the record of each is written in any case.

    With ``probe`` they are trained together only if some timed steps are faster together. With ``measure`` each trial
    takes some steps alone afterwards, to measure its own speed and memory.

    Trials that are done, or only need to be evaluated, do not join the pack. Interrupted trials go on together with
    those at the same step. If an operation of the whole pack fails, two halves are tried if memory ran out, else each
    trial alone, so that the record of a failure is that of the right trial.

    Raises:
        KeyboardInterrupt: the user interrupted it; trials that had not ended are recorded as cancelled.
        study.Claimed: another process runs one of the trials.
    """
    observer_of = dict(zip((one.identity for one in trials), observers or [Observer() for _ in trials], strict=True))
    done = {one.identity: found for one in trials if (found := trial_done.finished(one))}
    at_step: dict[int, list[Trial]] = {}
    for one in trials:
        if one.identity not in done and not _trained(one):
            at_step.setdefault(_step(one), []).append(one)
    for group in at_step.values():
        if len(group) > 1:
            done |= _run_together(group, observer_of, probe=probe, measure=measure)
    rest = (one for one in trials if one.identity not in done)
    done |= {one.identity: task.run(one, observer_of[one.identity]) for one in rest}
    return [done[one.identity] for one in trials]


def _run_together(
    trials: Sequence[Trial], observers: dict[str, Observer], *, probe: bool, measure: bool
) -> dict[str, Result]:
    """The records of the pack by identity, without trials that have to run alone."""
    names = [one.identity for one in trials]
    with ExitStack() as claims:
        for one in trials:
            claims.enter_context(study_claims.claim(trial_done.folder(one).parent, one.identity))
        if any(map(trial_done.finished, trials)):
            raise study_claims.Claimed("another process has just ended a trial of the pack")
        try:
            return dict(
                zip(names, _Pack(trials, [observers[name] for name in names], probe, measure).run(), strict=True)
            )
        except _SharedFailure as failure:
            reason, memory = str(failure), failure.memory
    outcome.empty(model.device(trials[0].config.device))
    log.warning("the trials of a pack are not trained together: %s", reason)
    half = (len(trials) + 1) // 2 if memory else 0
    done: dict[str, Result] = {}
    for part in (trials[:half], trials[half:]) if half > 1 else ():
        ended = run(part, [observers[one.identity] for one in part], probe=probe, measure=measure)
        done |= {one.identity: result for one, result in zip(part, ended, strict=True)}
    return done


def _trained(one: Trial) -> bool:
    """Whether the trial has been trained already: its record, or its trained weights, exist."""
    ended = trial_done.folder(one) / store.CHECKPOINTS / checkpoint.TRAINED
    if (held := trial_done.done_before(one)) is not None and trial_done.lacks_answers_of_base(one, held):
        return True
    return trial_done.trained(one) is not None or (ended.exists() and not trial_done.anew(one))


def _step(one: Trial) -> int:
    """The step of the checkpoint from which the trial would continue; 0 without one."""
    files = [] if trial_done.anew(one) else (trial_done.folder(one) / store.CHECKPOINTS).glob("step-*.pt")
    return max((int(file.stem.partition("-")[2]) for file in files), default=0)


class NotWorthIt(Exception):
    """The pack is not faster than its trials one by one."""


_SPEEDUPS: dict[str, float] = {}  # of packs that this process has timed


class _SharedFailure(Exception):
    """An operation of the whole pack has failed."""

    def __init__(self, error: Exception) -> None:
        super().__init__(record.one_line(error))
        self.memory = out_of_memory(error)


class _BroadcastObserver(Observer):
    """Reports the stages of the pack to the observer of each slot."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = observers

    def stage(self, name: str) -> None:
        for observer in self._observers:
            observer.stage(name)


class _Slot:
    """One trial of a pack: its session, and how it has ended."""

    def __init__(self, name: str, one: Trial, observer: Observer, device: torch.device) -> None:
        self.name, self.trial, self.place = name, one, trial_done.folder(one)
        self.tracker, self.meter = Tracker(observer), Meter(device)
        attempts = outcome.Attempts(self.place, self.meter)
        self.result = outcome.begin(one, self.place)
        self.session = Session(one, self.result, self.meter, self.tracker, attempts)
        self.status: Status | None = None
        self.failure: dict[str, str] | None = None

    @contextmanager
    def own(self) -> Iterator[None]:
        """An error in the block ends this trial and no other."""
        try:
            yield
        except study_claims.Claimed:  # it is another process's now
            raise
        except Exception as error:
            store.raise_unwritable(error)
            self.fail(error, self.meter.current)

    def fail(self, error: BaseException, stage: str | None) -> None:
        self.status = outcome.status_of(error)
        self.failure = outcome.failure_of(error, stage, self.trial.config)

    def save(self) -> None:
        with self.own():
            cast(PeftModel, self.session.adapted).set_adapter(self.name)
            self.session.save()

    def drop(self) -> None:
        """End the tracker's run without a record, as the trial runs again, in another pack or alone."""
        self.tracker.end({}, Status.cancelled.value)

    def end(self, start: float) -> Result:
        status = self.status or Status.success
        attempts = self.session.attempts
        outcome.end(self.result, self.place, self.meter, start, status, self.failure, self.tracker, attempts)
        return self.result


class _Pack:
    """The trials of one pack; one more session, with the pack's own meter, runs their common stages."""

    def __init__(self, trials: Sequence[Trial], observers: Sequence[Observer], probe: bool, measure: bool) -> None:
        self._probe, self._measure = probe, measure
        device = model.device(trials[0].config.device)
        self.start = time.perf_counter()
        self.meter = Meter(device)
        self.everyone = _BroadcastObserver(observers)
        self.slots = [
            _Slot(f"slot{number}", one, observer, device)
            for number, (one, observer) in enumerate(zip(trials, observers, strict=True))
        ]

    def run(self) -> list[Result]:
        """The record of each trial.

        Raises:
            _SharedFailure: an operation of the whole pack has failed; no record is written for the trials in it.
        """
        with outcome.logged(*(slot.place / "trial.log" for slot in self.slots)), current(self.meter.device):
            for slot in self.slots:
                if slot.trial.config.tracker:
                    slot.tracker.start(partial(build.tracker, slot.trial, slot.place), record.flat(slot.result.config))
                with slot.own():
                    slot.session.refuse()
            try:
                self._train()
                self._judge()
                for slot in self._alive():
                    slot.save()
                self._evaluate()
                answers = {slot.name: self._keep(slot) for slot in self._alive()}
                self._let_go()
                for slot in self._alive():
                    with slot.own():
                        slot.session.compare(answers[slot.name])
                        if self._measure:
                            slot.session.measure()
            except BaseException as error:
                for slot in self._alive():
                    slot.fail(error, self.meter.current or slot.meter.current)
                for slot in self.slots:
                    slot.drop() if isinstance(error, _SharedFailure | study_claims.Claimed) else slot.end(self.start)
                raise
            results = [slot.end(self.start) for slot in self.slots]
        outcome.empty(self.meter.device)
        return results

    def _train(self) -> None:
        slots = self._alive()
        if not slots:
            return
        lead = Session(slots[0].trial, copy.deepcopy(slots[0].result), self.meter, self.everyone)
        try:
            lead.load()
            lead.read()
            if any(slot.session.rung_step(len(lead.tokens)) is None for slot in slots):
                lead.score_base()
            with lead.stage("attach"):
                lead.adapted = build.attach_slots({slot.name: slot.trial for slot in slots}, lead.base)
            predicted = forecast.together([slot.trial for slot in slots], lead.tokens)
            if self._probe:
                self._try_out(lead, slots)
            for slot in slots:
                slot.session.share(lead)
                slot.session.info["coverage"] = build.coverage_of(lead.adapted, slot.name)
            ended = self._trained(lead, slots)
        except Exception as error:
            store.raise_unwritable(error)
            raise _SharedFailure(error) from error
        for slot in slots:
            self._note(slot, slots, ended[slot.name])
            steps = length.total_steps(slot.trial.config.train, len(lead.tokens))
            flops = foreseen.flops_of_packed(slot.trial, lead.rows, lead.tokens, self.meter.device)
            foreseen.count_flops(slot.result, flops, steps, self.meter.device)
            if predicted:
                slot.result.memory["packed_predicted"] = predicted.facts()

    def _try_out(self, lead: Session, slots: Sequence[_Slot]) -> None:
        """Raise unless the slots are faster together, by an earlier measurement of such a pack or a new one."""
        key = content_hash([shared_settings(lead.trial), len(slots)])
        if key not in _SPEEDUPS:
            with lead.stage("probe"):
                names, config = [slot.name for slot in slots], lead.config.train
                _SPEEDUPS[key] = packed.speedup(
                    cast(PeftModel, lead.adapted), names, lead.tokens, config, pad_id=lead.pad_id, meter=self.meter
                )
        log.info("%d together are %.2f times as fast as one by one", len(slots), _SPEEDUPS[key])
        if _SPEEDUPS[key] < MIN_PACK_SPEEDUP:
            raise NotWorthIt(f"together they would be {_SPEEDUPS[key]:.2f} times as fast as one by one")

    def _trained(self, lead: Session, slots: Sequence[_Slot]) -> dict[str, packed.Ended]:
        with lead.stage("train"), ExitStack() as files:
            return packed.train_packed(
                cast(PeftModel, lead.adapted),
                lead.tokens,
                [
                    packed.Slot(
                        name=slot.name,
                        config=slot.trial.config.train,
                        checkpoints=slot.session.checkpoints(),
                        log=partial(slot.session.log_step, files.enter_context(slot.session.steps())),
                        validate=slot.session.validation(),
                        stop_at=slot.session.stop_at,
                        prune=slot.session.prune(),
                    )
                    for slot in slots
                ],
                pad_id=lead.pad_id,
                seed=lead.config.seed,
                meter=self.meter,
            )

    def _note(self, slot: _Slot, slots: Sequence[_Slot], ended: packed.Ended) -> None:
        """Record the result of a slot. Its time and memory are the pack's, under keys of their own."""
        session, stages = slot.session, self.meter.stages
        cast(PeftModel, session.adapted).set_adapter(slot.name)
        trainable = parts.count(session.adapted).trainable
        slot.result.run_info["packed_with"] = [other.place.name for other in slots if other is not slot]
        session.info |= {"trainable_parameters": trainable, "steps": ended.trained.steps}
        session.info["total_parameters"] = session.info["base_parameters"] + trainable
        session.info |= outcome.train_info(ended.trained)
        session.info |= outcome.train_cost(ended.trained)
        took = {f"{name}_seconds": one.seconds for name, one in stages.items() if name != "train"}
        session.info["packed"] = session.info.get("packed", {}) | took
        slot.result.memory |= {f"packed_{name}": one.memory() for name, one in stages.items()}
        if ended.error is not None:
            slot.fail(ended.error, "train")
            return
        session.note_stop(ended.trained)
        if session.stopped_early:
            slot.status = Status.stopped

    def _judge(self) -> None:
        """End the slots that have reached their rung."""
        for slot in self._alive():
            if slot.session.stop_at is not None:
                with slot.own():
                    slot.session.judge()
                    slot.status = Status.stopped

    def _evaluate(self) -> None:
        """Evaluate all slots at once; time and memory of that are the pack's."""
        slots = self._alive()
        if not slots:
            return
        together = Pack(cast(PeftModel, slots[0].session.adapted), [slot.name for slot in slots])
        try:
            for slot in slots:
                with slot.own(), together.evaluated_together(slot.name):
                    slot.session.evaluate()
        finally:
            together.close()
        self._note_evaluations(slots)

    def _note_evaluations(self, slots: Sequence[_Slot]) -> None:
        """Record the time and memory of the evaluations, measured with the first slot, as the pack's."""
        whole = self.meter.stages["eval"] = Stage()
        for slot in slots:
            whole.add(slot.meter.stages.pop("eval", Stage()))
        for slot in slots:
            slot.session.info["packed"]["eval_seconds"] = whole.seconds
            slot.result.memory["packed_eval"] = whole.memory()
        for name in slots[0].session.tests:
            found = [slot.result.eval_info[name] for slot in slots]
            seconds = sum(one.pop("seconds", 0.0) for one in found)
            for one in found:
                one["packed_seconds"] = seconds
                for peak in ("allocated_peak", "rss_peak"):
                    one.pop(peak, None)

    def _keep(self, slot: _Slot) -> Answers | None:
        answers = None
        with slot.own():
            cast(PeftModel, slot.session.adapted).set_adapter(slot.name)
            slot.session.score_scaled()
            answers = slot.session.keep()
        return answers

    def _let_go(self) -> None:
        for slot in self.slots:
            if hasattr(slot.session, "adapted"):  # which one that was refused has not
                slot.session.let_go()

    def _alive(self) -> list[_Slot]:
        return [slot for slot in self.slots if slot.status is None]
