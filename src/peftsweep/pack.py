"""Several trials trained at once on one frozen base: which can be, and the running of those that are.

What is alike in them is done once: the base is loaded, the rows are read, the base is scored. Then their
adapters are trained together (packed.py), and each is evaluated, saved and recorded as a trial alone is. Its numbers
are those of the trial alone within rounding, not to the bit (lanes.py says why).
"""

from __future__ import annotations

import copy
import logging
import math
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel

from peftsweep import build, checkpoint, forecast, model, packed, record, study, train, trial
from peftsweep import config as configuration
from peftsweep.config import Trial, content_hash
from peftsweep.display import Observer
from peftsweep.errors import InputError
from peftsweep.lanes import Pack
from peftsweep.measure import Meter, Stage, current, out_of_memory
from peftsweep.record import Result, Status
from peftsweep.schema import Task, TrainConfig
from peftsweep.tracker import Tracker
from peftsweep.trial import Answers, Session

log = logging.getLogger(__name__)

# What lanes of a pack may differ in: of a LoRA's configuration, and of its training.
ADAPTER = ("r", "lora_alpha", "use_rslora", "lora_dropout", "init_lora_weights", "rank_pattern", "alpha_pattern")
PLACES = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
OWN = ("learning_rate", "learning_rate_scale", "weight_decay", "schedule", "warmup", "steps", "epochs", "clip")
OWN_TOO = ("optimizer", "optimizer_kwargs", "log_every", "keep_best", "best_metric", "checkpoint_every", "params_file")
WORTH_IT = 1.1  # times as fast as one by one, in the probe; it leaves out what each lane does by itself in a step
PLAIN = (True, "gaussian", False)  # ways to begin that draw numbers and do not look at the base


# ---- which -----------------------------------------------------------------------------------------


Fits = Callable[[Sequence[Trial]], bool]


def plan(trials: Sequence[Trial], limit: int, fits: Fits | None = None) -> list[list[Trial]]:
    """``trials`` in packs of at most ``limit``, in the order of their first ones; what cannot be packed is alone.

    Trials of a pack share all but what an adapter and its optimizer may have of their own; those of like length are
    put together, and the packs made as even as can be. Any pack ``fits``, the memory for instance, if the heaviest of
    its group do.
    """
    groups: dict[str, list[Trial]] = {}
    for one in trials:
        groups.setdefault(one.identity if alone(one) else _shared(one), []).append(one)
    packs = []
    for group in groups.values():
        most = _most(group, min(limit, len(group)), fits)
        in_order = sorted(group, key=_length) if len(group) > most else group
        size = math.ceil(len(group) / math.ceil(len(group) / most))
        packs += [in_order[start : start + size] for start in range(0, len(group), size)]
    return packs


def _most(group: Sequence[Trial], limit: int, fits: Fits | None) -> int:
    """How many of the group fit together, whichever these are."""
    if limit < 2 or fits is None:
        return limit
    heaviest = sorted(group, key=lambda one: -(forecast.check(one).trainable_parameters or 0))
    if fits(heaviest[:limit]):
        return limit
    return 1 + bisect_left(range(2, limit), True, key=lambda size: not fits(heaviest[:size]))


def fits_memory(trials: Sequence[Trial]) -> bool:
    """Whether they can be trained together in the memory of the device, as far as can be said."""
    limit = forecast.memory_limit(trials[0])
    if limit is None or (predicted := forecast.together(trials)) is None:
        return True
    return predicted.peak_bytes <= limit


def alone(trial: Trial) -> str | None:
    """Why the trial cannot be trained together with others; None where it can."""
    config = trial.config
    checks = {
        "its method is not plain LoRA": not _plain_lora(config.method) or config.method_setup or config.method_inputs,
        "it trains nothing": config.adapter.path is not None or not (config.train.steps or config.train.epochs),
        "it is a classifier": config.model.task is not Task.causal_lm,
        "it is compiled": config.train.compile != "none",
        "its optimizer is not torch's own": not _of_torch(config.train),
        "it is profiled or timed": config.profiler or config.inference,
        "its base is spread over devices": config.model.device_map is not None,
        "dropout under gradient checkpointing": config.train.checkpointing and config.method.get("lora_dropout"),
        "its base has dropout of its own": _base_drops(trial),
    }
    return next((reason for reason, holds in checks.items() if holds), None)


def _plain_lora(method: dict[str, Any]) -> bool:
    if method.get("_target_") not in ("peft.LoraConfig", "peft.tuners.lora.LoraConfig"):
        return False
    usual = LoraConfig()
    rest = {key: value for key, value in method.items() if key not in ("_target_", *ADAPTER, *PLACES)}
    unusual = [key for key, value in rest.items() if value not in (None, getattr(usual, key, None))]
    return not unusual and method.get("init_lora_weights", True) in PLAIN


def _of_torch(config: TrainConfig) -> bool:
    """Others may look at how a weight lies in memory, which packing changes."""
    made = train.find_optimizer(config.optimizer)
    return isinstance(made, type) and made.__module__.startswith("torch.optim")


def _base_drops(trial: Trial) -> bool:
    """Its random numbers are drawn for all lanes at once, so that a lane's would depend on the others."""
    key = content_hash(configuration.model_identity(trial.config.model))
    if key not in _DROPS:
        try:
            fields = model.architecture(trial.config.model).to_dict()
        except InputError:  # which is said when it is loaded
            return True
        _DROPS[key] = any("drop" in name and isinstance(p, float) and p > 0 for name, p in fields.items())
    return _DROPS[key]


_DROPS: dict[str, bool] = {}  # by model


def _length(trial: Trial) -> float:
    """How long it trains, in a measure that is the same for all of a pack."""
    config = trial.config.train
    return config.steps if config.epochs is None else math.inf


def _shared(trial: Trial) -> str:
    """What must be alike in the trials of a pack."""
    tree = trial.tree
    kept = {key: tree[key] for key in ("seed", "device", "model", "quant", "dataset", "eval")}
    kept["train"] = {key: value for key, value in tree["train"].items() if key not in (*OWN, *OWN_TOO, "eval_every")}
    kept["model_content"] = configuration.model_identity(trial.config.model)
    kept["validated"] = trial.config.train.eval_every is not None  # its rows are taken from those to train on
    if trial.rows is not None:
        kept["rows"] = trial.rows.fingerprints
    return content_hash(kept)


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
    done = {one.identity: found for one in trials if (found := trial.finished(one))}
    at_step: dict[int, list[Trial]] = {}
    for one in trials:
        if one.identity not in done and not _trained(one):
            at_step.setdefault(_step(one), []).append(one)
    for group in at_step.values():
        if len(group) > 1:
            done |= _together(group, told, probe=probe, measure=measure)
    rest = (one for one in trials if one.identity not in done)
    done |= {one.identity: trial.run(one, told[one.identity]) for one in rest}
    return [done[one.identity] for one in trials]


def _together(trials: Sequence[Trial], told: dict[str, Observer], *, probe: bool, measure: bool) -> dict[str, Result]:
    """The records by identity, of none that each has to run alone."""
    names = [one.identity for one in trials]
    with ExitStack() as claims:
        for one in trials:
            claims.enter_context(study.claim(trial.folder(one).parent, one.identity))
        try:
            return dict(zip(names, _Pack(trials, [told[name] for name in names], probe, measure).run(), strict=True))
        except _SharedFailure as failure:
            reason, memory = str(failure), failure.memory
    trial.empty(model.device(trials[0].config.device))
    log.warning("the trials of a pack are not trained together: %s", reason)
    half = (len(trials) + 1) // 2 if memory else 0
    done: dict[str, Result] = {}
    for part in (trials[:half], trials[half:]) if half > 1 else ():
        ended = run(part, [told[one.identity] for one in part], probe=probe, measure=measure)
        done |= {one.identity: result for one, result in zip(part, ended, strict=True)}
    return done


def _trained(one: Trial) -> bool:
    """Whether its trained weights are there already."""
    ended = trial.folder(one) / study.CHECKPOINTS / checkpoint.TRAINED
    return trial.trained(one) is not None or (ended.exists() and not one.config.force)


def _step(one: Trial) -> int:
    """That of the checkpoint from which it would go on; 0 without one."""
    files = [] if one.config.force else (trial.folder(one) / study.CHECKPOINTS).glob("step-*.pt")
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
        self.name, self.trial, self.place = name, one, trial.folder(one)
        self.tracker, self.meter = Tracker(observer), Meter(device)
        sittings = trial.Sittings(self.place, self.meter)
        self.result = trial.begin(one, self.place)
        self.session = Session(one, self.result, self.meter, self.tracker, sittings)
        self.status: Status | None = None
        self.failure: dict[str, str] | None = None

    @contextmanager
    def own(self) -> Iterator[None]:
        """What fails in the block ends this trial and no other."""
        try:
            yield
        except study.Claimed:  # it is another process's now
            raise
        except Exception as error:
            self.fail(error, self.meter.current)

    def fail(self, error: BaseException, stage: str | None) -> None:
        self.status = trial.status_of(error)
        self.failure = trial.failure_of(error, stage, self.trial.config)

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
        trial.end(self.result, self.place, self.meter, start, status, self.failure, self.tracker, sittings)
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
        with trial.logged(*(lane.place / "trial.log" for lane in self.lanes)), current(self.meter.device):
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
                    lane.drop() if isinstance(error, _SharedFailure | study.Claimed) else lane.end(self.start)
                raise
            results = [lane.end(self.start) for lane in self.lanes]
        trial.empty(self.meter.device)
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
        key = content_hash([_shared(lead.trial), len(lanes)])
        if key not in _SPEEDUPS:
            with lead.stage("probe"):
                names, config = [lane.name for lane in lanes], lead.config.train
                _SPEEDUPS[key] = packed.speedup(
                    cast(PeftModel, lead.adapted), names, lead.tokens, config, pad_id=lead.pad_id, meter=self.meter
                )
        log.info("%d together are %.2f times as fast as one by one", len(lanes), _SPEEDUPS[key])
        if _SPEEDUPS[key] < WORTH_IT:
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
        trainable = model.count(session.adapted).trainable
        lane.result.run_info["packed_with"] = [other.place.name for other in lanes if other is not lane]
        session.info |= {"trainable_parameters": trainable, "steps": ended.trained.steps}
        session.info["total_parameters"] = session.info["base_parameters"] + trainable
        session.info |= trial.train_info(ended.trained)
        session.info |= trial.train_cost(ended.trained)
        took = {f"{name}_seconds": one.seconds for name, one in stages.items() if name != "train"}
        session.info["packed"] = session.info.get("packed", {}) | took
        lane.result.memory |= {f"packed_{name}": one.memory() for name, one in stages.items()}
        if ended.error is not None:
            lane.fail(ended.error, "train")

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
            answers = lane.session.keep()
        return answers

    def _let_go(self) -> None:
        for lane in self.lanes:
            if hasattr(lane.session, "adapted"):  # which one that was refused has not
                lane.session.let_go()

    def _alive(self) -> list[_Lane]:
        return [lane for lane in self.lanes if lane.status is None]
