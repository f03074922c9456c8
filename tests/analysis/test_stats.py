"""What is said of a study, against studies whose truth is known."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats as reference

from peftsweep.analysis.statistics import comparisons, effects, frontier, intervals, rungs, stats, trials
from peftsweep.analysis.statistics import measured as statistics_measured
from peftsweep.analysis.statistics.measured import Measured
from peftsweep.analysis.statistics.trials import Floats
from peftsweep.analysis.table import columns

ACCURACY, PERPLEXITY = "eval_info.task.accuracy.value", "eval_info.task.perplexity.value"


def trial(number: int, rank: int, seed: int, accuracy: float | None, **extra: Any) -> dict[str, Any]:
    """A row of the table of trials; ``accuracy`` None is one that failed."""
    failed = accuracy is None
    return {
        "run_info.trial": f"t{number}",
        "run_info.status": "failed" if failed else "success",
        "run_info.created_at": f"2026-01-01T00:00:{number:02}",
        "choices.method": "lora",
        "choices.quant": "none",
        "config.method.r": rank,
        "config.method.lora_alpha": 2 * rank,
        "config.seed": seed,
        "config.label": None,
        "train_info.adapter_bytes": None if failed else 1000 * rank,
        "train_info.train_seconds": None if failed else 10.0 + seed,
        ACCURACY: accuracy,
        "eval_info.task.accuracy.stderr": None if accuracy is None else math.sqrt(accuracy * (1 - accuracy) / 99),
        "eval_info.task.accuracy.n": None if failed else 100,
        **extra,
    }


def study(scores: dict[int, Sequence[float | None]], **extra: Any) -> pd.DataFrame:
    """A study of ranks, each with its seeds' accuracies."""
    cells = [(rank, seed, score) for rank, seeds in scores.items() for seed, score in enumerate(seeds)]
    return pd.DataFrame([trial(n, *cell, **extra) for n, cell in enumerate(cells)]).convert_dtypes()


def answers(rows: dict[str, Sequence[bool]]) -> Callable[[str, str], list[dict[str, Any]]]:
    """Predictions of trials, given which of their rows are right."""

    def read(name: str, _: str) -> list[dict[str, Any]]:
        return [{"prompt": str(n), "answer": "", "correct": bool(right)} for n, right in enumerate(rows[name])]

    return read


def drawn(
    generator: np.random.Generator, configs: int, seeds: int, spread: Sequence[float], rows: int = 200
) -> Measured:
    """Configurations of the same expected score: logits of rows, of seeds (``spread`` of each), then right or wrong."""
    logits = generator.normal(0, 1.5, (1, 1, rows))
    logits = logits + generator.normal(0, 1, (configs, seeds, 1)) * np.asarray(spread)[:, None, None]
    by_row = (generator.random((configs, seeds, rows)) < 1 / (1 + np.exp(-logits))).astype(float)
    return measured(by_row)


def measured(by_row: Floats) -> Measured:
    """What ``stats.measure`` makes of each configuration's, seed's and row's score [configurations, seeds, rows]."""
    configs, seeds, rows = by_row.shape
    numbers = np.arange(configs, dtype=np.int64)
    places, counts = np.repeat(numbers, seeds), np.full(configs, seeds, dtype=np.int64)
    means = by_row.mean(axis=2)
    of_rows = by_row.mean(axis=1)
    between = means.var(axis=1, ddof=1) if seeds > 1 else np.full(configs, np.nan)
    answered = statistics_measured._interaction(by_row.reshape(-1, rows), of_rows, places, counts)
    missing = np.full(configs, np.nan)
    return Measured(ACCURACY, False, numbers, means.mean(axis=1), counts, between, answered, of_rows, missing)


# ---- configurations --------------------------------------------------------------------------------


def test_trials_that_differ_only_in_their_seed_become_one_row() -> None:
    found = stats.configurations(study({8: [0.4, 0.5, 0.6], 16: [0.7, 0.8, None]}))
    assert found["config.method.r"].tolist() == [8, 16]
    assert (found["n"].tolist(), found["failed"].tolist()) == ([3, 2], [0, 1])
    assert found[ACCURACY].tolist() == pytest.approx([0.5, 0.75])
    assert found[f"{ACCURACY}.std"].tolist() == pytest.approx([0.1, math.sqrt(0.005)])
    assert found[f"{ACCURACY}.interval"].tolist() == ["seeds", "seeds"]
    assert found["trials"].tolist() == [["t0", "t1", "t2"], ["t3", "t4"]]


def test_the_interval_over_seeds_is_student_s_and_two_equal_seeds_are_no_certainty() -> None:
    bounds = [f"{ACCURACY}.low", f"{ACCURACY}.high"]
    alone = stats.configurations(study({8: [0.4, 0.5, 0.6]}))
    expected = reference.t.interval(0.95, 2, loc=0.5, scale=0.1 / math.sqrt(3))
    assert alone.loc[0, bounds].tolist() == pytest.approx(list(expected))
    beside = stats.configurations(study({8: [0.4, 0.5, 0.6], 16: [0.7, 0.7]}))
    low, high = beside.loc[1, bounds]
    assert low < 0.6
    assert high > 0.8


def test_what_changes_no_number_makes_no_configuration_and_a_setting_does() -> None:
    table = study({8: [0.4, 0.5]})
    table["config.study"], table["choices.tracker"] = ["a", "b"], ["none", "wandb"]
    assert len(stats.configurations(table)) == 1
    table["config.train.learning_rate"] = [1e-4, 2e-4]
    assert len(stats.configurations(table)) == 2


def test_one_seed_has_an_interval_over_rows_and_a_cost_none() -> None:
    found = stats.configurations(study({8: [0.0], 16: [0.5]}))
    assert found[f"{ACCURACY}.interval"].tolist() == ["rows", "rows"]
    assert found[f"{ACCURACY}.low"].tolist()[0] == 0.0
    assert found[f"{ACCURACY}.high"].tolist()[0] == pytest.approx(0.038, abs=0.002)  # Wilson's, which is not empty at 0
    assert found["train_info.train_seconds.interval"].isna().all()


def test_a_repeated_seed_is_no_second_draw() -> None:
    table = pd.concat([study({8: [0.4, 0.6]})] * 2, ignore_index=True)
    table["run_info.status"] = ["success", "success", "failed", "success"]
    found = stats.configurations(table)
    assert (found["n"].tolist(), found["failed"].tolist()) == ([2], [0])
    assert found[ACCURACY].tolist() == pytest.approx([0.5])
    assert stats.configurations(table.assign(configuration=trials.identify(table)))["n"].tolist() == [2]


def test_a_trial_with_one_evaluation_more_is_the_same_configuration() -> None:
    table = study({8: [0.4, 0.5]})
    table["config.eval.other.samples"] = [None, 100]
    assert len(stats.configurations(table)) == 1
    table["config.eval.other.samples"] = [50, 100]
    assert len(stats.configurations(table)) == 2


def test_directions_are_known() -> None:
    assert [columns.direction(c) for c in (ACCURACY, PERPLEXITY, "train_info.adapter_bytes")] == [1, -1, -1]
    assert columns.direction("train_info.tokens_per_second") == 1
    assert columns.direction("memory.train.allocated_peak") == -1
    assert columns.direction("generation_info.overall.adapted.seconds_per_token_p50") == -1
    assert columns.direction("train_info.steps") == columns.direction("config.method.r") == 0


# ---- intervals and ties, on studies whose truth is known -------------------------------------------


def test_the_interval_over_seeds_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    table = pd.concat([study({8: [0.5, 0.5, 0.5]})] * 1000, ignore_index=True)
    table["config.method.r"] = np.repeat(np.arange(1000), 3)
    table[ACCURACY] = generator.normal(0.5, 0.05, len(table))
    found = stats.configurations(table)
    covered = (found[f"{ACCURACY}.low"] <= 0.5) & (found[f"{ACCURACY}.high"] >= 0.5)
    assert 0.93 <= covered.mean() <= 0.97


@pytest.mark.parametrize(
    ("seeds", "spread"),
    [(3, 0.5), *(pytest.param(*one, marks=pytest.mark.slow) for one in ((1, 0.0), (2, 0.2), (3, 0.0), (5, 0.2)))],
)
def test_the_interval_over_seeds_and_rows_covers_the_truth(seeds: int, spread: float) -> None:
    generator = np.random.default_rng(seeds)
    covered = []
    for _ in range(250):  # studies of four configurations each: 1,000 intervals
        found = drawn(generator, 4, seeds, [spread] * 4).intervals()
        covered.append(((found["low"] <= 0.5) & (found["high"] >= 0.5)).mean())
    print(f"seeds {seeds}, spread {spread}: {np.mean(covered):.1%} of 1,000 intervals cover the truth")
    assert 0.93 <= np.mean(covered) <= 0.975


@pytest.mark.parametrize(
    ("logit", "rows", "width"), [(-6.0, 40, 0.35), pytest.param(-4.0, 200, 0.5, marks=pytest.mark.slow)]
)
def test_a_share_near_0_beside_others_that_vary_has_an_interval_that_covers_and_says_something(
    logit: float, rows: int, width: float
) -> None:
    """Its seeds are taken to vary as those of the others, which is more than it can: 0 of 80 was "from 0 to 1"."""
    generator = np.random.default_rng(rows)
    draws = logit + generator.normal(0, 0.7, 100_000) + generator.normal(0, 1, 100_000)  # a seed's part and a row's
    truth = float((1 / (1 + np.exp(-draws))).mean())
    found = []
    for _ in range(150):
        logits = np.array([-1.0, -1.0, logit])[:, None, None] + generator.normal(0, 0.7, (3, 2, 1))
        logits = logits + generator.normal(0, 1, (1, 1, rows))
        right = (generator.random(logits.shape) < 1 / (1 + np.exp(-logits))).astype(float)
        found.append(measured(right).intervals().loc[2, ["low", "high"]].astype(float).tolist())
    low, high = np.array(found).T
    assert ((low <= truth) & (truth <= high)).mean() >= 0.93
    assert np.median(high - low) < width
    assert (high >= 1 - 0.025 ** (1 / rows)).all()  # what 0 of the rows leaves possible, by Clopper and Pearson


@pytest.mark.parametrize(
    ("configs", "seeds", "spread"),
    [
        # Seeds that spread unequally in the fast tier.
        pytest.param(2, 1, [0.0] * 2, marks=pytest.mark.slow),
        pytest.param(6, 1, [0.0] * 6, marks=pytest.mark.slow),
        pytest.param(2, 3, [0.2] * 2, marks=pytest.mark.slow),
        pytest.param(6, 2, [0.1] * 6, marks=pytest.mark.slow),
        pytest.param(6, 3, [0.5] * 6, marks=pytest.mark.slow),
        (6, 3, [0.05, 0.1, 0.2, 0.3, 0.4, 0.5]),
        pytest.param(12, 3, [0.2] * 12, marks=pytest.mark.slow),
    ],
)
def test_equal_methods_are_a_tie_in_95_of_100_studies(configs: int, seeds: int, spread: list[float]) -> None:
    generator = np.random.default_rng(configs + seeds)
    first, second = np.triu_indices(configs, 1)
    studies = (drawn(generator, configs, seeds, spread).pairs(first, second) for _ in range(400))
    ties = np.mean([(comparisons.holm(p) >= 0.05).all() for _, p in studies])
    assert ties >= 0.93  # 0.95 less two standard errors of 400 studies


def of_seeds(scores: Floats) -> Measured:
    """Configurations of which the scores of their seeds alone [configurations, seeds] are known, and no rows."""
    configs, seeds = scores.shape
    counts, none = np.full(configs, seeds, dtype=np.int64), np.zeros(configs)
    between, missing = scores.var(axis=1, ddof=1), np.full(configs, np.nan)
    return Measured(PERPLEXITY, False, np.arange(configs), scores.mean(axis=1), counts, between, none, None, missing)


@pytest.mark.parametrize(
    ("seeds", "ratio"),
    [(2, 30), *(pytest.param(n, r, marks=pytest.mark.slow) for n in (2, 3, 5) for r in (1, 3, 10, 100))],
)
def test_seeds_that_spread_unequally_are_told_apart_in_at_most_6_of_100_studies(seeds: int, ratio: float) -> None:
    """It was 12 of 100 with two seeds: each configuration's variance was taken to be known by its own seeds."""
    generator, one, other = np.random.default_rng(seeds), np.array([0]), np.array([1])
    spread = np.array([[ratio], [1.0]])
    shown = [of_seeds(generator.normal(0, spread, (2, seeds))).pairs(one, other)[1][0] < 0.05 for _ in range(600)]
    assert np.mean(shown) <= 0.062 + 2 * math.sqrt(0.06 * 0.94 / 600)


def test_the_variance_of_a_mean_is_that_of_the_two_way_analysis_of_variance() -> None:
    """What seeds answer differently row by row is in the variance between rows already, and is counted once."""
    seeds, n = 3, 50
    scores = np.random.default_rng(0).normal(0, 1, (seeds, n)) + np.array([[0.0], [0.5], [1.5]]) + np.linspace(2, 9, n)
    means, rows = scores.mean(axis=1), scores.mean(axis=0)
    apart = scores - means[:, None] - rows + scores.mean()
    of_seeds, of_both = n * means.var(ddof=1), (apart**2).sum() / ((seeds - 1) * (n - 1))  # mean squares
    expected = (of_seeds - of_both) / (n * seeds) + rows.var(ddof=1) / n
    assert measured(scores[None]).contrasts(np.eye(1)).stderr[0] ** 2 == pytest.approx(expected)


@pytest.mark.parametrize("configs", [2, 6])
def test_seeds_that_spread_alike_are_compared_by_the_variance_of_all_of_them(configs: int) -> None:
    scores = np.array([0.0, 1.0, 2.0]) + np.arange(configs)[:, None] ** 2
    contrast, p = of_seeds(scores).pairs(np.array([0]), np.array([1]))
    assert contrast.df.tolist() == pytest.approx([2 * configs])
    if configs == 2:
        assert p.tolist() == pytest.approx([reference.ttest_ind(*scores).pvalue])


# ---- few rows, extreme rates, rows that all agree ---------------------------------------------------

FEW = (8, 12, 20, 50)


def test_rows_of_which_none_differs_leave_as_much_doubt_as_their_number() -> None:
    right = {name: [True] * 6 + [False] * 6 for name in ("t0", "t1")}
    found = comparisons.compare(study({8: [0.5], 16: [0.5]}), ACCURACY, answers(right)).iloc[1]
    exact = 1 - 0.025 ** (1 / 12)  # as many rows may differ, and 12 in a row not show it
    assert exact == pytest.approx(0.265, abs=0.001)
    assert (found["low"], found["high"], found["verdict"]) == (pytest.approx(-exact), pytest.approx(exact), "tie")


def test_scores_of_0_without_a_record_of_rows_leave_doubt_too() -> None:
    found = comparisons.compare(study({8: [0.0], 16: [0.0]}, **{"eval_info.task.accuracy.n": 12}), ACCURACY).iloc[1]
    assert found["verdict"] == "tie"
    assert -0.3 < found["low"] < -0.15


@pytest.mark.parametrize("n", FEW)
def test_the_interval_of_a_paired_difference_covers_the_truth_of_every_outcome(n: int) -> None:
    first, second = np.array([(a, b) for a in range(n + 1) for b in range(n + 1 - a)]).T
    low, high = intervals.paired_interval(first, second, n)
    for discordance, share in itertools.product((0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5), (0.5, 0.75, 1.0)):
        p, q = discordance * share, discordance * (1 - share)
        chances = reference.multinomial.pmf(np.stack([first, second, n - first - second], 1), n, [p, q, 1 - p - q])
        covers = (low <= p - q + 1e-9) & (p - q - 1e-9 <= high)
        assert chances[covers].sum() >= 0.95


def test_the_interval_of_a_paired_difference_holds_0_where_mcnemar_s_test_shows_none() -> None:
    first, second = np.array([(a, b) for a in range(41) for b in range(41 - a)]).T
    low, high = intervals.paired_interval(first, second, 40)
    shown = np.array(
        [
            reference.binomtest(int(a), int(a + b)).pvalue < 0.05 if a + b else False
            for a, b in zip(first, second, strict=True)
        ]
    )
    assert ((low <= 0) & (high >= 0))[~shown].all()
    assert ((low >= 0) | (high <= 0))[shown].all()


@pytest.mark.parametrize("n", FEW)
def test_the_interval_of_a_share_is_exact_at_0_and_1_and_covers_the_truth(n: int) -> None:
    right = np.arange(n + 1)
    low, high = intervals.clopper_pearson(right.astype(float), np.full(n + 1, float(n)))
    assert (low[0], high[-1]) == (0, 1)
    for count in right.tolist():
        expected = reference.binomtest(count, n).proportion_ci(method="exact")
        assert (low[count], high[count]) == pytest.approx((expected.low, expected.high))
    for rate in (0.0, 0.01, 0.1, 0.5, 0.99, 1.0):
        covers = (low <= rate) & (rate <= high)
        assert reference.binom.pmf(right, n, rate)[covers].sum() >= 0.95


@pytest.mark.parametrize("n", [FEW[0], *(pytest.param(n, marks=pytest.mark.slow) for n in FEW[1:])])
def test_intervals_of_three_seeds_cover_the_truth_at_few_rows_and_extreme_rates(n: int) -> None:
    generator = np.random.default_rng(n)
    for rate, discordance, noise in itertools.product((0.0, 0.01, 0.99, 1.0), (0.0, 0.2), (0.0, 0.05)):
        covered = []
        for _ in range(60):
            rows = np.repeat((generator.random(n) < rate)[None], 2, axis=0)
            differs, first = generator.random(n) < discordance, generator.random(n) < 0.75
            rows[0, differs], rows[1, differs] = first[differs], ~first[differs]
            by_seed = rows[:, None] ^ (generator.random((2, 3, n)) < noise)
            low, high = measured(by_seed.astype(float)).pairs(np.array([0]), np.array([1]))[0].interval
            covered.append(low[0] <= discordance / 2 * (1 - 2 * noise) <= high[0])
        assert np.mean(covered) >= 0.88  # 0.95 less two and a half standard errors of 60 studies


@pytest.mark.parametrize(("right", "n"), [(0, 12), (12, 12), (0, 1), (1, 1), (1, 2)])
def test_a_share_of_few_rows_has_an_exact_interval_with_one_seed_and_with_seeds_that_agree(right: int, n: int) -> None:
    score: dict[str, Any] = {ACCURACY: right / n, "eval_info.task.accuracy.n": n}
    score["eval_info.task.accuracy.stderr"] = math.sqrt(right / n * (1 - right / n) / (n - 1)) if n > 1 else None
    expected = reference.binomtest(right, n).proportion_ci(method="exact")
    for seeds in (1, 3):
        rows = [trial(seed, 8, seed, right / n, **score) for seed in range(seeds)]
        found = stats.configurations(pd.DataFrame(rows).convert_dtypes()).loc[0]
        bounds = [found[f"{ACCURACY}.{end}"] for end in ("low", "high")]
        assert bounds == pytest.approx([expected.low, expected.high])
        assert found[f"{ACCURACY}.interval"] == "rows"


def losses(*rows: Sequence[float]) -> tuple[pd.DataFrame, trials.Predictions]:
    """A study of perplexities: of each configuration the loss of each row, of one token."""
    lines = {
        f"t{n}": [{"prompt": str(i), "log_likelihood": -x, "tokens": 1} for i, x in enumerate(of)]
        for n, of in enumerate(rows)
    }
    table = []
    for n, of in enumerate(rows):
        value = math.exp(np.mean(of))
        stderr = value * np.std(of, ddof=1) / math.sqrt(len(of)) if len(of) > 1 else None
        score = {PERPLEXITY: value, "eval_info.task.perplexity.stderr": stderr, "eval_info.task.perplexity.n": len(of)}
        table.append(trial(n, 8 << n, 0, None) | {"run_info.status": "success"} | score)
    return pd.DataFrame(table).convert_dtypes(), lambda name, _: lines[name]


@pytest.mark.parametrize("rows", [[1.0], [1.0, 1.0], [1.0] * 12])
def test_a_perplexity_of_one_row_or_of_rows_that_all_agree_has_no_interval(rows: list[float]) -> None:
    table, lines = losses(rows, [x + 0.5 for x in rows])
    for predictions in (None, lines):
        found = stats.configurations(table, predictions)
        assert found[[f"{PERPLEXITY}.{part}" for part in ("low", "high", "interval")]].isna().all(axis=None)
        compared = comparisons.compare(table, PERPLEXITY, predictions)
        assert compared["verdict"].tolist() == ["best", "unknown"]  # the same gap in each row is no certainty
        assert compared[["low", "high"]].iloc[1].isna().all()


def test_a_perplexity_of_two_rows_has_the_interval_of_student_s_t() -> None:
    table, lines = losses([1.0, 1.2], [1.5, 1.8])
    low, high = (stats.configurations(table, lines).loc[0, f"{PERPLEXITY}.{end}"] for end in ("low", "high"))
    expected = reference.t.interval(0.95, 1, loc=1.1, scale=0.1)
    assert (math.log(low), math.log(high)) == pytest.approx(expected)


def test_losses_that_are_the_same_in_every_row_are_a_tie_of_unknown_width() -> None:
    table, lines = losses([1.0, 1.2, 1.4], [1.0, 1.2, 1.4])
    found = comparisons.compare(table, PERPLEXITY, lines).iloc[1]
    assert (found["verdict"], found["difference"]) == ("tie", 0)
    assert math.isnan(found["low"])


def test_redraws_of_rows_that_all_agree_are_not_all_the_same() -> None:
    same = np.ones((2, 1, 12))
    drawn_values = measured(same).draws(400, np.random.default_rng(0))
    gaps = drawn_values[:, 0] - drawn_values[:, 1]
    assert 0.3 < (gaps > 0).mean() < 0.7
    assert 0.05 < gaps.std() < 0.2


def test_a_real_difference_is_found() -> None:
    generator = np.random.default_rng(3)
    found = 0
    for _ in range(50):
        right = generator.random((2, 3, 300)) < np.array([0.6, 0.8])[:, None, None]
        _, p = measured(right.astype(float)).pairs(np.array([0]), np.array([1]))
        found += bool(p[0] < 0.05)
    assert found >= 48


# ---- comparisons -----------------------------------------------------------------------------------


def test_right_and_wrong_answers_of_one_seed_are_compared_by_mcnemar() -> None:
    first = [True] * 60 + [False] * 40
    second = [True] * 50 + [False] * 10 + [True] * 2 + [False] * 38
    found = comparisons.compare(study({8: [0.6], 16: [0.52]}), ACCURACY, answers({"t0": first, "t1": second}))
    assert found.loc[1, "p"] == pytest.approx(reference.binomtest(2, 12).pvalue)
    assert found["verdict"].tolist() == ["best", "worse"]
    assert found.loc[1, "difference"] == pytest.approx(-0.08)


def test_paired_rows_agree_with_the_paired_bootstrap() -> None:
    generator = np.random.default_rng(5)
    base = generator.gamma(2, 1, 300)
    rows = np.stack([base, base + generator.normal(0.05, 0.3, 300)])
    contrasts, p = measured(rows[:, None, :]).pairs(np.array([1]), np.array([0]))
    differences = rows[1] - rows[0]
    boot = reference.bootstrap((differences,), np.mean, n_resamples=4000, rng=generator).confidence_interval
    low, high = (float(end[0]) for end in contrasts.interval)
    assert (low, high) == pytest.approx((boot.low, boot.high), abs=0.006)
    assert p[0] == pytest.approx(reference.ttest_1samp(differences, 0).pvalue)


def test_pairing_tells_apart_what_rows_of_their_own_could_not() -> None:
    generator = np.random.default_rng(1)
    first = generator.random(100) < 0.5
    second = first.copy()
    second[np.flatnonzero(~first)[:12]] = True  # right wherever the first is, and 12 times more
    table = study({8: [first.mean()], 16: [second.mean()]})
    assert comparisons.compare(table, ACCURACY)["verdict"].tolist() == ["best", "tie"]
    paired = comparisons.compare(table, ACCURACY, answers({"t0": list(first), "t1": list(second)}))
    assert paired["verdict"].tolist() == ["best", "worse"]


def test_rows_that_do_not_belong_to_the_record_are_not_used() -> None:
    table = study({8: [0.5], 16: [0.6]})
    good = answers({"t0": [True] * 50 + [False] * 50, "t1": [True] * 60 + [False] * 40})
    assert statistics_measured.measure(table, ACCURACY, good).rows is not None
    stale = answers({"t0": [True] * 70 + [False] * 30, "t1": [True] * 60 + [False] * 40})
    assert statistics_measured.measure(table, ACCURACY, stale).rows is None
    others = answers({"t0": [True] * 50 + [False] * 50, "t1": [True] * 6 + [False] * 4})
    assert statistics_measured.measure(table, ACCURACY, others).rows is None
    assert statistics_measured.measure(table, ACCURACY, lambda *_: []).rows is None


def test_perplexity_is_compared_by_ratios_of_its_rows() -> None:
    generator = np.random.default_rng(2)
    tokens = generator.integers(5, 40, 200)
    lines, table = {}, study({8: [0.5], 16: [0.6]})
    for n in range(2):
        losses = tokens * generator.normal(1.0 + 0.1 * n, 0.2, 200)
        rows = zip(losses.tolist(), tokens.tolist(), strict=True)
        lines[f"t{n}"] = [{"prompt": str(i), "log_likelihood": -x, "tokens": k} for i, (x, k) in enumerate(rows)]
        table.loc[n, PERPLEXITY] = math.exp(losses.sum() / tokens.sum())
    row = statistics_measured.row_scores(lines["t0"], "perplexity")
    assert row is not None
    assert math.exp(row.mean()) == pytest.approx(table.loc[0, PERPLEXITY])
    found = comparisons.compare(table, PERPLEXITY, lambda name, _: lines[name])
    assert found.index.tolist() == [0, 1]
    assert found.loc[1, "difference"] == pytest.approx(table.loc[1, PERPLEXITY] / table.loc[0, PERPLEXITY] - 1)
    assert (found.loc[1, "verdict"], found.loc[1, "scale"]) == ("worse", "ratio")


def test_holm_is_what_its_definition_says() -> None:
    assert comparisons.holm(np.array([0.01, 0.04, 0.03])).tolist() == pytest.approx([0.03, 0.06, 0.06])
    assert comparisons.holm(np.array([0.01, 0.04]), 10).tolist() == pytest.approx([0.1, 0.36])


def test_ranks_leave_ties_together() -> None:
    right = {"t0": [True] * 90 + [False] * 10, "t1": [True] * 89 + [False] * 11, "t2": [True] * 20 + [False] * 80}
    found = comparisons.compare(study({8: [0.9], 16: [0.89], 32: [0.2]}), ACCURACY, answers(right))
    assert found["rank"].tolist() == [1, 1, 3]
    assert found["verdict"].tolist() == ["best", "tie", "worse"]
    assert found["near"].tolist() == [True, True, False]


def test_against_a_reference_that_is_given_there_is_better_too() -> None:
    right = {"t0": [True] * 20 + [False] * 80, "t1": [True] * 90 + [False] * 10}
    found = comparisons.compare(study({8: [0.2], 16: [0.9]}), ACCURACY, answers(right), reference=0)
    assert found["verdict"].to_dict() == {1: "better", 0: "reference"}


def test_a_tie_of_few_seeds_is_not_near_the_best() -> None:
    found = comparisons.compare(study({8: [0.3, 0.7], 16: [0.7, 0.72]}), ACCURACY)
    assert found.loc[0, "verdict"] == "tie"
    assert not found.loc[0, "near"]


def test_a_cost_of_one_seed_has_no_verdict() -> None:
    found = comparisons.compare(study({8: [0.5], 16: [0.6]}), "train_info.adapter_bytes")
    assert found["verdict"].tolist() == ["best", "unknown"]
    assert found.loc[1, "difference"] == pytest.approx(1.0)  # twice as large


def test_hundreds_of_configurations_are_compared_too() -> None:
    generator = np.random.default_rng(0)
    table = study({rank: list(generator.normal(0.5 + rank / 2000, 0.01, 2)) for rank in range(1, 300)})
    known = comparisons.tested(table, ACCURACY)
    assert known
    one, other = known.between(298, 297), known.between(297, 298)  # of which one was tested
    assert (one.estimate, one.low, one.high) == (-other.estimate, -other.high, -other.low)
    assert one.low < one.estimate < one.high
    untested = known.between(0, 160)  # neither is among the best 40
    assert untested.p < untested.p_adjusted == pytest.approx(untested.p * 299 * 298 / 2, abs=0)
    found = comparisons.compare(table, ACCURACY, known=known)
    assert len(found) == 299
    assert found["rank"].notna().sum() == trials.MAX_COMPARED
    assert found["value"].is_monotonic_decreasing
    assert found["verdict"].iloc[-1] == "worse"


# ---- the untouched base ----------------------------------------------------------------------------

BASE = "base/tiny-none-0/task-0.jsonl"


def over(table: pd.DataFrame, right: Sequence[bool], file: str | None = BASE) -> pd.DataFrame:
    """``table``, with the score of an untouched base that got these rows right, whose answers are in ``file``."""
    share, n = float(np.mean(right)), len(right)
    stderr = math.sqrt(share * (1 - share) / (n - 1))
    parts = {"base_accuracy.value": share, "base_accuracy.stderr": stderr, "base_accuracy.n": n}
    named = {f"eval_info.task.{key}": value for key, value in (parts | {"base_predictions": file}).items()}
    of_rows = (table[ACCURACY] * (1 - table[ACCURACY]) / (n - 1)) ** 0.5
    own = {"eval_info.task.accuracy.n": n, "eval_info.task.accuracy.stderr": of_rows}
    return table.assign(**named, **own).convert_dtypes()


def rows_of(both: int, first: int, second: int, n: int) -> tuple[list[bool], list[bool]]:
    """Right and wrong answers of two models: how many rows both got right, only one, only the other, of ``n``."""
    none = n - both - first - second
    return (
        [True] * both + [True] * first + [False] * second + [False] * none,
        [True] * both + [False] * first + [True] * second + [False] * none,
    )


def test_60_rows_gained_and_20_lost_of_500_are_a_gain_over_the_base() -> None:
    trained, base = rows_of(230, 60, 20, 500)
    table = over(study({8: [0.58], 16: [0.2]}), base)
    worse = [True] * 100 + [False] * 400
    found = comparisons.compare(table, ACCURACY, answers({"t0": trained, "t1": worse, BASE: base}))
    best = found.loc[0]
    assert best["gain"] == pytest.approx(0.08)
    assert (best["gain_low"], best["gain_high"]) == pytest.approx((0.08 - 0.036, 0.08 + 0.036), abs=0.003)
    # The largest p of three pairs: the two configurations, and each against the base.
    assert best["gain_p_adjusted"] == pytest.approx(reference.binomtest(20, 80).pvalue)
    assert best["gain_p_adjusted"] < 0.001
    assert found["gained"].to_dict() == {0: "better", 1: "worse"}
    assert found.attrs["gains_paired"]


def test_pairs_and_gains_over_the_base_are_adjusted_as_one_family() -> None:
    right = {"t0": [True] * 60 + [False] * 40, "t1": [True] * 50 + [False] * 50, BASE: [True] * 45 + [False] * 55}
    found = comparisons.compare(over(study({8: [0.6], 16: [0.5]}), right[BASE]), ACCURACY, answers(right))
    raw = np.array([reference.binomtest(0, n).pvalue for n in (10, 15, 5)])  # first less second, each less the base
    adjusted = comparisons.holm(raw)
    assert found.loc[1, "p_adjusted"] == pytest.approx(adjusted[0])
    assert found["gain_p_adjusted"].to_dict() == pytest.approx({0: adjusted[1], 1: adjusted[2]})


@pytest.mark.parametrize("file", [None, "base/other.jsonl", "base/stale.jsonl"])
def test_a_base_whose_rows_are_not_known_is_compared_as_if_on_rows_of_its_own(file: str | None) -> None:
    first, base = rows_of(230, 60, 20, 500)
    second, _ = rows_of(230, 10, 0, 500)
    stale = [not right for right in base[:400]] + base[400:]  # of another run: not what the record says
    table = over(study({8: [0.58], 16: [0.48]}), base, file)
    known = {"t0": first, "t1": second, "base/stale.jsonl": stale}
    found = comparisons.compare(table, ACCURACY, lambda name, _: answers(known)(name, _) if name in known else [])
    assert not found.attrs["gains_paired"]
    assert found.attrs["paired"]  # the configurations are, all the same
    half = 1.96 * math.sqrt((0.58 * 0.42 + 0.25) / 500)
    assert (found.loc[0, "gain_low"], found.loc[0, "gain_high"]) == pytest.approx((0.08 - half, 0.08 + half), abs=0.001)


def test_each_way_of_storing_the_base_has_a_base_of_its_own() -> None:
    right = {"t0": [True] * 60 + [False] * 40, "t1": [True] * 60 + [False] * 40}
    bases = {"base/none.jsonl": [True] * 60 + [False] * 40, "base/4bit.jsonl": [True] * 20 + [False] * 80}
    both = study({8: [0.6], 16: [0.6]})
    parts = [over(both.iloc[[n]], bases[file], file) for n, file in enumerate(bases)]
    found = comparisons.compare(pd.concat(parts), ACCURACY, answers(right | bases))
    assert found["gain"].to_dict() == pytest.approx({0: 0.0, 1: 0.4})
    assert found["gained"].to_dict() == {0: "tie", 1: "better"}


def test_records_without_the_base_s_file_take_that_of_the_same_base() -> None:
    trained, base = rows_of(230, 60, 20, 500)
    both = study({8: [0.58], 16: [0.58]})
    table = pd.concat([over(both.iloc[[0]], base, None), over(both.iloc[[1]], base)])
    found = comparisons.compare(table, ACCURACY, answers({"t0": trained, "t1": trained, BASE: base}))
    assert found.attrs["gains_paired"]
    assert found["gain_p_adjusted"].max() < 0.001


def test_the_base_has_no_seed_and_seeds_are_tested_against_its_rows() -> None:
    generator, ties = np.random.default_rng(0), []
    for _ in range(400):
        logits = generator.normal(0, 1.5, 200)
        seeds = logits + generator.normal(0, 0.3, (3, 1))
        by_row = generator.random((2, 3, 200)) < 1 / (1 + np.exp(-np.stack([np.tile(logits, (3, 1)), seeds])))
        by_row[0] = by_row[0, :1]  # one base
        of = measured(by_row.astype(float))
        numbers = np.array([-1, 0], dtype=np.int64)
        of = dataclasses.replace(of, numbers=numbers, seeds=np.array([1, 3]), between=np.array([np.nan, of.between[1]]))
        ties.append(of.pairs(np.array([1]), np.array([0]))[1][0] >= 0.05)
    assert 0.93 <= np.mean(ties) <= 0.985


def test_several_seeds_have_one_base_and_a_gain_over_it() -> None:
    generator = np.random.default_rng(4)
    base = generator.random(300) < 0.5
    seeds = {f"t{n}": list(base | (generator.random(300) < 0.3)) for n in range(3)}
    table = over(study({8: [float(np.mean(rows)) for rows in seeds.values()]}), list(base))
    found = comparisons.compare(table, ACCURACY, answers(seeds | {BASE: list(base)}))
    assert found["gained"].tolist() == ["better"]
    assert found["chance"].tolist() == ["seeds and rows"]
    assert found.loc[0, "gain_low"] > 0.1


def test_a_perplexity_is_compared_with_the_base_s_by_ratio() -> None:
    generator = np.random.default_rng(2)
    before = generator.normal(2.0, 0.5, 100)
    after = before - generator.normal(0.1, 0.05, 100)
    table, lines = losses(after, before)
    trained = table.iloc[[0]].assign(**{"eval_info.task.base_perplexity.value": table.loc[1, PERPLEXITY]})
    trained["eval_info.task.base_predictions"] = BASE
    found = comparisons.compare(trained, PERPLEXITY, lambda name, metric: lines("t1" if name == BASE else name, metric))
    assert found.loc[0, "gain"] == pytest.approx(math.exp((after - before).mean()) - 1)
    assert (found.loc[0, "gained"], found.loc[0, "gain_high"] < 0) == ("better", True)


# ---- factors ---------------------------------------------------------------------------------------


def grid(effect: float, seeds: int = 3) -> pd.DataFrame:
    """Ranks x quantisations, of which 4bit costs ``effect``; the accuracy grows by 0.1 a doubling up to rank 16."""
    generator = np.random.default_rng(1)
    rows = []
    for rank in (4, 8, 16, 32):
        for quant in ("none", "4bit"):
            for seed in range(seeds):
                score = 0.4 + 0.1 * min(math.log2(rank), 4) - effect * (quant == "4bit") + generator.normal(0, 0.01)
                own = {"choices.quant": quant, "config.quant.bits": 4 if quant == "4bit" else None}
                rows.append(trial(len(rows), rank, seed, score, **own))
    return pd.DataFrame(rows).convert_dtypes()


def test_what_follows_from_a_choice_or_the_rank_is_no_factor_of_its_own() -> None:
    assert effects.factors(grid(0.1)) == ["choices.quant", "config.method.r"]  # not the bits, not lora_alpha
    assert effects.factors(study({8: [0.5, 0.6]})) == []


def test_the_effect_of_a_factor_is_that_put_in() -> None:
    found = effects.effects(grid(0.1), ACCURACY)
    row = found[found["factor"] == "choices.quant"].iloc[0]
    assert (row["level"], row["reference"], row["contexts"], row["agreeing"]) == ("4bit", "none", 4, 4)
    assert row["low"] < -0.1 < row["high"]
    assert (row["verdict"], row["high"] < 0) == ("worse", True)
    nothing = effects.effects(grid(0.0), ACCURACY)
    assert nothing[nothing["factor"] == "choices.quant"]["verdict"].tolist() == ["tie"]


def test_an_effect_uses_only_settings_that_have_both_levels() -> None:
    table = grid(0.1)
    missing = table["config.method.r"].eq(4) & table["choices.quant"].eq("4bit")
    found = effects.effects(table[~missing], ACCURACY)
    row = found[found["factor"] == "choices.quant"].iloc[0]
    assert row["contexts"] == 3
    assert row["difference"] == pytest.approx(-0.1, abs=0.02)


def test_returns_over_rank_end_where_they_were_made_to_end() -> None:
    found = effects.returns(grid(0.1), ACCURACY).set_index("level")
    assert found.loc[8, "gain"] == pytest.approx(0.1, abs=0.02)
    assert found.loc[8, "gain_low"] < 0.1 < found.loc[8, "gain_high"]
    assert found.loc[32, "gain_low"] < 0 < found.loc[32, "gain_high"]
    enough = found[found["verdict"].isin(["best", "tie"])]
    assert enough.index[0] == 16


def test_unequal_budgets_are_counted() -> None:
    table = grid(0.1)
    table["choices.method"] = ["dora" if rank == 4 else "lora" for rank in table["config.method.r"]]
    found = effects.budget(table)
    assert found["configurations"].to_dict() == {"dora": 2, "lora": 6}
    assert found["ranks"].to_dict() == {"dora": 1, "lora": 3}


# ---- fronts and correlations -----------------------------------------------------------------------


def test_the_front_is_what_a_comparison_of_all_pairs_finds() -> None:
    generator = np.random.default_rng(0)
    values = generator.integers(0, 12, (200, 3)).astype(float)
    as_good = (values[:, None] <= values[None]).all(axis=2)
    better = (values[:, None] < values[None]).any(axis=2)
    assert frontier.front(values).tolist() == (~(as_good & better).any(axis=0)).tolist()


def test_equal_costs_dominate_in_each_draw_as_they_do_on_the_front() -> None:
    drawn = np.random.default_rng(0).integers(0, 4, (50, 20, 2)).astype(float)
    expected = np.sum([frontier.front(one) for one in drawn], axis=0)
    assert frontier._times_on_front(drawn).tolist() == expected.tolist()


def test_a_front_tells_how_sure_it_is() -> None:
    table = study({8: [0.5, 0.51, 0.49], 16: [0.9, 0.91, 0.89], 32: [0.9, 0.93, 0.87]})
    found = frontier.pareto(table, stats.configurations(table), [ACCURACY, "train_info.adapter_bytes"])
    assert found["front"].tolist()[:2] == [True, True]
    assert found["share"].tolist()[:2] == [1.0, 1.0]  # the smallest, and the smallest of the good ones
    assert 0.2 < found["share"].tolist()[2] < 0.8
    with pytest.raises(ValueError, match="not known whether more or less is better"):
        frontier.pareto(table, stats.configurations(table), [ACCURACY, "config.method.r"])


def test_a_front_has_the_figures_of_the_other_tables() -> None:
    """Costs are compared by ratios, which geometric means belong to; a reader expects the mean of the seconds."""
    seconds = "train_info.train_seconds"
    table = study({8: [0.5, 0.5], 16: [0.6, 0.6]}).assign(**{seconds: [100.0, 300.0, 190.0, 190.0]})
    found = frontier.pareto(table, stats.configurations(table), [ACCURACY, seconds])
    assert found[seconds].tolist() == [200.0, 190.0]
    assert found["front"].tolist() == [False, True]


def test_rank_correlation_is_scipys_and_covers_the_truth() -> None:
    generator = np.random.default_rng(0)
    true = 6 / math.pi * math.asin(0.7 / 2)  # Spearman's of a normal pair whose Pearson's is 0.7
    covered = 0
    for _ in range(1000):
        x = generator.normal(size=30)
        y = 0.7 * x + math.sqrt(1 - 0.49) * generator.normal(size=30)
        found = rungs.rank_correlation(x.tolist(), y.tolist())
        covered += found.low <= true <= found.high
    assert found.rho == pytest.approx(reference.spearmanr(x, y).statistic)
    strong = rungs.rank_correlation([*range(9), 10, 9], [1, 0, *range(2, 11)])  # 1 - 6 * 4 / (11 * 120)
    half = 1.959964 * math.sqrt((1 + strong.rho**2 / 2) / 8)  # by Bonett and Wright, with 11 points
    assert strong.rho == pytest.approx(1 - 24 / 1320)
    assert (math.atanh(strong.high) - math.atanh(strong.low)) / 2 == pytest.approx(half)
    assert 930 <= covered <= 970
    assert math.isnan(rungs.rank_correlation([1.0, 1.0], [1.0, 2.0]).rho)


def test_rungs_say_where_the_winner_stood() -> None:
    losses = {"a": [3.0, 2.0, 1.0], "b": [2.0, 1.9, 1.8], "c": [1.0, 1.5, 1.6], "d": [4.0, None, None]}
    rows = [
        {"trial": name, "step": 10 * (n + 1), "validation_loss": value}
        for name, course in losses.items()
        for n, value in enumerate(course)
    ]
    found = rungs.rungs(pd.DataFrame(rows))
    assert found["step"].tolist() == [10, 20]
    assert found["n"].tolist() == [3, 3]
    assert found["rho"].tolist() == pytest.approx([-0.5, -0.5])
    assert found["place"].tolist() == [3, 3]  # keeping the best two would have lost it


def test_nothing_measured_is_no_error() -> None:
    empty = study({8: [None], 16: [None]})
    assert columns.scores(empty) == []
    assert columns.main_scores(empty) == []
    assert stats.configurations(empty)["n"].tolist() == [0, 0]
    assert comparisons.compare(empty, ACCURACY).empty
    assert effects.effects(empty, ACCURACY).empty
    assert effects.returns(empty, ACCURACY).empty
    assert frontier.pareto(empty, stats.configurations(empty), [ACCURACY]).empty
    assert rungs.rungs(pd.DataFrame({"trial": [], "step": []})).empty


# ---- what one configuration lacks leaves what is known of the others -------------------------------

STDERR, ROWS = "eval_info.task.accuracy.stderr", "eval_info.task.accuracy.n"


def test_a_configuration_without_a_standard_error_takes_nothing_from_the_other_comparisons() -> None:
    table = study({4: [0.2], 8: [0.5], 16: [0.9]})
    whole = comparisons.tested(table, ACCURACY)
    table.loc[1, STDERR] = None
    part = comparisons.tested(table, ACCURACY)
    assert whole
    assert part
    assert part.between(2, 0).p == pytest.approx(whole.between(2, 0).p)
    assert part.verdict(2, 0) == "better"
    assert {part.verdict(2, 1), part.verdict(1, 0)} == {"unknown"}
    assert all(math.isnan(end) for end in (part.between(2, 1).low, part.between(2, 1).high))
    assert comparisons.compare(table, ACCURACY)["verdict"].to_dict() == {2: "best", 1: "unknown", 0: "worse"}
    found = frontier.pareto(table, stats.configurations(table), [ACCURACY, "train_info.adapter_bytes"])
    assert found["front"].all()
    assert found["share"].isna().all()  # nobody knows how often


@pytest.mark.parametrize("value", [math.inf, math.nan, None])
def test_a_score_that_is_no_number_is_no_score_and_leaves_the_others_as_they_are(value: float | None) -> None:
    table = study({4: [0.2], 8: [0.5], 16: [0.9]})
    expected = comparisons.compare(table.drop(index=1), ACCURACY)
    table[ACCURACY] = pd.array([0.2, value, 0.9], dtype="Float64")
    found = comparisons.compare(table, ACCURACY)
    assert found.index.tolist() == [2, 0]
    assert found["p"].tolist()[1] == pytest.approx(expected["p"].tolist()[1])


def test_rows_without_a_figure_are_not_paired() -> None:
    table, lines = study({8: [0.5], 16: [0.5]}), answers({"t0": [True, False] * 50, "t1": [False, True] * 50})

    def read(name: str, metric: str) -> list[dict[str, Any]]:
        found = lines(name, metric)
        return [line | {"correct": math.nan} if name == "t1" and n == 7 else line for n, line in enumerate(found)]

    found = comparisons.compare(table, ACCURACY, read)
    assert not found.attrs["paired"]
    assert found["p"].tolist()[1] == 1.0


def test_one_right_and_one_wrong_row_show_no_difference_and_none_lies_beyond_1() -> None:
    for n, most in ((1, 0.5), (2, 0.3), (60, 1e-6)):
        table = study({8: [1.0], 16: [0.0]}).assign(**{ROWS: n, STDERR: 0.0})
        found = comparisons.compare(table, ACCURACY).loc[1]
        assert found["p"] < most
        assert -1 <= found["low"] <= found["difference"] == -1.0
        assert (found["p"] >= 0.05) == (n < 3)
        assert (found["high"] > 0) == (n < 3)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 12])
def test_shares_of_rows_of_their_own_that_are_equal_are_a_tie_in_at_least_93_of_100_studies(n: int) -> None:
    """By enumeration of all outcomes; with a right and a wrong row more the error stays close to 5% at any n."""
    counts = np.arange(n + 1)
    cells = [(int(a), int(b)) for a in counts for b in counts]
    table = study({rank: [a / n] for rank, a in enumerate(counts.tolist(), 1)}).assign(**{ROWS: n})
    table[STDERR] = (table[ACCURACY] * (1 - table[ACCURACY]) / max(n - 1, 1)) ** 0.5
    of = statistics_measured.measure(table, ACCURACY)
    p = of.pairs(np.array([a for a, _ in cells]), np.array([b for _, b in cells]))[1]
    for share in (0.02, 0.1, 0.3, 0.5, 0.8):
        chance = reference.binom.pmf(counts, n, share)
        error = sum(chance[a] * chance[b] for (a, b), one in zip(cells, p, strict=True) if one < 0.05)
        assert error <= 0.07


def test_seeds_judged_on_other_numbers_of_rows_are_not_compared_as_if_on_the_same() -> None:
    table = study({8: [0.50, 0.51, 0.52], 16: [0.60, 0.61, 0.62]})
    same = comparisons.compare(table, ACCURACY)
    assert (same["verdict"].tolist()[1], same["chance"].unique().tolist()) == ("worse", ["seeds"])
    table[ROWS] = pd.array([50, 50, 50, 100, 100, 100], dtype="Int64")
    table[STDERR] = (table[ACCURACY] * (1 - table[ACCURACY]) / (table[ROWS] - 1)) ** 0.5
    other = comparisons.compare(table, ACCURACY)
    assert (other["verdict"].tolist()[1], other["chance"].unique().tolist()) == ("tie", ["seeds and rows"])
    half = 1.96 * math.sqrt(0.51 * 0.49 / 50 + 0.61 * 0.39 / 100)  # of the rows alone, which is nearly all of it
    assert (other["high"] - other["low"]).iloc[1] / 2 == pytest.approx(half, rel=0.1)
    right = {f"t{n}": [True] * (50 + n) + [False] * (50 - n) for n in range(6)}
    told = study({8: [0.5, 0.51, 0.52], 16: [0.53, 0.54, 0.55]})

    def read(name: str, metric: str) -> list[dict[str, Any]]:
        found = answers(right)(name, metric)
        return found if name < "t3" else [line | {"prompt": f"other {line['prompt']}"} for line in found]

    assert comparisons.compare(told, ACCURACY, read)["chance"].unique().tolist() == ["seeds and rows"]


@pytest.mark.parametrize(
    ("metric", "expected"),
    [("wer", -1), ("brier_score", -1), ("task_ter_strict", -1), ("error_rate", -1), ("RMSE", -1), ("filter", 1)],
)
def test_of_metrics_of_errors_less_is_better(metric: str, expected: int) -> None:
    assert columns.direction(f"eval_info.task.{metric}.value") == expected


def of_three_factors() -> tuple[pd.DataFrame, comparisons.Tested, np.random.Generator]:
    """A study of three ranks, two quantisations and two rates, and a generator of scores for it."""
    cells = list(itertools.product((4, 8, 16), ("none", "4bit"), (1e-4, 3e-4)))
    keys = ("config.method.r", "choices.quant", "config.train.learning_rate")
    rows = [trial(n, 8, 0, 0.5, **dict(zip(keys, cell, strict=True))) for n, cell in enumerate(cells)]
    table = pd.DataFrame(rows).drop(columns="config.method.lora_alpha").convert_dtypes()
    known = comparisons.tested(table, ACCURACY)
    assert known
    return table, known, np.random.default_rng(5)


def drawn_effects(table: pd.DataFrame, known: comparisons.Tested, chances: Floats) -> pd.DataFrame:
    """The effects of a study whose rows [configurations, rows] are right with these chances."""
    of = measured((np.random.default_rng(int(chances.sum() * 1e6)).random(chances.shape) < chances)[:, None] * 1.0)
    return effects.effects(table, ACCURACY, known=dataclasses.replace(known, measured=of, exact=of))


def test_levels_that_are_compared_on_average_are_adjusted_for_the_levels_of_all_factors() -> None:
    table, known, generator = of_three_factors()
    found = drawn_effects(table, known, np.tile(generator.random(100), (12, 1)))
    of_two = found[found["factor"] != "config.method.r"]
    assert (found["contexts"] > 1).all()
    assert of_two["p_adjusted"].tolist() == pytest.approx(np.minimum(1, 5 * of_two["p"]).tolist())  # 3 + 1 + 1 pairs


@pytest.mark.slow
def test_no_choice_is_worth_anything_in_95_of_100_studies_in_which_none_is() -> None:
    table, known, generator = of_three_factors()
    studies = [drawn_effects(table, known, np.tile(generator.random(100), (12, 1))) for _ in range(300)]
    shown = np.mean([found["verdict"].isin(["better", "worse"]).any() for found in studies])
    assert shown <= 0.075  # 5%, and two standard errors of 300 studies
