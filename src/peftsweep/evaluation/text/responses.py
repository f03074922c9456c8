"""Statistics of generated texts without a reference: lengths, shares of empty and cut texts, variety of words."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from peftsweep.evaluation import metrics
from peftsweep.evaluation.decoding import Written
from peftsweep.evaluation.metrics import Score


@dataclass(frozen=True)
class Parted:
    """A figure over rows, and what each row adds to it: ``parts`` have the figure as their mean."""

    value: float
    parts: list[float]

    @property
    def score(self) -> Score:
        """The figure with the standard error of the mean of its parts."""
        n = len(self.parts)
        return Score(self.value, statistics.stdev(self.parts) / n**0.5 if n > 1 else None, n)


def mean(values: Iterable[float]) -> Parted:
    """The mean of a figure that each row has."""
    parts = [float(value) for value in values]
    return Parted(statistics.fmean(parts), parts)


def jackknife(whole: float, without: Sequence[float]) -> Parted:
    """A figure of all rows together, by what it is ``without`` each row.

    The standard error of the parts' mean is the jackknife's, sqrt((n - 1) / n * sum of squares of ``without`` around
    its mean) (Efron and Stein, 1981).
    """
    n, middle = len(without), statistics.fmean(without)
    return Parted(whole, [whole + (n - 1) * (middle - one) for one in without])


def statistics_of(written: Sequence[Written]) -> dict[str, Score]:
    """Lengths in tokens, words and characters, the shares of empty and cut texts, and of different words and pairs.

    Tokens are those that were written, without the end mark; words are parted by white space. ``distinct_1`` and
    ``distinct_2`` are the numbers of different words, and pairs of words in a row, over how many there are in all texts
    together (Li et al., arXiv 1510.03055); there is none where no text has one.
    """
    n = len(written)
    words = [text.text.split() for text in written]
    found = {
        "length_tokens": mean(text.tokens for text in written).score,
        "length_words": mean(map(len, words)).score,
        "length_characters": mean(len(text.text) for text in written).score,
        "empty_fraction": metrics.proportion(sum(not text.text.strip() for text in written), n),
        "cut_fraction": metrics.proportion(sum(text.cut for text in written), n),
    }
    for size in (1, 2):
        grams = [Counter(zip(*(row[start:] for start in range(size)), strict=False)) for row in words]
        if any(grams):
            found[f"distinct_{size}"] = _distinct(grams).score
    return found


def _distinct(rows: Sequence[Counter[tuple[str, ...]]]) -> Parted:
    """Different n-grams over all n-grams, and what that is without each row."""
    total: Counter[tuple[str, ...]] = sum(rows, Counter())
    different, count = len(total), total.total()
    without = []
    for row in rows:
        only_here = sum(total[gram] == times for gram, times in row.items())
        left = count - row.total()
        without.append((different - only_here) / left if left else 0.0)
    return jackknife(different / count, without)
