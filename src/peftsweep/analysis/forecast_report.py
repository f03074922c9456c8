"""How far predicted seconds were from the measured ones: of studies, by kind and in all."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from peftsweep.analysis.table.table import read
from peftsweep.errors import InputError
from peftsweep.forecast.history import KINDS, measured
from peftsweep.observe.display import show_table
from peftsweep.study import store
from peftsweep.study.record import Result, Status, trials_in_words

INTERVAL = 0.9  # what a predicted interval says of itself


@dataclass(frozen=True)
class Error:
    """Predictions of one kind of seconds: their relative errors, and how many intervals held the measured value."""

    errors: tuple[float, ...]  # predicted / measured - 1
    held: int

    @property
    def median(self) -> float:
        """The median of the errors without their signs."""
        return statistics.median(map(abs, self.errors))

    @property
    def worst(self) -> float:
        """The largest error, with its sign."""
        return max(self.errors, key=abs)

    @property
    def coverage(self) -> float:
        """The share of the intervals that held the truth."""
        return self.held / len(self.errors)


def error(results: Iterable[Result], kind: str) -> Error | None:
    """The errors of successful trials whose seconds of this ``kind`` were predicted and measured; None without any."""
    errors, held = [], 0
    for result in results:
        predicted, took = result.train_info.get("predicted"), measured(result.train_info).get(kind)
        if result.status is not Status.success or not isinstance(predicted, dict) or not took:
            continue
        if "trained_by" in result.train_info:  # earlier versions recorded the prediction of the other trial with it
            continue
        seconds, low, high = (predicted.get(f"{kind}_seconds{end}") for end in ("", "_low", "_high"))
        if seconds is None or low is None or high is None or result.run_info.get("resumed"):
            continue  # the seconds of a resumed trial are those of several attempts, maybe on several machines
        errors.append(seconds / took - 1)
        held += low <= took <= high
    return Error(tuple(errors), held) if errors else None


def line(results: Sequence[Result]) -> str | None:
    """One line about the training seconds; None where none were predicted."""
    found = error(results, "train")
    if found is None:
        return None
    longer = "longer" if found.worst > 0 else "shorter"
    return (
        f"predicted training seconds against measured ones: off by {found.median:.0%} in the median, at most "
        f"{abs(found.worst):.0%} {longer}; {found.held} of {trials_in_words(len(found.errors))} within the predicted "
        f"{INTERVAL:.0%} interval"
    )


def main(names: Sequence[str]) -> int:
    """``peftsweep-collect --forecast-report``: a row a study and kind of seconds, and one of all together."""
    named = store.chosen(names)
    if not named:
        raise InputError("--forecast-report: there is no study under multirun/")
    folders: dict[Path, Path] = {}  # each study once, however often it is named
    for folder in named:
        folders.setdefault(folder.resolve(), folder)
    studies = {str(folder): read(folder) for folder in folders.values()}
    if len(studies) > 1:
        studies["all"] = [*{_run(result): result for results in studies.values() for result in results}.values()]
    rows = [
        _row(name, kind, found)
        for name, results in studies.items()
        for kind in KINDS
        if (found := error(results, kind))
    ]
    if rows:
        show_table("predicted seconds against measured ones", rows)
    for name, results in studies.items():
        if not any(error(results, kind) for kind in KINDS):
            print(f"{Path(name)}: no trial whose time was predicted before it ran (dry_run=true predicts it)")
    return 0


def _run(result: Result) -> tuple[str, str]:
    """Equal for copies of one run of a trial, as in a study that was copied."""
    return str(result.run_info.get("identity", result.trial)), str(result.run_info.get("created_at"))


def _row(name: str, kind: str, found: Error) -> dict[str, str]:
    return {
        "study": name,
        "seconds of": kind,
        "trials": str(len(found.errors)),
        "median error": f"{found.median:.1%}",
        "worst": f"{found.worst:+.1%}",
        f"in the {INTERVAL:.0%} interval": f"{found.coverage:.0%}",
    }
