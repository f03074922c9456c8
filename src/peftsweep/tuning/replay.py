"""tune.replay=FILE: the decisions of sweep=tune against a table of finished runs, so that nothing is trained.

A table has a row a run: its learning rate, its rank and its loss, and whatever else tells one sweep from another, such
as the model. The grid of a sweep is every rate with every rank that occurs in it; a pair without a row is a run that
diverged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

import numpy as np

from peftsweep.errors import InputError
from peftsweep.tuning.search import Point, Scores, Space, Until, tune

COLUMNS = {  # of a table, by the names they may have
    "rate": ("learning_rate", "train.learning_rate", "config.train.learning_rate", "lr"),
    "rank": ("rank", "r", "method.r", "config.method.r", "lora_rank", "lora_r"),
    "loss": ("loss", "test_nll", "test_loss", "validation_loss", "eval_loss", "nll"),
}
COSTS = ("train_nll", "train_loss", "wall_minutes", "seconds", "train_seconds", "minutes", "steps", "seed")  # no names
USUAL_RATE = 1e-4  # what many take without tuning
DRAWS = 1000  # of random searches


@dataclass(frozen=True)
class Grid:
    """One sweep of a table: the loss of each (rate, rank), the mean of its runs; one that diverged has none."""

    name: str
    losses: dict[tuple[float, int], float]

    @property
    def finite(self) -> dict[tuple[float, int], float]:
        """Those that did not diverge."""
        return {at: loss for at, loss in self.losses.items() if math.isfinite(loss)}

    @property
    def rates(self) -> list[float]:
        return sorted({rate for rate, _ in self.losses})

    @property
    def ranks(self) -> list[int]:
        return sorted({rank for _, rank in self.losses})

    @property
    def best(self) -> float:
        return min(self.finite.values())


@dataclass(frozen=True)
class Replay:
    """The result of the tuner in one grid; a regret is the loss above the grid's best."""

    name: str
    best: tuple[float, int] | None  # rate and rank; None where every run that it asked for had diverged
    runs: int
    of: int  # in the whole grid, diverged ones included
    regret: float
    random: float  # the mean regret of as many runs drawn from the grid
    usual: float  # of the rate nearest to 1e-4, at the best rank for it


def read(file: Path) -> list[Grid]:
    """The grids of a table (.csv, .tsv, .json, .jsonl or .parquet).

    Raises:
        InputError: it is no such table; the line says what it lacks.
    """
    from peftsweep.data.files import read_rows

    if not file.is_file():
        raise InputError(f"tune.replay={file}: no such file")
    rows = read_rows(str(file), "tune.replay")
    known = list(rows[0]) if rows else []
    named = {part: next((name for name in names if name in known), "") for part, names in COLUMNS.items()}
    for part, name in named.items():
        if not name:
            raise InputError(f"tune.replay={file}: needs a column of the {part}, called {' or '.join(COLUMNS[part])}")
    labels = [name for name in known if name not in {*named.values(), *COSTS}]
    grids: dict[str, dict[tuple[float, int], list[float]]] = {}
    for number, row in enumerate(rows, 1):
        try:
            rate, rank, loss = (
                float(math.nan if row[named[part]] in (None, "") else row[named[part]]) for part in COLUMNS
            )
        except (TypeError, ValueError):
            raise InputError(f"tune.replay={file}: row {number}: rate, rank and loss must be numbers") from None
        if not (rate > 0 and rank >= 1 and rank.is_integer() and math.isfinite(rate)):
            raise InputError(
                f"tune.replay={file}: row {number}: the rate must be above 0, the rank a whole number from 1"
            )
        runs = grids.setdefault(", ".join(str(row[label]) for label in labels) or file.stem, {})
        runs.setdefault((rate, int(rank)), []).append(loss)
    whole = [Grid(name, {at: fmean(runs) for at, runs in of.items()}) for name, of in grids.items()]
    if not (kept := [one for one in whole if one.finite]):
        raise InputError(f"tune.replay={file}: every run in it has diverged")
    return kept


def run(grid: Grid) -> Replay:
    """Tune against a grid: every rate at the lowest rank, then every rank at the best of them, and nothing more.

    So that all grids are searched with rates + ranks - 1 runs, no rate is tried again at the best rank.
    """
    asked, losses = set[Point](), grid.finite

    def ask(stage: str, points: Sequence[Point], until: Until) -> Scores:
        asked.update(points)
        return {point: losses[at] for point in points if (at := (point.rate, point.size or 0)) in losses}

    space = Space(grid.name, tuple(grid.rates), extends=False, sizes=tuple(grid.ranks), again=False)
    (found,) = tune([space], ask)
    of, usual = len(grid.rates) * len(grid.ranks), min(grid.rates, key=lambda rate: abs(math.log(rate / USUAL_RATE)))
    best = found.best
    return Replay(
        grid.name,
        None if best is None else (best.rate, best.size or 0),
        len(asked),
        of,
        found.score - grid.best,
        _random(grid, len(asked), of),
        min((loss for (rate, _), loss in losses.items() if rate == usual), default=math.inf) - grid.best,
    )


def _random(grid: Grid, runs: int, of: int) -> float:
    """The mean regret of ``runs`` cells of the grid drawn at random, over draws in which one had not diverged."""
    losses = np.array([*grid.finite.values(), *[math.inf] * (of - len(grid.finite))])
    drawn = np.random.default_rng(0).permuted(np.tile(losses, (DRAWS, 1)), axis=1)[:, :runs].min(axis=1)
    return float(drawn[np.isfinite(drawn)].mean() - grid.best)


def lines(replays: Sequence[Replay]) -> list[str]:
    """The report of a replay: one line a grid, and one for all together."""
    said = []
    for one in replays:
        best = "nothing: every run had diverged" if one.best is None else f"rate {one.best[0]:g}, rank {one.best[1]}"
        said.append(
            f"{one.name}: {best}; {one.runs} of {one.of} runs; regret {one.regret:.4f} "
            f"(random search {one.random:.4f}, always {USUAL_RATE:g} {one.usual:.4f})"
        )
    runs, of = sum(one.runs for one in replays), sum(one.of for one in replays)
    said.append(f"{len(replays)} sweeps, {runs} of {of} runs ({runs / max(of, 1):.0%})")
    for name, key in (("sweep=tune", "regret"), ("random search", "random"), (f"always {USUAL_RATE:g}", "usual")):
        regrets = [getattr(one, key) for one in replays]
        said.append(f"{name}: median regret {median(regrets):.4f}, worst {max(regrets):.4f}")
    return said
