"""tune.replay=FILE: the decisions of sweep=tune on a table of finished runs, so that nothing is trained.

A table has a row for each run, with its learning rate, its rank and its loss. Other columns, such as the model, tell
one sweep from another. The grid of a sweep is every rate with every rank that occurs in it; a pair without a row is a
run that diverged.
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
# Columns that differ between runs of one sweep, so that they do not name a sweep.
COSTS = ("train_nll", "train_loss", "wall_minutes", "seconds", "train_seconds", "minutes", "steps", "seed")
DEFAULT_RATE = 1e-4  # a common learning rate without tuning
DRAWS = 1000  # simulated random searches


@dataclass(frozen=True)
class Grid:
    """One sweep of a table: the loss of each (rate, rank), the mean of its runs; one that diverged has none."""

    name: str
    losses: dict[tuple[float, int], float]

    @property
    def finite(self) -> dict[tuple[float, int], float]:
        """The losses of the runs that did not diverge."""
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
    best: tuple[float, int] | None  # rate and rank; None where every run that it used had diverged
    runs: int  # runs of the grid that the tuner used
    cells: int  # runs of the whole grid, including those that diverged
    regret: float
    random: float  # the mean regret of a random search with as many runs
    default: float  # the regret of the rate nearest to DEFAULT_RATE, at its best rank


def read(file: Path) -> list[Grid]:
    """The grids of a table (.csv, .tsv, .json, .jsonl or .parquet).

    Raises:
        InputError: a column is missing, or a value is not allowed; the message names it.
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
    if len(rows) > 1 and all(len(cells) == 1 for cells in grids.values()):
        telling = max(labels, key=lambda label: len({str(row[label]) for row in rows}), default=None)
        if telling is not None:
            raise InputError(
                f"tune.replay={file}: {telling} tells every run from the others, so that no sweep has two rates or "
                f"ranks; leave that column out"
            )
        raise InputError(f"tune.replay={file}: has one rate and one rank, among which nothing can be searched")
    means = [Grid(name, {cell: fmean(runs) for cell, runs in cells.items()}) for name, cells in grids.items()]
    if not (usable := [grid for grid in means if grid.finite]):
        raise InputError(f"tune.replay={file}: every run in it has diverged")
    return usable


def run(grid: Grid) -> Replay:
    """Tune on a grid: every rate at the lowest rank, then every rank at the best rate.

    No second rate is tried at the best rank, so that every grid is searched with rates + ranks - 1 runs.
    """
    used, losses = set[Point](), grid.finite

    def objective(stage: str, points: Sequence[Point], until: Until) -> Scores:
        used.update(points)
        return {point: losses[cell] for point in points if (cell := (point.rate, point.size or 0)) in losses}

    space = Space(grid.name, tuple(grid.rates), extends=False, sizes=tuple(grid.ranks), again=False)
    (tuned,) = tune([space], objective)
    cells = len(grid.rates) * len(grid.ranks)
    default = min(grid.rates, key=lambda rate: abs(math.log(rate / DEFAULT_RATE)))
    best = tuned.best
    return Replay(
        grid.name,
        best=None if best is None else (best.rate, best.size or 0),
        runs=len(used),
        cells=cells,
        regret=tuned.score - grid.best,
        random=_random_regret(grid, len(used), cells),
        default=min((loss for (rate, _), loss in losses.items() if rate == default), default=math.inf) - grid.best,
    )


def _random_regret(grid: Grid, runs: int, cells: int) -> float:
    """The mean regret of the best of ``runs`` random cells of the grid, over draws with a run that did not diverge."""
    losses = np.array([*grid.finite.values(), *[math.inf] * (cells - len(grid.finite))])
    best = np.random.default_rng(0).permuted(np.tile(losses, (DRAWS, 1)), axis=1)[:, :runs].min(axis=1)
    return float(best[np.isfinite(best)].mean() - grid.best)


def lines(replays: Sequence[Replay]) -> list[str]:
    """The report of replays: one line for each grid, then the totals and the regrets over all grids."""
    report = []
    for replay in replays:
        best = "nothing: every run had diverged"
        if replay.best is not None:
            best = f"rate {replay.best[0]:g}, rank {replay.best[1]}"
        report.append(
            f"{replay.name}: {best}; {replay.runs} of {replay.cells} runs; regret {replay.regret:.4f} "
            f"(random search {replay.random:.4f}, always {DEFAULT_RATE:g} {replay.default:.4f})"
        )
    runs, cells = sum(replay.runs for replay in replays), sum(replay.cells for replay in replays)
    report.append(f"{len(replays)} sweeps, {runs} of {cells} runs ({runs / max(cells, 1):.0%})")
    for name, key in (("sweep=tune", "regret"), ("random search", "random"), (f"always {DEFAULT_RATE:g}", "default")):
        regrets = [getattr(replay, key) for replay in replays]
        report.append(f"{name}: median regret {median(regrets):.4f}, worst {max(regrets):.4f}")
    return report
