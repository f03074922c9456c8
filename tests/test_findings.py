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

from peftsweep.answer import report

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
        file, _ = report.write(folder, self.table, pd.DataFrame(), (), self.predictions)
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
    return study(points, right, other=perplexities)


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
    r"- (task accuracy|other perplexity)(?:, (on average over \d+ settings of the rest|with .+?))?: (.*)"
)
P = r"p ([=<] \d(?:\.\d+)?)"


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
        for verdict, said in (("worse", "worse than the best"), ("tie", "no difference from the best is shown")):
            for those in re.findall(rf"; {said}: ((?:\d+ \([^)]*\)(?:, )?)+)", rank[2]):
                for level, p in re.findall(rf"(\d+) \([^)]*?{P}\)", those):
                    yield claim(f"r={level}", f"r={best}", verdict, p)
        if step := re.search(rf"From rank (\d+) to (\d+) it went .*?, {P}", rank[2]):
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
        said = "< 0.001" if p == "<0.001" else f"= {float(p):.3f}" if p == "1" else f"= {p}"
        yield Claim(score, frozenset(name.split(", ")), frozenset(first[1].split(", ")), verdict, said, text)
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
    consistent(range(20), tmp_path, most=10)


@pytest.mark.slow
def test_no_two_sentences_of_500_reports_disagree(tmp_path: Path) -> None:
    consistent(range(500), tmp_path, most=24)
