"""The measured seconds of a device in records: the errors of predictions, and the seconds of the same step."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftsweep.errors import InputError, suggest
from peftsweep.study import store
from peftsweep.study.record import RESULT, RecordError, Result, Status
from peftsweep.study.sweep_record import AT_ONCE_KEY

KINDS = ("load", "train", "evaluate", "save")  # parts of a trial, whose seconds are predicted
STAGES = {  # the stages of a record that belong to each kind; the seconds of train are those of its steps
    "load": ("setup", "load", "data", "attach"),
    "evaluate": ("baseline", "validate", "eval"),
    "save": ("save", "reload", "merge"),
}
MOST_READ = 2_000  # most records of a study that are read
LEAST_SPREAD = 0.04  # standard deviation of the logarithm between runs of the same trial
NORMAL_90 = 1.645  # within so many standard deviations lie 90% of a normal distribution
SECTION, DEVICE, SHAPE = "time", "device", "shape"  # of meta_info: what the seconds depend on


@dataclass(frozen=True)
class Correction:
    """The factor of a prediction, and the standard deviation of the logarithm of its error afterwards."""

    factor: float
    spread: float
    records: int


@dataclass(frozen=True)
class Steps:
    """The measured seconds of a training's steps, and of each step beyond those with which it began.

    Where steps are captured as CUDA graphs, the first ones of each length take many times as long as the others.
    """

    seconds: float
    count: int
    each: float

    @classmethod
    def alike(cls, each: float, count: int = 1) -> Steps:
        """Steps that take the same time."""
        return cls(each * count, count, each)

    def of(self, count: int) -> float:
        """The seconds of ``count`` steps."""
        beginning = max(self.seconds - self.each * self.count, 0.0)
        return self.each * count + beginning * min(1.0, count / self.count)


@dataclass
class History:
    """The measured seconds of one device, from records."""

    ratios: dict[str, list[float]] = field(default_factory=dict)  # by kind: log(measured / predicted seconds)
    steps: dict[str, list[Steps]] = field(default_factory=dict)  # by Estimate.shape
    at_once: int = 1  # trials that ran at the same time on the device

    def correction(self, kind: str) -> Correction | None:
        """The median of the ratios of a kind; None where no record has one."""
        ratios = self.ratios.get(kind)
        if not ratios:
            return None
        middle = statistics.median(ratios)
        deviations = [abs(ratio - middle) for ratio in ratios]
        # The median deviation times 1.4826 is the standard deviation of a normal distribution; a median of few ratios
        # is itself uncertain by about 1.25 / sqrt(n) of that.
        spread = max(1.4826 * statistics.median(deviations), LEAST_SPREAD) if len(ratios) > 2 else 3 * LEAST_SPREAD
        return Correction(math.exp(middle), spread * math.sqrt(1 + 1.57 / len(ratios)), len(ratios))

    def training(self, shape: str, count: int) -> Correction | None:
        """The seconds of ``count`` steps of this shape, as measured; None where no record has such steps."""
        seconds = [one.of(count) for one in self.steps.get(shape, ())]
        if not seconds or count < 1:
            return None
        logs = [math.log(one) for one in seconds]
        spread = max(statistics.stdev(logs), LEAST_SPREAD) if len(logs) > 1 else 1.5 * LEAST_SPREAD
        return Correction(math.exp(statistics.median(logs)), spread, len(logs))


def measured(info: Mapping[str, Any]) -> dict[str, float]:
    """The measured seconds of each kind in the ``train_info`` of a record."""
    found = {}
    for kind, stages in STAGES.items():
        parts = [info.get(f"{stage}_seconds") for stage in stages]
        if known := [part for part in parts if part is not None]:
            found[kind] = float(sum(known))
    if info.get("train_seconds") and "trained_by" not in info and "packed" not in info:
        found["train"] = float(info["train_seconds"])
    return found


def of(records: Iterable[Result], device: str, at_once: int = 1) -> History:
    """The history of the device whose key is ``device``; records of other devices and versions are left out.

    So are those of trials with which another number of trials than ``at_once`` ran at the same time. If all are of such
    trials, those that ran alone count, but without the seconds of their steps.
    """
    records = list(records)
    history = History(at_once=at_once)
    for result in records:
        about, info = result.meta_info.get(SECTION), result.train_info
        if not isinstance(about, dict) or result.status is not Status.success or about.get(DEVICE) != device:
            continue
        if result.run_info.get("resumed"):  # its earlier attempts may have run on other machines
            continue
        if _at_once(result) != at_once:
            continue
        seconds, predicted = measured(info), info.get("predicted") or {}
        if seconds.get("train") and info.get("steps") and isinstance(about.get(SHAPE), str):
            history.steps.setdefault(about[SHAPE], []).append(_steps(seconds["train"], info))
        for kind, took in seconds.items() if isinstance(predicted, dict) else ():
            raw = predicted.get(f"uncorrected_{kind}_seconds")
            if isinstance(raw, int | float) and raw > 0 and took > 0:
                history.ratios.setdefault(kind, []).append(math.log(took / raw))
    if at_once > 1 and not history.ratios and not history.steps:
        return History(of(records, device).ratios)
    return history


def _steps(seconds: float, info: Mapping[str, Any]) -> Steps:
    """The ``seconds`` of the steps in the ``train_info`` of a record; the median step of a captured run is a replay."""
    found = Steps.alike(seconds / info["steps"], info["steps"])
    median = info.get("step_seconds_p50")
    if not info.get("capture_graphs") or not isinstance(median, int | float) or median <= 0:
        return found
    return Steps(seconds, info["steps"], min(float(median), found.each))


def _at_once(result: Result) -> int:
    """The number of trials that ran at the same time on the device; records of earlier versions do not say it."""
    system = result.meta_info.get("system")
    found = system.get(AT_ONCE_KEY) if isinstance(system, dict) else None
    return found if isinstance(found, int) else 1


def newest(study: Path, most: int) -> list[Result]:
    """The newest readable records of a study, up to a number."""
    if not study.is_dir():
        return []
    found = []
    for place in sorted(store.recorded(study), key=_written)[-most:]:
        with suppress(RecordError):
            found.append(Result.read(place))
    return found


def _written(place: Path) -> float:
    with suppress(OSError):
        return (place / RESULT).stat().st_mtime
    return 0.0


def named(study: str) -> list[Result]:
    """The records of the study that ``forecast.records`` names: a name below multirun/, or a folder.

    Raises:
        InputError: there is no such study, or it holds no record.
    """
    folder = store.folder(study) if store.is_plain(study) else Path(study).expanduser()
    if not folder.is_dir():
        known = [place.name for place in store.studies()]
        raise InputError(
            f"forecast.records={study}: no such study; {suggest(study, known) if known else 'there is none'}"
        )
    found = store.records(folder, MOST_READ)
    if not found:
        raise InputError(f"forecast.records={study}: holds no records that can be read")
    return found
