"""The budget of sweep=tune: its syntax, and the trials that it admits."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from peftsweep.errors import InputError
from peftsweep.tuning.search import Point, Until

COUNTS = ("trials", "trial", "steps", "step")
SECONDS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
ALLOWED = "trials (40trials), optimizer steps (5000steps) or wall time (90m, 2h, 1d)"


@dataclass(frozen=True)
class Budget:
    """A budget of ``trials``, ``steps`` or ``seconds``; infinite where none was given."""

    amount: float
    unit: str

    def __str__(self) -> str:
        return f"{self.amount:,.0f} {self.unit}"


def parse(text: object) -> Budget | None:
    """``40trials``, ``5000steps``, ``90m``, ``2h``; None stays None.

    Raises:
        InputError: it is no such budget.
    """
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]+)", str(text).strip())
    unit = found[2] if found else ""
    counts = unit in COUNTS
    if found is None or not (counts or unit in SECONDS):
        raise InputError(f"budget={text}: must be a number of {ALLOWED}")
    amount = float(found[1])
    if amount <= 0 or (counts and not amount.is_integer()):
        raise InputError(f"budget={text}: must be above 0, trials and steps in whole numbers")
    return Budget(amount, unit.removesuffix("s") + "s") if counts else Budget(amount * SECONDS[unit], "seconds")


class BudgetAccount:
    """The account of a tuning's budget.

    Trials and steps are counted when they are admitted, and a failed trial counts in full, so that the same command
    with the same budget always admits the same trials. Wall time is that of ``clock``, which includes the seconds of
    earlier commands. ``steps`` are the optimizer steps of a trial to each ``Until``.
    """

    def __init__(self, budget: Budget | None, steps: Sequence[int | None], clock: Callable[[], float]) -> None:
        self.budget = budget
        self._steps = dict(zip(Until, steps, strict=True))
        self._clock = clock
        self._reached: dict[Point, Until] = {}  # how far each admitted point was trained
        self._free: set[Point] = set()  # points that turned out to be the same trial as another point
        self._seconds: dict[Until, list[float]] = {until: [] for until in Until}

    @property
    def trials(self) -> int:
        """The number of trials begun."""
        return len(self._reached.keys() - self._free)

    @property
    def steps(self) -> int:
        """Optimizer steps of all trials; 0 where the length of one is not known."""
        return sum(self._steps[until] or 0 for point, until in self._reached.items() if point not in self._free)

    @property
    def seconds(self) -> float:
        """Wall time."""
        return self._clock()

    @property
    def left(self) -> float:
        """The rest of the budget, in its unit; infinite without one."""
        return float("inf") if self.budget is None else self.budget.amount - float(getattr(self, self.budget.unit))

    def admit(self, points: Sequence[Point], until: Until, at_once: int = 1) -> Iterator[list[Point]]:
        """Batches of those ``points`` that the budget has room for, which are counted when they are yielded.

        With a budget of wall time a batch holds at most ``at_once`` points, so that the time is checked between them.
        """
        size = max(1, at_once) if self.budget and self.budget.unit == "seconds" else max(1, len(points))
        for start in range(0, len(points), size):
            batch = [point for point in points[start : start + size] if self._take(point, until)]
            if batch:
                yield batch

    def _take(self, point: Point, until: Until) -> bool:
        if (reached := self._reached.get(point)) is not None and reached >= until:
            return True
        if self._cost(point, until) > self.left:
            return False
        self._reached[point] = until
        return True

    def _cost(self, point: Point, until: Until) -> float:
        reached = self._reached.get(point)
        unit = self.budget.unit if self.budget else "trials"
        if unit == "trials":
            return float(reached is None)
        if unit == "steps":
            return float((self._steps[until] or 0) - (self._steps[reached] or 0 if reached else 0))
        return median(self._seconds[until]) if self._seconds[until] else 0.0

    def add_seconds(self, until: Until, seconds: float) -> None:
        """Add the seconds of a trial, which predict those of the next trials."""
        self._seconds[until].append(seconds)

    def mark_free(self, point: Point) -> None:
        """Do not count ``point``: it is the same trial as an earlier point, or it was never begun."""
        self._free.add(point)
