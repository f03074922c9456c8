"""What a person sees while trials run: a live line on a terminal, plain lines in a pipe, summaries."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from peftsweep.study.record import HEADLINE, Result, Status
from peftsweep.study.scores import baseline

QUIET_SECONDS = 10.0  # at most a line this often from a running trial in a pipe


WORDS = ("trial", "status", "model", "method", "quant")  # columns of a table that are no numbers


class Observer:
    """Is told how a trial comes along; this one keeps it to itself."""

    def stage(self, name: str) -> None:
        """A stage begins."""

    def step(self, row: dict[str, Any]) -> None:
        """A line was added to steps.jsonl."""


class Display:
    """Tells how a sweep of ``total`` trials comes along: a live line a running trial, or plain lines in a pipe."""

    def __init__(self, total: int, *, quiet: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self.clock = clock
        self._total, self._quiet = total, quiet
        # A terminal that cannot move its cursor (TERM=dumb) shows no live lines.
        self.live = self.console.is_terminal and not self.console.is_dumb_terminal and not quiet
        self._number = self._done = self._bad = 0
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.live,
        )
        self._all = self.progress.add_task("all trials", total=total, figures="", visible=total > 1)

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def say(self, text: str) -> None:
        """A line of its own."""
        if not self._quiet:
            self.console.print(text, markup=False)

    def trial(self, name: str) -> TrialView:
        """The next trial begins; what is given is its observer."""
        self._number += 1
        return TrialView(self, f"[{self._number}/{self._total}] {name}")

    def uncount(self) -> None:
        """The trial that began last, or another one, begins again later."""
        self._number -= 1

    def count(self, result: Result) -> None:
        """A trial has ended."""
        self._done, self._bad = self._done + 1, self._bad + (not result.status.good)
        figures = f"{self._bad} failed" if self._bad else ""
        self.progress.update(self._all, completed=self._done, figures=figures)


class TrialView(Observer):
    """The line of one running trial."""

    def __init__(self, display: Display, name: str) -> None:
        self._display, self._name = display, name
        self._task = display.progress.add_task(escape(name), total=None, figures="")
        self._last_line = display.clock()
        if not display.live:
            display.say(name)

    def stage(self, name: str) -> None:
        """The trial enters a stage."""
        self._display.progress.update(self._task, figures=name)

    def step(self, row: dict[str, Any]) -> None:
        """The trial logged a step."""
        figures = "  ".join(
            [
                *([f"loss {row['loss']:.3f}"] if "loss" in row else []),
                *([f"{row['tokens_per_second']:,.0f} tokens/s"] if "tokens_per_second" in row else []),
                *([size(row["memory_allocated"])] if row.get("memory_allocated") else []),
                *(f"{key} {row[key]:.3f}" for key in row if key.startswith("validation_")),
            ]
        )
        self._display.progress.update(self._task, completed=row["step"], total=row["steps"], figures=figures)
        now = self._display.clock()
        if not self._display.live and now - self._last_line >= QUIET_SECONDS:
            self._last_line = now
            left = (row["steps"] - row["step"]) * row["seconds"] / row["step"] if "seconds" in row else None
            until = "" if left is None else f"  {left:.0f} s left"
            self._display.say(f"    step {row['step']}/{row['steps']}  {figures}{until}")

    def drop(self) -> None:
        """The trial is not run after all, or not here."""
        self._display.progress.remove_task(self._task)

    def end(self, result: Result, *, named: bool = False) -> None:
        """The trial has ended; ``named`` where others run beside it, so that its lines may be far from its first."""
        self.drop()
        self._display.count(result)
        if self._display.live or named:
            self._display.say(self._name)
        for line in summary(result):
            self._display.say(f"    {line}")


def summary(result: Result) -> list[str]:
    """One trial in a few lines: how it ended, what it scores, what it cost."""
    if result.error:
        where = f" in {result.error['stage']}" if result.status is not Status.refused else ""
        message = (result.error["message"].splitlines() or [""])[0]
        kind = "" if result.status is Status.refused else f"{result.error['type']}: "
        lines = [f"{result.status.name}{where}: {kind}{message}"]
        if result.folder is not None and result.status in (Status.failed, Status.oom):
            lines.append(f"see {result.folder / 'trial.log'}")
        return lines
    if rung := result.run_info.get("rung"):
        value = "no number" if rung["value"] is None else f"{rung['value']:.4f}"
        return [f"stopped at rung {rung['number']}, step {rung['step']}: {rung['metric']} {value}"]
    lines = [f"{name}: {text}" for name, scores in result.eval_info.items() if (text := scores_line(scores))]
    info = result.train_info
    rss = max((m.get("rss_peak", 0) for m in result.memory.values()), default=0)
    device = result.memory.get("packed_train", result.memory.get("train", {})).get("allocated_peak")
    share = info["trainable_parameters"] / info["total_parameters"]
    took = info.get("packed", info)  # what a pack took is not the trial's own
    rate = f", {took['tokens_per_second']:,.0f} tokens/s" if took.get("tokens_per_second") else ""
    others = f" with {took['lanes'] - 1} others" if "packed" in info else ""
    lines.append(
        f"{info['trainable_parameters']:,} trainable parameters ({share:.2%}); "
        f"trained {info['steps']} steps in {took['train_seconds']:.1f} s{rate}{others}; "
        + (f"peak {size(device)} on the device" if device else f"peak {size(rss)} resident")
        + (f"; adapter {size(info['adapter_bytes'])}" if info.get("adapter_bytes") else "")
    )
    return [*lines, *(f"warning: {caution}" for caution in result.cautions())]


def scores_line(scores: dict[str, Any]) -> str:
    """``accuracy 0.84 ± 0.03 (base 0.01, majority 0.50, chance 0.50)`` for each metric, the headline first."""
    parts = []
    for metric in sorted(scores, key=lambda metric: metric != scores.get(HEADLINE)):
        score = scores[metric]
        if metric.startswith("base_") or metric.endswith("valid_fraction") or metric == "loss" or not _is_score(score):
            continue
        value, stderr = score["value"], score["stderr"]
        text = f"{metric} {value:.3f}" if value is not None else f"{metric} infinite"
        text += f" ± {stderr:.3f}" if stderr is not None else ""
        beside = {
            "base": scores.get(f"base_{metric}", {}).get("value"),
            "majority": baseline(scores, metric, "majority"),
            "chance": baseline(scores, metric, "random"),
        }
        said = ", ".join(f"{name} {figure:.3f}" for name, figure in beside.items() if figure is not None)
        parts.append(text + (f" ({said})" if said else ""))
    return ", ".join(parts)


def _is_score(score: Any) -> bool:
    return isinstance(score, dict) and {"value", "stderr", "n"} <= set(score)


def size(count: float | None) -> str:
    """Bytes for a reader: ``3.2 MB``, in powers of 1000."""
    if count is None:
        return "?"
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def show_table(title: str, rows: list[dict[str, str]]) -> None:
    """Print rows as a table with a column a key."""
    console = Console(highlight=False)
    shown = Table(title=title, title_justify="left", header_style="bold")
    columns = list(dict.fromkeys(column for row in rows for column in row))
    for column in columns:
        shown.add_column(
            column, justify="left" if column in ("trial", "status", "model", "method", "quant") else "right"
        )
    for row in rows:
        shown.add_row(*(row.get(column, "") for column in columns))
    if not console.is_terminal:
        console.width = 200  # a pipe has no width; wrapping would break the rows
    console.print(shown)
