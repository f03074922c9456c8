"""The search of sweep=tune: which configurations to try next, given the validation scores of those tried before.

For each method the search has four stages: the learning rate at the smallest size (rank); the size at the best rate; a
neighbouring rate at the best size, or at the best of the larger ones where the smallest is the best; the target modules
at the best rate and size. The rate that is best at a low rank is
nearly the best at every rank, because the best rate of LoRA hardly depends on its rank (Schulman et al., "LoRA Without
Regret", 2025). In short trainings it does depend on the rank, by up to one step of the ladder.

This file trains nothing and reads no file: an ``Objective`` returns scores, from trials, a table or a simulation. The
same scores give the same decisions, so that a command that was killed makes the same decisions again from its records.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import partial
from typing import Protocol

MAX_RATES = 9  # of one method, including those that extend its ladder
RATES_PER_SURVIVOR = 3  # one of this many rates is trained from the first rung to the end; two at least
RATE_STEP = math.sqrt(10)  # factor between neighbouring rates of a ladder


class Until(IntEnum):
    """How far a trial is trained and judged."""

    rung = 1  # the first rung, and its validation
    end = 2  # the end of its training, and its validation
    test = 3  # its test rows


@dataclass(frozen=True)
class Point:
    """One trial of a tuning; a size or targets of None are those of the method's yaml."""

    method: str
    rate: float
    size: int | None
    targets: str | None
    seed: int


Scores = Mapping[Point, float]  # validation scores, lower is better; a trial that failed or diverged has none


class Objective(Protocol):
    """A source of scores: trials, a table or a simulation."""

    def __call__(self, stage: str, points: Sequence[Point], until: Until) -> Scores:
        """The scores of ``points``; those that could not be trained have none.

        Raises:
            Spent: the rest of the budget is too small for one of them.
        """
        ...


class Spent(Exception):
    """The budget is spent; ``scores`` are those of the last requested points, as far as they were trained."""

    def __init__(self, scores: Scores) -> None:
        super().__init__("the budget is spent")
        self.scores = scores


@dataclass(frozen=True)
class Space:
    """The search space of one method."""

    method: str
    rates: tuple[float, ...]
    extends: bool = True  # whether a rate is added to the ladder when the best rate is at an end of it
    sizes: tuple[int | None, ...] = (None,)  # the smallest first
    targets: tuple[str | None, ...] = (None,)  # the method's own first
    again: bool = True  # whether a neighbour of the best rate is also tried at the best size, or the best larger one


def ladder(rate: float, count: int = 3) -> tuple[float, ...]:
    """``count`` rates around ``rate``, half an order of magnitude apart, to three digits."""
    return tuple(float(f"{rate * RATE_STEP ** (index - count // 2):.3g}") for index in range(count))


@dataclass
class Tuned:
    """The results of one method: its scores, and the best of those trained to the end."""

    method: str
    ends: dict[Point, float] = field(default_factory=dict)
    rungs: dict[Point, float] = field(default_factory=dict)

    @property
    def best(self) -> Point | None:
        """The best point of those trained to the end, or else of those trained to the first rung."""
        scores = self.ends or self.rungs
        return min(scores, key=scores.__getitem__) if scores else None

    @property
    def score(self) -> float:
        """The score of the best; infinite where nothing could be trained."""
        return math.inf if self.best is None else (self.ends or self.rungs)[self.best]


Request = tuple[Sequence[Point], Until]  # points to train, the most promising first, and how far
Search = Generator[Request, Scores, Point | None]  # yields requests, is sent their scores, returns the best point


def tune(spaces: Sequence[Space], objective: Objective, seed: int = 0) -> list[Tuned]:
    """Search every space stage by stage, all methods in parallel; the result of each method, the best method first.

    The methods go through each stage together, so that all have had the same effort when the budget is spent.
    """
    tuned = {space.method: Tuned(space.method) for space in spaces}
    with suppress(Spent):  # then the result is what was tried until then
        best = _in_parallel("rate", {space.method: rates(space, seed) for space in spaces}, objective, tuned)
        for stage, search in (("size", sizes), ("rate again", partial(rate_again, tuned=tuned)), ("targets", targets)):
            searches = {space.method: search(space, point) for space in spaces if (point := best[space.method])}
            best |= _in_parallel(stage, searches, objective, tuned)
    return sorted(tuned.values(), key=lambda result: result.score)


def _in_parallel(
    stage: str, searches: Mapping[str, Search], objective: Objective, tuned: Mapping[str, Tuned]
) -> dict[str, Point | None]:
    """Run the searches of all methods so that their points are trained in one batch; the best point of each method."""
    best: dict[str, Point | None] = {}
    requests: dict[str, Request] = {}

    def advance(method: str, scores: Scores | None) -> None:
        try:
            requests[method] = searches[method].send(scores)  # type: ignore[arg-type]  # None starts a generator
        except StopIteration as stop:
            best[method] = stop.value
            requests.pop(method, None)

    for method in searches:
        advance(method, None)
    while requests:
        until = min(requested for _, requested in requests.values())
        batch = {method: points for method, (points, requested) in requests.items() if requested is until}
        rounds = itertools.zip_longest(*batch.values())  # the most promising point of each method first
        try:
            scores = objective(stage, [point for points in rounds for point in points if point], until)
        except Spent as spent:
            _add_scores(tuned, spent.scores, until)
            raise
        _add_scores(tuned, scores, until)
        for method, points in batch.items():
            advance(method, {point: scores[point] for point in points if point in scores})
    return best


def _add_scores(tuned: Mapping[str, Tuned], scores: Scores, until: Until) -> None:
    for point, score in scores.items():
        result = tuned[point.method]
        (result.rungs if until is Until.rung else result.ends)[point] = score


def rates(space: Space, seed: int) -> Search:
    """The best rate at the smallest size: all rates go to the first rung, and the best of them to their end."""
    tried = list(space.rates)
    while True:
        points = [Point(space.method, rate, space.sizes[0], space.targets[0], seed) for rate in from_centre(tried)]
        at_rung = yield points, Until.rung
        survivors = sorted(at_rung, key=at_rung.__getitem__)[: max(2, math.ceil(len(tried) / RATES_PER_SURVIVOR))]
        scores = (yield survivors, Until.end) if survivors else {}
        best = min(scores, key=scores.__getitem__) if scores else None
        beyond = next_rate(tried, best.rate if best else None)
        if beyond is None or not space.extends or len(tried) >= MAX_RATES:
            return best
        tried.append(beyond)


def from_centre(rates: Sequence[float]) -> list[float]:
    """The rates, the middle ones first."""
    centre = (len(rates) - 1) / 2
    ordered = sorted(rates)
    return [ordered[index] for index in sorted(range(len(ordered)), key=lambda index: abs(index - centre))]


def next_rate(tried: Sequence[float], best: float | None) -> float | None:
    """The rate that extends the ladder beyond ``best``, if that is its lowest or highest rate; else None.

    If no rate could be trained (``best`` is None), the ladder is extended to a lower rate.
    """
    if best is None or best == min(tried):
        return float(f"{min(tried) / RATE_STEP:.3g}")
    return float(f"{best * RATE_STEP:.3g}") if best == max(tried) else None


def sizes(space: Space, best: Point) -> Search:
    """The best size at the best rate; the smallest one of equal ones."""
    return (yield from _variants(best, [replace(best, size=size) for size in space.sizes]))


def rate_again(space: Space, best: Point, tuned: Mapping[str, Tuned]) -> Search:
    """The better one of ``best`` and of the better neighbour of its rate, at a size where that rate was not tried.

    That is the best size, or the best of the larger ones where the smallest is: all rates were tried at the smallest,
    and the larger ones may have lost because the rate that is best there is too high for them.
    """
    result, smallest = tuned[space.method], space.sizes[0]
    # Points that went to their end rank before all others, which were worse at the rung.
    ranks = {point: (0, score) for point, score in result.ends.items() if point.size == smallest}
    ranks |= {p: (1, score) for p, score in result.rungs.items() if p not in ranks and p.size == smallest}
    larger = [point for point in result.ends if point.size != smallest]
    if not larger or not space.again or (rate := _better_neighbour(best, ranks)) is None:
        return best
    size = min(larger, key=result.ends.__getitem__).size
    return (yield from _variants(best, [best, replace(best, rate=rate, size=size)]))


def targets(space: Space, best: Point) -> Search:
    """The best target modules at the best rate and size; the method's own ones of equal ones."""
    return (yield from _variants(best, [replace(best, targets=option) for option in space.targets]))


def _variants(best: Point, points: Sequence[Point]) -> Search:
    if len(points) == 1:
        return best
    scores = yield [best, *(point for point in points if point != best)], Until.end
    return min((point for point in points if point in scores), key=scores.__getitem__, default=best)


# ---- equal effort ----------------------------------------------------------------------------------


def equally(spaces: Sequence[Space], objective: Objective, trials: int, seeds: Mapping[str, int]) -> list[Tuned]:
    """Tune every method with exactly ``trials`` trials, each trained to its end; one result for each space, in order.

    ``seeds`` holds the seed of each method. A trial that fails counts as one of the ``trials``.
    """
    tuned = {space.method: Tuned(space.method) for space in spaces}
    searches = {space.method: _equal(space, trials, seeds[space.method]) for space in spaces}
    _in_parallel("tuning", searches, objective, tuned)
    return list(tuned.values())


def _equal(space: Space, trials: int, seed: int) -> Search:
    """First the rates, then the sizes at the best rate, then one more rate at the best size.

    Rates are added beyond an end of the ladder if the best rate is there, or else between the best and a neighbour.
    """
    sizes = space.sizes[: max(1, trials - 2)]
    again = len(sizes) > 1 and trials - len(sizes) >= len(space.rates)
    rate_trials = trials - len(sizes) + 1 - again
    tried = from_centre(space.rates)[: trials - len(sizes) + 1]
    scores: dict[Point, float] = {}

    def at(rate: float, size: int | None = None) -> Point:
        return Point(space.method, rate, size or sizes[0], space.targets[0], seed)

    scores |= yield [at(rate) for rate in tried], Until.end
    while len(tried) < (rate_trials if scores else trials):
        tried.append(_another_rate(tried, scores))
        scores |= yield [at(tried[-1])], Until.end
    if scores and len(sizes) > 1:
        best = min(scores, key=scores.__getitem__).rate
        scores |= yield [at(best, size) for size in sizes[1:]], Until.end
    if scores and again:
        chosen = min(scores, key=scores.__getitem__)
        neighbour = (
            None
            if chosen.size == sizes[0]
            else _better_neighbour(chosen, {p: (0, scores[p]) for p in map(at, tried) if p in scores})
        )
        last = at(_another_rate(tried, scores)) if neighbour is None else at(neighbour, chosen.size)
        scores |= yield [last], Until.end
    return min(scores, key=scores.__getitem__, default=None)


def _another_rate(tried: Sequence[float], scores: Scores) -> float:
    """A new rate: beyond the end of the ladder if the best is there, or else between the best and a neighbour."""
    best = min(scores, key=scores.__getitem__).rate if scores else None
    return next_rate(tried, best) or closer(tried, best or 0.0, {point.rate: loss for point, loss in scores.items()})


def _better_neighbour(best: Point, ranks: Mapping[Point, tuple[int, float]]) -> float | None:
    """The neighbour of the best rate whose point has the lower rank; None where there is no other rate.

    ``ranks`` holds the points of the smallest size.
    """
    tried = sorted({point.rate for point in ranks})
    index = tried.index(best.rate)
    neighbours = {tried[n] for n in (index - 1, index + 1) if 0 <= n < len(tried)}
    better = min((point for point in ranks if point.rate in neighbours), key=ranks.__getitem__, default=None)
    return None if better is None else better.rate


def closer(tried: Sequence[float], best: float, losses: Mapping[float, float]) -> float:
    """The geometric mean of the best rate, which is no end of the ladder, and the better one of its neighbours."""
    ordered = sorted(tried)
    index = ordered.index(best)
    neighbour = min(ordered[index - 1], ordered[index + 1], key=lambda rate: losses.get(rate, math.inf))
    return float(f"{math.sqrt(best * neighbour):.6g}")
