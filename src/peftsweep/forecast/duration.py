"""How long a trial will take on this device: to load, to train, to evaluate, to save.

The operations of one micro-batch of the mean size are found on the meta device (trace.py) and their seconds from the
device's measured speed (speed.py): a run's batches differ in size, but the seconds of a step are nearly linear in its
tokens, so that those of the mean are the mean of those of all. Records of the same device correct it (history.py).
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from peftsweep.config import build, identity
from peftsweep.config.compose import Trial
from peftsweep.data.tokens import Tokens
from peftsweep.forecast import forecast
from peftsweep.forecast.history import KINDS, NORMAL_90, History
from peftsweep.forecast.speed import Device
from peftsweep.forecast.work import Asked, Batches, Traced, evaluations, number_of_steps, once, run_of, step_key, trace
from peftsweep.models import model as models_model
from peftsweep.training.capture import WARM, captures

# One standard deviation of the logarithm of a prediction that no record corrects: that of training as
# benchmarks/time_prediction.py finds it, the others as what they rest on is only guessed.
SPREADS = {"load": 0.5, "train": 0.18, "evaluate": 0.35, "save": 0.5}
ESTIMATED_SPREAD = 0.3  # of the part of a step whose operations were not timed
FIRST_SECONDS, NEXT_SECONDS = 4.0, 1.0  # for which operations are timed: of the first trial of a model, of others
# Of loading, attaching and saving, until records say more (measured on two cores with the embedded model): of what a
# trial begins with, of the files of an adapter, of each tensor of a base.
SETUP_SECONDS, FILES_SECONDS, TENSOR_SECONDS = 0.3, 0.02, 0.002
LOAD_RATE, QUANTISE_RATE, SAVE_RATE = 1e9, 2e8, 5e8  # bytes/s that are read, quantised, written
# Micro-batches of a captured run that take as long as without graphs: of each of some 14 lengths those before it is
# captured, and what capturing takes.
USUAL_BATCHES = 14 * (WARM + 3)
NOT_ASKED = "not asked for"
MOST_SECONDS = 10.0  # for which a process times operations, but for those of the first trial of a model
_SPENT = [0.0]
_MODELS: set[str] = set()  # of which a trial was predicted


@dataclass(frozen=True)
class Span:
    """Seconds that are expected, and the interval that holds the truth in 90 of 100 cases."""

    seconds: float
    low: float
    high: float

    def __add__(self, other: Span) -> Span:
        """One after the other; errors are taken to go the same way, as one cause (a busy machine) makes most."""
        return Span(self.seconds + other.seconds, self.low + other.low, self.high + other.high)

    def times(self, factor: float) -> Span:
        """So many times as long."""
        return Span(self.seconds * factor, self.low * factor, self.high * factor)

    @classmethod
    def around(cls, seconds: float, spread: float) -> Span:
        """``spread`` is one standard deviation of the logarithm."""
        width = math.exp(NORMAL_90 * spread)
        return cls(seconds, seconds / width, seconds * width)


NOTHING = Span(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Estimate:
    """The seconds of a trial, by kind; of a kind that nobody can say anything of, None, and why."""

    spans: Mapping[str, Span | None] = field(default_factory=dict)
    uncorrected: Mapping[str, float] = field(default_factory=dict)  # by kind, without what records say
    baseline: Span = NOTHING  # of evaluate: that of the untouched base, which the study keeps
    flops: int | None = None  # of the matrix products of the whole training
    flops_by_dtype: Mapping[str, float] = field(default_factory=dict)
    shape: str | None = None  # the same for trainings whose steps take the same time
    decided_by: str = "speed"  # what says the seconds of training: speed, records, or the same shape
    unknown: Mapping[str, str] = field(default_factory=dict)  # by kind, why nothing is said

    @property
    def total(self) -> Span | None:
        """Of the whole trial; None where one of its parts is not known."""
        found = NOTHING
        for kind in KINDS:
            span = self.spans.get(kind)
            if span is None:
                return None
            found += span
        return found

    @property
    def why(self) -> str | None:
        """Why there is no total."""
        return "; ".join(dict.fromkeys(self.unknown.values())) or None

    def facts(self) -> dict[str, Any]:
        """For a trial's record: ``train_info.predicted``."""
        found: dict[str, Any] = {"decided_by": self.decided_by}
        total = {"total": self.total} if self.total else {}
        for kind, span in (dict(self.spans) | total).items():
            if span is not None:
                found |= {f"{kind}_seconds": span.seconds}
                found |= {f"{kind}_seconds_low": span.low, f"{kind}_seconds_high": span.high}
        return found | {f"uncorrected_{kind}_seconds": seconds for kind, seconds in self.uncorrected.items()}


def with_evaluations(found: Estimate, span: Span, share: float) -> Estimate:
    """The same with a ``share`` of the seconds ``span`` of its evaluations, corrected and not.

    Both, as records compare what was predicted before correction with what was measured.
    """
    uncorrected = dict(found.uncorrected)
    if "evaluate" in uncorrected:
        uncorrected["evaluate"] *= share
    return replace(found, spans=dict(found.spans) | {"evaluate": span.times(share)}, uncorrected=uncorrected)


def seconds(trial: Trial, device: Device | None = None, history: History | None = None) -> Span | None:
    """The seconds of a trial with their 90% interval; None where they cannot be said."""
    return estimate(trial, device or Device(models_model.device(trial.config.device)), history).total


def estimate(
    trial: Trial,
    device: Device,
    history: History | None = None,
    tokens: Sequence[Tokens] | None = None,
    *,
    probe: bool = True,
    timed: bool = True,
    judged: bool = True,
) -> Estimate:
    """What a trial will take on ``device``; without ``timed`` only its FLOPs, without ``judged`` no evaluations.

    Operations that were never timed are timed now, unless ``probe`` is false. ``tokens`` are its training rows, where
    they have been read.
    """
    history = history or History()
    if reason := forecast.refusal(trial):
        return _unknown(f"refused: {reason}")
    where = device.device.type
    run, missing, asked, unasked, traced = operations(trial, where, tokens, judged=timed and judged)
    if traced is None:
        return _unknown("its method cannot be attached without numbers, so that its operations are not known")
    shape = identity.content_hash([step_key(trial, run, where)]) if run else None
    found = Estimate(shape=shape)
    if run and traced.step:
        by_dtype = Counter[str]()
        for dtype, count in traced.step.ledger.flops_by_dtype.items():
            by_dtype[str(dtype).removeprefix("torch.")] += round(count * run.count * run.scale)
        found = replace(found, flops=sum(by_dtype.values()), flops_by_dtype=dict(by_dtype))
        if uncounted := traced.step.ledger.uncounted:
            found = replace(found, flops=None, flops_by_dtype={})
            missing = missing or f"no formula for the FLOPs of {', '.join(uncounted)}"
    if not timed:
        return found
    return _timed(trial, device, history, found, run, traced, asked, missing, unasked, probe=probe)


def operations(
    trial: Trial, where: str, tokens: Sequence[Tokens] | None = None, *, judged: bool = True
) -> tuple[Batches | None, str | None, dict[str, Asked], str | None, Traced | None]:
    """A trial's micro-batches, or why they are not known; the same of its evaluations; the operations of both.

    ``where`` is a device's type. Without ``judged`` the evaluations are left out.
    """
    tokenizer = build.load_tokenizer(trial) if models_model.is_local(trial.config.model) else None
    run, missing = run_of(trial, tokenizer, tokens)
    asked, unasked = evaluations(trial, tokenizer) if judged else ({}, NOT_ASKED)
    return run, missing, asked, unasked, trace(trial, run, list(asked.values()), where)


def _unknown(why: str) -> Estimate:
    return Estimate(unknown=dict.fromkeys(KINDS, why))


# ---- seconds -----------------------------------------------------------------------------------------


def _timed(
    trial: Trial,
    device: Device,
    history: History,
    found: Estimate,
    run: Batches | None,
    traced: Traced,
    asked: Mapping[str, Asked],
    missing: str | None,
    unasked: str | None,
    *,
    probe: bool,
) -> Estimate:
    model = identity.content_hash([forecast._of_the_model(trial)])
    begun = time.perf_counter()
    may_take = max(0.0, min(NEXT_SECONDS, MOST_SECONDS - _SPENT[0])) if model in _MODELS else FIRST_SECONDS
    until = begun + may_take if probe else 0.0
    _MODELS.add(model)
    spans: dict[str, Span | None] = dict.fromkeys(KINDS)
    raw: dict[str, float] = {}
    unknown: dict[str, str] = {}
    decided = "speed"
    config = trial.config.train

    def corrected(kind: str, took: float, spread: float) -> Span:
        raw[kind] = took
        correction = history.correction(kind)
        if correction is None:
            return Span.around(took, spread)
        return Span.around(took * correction.factor, math.hypot(correction.spread, spread - SPREADS[kind]))

    steps = number_of_steps(trial, run)
    same = history.step(found.shape) if found.shape else None
    if steps == 0:
        spans["train"] = NOTHING
    elif same is not None and steps is not None:
        spans["train"], decided = Span.around(steps * same.factor, same.spread), "the same shape"
    elif missing or run is None or traced.step is None or steps is None:
        unknown["train"] = missing or "its operations are not known"
    elif config.compile != "none":
        unknown["train"] = f"train.compile={config.compile}: compiled steps are predicted from records alone"
    else:
        took, share = device.step(traced.step.ledger, until)
        replayed = max(run.count - USUAL_BATCHES, 0.0) if captures(config, device.device) else 0.0
        replay = device.step(traced.step.ledger, until, captured=True)[0] if replayed else 0.0
        took = (took * (run.count - replayed) + replay * replayed) * run.scale
        took += device.update(traced.step.trained, config) * steps
        spread = SPREADS["train"] + share * ESTIMATED_SPREAD + ESTIMATED_SPREAD * traced.step_alike
        spans["train"] = corrected("train", took, spread)
        decided = "records" if history.correction("train") else "speed"
    spans["load"] = corrected("load", _loading(trial), SPREADS["load"])
    spans["save"] = corrected("save", _saving(trial), SPREADS["save"])
    if unasked:
        unknown["evaluate"] = unasked
    else:
        spans["evaluate"], baseline = _evaluating(device, traced, asked, until, corrected)
        found = replace(found, baseline=baseline)
    if probe:
        _SPENT[0] += time.perf_counter() - begun
        device.write()
    return replace(found, spans=spans, uncorrected=raw, unknown=unknown, decided_by=decided)


def _evaluating(
    device: Device,
    traced: Traced,
    asked: Mapping[str, Asked],
    until: float,
    corrected: Callable[[str, float, float], Span],
) -> tuple[Span, Span]:
    """Of all evaluations, of the untouched base and of the trained model, validations too; of the untouched base alone.

    A trained model is taken to write what is asked for and to end, an untouched one to go on to the last token.
    """
    low = high = trained = base = 0.0
    for one in asked.values():
        read, token = traced.asked[one.key]
        forward = device.step(read, until)[0] * one.read.count * one.read.scale
        decode = device.step(token, until)[0] * one.read.count if token else 0.0
        least, most = (forward + decode * count for count in one.tokens)
        trained, base = trained + one.of_trained * least, base + one.of_base * most
        times = one.of_base + one.of_trained
        low, high = low + times * least, high + times * most
    both = trained + base
    span = corrected("evaluate", both, SPREADS["evaluate"] + ESTIMATED_SPREAD * traced.asked_alike)
    factor = span.seconds / both if both else 1.0
    within = Span(span.seconds, min(span.low, low * factor), max(span.high, high * factor))
    return within, within.times(base / both if both else 0.0)


def _weights(trial: Trial) -> tuple[int, int]:
    """Tensors and bytes of the base as it is stored on the disk."""

    def count() -> tuple[int, int]:
        tensors = list(
            models_model.skeleton(trial.config.model, classes=len(trial.config.dataset.classes)).parameters()
        )
        return len(tensors), sum(one.numel() * one.element_size() for one in tensors)

    return once(["weights", forecast._of_the_model(trial)], count)


def _reading(trial: Trial) -> float:
    """Of a base, as it is read from the disk and quantised."""
    count, size = _weights(trial)
    return TENSOR_SECONDS * count + size / LOAD_RATE + (size / QUANTISE_RATE if trial.config.quant else 0.0)


def _loading(trial: Trial) -> float:
    """Of the beginning of a trial: its base is read, and a method attached to its tensors."""
    return SETUP_SECONDS + _reading(trial) + TENSOR_SECONDS * _weights(trial)[0]


def _saving(trial: Trial) -> float:
    """Of the adapter, of its reading back onto a fresh base, and of the merged model, which is read back too."""
    config, foreseen = trial.config.adapter, forecast.check(trial)
    if not config.save or config.path is not None:
        return 0.0
    written = FILES_SECONDS + (foreseen.adapter_bytes or 0) / SAVE_RATE
    again = _reading(trial) if config.check else 0.0
    return written + again + (2 * _reading(trial) + _weights(trial)[1] / SAVE_RATE if config.merge else 0.0)
