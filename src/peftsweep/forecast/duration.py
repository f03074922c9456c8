"""Predict the seconds of a trial on this device: to load, to train, to evaluate, to save.

The meta device gives the operations of one micro-batch of mean size (trace.py), and the measured speed of the device
gives their seconds (speed.py). The batches of a run differ in size, but the seconds of a step are nearly linear in its
tokens, so that a batch of mean size takes the mean seconds. Records of the same device correct the prediction
(history.py).
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from peftsweep.config import build, identity
from peftsweep.config.compose import Trial
from peftsweep.data.tokens import Tokens
from peftsweep.evaluation.static_decoding import MIN_NEW_TOKENS
from peftsweep.forecast import forecast
from peftsweep.forecast.history import KINDS, NORMAL_90, History
from peftsweep.forecast.operations import Ledger
from peftsweep.forecast.speed import Device
from peftsweep.forecast.work import (
    Batches,
    EvaluationWork,
    Traced,
    evaluations,
    number_of_steps,
    once,
    run_of,
    step_key,
    trace,
)
from peftsweep.models import model as models_model
from peftsweep.training.capture import captures
from peftsweep.training.graphs import WARMUP_PASSES

# Standard deviation of the logarithm of a prediction without records. That of training was measured by
# benchmarks/time_prediction.py; the others are larger, because their constants below are rough.
SPREADS = {"load": 0.5, "train": 0.18, "evaluate": 0.35, "save": 0.5}
ESTIMATED_SPREAD = 0.3  # the same for the part of a step whose operations were not timed
CROWDED_SPREAD = 0.3  # the same for trials that run at the same time on a device, without a record of such trials
# Limits of timing operations: for the first trial of a model, the first in another dtype or with another attention
# (whose operations are others), and for the rest.
FIRST_SECONDS, VARIANT_SECONDS, NEXT_SECONDS = 4.0, 2.4, 1.0
# Seconds without records, measured on two cores with the embedded model: for the start of a trial, for the files of an
# adapter, for each tensor of a base.
SETUP_SECONDS, FILES_SECONDS, TENSOR_SECONDS = 0.3, 0.02, 0.002
LOAD_RATE, QUANTISE_RATE, SAVE_RATE = 1e9, 2e8, 5e8  # bytes/s that are read, quantised, written
# Micro-batches of a captured run that take as long as without graphs: for each of about 14 lengths, the passes before
# the capture, and three more for the seconds of the capture.
UNCAPTURED_BATCHES = 14 * (WARMUP_PASSES + 3)
# The same of the decoding steps of an evaluation, with the passes that check the static cache.
UNCAPTURED_STEPS = WARMUP_PASSES + 7
NOT_WANTED = "its evaluations are left out"
MOST_SECONDS = 10.0  # limit of timing operations in a process, without the first trials of models
VARIANTS = ("dtype", "attn_implementation")  # settings by which one model has variants
_SPENT = [0.0]
_MODELS: set[str] = set()  # models, and their variants, for which a trial was predicted in this process


@dataclass(frozen=True)
class Span:
    """Expected seconds, with the interval that contains the true value in 90% of cases."""

    seconds: float
    low: float
    high: float

    def __add__(self, other: Span) -> Span:
        """The seconds of both, one after the other; their errors are assumed to have one cause, a busy machine."""
        return Span(self.seconds + other.seconds, self.low + other.low, self.high + other.high)

    def times(self, factor: float) -> Span:
        """``factor`` times as long."""
        return Span(self.seconds * factor, self.low * factor, self.high * factor)

    @classmethod
    def around(cls, seconds: float, spread: float) -> Span:
        """The span of ``seconds`` whose logarithm has the standard deviation ``spread``."""
        width = math.exp(NORMAL_90 * spread)
        return cls(seconds, seconds / width, seconds * width)


NOTHING = Span(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Estimate:
    """The predicted seconds of a trial by kind (load, train, evaluate, save); None for a kind that is unknown."""

    spans: Mapping[str, Span | None] = field(default_factory=dict)
    uncorrected: Mapping[str, float] = field(default_factory=dict)  # by kind: the seconds before records correct them
    baseline: Span = NOTHING  # the part of evaluate for the untouched base, whose scores the study keeps
    flops: int | None = None  # of the matrix products of the whole training; None if they were not counted
    flops_by_dtype: Mapping[str, float] = field(default_factory=dict)
    shape: str | None = None  # a hash that is equal for trainings whose steps take the same time
    decided_by: str = "speed"  # the source of the seconds of training: speed, records, or the same shape
    unknown: Mapping[str, str] = field(default_factory=dict)  # by kind: why its seconds are unknown

    @property
    def total(self) -> Span | None:
        """The seconds of the whole trial; None where one of its parts is unknown."""
        total = NOTHING
        for kind in KINDS:
            span = self.spans.get(kind)
            if span is None:
                return None
            total += span
        return total

    @property
    def why(self) -> str | None:
        """Why there is no total; None where there is one."""
        return "; ".join(dict.fromkeys(self.unknown.values())) or None

    def facts(self) -> dict[str, Any]:
        """The prediction for a trial's record, ``train_info.predicted``, in seconds."""
        values: dict[str, Any] = {"decided_by": self.decided_by}
        total = {"total": self.total} if self.total else {}
        for kind, span in (dict(self.spans) | total).items():
            if span is not None:
                values |= {f"{kind}_seconds": span.seconds}
                values |= {f"{kind}_seconds_low": span.low, f"{kind}_seconds_high": span.high}
        return values | {f"uncorrected_{kind}_seconds": seconds for kind, seconds in self.uncorrected.items()}


def with_evaluations(estimate: Estimate, span: Span, share: float) -> Estimate:
    """The estimate with only a ``share`` of the seconds ``span`` of its evaluations.

    The uncorrected seconds are reduced, too, because records compare these with the measured seconds.
    """
    uncorrected = dict(estimate.uncorrected)
    if "evaluate" in uncorrected:
        uncorrected["evaluate"] *= share
    return replace(estimate, spans=dict(estimate.spans) | {"evaluate": span.times(share)}, uncorrected=uncorrected)


def seconds(trial: Trial, device: Device | None = None, history: History | None = None) -> Span | None:
    """The predicted seconds of a trial with their 90% interval; None where a part of them is unknown."""
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
    """Predict the seconds of a trial on ``device``.

    Args:
        trial: the trial.
        device: the device, with its measured speed.
        history: records that correct the prediction.
        tokens: the training rows, if they have been read already.
        probe: whether operations that were never timed are timed now. Without it, as in a running trial, the
            operations are always the trial's own, never those of a similar one.
        timed: False predicts the FLOPs of the training alone.
        judged: False leaves out the evaluations.
    """
    history = history or History()
    if reason := forecast.refusal(trial):
        return _unknown(f"refused: {reason}")
    where = device.device.type
    run, no_training, work_by_name, no_evaluations, traced = operations(
        trial, where, tokens, judged=timed and judged, own=not probe
    )
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
            no_training = no_training or f"no formula for the FLOPs of {', '.join(uncounted)}"
        if uncounted or traced.step_from_similar:
            found = replace(found, flops=None, flops_by_dtype={})
    if not timed:
        return found
    return _timed(trial, device, history, found, run, traced, work_by_name, no_training, no_evaluations, probe=probe)


def operations(
    trial: Trial, where: str, tokens: Sequence[Tokens] | None = None, *, judged: bool = True, own: bool = False
) -> tuple[Batches | None, str | None, dict[str, EvaluationWork], str | None, Traced | None]:
    """The work of a trial: micro-batches, why they are unknown, evaluations, why they are unknown, operations.

    ``where`` is the type of the device. Without ``judged`` the evaluations are left out, and without ``own`` the
    operations may be those of a similar trial.
    """
    tokenizer = build.load_tokenizer(trial) if models_model.is_local(trial.config.model) else None
    run, no_training = run_of(trial, tokenizer, tokens)
    work_by_name, no_evaluations = evaluations(trial, tokenizer) if judged else ({}, NOT_WANTED)
    traced = trace(trial, run, list(work_by_name.values()), where, own=own)
    return run, no_training, work_by_name, no_evaluations, traced


def _unknown(why: str) -> Estimate:
    return Estimate(unknown=dict.fromkeys(KINDS, why))


# ---- seconds -----------------------------------------------------------------------------------------


def _timed(
    trial: Trial,
    device: Device,
    history: History,
    estimate: Estimate,
    run: Batches | None,
    traced: Traced,
    work_by_name: Mapping[str, EvaluationWork],
    no_training: str | None,
    no_evaluations: str | None,
    *,
    probe: bool,
) -> Estimate:
    settings = identity.model_identity(trial.config.model)
    variant = identity.content_hash(settings)
    model = identity.content_hash({key: value for key, value in settings.items() if key not in VARIANTS})
    begun = time.perf_counter()
    first = variant not in _MODELS
    may_take = max(0.0, min(NEXT_SECONDS, MOST_SECONDS - _SPENT[0]))
    if first:
        may_take = VARIANT_SECONDS if model in _MODELS else FIRST_SECONDS
    until = begun + may_take if probe else 0.0
    _MODELS.update((model, variant))
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

    crowded = CROWDED_SPREAD if device.at_once > 1 and device.at_once != history.at_once else 0.0
    steps = number_of_steps(trial, run)
    same = history.training(estimate.shape, round(steps)) if estimate.shape and steps else None
    if steps == 0:
        spans["train"] = NOTHING
    elif same is not None:
        spans["train"], decided = Span.around(same.factor, same.spread), "the same shape"
    elif no_training or run is None or traced.step is None or steps is None:
        unknown["train"] = no_training or "its operations are not known"
    elif config.compile != "none":
        unknown["train"] = f"train.compile={config.compile}: compiled steps are predicted from records alone"
    else:
        took, share = device.step(traced.step.ledger, until)
        captured = captures(config, device.device) and traced.never_captured is None
        replayed = max(run.count - UNCAPTURED_BATCHES, 0.0) if captured else 0.0
        replay = device.step(traced.step.ledger, until, captured=True)[0] if replayed else 0.0
        took = (took * (run.count - replayed) + replay * replayed) * run.scale
        took += device.update(traced.step.trained, config) * steps
        spread = SPREADS["train"] + share * ESTIMATED_SPREAD + ESTIMATED_SPREAD * traced.step_from_similar + crowded
        spans["train"] = corrected("train", took, spread)
        decided = "records" if history.correction("train") else "speed"
    spans["load"] = corrected("load", _loading(trial), SPREADS["load"])
    spans["save"] = corrected("save", _saving(trial), SPREADS["save"])
    if no_evaluations:
        unknown["evaluate"] = no_evaluations
    else:
        captured = captures(replace(config, compile="none"), device.device) and traced.decodes_captured
        spread = SPREADS["evaluate"] + ESTIMATED_SPREAD * traced.evaluations_from_similar + crowded
        spans["evaluate"], baseline = _evaluating(
            device, traced, work_by_name, until, partial(corrected, "evaluate", spread=spread), captured=captured
        )
        estimate = replace(estimate, baseline=baseline)
    if probe:
        _SPENT[0] += 0.0 if first else time.perf_counter() - begun
        device.write()
    return replace(estimate, spans=spans, uncorrected=raw, unknown=unknown, decided_by=decided)


def _evaluating(
    device: Device,
    traced: Traced,
    work_by_name: Mapping[str, EvaluationWork],
    until: float,
    corrected: Callable[[float], Span],
    *,
    captured: bool,
) -> tuple[Span, Span]:
    """The seconds of all evaluations and validations, and the part of them for the untouched base.

    ``captured``: decoding steps are captured as CUDA graphs.

    A trained model is assumed to end its text after as many tokens as the answers have, an untouched one to write
    ``max_new_tokens``.
    """
    low = high = trained = base = 0.0
    for work in work_by_name.values():
        read, token = traced.evaluations[work.key]
        forward = device.step(read, until)[0] * work.read.count * work.read.scale
        graphs = captured and work.tokens[1] >= MIN_NEW_TOKENS
        least, most = (forward + _decoding(device, token, until, work.read.count * n, graphs) for n in work.tokens)
        trained, base = trained + work.of_trained * least, base + work.of_base * most
        times = work.of_base + work.of_trained
        low, high = low + times * least, high + times * most
    both = trained + base
    span = corrected(both)
    factor = span.seconds / both if both else 1.0
    clipped = Span(span.seconds, min(span.low, low * factor), max(span.high, high * factor))
    return clipped, clipped.times(base / both if both else 0.0)


def _decoding(device: Device, token: Ledger | None, until: float, steps: float, captured: bool) -> float:
    """The seconds of decoding steps with the operations ``token``."""
    if token is None:
        return 0.0
    replayed = max(steps - UNCAPTURED_STEPS, 0.0) if captured else 0.0
    replay = device.step(token, until, captured=True)[0] if replayed else 0.0
    return device.step(token, until)[0] * (steps - replayed) + replay * replayed


def _weights(trial: Trial) -> tuple[int, int]:
    """The number of tensors of the base, and their bytes on the disk."""

    def count() -> tuple[int, int]:
        tensors = list(
            models_model.skeleton(trial.config.model, classes=len(trial.config.dataset.classes)).parameters()
        )
        return len(tensors), sum(one.numel() * one.element_size() for one in tensors)

    return once(["weights", identity.model_key(trial)], count)


def _reading(trial: Trial) -> float:
    """The seconds to read the base from the disk and to quantise it."""
    count, size = _weights(trial)
    return TENSOR_SECONDS * count + size / LOAD_RATE + (size / QUANTISE_RATE if trial.config.quant else 0.0)


def _loading(trial: Trial) -> float:
    """The seconds until training: the base is read, and the method is attached to its tensors."""
    return SETUP_SECONDS + _reading(trial) + TENSOR_SECONDS * _weights(trial)[0]


def _saving(trial: Trial) -> float:
    """The seconds to save the adapter, to load it onto a fresh base for the check, and to merge, save and check."""
    config, foreseen = trial.config.adapter, forecast.check(trial)
    if not config.save or config.path is not None:
        return 0.0
    written = FILES_SECONDS + (foreseen.adapter_bytes or 0) / SAVE_RATE
    again = _reading(trial) if config.check else 0.0
    return written + again + (2 * _reading(trial) + _weights(trial)[1] / SAVE_RATE if config.merge else 0.0)
