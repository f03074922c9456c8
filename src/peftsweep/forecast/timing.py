"""Predict the time and the cost of a sweep: the seconds of its trials, the end of the last worker, the price."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import psutil
import torch

from peftsweep.config import identity
from peftsweep.config.compose import Trial
from peftsweep.errors import InputError
from peftsweep.forecast import duration, forecast, history, speed
from peftsweep.forecast.duration import NOTHING, Estimate, Span
from peftsweep.forecast.work import number_of_steps
from peftsweep.models import model
from peftsweep.observe import measure, streams
from peftsweep.observe.remaining import format_seconds
from peftsweep.schema import Config, PriceConfig
from peftsweep.study import record, rungs, store

MOST_RECORDS = 300  # newest records of the sweep's own study that are read
IMPORTED = time.time()  # the end of this process's imports, which each worker needs, too
MOST_IMPORT_SECONDS = 60.0  # limit for a process that ran long before the imports, such as a notebook
PACKED = (0.7, 1.3)  # interval of the seconds of trials in a pack, relative to the same trials one by one


class Timing:
    """The seconds of the trials of one sweep, which run in ``workers`` processes on ``devices`` devices.

    ``workers`` is None if another launcher decides how many trials run at the same time.
    """

    def __init__(self, trials: Sequence[Trial], workers: int | None = None, devices: int = 1) -> None:
        config = trials[0].config
        where = model.device(config.device)
        count = workers or 1
        self._threads = measure.threads_each(count) if where.type == "cpu" else None
        self._launched = workers is None
        self.workers, self.devices = count, max(1, min(count, devices))
        self._at_once = min(count, len(trials))
        with measure.threads(self._threads):
            self.device = device_of(where, torch.get_num_threads(), math.ceil(self._at_once / self.devices))
        self.history = records_of(self.device.key, config.forecast.records, config.study, self.device.at_once)
        self.price = hourly(config.price, speed.name_of(where))
        self.currency = config.price.currency
        self._based = set[str]()  # untouched bases that an earlier trial of the sweep scores
        self._estimates: dict[str, Estimate] = {}

    def estimate(self, one: Trial) -> Estimate:
        """The estimate of one trial; the evaluation of a base is left out if an earlier trial evaluates the same."""
        if one.identity not in self._estimates:
            with streams.without_warnings(), measure.threads(self._threads):
                found = duration.estimate(one, self.device, self.history)
            key = identity.content_hash([*identity.model_key(one), one.config.quant, one.tree["eval"]])
            span = found.spans.get("evaluate")
            if span is not None and key in self._based:
                share = 1 - found.baseline.seconds / span.seconds if span.seconds else 1.0
                found = duration.with_evaluations(found, span, share)
            self._based.add(key)
            self._estimates[one.identity] = found
        return self._estimates[one.identity]

    def measure(self) -> None:
        """Measure the speed of the device, if it is unknown, before other processes of the plan make it busy."""
        with measure.threads(self._threads):
            _ = self.device.speed

    def trace(self, one: Trial) -> None:
        """Trace the operations of one trial, which ``estimate`` then takes from the cache."""
        if not forecast.check(one).refused:
            with streams.without_warnings():
                duration.operations(one, self.device.device.type)

    def expected(self, trials: Sequence[Trial]) -> dict[str, float]:
        """The predicted seconds of trials by identity, without those that have no prediction."""
        totals = {one.identity: self.estimate(one).total for one in trials}
        return {name: total.seconds for name, total in totals.items() if total is not None}

    def row(self, one: Trial) -> dict[str, Any]:
        """The keys of the trial in plan.json about time, FLOPs and cost."""
        found = self.estimate(one)
        total = found.total
        ideal = self.device.ideal(dict(found.flops_by_dtype)) if found.flops_by_dtype else None
        train = found.spans.get("train")
        return {
            "predicted_seconds": None if total is None else total.seconds,
            "predicted_seconds_low": None if total is None else total.low,
            "predicted_seconds_high": None if total is None else total.high,
            "predicted": found.facts(),
            "predicted_device": self.device.key,
            "predicted_at_once": self.device.at_once,
            "no_time_because": found.why,
            "flops": found.flops,
            "predicted_mfu": ideal / train.seconds if ideal and train and train.seconds else None,
            "predicted_cost": None if total is None or self.price is None else self.cost(total.seconds / self._sharing),
        }

    @property
    def _sharing(self) -> float:
        """The number of trials that run at the same time on one device; idle workers share nothing."""
        return max(1.0, self._at_once / self.devices)

    def cost(self, device_seconds: float) -> float:
        """The cost of ``device_seconds``, in the currency of ``price``."""
        return device_seconds / 3600 * (self.price or 0.0)

    def sweep(self, jobs: Sequence[Sequence[Trial]]) -> tuple[Span | None, str]:
        """The seconds of a sweep of these jobs, each a trial or a pack, and a text that names workers and devices.

        None and the reasons, where a trial has no prediction. A warm worker loads each base once. The seconds of a
        worker's imports are those of this process.
        """
        spans, unknown, loaded = list[Span](), dict[str, int](), set[str]()
        estimates = list[Estimate]()
        for job in jobs:
            found = [self.estimate(one) for one in job]
            if why := next((one.why for one in found if one.total is None), None):
                unknown[why] = unknown.get(why, 0) + len(job)
                continue
            spans.append(self._job(job, found, loaded))
            estimates += found
        if unknown:
            return None, "; ".join(f"{record.trials_in_words(count)}: {why}" for why, count in unknown.items())
        took = IMPORTED - psutil.Process().create_time()  # below 0 in a process that was forked after the imports
        imports = min(max(took, 0.0), MOST_IMPORT_SECONDS)
        stages = self._stages(jobs)
        ends = [finish(spans, self.workers)] if stages is None else self._ends_of_stages(stages, estimates)
        end = sum(ends, Span(imports, imports / 2, imports * 2))
        return end, self._where

    @property
    def _where(self) -> str:
        """On which workers and devices the sweep runs, and what is assumed of them."""
        if self._launched:
            return "one after the other; how many the launcher runs at the same time is not known"
        places = f"{self.workers} worker" + ("s" if self.workers != 1 else "")
        places += f" on {self.devices} device" + ("s" if self.devices != 1 else "")
        taking_turns = self.device.device.type == "cuda" and self.device.at_once not in (1, self.history.at_once)
        return places + (", on which they are assumed to take turns" if taking_turns else "")

    def _stages(self, jobs: Sequence[Sequence[Trial]]) -> list[rungs.Stage] | None:
        """The stages of a sweep with halving; None where every trial runs to its end."""
        trials = [one for job in jobs for one in job]
        config = trials[0].config if trials else None
        if config is None or rungs.begins(config.halving) is None:
            return None
        run, *_ = duration.operations(trials[0], self.device.device.type)
        steps = number_of_steps(trials[0], run)
        in_epochs = config.train.epochs is not None
        return None if steps is None else rungs.stages(config.halving, len(trials), steps, in_epochs=in_epochs)

    def _ends_of_stages(self, stages: Sequence[rungs.Stage], estimates: Sequence[Estimate]) -> list[Span]:
        """The seconds of each stage of halving; which trials go on is unknown, so each takes the mean of all."""
        mean = {
            kind: sum(((one.spans[kind] or NOTHING) for one in estimates), NOTHING).times(1 / len(estimates))
            for kind in history.KINDS
        }
        ends = []
        for stage in stages:
            took = mean["load"].times(0.5) + mean["train"].times(stage.end - stage.begin)
            if stage is stages[-1]:
                took += mean["evaluate"] + mean["save"]
            ends.append(finish([took] * stage.trials, self.workers))
        return ends

    def _job(self, job: Sequence[Trial], found: Sequence[Estimate], loaded: set[str]) -> Span:
        parts = {kind: [one.spans[kind] or NOTHING for one in found] for kind in history.KINDS}
        base = identity.content_hash([*identity.model_key(job[0]), job[0].config.quant])
        load = parts["load"][0] if base not in loaded or len(job) > 1 else parts["load"][0].times(0.5)
        loaded.add(base)
        own = sum((span for kind in ("evaluate", "save") for span in parts[kind]), NOTHING)
        train = sum(parts["train"], NOTHING)
        if len(job) > 1:
            train = Span(train.seconds, train.low * PACKED[0], train.high * PACKED[1])
        return load + train + own

    def lines(self, jobs: Sequence[Sequence[Trial]]) -> list[str]:
        """The last lines of a plan: the time of the sweep, and its cost if a price is known."""
        if not jobs:
            return []
        end, where = self.sweep(jobs)
        if end is None:
            return [f"time: not known of {where}"]
        packs = sum(len(job) > 1 for job in jobs)
        packed = f", {packs} of them packs" if packs else ""
        if stages := self._stages(jobs):
            packed += f", {stages[0].trials - stages[-1].trials} of which halving stops before their end"
        line = f"time: {in_words(end)} for {len(jobs)} job{'s' if len(jobs) != 1 else ''}{packed}, {where}"
        if self.price is None:
            return [line]
        low, middle, high = (self.cost(seconds * self.devices) for seconds in (end.low, end.seconds, end.high))
        unit = f" {self.currency}" if self.currency else ""
        return [line, f"cost: {money(middle)}{unit} ({money(low)} to {money(high)}), {self.price:g} a device-hour"]


def check(config: Config) -> None:
    """Check ``price`` and ``forecast.records`` before anything is planned.

    Raises:
        InputError: the price is no amount, or ``forecast.records`` names no study.
    """
    if not isinstance(config.price.hour, Mapping):
        hourly(config.price, "")
    if config.forecast.records is not None:
        history.named(config.forecast.records)


def in_words(span: Span) -> str:
    """``3.2 min (2.7 min to 3.9 min)``."""
    return f"{format_seconds(span.seconds)} ({format_seconds(span.low)} to {format_seconds(span.high)})"


def money(amount: float) -> str:
    """``amount`` with two decimals, or below 0.1 with two significant digits."""
    return f"{amount:.2f}" if amount >= 0.1 or amount == 0 else f"{amount:.2g}"


@cache
def device_of(where: torch.device, threads: int, at_once: int = 1) -> speed.Device:
    """The device with its speed, on which ``at_once`` trials run at the same time, cached by number of threads."""
    device = speed.Device(where)
    device.at_once = at_once
    return device


def finish(spans: Sequence[Span], workers: int) -> Span:
    """The seconds until the last of these jobs ends; each of ``workers`` takes the next job when it is free."""

    def end(seconds: Sequence[float]) -> float:
        free_at = [0.0] * max(workers, 1)
        for job_seconds in seconds:
            worker = free_at.index(min(free_at))
            free_at[worker] += job_seconds
        return max(free_at)

    return Span(*(end([getattr(span, name) for span in spans]) for name in ("seconds", "low", "high")))


def hourly(price: PriceConfig, device: str) -> float | None:
    """The price of an hour of the device, from a table the first entry whose name is a part of the device's name.

    A part ends where a word or number ends, so that the price of an L4 is not that of an L40S.

    None without a price.

    Raises:
        InputError: it is no amount, or the table has no entry for the device.
    """
    amount = price.hour
    if isinstance(amount, Mapping):
        part = r"(?<![^\W_]){}(?![^\W_])"  # no letter or digit before and after it
        matching = [
            hour for name, hour in amount.items() if re.search(part.format(re.escape(str(name))), device, re.IGNORECASE)
        ]
        if not matching:
            names = ", ".join(map(str, amount)) or "no device"
            reason = f"its table has {names}, and none of them is in the name of the device, {device}"
            raise InputError(f"price: {reason}; price=2.49 is a device-hour of any")
        amount = matching[0]
    if amount is None:
        return None
    if isinstance(amount, bool) or not isinstance(amount, int | float) or not (math.isfinite(amount) and amount >= 0):
        raise InputError(
            f"price={amount}: must be the price of a device-hour, a number of at least 0, such as price=2.49"
        )
    return float(amount)


def records_of(device: str, named: str | None, study: str, at_once: int = 1) -> history.History:
    """The measured seconds of the device, from the records that ``forecast.records`` names and from the study's own.

    Raises:
        InputError: ``forecast.records`` names no study.
    """
    others = history.named(named) if named is not None else []
    return history.of([*others, *history.newest(store.folder(study), MOST_RECORDS)], device, at_once)
