"""Sentences of a report say what the data carries, name what moved, and never contradict each other."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats as reference

from peftsweep.analysis.figures import plot
from peftsweep.analysis.figures.charts import format_numbers, frontier_chart
from peftsweep.analysis.statistics import comparisons, effects
from peftsweep.analysis.statistics.task import study_tasks
from peftsweep.analysis.table import columns
from peftsweep.analysis.text import findings, words
from peftsweep.analysis.text import report as text_report

ROWS = 60
ACCURACY = "eval_info.task.accuracy.value"
FACTORS: dict[str, Sequence[Any]] = {
    "choices.method": ("lora", "dora", "full"),
    "choices.quant": ("none", "8bit", "4bit"),
    "config.method.r": (4, 8, 16, 32, 64),
    "config.train.learning_rate": (1e-4, 3e-4),
}


@dataclass
class Study:
    """A table of trials, and of each the answers to its test rows."""

    table: pd.DataFrame
    lines: dict[str, list[dict[str, Any]]]

    def predictions(self, trial: str, _: str) -> list[dict[str, Any]]:
        return self.lines[trial]

    def report(self, folder: Path) -> str:
        file, _ = text_report.write(folder, self.table, pd.DataFrame(), (), self.predictions)
        return file.read_text()


def study(
    points: Sequence[dict[str, Any]], right: Sequence[np.ndarray[Any, Any]], **perplexities: Sequence[float]
) -> Study:
    """Trials of these settings, and which of their test rows are ``right``."""
    rows, lines = [], {}
    for n, (point, answers) in enumerate(zip(points, right, strict=True)):
        value = float(answers.mean())
        row = {
            "run_info.trial": f"t{n}",
            "run_info.status": "success",
            "run_info.created_at": f"2026-01-01T00:{n // 60:02}:{n % 60:02}",
            "choices.model": "tiny",
            "choices.method": "lora",
            "config.seed": 0,
            "train_info.train_seconds": 10.0 + n,
            "train_info.adapter_bytes": 1000 + n,
            ACCURACY: value,
            "eval_info.task.accuracy.stderr": math.sqrt(value * (1 - value) / (len(answers) - 1)),
            "eval_info.task.accuracy.n": len(answers),
        }
        for name, values in perplexities.items():
            row |= {f"eval_info.{name}.perplexity.value": values[n], f"eval_info.{name}.perplexity.stderr": 0.05}
            row[f"eval_info.{name}.perplexity.n"] = len(answers)
        rows.append(row | point)
        lines[f"t{n}"] = [{"prompt": str(k), "answer": "", "correct": bool(hit)} for k, hit in enumerate(answers)]
    return Study(pd.DataFrame(rows).convert_dtypes(), lines)


def random_study(seed: int, most: int = 24) -> Study:
    """At most so many configurations: some factors, of which some matter, cells that lack, 1 to 3 seeds."""
    draw = np.random.default_rng(seed)
    names = [name for name in FACTORS if draw.random() < 0.6] or ["config.method.r"]
    levels = {name: list(FACTORS[name])[: int(draw.integers(2, len(FACTORS[name]) + 1))] for name in names}
    cells = [dict(zip(levels, values, strict=True)) for values in itertools.product(*levels.values())]
    kept = [cell for cell in cells if draw.random() < draw.choice([0.7, 1.0])][:most] or cells[:2]
    strength = {name: draw.choice([0.0, 0.3, 1.0]) for name in names}
    alpha = draw.random() < 0.3
    hard, points, right = draw.normal(0, 1.5, ROWS), [], []
    for cell in kept:
        level = sum(strength[name] * levels[name].index(value) for name, value in cell.items())
        for number in range(int(draw.integers(1, 4))):
            answers = draw.random(ROWS) < 1 / (1 + np.exp(hard - level - draw.normal(0, 0.2)))
            more = {"config.method.lora_alpha": 2 * cell.get("config.method.r", 8)} if alpha else {}
            points.append(cell | more | {"config.seed": number})
            right.append(answers)
    perplexities = [float(6 - 3 * answers.mean() + draw.normal(0, 0.1)) for answers in right]
    found = study(points, right, other=perplexities)
    return Study(found.table.drop(columns=["train_info.train_seconds", "train_info.adapter_bytes"]), found.lines)


# ---- what a report says ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """That one thing is better or worse than another, or that no difference is shown."""

    score: str
    first: frozenset[str]  # what the configuration is called, part by part, or the level and the settings it is of
    second: frozenset[str]
    verdict: str  # of the first; "" where only p is given
    p: str
    text: str

    @property
    def key(self) -> tuple[str, frozenset[frozenset[str]]]:
        return self.score, frozenset([self.first, self.second])

    def from_smaller(self) -> str:
        """The verdict, of that of the two which comes first in the alphabet."""
        turned = sorted(map(sorted, (self.first, self.second)))[0] != sorted(self.first)
        return {"better": "worse", "worse": "better"}.get(self.verdict, self.verdict) if turned else self.verdict


SENTENCE = re.compile(
    r"- (task accuracy|other perplexity)(?:, (on average over \d+ settings of the other factors|with .+?))?: (.*)"
)
P = r"(?:adjusted )?p ([=<] \d(?:\.\d+)?)"


def claims(text: str) -> Iterator[Claim]:
    """All that a report says of two configurations or levels."""
    for line in text.partition("## Methodology")[0].splitlines():
        found = SENTENCE.fullmatch(line)
        if found and "no difference is put down" not in line:
            yield from _of_factor(
                found[1], frozenset((found[2] or "").removeprefix("with ").split(", ")), found[3], line
            )
    for score, ranking in re.findall(r"## Ranking by ([^\n]+)\n(.*?)\n## ", text, re.DOTALL):
        yield from _of_ranking(score, ranking)


def _of_factor(score: str, scope: frozenset[str], body: str, line: str) -> Iterator[Claim]:
    lower = "lower is better" in body
    assert lower == score.endswith("perplexity") or "is shown" in body

    def claim(first: str, second: str, verdict: str, p: str) -> Claim:
        return Claim(score, _thing(scope, first), _thing(scope, second), verdict, p, line)

    if tie := re.match(rf"no difference between `(.+?)` and `(.+?)` is shown \(.*?, {P}\)", body):
        yield claim(tie[1], tie[2], "tie", tie[3])
    pair = re.match(rf"`(.+?)` (?:is|came out) (better|worse) than `(.+?)`, from (\S+) to (\S+) .*?, {P}", body)
    if pair:
        yield claim(pair[1], pair[3], pair[2], pair[6])
        assert (float(pair[5]) < float(pair[4])) == (lower == (pair[2] == "better")) or pair[5] == pair[4]
    if several := re.match(r"`(.+?)` (has the best figure|is held against)", body):
        assert several[2] == "is held against" or "; better: " not in body
        for verdict, those in re.findall(r"; (no difference from it is shown|worse|better): (.*?)(?=; (?:\D|$))", body):
            for level, p in re.findall(rf"`(.+?)` \([^`]*?{P}[^`]*?\)", those):
                yield claim(level, several[1], "tie" if verdict.startswith("no") else verdict, p)
    if rank := re.match(r"rank (\d+)(.*)", body):
        best = rank[1]
        if smallest := re.match(rf" is the smallest that is not separable from the best, (\d+) \(.*?, {P}\)", rank[2]):
            best = smallest[1]
            yield claim(f"r={rank[1]}", f"r={best}", "tie", smallest[2])
        for verdict, phrase in (("worse", "worse than the best"), ("tie", "no difference from the best is shown")):
            for those in re.findall(rf"; {phrase}: ((?:\d+ \([^)]*\)(?:, )?)+)", rank[2]):
                for level, p in re.findall(rf"(\d+) \([^)]*?{P}\)", those):
                    yield claim(f"r={level}", f"r={best}", verdict, p)
        if step := re.search(rf"From rank (\d+) to (\d+) it went .*? {P}", rank[2]):
            yield claim(f"r={step[2]}", f"r={step[1]}", "", step[3])


def _thing(scope: frozenset[str], level: str) -> frozenset[str]:
    return frozenset(filter(None, [*scope, level]))


def _of_ranking(score: str, ranking: str) -> Iterator[Claim]:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in ranking.splitlines() if line.startswith("|")]
    first = rows[2]
    for row in rows[3:]:
        name, p, standing = row[1], row[5], row[6]
        verdict = "tie" if standing in ("tie", "worse than another") else standing
        text = " | ".join(row)
        p_value = "< 0.001" if p == "<0.001" else f"= {float(p):.3f}" if p == "1" else f"= {p}"
        yield Claim(score, frozenset(name.split(", ")), frozenset(first[1].split(", ")), verdict, p_value, text)
        assert (row[0] == first[0]) == (standing == "tie"), text


def check(text: str) -> int:
    """No two things that a report says disagree, and each agrees with its p-value; gives how many were compared."""
    known: dict[Any, Claim] = {}
    compared = 0
    methods = {part for claim in claims(text) for part in claim.first if part in FACTORS["choices.method"]}
    for claim in claims(text):
        value = float(claim.p.removeprefix("< ").removeprefix("= "))
        certain = claim.p.startswith("<") or value < 0.05
        assert claim.verdict == "" or certain == (claim.verdict in ("better", "worse")), claim.text
        method = methods if len(methods) == 1 else set()  # in a ranking's names also where it is no factor
        key = claim.score, frozenset(frozenset(thing - method) for thing in (claim.first, claim.second))
        before = known.setdefault(key, claim)
        compared += before is not claim
        assert before.p == claim.p, (before.text, claim.text)
        if before.verdict and claim.verdict:
            assert before.from_smaller() == claim.from_smaller(), (before.text, claim.text)
    return compared


def consistent(numbers: Sequence[int], folder: Path, most: int) -> None:
    """Whether the reports of these random studies contradict themselves."""
    compared = 0
    for number in numbers:
        text = random_study(number, most).report(folder)
        try:
            compared += check(text)
        except AssertionError:
            print(number, text)
            raise
    assert compared > 3 * len(numbers)  # else the sentences are not read any more


def test_no_two_sentences_of_a_report_disagree(tmp_path: Path) -> None:
    consistent(range(2), tmp_path, most=8)


@pytest.mark.slow
def test_no_two_sentences_of_500_reports_disagree(tmp_path: Path) -> None:
    consistent(range(500), tmp_path, most=24)


# ---- one family, one verdict -----------------------------------------------------------------------


def holm(p: dict[Any, float]) -> dict[Any, float]:
    """Holm (1979), by its definition."""
    found, largest = {}, 0.0
    for n, key in enumerate(sorted(p, key=lambda key: p[key])):
        largest = max(largest, min(1.0, (len(p) - n) * p[key]))
        found[key] = largest
    return found


def test_each_pair_is_adjusted_among_all_pairs_wherever_it_is_told(tmp_path: Path) -> None:
    right = [np.arange(400) < count for count in (100, 180, 260, 340, 352)]
    right[3] = right[3] | (np.arange(400) >= 397)  # 3 rows that the best lacks, against 13
    right[4] = right[4] | (np.arange(400) == 396)
    one = study([{"config.method.r": 4 << n} for n in range(5)], right)
    raw = {}
    for a, b in itertools.combinations(range(5), 2):
        gained, lost = int((right[a] & ~right[b]).sum()), int((right[b] & ~right[a]).sum())
        raw[a, b] = reference.binomtest(gained, gained + lost).pvalue
    expected = holm(raw)
    found = comparisons.compare(one.table, ACCURACY, one.predictions)
    for other in range(4):
        assert found.loc[other, "p_adjusted"] == pytest.approx(expected[other, 4])
    assert expected[3, 4] < 0.05 < 7 * raw[3, 4]  # which seven steps of a family of ten would have called a tie
    known = effects.effects(one.table, ACCURACY, one.predictions).set_index("level")
    assert known["p_adjusted"].to_dict() == pytest.approx({str(4 << n): expected[n, 4] for n in range(4)})
    text = one.report(tmp_path)
    p = words.p(expected[3, 4])
    assert f"| {p} | worse" in re.sub(" +", " ", text)
    assert text.count(f"p = {p}") == 5  # the best and the next; rank by rank and the last step, in summary and section


def test_an_interval_of_a_single_comparison_is_told_as_such_where_the_adjusted_p_is_that_of_a_tie(
    tmp_path: Path,
) -> None:
    right = [np.arange(400) < 200 + 8 * (n == 7) for n in range(8)]  # 8 rows that none of the 7 others has
    text = study([{"config.method.r": 4 << n} for n in range(8)], right).report(tmp_path)
    (parenthesis,) = re.findall(r"rank 4 is the smallest that is not separable from the best, 512 \((.*?)\)", text)[:1]
    p = holm({0: reference.binomtest(8, 8).pvalue} | dict.fromkeys(range(1, 28), 1.0))[0]
    assert reference.binomtest(8, 8).pvalue < 0.05 < p
    assert parenthesis.startswith("−0.020 [−0.0")
    assert parenthesis.endswith(f"] as a single comparison, not shown among all pairs, p {words.p_is(p)}")
    row = {"difference": -0.051, "low": -0.089, "high": -0.014, "scale": "difference"}
    assert (
        words.tested(row, 1.0) == "−0.051 [−0.089, −0.014] as a single comparison, not shown among all pairs, p = 1.000"
    )
    assert words.tested(row, 0.04) == "−0.051 [−0.089, −0.014], p = 0.040"
    assert words.tested(row | {"high": 0.001}, 1.0) == "−0.051 [−0.089, +0.001], p = 1.000"
    assert words.tested(row, math.nan) == "−0.051 [−0.089, −0.014]"


def test_all_seconds_have_a_unit_that_suits_them() -> None:
    """The median of a text's generation, 0.25 s, was written as "0"."""
    shown = {"train_info.train_seconds": (9.12, 2400.0, 72_000.0), columns.LATENCY.column: (0.25, 0.0), "x.count": (7,)}
    texts = [words.cost(column, value) for column, values in shown.items() for value in values]
    assert texts == ["9.1 s", "40 min", "20.0 h", "250 ms", "0 s", "7"]


def test_scores_of_a_column_have_the_same_number_of_digits() -> None:
    assert [words.number(value) for value in (76.0, 64.84, 104.7, 999.94, 0.3, 9.5)] == [
        *("76.00", "64.84", "104.7", "999.9", "0.300", "9.500")
    ]
    large = [words.number(value) for value in (999.96, 2466.3, 25_000.0, 2.5e7)]
    assert large == ["1,000", "2,466", "25,000", "2.5e+07"]
    assert format_numbers(pd.Series([76.0, 64.84, None, 2466.3])) == ["76.00", "64.84", "", "2,466"]
    assert format_numbers(pd.Series([64, 2_442_240])) == ["64", "2,442,240"]


def test_a_p_value_is_told_on_its_side_of_the_limit() -> None:
    assert [words.p(p) for p in (0.0004, 0.0496, 0.04999, 0.0504, 0.3, 1.0)] == [
        *("<0.001", "0.0496", "0.04999", "0.0504", "0.300", "1"),
    ]


def test_a_difference_of_nothing_has_no_sign() -> None:
    assert words.difference({"difference": -0.0, "low": -0.0, "high": 0.0, "scale": "difference"}).count("−") == 0


def test_a_level_that_is_better_than_the_one_it_is_held_against_is_called_so(tmp_path: Path) -> None:
    hit = [np.arange(ROWS) < n for n in (55, 20, 50)]
    one = study([{"choices.quant": quant} for quant in ("none", "4bit", "8bit")], hit)
    plan = effects.design(one.table)
    found = effects.effects(one.table, ACCURACY, one.predictions, {"choices.quant": "4bit"}, plan)
    assert found.set_index("level")["verdict"].to_dict() == {"8bit": "better", "none": "better"}
    assert check(one.report(tmp_path)) > 0


# ---- what moved with it ----------------------------------------------------------------------------


def right(*shares: float) -> list[np.ndarray[Any, Any]]:
    return [np.arange(ROWS) < round(share * ROWS) for share in shares]


def sentences(text: str, *names: str) -> list[str]:
    """The sentences that name all of these levels or ranks."""
    return [line for line in text.splitlines() if line.startswith("- ") and all(name in line for name in names)]


def test_a_batch_size_that_moved_with_the_method_is_named_with_it(tmp_path: Path) -> None:
    batch, rate = "config.train.batch_size", "config.train.learning_rate"
    points = [{"choices.method": "full", batch: 8, rate: 1e-5}, {"choices.method": "lora", batch: 32, rate: 2e-4}]
    lines = sentences(study(points, right(0.5, 0.9)).report(tmp_path), "`full`", "`lora`")
    assert len(lines) == 3
    assert all("batch_size" in line and "lr" in line and "8" in line and "32" in line for line in lines)


def test_a_rate_that_falls_with_the_rank_is_named_with_it(tmp_path: Path) -> None:
    points = [{"config.method.r": r, "config.train.learning_rate": 0.01 / r} for r in (8, 16, 32)]
    text = study(points, right(0.3, 0.6, 0.9)).report(tmp_path)
    lines = sentences(text, "rank 32")
    assert len(lines) == 2
    assert all("together with the rank (8, 16, 32) changed lr (0.00125, 0.000625, 0.0003125)" in line for line in lines)
    assert "These settings differ too, and are not in the names: lr (0.0003125, 0.000625, 0.00125)." in text


def test_named_points_that_differ_in_four_settings_are_no_comparison_of_ranks(tmp_path: Path) -> None:
    keys = ("config.method.r", "config.train.learning_rate", "config.train.batch_size", "config.train.steps")
    points = [
        {"choices.point": f"mine/p{n}", "config.label": f"p{n}"} | dict.fromkeys(keys, (n + 1) * 8) for n in range(3)
    ]
    other = [points[0] | {"choices.method": "dora", "config.label": "other", "config.method.r": 128}]
    text = study([*points, *other], right(0.3, 0.6, 0.9, 0.5)).report(tmp_path)
    assert "only the rank differs" not in text
    ranks = sentences(text, "rank 24")
    assert ranks
    assert all(f"{name} (8, 16, 24)" in line for line in ranks for name in ("lr", "batch_size", "steps"))
    many = [
        {"config.label": f"p{n}", "config.method.r": 8 << n} | {f"config.train.k{k}": n for k in range(9)}
        for n in (0, 1)
    ]
    (sentence,) = set(sentences(study(many, right(0.3, 0.9)).report(tmp_path), "`r=8`", "`r=16`"))
    assert "also differ in 9 other settings" in sentence
    assert "no difference is attributed to the rank" in sentence


@pytest.mark.parametrize(
    ("key", "values"),
    [  # in the fast tier an option, and a name that is shortened
        ("choices.quant", ("none", "4bit")),
        pytest.param("config.model.dtype", ("float32", "bfloat16"), marks=pytest.mark.slow),
        pytest.param("config.dataset.samples", (100, 1000), marks=pytest.mark.slow),
        pytest.param("config.train.optimizer_kwargs.betas", ("[0.9, 0.99]", "[0.9, 0.95]"), marks=pytest.mark.slow),
        ("config.method.r", (16, 8)),
        pytest.param("config.seed", (0, 1), marks=pytest.mark.slow),
        pytest.param("config.targets.roles", ('["q"]', '["q", "v"]'), marks=pytest.mark.slow),
    ],
)
def test_whatever_moves_with_the_method_is_named_with_it(key: str, values: tuple[Any, Any], tmp_path: Path) -> None:
    points = [{"choices.method": method, key: value} for method, value in zip(("lora", "dora"), values, strict=True)]
    text = study(points, right(0.5, 0.9)).report(tmp_path)
    lines = sentences(text, "`lora`", "than `dora`") + sentences(text, "`dora` is best")
    assert len(lines) >= 2
    name = {"config.method.r": "r ("}.get(key, key.rpartition(".")[2])
    assert all(name in line for line in lines)


def test_what_an_option_consists_of_did_not_move(tmp_path: Path) -> None:
    points = [
        {"choices.method": "lora", "config.method._target_": "peft.LoraConfig", "config.method.use_dora": False},
        {"choices.method": "ia3", "config.method._target_": "peft.IA3Config", "config.method.init_ia3_weights": True},
    ]
    text = study(points, right(0.5, 0.9)).report(tmp_path)
    assert "moved" not in text
    assert "also differ" not in text


@pytest.mark.parametrize(
    ("key", "places", "named"),
    [
        ("meta_info.torch.gpus", ('["H100"]', '["A100"]'), "gpus ("),
        ("meta_info.system.trials_at_once", (1, 4), "trials_at_once (4, 1)"),
        ("meta_info.packages.torch.version", ("2.8.0", "2.9.1"), "version (2.9.1, 2.8.0)"),
    ],
)
def test_another_machine_is_named_where_times_are_compared(
    key: str, places: tuple[Any, Any], named: str, tmp_path: Path
) -> None:
    points = [
        {"choices.quant": quant, "config.seed": seed, key: place, "train_info.train_seconds": time + seed}
        for quant, place, time in zip(("none", "4bit"), places, (100.0, 300.0), strict=True)
        for seed in range(3)
    ]
    (sentence,) = sentences(
        study(points, right(0.5, 0.5, 0.5, 0.5, 0.5, 0.5)).report(tmp_path), "training time", "takes"
    )
    assert named in sentence


# ---- tables and sentences of levels ----------------------------------------------------------------


def test_a_level_is_divided_by_the_settings_that_it_shares_and_says_how_many(tmp_path: Path) -> None:
    cells = {("none", 8): 1000, ("none", 16): 2000, ("none", 32): 4000, ("4bit", 8): 1200, ("4bit", 16): 2500}
    points = [{"choices.quant": quant, "config.method.r": r} for quant, r in cells]
    text = study(points, right(*[0.5] * 5), other=list(map(float, cells.values()))).report(tmp_path)
    section = text.split("## Quantisation")[1].split("\n## ")[0]
    row = next(line for line in section.splitlines() if line.startswith("| 4bit"))
    paired = math.sqrt(1200 * 2500)  # over the two ranks that both have; ratios have geometric means
    assert f"{paired:,.4g}" in row
    change = paired / math.sqrt(1000 * 2000) - 1
    assert f"+{change:.1%}" in row
    assert "(2 settings)" in row
    (sentence, *_) = sentences(text, "other perplexity", "`4bit`", "`unquantised`", "2 settings")
    assert "lower is better" in sentence or "no difference" in sentence


def test_a_finding_of_three_levels_names_all_three_with_their_figures(tmp_path: Path) -> None:
    points = [{"choices.quant": quant} for quant in ("none", "8bit", "4bit")]
    text = study(points, right(0.9, 0.85, 0.2)).report(tmp_path)
    lines = [line for line in text.splitlines() if line.startswith("- task accuracy: `")]
    assert len(lines) == 2
    for line in lines:
        assert re.search(
            r"`unquantised` has the best figure, 0\.900; no difference from it is shown: `8bit` \(0\.850, ", line
        )
        assert "; worse: `4bit` (0.200, " in line


def test_a_step_of_ranks_says_from_what_to_what_and_what_is_better(tmp_path: Path) -> None:
    points = [{"config.method.r": r} for r in (8, 16, 32)]
    text = study(points, right(0.5, 0.5, 0.5), other=[3.0, 6.0, 38.22]).report(tmp_path)
    (sentence, *_) = [line for line in text.splitlines() if line.startswith("- other perplexity: rank")]
    assert (
        "rank 8, the smallest tried, has the best figure; worse than the best: 16 (6.000, p < 0.001), 32 (38.22, "
        in sentence
    )
    assert "From rank 16 to 32 it went from 6.000 to 38.22 (+537% [" in sentence
    assert "lower is better" in sentence
    assert "plus being" not in text


@pytest.mark.parametrize(
    ("bound", "advised"), [(0.22, False), (0.3, True), pytest.param(0.0, False, marks=pytest.mark.slow)]
)
def test_speed_goes_before_quality_only_within_a_bound_that_is_told(
    bound: float, advised: bool, tmp_path: Path
) -> None:
    points = [{"config.method.r": r, "train_info.train_seconds": time} for r, time in ((8, 10.0), (16, 100.0))]
    hit = [np.arange(400) < n for n in (300, 380)]
    one = study(points, hit)
    file, _ = text_report.write(tmp_path, one.table, pd.DataFrame(), (), one.predictions, quality_loss=bound)
    text = file.read_text()
    assert ("speed before quality" in text) == advised
    assert not advised or "a loss of at most 0.285 is accepted, 30% of the best" in text


# ---- scores that disagree ----------------------------------------------------------------------------


def test_the_advice_names_a_score_by_which_another_is_shown_to_be_better(tmp_path: Path) -> None:
    points = [{"config.method.r": rank, "config.seed": seed} for rank in (8, 16) for seed in range(3)]
    right = [np.arange(ROWS) < count for count in (50, 51, 50, 20, 21, 20)]
    for perplexities, contradicted in (([9.0, 9.1, 9.2, 3.0, 3.1, 3.2], True), ([3.0, 3.1, 3.2, 9.0, 9.1, 9.2], False)):
        text = study(points, right, other=perplexities).report(tmp_path)
        use = next(line for line in text.splitlines() if "**Use" in line)
        assert use.startswith("- **Use `lora, r=8`**")
        assert ("; by other perplexity `lora, r=16` is better." in use) == contradicted


def test_a_choice_that_the_first_score_does_not_show_is_told_by_one_that_does(tmp_path: Path) -> None:
    points = [{"config.method.r": rank, "config.seed": seed} for rank in (8, 16) for seed in range(3)]
    text = study(points, [np.arange(ROWS) < 30] * 6, other=[9.0, 9.1, 9.2, 3.0, 3.1, 3.2]).report(tmp_path)
    worth = text.partition("## What each choice was worth")[2].partition("\n## ")[0]
    assert "- task accuracy: ranks 8, 16 have the same figure, 0.500." in worth
    assert "Each score is adjusted by itself." in text
    assert "the more scores there are (here 2), the more show one by some score." in text
    assert "- other perplexity: rank 16, the largest tried, is best, and a larger one may be better still" in worth
    right = [np.arange(ROWS) < count for count in (50, 51, 50, 20, 21, 20)]
    text = study(points, right, other=[9.0, 9.1, 9.2, 3.0, 3.1, 3.2]).report(tmp_path)
    assert "perplexity" not in text.partition("## What each choice was worth")[2].partition("\n## ")[0]


# ---- what is not known is said to be not known -----------------------------------------------------


def alike(*shares: float) -> list[np.ndarray[Any, Any]]:
    """Answers of which these shares are right, the first rows of each."""
    return [np.arange(ROWS) < round(share * ROWS) for share in shares]


def ranks(*levels: int) -> list[dict[str, Any]]:
    return [{"config.method.r": rank} for rank in levels]


def test_what_cannot_be_compared_is_named_and_is_no_tie(tmp_path: Path) -> None:
    made = study(ranks(4, 8, 16), alike(0.1, 0.5, 0.9))
    made.table.loc[1, "eval_info.task.accuracy.stderr"] = None
    file, answer = text_report.write(tmp_path, made.table, pd.DataFrame())
    text = file.read_text()
    assert "1 configuration is worse; the uncertainty of its difference from `lora, r=8` is not known." in text
    assert "in a tie with" not in text
    assert "on the front if" in text
    assert "of redraws" not in text
    (sure,) = answer.sections_named("certainty")
    assert sure.facts.scores[0].ties == []  # type: ignore[union-attr]


def test_a_configuration_without_a_score_is_said_to_be_compared_with_none(tmp_path: Path) -> None:
    made = study(ranks(4, 8, 16), alike(0.1, 0.5, 0.9), other=[3.0, math.inf, 2.0])
    text = made.report(tmp_path)
    assert "- By other perplexity `lora, r=8` is not compared: no such score is recorded." in text
    assert "`lora, r=4`, is worse by +50.0%" in text


@pytest.mark.parametrize(
    ("status", "perplexity", "told"),
    [  # in the fast tier a trial without a score, and one whose score is no number
        ("failed", 2.0, "1 of 3 seeds, 2 failed"),
        pytest.param("oom", 2.0, "1 of 3 seeds, 2 oom", marks=pytest.mark.slow),
        pytest.param("stopped", 2.0, "1 of 3 seeds, 2 stopped", marks=pytest.mark.slow),
        ("success", math.inf, "1 of 3 seeds, 2 without a finite score"),
    ],
)
def test_a_figure_of_the_seeds_that_survived_is_called_so_where_it_is_advised(
    status: str, perplexity: float, told: str, tmp_path: Path
) -> None:
    points = [{"config.method.r": rank, "config.seed": seed} for rank in (8, 16) for seed in range(3)]
    made = study(points, alike(*[0.5] * 6), other=[5.0, 5.1, 5.2, perplexity, 2.0, perplexity])
    made.table = made.table.drop(columns=[c for c in map(str, made.table) if c.startswith("eval_info.task.")])
    lost = [3, 5]
    made.table.loc[lost, "run_info.status"] = status
    if status != "success":
        made.table.loc[lost, [c for c in map(str, made.table) if c.startswith("eval_info.")]] = None
    file, answer = text_report.write(tmp_path, made.table, pd.DataFrame())
    use = next(line for line in file.read_text().splitlines() if "**Use" in line)
    assert use.startswith("- **Use `lora, r=16`**")
    assert f"; **the figure is of {told}**" in use
    assert f"- **Seeds without a score** are in no figure: `lora, r=16` ({told})." in file.read_text()
    ranking = next(line for line in file.read_text().splitlines() if line.startswith("|    1 | lora, r=16"))
    assert ("3, 1 with this score" in ranking) == (status == "success")
    (section,) = answer.sections_named("use")
    assert section.facts.trials == ["t4"]  # type: ignore[union-attr]  # whose adapter is not one that diverged
    made.table.loc[lost, "run_info.status"] = "cancelled"  # by a person, which says nothing of the configuration
    made.table.loc[lost, "eval_info.other.perplexity.value"] = None
    assert "Seeds without a score" not in made.report(tmp_path)


def test_a_trial_that_a_search_ended_before_its_test_rows_is_no_seed_that_was_lost(tmp_path: Path) -> None:
    points = [{"config.method.r": rank, "config.seed": seed} for rank in (8, 16) for seed in range(3)]
    made = study([point | {"config.halving.test": True} for point in points], alike(*[0.5] * 3, *[0.9] * 3))
    made.table.loc[[0, 3], "run_info.status"] = "stopped"
    assert "the figure is of 2 of 3 seeds, 1 stopped" in made.report(tmp_path)
    made.table.loc[[0, 3], "config.halving.test"] = False
    assert "seeds, 1 stopped" not in made.report(tmp_path)


def test_a_configuration_with_one_seed_among_others_with_several_is_named(tmp_path: Path) -> None:
    points = [{"config.method.r": rank, "config.seed": seed} for rank, seed in ((8, 0), (8, 1), (16, 0))]
    text = study(points, alike(0.5, 0.55, 0.9)).report(tmp_path)
    assert "- `lora, r=16` has one seed alone: " in text
    assert "One seed each" not in text
    assert "seed alone" not in study([*points, points[2] | {"config.seed": 1}], alike(0.5, 0.55, 0.9, 0.95)).report(
        tmp_path
    )


def test_a_perplexity_is_the_same_figure_wherever_it_is_told(tmp_path: Path) -> None:
    points = [{"config.method.r": rank, "config.seed": seed} for rank in (8, 16) for seed in range(2)]
    made = study(points, alike(*[0.5] * 4), other=[5.0, 50.0, 20.0, 20.2])
    made.table = made.table.drop(columns=[c for c in map(str, made.table) if c.startswith("eval_info.task.")])
    file, answer = text_report.write(tmp_path, made.table, pd.DataFrame())
    geometric = math.sqrt(5.0 * 50.0)  # which is the better one, as the arithmetic mean, 27.5, is not
    assert f"the best figure is that of `lora, r=8`, {geometric:.2f}" in file.read_text()
    assert f"to {geometric:.2f}" in file.read_text() or f"from {geometric:.2f}" in file.read_text()
    assert "27.5" not in file.read_text()
    (table,) = answer.sections_named("table")
    values = [row["eval_info.other.perplexity.value"] for row in table.tables[0].rows]
    assert values == sorted(values) == pytest.approx([geometric, math.sqrt(20.0 * 20.2)])


@pytest.mark.parametrize(("larger", "advised"), [(1040, "k"), (1060, "q")])
def test_of_equal_scores_the_smallest_adapter_is_advised_and_within_5_percent_of_it_the_fastest(
    larger: int, advised: str
) -> None:
    sizes = {"q": (1000, 100.0), "k": (larger, 10.0)}
    points = [
        {"config.method.target_modules": name, "train_info.adapter_bytes": size, "train_info.train_seconds": seconds}
        for name, (size, seconds) in sizes.items()
    ]
    made = study(points, alike(0.5, 0.5))
    (task,) = study_tasks(made.table, made.predictions)
    assert task.configurations.at[findings.advice(task).chosen, "config.method.target_modules"] == advised


# ---- seconds of several devices --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "devices"),
    [  # in the fast tier a GPU; what else makes a device or a condition is read in the same place
        ("meta_info.torch.gpus", ['["T4"]', '["H100"]']),
        pytest.param("meta_info.system.processor", ["a", "b"], marks=pytest.mark.slow),
        pytest.param("meta_info.torch.threads", ["2", "1"], marks=pytest.mark.slow),
        pytest.param("meta_info.system.trials_at_once", [1, 4], marks=pytest.mark.slow),
        pytest.param("meta_info.packages.torch.version", ["2.8.0", "2.9.1"], marks=pytest.mark.slow),
    ],
)
def test_nothing_is_advised_for_its_speed_on_another_device(key: str, devices: list[str], tmp_path: Path) -> None:
    points = [
        {
            "config.method.target_modules": modules,
            "train_info.train_seconds": seconds,
            "train_info.adapter_bytes": 1000,
            "meta_info.system.processor": "a",
            "run_info.host": f"host {seconds}",
        }
        for modules, seconds in (("q", 100.0), ("k", 10.0))
    ]
    made = study(points, alike(0.5, 0.5))
    text = made.report(tmp_path)
    assert "the fastest" in text  # one device, whatever the host is called
    assert all(_frontiers_weigh_time(made, text))
    assert "fast training at that quality" in text
    assert "Seconds of several devices" not in text
    assert "not to be compared" not in _caption(made)
    made.table[key] = devices
    text = made.report(tmp_path)
    assert not any(_frontiers_weigh_time(made, text))
    assert "fastest" not in text
    assert "fast training" not in text
    assert "- **Seconds of several devices or conditions** (" in text
    assert "seconds of several devices or conditions, not to be compared" in _caption(made)


def _caption(made: Study) -> str:
    """What stands below the figure of training times."""
    (task,) = study_tasks(made.table, made.predictions)
    figure = plot.bars(plot._configurations(task, ""), columns.TRAINING_TIME)
    assert figure is not None
    return " ".join(figure.get_supxlabel().split())


def _frontiers_weigh_time(made: Study, text: str) -> Iterator[bool]:
    """Whether time is a cost in the frontiers of the report, of the page and of the plot."""
    (task,) = study_tasks(made.table, made.predictions)
    figure = plot.frontier(plot._configurations(task, ""), ACCURACY)
    yield "training time" in text.partition("## Frontier")[2].partition("## ")[0]
    yield "training time" in frontier_chart("", task, "chart")
    yield figure is not None and any("training time" in ax.get_xlabel() for ax in figure.axes)


def test_the_least_memory_is_that_of_those_whose_memory_is_known(tmp_path: Path) -> None:
    memory = [None, 2e9, 3e9]  # the first was trained in a pack
    points = [{"config.method.r": r, "memory.predicted.peak_bytes": m} for r, m in zip((4, 8, 16), memory, strict=True)]
    text = study(points, alike(0.5, 0.5, 0.5)).report(tmp_path)
    assert "little memory at that quality (2.0 GB, of the 2 of 3 whose figure is known)" in text
    made = study(
        [point | {"memory.predicted.peak_bytes": 1e10} for point in points[1:]] + points[:1], alike(*[0.5] * 3)
    )
    assert "12 GB of memory (10.0 GB predicted training memory, of the 2 of 3 whose memory is known)" in made.report(
        tmp_path
    )


def test_the_figure_of_the_best_of_many_is_said_to_be_partly_luck(tmp_path: Path) -> None:
    caution = "figures is partly luck: on other test rows expect a worse one."
    assert f"- The best of 3 {caution}" in study(ranks(4, 8, 16), alike(0.5, 0.6, 0.5)).report(tmp_path)
    assert caution not in study(ranks(4, 8, 16), alike(0.5, 0.5, 0.5)).report(tmp_path)  # none was chosen
    assert caution not in study(ranks(4, 8), alike(0.5, 0.6)).report(tmp_path)


def test_an_average_that_hides_opposite_differences_says_so(tmp_path: Path) -> None:
    cells = itertools.product((4, 8), ("none", "4bit"))
    points = [{"config.method.r": rank, "choices.quant": quant} for rank, quant in cells]
    text = study(points, alike(0.2, 0.8, 0.8, 0.2)).report(tmp_path)
    assert text.count("but it depends on the other factors: shown to be better in 1 of these settings and worse in 1")
    assert "it depends on" not in study(points, alike(0.2, 0.2, 0.8, 0.8)).report(tmp_path)


def test_a_ratio_far_from_1_is_told_as_a_factor() -> None:
    assert [words.amount(value, "ratio", signed=True) for value in (0.5, 9.0, 49.0, -0.5, 2e11, 1e-6 - 1)] == [
        *("+50.0%", "+900%", "×50", "−50.0%", "×2e+11", "×1e−06"),
    ]
