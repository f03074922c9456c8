"""Numbers, differences and tables as a person reads them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from peftsweep.analysis.statistics.intervals import ALPHA
from peftsweep.analysis.table import columns
from peftsweep.analysis.table.columns import PREDICTED
from peftsweep.observe.display import size
from peftsweep.study.record import Status

ADAPTER, SECONDS = columns.ADAPTER.column, columns.TRAINING_TIME.column
PARAMETERS, SPEED = columns.TRAINABLE.column, "train_info.tokens_per_second"
ROWS = 25  # of a table; results.parquet has all


def plural(word: str, count: int, *, number: bool = True) -> str:
    """``1 trial``, ``2 trials``."""
    text = word if count == 1 else f"{word}s"
    return f"{count:,} {text}" if number else text


def table(rows: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """A markdown table, readable as text too; the first columns of words are aligned left."""
    if not rows:
        return
    columns = list(dict.fromkeys(column for row in rows for column in row))
    columns = [c for c in columns if any(row.get(c) for row in rows)]
    cells = [[str(row.get(c, "")).replace("|", "\\|").replace("\n", " ") for c in columns] for row in rows]
    widths = [max(len(c), 3, *(len(line[n]) for line in cells)) for n, c in enumerate(columns)]
    numeric = [all(not line[n] or line[n][0] in "0123456789+-−=<≈×" for line in cells) for n in range(len(columns))]

    def line(parts: Sequence[str]) -> str:
        fitted = (p.rjust(w) if right else p.ljust(w) for p, w, right in zip(parts, widths, numeric, strict=True))
        return "| " + " | ".join(fitted) + " |"

    yield line(columns)
    yield (
        "|" + "|".join("-" * (w + 1) + (":" if right else "-") for w, right in zip(widths, numeric, strict=True)) + "|"
    )
    yield from (line(parts) for parts in cells)
    yield ""


def escaped(text: str) -> str:
    """Any text as text of one line, in which markdown and HTML see no marks and no links."""
    line = re.sub(r"([\\`*\[\]<~]|\b_|_\b|&(?=#|\w+;))", r"\\\1", " ".join(text.split()))
    return re.sub(r"(?i)://|\bwww\.", lambda found: rf"\{found[0]}" if found[0] == "://" else r"www\.", line)


def code(text: str, *, exact: bool = False) -> str:
    """Any text as code of one line, in which markdown and HTML see no marks; ``exact``: with all its spaces."""
    line = text if exact else " ".join(text.split())
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{pad}{line}{pad}{fence}" if line else ""


def cost(column: str, value: float) -> str:
    """Bytes, seconds or a count, in a unit that suits it."""
    if not known(value):
        return ""
    if column.startswith("memory.") or column.endswith("bytes"):
        return size(value)
    return seconds(value) if "seconds" in column.rpartition(".")[2] else f"{value:,.0f}"


def seconds(value: float) -> str:
    """A measured time in its unit, with digits to compare it: ``45 µs``, ``9.1 s``, ``17 min``."""
    if value == 0:
        return "0 s"
    if value < 1e-3:
        return f"{value * 1e6:.3g} µs"
    if value < 1:
        return f"{value * 1e3:.3g} ms"
    return (
        f"{value:,.1f} s" if value < 1000 else f"{value / 60:,.0f} min" if value < 36_000 else f"{value / 3600:,.1f} h"
    )


def number(value: float) -> str:
    """A score, in as many digits as tell it from others."""
    if not known(value):
        return "?"
    if abs(value) < 10:
        return f"{value:.3f}"
    if abs(value) < 999.95:
        return f"{value:#.4g}"  # with its zeros, as the others of its column: 76.00 beside 64.84
    return f"{value:,.0f}" if abs(value) < 1e6 else f"{value:.3g}"


def difference(row: Any) -> str:
    """A difference with its interval."""
    middle = amount(row["difference"], row["scale"], signed=True)
    if not known(row["low"]):
        return middle
    low, high = (amount(row[end], row["scale"], signed=True) for end in ("low", "high"))
    return f"{middle} [{low}, {high}]"


def tested(row: Any, p_adjusted: float) -> str:
    """A difference with its interval and its adjusted p.

    The interval is that of a single comparison, p is adjusted for all pairs that are compared. Where the interval does
    not hold 0 and p is that of a tie, the text says so.
    """
    text = difference(row)
    if not known(p_adjusted):
        return text
    single = known(row["low"]) and not row["low"] <= 0 <= row["high"]
    if single and p_adjusted >= ALPHA:
        return f"{text} as a single comparison, not shown among all pairs, p {p_is(p_adjusted)}"
    return f"{text}, p {p_is(p_adjusted)}"


def change(column: str, row: pd.Series[Any]) -> str:
    """A cost's difference; marked where it may be chance."""
    if row["difference"] == 0:
        return "="
    if abs(row["difference"]) < 5e-4:
        return "0.0%"
    certain = column in (ADAPTER, PREDICTED) or row["verdict"] in ("worse", "better")
    return ("" if certain else "≈ ") + amount(row["difference"], row["scale"], signed=True)


def amount(value: float, scale: str, *, signed: bool = False) -> str:
    """A difference without its interval: in per cent where ``scale`` is ``ratio``, as a factor where that is large."""
    if not known(value):
        return "?"
    value, sign = value + 0.0, "+" if signed else ""  # a zero has no sign
    if scale == "ratio" and not -0.999 < value < 10:
        text = f"×{1 + value:.3g}"
    elif scale == "ratio":
        text = f"{value:{sign}.1%}" if abs(value) < 1 else f"{value:{sign},.0%}"
    else:
        text = f"{value:{sign}.3f}"
    return text.replace("-", "−")


def scale(score: str) -> str:
    """How the report words differences of a score, before any difference is known."""
    return "ratio" if "perplexity" in columns.evaluation(score)[1] else "difference"


def p(p: float) -> str:
    """A p-value of a table."""
    return "" if not known(p) else "<0.001" if p < 0.001 else _p_digits(p) if p < 0.995 else "1"


def p_is(p: float) -> str:
    """A p-value of a sentence."""
    return "< 0.001" if p < 0.001 else f"= {_p_digits(p)}"


def _p_digits(p: float) -> str:
    """A p-value in three digits, or in as many as show on which side of 0.05 it lies."""
    return next((text for n in (3, 4, 5) if float(text := f"{p:.{n}f}") != 0.05), f"{p:.6f}")


def seeds(row: Mapping[str, Any]) -> str:
    """The successful seeds, and how the others ended."""
    others = ended(row, without=Status.success)
    return f"{row[Status.success.name]}" + (f" ({others})" if others else "")


def ended(row: Mapping[str, Any], without: Status | None = None) -> str:
    """How the trials of a configuration ended: ``1 failed, 2 oom``."""
    return ", ".join(f"{row[s.name]} {s.name}" for s in Status if s is not without and row[s.name])


def values(table: pd.DataFrame, column: str) -> list[str]:
    """The distinct values of a column, as text."""
    return [str(value) for value in table[column].dropna().unique()] if column in table else []


def known(value: Any) -> bool:
    """Whether there is a value."""
    return not pd.isna(value)
