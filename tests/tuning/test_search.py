"""What a search asks for, given scores from a table or a formula; nothing is trained."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import pytest

from peftsweep.errors import InputError
from peftsweep.tuning import replay, search
from peftsweep.tuning.budget import Budget, BudgetAccount, parse
from peftsweep.tuning.search import Point, Scores, Space, Spent, Until

PUBLIC = Path(__file__).parents[1] / "fixtures" / "lora_rates_and_ranks.csv"
LORA = Space("lora", search.ladder(1e-4), sizes=(4, 16, 64))


class Simulated:
    """Answers from a formula, as trials would, within a budget; what was requested is kept in order."""

    def __init__(self, loss: Callable[[Point], float | None], budget: Budget | None = None) -> None:
        self.loss, self.account = loss, BudgetAccount(budget, (10, 30, 30), lambda: 0.0)
        self.requests: list[tuple[str, Point, Until]] = []

    def __call__(self, stage: str, points: Sequence[Point], until: Until) -> Scores:
        admitted = [point for batch in self.account.admit(points, until) for point in batch]
        self.requests += [(stage, point, until) for point in admitted]
        known = {point: loss for point in admitted if (loss := self.loss(point)) is not None}
        if len(admitted) < len(points):
            raise Spent(known)
        return known

    @property
    def points(self) -> set[Point]:
        return {point for _, point, _ in self.requests}


def valley(rate: float, of: float = 1e-4) -> float:
    return math.log10(rate / of) ** 2


# ---- against finished runs -------------------------------------------------------------------------


def test_on_the_public_sweep_rate_first_then_rank_finds_the_best_with_less_than_half_of_the_runs() -> None:
    grids = replay.read(PUBLIC)
    found = [replay.run(grid) for grid in grids]
    assert len(found) == 23
    for grid, one in zip(grids, found, strict=True):
        assert one.runs <= len(grid.rates) + len(grid.ranks) - 1
    assert (sum(one.runs for one in found), sum(one.cells for one in found)) == (148, 320)
    regrets = [one.regret for one in found]
    assert (median(regrets) <= 0.0005, max(regrets) <= 0.008) == (True, True)
    assert median(one.default for one in found) == pytest.approx(0.0050, abs=5e-5)
    assert max(one.default for one in found) == pytest.approx(0.0508, abs=5e-5)
    assert "23 sweeps, 148 of 320 runs (46%)" in replay.lines(found)


def test_a_run_that_diverged_is_survived(tmp_path: Path) -> None:
    file = tmp_path / "runs.csv"
    file.write_text("lr,r,loss\n1e-4,1,2.0\n1e-3,1,nan\n1e-4,2,1.9\n1e-3,2,1.0\n3e-4,2,1.5\n3e-4,1,\n")
    (one,) = map(replay.run, replay.read(file))
    assert (one.best, one.runs, one.cells) == ((1e-4, 2), 4, 6)
    assert one.regret == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("r,loss\n1,2\n", "needs a column of the rate"),
        ("lr,r\n1e-4,1\n", "needs a column of the loss"),
        ("lr,r,loss\n1e-4,1,low\n", "row 1: rate, rank and loss must be numbers"),
        ("lr,r,loss\n1e-4,1,1\n0,1,1\n", "row 2: the rate must be above 0, the rank a whole number from 1"),
        ("lr,r,loss\n1e-4,1.5,1\n", "row 1: the rate must be above 0, the rank a whole number from 1"),
        ("lr,r,loss\n", "holds no rows"),
        ("lr,r,loss\n1e-4,1,nan\n", "every run in it has diverged"),
        ("lr,r,loss,run\n1e-4,1,2,a\n1e-3,1,1,b\n", "run tells every run from the others, so that no sweep has two"),
        ("lr,r,loss\n1e-4,1,2\n1e-4,1,1\n", "has one rate and one rank, among which nothing can be searched"),
    ],
)
def test_a_table_that_cannot_be_replayed_is_one_line(text: str, problem: str, tmp_path: Path) -> None:
    file = tmp_path / "runs.csv"
    file.write_text(text)
    with pytest.raises(InputError, match=problem):
        replay.read(file)


# ---- what is requested -----------------------------------------------------------------------------


def test_the_ladder_grows_while_the_best_rate_lies_at_its_end() -> None:
    objective = Simulated(lambda point: valley(point.rate, 3e-3))
    (found,) = search.tune([LORA], objective)
    assert found.best is not None
    assert found.best.rate == pytest.approx(3.16e-3)
    assert sorted({point.rate for point in objective.points}) == [3.16e-5, 1e-4, 3.16e-4, 9.99e-4, 3.16e-3, 9.99e-3]


def test_rates_of_the_user_are_all_that_is_tried() -> None:
    objective = Simulated(lambda point: -point.rate)
    (found,) = search.tune([Space("lora", (1e-4, 1e-3), extends=False)], objective)
    assert {point.rate for point in objective.points} == {1e-4, 1e-3}
    assert found.best is not None
    assert found.best.rate == 1e-3


def test_where_every_rate_diverges_lower_ones_are_tried() -> None:
    (found,) = search.tune([LORA], Simulated(lambda point: valley(point.rate) if point.rate < 1e-5 else None))
    assert found.best is not None
    assert found.best.rate < 1e-5
    (found,) = search.tune([LORA], objective := Simulated(lambda _: None))
    assert (found.best, len(objective.points)) == (None, search.MAX_RATES)


def test_of_the_rates_only_the_best_go_from_the_rung_to_the_end() -> None:
    objective = Simulated(lambda point: valley(point.rate))
    search.tune([Space("lora", tuple(10.0**-place for place in range(1, 8)), extends=False)], objective)
    went = [until for _, _, until in objective.requests]
    assert (went.count(Until.rung), went.count(Until.end)) == (7, 3)


def test_size_and_targets_are_tried_at_the_best_rate() -> None:
    space = Space("lora", (1e-4, 1e-3), sizes=(4, 16), targets=(None, "qv"), extends=False)
    objective = Simulated(lambda p: valley(p.rate, 1e-3) - (p.size or 0) / 100 - (p.targets == "qv"))
    (found,) = search.tune([space], objective)
    assert found.best == Point("lora", 1e-3, 16, "qv", 0)
    assert len(objective.points) == 2 + 1 + 1 + 1  # rates, size, the other rate at the best size, targets


@pytest.mark.parametrize(("falls", "expected"), [(0.25, 2e-4), (0.0, 6e-4), (-0.25, 2e-3)])
def test_a_rate_beside_the_best_is_tried_at_the_best_size(falls: float, expected: float) -> None:
    """The best rate is ``size ** -(2 falls)`` times that of the smallest size, which lies between two of the ladder."""
    lean = {0.25: 4.5e-4, 0.0: 6e-4, -0.25: 8e-4}[falls]  # at rank 4, so that 6e-4 is the best of the ladder there

    def loss(point: Point) -> float:
        size = point.size or 4
        return valley(point.rate, lean * (size / 4) ** (-2 * falls)) - size

    space = Space("lora", (6e-5, 2e-4, 6e-4, 2e-3), sizes=(4, 8, 16), extends=False)
    (found,) = search.tune([space], objective := Simulated(loss))
    assert found.best == Point("lora", expected, 16, None, 0)
    assert len(objective.points) == 4 + 2 + 1
    again = [(stage, point.rate) for stage, point, _ in objective.requests if stage == "rate again"]
    assert len(again) == 2  # what it is held against, which is known, and one more


def test_larger_sizes_that_lose_because_their_rate_is_too_high_are_tried_at_its_neighbour() -> None:
    """At the rate that is best at the smallest size all larger ones lose; at the rate below it the largest is best."""

    def loss(point: Point) -> float:
        size = point.size or 4
        return valley(point.rate, 2e-3 * 4 / size) - math.log10(size) / 4

    space = Space("lora", (2e-4, 6e-4, 2e-3), sizes=(4, 16), extends=False)
    assert loss(Point("lora", 2e-3, 4, None, 0)) < loss(Point("lora", 2e-3, 16, None, 0))
    (found,) = search.tune([space], objective := Simulated(loss))
    assert found.best == Point("lora", 6e-4, 16, None, 0)
    assert len(objective.points) == 3 + 1 + 1


def test_the_smallest_size_stays_the_best_where_no_rate_helps_larger_ones() -> None:
    objective = Simulated(lambda point: valley(point.rate) + (point.size or 0))
    (found,) = search.tune([LORA], objective)
    assert found.best is not None
    assert found.best.size == LORA.sizes[0]


def test_methods_have_rates_of_their_own_and_the_best_comes_first() -> None:
    best = {"lora": 1e-4, "dora": 1e-3}
    objective = Simulated(lambda p: valley(p.rate, best[p.method]) + (p.method == "lora"))
    found = search.tune([Space(name, search.ladder(3e-4), sizes=(8,)) for name in best], objective)
    assert [one.method for one in found] == ["dora", "lora"]
    assert [one.best and round(math.log10(one.best.rate), 1) for one in found] == [-3.0, -4.0]


# ---- within a budget -------------------------------------------------------------------------------


@pytest.mark.parametrize("trials", range(1, 14))
def test_a_budget_of_trials_is_kept_and_treats_methods_alike(trials: int) -> None:
    objective = Simulated(lambda p: valley(p.rate), Budget(trials, "trials"))
    spaces = [Space(name, LORA.rates, sizes=LORA.sizes) for name in ("lora", "dora")]
    found = search.tune(spaces, objective)
    counts = [sum(point.method == one for point in objective.points) for one in ("lora", "dora")]
    assert sum(counts) == min(trials, 12)
    assert abs(counts[0] - counts[1]) <= 1
    assert found[0].best is not None


def test_a_larger_budget_goes_on_from_the_decisions_of_a_smaller_one() -> None:
    requests = []
    for trials in (3, 5, 9):
        objective = Simulated(lambda p: valley(p.rate, 1e-3), Budget(trials, "trials"))
        search.tune([LORA], objective)
        requests.append(objective.requests)
    for before, after in itertools.pairwise(requests):
        assert after[: len(before)] == before


def test_a_budget_of_steps_counts_those_of_trials_that_stopped() -> None:
    objective = Simulated(lambda p: valley(p.rate), Budget(70, "steps"))
    search.tune([LORA], objective)
    assert objective.account.steps == 3 * 10 + 2 * 20  # the budget is spent to its last step
    objective = Simulated(lambda p: valley(p.rate), Budget(69, "steps"))
    search.tune([LORA], objective)
    assert objective.account.steps == 50


def test_a_budget_of_time_starts_nothing_that_is_foreseen_to_end_later() -> None:
    now = [0.0]
    account = BudgetAccount(Budget(100, "seconds"), (None, None, None), lambda: now[0])
    points = [Point("lora", 10.0**-n, None, None, 0) for n in range(1, 9)]
    begun = []
    for batch in account.admit(points, Until.end, at_once=2):
        begun.append((now[0], len(batch)))
        now[0] += 30
        account.add_seconds(Until.end, 30.0)
    assert begun == [(0.0, 2), (30.0, 2), (60.0, 2)]


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("40trials", Budget(40, "trials")),
        ("1trial", Budget(1, "trials")),
        ("5000 steps", Budget(5000, "steps")),
        ("90m", Budget(5400, "seconds")),
        ("1.5h", Budget(5400, "seconds")),
        (None, None),
    ],
)
def test_a_budget_is_trials_steps_or_time(text: str | None, budget: Budget | None) -> None:
    assert parse(text) == budget


@pytest.mark.parametrize(
    "text", ["40", "0trials", "40runs", "2.5trials", "-2h", "h", "0h", "40 Trials", "nan h", "1e3steps", ""]
)
def test_another_budget_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"^budget="):
        parse(text)


# ---- equal effort ----------------------------------------------------------------------------------


@pytest.mark.parametrize("trials", [1, 2, 3, 5, 8, 13])
def test_every_contestant_of_a_league_has_the_same_number_of_trials(trials: int) -> None:
    spaces = [LORA, Space("ia3", search.ladder(5e-3)), Space("vera", search.ladder(1e-3), sizes=(64, 128))]
    spaces.append(Space("diverges", search.ladder(1e-1), sizes=(1, 2)))
    losses = {"lora": 1e-5, "ia3": 5e-3, "vera": 1.0}
    objective = Simulated(lambda p: valley(p.rate, losses[p.method]) if p.method in losses else None)
    seeds = {space.method: number for number, space in enumerate(spaces)}
    found = search.equally(spaces, objective, trials, seeds)
    for space, one in zip(spaces, found, strict=True):
        own = [point for _, point, _ in objective.requests if point.method == space.method]
        assert (len(own), len(set(own))) == (trials, trials)
        assert {point.seed for point in own} == {seeds[space.method]}
        assert (one.best is None) == (space.method == "diverges")
    assert {until for _, _, until in objective.requests} == {Until.end}


def test_a_league_tries_a_rate_again_at_the_best_size_too() -> None:
    def loss(point: Point) -> float:
        return valley(point.rate, 4.5e-4 / (point.size or 4) ** 0.5 * 2) - (point.size or 0)

    space = Space("lora", (6e-5, 2e-4, 6e-4, 2e-3), sizes=(4, 8, 16))
    objective = Simulated(loss)
    (found,) = search.equally([space], objective, 8, {"lora": 0})
    assert found.best is not None
    assert (found.best.size, found.best.rate < 4e-4, len(objective.points)) == (16, True, 8)


def test_rates_that_the_best_lies_between_are_tried_closer_together() -> None:
    objective = Simulated(lambda p: valley(p.rate, 1.6e-4))
    search.equally([Space("ia3", search.ladder(1e-4))], objective, 5, {"ia3": 0})
    rates = [point.rate for _, point, _ in objective.requests]
    assert rates[3] == pytest.approx(math.sqrt(1e-4 * 3.16e-4), rel=1e-4)
