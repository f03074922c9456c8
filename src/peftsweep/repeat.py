"""A trial run again: is it the same, to the bit or within its errors, and what changed in between?"""

from __future__ import annotations

import filecmp
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftsweep import record
from peftsweep.display import size
from peftsweep.errors import InputError
from peftsweep.record import RESULT, STEPS, RecordError, Result, Status
from peftsweep.study import ADAPTER

FILE = "repeat.json"  # what the comparison found, in the folder of the second trial
# Keys that are not taken from the record: they say where and how a command runs, and change no number.
NOT_REPEATED = ("study", "repeat", "experiments", "force", "dry_run", "quiet", "stop_on_failure", "tracker", "profiler")
COUNTED = ("final_loss", "best_loss", "steps", "tokens", "training_rows", "trainable_parameters", "total_parameters")
TIMED = ("train_info.train_seconds", "train_info.tokens_per_second", "run_info.total_seconds")
MEMORY = ("memory.train.allocated_peak", "memory.train.rss_peak")
IDENTITY = "run_info.identity"  # a hash of all settings and data that change a number
PLACE = (IDENTITY, "run_info.host", "run_info.git_commit", "run_info.git_branch", "run_info.git_dirty")
# What may change the last bits of a sum, and so in the end an answer; code is not among it, as its changes shall show.
ENVIRONMENT = (
    *("meta_info.packages.", "meta_info.torch.", "meta_info.system.machine", "meta_info.system.processor"),
    "meta_info.system.python",
)
CLOSE = 2.0  # standard errors between two scores that count as one: 95% of equal ones lie closer
CLOSE_WITHOUT_ERROR = 0.02  # and the share by which those may differ that have none


@dataclass(frozen=True)
class Figure:
    """A score, loss or count in both records; None where one lacks it."""

    name: str
    before: float | None
    after: float | None
    stderr: float | None = None  # of the difference, as if the two rested on different rows: an upper bound
    score: bool = False  # of an evaluation

    @property
    def equal(self) -> bool:
        """Whether the two are equal to the bit."""
        return self.before == self.after

    @property
    def close(self) -> bool:
        """Whether another version or device may have made the difference."""
        if self.before is None or self.after is None or self.equal:
            return self.equal
        if self.stderr:
            return abs(self.after - self.before) <= CLOSE * self.stderr
        return math.isclose(self.after, self.before, rel_tol=CLOSE_WITHOUT_ERROR)

    def __str__(self) -> str:
        if self.before is None or self.after is None:
            return f"{self.name}: {_said(self.before)} -> {_said(self.after)}"
        apart = f", {abs(self.after - self.before) / self.stderr:.1f} standard errors" if self.stderr else ""
        return f"{self.name}: {self.before:.6g} -> {self.after:.6g} ({self.after - self.before:+.3g}{apart})"


@dataclass(frozen=True)
class Comparison:
    """Two records of a trial."""

    of: Path
    changed: dict[str, tuple[Any, Any]]  # versions, device, code and settings: before and now
    figures: list[Figure]
    status: tuple[str, str]
    losses: tuple[int, int | None]  # how many were logged in both, and the first step that differs
    adapter: bool | None  # whether the saved weights are the same bytes; None where one has none
    costs: list[str]  # how long it took and what it held, before and now: never judged

    @property
    def different(self) -> list[Figure]:
        """What is not equal to the bit."""
        return [figure for figure in self.figures if not figure.equal]

    @property
    def equal(self) -> bool:
        """Whether everything is equal to the bit."""
        return not self.different and self.losses[1] is None and self.adapter is not False and not self._other_end

    @property
    def exact(self) -> bool:
        """Whether the bits must be the same: a CPU, with the same settings, versions and threads."""
        return not any(key.startswith((*ENVIRONMENT, IDENTITY)) for key in self.changed) and not self._on_gpu

    @property
    def same(self) -> bool:
        """Whether no score differs by more than what changed would allow."""
        if self._other_end:
            return False
        return self.equal if self.exact else all(figure.close for figure in self.figures if figure.score)

    @property
    def _other_end(self) -> bool:
        return self.status[0] != self.status[1]

    _on_gpu: bool = False

    def lines(self) -> list[str]:
        """What there is to say, the verdict last."""
        said = [f"{key}: {_said(before)} -> {_said(now)}" for key, (before, now) in self.changed.items()]
        lines = [f"changed: {line}" for line in said] or ["changed: nothing; the same versions, device and code"]
        if self._other_end:
            return [*lines, f"not the same: {self.status[0]} before, {self.status[1]} now"]
        lines += map(str, self.different)
        if self.losses[1] is not None:
            lines.append(f"logged losses: different from step {self.losses[1]} on")
        if self.adapter is False:
            lines.append("the adapter's weights: different")
        return [*lines, *self.costs, self.verdict]

    @property
    def verdict(self) -> str:
        """In one line: is it the same?"""
        if self.equal:
            weights = " and the adapter's weights" if self.adapter else ""
            return f"equal to the bit: {len(self.figures)} figures, {self.losses[0]} logged losses{weights}"
        if self.exact:
            return "not the same: on a CPU with the same versions every bit should be"
        far = ", ".join(figure.name for figure in self.figures if figure.score and not figure.close)
        if far:
            return f"not the same: {far} by more than {CLOSE:g} standard errors"
        return f"the same within {CLOSE:g} standard errors, not to the bit"


def original(path: str) -> Result:
    """The record in a trial's folder.

    Raises:
        InputError: there is none that can be repeated.
    """
    folder = Path(path).expanduser()
    if not (folder / RESULT).is_file():
        raise InputError(f"repeat={path}: no folder of a trial; it holds no {RESULT}")
    try:
        found = Result.read(folder)
    except RecordError as error:
        raise InputError(f"repeat={path}: {error}") from None
    if source := found.run_info.get("imported_from"):
        raise InputError(f"repeat={path}: not a trial of peftsweep but read from {source}")
    return found


def compare(before: Result, after: Result) -> Comparison:
    """Hold the record ``after`` against that of the trial it repeats."""
    flat = [record.flat(record.plain(vars(one) | {"folder": None})) for one in (before, after)]
    gpus = [one.meta_info.get("torch", {}).get("gpus") for one in (before, after)]
    return Comparison(
        of=before.folder or Path(),
        changed=_changed(*flat),
        figures=_figures(*flat),
        status=(before.status.name, after.status.name),
        losses=_losses(before.folder or Path(), after.folder or Path()),
        adapter=_same_files(before.folder or Path(), after.folder or Path()),
        costs=_costs(*flat),
        _on_gpu=any(gpus) and after.config.get("device") != "cpu",
    )


def write(comparison: Comparison, after: Result) -> None:
    """Keep what was found beside the record of the second trial."""
    found = {
        "repeat_of": comparison.of,
        "equal_to_the_bit": comparison.equal,
        "same": comparison.same,
        "verdict": comparison.verdict if after.status is Status.success else comparison.lines()[-1],
        "changed": {key: {"before": before, "now": now} for key, (before, now) in comparison.changed.items()},
        "different": {figure.name: {"before": figure.before, "now": figure.after} for figure in comparison.different},
    }
    record.write_json((after.folder or Path()) / FILE, found)


Flat = Mapping[str, Any]


def _changed(before: Flat, after: Flat) -> dict[str, tuple[Any, Any]]:
    """Versions, system, device, place and settings that differ; a record of old may lack some."""
    keys = [key for key in dict.fromkeys([*before, *after]) if key.startswith(ENVIRONMENT) or key in PLACE]
    keys += [
        key
        for key in dict.fromkeys([*before, *after])
        if key.startswith("config.") and key.split(".")[1] not in (*NOT_REPEATED, "label")
    ]
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}


def _figures(before: Flat, after: Flat) -> list[Figure]:
    scores = [
        key.removesuffix(".value")
        for key in dict.fromkeys([*before, *after])
        if key.startswith("eval_info.") and key.endswith(".value")
    ]
    found = []
    for name in scores:
        errors = [side.get(f"{name}.stderr") for side in (before, after)]
        stderr = math.hypot(*errors) if None not in errors else None  # type: ignore[arg-type]
        values = (before.get(f"{name}.value"), after.get(f"{name}.value"))
        found.append(Figure(name.removeprefix("eval_info."), *values, stderr, score=True))
    names = [f"train_info.{name}" for name in COUNTED]
    return found + [Figure(name, before.get(name), after.get(name)) for name in names if name in before]


def _losses(before: Path, after: Path) -> tuple[int, int | None]:
    logs = [
        {row["step"]: row["loss"] for row in record.read_lines(place / STEPS) if "loss" in row}
        for place in (before, after)
    ]
    both = sorted(logs[0].keys() & logs[1].keys())
    return len(both), next((step for step in both if logs[0][step] != logs[1][step]), None)


def _same_files(before: Path, after: Path) -> bool | None:
    """Whether the two adapters are the same bytes."""
    names = [{file.name for file in (place / ADAPTER).glob("*.safetensors")} for place in (before, after)]
    if not names[0] or not names[1]:
        return None
    same = filecmp.cmpfiles(before / ADAPTER, after / ADAPTER, sorted(names[0]), shallow=False)[0]
    return names[0] == names[1] == set(same)


def _costs(before: Flat, after: Flat) -> list[str]:
    lines = []
    for key in (*TIMED, *MEMORY):
        old, new = before.get(key), after.get(key)
        if old and new:
            shown = [size(value) if key in MEMORY else f"{value:,.1f}" for value in (old, new)]
            lines.append(f"{key}: {shown[0]} -> {shown[1]} ({new / old:.2f} times)")
    return lines


def _said(value: Any) -> str:
    return "not recorded" if value is None else str(value)
