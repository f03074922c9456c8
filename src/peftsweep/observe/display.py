"""The output while trials run: a live line on a terminal, plain lines in a pipe, summaries."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.style import Style
from rich.table import Table
from rich.text import Text

from peftsweep.observe.remaining import format_seconds, remaining, remaining_of_sweep
from peftsweep.study.record import HEADLINE, Result, Status
from peftsweep.study.rungs import validation_scores
from peftsweep.study.scores import TEXT_METRICS, baseline

QUIET_SECONDS = 10.0  # the least seconds between two lines of a running trial in a pipe
COLUMNS = ("state", "step", "loss", "score", "memory", "left")  # of the live table, after the trial
NEEDED_WIDTH = {"memory": 80, "score": 100}  # these columns need a terminal of so many characters
WORDS = ("trial", "status", "model", "method", "quant")  # columns of a table that hold text


class Observer:
    """Receives the progress of a trial; this base class ignores it."""

    def stage(self, name: str) -> None:
        """A stage begins."""

    def step(self, row: dict[str, Any]) -> None:
        """A line was added to steps.jsonl."""

    def expects(self, seconds: Mapping[str, float]) -> None:
        """The predicted seconds of the trial's kinds of work: load, train, evaluate, save."""


class Display:
    """Shows the progress of a sweep of ``total`` trials: a live table in a terminal, plain lines in a pipe."""

    def __init__(self, total: int, *, quiet: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self.clock = clock
        self._total, self._quiet = total, quiet
        # A terminal that cannot move its cursor (TERM=dumb) shows no live lines.
        self.live = self.console.is_terminal and not self.console.is_dumb_terminal and not quiet
        self._number = self._done = self._bad = 0
        self._took = list[float]()  # seconds of the trials that have ended well, as this display saw them
        self._began = clock()
        self.running: list[TrialView] = []
        self._board = Live(get_renderable=self.board, console=self.console, transient=True, auto_refresh=self.live)

    def __enter__(self) -> Self:
        self._began = self.clock()
        if self.live:
            self._board.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live:
            self._board.stop()

    def say(self, text: str | Text) -> None:
        """Print a line."""
        if not self._quiet:
            self.console.print(text, markup=False)

    def trial(self, name: str) -> TrialView:
        """The next trial begins; returns its observer."""
        self._number += 1
        return TrialView(self, f"[{self._number}/{self._total}] {name}")

    def uncount(self) -> None:
        """A started trial is put back and starts again later."""
        self._number -= 1

    def count(self, result: Result, seconds: float) -> None:
        """A trial has ended, ``seconds`` after its start."""
        self._done, self._bad = self._done + 1, self._bad + (not result.status.good)
        self._took += [seconds] if result.status.good else []

    def board(self) -> RenderableType:
        """The running trials as a table that fits the terminal, and the progress of the sweep."""
        columns = [column for column in COLUMNS if self.console.width >= NEEDED_WIDTH.get(column, 0)]
        shown = Table(box=None, header_style="bold", expand=True, padding=(0, 2, 0, 0))
        shown.add_column("trial", ratio=1, no_wrap=True, overflow="ellipsis", min_width=10)
        for column in columns:
            shown.add_column(column, no_wrap=True, justify="left" if column == "state" else "right")
        running = list(self.running)
        room = max(1, self.console.height - 4)
        for view in running[:room]:
            figures = view.figures()
            shown.add_row(Text(view.name), *(figures.get(column, "") for column in columns))
        more = [Text(f"and {len(running) - room} more")] if len(running) > room else []
        return Group(shown, *more, Text(self._all_trials(), style="bold"))

    def _all_trials(self) -> str:
        elapsed = self.clock() - self._began
        left = self._left()
        failed = f", {self._bad} failed" if self._bad else ""
        until = f", about {format_seconds(left)} left" if left is not None else ""
        return f"{self._done} of {self._total} trials done{failed}, {format_seconds(elapsed)}{until}"

    def _left(self) -> float | None:
        """The seconds until all trials are done; waiting trials count with the mean of the others."""
        running = list(self.running)
        waiting = max(0, self._total - self._done - len(running))
        ages, left = [one.age for one in running], [one.left() for one in running]
        whole = self._took + [age + rest for age, rest in zip(ages, left, strict=True) if rest is not None]
        mean = sum(whole) / len(whole) if whole else None
        if mean is not None:
            left = [max(mean - age, 0.0) if rest is None else rest for age, rest in zip(ages, left, strict=True)]
        return remaining_of_sweep(left, [mean] * waiting, max(len(running), 1))


class TrialView(Observer):
    """The line of one running trial."""

    def __init__(self, display: Display, name: str) -> None:
        self._display, self.name = display, name
        self._state, self._row = "", dict[str, Any]()
        self._expected: Mapping[str, float] = {}
        self._began = self._stage_began = self._last_line = display.clock()
        display.running.append(self)
        if not display.live:
            display.say(name)

    def stage(self, name: str) -> None:
        """The trial enters a stage."""
        self._state, self._stage_began = name, self._display.clock()

    def expects(self, seconds: Mapping[str, float]) -> None:
        """The predicted seconds of its work, by kind."""
        self._expected = seconds

    def step(self, row: dict[str, Any]) -> None:
        """The trial logged a step."""
        self._row |= row
        now = self._display.clock()
        if not self._display.live and now - self._last_line >= QUIET_SECONDS:
            self._last_line = now
            figures = "  ".join(
                [
                    *([f"loss {row['loss']:.3f}"] if "loss" in row else []),
                    *([f"{row['tokens_per_second']:,.0f} tokens/s"] if "tokens_per_second" in row else []),
                    *([size(row["memory_allocated"])] if row.get("memory_allocated") else []),
                    *([f"validation: {validated}"] if (validated := _validated(row)) else []),
                ]
            )
            left = self.left()
            until = "" if left is None else f"  {left:.0f} s left"
            self._display.say(f"    step {row['step']}/{row['steps']}  {figures}{until}")

    @property
    def age(self) -> float:
        """The seconds since it began."""
        return self._display.clock() - self._began

    def left(self) -> float | None:
        """Its remaining seconds, from the prediction and its own steps; None if neither is known."""
        row, stage = self._row, self._state or ("train" if self._row else "setup")
        in_stage = self._display.clock() - self._stage_began
        return remaining(self._expected, stage, in_stage, row.get("step", 0), row.get("steps"), row.get("seconds"))

    def figures(self) -> dict[str, str]:
        """The cells of its row in the live table, by column."""
        row = self._row
        scores = validation_scores(row)
        headline = next((name for name in scores if name != "loss"), "loss")
        left = self.left()
        return {
            "state": self._state,
            "step": f"{row['step']}/{row['steps']}" if row else "",
            "loss": f"{row['loss']:.3f}" if row.get("loss") is not None else "",
            "score": f"{headline} {scores[headline]:.3f}" if scores.get(headline) is not None else "",
            "memory": size(row["memory_allocated"]) if row.get("memory_allocated") else "",
            "left": format_seconds(left) if left is not None else "",
        }

    def drop(self) -> None:
        """Remove the line: the trial is not run, or runs elsewhere."""
        if self in self._display.running:
            self._display.running.remove(self)

    def end(self, result: Result, *, named: bool = False) -> None:
        """The trial has ended; with ``named`` its name is printed again, because other trials ran beside it."""
        self.drop()
        self._display.count(result, self.age)
        if self._display.live or named:
            self._display.say(self.name)
        for line in summary(result):
            self._display.say(_linked(f"    {line}", result))


def _linked(line: str, result: Result) -> Text:
    """The line, with the path of the trial's log as a link to its folder."""
    text = Text(line)
    if result.folder is not None and (at := line.find(str(_shown(result.folder)))) >= 0:
        text.stylize(Style(link=result.folder.absolute().as_uri()), at)
    return text


def _shown(folder: Path) -> Path:
    """The path of a folder from the working directory on, if it lies in it."""
    here = Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder


def summary(result: Result) -> list[str]:
    """One trial in a few lines: its status, scores and costs."""
    if result.error:
        where = f" in {result.error['stage']}" if result.status is not Status.refused else ""
        message = (result.error["message"].splitlines() or [""])[0]
        kind = "" if result.status is Status.refused else str(result.error["type"])
        lines = [": ".join(filter(None, (f"{result.status.name}{where}", kind, message)))]
        if result.folder is not None and result.status in (Status.failed, Status.oom):
            lines.append(f"see {_shown(result.folder) / 'trial.log'}")
        return lines
    if rung := result.run_info.get("rung"):
        value = "no number" if rung["value"] is None else f"{rung['value']:.4f}"
        return [f"stopped at rung {rung['number']}, step {rung['step']}: {rung['metric']} {value}"]
    if stop := result.run_info.get("stopped"):
        return [_stop_line(stop)]
    lines = [f"{name}: {text}" for name, scores in result.eval_info.items() if (text := scores_line(scores))]
    info = result.train_info
    rss = max((m.get("rss_peak", 0) for m in result.memory.values()), default=0)
    device = result.memory.get("packed_train", result.memory.get("train", {})).get("allocated_peak")
    share = info["trainable_parameters"] / info["total_parameters"]
    took = info.get("packed", info)  # the time of a pack is not that of the trial
    rate = f", {took['tokens_per_second']:,.0f} tokens/s" if took.get("tokens_per_second") else ""
    others = f" with {took['lanes'] - 1} others" if "packed" in info else ""
    lines.append(
        f"{info['trainable_parameters']:,} trainable parameters ({share:.2%}); "
        f"trained {info['steps']} steps in {took['train_seconds']:.1f} s{rate}{others}; "
        + (f"peak {size(device)} on the device" if device else f"peak {size(rss)} resident")
        + (f"; adapter {size(info['adapter_bytes'])}" if info.get("adapter_bytes") else "")
    )
    return [*lines, *(f"warning: {caution}" for caution in result.cautions())]


def _validated(row: dict[str, Any]) -> str:
    """``loss 2.243, gsm8k.accuracy 0.250``: a validation, without evaluations' losses and valid fractions."""
    hidden = (".loss", ".valid_fraction")
    shown = {n: v for n, v in validation_scores(row).items() if v is not None and not n.endswith(hidden)}
    return ", ".join(f"{name} {value:.3f}" for name, value in shown.items())


def _stop_line(stop: dict[str, Any]) -> str:
    """``stopped at step 40, patience: loss 1.2000, the best was 1.1000 at step 20``."""
    value, best = ("no number" if stop[key] is None else f"{stop[key]:.4f}" for key in ("value", "best_value"))
    at = f", the best was {best} at step {stop['best_step']}" if stop["best_step"] not in (None, stop["step"]) else ""
    return f"stopped at step {stop['step']}, {stop['why']}: {stop['metric']} {value}{at}"


def scores_line(scores: dict[str, Any]) -> str:
    """``accuracy 0.84 ± 0.03 (base 0.01, majority 0.50, chance 0.50)`` for each metric, the headline first."""
    parts = []
    hidden = ("loss", *(TEXT_METRICS if HEADLINE in scores else ()))  # figures that only explain another one
    for metric in sorted(scores, key=lambda metric: metric != scores.get(HEADLINE)):
        score = scores[metric]
        silent = metric.startswith("base_") or metric.endswith("valid_fraction") or metric in hidden
        if silent or not _is_score(score):
            continue
        value, stderr = score["value"], score["stderr"]
        text = f"{metric} {value:.3f}" if value is not None else f"{metric} infinite"
        if stderr is not None:  # it is 0 if all rows agree; then the number of rows says more
            text += f" ± {stderr:.3f}" if stderr > 0 else f" over {score['n']:,} rows"
        beside = {
            "base": scores.get(f"base_{metric}", {}).get("value"),
            "majority": baseline(scores, metric, "majority"),
            "chance": baseline(scores, metric, "random"),
        }
        figures = ", ".join(f"{name} {figure:.3f}" for name, figure in beside.items() if figure is not None)
        parts.append(text + (f" ({figures})" if figures else ""))
    return ", ".join(parts)


def _is_score(score: Any) -> bool:
    return isinstance(score, dict) and {"value", "stderr", "n"} <= set(score)


def size(count: float | None) -> str:
    """Bytes as text: ``3.2 MB``, in powers of 1000."""
    if count is None:
        return "?"
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def show_table(title: str, rows: list[dict[str, str]]) -> None:
    """Print rows as a table with one column for each key."""
    console = Console(highlight=False)
    shown = Table(title=title, title_justify="left", header_style="bold")
    columns = list(dict.fromkeys(column for row in rows for column in row))
    for column in columns:
        shown.add_column(column, justify="left" if column in WORDS else "right")
    for row in rows:
        shown.add_row(*(row.get(column, "") for column in columns))
    if not console.is_terminal:
        console.width = 200  # a pipe has no width; wrapping would break the rows
    console.print(shown)
