"""The search of sweep=tune: which configurations to try next, given the validation scores of those tried before.

For each method the learning rate comes first, at its smallest size (rank), then the size at the best rate, then once
more a rate beside it at that size, then the target modules at both. A low rank finds the rate of all ranks nearly, as
the best rate of LoRA hardly depends on its rank (Schulman et al., "LoRA Without Regret", 2025); in short trainings it
does, by up to a step of the ladder.

Nothing here trains anything or reads a file: an ``Ask`` answers with scores, from trials, a table or a simulation. The
same answers give the same decisions, so that a command that was killed decides the same again from its records.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import partial
from typing import Protocol

MAX_RATES = 9  # of one method, with those by which its ladder is extended
RATES_PER_SURVIVOR = 3  # one in so many rates is trained from the first rung to the end, and at least two
RATE_STEP = math.sqrt(10)  # between two rates of a ladder


class Until(IntEnum):
    """How far a trial is trained and judged."""

    rung = 1  # the first rung, and its validation
    end = 2  # the end of its training, and its validation
    test = 3  # its test rows


@dataclass(frozen=True)
class Point:
    """One trial of a tuning. A value of None is that of the method's yaml."""

    method: str
    rate: float
    size: int | None
    targets: str | None
    seed: int


Scores = Mapping[Point, float]  # of validation, lower is better; a trial that failed or diverged has none


class Ask(Protocol):
    """A source of scores: trials, a table or a simulation."""

    def __call__(self, stage: str, points: Sequence[Point], until: Until) -> Scores:
        """The scores of those of ``points`` that could be trained so far.

        Raises:
            Spent: the budget leaves no room for one of them.
        """
        ...


class Spent(Exception):
    """The budget is spent; ``scores`` are of the points that were asked for last and are known."""

    def __init__(self, scores: Scores) -> None:
        super().__init__("the budget is spent")
        self.scores = scores


@dataclass(frozen=True)
class Space:
    """The search space of one method."""

    method: str
    rates: tuple[float, ...]
    extends: bool = True  # whether the ladder of rates grows where the best lies at an end of it
    sizes: tuple[int | None, ...] = (None,)  # the smallest first
    targets: tuple[str | None, ...] = (None,)  # the method's own first
    again: bool = True  # whether a rate beside the best is tried at the best size too


def ladder(rate: float, count: int = 3) -> tuple[float, ...]:
    """``count`` rates around ``rate``, half an order of magnitude apart, to three digits."""
    return tuple(float(f"{rate * RATE_STEP ** (place - count // 2):.3g}") for place in range(count))


@dataclass
class Tuned:
    """The results of one method: its scores, and the best of those trained to the end."""

    method: str
    ends: dict[Point, float] = field(default_factory=dict)
    rungs: dict[Point, float] = field(default_factory=dict)
    over: bool = False  # whether every stage was completed

    @property
    def best(self) -> Point | None:
        """The best of those trained to the end, or else at the first rung."""
        known = self.ends or self.rungs
        return min(known, key=known.__getitem__) if known else None

    @property
    def score(self) -> float:
        """The score of the best; infinite where nothing could be trained."""
        return math.inf if self.best is None else (self.ends or self.rungs)[self.best]


Want = tuple[Sequence[Point], Until]
Search = Generator[Want, Scores, Point | None]


def tune(spaces: Sequence[Space], ask: Ask, seed: int = 0) -> list[Tuned]:
    """Search every space stage by stage, all methods side by side; what is known of each, the best method first.

    Methods go side by side so that a spent budget has treated them alike.
    """
    found = {space.method: Tuned(space.method) for space in spaces}
    best: dict[str, Point | None] = {}
    try:
        best = _together("rate", {one.method: rates(one, seed) for one in spaces}, ask, found)
        for stage, search in (("size", sizes), ("rate again", partial(rate_again, found=found)), ("targets", targets)):
            at = {one.method: search(one, point) for one in spaces if (point := best[one.method])}
            best |= _together(stage, at, ask, found)
    except Spent:
        return sorted(found.values(), key=lambda one: one.score)
    for one in found.values():
        one.over = True
    return sorted(found.values(), key=lambda one: one.score)


def _together(
    stage: str, searches: Mapping[str, Search], ask: Ask, found: Mapping[str, Tuned]
) -> dict[str, Point | None]:
    """Run the searches in step, so that their points run in one batch; returns the result of each."""
    ended: dict[str, Point | None] = {}
    wants: dict[str, Want] = {}

    def go_on(method: str, scores: Scores | None) -> None:
        try:
            wants[method] = searches[method].send(scores)  # type: ignore[arg-type]  # None begins a generator
        except StopIteration as stop:
            ended[method] = stop.value
            wants.pop(method, None)

    for method in searches:
        go_on(method, None)
    while wants:
        until = min(wanted for _, wanted in wants.values())
        asked = {method: points for method, (points, wanted) in wants.items() if wanted is until}
        rounds = itertools.zip_longest(*asked.values())  # the most promising of each method first
        try:
            scores = ask(stage, [point for points in rounds for point in points if point], until)
        except Spent as spent:
            _note(found, spent.scores, until)
            raise
        _note(found, scores, until)
        for method, points in asked.items():
            go_on(method, {point: scores[point] for point in points if point in scores})
    return ended


def _note(found: Mapping[str, Tuned], scores: Scores, until: Until) -> None:
    for point, score in scores.items():
        known = found[point.method]
        (known.rungs if until is Until.rung else known.ends)[point] = score


def rates(space: Space, seed: int) -> Search:
    """The best rate at the smallest size: all go to the first rung, and the best of them to their end."""
    tried = list(space.rates)
    while True:
        points = [Point(space.method, rate, space.sizes[0], space.targets[0], seed) for rate in from_centre(tried)]
        first = yield points, Until.rung
        kept = sorted(first, key=first.__getitem__)[: max(2, math.ceil(len(tried) / RATES_PER_SURVIVOR))]
        scores = (yield kept, Until.end) if kept else {}
        best = min(scores, key=scores.__getitem__) if scores else None
        beyond = next_rate(tried, best.rate if best else None)
        if beyond is None or not space.extends or len(tried) >= MAX_RATES:
            return best
        tried.append(beyond)


def from_centre(rates: Sequence[float]) -> list[float]:
    """The rates, the middle ones first."""
    centre = (len(rates) - 1) / 2
    ordered = sorted(rates)
    return [ordered[place] for place in sorted(range(len(ordered)), key=lambda place: abs(place - centre))]


def next_rate(tried: Sequence[float], best: float | None) -> float | None:
    """The rate beyond the end of the ladder that is the best; None where the best lies within it.

    Where none could be trained (``best`` is None) it is a lower one.
    """
    if best is None or best == min(tried):
        return float(f"{min(tried) / RATE_STEP:.3g}")
    return float(f"{best * RATE_STEP:.3g}") if best == max(tried) else None


def sizes(space: Space, best: Point) -> Search:
    """The best size at the best rate; of equal ones the smallest."""
    return (yield from _variants(best, [replace(best, size=size) for size in space.sizes]))


def rate_again(space: Space, best: Point, found: Mapping[str, Tuned]) -> Search:
    """The better of the best rate and the one beside it, at the best size, which the rate was not chosen at."""
    known = found[space.method]
    # At the smallest size: what went to its end was ahead of all others at the rung.
    place = {point: (0, score) for point, score in known.ends.items() if point.size == space.sizes[0]}
    place |= {p: (1, score) for p, score in known.rungs.items() if p not in place and p.size == space.sizes[0]}
    if best.size == space.sizes[0] or not space.again or (rate := _beside(best, place)) is None:
        return best
    return (yield from _variants(best, [best, replace(best, rate=rate)]))


def targets(space: Space, best: Point) -> Search:
    """The best target modules at the best rate and size; of equal ones the method's own."""
    return (yield from _variants(best, [replace(best, targets=option) for option in space.targets]))


def _variants(best: Point, points: Sequence[Point]) -> Search:
    if len(points) == 1:
        return best
    scores = yield [best, *(point for point in points if point != best)], Until.end
    return min((point for point in points if point in scores), key=scores.__getitem__, default=best)


# ---- equal effort ----------------------------------------------------------------------------------


def equally(spaces: Sequence[Space], ask: Ask, trials: int, seeds: Mapping[str, int]) -> list[Tuned]:
    """Tune every method with exactly so many trials, each trained to its end; what is known of each, in their order.

    ``seeds`` are those of the methods. A trial that fails counts as any other.
    """
    found = {space.method: Tuned(space.method, over=True) for space in spaces}
    _together("tuning", {one.method: _equal(one, trials, seeds[one.method]) for one in spaces}, ask, found)
    return list(found.values())


def _equal(space: Space, trials: int, seed: int) -> Search:
    """Rates first, extended at an end of the ladder or else closer together; then the sizes, and a rate once more."""
    sizes = space.sizes[: max(1, trials - 2)]
    again = len(sizes) > 1 and trials - len(sizes) >= len(space.rates)
    of_rates = trials - len(sizes) + 1 - again
    tried = from_centre(space.rates)[: trials - len(sizes) + 1]
    known: dict[Point, float] = {}

    def at(rate: float, size: int | None = None) -> Point:
        return Point(space.method, rate, size or sizes[0], space.targets[0], seed)

    known |= yield [at(rate) for rate in tried], Until.end
    while len(tried) < (of_rates if known else trials):
        tried.append(_another_rate(tried, known))
        known |= yield [at(tried[-1])], Until.end
    if known and len(sizes) > 1:
        best = min(known, key=known.__getitem__).rate
        known |= yield [at(best, size) for size in sizes[1:]], Until.end
    if known and again:
        chosen = min(known, key=known.__getitem__)
        beside = (
            None
            if chosen.size == sizes[0]
            else _beside(chosen, {p: (0, known[p]) for p in map(at, tried) if p in known})
        )
        known |= yield [at(_another_rate(tried, known)) if beside is None else at(beside, chosen.size)], Until.end
    return min(known, key=known.__getitem__, default=None)


def _another_rate(tried: Sequence[float], known: Scores) -> float:
    """A rate beyond the ladder's end that is the best, or else closer to the best."""
    best = min(known, key=known.__getitem__).rate if known else None
    return next_rate(tried, best) or closer(tried, best or 0.0, {point.rate: loss for point, loss in known.items()})


def _beside(best: Point, place: Mapping[Point, tuple[int, float]]) -> float | None:
    """Of the rates next to the best one that with the least ``place``, which the points of the smallest size have."""
    tried = sorted({point.rate for point in place})
    at = tried.index(best.rate)
    beside = {tried[n] for n in (at - 1, at + 1) if 0 <= n < len(tried)}
    nearest = min((point for point in place if point.rate in beside), key=place.__getitem__, default=None)
    return None if nearest is None else nearest.rate


def closer(tried: Sequence[float], best: float, losses: Mapping[float, float]) -> float:
    """A rate between the best, which is no end of the ladder, and the better of its neighbours."""
    ordered = sorted(tried)
    place = ordered.index(best)
    beside = min(ordered[place - 1], ordered[place + 1], key=lambda rate: losses.get(rate, math.inf))
    return float(f"{math.sqrt(best * beside):.6g}")
