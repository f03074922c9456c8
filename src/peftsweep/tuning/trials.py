"""The trials of a tuning: from points to words, through any launcher, and from records to scores."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from peftsweep.analysis.table.columns import FACTS
from peftsweep.analysis.table.table import predictions
from peftsweep.errors import InputError, NotRun
from peftsweep.schema import HalvingConfig
from peftsweep.study import record
from peftsweep.study.reading import Unreadable
from peftsweep.study.record import Result, Status
from peftsweep.study.rungs import TRAINED_STATUSES, course
from peftsweep.study.sweep_record import last_attempt_seconds
from peftsweep.tuning.budget import BudgetAccount
from peftsweep.tuning.finals import BaseScore, Judged
from peftsweep.tuning.search import Point, Scores, Spent, Until
from peftsweep.tuning.space import FACTOR, Plan

Launch = Callable[[list[list[str]]], Sequence[Result | BaseException | None]]  # words of trials -> how each ended


@dataclass
class Trials:
    """Runs the trials that a search asks for, and returns their scores; a trial that is done is not run again."""

    launch: Launch
    words: Sequence[str]  # of the command line, which all trials get
    plan: Plan
    sizes: Mapping[str, str | None]  # by method: the name of the option that is its size
    account: BudgetAccount
    at_once: int = 1  # trials that run side by side
    note: Callable[[], None] = lambda: None  # called after every launch
    named_targets: bool = False  # whether the user has named the targets that are tried
    options: Mapping[str, str] = field(default_factory=dict)  # by name of a contestant: its method, where that differs
    scores: dict[tuple[Point, Until], float] = field(default_factory=dict)
    results: dict[Point, Result] = field(default_factory=dict)
    refused: dict[Point, str] = field(default_factory=dict)  # why a point was not trained
    _failed: set[tuple[Point, Until]] = field(default_factory=set)

    def __call__(self, stage: str, points: Sequence[Point], until: Until) -> Scores:
        """See ``search.Objective``."""
        new = [point for point in points if not self._is_known(point, until)]
        for batch in self.account.admit(new, until, self.at_once):
            self._run(stage, batch, until)
        scores = {point: self.scores[point, until] for point in points if (point, until) in self.scores}
        if not all(self._is_known(point, until) for point in points):
            raise Spent(scores)
        return scores

    def _is_known(self, point: Point, until: Until) -> bool:
        return (point, until) in self.scores or (point, until) in self._failed

    def _run(self, stage: str, points: Sequence[Point], until: Until) -> None:
        # Launched together with trained points that differ in targets alone, a point that adapts the same modules as
        # one of these is recognised as the same trial.
        earlier = [
            point
            for point in self.results
            if stage == "targets" and any(_differ_in_targets(point, other) for other in points)
        ]
        try:
            ended = self.launch([self.words_of(point, until) for point in [*earlier, *points]])
        except InputError as error:
            if stage != "targets" or self.named_targets:
                raise
            ended = [*(self.results[point] for point in earlier), *[error] * len(points)]
        if unreached := sum(result is None or isinstance(result, NotRun) for result in ended):
            raise NotRun(f"{unreached} trials of the tuning were not run; the same command continues")
        trials = {self.results[point].trial for point in self.results if point not in points}
        for point, result in zip(points, ended[len(earlier) :], strict=True):
            self._take(point, until, result, trials)
        self.note()

    def _take(self, point: Point, until: Until, ended: Result | BaseException | None, others: set[str]) -> None:
        if isinstance(ended, Result) and ended.status in TRAINED_STATUSES:
            if ended.trial in others and point not in self.results:
                self.account.mark_free(point)
            self.results[point] = ended
            self.account.add_seconds(until, last_attempt_seconds(ended))
            if (value := self._value(ended, until)) is not None and math.isfinite(value):
                self.scores[point, until] = self.plan.sign * value
                return
            self.refused[point] = "its validation score is missing or not finite"
        elif isinstance(ended, Result):
            self.refused[point] = ended.error["message"].partition("\n")[0] if ended.error else ended.status.name
            if ended.status is Status.refused:
                self.account.mark_free(point)  # it was refused before it began
        else:
            self.refused[point] = str(ended)
        self._failed.add((point, until))

    def _value(self, result: Result, until: Until) -> float | None:
        values = course(result, HalvingConfig(self.plan.metric, FACTOR, self.plan.rung)).values
        if until is Until.rung:
            return values[0] if values else None
        return values[-1] if len(values) == (1 if self.plan.rung is None else 2) else None

    def words_of(self, point: Point, until: Until) -> list[str]:
        """The words of the command line that run this trial as far as ``until``."""
        method = self.options.get(point.method, point.method)
        words = [*self.words, f"method={method}", f"train.learning_rate={point.rate!r}", f"seed={point.seed}"]
        size = self.sizes.get(point.method)
        words += [f"method.{size}={point.size}"] if size and point.size is not None else []
        if point.targets is not None:
            words = [*(word for word in words if not word.startswith("targets=")), f"targets={point.targets}"]
        words += [f"train.eval_every={self.plan.eval_every}", f"halving.metric={self.plan.metric}"]
        words += [f"halving.test={str(until is Until.test).lower()}"]
        if self.plan.rung is not None:
            rung = "1" if until is Until.rung else "null"
            words += [f"halving.min_steps={self.plan.rung}", f"halving.factor={FACTOR}", f"halving.rung={rung}"]
        return [*words, "force=false"] if point in self.results else words

    def judged(self, point: Point, evaluation: str, metric: str) -> Judged | None:
        """The scores of the trial on its test rows; None where it has not been judged."""
        result = self.results.get(point)
        score = (result.eval_info.get(evaluation) or {}).get(metric) if result else None
        if result is None or result.status is not Status.success or not score or result.folder is None:
            return None
        if score["value"] is None or not math.isfinite(score["value"]):
            self.refused[point] = f"its {metric} on the test rows is missing or not finite"
            return None
        facts, read = result.eval_info[evaluation], predictions(result.folder.parent)
        base_score, answers = facts.get(f"base_{metric}") or {}, str(facts.get("base_predictions") or "")
        base = None
        if (value := base_score.get("value")) is not None:
            lines = read(answers, evaluation) if answers else []
            base = BaseScore(answers, value, base_score.get("stderr"), base_score.get("n"), lines)
        lines = read(result.trial, evaluation)
        return Judged(result.trial, score["value"], score.get("stderr"), score.get("n"), lines, base)


def _differ_in_targets(first: Point, second: Point) -> bool:
    """Whether the points differ in their targets at most."""
    return replace(first, targets=None) == replace(second, targets=None)


def headline(results: Iterable[Result]) -> tuple[str, str] | None:
    """The evaluation and metric that judge finalists: the first evaluation, its headline metric or else its first."""
    for result in results:
        for name, facts in result.eval_info.items():
            metrics = [
                key
                for key, value in facts.items()
                if isinstance(value, dict) and "value" in value and not key.startswith("base_") and key not in FACTS
            ]
            if metrics:
                wanted = facts.get(record.HEADLINE)
                return name, wanted if wanted in metrics else metrics[0]
    return None


class Clock:
    """The seconds of a tuning: those of earlier commands and of this one."""

    def __init__(self, earlier: float) -> None:
        self._earlier, self._begun = earlier, time.monotonic()

    def __call__(self) -> float:
        return self._earlier + time.monotonic() - self._begun


def earlier_seconds(file: Path, search_hash: str) -> float:
    """The seconds of earlier commands with this ``TuningCommand.hash``, from the file that they wrote.

    Files of earlier versions have the hash under the key ``asked``.
    """
    try:
        found = record.read_json(file, dict)
    except (Unreadable, OSError):  # the file is missing or damaged, and will be written anew
        return 0.0
    if not isinstance(found, dict) or found.get("search_hash", found.get("asked")) != search_hash:
        return 0.0
    spent = found.get("spent")
    return float(spent.get("seconds", 0.0)) if isinstance(spent, dict) else 0.0
