"""RESULTS.md says what the data carries, and no more."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from peftsweep.analysis.answer import render
from peftsweep.analysis.statistics import intervals as statistics_intervals
from peftsweep.analysis.table.table import predictions
from peftsweep.analysis.text import report

ROWS = 100


def trial(number: int, correct: int | None, seed: int = 0, **settings: Any) -> dict[str, Any]:
    """A row of the table of trials, ``correct`` of whose 100 test rows are right; None is one that failed."""
    good = correct is not None
    share = (correct or 0) / ROWS
    row = {
        "run_info.trial": f"t{number}",
        "run_info.status": "success" if good else "failed",
        "run_info.created_at": f"2026-01-01T00:00:{number:02}+00:00",
        "run_info.error.type": None if good else "RuntimeError",
        "run_info.error.message": None if good else "broken | badly\nand more",
        "run_info.error.stage": None if good else "train",
        "choices.model": "tiny",
        "choices.dataset": "task",
        "choices.method": "lora",
        "choices.quant": "none",
        "config.method.r": 8,
        "config.seed": seed,
        "train_info.adapter_bytes": 1000 * settings.get("config.method.r", 8) if good else None,
        "train_info.train_seconds": 10.0 + number if good else None,
        "memory.train.rss_peak": 5e8 if good else None,
        "eval_info.task.accuracy.value": share if good else None,
        "eval_info.task.accuracy.stderr": math.sqrt(share * (1 - share) / (ROWS - 1)) if good else None,
        "eval_info.task.accuracy.n": ROWS if good else None,
        "eval_info.task.base_accuracy.value": 0.1 if good else None,
        "eval_info.task.base_accuracy.stderr": 0.03 if good else None,
    }
    return row | settings


def table_of(folder: Path, *rows: dict[str, Any]) -> pd.DataFrame:
    """The table of a study of these trials, the first of whose test rows are those that are right."""
    for row in rows:
        if row["run_info.status"] == "success" and not pd.isna(row.get("eval_info.task.accuracy.value")):
            right = round(row["eval_info.task.accuracy.value"] * ROWS)
            lines = [{"prompt": str(n), "answer": "x", "correct": n < right} for n in range(ROWS)]
            file = folder / row["run_info.trial"] / "predictions" / "task.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return pd.DataFrame(rows).convert_dtypes()


def written(folder: Path, *rows: dict[str, Any], steps: pd.DataFrame | None = None, plots: tuple[str, ...] = ()) -> str:
    """The report of a study of these trials, see ``table_of``."""
    table = table_of(folder, *rows)
    files = [folder / "plots" / f"{name}.png" for name in plots]
    logged = pd.DataFrame() if steps is None else steps
    file, _ = report.write(folder, table, logged, files, predictions(folder))
    return file.read_text()


def ranks(*scores: int, seeds: int = 3) -> list[dict[str, Any]]:
    """A study of the ranks 8, 16, 32 ..., with seeds that differ by one row."""
    cells = [(8 * 2**n, score, seed) for n, score in enumerate(scores) for seed in range(seeds)]
    return [trial(i, score + seed % 2, seed, **{"config.method.r": r}) for i, (r, score, seed) in enumerate(cells)]


def test_a_study_is_told_from_its_answer_to_its_methods(tmp_path: Path) -> None:
    text = written(tmp_path, *ranks(40, 80, 81))
    heads = [line for line in text.splitlines() if line.startswith("## ")]
    assert heads == [
        "## What to use",
        "## How sure that is",
        "## What each choice was worth",
        "## What it costs",
        "## Ranking by task accuracy",
        "## Rank",
        "## Frontier",
        "## Recommendations",
        "## Rows won and lost",
        "## Methodology",
    ]
    assert "9 trials (9 success) of 3 configurations, 3 successful seeds each." in text
    assert "- **Use `lora, r=16`**: 0.803" in text  # near the best, and half its size
    assert "It is a tie with `lora, r=16`. 1 configuration of 3 is worse than one of these." in text
    assert "rank 16 is the smallest that is not separable from the best, 32" in text
    assert "The untouched base scores 0.100 on the same rows." in text
    assert "Seeds: 0, 1, 2; configurations: 3 with 3 seeds." in text


def test_every_table_is_one(tmp_path: Path) -> None:
    lines = written(tmp_path, *ranks(40, 80, 81), trial(20, None, **{"config.method.r": 64})).splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) > 10
    for above, below in itertools.pairwise(lines):
        if above.startswith("|") and below.startswith("|"):
            assert above.replace("\\|", "").count("|") == below.replace("\\|", "").count("|")


def test_one_seed_is_called_one_seed(tmp_path: Path) -> None:
    fixed = "costs measured once are the same in all of them"  # the redraws take them so
    text, of_several = (written(tmp_path / str(seeds), *ranks(40, 80, seeds=seeds)) for seeds in (1, 3))
    assert "**One seed each**: all of this is of these trained models" in text
    assert "which cover other test rows, but not other seeds: there is one seed each" in text
    assert "McNemar" in text
    assert "Student's t; a configuration's seeds" not in text
    assert fixed in text
    assert "One seed each" not in of_several
    assert fixed not in of_several


def test_the_advice_names_the_tie_it_was_chosen_from(tmp_path: Path) -> None:
    first, second, _ = (
        trial(n, share, **{"config.method.r": r}) for n, share, r in ((0, 92, 8), (1, 88, 16), (2, 40, 4))
    )
    assert "; the best figure by task accuracy, in a tie with `lora, r=16`." in written(tmp_path / "1", first, second)
    text = written(tmp_path / "2", first, second, trial(2, 87, **{"config.method.r": 32}))
    assert "; the best figure by task accuracy, in a tie with 2 more." in text
    text = written(tmp_path / "3", first, trial(1, 40, **{"config.method.r": 16}))
    assert "; the best by task accuracy." in text


def test_a_tie_for_lack_of_seeds_is_not_advised(tmp_path: Path) -> None:
    scores = [20, 60, 40, 75, 77, 76]
    wild = [trial(n, score, n % 3, **{"config.method.r": 8 + 8 * (n // 3)}) for n, score in enumerate(scores)]
    text = written(tmp_path, *wild)
    assert "is a tie with" in text or "are a tie" in text
    assert "- **Use `lora, r=16`**" in text  # not the smaller one, which may be far worse


def test_what_is_all_the_same_is_called_a_tie(tmp_path: Path) -> None:
    text = written(tmp_path, *ranks(70, 70, 70))
    assert "all 3 configurations are a tie with the same figure, 0.703" in text
    assert "ranks 8, 16, 32 have the same figure, 0.703" in text
    assert "best figure is that of" not in text
    assert "worse" not in text.partition("## Methodology")[0]


def test_failures_stay_visible_with_their_reason(tmp_path: Path) -> None:
    oom = trial(21, None, 1, **{"config.method.r": 16}) | {"run_info.status": "oom"}
    text = written(tmp_path, *ranks(40, 80)[:4], oom, trial(22, None, **{"config.method.r": 64}))
    assert "6 trials (4 success, 1 oom, 1 failed)" in text
    assert "| 1 (1 oom) |" in text
    assert "Without this score: `lora, r=64` (1 failed)." in text
    assert "2 trials ended without a result" in text
    failed = text.partition("## What failed")[2].partition("\n## ")[0]
    assert "1 failed in train: RuntimeError: broken | badly (`lora, r=64, seed=0`)." in failed
    assert "1 oom in train: broken | badly (`lora, r=16, seed=1`). Try a smaller train.batch_size" in failed


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], "No trial yet."),
        ([trial(0, None), trial(1, None, 1)], "No trial has succeeded, so there is nothing to recommend."),
        ([trial(0, 50)], "`lora` reaches task accuracy 0.500"),
        ([trial(0, 50), trial(1, None, **{"choices.quant": "4bit"})], "`lora, unquantised` reaches task accuracy"),
        ([trial(0, 0), trial(1, 0, **{"choices.quant": "4bit"})], "No gain shown"),
        pytest.param(  # a tie, as in the test of what is all the same
            [trial(0, 100), trial(1, 100, **{"choices.quant": "4bit"})],
            "both configurations are a tie",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_small_and_broken_studies_have_a_report(rows: list[dict[str, Any]], says: str, tmp_path: Path) -> None:
    assert says in written(tmp_path, *rows)


def test_a_study_without_scores_compares_nothing(tmp_path: Path) -> None:
    rows = [{k: v for k, v in row.items() if not k.startswith("eval_info")} for row in ranks(40, 80)]
    text = written(tmp_path, *rows)
    assert "No trial was judged by an evaluation" in text
    assert "Recommendations" not in text


def test_an_infinite_perplexity_is_a_missing_score(tmp_path: Path) -> None:
    score = {"eval_info.task.perplexity.value": None, "eval_info.task.perplexity.n": 100}
    rows = [row | score for row in ranks(40, 80)]
    rows[0]["eval_info.task.perplexity.value"] = 3.5
    assert "## Ranking by task accuracy" in written(tmp_path, *rows)


def test_scores_of_different_models_are_never_compared(tmp_path: Path) -> None:
    other = [row | {"choices.model": "large", "run_info.trial": f"l{n}"} for n, row in enumerate(ranks(90, 95))]
    text = written(tmp_path, *ranks(40, 80), *other)
    assert "## What to use (tiny on task)" in text
    assert "## What to use (large on task)" in text
    small = text.partition("## Ranking by task accuracy (tiny on task)")[2].partition("## Ranking")[0]
    assert "0.953" not in small
    assert "model" not in [line for line in text.splitlines() if line.startswith("## ")]


def test_different_test_rows_are_never_compared(tmp_path: Path) -> None:
    rows = [row | {"config.eval.task.samples": 100 + n // 3} for n, row in enumerate(ranks(40, 80))]
    assert "eval.task.samples=101" in written(tmp_path, *rows)


def test_figures_stand_where_they_belong_and_once(tmp_path: Path) -> None:
    text = written(tmp_path, *ranks(40, 80), plots=("rank_task", "frontier_task", "learning_curves"))
    assert text.index("## Rank\n") < text.index("![rank task](plots/rank_task.png)") < text.index("## Frontier")
    assert text.index("## Figures") < text.index("plots/learning_curves.png")
    assert [text.count(f"plots/{name}.png") for name in ("rank_task", "frontier_task", "learning_curves")] == [1, 1, 1]


def test_sizes_of_gpus_are_named_where_they_decide(tmp_path: Path) -> None:
    rows = ranks(40, 80)
    for row in rows:
        row["memory.train.reserved_peak"] = 6e9 if row["config.method.r"] == 8 else 14e9
    text = written(tmp_path, *rows)
    assert "8 GB of memory (6.0 GB memory the allocator held on the device while training)" in text
    assert "16 GB of memory (14.0 GB" in text
    assert "Every configuration fits" not in text


def test_warnings_come_with_the_scores_they_concern(tmp_path: Path) -> None:
    facts = {
        "eval_info.task.majority": 0.62,
        "eval_info.task.degenerate": True,
        "eval_info.task.seen_in_training": 7,
        "train_info.reloads": False,
    }
    text = written(tmp_path, *(row | facts for row in ranks(60, 62)))
    assert "**Chance level**: always giving the most frequent answer scores 0.620" in text
    assert "2 configurations nearly always gave the same answer" in text
    assert "**7 test rows of task were trained on**" in text
    assert "**2 configurations saved an adapter that answers unlike the trained model**" in text


def test_what_was_adapted_is_told_once_for_all_that_reach_as_far(tmp_path: Path) -> None:
    line = {"train_info.coverage.line": "adapts 7.1% of the weights: q; not experts (80% of them)"}
    text = written(tmp_path, *(row | line for row in ranks(60, 62)))
    assert text.count("adapts 7.1% of the weights: q; not experts (80% of them).") == 1
    assert "What was adapted: " in text


def test_unequal_budgets_are_told(tmp_path: Path) -> None:
    dora = [row | {"choices.method": "dora", "run_info.trial": f"d{n}"} for n, row in enumerate(ranks(70))]
    assert "(configurations: dora 1, lora 2; ranks: dora 1, lora 2)" in written(tmp_path, *ranks(40, 80), *dora)
    assert "Unequal" not in written(tmp_path, *ranks(40), *dora)


def test_stopped_trials_come_with_the_rank_correlation(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    steps = [
        {"trial": f"t{n}", "step": step, "validation_loss": n + 5.0 / step + generator.normal(0, 0.01)}
        for n in range(6)
        for step in (10, 20, 30)
    ]
    stopped = trial(9, None, **{"config.method.r": 64}) | {"run_info.status": "stopped"}
    text = written(tmp_path, *ranks(40, 80), stopped, steps=pd.DataFrame(steps))
    assert "1 trial was stopped early; how it would have ended is not known." in text
    assert "1.00" in text.partition("### Could it have been stopped earlier?")[2]


def test_methods_that_share_no_setting_are_compared_by_their_best(tmp_path: Path) -> None:
    other = [
        row | {"choices.method": "ia3", "config.method.r": None, "run_info.trial": f"i{n}"}
        for n, row in enumerate(ranks(60))
    ]
    text = written(tmp_path, *ranks(40, 80), *other)
    assert "The levels share no setting of the other factors" in text
    assert text.count("| ia3") >= 1


def test_the_summary_is_also_given_as_plain_text(tmp_path: Path) -> None:
    rows = [*ranks(40, 80), trial(22, None, **{"config.method.r": 64})]
    _, answer = report.write(tmp_path, pd.DataFrame(rows).convert_dtypes(), pd.DataFrame())
    lines = render.lines(answer)
    assert lines[0].startswith("Use lora, r=16: ")
    assert "What failed:" in lines
    assert lines[-1].startswith("  1 failed in train: RuntimeError: broken | badly (lora, r=64, seed=0). ")
    assert not [line for line in lines if "*" in line or "`" in line or "](" in line]


def test_what_a_pack_took_is_compared_with_nothing(tmp_path: Path) -> None:
    rows = ranks(70, 71, 72, seeds=2)
    for row in rows[2:4]:  # those of rank 16
        row |= {"run_info.packed_with": '["another"]', "train_info.train_seconds": 0.5, "memory.train.rss_peak": 10.0}
    text = written(tmp_path, *rows)
    assert "2 trials were trained in packs" in text
    level = next(line for line in text.split("## Rank\n")[1].splitlines() if line.startswith("|   16 "))
    assert [cell.strip() for cell in level.split("|")][-4:-2] == ["", ""]  # neither memory nor time
    assert " 0.5 s" not in text
    assert "Configurations without some of these figures: 1." in text


def test_nothing_is_recommended_that_does_not_beat_the_untouched_base(tmp_path: Path) -> None:
    base = {"eval_info.task.base_accuracy.value": 0.85}
    text = written(tmp_path, *(row | base for row in ranks(40, 80)))
    assert "**Use none of these**" in text
    assert "**Use `" not in text
    assert "## Recommendations" not in text


def test_intervals_of_two_equal_seeds_are_not_empty(tmp_path: Path) -> None:
    rows = [trial(n, 60 + 5 * (n // 2), n % 2, **{"config.method.r": 8 << n // 2}) for n in range(4)]
    text = written(tmp_path, *rows)
    assert "0.600 [0.600, 0.600]" not in text


def test_costs_are_told_where_nothing_was_judged(tmp_path: Path) -> None:
    rows = [{k: v for k, v in row.items() if not k.startswith("eval_info")} for row in ranks(40, 80)]
    text = written(tmp_path, *rows)
    assert "costs are all that can be compared" in text
    assert "| rank | resident memory | training time | adapter size |" in text


def test_a_factor_of_many_values_is_told_as_a_trend(tmp_path: Path) -> None:
    rates = [{"config.train.learning_rate": (n + 1) / 1000 if n < 39 else None} for n in range(40)]
    text = written(tmp_path, *(trial(n, 30 + n, **rate) for n, rate in enumerate(rates)))
    assert "Spearman's correlation with it is 1.00" in text


def test_what_loses_to_one_of_the_tie_is_not_called_worse_than_the_best(tmp_path: Path) -> None:
    scores = {2: (100, 62), 4: (80, 80)} | {
        r: (r, r) for r in range(21, 30)
    }  # the best figure is the least certain one
    cells = [(r, score, seed) for r, of_seeds in scores.items() for seed, score in enumerate(of_seeds)]
    text = written(
        tmp_path, *(trial(n, score, seed, **{"config.method.r": r}) for n, (r, score, seed) in enumerate(cells))
    )
    ranking = text.split("## Ranking")[1].split("## ")[0]
    assert "| worse than another |" in ranking
    for line in ranking.splitlines():
        if " worse" in line and line.startswith("|"):
            p = line.split("|")[6].strip()
            assert ("worse than another" in line) == (p not in ("<0.001",) and float(p) >= 0.05)


def test_what_few_ranks_show_is_said_of_them_alone(tmp_path: Path) -> None:
    other = {"choices.method": "dora", "config.method.r": 128}
    text = written(tmp_path, *ranks(40, 80), trial(10, 60, 0, **other), trial(11, 61, 1, **other))
    assert "task accuracy, where only the rank differs (8, 16): rank 16, the largest tried, is best" in text


def test_unpaired_rows_are_not_called_paired(tmp_path: Path) -> None:
    rows = [row | {"run_info.trial": f"elsewhere{n}"} for n, row in enumerate(ranks(40, 80, seeds=1))]
    table = pd.DataFrame(rows).convert_dtypes()
    file, _ = report.write(tmp_path, table, pd.DataFrame(), (), predictions(tmp_path))  # which holds none
    text = file.read_text()
    assert "McNemar" not in text
    assert "as if each had been judged on rows of its own" in text


# ---- against the untouched base, row by row --------------------------------------------------------

BASE = "base/tiny-none-0/task-0.jsonl"
EVIL = "</script><img src=x onerror=alert(1)> | `[a](#b)` ``"


def paired_study(
    folder: Path, *answers: tuple[int, int, int], n: int = 500, base: str | None = BASE
) -> tuple[pd.DataFrame, str]:
    """A study of one seed a configuration: how many rows it and its base got right, it alone, its base alone; of ``n``.

    All have one base, which gets the first half of the rows right. The table, and what RESULTS.md says of it.
    """
    half = n // 2
    files = {BASE: [row < half for row in range(n)]} if base else {}
    rows = []
    for number, (both, gained, lost) in enumerate(answers):
        assert both + lost == half
        right = [row < both or half <= row < half + gained for row in range(n)]
        files[f"t{number}/predictions/task.jsonl"] = right
        rows.append(trial(number, 0, **{"config.method.r": 8 << number}))
        for metric, share in (("accuracy", sum(right) / n), ("base_accuracy", 0.5)):
            stderr = math.sqrt(share * (1 - share) / (n - 1))
            rows[-1] |= {f"eval_info.task.{metric}.{k}": v for k, v in (("value", share), ("stderr", stderr), ("n", n))}
        rows[-1] |= {"eval_info.task.base_predictions": base, "run_info.labels": f'["t{number}"]'}
    for name, right in files.items():
        lines = [
            {"prompt": f"Q{row}{EVIL}", "prediction": f"{yes}{EVIL}", "answer": "True", "correct": yes}
            for row, yes in enumerate(right)
        ]
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    table = pd.DataFrame(rows).convert_dtypes()
    file, answer = report.write(folder, table, pd.DataFrame(), (), predictions(folder))
    return table, "\n".join([*render.lines(answer), "", file.read_text()])


def test_60_rows_gained_and_20_lost_are_a_gain_and_the_first_line_says_so(tmp_path: Path) -> None:
    _, text = paired_study(tmp_path, (230, 60, 20), (150, 30, 100))
    first = text.splitlines()[0]
    assert first.startswith("Use lora, r=8: 0.580 ")
    assert "The untouched base scores 0.500 on the same rows. `lora, r=8` against it: +0.080 [" in text
    assert "p < 0.001." in text.partition("against it: ")[2].partition("\n")[0]
    assert "p is adjusted for 3 pairs, those with the untouched base among them (Holm)" in text
    assert "compared with its untouched base on the same rows, as with another configuration" in text


def test_a_gain_that_the_rows_do_not_show_is_no_advice(tmp_path: Path) -> None:
    _, text = paired_study(tmp_path, (50, 240, 200), (150, 30, 100))  # the same 0.580 and 0.500, by other rows
    assert "0.580" in text
    assert text.startswith("Use none of these: none is shown to be better than the untouched base")


def test_no_gain_shown_is_not_called_no_gain(tmp_path: Path) -> None:
    """5 of 40 rows gained and 1 lost: Newcombe's interval of the difference 0.1 ends at 0.219 (checked by hand)."""
    table, text = paired_study(tmp_path, (19, 5, 1), n=40)
    first = text.splitlines()[0]
    high = statistics_intervals.paired_interval(np.array([5]), np.array([1]), 40)[1][0]
    assert f"40 test rows leave a gain of up to {high:.3f} possible" in first
    assert "learning rate" not in first  # as the records do not say which it was
    for rates, ending in (([1e-4], "all results are of one learning rate, 0.0001."), ([1e-4, 1e-3], "possible.")):
        rows = pd.concat([table] * len(rates), ignore_index=True)
        rows["config.train.learning_rate"] = rates
        rows["run_info.trial"] = [f"t{n}" for n in range(len(rates))]
        rows["config.method.r"] = [8 << n for n in range(len(rates))]
        _, answer = report.write(tmp_path, rows, pd.DataFrame(), (), predictions(tmp_path))
        assert next(iter(render.lines(answer))).endswith(ending)


def test_a_study_without_the_base_s_rows_says_how_it_compares(tmp_path: Path) -> None:
    _, text = paired_study(tmp_path, (230, 60, 20), (150, 30, 100), base=None)
    assert "as if each had rows of its own" in text
    assert "the base's answers were not kept by row" in text
    assert "untouched base |" not in text.partition("## Rows won and lost")[2]


def test_what_is_not_better_than_the_base_is_not_chosen_for_its_cost(tmp_path: Path) -> None:
    _, text = paired_study(tmp_path, (60, 228, 190), (240, 55, 10))  # a tie of 0.576, with half the adapter, and 0.590
    assert "all 2 configurations" in text or "both configurations are a tie" in text
    assert text.startswith("Use lora, r=16: 0.590")
    assert "small adapter at that quality" not in text


@pytest.mark.slow  # studies drawn at random; the tests above have advice with a gain, without one, and with a tie
def test_advice_and_sentences_about_the_base_follow_the_ranking(tmp_path: Path) -> None:
    studies = 60
    draw = np.random.default_rng(0)
    advised = []
    for number in range(studies):
        shift = draw.choice([0, 20, 60])
        cells = [
            (250 - lost, int(max(lost + shift + draw.integers(-25, 25), 0)), lost)
            for lost in draw.integers(0, 120, 3).tolist()
        ]
        _, text = paired_study(tmp_path / str(number), *cells)
        ranking = text.partition("## Ranking")[2].partition("## ")[0]
        told = r"\](?:,| as a single comparison, not shown among all pairs,) p ([<=]) ([\d.]+) *\|"
        over = re.findall(r"\| *([+−][\d.]+) \[([+−][\d.]+), ([+−][\d.]+)" + told, ranking)
        assert len(over) == 3
        better = [value[0] == "+" and (how == "<" or float(p) < 0.05) for value, _, _, how, p in over]
        assert ("Use none of these" in text.splitlines()[0]) != any(better)
        assert ("**No gain shown**" in text) != any(better)
        assert ("## Recommendations" in text) == any(better)
        sentence = re.search(r"against it: ([^\n]*)\.\n", text)
        assert sentence is not None
        assert sentence[1] in ranking  # of the best, with the same interval and p
        for _, low, high, how, p in over:
            if how == "=" and float(p) > 0.2:  # adjusted: nothing is shown, and 0 is in the interval
                assert low[0] != high[0] or float(low[1:]) * float(high[1:]) < 1e-3
        advised.append(any(better))
    assert 0 < sum(advised) < studies


def test_the_rows_that_two_win_and_lose_are_counted_and_a_few_are_shown(tmp_path: Path) -> None:
    _, text = paired_study(tmp_path, (230, 60, 20), (240, 0, 10))
    told = text.partition("## Rows won and lost")[2].partition("## Methodology")[0]
    cells = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in told.splitlines() if line.startswith("| lora")
    ]
    assert cells == [
        ["lora, r=8", "untouched base", "60", "20", "420"],
        ["lora, r=16", "untouched base", "0", "10", "490"],
        ["lora, r=8", "lora, r=16", "60", "10", "430"],
    ]
    assert "`lora, r=8` wins against `untouched base` on 60 rows, here 3 of them:" in told
    assert "`lora, r=8` loses against `untouched base` on 20 rows, here 3 of them:" in told
    shown = [line.split("|")[1].strip() for line in told.splitlines() if re.match(r"\|\s+\d", line)]
    assert shown == ["251", "252", "253", "231", "232", "233", "251", "252", "253", "231", "232", "233"]


def test_texts_of_rows_are_no_markup_of_results_md(tmp_path: Path) -> None:
    _, text = paired_study(tmp_path, (230, 60, 20))
    told = text.partition("## Rows won and lost")[2].partition("## Methodology")[0]
    lines = [line for line in told.splitlines() if "Q2" in line]
    assert lines
    for line in lines:
        assert len(re.findall(r"(?<!\\)\|", line)) == 6  # of the table's own
        for cell in re.split(r"(?<!\\)\|", line)[2:-1]:
            fence = re.match(r"\s*(`+)", cell)
            assert fence is not None
            assert cell.strip().endswith(fence[1])
            assert fence[1] not in cell.strip()[len(fence[1]) : -len(fence[1])]  # all of it is code
