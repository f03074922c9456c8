"""Compare a trial that was run again with its first run: are the results the same, and what changed in between?

There are two rules. With the same CPU, kernels, versions, thread count and settings, every number must be equal to the
bit. If any of these differs or is not recorded, the order of summation may differ, so a score may differ by ``CLOSE``
standard errors. The comparison says which rule it applied and why.
"""

from __future__ import annotations

import filecmp
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftsweep.data import hub
from peftsweep.errors import InputError
from peftsweep.observe.display import size
from peftsweep.study import record
from peftsweep.study.reading import Unreadable, check
from peftsweep.study.record import RESULT, STEP, STEPS, Result, Status
from peftsweep.study.store import ADAPTER

FILE = "repeat.json"  # the result of the comparison, in the folder of the second trial
# Keys that are not read from the record: they say where and how a command runs, and change no result.
NOT_REPEATED = (
    "study",
    "repeat",
    "experiments",
    "force",
    "trust",
    "dry_run",
    "quiet",
    "stop_on_failure",
    "tracker",
    "profiler",
)
COUNTED = ("final_loss", "best_loss", "steps", "tokens", "training_rows", "trainable_parameters", "total_parameters")
TIMED = ("train_info.train_seconds", "train_info.tokens_per_second", "run_info.total_seconds")
MEMORY = ("memory.train.allocated_peak", "memory.train.rss_peak")
IDENTITY = "run_info.identity"  # a hash of all settings and data that change a number
DATA = ("model_sha", "dataset_sha", "tokenizer_sha", "rows_sha")
PLACE = (IDENTITY, "run_info.host", "run_info.git_commit", "run_info.git_branch", "run_info.git_dirty")
# Columns whose change may change the last bits of a sum, and so an answer. Code is left out: its changes must show.
ENVIRONMENT = (
    *("meta_info.packages.", "meta_info.torch.", "meta_info.system.machine", "meta_info.system.processor"),
    "meta_info.system.python",
)
CAPABILITY = "meta_info.torch.cpu_capability"  # older records lack it
CLOSE = 2.0  # standard errors by which scores may differ: 95% of equal scores differ by less
CLOSE_WITHOUT_ERROR = 0.02  # the relative difference allowed for scores without a standard error, and for losses
NEVER_ROUNDED = ("steps", "tokens", "training_rows", "trainable_parameters", "total_parameters")


@dataclass(frozen=True)
class Figure:
    """A score, loss or count in both records; None if a record lacks it."""

    name: str
    before: float | None
    after: float | None
    stderr: float | None = None  # of the difference, computed as for different rows: an upper bound
    score: bool = False  # of an evaluation
    count: bool = False  # of rows, tokens, steps or parameters

    @property
    def equal(self) -> bool:
        """Whether the two are equal to the bit."""
        return self.before == self.after

    @property
    def close(self) -> bool:
        """Whether another version or device can explain the difference."""
        if self.before is None or self.after is None or self.equal:
            return self.equal
        if self.stderr:
            return abs(self.after - self.before) <= CLOSE * self.stderr
        return math.isclose(self.after, self.before, rel_tol=CLOSE_WITHOUT_ERROR)

    def __str__(self) -> str:
        if self.before is None or self.after is None:
            return f"{self.name}: {_value_in_words(self.before)} -> {_value_in_words(self.after)}"
        apart = f", {abs(self.after - self.before) / self.stderr:.1f} standard errors" if self.stderr else ""
        return f"{self.name}: {self.before:.6g} -> {self.after:.6g} ({self.after - self.before:+.3g}{apart})"


@dataclass(frozen=True)
class Comparison:
    """Two records of a trial."""

    of: Path
    changed: dict[str, tuple[Any, Any]]  # versions, device, code and settings: before and now
    figures: list[Figure]
    status: tuple[str, str]
    losses: tuple[int, int | None]  # the number of steps logged in both, and the first step that differs
    adapter: bool | None  # whether the saved weights are equal in every byte; None if one is missing
    costs: list[str]  # time and memory, before and now, for information only
    because: list[str]  # reasons why the numbers may differ in their last bits; empty: they must be equal

    @property
    def different(self) -> list[Figure]:
        """The figures that are not equal to the bit."""
        return [figure for figure in self.figures if not figure.equal]

    @property
    def equal(self) -> bool:
        """Whether everything is equal to the bit."""
        return not self.different and self.losses[1] is None and self.adapter is not False and not self._other_end

    @property
    def exact(self) -> bool:
        """Whether the numbers must be equal to the bit: the same CPU, kernels, settings, versions and threads."""
        return not self.because

    @property
    def far(self) -> list[Figure]:
        """The scores (else losses) and counts that differ by more than another order of summation explains."""
        scored = any(figure.score for figure in self.figures)
        judged = [figure for figure in self.figures if figure.score or figure.count or not scored]
        return [figure for figure in judged if not (figure.equal if figure.count else figure.close)]

    @property
    def same(self) -> bool:
        """Whether no figure differs by more than the changes of version and device allow."""
        if self._other_end:
            return False
        return self.equal if self.exact else not self.far

    @property
    def _other_end(self) -> bool:
        return self.status[0] != self.status[1]

    def lines(self) -> list[str]:
        """The comparison as lines of text, the verdict last."""
        changes = [
            f"{key}: {_value_in_words(before)} -> {_value_in_words(now)}" for key, (before, now) in self.changed.items()
        ]
        lines = [f"changed: {line}" for line in changes] or ["changed: nothing; the same versions, device and code"]
        if self._other_end:
            return [*lines, f"not the same: {self.status[0]} before, {self.status[1]} now"]
        lines += [self.rule, *map(str, self.different)]
        if self.losses[1] is not None:
            lines.append(f"logged losses: different from step {self.losses[1]} on")
        if self.adapter is False:
            lines.append("the adapter's weights: different")
        return [*lines, *self.costs, self.verdict]

    @property
    def rule(self) -> str:
        """The rule that was applied, and the reason."""
        if self.exact:
            return "judged to the bit: the same CPU, kernels, versions, thread count and settings"
        return f"judged within {CLOSE:g} standard errors: {'; '.join(self.because)}"

    @property
    def verdict(self) -> str:
        """One line that says whether the results are the same."""
        if self.equal:
            weights = " and the adapter's weights" if self.adapter else ""
            return f"equal to the bit: {len(self.figures)} figures, {self.losses[0]} logged losses{weights}"
        if self.exact:
            return "not the same: with the same CPU, versions and threads the numbers should be equal to the bit"
        if counts := [figure.name for figure in self.far if figure.count]:
            return f"not the same: {', '.join(counts)}, which rounding cannot change"
        if self.far:
            return f"not the same: {', '.join(figure.name for figure in self.far)} by more than {self._tolerance}"
        return f"the same within {self._tolerance}, not to the bit"

    @property
    def _tolerance(self) -> str:
        if any(figure.stderr for figure in self.figures):
            return f"{CLOSE:g} standard errors"
        return f"{CLOSE_WITHOUT_ERROR:.0%}"


def original(path: str) -> Result:
    """The record in a trial's folder.

    Raises:
        InputError: the folder holds no record, or one that cannot be repeated.
    """
    folder = Path(path).expanduser()
    if not os.path.lexists(folder / RESULT):
        raise InputError(f"repeat={path}: is not the folder of a trial; it holds no {RESULT}")
    try:
        found = Result.read(folder)
        check(found.run_info, {"study": str}, str(folder / RESULT))
    except Unreadable as error:
        raise InputError(f"repeat={path}: {error}") from None
    if source := found.run_info.get("imported_from"):
        raise InputError(f"repeat={path}: is not a trial of peftsweep; it was imported from {source}")
    return found


def commits(of: Result) -> dict[str, str]:
    """The commits of the hub that a trial's model and dataset were loaded from, by section of the configuration."""
    found = {section: str(of.meta_info.get(f"{section}_sha")) for section in ("model", "dataset")}
    return {section: commit for section, commit in found.items() if hub.COMMIT.fullmatch(commit)}


def compare(before: Result, after: Result) -> Comparison:
    """Compare the record ``after`` with that of the trial it repeats."""
    flat = [record.flat(record.plain(vars(one) | {"folder": None})) for one in (before, after)]
    changed = _without_pins(_changed(*flat), before, after)
    return Comparison(
        of=before.folder or Path(),
        changed=changed,
        figures=_figures(*flat),
        status=(before.status.name, after.status.name),
        losses=_losses(before.folder or Path(), after.folder or Path()),
        adapter=_same_files(before.folder or Path(), after.folder or Path()),
        costs=_costs(*flat),
        because=[*_other_device(before, after), *_other_kernels(changed, flat[0]), *_other_sums(before, after)],
    )


def write(comparison: Comparison, after: Result) -> None:
    """Write the comparison beside the record of the second trial."""
    found = {
        "repeat_of": comparison.of,
        "equal_to_the_bit": comparison.equal,
        "judged": "to the bit" if comparison.exact else "within a tolerance",
        "because": comparison.because,
        "same": comparison.same,
        "verdict": comparison.verdict if after.status is Status.success else comparison.lines()[-1],
        "changed": {key: {"before": before, "now": now} for key, (before, now) in comparison.changed.items()},
        "different": {figure.name: {"before": figure.before, "now": figure.after} for figure in comparison.different},
    }
    record.write_json((after.folder or Path()) / FILE, found)


Flat = Mapping[str, Any]


def _other_device(before: Result, after: Result) -> list[str]:
    gpus = [one.meta_info.get("torch", {}).get("gpus") for one in (before, after)]
    return ["the order of summation on a GPU is not fixed"] if any(gpus) and after.config.get("device") != "cpu" else []


def _other_kernels(changed: Mapping[str, tuple[Any, Any]], before: Flat) -> list[str]:
    """The parts of environment and settings that differ, or that a record lacks."""
    unknown = before.get(CAPABILITY) is None
    keys = [key for key in changed if key.startswith((*ENVIRONMENT, IDENTITY)) and not (unknown and key == CAPABILITY)]
    reasons = [f"{', '.join(key.removeprefix('meta_info.') for key in keys)} changed"] if keys else []
    if unknown:
        reasons.append("the first record does not say which CPU kernels were used")
    return reasons


def _other_sums(before: Result, after: Result) -> list[str]:
    """Reasons from how the trials ran: in a pack, or resumed."""
    sides = (before, after)
    packs = any(one.train_info.get("packed") or one.run_info.get("packed_with") for one in sides)
    reasons = ["a trial was trained in a pack, which sums in another order"] if packs else []
    if any(one.run_info.get("resumed") for one in sides):
        reasons.append("a trial was resumed from a checkpoint, which another machine may have written")
    return reasons


def _changed(before: Flat, after: Flat) -> dict[str, tuple[Any, Any]]:
    """Versions, system, device, place and settings that differ; an older record may lack some."""
    keys = [key for key in dict.fromkeys([*before, *after]) if key.startswith(ENVIRONMENT) or key in PLACE]
    keys += [
        key
        for key in dict.fromkeys([*before, *after])
        if key.startswith("config.") and key.split(".")[1] not in (*NOT_REPEATED, "label")
    ]
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}


def _without_pins(changed: dict[str, tuple[Any, Any]], before: Result, after: Result) -> dict[str, tuple[Any, Any]]:
    """``changed`` without a revision that is set now and names the commit that was loaded before.

    If no other setting differs and all data are the same, only this changed the identity.
    """
    same = commits(before).items() & commits(after).items()
    pins = {f"config.{section}.revision" for section, _ in same}
    others = [key for key in changed if key.startswith("config.") and key not in pins]
    data = [[one.meta_info.get(key) for key in DATA] for one in (before, after)]
    if pins.intersection(changed) and not others and data[0] == data[1]:
        pins.add(IDENTITY)
    return {key: sides for key, sides in changed.items() if key not in pins}


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
    names = {f"train_info.{name}": name in NEVER_ROUNDED for name in COUNTED}
    return found + [
        Figure(name, before.get(name), after.get(name), count=count) for name, count in names.items() if name in before
    ]


def _losses(before: Path, after: Path) -> tuple[int, int | None]:
    logs = [
        {row["step"]: row["loss"] for row in record.usable_lines(place / STEPS, STEP) if "loss" in row}
        for place in (before, after)
    ]
    both = sorted(logs[0].keys() & logs[1].keys())
    return len(both), next((step for step in both if logs[0][step] != logs[1][step]), None)


def _same_files(before: Path, after: Path) -> bool | None:
    """Whether the files of the two adapters are equal in every byte."""
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


def _value_in_words(value: Any) -> str:
    return "not recorded" if value is None else str(value)
