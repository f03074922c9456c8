"""The task function: one trial from its configuration to its record.

``run`` reads as the list of what happens.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import hashlib
import logging
import os
import re
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch
import transformers
from omegaconf import OmegaConf
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peftsweep import (
    build,
    checkpoint,
    compiled,
    data,
    evaluate,
    experiment,
    fingerprint,
    forecast,
    halving,
    inference,
    mended,
    model,
    probe,
    record,
    seen,
    study,
    train,
)
from peftsweep import config as configuration
from peftsweep.atomic import make_way, persistently, remove_partials
from peftsweep.build import Model
from peftsweep.config import Trial, evaluation_identity, model_identity
from peftsweep.data import Example
from peftsweep.display import Observer
from peftsweep.measure import Meter, Stage, current, out_of_memory, percentile
from peftsweep.reading import Unreadable, read_yaml
from peftsweep.record import Result, Status
from peftsweep.schema import Config, Dtype
from peftsweep.tracker import Tracker
from peftsweep.trust import as_text

log = logging.getLogger(__name__)

# Facts of an evaluation that are the same whatever the model says.
OF_THE_ROWS = (
    *("majority", "random", "f1_majority", "f1_random", record.HEADLINE),
    *("truncated_prompts", "truncated_answers", "long_references"),
)
COST = ("seconds", "allocated_peak", "rss_peak")  # of an evaluation
CHECKSUM = "sha256"  # in a file of a base's scores, of these and its answers
RELOAD_TOLERANCE = 1e-4  # of any token's loss, in nats: above rounding, far below what an evaluation sees
MERGE_TOLERANCE = 1e-3  # of any token's loss: sums of merged weights round otherwise than those of two products
# Of the mean token's, on a 16-bit base: sums in another order were seen to round by 0.013 (by 0.3 for one token).
NARROW_TOLERANCE = 0.03
Answers = tuple[data.Batch, torch.Tensor]  # a batch, and a model's losses on it
UNLIKE = 0.1  # of the trial's median, above which the size of profiled steps is worth a warning
MEASURED_STEPS = 13  # the first three of them are left out
OCCUPIED = 1e9  # bytes that others hold on a device, beyond what its driver takes


# ---- before ----------------------------------------------------------------------------------------


def folder(trial: Trial) -> Path:
    """Where the trial's record is or will be; one of an earlier version stays where it is."""
    root = study.folder(trial.config.study)
    place = study.trial_folder(root, trial.slug, trial.identity)
    if place.exists():
        return place
    if (before := study.recognised(root, trial.identity)) is not None:
        return before
    if trial.earlier is not None:
        before = study.trial_folder(root, trial.slug, trial.earlier.trial)
        held = study.result(before) if before.exists() else None
        if held is not None and _recognised(trial, held, "identity", trial.earlier.trial):
            return before
    return place


def _recognised(trial: Trial, held: Result, key: str, earlier: str) -> bool:
    """Whether a record is the trial's (``key`` is identity) or of the same training (training).

    By its own rule; of an earlier one only if no other trial, that this rule could not tell from it, took it before.
    """
    mine, taken = getattr(trial, key), held.run_info.get("recognised") or {}
    return mine in (held.run_info.get(key), taken.get(key)) or (
        mended.rule_of(held) == 1 and held.run_info.get(key) == earlier and not taken
    )


def outdated(trial: Trial) -> str | None:
    """Why the trial is run again, though its study holds it: the numbers of an earlier version were wrong."""
    held = None if trial.config.force else study.result(folder(trial))
    return None if held is None else _fault(held)


def _fault(held: Result) -> str | None:
    return mended.outdated(held) if held.status in halving.HAVE_TRAINED else None


def damaged(trial: Trial) -> str | None:
    """What of the trial's files is damaged, so that it is run again; None where nothing is."""
    return None if trial.config.force else study.damage(folder(trial))


def trained(trial: Trial) -> Result | None:
    """A trial of the study with the same training, whose adapter can be taken instead of training again."""
    root, earlier = study.folder(trial.config.study), trial.earlier
    for training in (trial.training, *([earlier.training] if earlier else [])):
        held = None if trial.config.force else study.trained(root, training)
        if held and not mended.outdated(held) and _recognised(trial, held, "training", training):
            return held
    return None


def finished(trial: Trial) -> Result | None:
    """The trial's record, if nothing is left to do for it; it then carries this trial's label too.

    A trial that was too large for another memory limit is tried again under one that it fits, and one that
    was stopped at a rung goes on for a later one, or to its end.
    """
    done = _done(trial)
    if done is None or _lacks_profile(trial, done) or _lacks_answers_of_base(trial, done):
        return None
    if done.error and done.error["type"] == Oversized.__name__ and not forecast.oversized(trial):
        return None
    new_label = trial.label not in done.run_info["labels"]
    by_earlier_rule = done.run_info.get("identity") != trial.identity and not done.run_info.get("recognised")
    if new_label:
        done.run_info["labels"].append(trial.label)
    if by_earlier_rule:
        done.run_info["recognised"] = {"identity": trial.identity, "training": trial.training}
    if new_label or by_earlier_rule or _headlined_anew(trial, done):
        done.write(folder(trial))
    if by_earlier_rule:
        study.mark_recognised(done)
    _mend_words(trial, folder(trial))
    return done


def _headlined_anew(trial: Trial, done: Result) -> bool:
    """Have the record say the headlines that are asked for, of the metrics that it holds; whether it did not."""
    changed = False
    for name, node in trial.config.eval.items():
        wanted, found = node.get(record.HEADLINE), done.eval_info.get(name, {})
        if wanted in found and found.get(record.HEADLINE) != wanted:
            found[record.HEADLINE], changed = wanted, True
    return changed


def resumes_full(trial: Trial) -> bool:
    """Whether the trial was stopped at a rung, of a halving that is not asked for any more."""
    held = study.result(folder(trial)) if trial.config.halving.min_steps is None else None
    return held is not None and held.status is Status.stopped


def _done(trial: Trial) -> Result | None:
    done = None if trial.config.force else study.result(folder(trial))
    if done is None or not done.status.done or _fault(done) or damaged(trial):
        return None
    return done if halving.reached(trial.config.halving, done) else None


def _lacks_profile(trial: Trial, done: Result) -> bool:
    wanted = bool(trial.config.profiler) and done.status is Status.success
    return wanted and trial.choices["profiler"] not in done.train_info.get("profile", {})


def _lacks_answers_of_base(trial: Trial, done: Result) -> bool:
    """Whether a file of the untouched base's answers, which the record names, is damaged."""
    root = study.folder(trial.config.study)
    named = {name: str(found.get("base_predictions") or "") for name, found in done.eval_info.items()}
    files = {name: root / file for name, file in named.items() if study.is_below(file, study.BASE)}
    return done.status is Status.success and any(study.damage_of_lines(files[name], done, name) for name in files)


# ---- the trial -------------------------------------------------------------------------------------


def run(trial: Trial, observer: Observer | None = None) -> Result:
    """Train and evaluate ``trial``, unless its study already holds it; the record is written in any case.

    Of a done trial that lacks the profile asked for, only that is made. A failure ends up in the
    record, with its stage and traceback, and not as an exception.

    Raises:
        KeyboardInterrupt: the user interrupted it; it is recorded as cancelled.
        study.Claimed: another process runs it.
        Unwritable: its folder cannot be written.
    """
    if done := finished(trial):
        return done
    place = folder(trial)
    with study.claim(place.parent, trial.identity):
        return finished(trial) or _run_claimed(trial, place, observer or Observer())


def died(trial: Trial, status: Status, failure: dict[str, str], seconds: float) -> Result:
    """Record a trial whose process could not: how it ended, and what it had logged until then."""
    place = folder(trial)
    with study.claim(place.parent, trial.identity):
        result = begin(trial, place)
        result.train_info |= _so_far(place)
        result.run_info |= {"status": status.value, "error": failure}
        result.run_info |= {"sitting_seconds": seconds, "total_seconds": seconds}
        result.write(place)
    return result


def _so_far(place: Path) -> dict[str, Any]:
    """What a training that did not end had come to."""
    try:
        steps = [row for row in record.read_lines(place / record.STEPS, record.STEP, whole=False) if "loss" in row]
    except Unreadable as error:
        log.warning("%s", error)
        return {}
    return {"steps": steps[-1]["step"], "final_loss": steps[-1]["loss"]} if steps else {}


def _run_claimed(trial: Trial, place: Path, observer: Observer) -> Result:
    start = time.perf_counter()
    tracker = Tracker(observer)
    meter = Meter(model.device(trial.config.device))
    if (held := _done(trial)) and _lacks_profile(trial, held):
        with logged(place / "profile.log"), current(meter.device):
            session = Session(trial, held, meter, tracker)
            session.profile(session.resume)
        held.write(place)
        return held
    if held and _lacks_answers_of_base(trial, held):
        with logged(place / "base.log"), current(meter.device):
            Session(trial, held, meter, tracker).score_base_again()
        held.write(place)
        return held
    sittings = Sittings(place, meter)
    with meter.stage("setup"):  # and all that is between the stages
        result = begin(trial, place)
    with logged(place / "trial.log"):
        if warning := experiment.unheeded(trial.experiment):
            log.warning(warning)
        if trial.config.tracker:
            tracker.start(partial(build.tracker, trial, place), record.flat(result.config))
        status, failure = Status.success, None
        try:
            with meter.stage("setup"), current(meter.device):
                status = _run(Session(trial, result, meter, tracker, sittings))
        except study.Claimed:  # the other process writes the record
            tracker.end({}, Status.cancelled.value)
            raise
        except BaseException as error:
            status, failure = status_of(error), failure_of(error, meter.current, trial.config)
            full = study.unwritable(error)  # the next trial would train for nothing
            if full or not isinstance(error, Exception):
                end(result, place, meter, start, status, failure, tracker, sittings)
                if full:
                    raise full from error
                raise
        end(result, place, meter, start, status, failure, tracker, sittings)
    empty(meter.device)
    return result


def empty(device: torch.device) -> None:
    """Give back the memory of what is not used any more: until now an exception's frames may have held a model."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class Refused(Exception):
    """The combination is known not to work."""


class Oversized(Refused):
    """The trial is predicted not to fit into the memory."""


def status_of(error: BaseException) -> Status:
    """How a trial ends that ``error`` ends."""
    if isinstance(error, Refused):
        return Status.refused
    if out_of_memory(error):
        return Status.oom
    return Status.failed if isinstance(error, Exception) else Status.cancelled


def failure_of(error: BaseException, stage: str | None, config: Config) -> dict[str, str]:
    """What the record says of ``error``; of memory that ran out one line, with what to change."""
    found = record.failure(error, stage)
    log.log(logging.INFO if isinstance(error, Refused) else logging.ERROR, "%s", found["traceback"])
    if out_of_memory(error):
        asked = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", str(error))
        what = f"no memory left for {asked[1]} more" if asked else "no memory left"
        found["message"] = f"{what}; {_smaller(config, found['stage'])}"
    return found


def _smaller(config: Config, stage: str) -> str:
    """The keys that would make the trial smaller, of those that are not set already."""
    train, keys = config.train, []
    if stage == "train" and train.batch_size > 1:
        keys.append(f"train.batch_size={train.batch_size // 2} train.accumulation={2 * train.accumulation}")
    if stage == "train" and not train.checkpointing:
        keys.append("train.checkpointing=true")
    if not config.quant:
        keys.append("quant=4bit")
    return "try " + ", ".join([*keys, ("or " if keys else "") + "a smaller dataset.max_length or model"])


def _run(session: Session) -> Status:
    session.refuse()
    session.load()
    session.read()
    if session.stop_at is not None:
        session.adapt()
        session.judge()
        return Status.stopped
    session.score_base()
    with compiled.once() if session.config.profiler else nullcontext():
        session.adapt()
        session.save()
        session.evaluate()
        answers = session.keep()
    session.let_go()  # two bases would not fit where one just does
    session.compare(answers)
    return Status.success


class Sittings:
    """The seconds and the memory of a trial, in all and by stage, over all the times that it was sat down to.

    Those before this one are what its record says, or where it was killed what its last checkpoint says. They count
    once it goes on from there; what a trial that begins anew had done before is lost.
    """

    TOTAL = "total"

    def __init__(self, place: Path, meter: Meter) -> None:
        self._begun, self._meter = time.perf_counter(), meter
        held = study.result(place)
        self._recorded = _recorded_seconds(held) if held is not None else {}
        self.earlier: dict[str, float] = {}
        self.earlier_memory: dict[str, dict[str, Any]] = {}

    def resume(self, seconds: dict[str, float], memory: dict[str, dict[str, Any]]) -> None:
        """It goes on from what keeps these; of the record and all that is kept, the latest counts."""
        latest = max(seconds, self._recorded, self.earlier, key=lambda found: found.get(self.TOTAL, 0.0))
        self.earlier = self.earlier | seconds | latest
        self.earlier_memory = peaks(self.earlier_memory, memory)

    def seconds(self) -> dict[str, float]:
        """Of all sittings until now."""
        now = {name: stage.seconds for name, stage in self._meter.so_far().items()}
        now[self.TOTAL] = time.perf_counter() - self._begun
        return {name: self.earlier.get(name, 0.0) + now.get(name, 0.0) for name in {**self.earlier, **now}}

    def memory(self) -> dict[str, dict[str, Any]]:
        """Of the stages of all sittings until now."""
        return peaks(self.earlier_memory, {name: stage.memory() for name, stage in self._meter.so_far().items()})


def _recorded_seconds(held: Result) -> dict[str, float]:
    found = {name: held.train_info.get(_seconds_key(name)) for name in held.memory}
    found[Sittings.TOTAL] = held.run_info.get("total_seconds")
    return {name: seconds for name, seconds in found.items() if seconds is not None}


def peaks(one: dict[str, dict[str, Any]], other: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The memory of stages in two sittings: the higher peaks; means and percentiles of the one with the higher peak."""

    def height(memory: dict[str, Any]) -> tuple[float, float]:
        return memory.get("allocated_peak") or 0, memory.get("rss_peak") or 0

    found = one | other
    for name in one.keys() & other.keys():
        lower, higher = sorted((one[name], other[name]), key=height)
        highest = {
            key: max((said[key] for said in (lower, higher) if said.get(key) is not None), default=None)
            for key in higher
            if key.endswith("_peak")
        }
        found[name] = lower | higher | highest
    return found


def _seconds_key(stage: str) -> str:
    """Where a record has a stage's seconds. Those of the training are the sum of its steps; its stage's are more."""
    return "train_stage_seconds" if stage == "train" else f"{stage}_seconds"


class KeptEvaluations:
    """The evaluations that are done, each in a file of its own in ``folder``, until the trial has its record.

    One is used again by the same trial on the same device with the same packages, rows and way of judging.
    """

    def __init__(self, trial: Trial, folder: Path, device: torch.device, sittings: Sittings) -> None:
        self._trial, self._folder, self._device, self._sittings = trial, folder, device, sittings

    def keep(self, name: str, test: list[Example], found: dict[str, Any], *, packed: bool = False) -> None:
        """Write what the evaluation ``name`` has found; if ``packed`` without what it took, which is the pack's."""
        seconds, memory = self._sittings.seconds(), self._sittings.memory()
        if packed:
            seconds, memory = {Sittings.TOTAL: seconds[Sittings.TOTAL]}, {}
            found = {key: value for key, value in found.items() if key not in COST}
        kept = {"of": self._of(name, test), "found": found, "seconds": seconds, "memory": memory}
        record.write_json(self._file(name), kept)

    def find(self, name: str, test: list[Example]) -> dict[str, Any] | None:
        """What was kept of the evaluation; None if it was not, or of something else."""
        try:
            kept = record.read_json(self._file(name))
            if kept["of"] != self._of(name, test):
                return None
            found: dict[str, Any] = kept["found"]
            self._sittings.resume(kept["seconds"], kept["memory"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or no file of ours
            return None
        log.info("%s: taken from before the trial was cut off", name)
        return found

    def forget(self) -> None:
        """Delete all of them."""
        for file in self._folder.glob(self._file("*").name):
            file.unlink()

    def _file(self, name: str) -> Path:
        return self._folder / f"evaluated-{name}.json"

    def _of(self, name: str, test: list[Example]) -> str:
        rows = _of_rows(self._trial, name, test)
        return configuration.content_hash([self._trial.identity, _kernels(self._device), rows])


class Session:
    """A trial under way: each method is a step of it and writes what it finds into the record."""

    base: PreTrainedModel
    adapted: Model

    def __init__(
        self, trial: Trial, result: Result, meter: Meter, observer: Observer, sittings: Sittings | None = None
    ) -> None:
        self.trial, self.result, self.meter, self.observer = trial, result, meter, observer
        self.config, self.info, self.place = trial.config, result.train_info, folder(trial)
        self.sittings = sittings or Sittings(self.place, meter)
        self.kept = KeptEvaluations(trial, self.place / study.CHECKPOINTS, meter.device, self.sittings)
        self.bare: Any = None  # the untouched base, kept beside the adapted one to be timed
        self.earlier = trained(trial)
        self.profiled_steps = 0

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        self.check_claim()
        self.observer.stage(name)
        log.info("%s", name)
        with self.meter.stage(name) as own:
            yield own

    def check_claim(self) -> None:
        """Raise ``study.Claimed`` where the trial has become another process's."""
        study.check_claim(self.place.parent, self.trial.identity)

    def refuse(self) -> None:
        if reason := forecast.refusal(self.trial):
            raise Refused(reason)
        if self.config.skip_oversized and (reason := forecast.oversized(self.trial)):
            raise Oversized(reason)
        self.result.memory["start"] = before = self.meter.start()
        if (before["others"] or 0) > OCCUPIED or before["allocated"]:
            log.warning("the device is not empty: others hold %s bytes", before["others"])

    def load(self) -> None:
        build.drop_other_base(self.trial, self.meter.device)
        with self.stage("load"):
            self.tokenizer = build.load_tokenizer(self.trial)
            self.base = build.load_base(self.trial, self.tokenizer, self.meter.device, dropped=True)
            self.pad_id = int(self.tokenizer.pad_token_id)
        self.info["base_parameters"] = model.count(self.base).total
        self.info["base_bytes"] = self.base.get_memory_footprint()
        if not model.classifies(self.base):
            self.info |= probe.abilities(self.base).facts()

    def read(self) -> None:
        config, tokenizer = self.config, self.tokenizer
        with self.stage("data"):
            validated = config.train.eval_every is not None
            self.rows = rows = self.trial.rows or data.load_rows(config.dataset, validation=validated)
            self.tokens = build.training_tokens(self.trial, tokenizer, rows.train)
            build.check_tokens(tokenizer, self.base, self.tokens)
            self.tests = {name: build.test_examples(self.trial, name, rows, tokenizer) for name in config.eval}
        long_rows = rows.left_out.get("long_rows", 0) + len(rows.train) - len(self.tokens)
        self.info |= {"training_rows": len(self.tokens)} | rows.left_out | {"long_rows": long_rows}
        self.result.meta_info |= _sources(self.trial, self.base, tokenizer, rows)
        self.info["truncated_rows"] = sum(row.lost_prompt + row.lost_answer > 0 for row in self.tokens)
        self.info |= data.truncations(self.tokens)
        train.check_warmup(config.train, train.total_steps(config.train, len(self.tokens)))
        self.stop_at = self.rung_step(len(self.tokens))

    def rung_step(self, rows: int) -> int | None:
        """The step at which training on so many rows stops, for a rung; None: at its end."""
        total = train.total_steps(self.config.train, rows)
        return None if self.earlier else halving.stop_at(self.config.halving, total)

    def score_base(self) -> None:
        counts = self.seen()
        for name, test in self.tests.items():
            with self.stage("baseline"):
                scores = _base_scores(self.trial, name, test, self.base, self.tokenizer, self.place.parent)
            known = {f"base_{metric}": score for metric, score in scores.items()}
            self.result.eval_info[name] = known | {"seen_in_training": counts[name]}

    def score_base_again(self) -> None:
        """The untouched base's answers, which a trial that is done lacks; the record says what it now scores."""
        self.load()
        self.read()
        for name, test in self.tests.items():
            scores = _base_scores(self.trial, name, test, self.base, self.tokenizer, self.place.parent)
            self.result.eval_info[name] |= {f"base_{metric}": score for metric, score in scores.items()}
        del self.base

    def seen(self) -> dict[str, int | None]:
        return seen.seen(self.trial, self.rows, self.tokens, self.tests, self.tokenizer)

    def share(self, other: Session) -> None:
        """Take over what ``other``, of a trial on the same base and rows, has loaded, read and found out."""
        self.base, self.adapted = other.base, other.adapted
        self.tokenizer, self.pad_id = other.tokenizer, other.pad_id
        self.rows, self.tokens, self.tests = other.rows, other.tokens, other.tests
        self.info |= other.info
        self.result.meta_info |= other.result.meta_info
        self.stop_at = self.rung_step(len(self.tokens))
        self.result.eval_info = copy.deepcopy(other.result.eval_info) if self.stop_at is None else {}
        if self.result.eval_info and self.config.train != other.config.train:  # which may take fewer rows
            for name, count in self.seen().items():
                self.result.eval_info[name]["seen_in_training"] = count

    def adapt(self) -> None:
        """Attach the method and train it, or take an adapter that was trained before."""
        config, info, earlier = self.config, self.info, self.earlier
        if config.inference:
            self.bare = inference.bare(self.base)
        if config.adapter.path is not None:
            self._restore(study.adapter(config.adapter.path))
            total = model.count(self.adapted).total
            info |= {"trainable_parameters": 0, "total_parameters": total, "steps": 0, "train_seconds": 0.0}
        elif earlier:
            self._restore((earlier.folder or self.place) / study.ADAPTER)
            info |= earlier.train_info | {"trained_by": earlier.trial}
            info.pop("profile", None)  # which is the earlier trial's own
            self.result.memory["train"] = earlier.memory["train"]
        else:
            self._attach()
            self._train()

    def _restore(self, saved: Path) -> None:
        with self.stage("attach"):
            self.adapted = build.restore(self.trial, self.base, saved)
            self.info["coverage"] = build.coverage_of(self.adapted)

    def _attach(self) -> None:
        with self.stage("attach"):
            torch.manual_seed(self.config.seed)  # the adapter's initial weights are drawn from here on
            steps = train.total_steps(self.config.train, len(self.tokens))
            initialise = build.initialisation(self.trial, self.place, self.base, self.tokens, self.tokenizer)
            self.adapted = build.attach_method(self.trial, self.base, steps, initialise)
            self.info["coverage"] = build.coverage_of(self.adapted)

    def _train(self) -> None:
        if predicted := forecast.prediction(self.trial, self.tokens):
            self.result.memory["predicted"] = predicted.facts()
        checkpoints = self.checkpoints()
        with self.stage("train"), self.steps() as lines:
            trained = train.train(
                self.adapted,
                self.tokens,
                self.config.train,
                pad_id=self.pad_id,
                seed=self.config.seed,
                meter=self.meter,
                log=partial(self.log_step, lines),
                validate=self.validation(),
                checkpoints=checkpoints,
                stop_at=self.stop_at,
            )
        counts = model.count(self.adapted)
        self.info |= {"trainable_parameters": counts.trainable, "total_parameters": counts.total}
        self.info |= train_info(trained) | train_cost(trained)

    def checkpoints(self) -> checkpoint.Checkpoints:
        """Those of the training, which goes on from the newest one."""
        trial, since = self.trial, mended.right_since(self.trial.tree)
        trainings = [trial.training, *([trial.earlier.training] if trial.earlier else [])]
        stamps = [checkpoint.stamp(training, self.meter.device, since) for training in trainings]
        place = self.place / study.CHECKPOINTS
        found = checkpoint.Checkpoints(place, stamps[0], self.place / record.STEPS, also=stamps[1:])
        if self.rows_lost():
            found.clear()
        self.result.run_info["resumed"] = resumed = found.find()  # from this step on; 0: from the beginning
        if resumed:
            self.sittings.resume(found.earlier, found.earlier_memory)
        if found.trained is None:
            self.kept.forget()  # of other weights
        found.check = self.check_claim
        found.seconds, found.memory = self.sittings.seconds, self.sittings.memory
        return found

    def log_step(self, lines: TextIO, row: dict[str, Any]) -> None:
        """Add a row to steps.jsonl, which ``lines`` is."""
        self.check_claim()
        log_step(lines, self.observer, row)

    def rows_lost(self) -> bool:
        """Whether the steps logged until a checkpoint are damaged: then the training begins anew."""
        try:
            record.read_lines(self.place / record.STEPS, record.STEP, whole=False)
        except Unreadable as error:
            log.warning("%s; the training begins anew", error)
            return True
        return False

    def steps(self) -> TextIO:
        """The trial's steps.jsonl, to be written on."""
        file = self.place / record.STEPS
        return file.open("a", encoding="utf-8") if self.result.run_info["resumed"] else file.open("w", encoding="utf-8")

    def keep(self) -> Answers | None:
        """Time and profile the trained model; its answers to a batch, where what is saved is to be compared."""
        config = self.config
        if config.inference:
            self.time_inference()
        answers = self.answers() if config.adapter.save and config.adapter.check else None
        if config.profiler:
            self.profile()
        return answers

    def compare(self, answers: Answers | None) -> None:
        """Load what was saved, and merge it: do both answer as the trained model did?"""
        if answers is not None:
            self.check(answers)
            if self.config.adapter.merge and self.config.method:
                self.merge(answers)

    def validation(self) -> Callable[[], dict[str, float]] | None:
        """Loss on the validation rows, and the evaluations that validate, each on its validation rows."""
        trial, rows, adapted, tokenizer = self.trial, self.rows.validation, self.adapted, self.tokenizer
        if not rows:
            return None
        tokens = build.training_tokens(trial, tokenizer, rows)
        asked = {name: build.validation_examples(trial, name, self.rows, tokenizer) for name in trial.config.eval}

        def validate() -> dict[str, float]:
            adapted.eval()
            scores = {"loss": evaluate.mean_loss(adapted, tokens, pad_id=self.pad_id)}
            for name, examples in asked.items():
                if examples is None:
                    continue
                found = build.evaluator(trial, name)(adapted, tokenizer, examples).scores
                scores |= {f"{name}.{metric}": score.value for metric, score in found.items()}
            return scores

        return validate

    def judge(self) -> None:
        """What the validation says at the rung at which the trial stops; the test rows are left alone."""
        assert self.stop_at is not None
        self.result.run_info["rung"] = halving.rung(self.config.halving, self.place, self.stop_at)

    def evaluate(self) -> None:
        self.result.run_info[record.JUDGED] = evaluate.JUDGED
        for name, test in self.tests.items():
            self.result.eval_info[name] |= self.kept.find(name, test) or self._evaluate(name, test)

    def _evaluate(self, name: str, test: list[Example]) -> dict[str, Any]:
        """Scores, facts and cost; they are on the disk, for a sitting that goes on after this one was cut off."""
        with self.stage("eval") as own:
            evaluation = build.evaluator(self.trial, name)(self.adapted, self.tokenizer, test)
        self.check_claim()
        cost = {key: getattr(own, key) for key in COST}
        found: dict[str, Any] = record.plain(evaluation.scores) | evaluation.facts | cost
        record.write_lines(self.place / "predictions" / f"{name}.jsonl", evaluation.predictions)
        self.kept.keep(name, test, found, packed="packed_with" in self.result.run_info)
        return found

    def save(self) -> None:
        """Have the trained weights on the disk, if they are to be saved."""
        if not self.config.adapter.save:
            return
        with self.stage("save"):
            self.info["adapter_bytes"] = model.save(self.adapted, self.place / study.ADAPTER)

    def time_inference(self) -> None:
        saved = self.place / study.ADAPTER if self.config.adapter.save else self.config.adapter.path
        # After full fine-tuning the two are one and the same to a clock.
        variants = {"base": self.bare, "adapted": self.adapted} if self.config.method else {"base": self.adapted}
        with self.stage("inference"):
            timed = build.inference_benchmark(self.trial)(variants, self.tokenizer, saved=saved and Path(saved))
        self.bare = None
        self.result.generation_info = timed.info
        record.write_lines(self.place / "generation.jsonl", timed.runs)

    def answers(self) -> Answers:
        """A batch and the trained model's losses on it, by which what was saved is judged."""
        probe = data.collate(self.tokens[: self.config.train.batch_size], self.pad_id).to(self.meter.device)
        with torch.no_grad():
            return probe, model.answer_losses(self.adapted, probe)

    def profile(self, prepare: Callable[[], None] = lambda: None) -> None:
        """Look closely at some further steps, whose weights are thrown away.

        That this fails is a fact of the record, as the trial itself has succeeded.
        """
        with self.stage("profile"):
            try:
                prepare()
                with compiled.once():
                    found = build.profiler(self.trial)(self._further_steps, self.place / "profile", self.meter.device)
                found |= self._sizes(self.profiled_steps) if self.profiled_steps else {}
            except Exception as error:
                log.exception("the trial cannot be profiled")
                found = {"error": record.one_line(error)}
        self.info.setdefault("profile", {})[self.trial.choices["profiler"]] = found

    def _sizes(self, steps: int) -> dict[str, float]:
        """The padded tokens of a step: the median of ``steps`` typical ones, and that of the trial's own."""
        rows, config, seed = self.tokens, self.config.train, self.config.seed
        runs = train.typical_steps(rows, config, seed, steps), train.steps_of(rows, config, seed)
        few, all_of = (statistics.median(train.padded_tokens(step, rows, config) for step in run) for run in runs)
        if abs(few / all_of - 1) > UNLIKE:
            log.warning("the profiled steps have %.0f padded tokens, those of the trial %.0f (medians)", few, all_of)
        return {"step_tokens": few, "trial_step_tokens": all_of}

    def _further_steps(self, steps: int, after_step: Callable[[], None]) -> None:
        self.profiled_steps = steps
        self._steps(steps, Meter(self.meter.device), after_step)

    def _steps(self, steps: int, meter: Meter, after_step: Callable[[], None] | None = None) -> train.Trained:
        """Some more steps, of all sizes as the trial's are."""
        config = dataclasses.replace(self.config.train, steps=steps, epochs=None, keep_best=False, log_every=steps)
        return train.train(
            self.adapted,
            self.tokens,
            config,
            pad_id=self.pad_id,
            seed=self.config.seed,
            meter=meter,
            log=lambda row: None,
            after_step=after_step,
            order=train.typical_steps(self.tokens, self.config.train, self.config.seed, steps),
        )

    def resume(self) -> None:
        """The trained model of a trial that is done; where its adapter was not kept, one as large."""
        self.load()
        self.read()
        if any((self.place / study.ADAPTER).glob("*.safetensors")):
            self._restore(self.place / study.ADAPTER)
        else:
            self._attach()

    def measure(self) -> None:
        """What a step takes alone, of a trial that was trained with others: some steps of it, thrown away."""
        with self.stage("load"):
            self.base = build.load_base(self.trial, self.tokenizer, self.meter.device)
        self._attach()
        with self.stage("train"):
            trained = self._steps(MEASURED_STEPS, self.meter)
        cost = train_cost(trained)
        del cost["train_seconds"]  # that of all its steps nobody has measured
        self.info |= cost | {"measured_steps": MEASURED_STEPS}
        self.let_go()

    def let_go(self) -> None:
        del self.base, self.adapted
        self.bare = None

    def check(self, answers: Answers) -> None:
        with self.stage("reload"):
            self.info |= _reload(self.trial, self.place, self.tokenizer, *answers)

    def merge(self, answers: Answers) -> None:
        with self.stage("merge"):
            self.info |= _merge(self.trial, self.place, self.tokenizer, *answers)


# ---- its parts -------------------------------------------------------------------------------------


def _sources(
    trial: Trial, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: data.Rows
) -> dict[str, Any]:
    """What the model, the tokenizer and the rows were: the hub's commits and dates, else hashes of the content."""
    config = trial.config
    model_sha, model_created = model.commit(base), None
    if model_sha is None:
        model_sha = fingerprint.of_values(model_identity(config.model))
    else:
        model_created = fingerprint.on_hub(config.model.name_or_path, "model", model_sha)[1]
    dataset_sha, dataset_created = None, None
    if config.dataset.hub and not config.dataset.path:
        dataset_sha, dataset_created = fingerprint.on_hub(config.dataset.hub, "dataset", config.dataset.revision)
    return {
        "model_sha": model_sha,
        "model_created_at": model_created,
        "tokenizer_sha": fingerprint.tokenizer_hash(tokenizer),
        "dataset_sha": dataset_sha or fingerprint.of_values(rows.fingerprints),
        "dataset_created_at": dataset_created,
        "rows_sha": rows.fingerprints,
    }


def _base_scores(
    trial: Trial, name: str, test: list[Example], base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, root: Path
) -> dict[str, Any]:
    """The untouched base's scores and facts, and as ``predictions`` the file of its answers, relative to the study.

    Both are kept in the study under everything that changes them. The answers have the format of a trial's
    ``predictions/<eval>.jsonl``, and are written first: where scores are, answers are too.
    """
    device, config = base.device, trial.config
    of_base = {
        "model": model_identity(config.model),
        "commit": model.commit(base),
        "tokenizer": fingerprint.tokenizer_hash(tokenizer),
        "quant": config.quant,
        # A new head is drawn from the seed, for each class an output.
        "head": [config.seed, config.dataset.classes] if model.classifies(base) else None,
        **_kernels(device),
    }
    of_rows = _of_rows(trial, name, test)
    called = re.sub(r"[^\w.-]+", "_", f"{trial.choices['model']}-{trial.choices['quant']}")
    folder = root / study.BASE / f"{called}-{configuration.content_hash(of_base)}"
    scores = folder / f"{name}-{configuration.content_hash(of_rows)}.json"
    answers = scores.with_suffix(".jsonl")
    if (known := _kept_scores(scores, answers)) is None:
        for place, is_folder in ((folder.parent, True), (folder, True), (scores, False), (answers, False)):
            make_way(place, folder=is_folder)
        found = build.evaluator(trial, name)(base, tokenizer, test)
        own = {fact: value for fact, value in found.facts.items() if fact not in OF_THE_ROWS}
        known = record.plain(found.scores | own)
        record.write_lines(answers, found.predictions)
        record.write_json(scores, known | {CHECKSUM: _checksum(known, answers)})
    return known | {"predictions": answers.relative_to(root).as_posix()}


def _kernels(device: torch.device) -> dict[str, Any]:
    """What beside the weights decides the scores of a model on ``device``."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else record.processor(),
        "kernels": None if device.type == "cuda" else record.kernels(),
        "packages": record.packages() | {"lm_eval": record.package("lm_eval")},
    }


def _of_rows(trial: Trial, name: str, test: list[Example]) -> dict[str, Any]:
    """The rows of the evaluation ``name`` and how they are judged."""
    return {
        "eval": evaluation_identity(trial.config.eval[name]),
        "judged": evaluate.JUDGED,
        "examples": data.fingerprint(example._asdict() for example in test),
    }


def _kept_scores(scores: Path, answers: Path) -> dict[str, Any] | None:
    """What a base scored, from the study; None where it is not there, or not as it was written."""
    if not (os.path.lexists(scores) and os.path.lexists(answers)):
        return None
    try:
        known: dict[str, Any] = record.read_json(scores, record.SCORES)
        lines, written = record.read_predictions(answers), known.pop(CHECKSUM, None)
        if written is None and not (known and lines):  # of an earlier version
            raise Unreadable(f"{answers if known else scores}: it is empty")
        if written not in (None, _checksum(known, answers)):
            raise Unreadable(f"{scores}: not what was written")
    except Unreadable as error:
        log.warning("%s; the untouched base is scored again", error)
        return None
    return known


def _checksum(known: dict[str, Any], answers: Path) -> str:
    return fingerprint.of_values([known, hashlib.sha256(answers.read_bytes()).hexdigest()])


def _reload(
    trial: Trial, place: Path, tokenizer: PreTrainedTokenizerBase, probe: data.Batch, losses: torch.Tensor
) -> dict[str, Any]:
    """Load what was saved onto a fresh base: does it answer a batch as the trained model does?

    Of a classifier's base what its checkpoint lacks is drawn from another seed, so that it must have been saved.
    """
    try:
        other = dataclasses.replace(trial.config, seed=trial.config.seed + 1)
        base = build.load_base(dataclasses.replace(trial, config=other), tokenizer, losses.device)
        again = build.restore(trial, base, place / study.ADAPTER)
        with torch.no_grad():
            answered = model.answer_losses(again, probe)
    except Exception as error:  # whatever PEFT raises; the trial itself has succeeded
        log.exception("the saved adapter cannot be loaded")
        return {"reloads": False, "reload_error": record.one_line(error)}
    same = _same(trial, answered, losses)
    if not same:
        log.warning("the saved adapter does not answer as the trained one does; no other trial will go on from it")
    return {"reloads": same, "reload_difference": (answered - losses).abs().max().item()}


def _merge(
    trial: Trial, place: Path, tokenizer: PreTrainedTokenizerBase, probe: data.Batch, losses: torch.Tensor
) -> dict[str, Any]:
    """Write the merged model and read it back: does it answer a batch as the base with its adapter does?

    A quantised base is dequantised first, exactly. 8-bit layers also round what flows through them, so that the
    merged model is held to the adapter on the dequantised base, and its difference from the trained one is told.
    """
    folder = place / study.MERGED
    try:
        adapted = model.dequantised(build.load_base(trial, tokenizer, losses.device), place / study.ADAPTER)
        with torch.no_grad():
            expected = model.answer_losses(adapted, probe) if _rounds(trial) else losses
        written = model.merge(adapted)
        written.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        merged = model.read(folder, written)
        with torch.no_grad():
            found = model.answer_losses(merged, probe)
    except model.NotMergeable as error:
        log.warning("adapter.merge=true: %s", error)
        return {"merges": False, "merge_error": str(error)}
    except Exception as error:  # whatever PEFT raises; the trial itself has succeeded
        log.exception("the adapter cannot be merged")
        shutil.rmtree(folder, ignore_errors=True)
        return {"merges": False, "merge_error": record.one_line(error)}
    merges = _same(trial, found, expected, MERGE_TOLERANCE)
    if not merges:
        log.warning("the merged model does not answer as the trained one does: %s is taken away", folder)
        shutil.rmtree(folder, ignore_errors=True)
    return {"merges": merges, "merge_difference": (found - losses).abs().max().item()}


def _rounds(trial: Trial) -> bool:
    """Whether the base's layers round their inputs, as 8-bit ones do."""
    return bool(trial.config.quant.get("load_in_8bit"))


def _same(trial: Trial, found: torch.Tensor, expected: torch.Tensor, exact: float = RELOAD_TOLERANCE) -> bool:
    """Whether losses of answer tokens are equal but for rounding: by less than ``exact`` on a base of 32 bits."""
    differences = (found - expected).abs()
    if trial.config.model.dtype is Dtype.float32:
        return differences.max().item() < exact
    return differences.mean().item() < NARROW_TOLERANCE


def log_step(lines: Any, observer: Observer, row: dict[str, Any]) -> None:
    """A row of steps.jsonl, which ``lines`` is, on the disk and told to ``observer``."""
    lines.write(record.line(row))
    persistently(lines.flush)  # what was not written stays in its buffer
    observer.step(row)


def train_info(trained: train.Trained) -> dict[str, Any]:
    """What the training did, for the record."""
    return {
        "steps": trained.steps,
        "epochs": trained.epochs,
        "tokens": trained.tokens,
        "padding_fraction": trained.padding_fraction,
        "final_loss": trained.final_loss,
        "best_loss": trained.best_loss,
        "best_step": trained.best_step,
        **trained.compilation,
    }


def train_cost(trained: train.Trained) -> dict[str, Any]:
    """What the training took, for the record; of steps taken together with other trials, where none's own stands."""
    seconds = sum(trained.step_seconds)
    cost = {
        "train_seconds": seconds,
        "tokens_per_second": trained.tokens / seconds if seconds else None,
        **{f"step_seconds_p{p}": percentile(trained.steady_seconds, p) for p in (50, 95, 99)},
    }
    shared = {"lanes": max(trained.lanes, default=1), "share_seconds": trained.share_seconds}
    return {"packed": shared | cost} if trained.packed else cost


# ---- the record ------------------------------------------------------------------------------------


def begin(trial: Trial, place: Path) -> Result:
    """An empty folder but for the composed configuration, as Hydra writes it, and the record to be filled."""
    for name in ("", ".hydra", "predictions", study.ADAPTER, study.MERGED, study.CHECKPOINTS):
        make_way(place / name, folder=True)
    place.mkdir(parents=True, exist_ok=True)
    for name in (record.RESULT, record.STEPS, "generation.jsonl", "trial.log", *_words(trial)):
        make_way(place / name)
    for folder in ("predictions", study.ADAPTER, study.MERGED):
        for file in list((place / folder).glob("*.*")):
            make_way(file)
    (place / record.RESULT).unlink(missing_ok=True)  # of a failed try
    remove_partials(place, own=True)
    if trial.config.force:
        shutil.rmtree(place / study.CHECKPOINTS, ignore_errors=True)
    for name, text in _words(trial).items():
        record.write_text(place / name, text)
    on_gpu = model.device(trial.config.device).type == "cuda"
    about = record.environment(gpus=on_gpu)
    return Result(run_info(trial, place), trial.choices, trial.tree, meta_info=about)


def _words(trial: Trial) -> dict[str, str]:
    """The files that Hydra would write: the composed configuration and the words of the command line."""
    tree, words = OmegaConf.to_yaml(as_text(trial.tree)), OmegaConf.to_yaml(trial.overrides)
    return {".hydra/config.yaml": tree, ".hydra/overrides.yaml": words}


def _mend_words(trial: Trial, place: Path) -> None:
    """Write those of these files again that are there and damaged."""
    for name, shape in ((".hydra/config.yaml", dict), (".hydra/overrides.yaml", [str])):
        try:
            if os.path.lexists(place / name):
                read_yaml(place / name, shape)
        except Unreadable:
            make_way(place / name)
            record.write_text(place / name, _words(trial)[name])


def run_info(trial: Trial, place: Path) -> dict[str, Any]:
    """What a record says of the run of a trial in the folder ``place``, as far as it is known at the beginning."""
    return {
        "trial": place.name,
        "labels": [trial.label],
        "study": trial.config.study,
        "identity": trial.identity,
        "identity_rule": configuration.IDENTITY_RULE,
        "training": trial.training,
        "created_at": record.now(),
        "host": record.host(),
        **record.git(),
        **({"experiment": trial.experiment} if trial.experiment else {}),
    }


def planned(trial: Trial, foreseen: dict[str, Any]) -> Result:
    """A record of a trial that is only planned, with the sizes that are ``foreseen``; it is not written."""
    known = run_info(trial, folder(trial)) | {"status": Status.planned.value, "error": None}
    return Result(known, trial.choices, trial.tree, train_info=foreseen)


def end(
    result: Result,
    place: Path,
    meter: Meter,
    start: float,
    status: Status,
    failure: dict[str, str] | None,
    tracker: Tracker,
    sittings: Sittings,
) -> None:
    """Complete the record, write it, and leave the folder as a trial that has ended leaves it."""
    study.check_claim(place.parent, result.run_info["identity"])
    before = sittings.earlier
    now = time.perf_counter() - start
    result.run_info |= {"status": status.value, "error": failure, "sitting_seconds": now}
    result.run_info["total_seconds"] = now + before.get(Sittings.TOTAL, 0.0)
    result.train_info = (_so_far(place) if status is not Status.success else {}) | result.train_info
    for name in dict.fromkeys([*meter.stages, *before]):
        if name != Sittings.TOTAL:
            seconds = meter.stages[name].seconds if name in meter.stages else 0.0
            result.train_info[_seconds_key(name)] = seconds + before.get(name, 0.0)
    now_held = {name: stage.memory() for name, stage in meter.stages.items()}
    result.memory |= peaks(sittings.earlier_memory, now_held)
    result.run_info["warnings"] = result.cautions()
    for caution in result.run_info["warnings"]:
        log.warning(caution)
    result.write(place)
    if status is Status.success:
        shutil.rmtree(place / study.CHECKPOINTS, ignore_errors=True)
        if result.config["adapter"]["save"] and result.train_info.get("reloads", True):
            study.mark_trained(result)
    scores = {name: _without_histograms(found) for name, found in result.eval_info.items()}
    tracker.end(record.flat(record.plain({"train": result.train_info, "eval": scores})), status.value)


def _without_histograms(facts: dict[str, Any]) -> dict[str, Any]:
    """Their keys are answers, which are no names that a tracker takes."""
    return {name: fact for name, fact in facts.items() if not name.endswith("histogram")}


@contextmanager
def logged(*files: Path) -> Iterator[None]:
    """All logging and warnings of the block go to ``files``, and only there."""
    for name in ("transformers", "huggingface_hub", "datasets"):  # each prints to stderr by a handler of its own
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    transformers.utils.logging.disable_progress_bar()
    logging.captureWarnings(True)
    own: list[logging.Handler] = [logging.FileHandler(file, mode="w", encoding="utf-8") for file in files]
    for handler in own:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    root.handlers = own
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.handlers = handlers
        root.setLevel(level)
        logging.captureWarnings(False)
        for handler in own:
            handler.close()
