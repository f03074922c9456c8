"""When a difference between finalists is shown, and what a league says; scores are drawn, nothing is trained."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

from peftsweep.analysis.statistics import comparisons
from peftsweep.analysis.statistics.trials import ALPHA
from peftsweep.study.record import Result
from peftsweep.tuning import decision, finals
from peftsweep.tuning.answer import Final
from peftsweep.tuning.budget import BudgetAccount
from peftsweep.tuning.finals import BETTER, OPEN, TIE, WORSE, Judged, Look
from peftsweep.tuning.search import Point
from peftsweep.tuning.space import Plan
from peftsweep.tuning.trials import Trials

COLUMN = "eval_info.task.accuracy.value"
SEEDS = 8
TIE_OF = 0.01


def judged(trial: str, correct: NDArray[np.float64]) -> Judged:
    value, n = float(correct.mean()), len(correct)
    lines: list[dict[str, Any]] = [{"prompt": row, "answer": "", "correct": float(c)} for row, c in enumerate(correct)]
    return Judged(trial, value, math.sqrt(value * (1 - value) / (n - 1)), n, lines)


class Task:
    """Test rows of differing difficulty, and models on them whose true scores vary with their seed."""

    def __init__(self, generator: np.random.Generator, rows: int, between_seeds: float) -> None:
        self._generator, self._spread = generator, between_seeds
        self._ease = generator.normal(0, 1, rows)

    def judge(self, method: str, seed: int, accuracy: float) -> Judged:
        """A model that would answer this share of all rows rightly, give or take its seed."""
        own = min(max(accuracy + self._generator.normal(0, self._spread), 0.01), 0.99)
        right = self._generator.random(len(self._ease)) < ndtr(ndtri(own) * math.sqrt(2) + self._ease)
        return judged(f"{method}-{seed}", right.astype(float))

    def finals(self, accuracies: Mapping[str, float], seeds: int) -> dict[str, dict[int, Judged]]:
        return {
            name: {seed: self.judge(name, seed, accuracy) for seed in range(seeds)}
            for name, accuracy in accuracies.items()
        }


def settle(task: Task, accuracies: Mapping[str, float]) -> Look:
    """Look after each seed from the second on, until it is settled or the seeds are used up; the last look."""
    known: dict[str, dict[int, Judged]] = {name: {} for name in accuracies}
    first, second = accuracies
    found: Look | None = None
    for seed in range(SEEDS):
        for name, accuracy in accuracies.items():
            known[name][seed] = task.judge(name, seed, accuracy)
        if seed:
            found = finals.look(COLUMN, known, first, second, seed, TIE_OF)
            if found.verdict != OPEN:
                break
    assert found is not None
    return found


def test_the_error_of_all_looks_together_is_that_of_one_interval() -> None:
    spent = [finals.spent_at(look) for look in range(1, 10_001)]
    assert spent == sorted(spent, reverse=True)
    assert sum(spent) == pytest.approx(ALPHA * (1 - 1 / 10_001))


def test_a_look_has_the_interval_of_its_own_level() -> None:
    """Two methods whose rows are all alike but for the seeds: Student's t of the seeds' differences, by hand."""
    correct = {"a": (70, 72, 74), "b": (50, 52, 54)}
    known = {
        name: {seed: judged(f"{name}{seed}", (np.arange(100) < count).astype(float)) for seed, count in enumerate(of)}
        for name, of in correct.items()
    }
    first, later = (finals.look(COLUMN, known, "a", "b", number, TIE_OF) for number in (1, 4))
    assert first.estimate == pytest.approx(0.2)
    assert (later.high - later.low) > (first.high - first.low)
    turned = finals.look(COLUMN, known, "b", "a", 1, TIE_OF)
    assert (turned.low, turned.high) == pytest.approx((-first.high, -first.low))
    shared = finals.look(COLUMN, known, "a", "b", 1, TIE_OF, rivals=3)
    assert shared.high - shared.low > first.high - first.low


def test_a_verdict_is_what_the_whole_interval_says() -> None:
    verdicts = [finals._verdict(*ends, 0.01) for ends in ((0.001, 0.1), (-0.1, -0.001), (-0.01, 0.01), (-0.01, 0.02))]
    assert verdicts == [BETTER, WORSE, TIE, OPEN]


def test_where_test_rows_alone_leave_the_doubt_no_seed_is_asked_for() -> None:
    few = Look(3, 0.01, -0.2, 0.2, OPEN, by_rows=0.15)
    assert finals.undecidable(few, 0.01)
    assert not finals.undecidable(Look(3, 0.01, -0.2, 0.2, OPEN, by_rows=0.005), 0.01)
    assert not finals.undecidable(Look(3, 0.16, -0.2, 0.2, OPEN, by_rows=0.15), 0.01)


def test_a_league_ranks_counts_the_placebos_wins_and_asks_for_seeds() -> None:
    task = Task(np.random.default_rng(0), 1000, 0.01)
    known = task.finals({"lora": 0.7, "dora": 0.9, "lora (placebo)": 0.7}, 3)
    found = finals.league(COLUMN, known, "lora", "lora (placebo)", 0.02)
    assert (found.standings[0].contestant, found.standings[0].rank) == ("dora", 1)
    assert {one.rank for one in found.standings[1:]} == {2}
    assert found.pairs == 9
    wins = sum(a.value > b.value for a in known["lora (placebo)"].values() for b in known["lora"].values())
    assert (found.wins, found.placebo_better) == (wins, False)
    assert finals.league(COLUMN, known, "lora", "lora (placebo)", 0.001).seeds is None
    assert (found.seeds or 0) > (finals.league(COLUMN, known, "lora", "lora (placebo)", 0.2).seeds or 0) >= 2


def test_the_seeds_that_a_league_asks_for_are_those_of_the_normal_sample_size() -> None:
    values = {seed: Judged(f"t{seed}", 0.68 + 0.02 * seed, None, None, []) for seed in range(3)}
    known = comparisons.tested(finals.table(COLUMN, {"lora": values, "dora": values}), COLUMN)
    assert known
    normal = 2 * 0.02**2 * (1.959964 + 0.841621) ** 2 / 0.01**2  # 62.8; Student's t asks for a few more
    assert normal < (finals.seeds_needed(known, 0.01) or 0) < normal + 4


# ---- by simulation ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "between_seeds"), [(200, 0.01), (400, 0.003), (2000, 0.01)])
def test_at_most_5_percent_of_tunings_call_equal_methods_different(rows: int, between_seeds: float) -> None:
    generator = np.random.default_rng(rows)
    found = Counter(settle(Task(generator, rows, between_seeds), {"a": 0.8, "b": 0.8}).verdict for _ in range(200))
    assert found[BETTER] + found[WORSE] <= 0.05 * 200, found


@pytest.mark.slow
def test_at_most_5_percent_of_tunings_call_a_difference_beyond_the_tie_a_tie_or_turn_it() -> None:
    generator = np.random.default_rng(0)
    found = Counter(settle(Task(generator, 3000, 0.003), {"a": 0.811, "b": 0.8}).verdict for _ in range(100))
    assert found[TIE] + found[WORSE] <= 0.05 * 100, found


@pytest.mark.slow
def test_leagues_call_a_placebo_better_in_at_most_5_percent_and_find_2_points_in_80_percent() -> None:
    generator = np.random.default_rng(0)
    accuracies = {"lora": 0.8, "dora": 0.82, "lora (placebo)": 0.8}

    def league(seeds: int) -> finals.League:
        known = Task(generator, 1500, 0.01).finals(accuracies, seeds)
        return finals.league(COLUMN, known, "lora", "lora (placebo)", 0.02)

    asked_for = [league(5).seeds for _ in range(20)]
    assert None not in asked_for
    seeds = int(np.median([one for one in asked_for if one is not None]))
    placebos, told_apart = 0, 0
    for _ in range(200):
        found = league(seeds)
        placebos += found.placebo_better
        rank = {one.contestant: one.rank for one in found.standings}
        told_apart += rank["lora"] > rank["dora"]
    assert (placebos <= 0.05 * 200, told_apart >= 0.8 * 200) == (True, True), (seeds, placebos, told_apart)


# ---- scores that are no numbers, and perplexities --------------------------------------------------


def test_a_final_score_that_is_not_finite_is_no_score_and_is_named(tmp_path: Path) -> None:
    account = BudgetAccount(None, (1, 1, 1), lambda: 0.0)
    trials = Trials(lambda _: [], [], Plan("accuracy", None, "1", 1), {}, account)
    for seed, value in enumerate((None, math.inf, 2.0)):
        point = Point("lora", 1e-4, 8, None, seed)
        facts = {"perplexity": {"perplexity": {"value": value, "stderr": None, "n": 10}}}
        about = {"status": "success", "trial": f"t{seed}"}
        trials.results[point] = Result(about, {}, {}, eval_info=facts, folder=tmp_path / f"t{seed}")
        found = trials.judged(point, "perplexity", "perplexity")
        assert (None if found is None else found.value) == (2.0 if value == 2.0 else None)
        assert (point in trials.refused) == (value != 2.0)


def test_finalists_are_ordered_by_the_mean_that_their_comparison_takes() -> None:
    column = "eval_info.perplexity.perplexity.value"
    values = {"lora": (5.0, 50.0), "dora": (20.0, 20.2)}
    scores = {
        name: {seed: Judged(f"{name}{seed}", value, 0.1, 10, []) for seed, value in enumerate(of)}
        for name, of in values.items()
    }
    one = finals.look(column, scores, "lora", "dora", 1, 0.01)
    assert one.estimate > 0  # lora is the better one
    order = Final(column, scores, [], spent=False).order(-1)
    assert order == ["lora", "dora"]
    made = decision.tuned_decision(column, scores, order, {name: name for name in values}, [])
    assert [found.value for found in made.finalists] == pytest.approx([math.sqrt(250.0), math.sqrt(404.0)])
