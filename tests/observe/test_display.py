"""What a person sees of a sweep that runs: a live table in a terminal, plain lines in a pipe."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from peftsweep.observe.display import Display, _validated, scores_line, summary
from peftsweep.study.record import Result

ROW = {"step": 30, "steps": 120, "loss": 1.2345, "seconds": 60.0, "tokens_per_second": 1000.0}


class Clock:
    """Time as a test says."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def shown(total: int, *, width: int = 120, height: int = 30, terminal: bool = True, **env: str) -> Display:
    made = Display(total, clock=Clock())
    made.console = Console(
        file=io.StringIO(),
        width=width,
        height=height,
        force_terminal=terminal,
        highlight=False,
        soft_wrap=True,
        _environ={"TERM": "xterm-256color", **env},
    )
    made.live = terminal
    return made


def board(made: Display) -> list[str]:
    with made.console.capture() as seen:
        made.console.print(made.board())
    return [line.rstrip() for line in seen.get().splitlines()]


def plain(made: Display) -> list[str]:
    made.console = Console(file=io.StringIO(), width=made.console.width, height=made.console.height)
    return board(made)


def failed(folder: Path) -> Result:
    error = {"type": "ValueError", "message": "broken", "stage": "train", "traceback": ""}
    return Result({"trial": folder.name, "status": "failed", "error": error}, {}, {}, folder=folder)


def test_a_row_says_state_step_loss_score_memory_and_time_left() -> None:
    made = shown(3)
    view = made.trial("lora, r=8")
    view.stage("train")
    view.step(ROW | {"memory_allocated": 2.5e9, "validation_loss": 1.5, "validation_tiny.accuracy": 0.625})
    made.clock.now = 75.0  # type: ignore[attr-defined]
    head, row, last = plain(made)
    assert head.split() == ["trial", "state", "step", "loss", "score", "memory", "left"]
    assert row.split("  ")[0] == "[1/3] lora, r=8"
    cells = ["train", "30/120", "1.234", "tiny.accuracy 0.625", "2.5 GB", "3.0 min"]  # 90 steps of 2 seconds
    assert all(cell in row for cell in cells)
    assert last == "0 of 3 trials done, 75 s, about 11.5 min left"  # 180 s, and two more trials of 75 + 180 s


def test_a_validation_is_told_by_its_scores_and_each_loss_once() -> None:
    scores = {"loss": 1.5, "tiny.accuracy": 0.625, "tiny.valid_fraction": 1.0, "a.loss": 1.5, "a.perplexity": None}
    shown = _validated(ROW | {f"validation_{name}": value for name, value in scores.items()})
    assert shown == "loss 1.500, tiny.accuracy 0.625"
    assert _validated(ROW) == ""


def test_rows_that_all_agree_are_told_by_their_number_and_not_by_an_error_of_0() -> None:
    scores = {"accuracy": {"value": 0.0, "stderr": 0.0, "n": 1200}, "base_accuracy": {"value": 0.1}}
    assert scores_line(scores) == "accuracy 0.000 over 1,200 rows (base 0.100)"
    assert scores_line({"accuracy": {"value": 0.5, "stderr": 0.05, "n": 100}}) == "accuracy 0.500 ± 0.050"


def ended(folder: Path) -> Result:
    return Result({"trial": folder.name, "status": "success"}, {}, {}, train_info=TRAINED, folder=folder)


TRAINED = {"trainable_parameters": 1, "total_parameters": 2, "steps": 1, "train_seconds": 1.0}


def at(made: Display, now: float) -> str:
    """The last line of the board at a time."""
    made.clock.now = now  # type: ignore[attr-defined]
    return plain(made)[-1]


def test_before_a_trial_has_a_step_or_a_prediction_no_time_left_is_said() -> None:
    made = shown(4)
    made.trial("one").stage("load")
    assert at(made, 10.0) == "0 of 4 trials done, 10 s"


def test_trials_that_ended_say_how_long_the_others_take() -> None:
    made = shown(4)
    first, second = made.trial("one"), made.trial("two")
    made.clock.now = 20.0  # type: ignore[attr-defined]
    first.end(ended(Path("one")))
    third = made.trial("three")
    third.stage("load")
    second.stage("eval")
    # 20 s each: the second has 5 s left and the third 15, and the fourth follows the second.
    assert at(made, 25.0) == "1 of 4 trials done, 25 s, about 20 s left"


def test_what_was_predicted_says_the_time_left_of_work_that_has_no_steps() -> None:
    made = shown(2)
    view = made.trial("one")
    view.expects({"load": 4.0, "train": 100.0, "evaluate": 20.0, "save": 1.0})
    view.stage("train")
    assert plain(made)[1].endswith("2.0 min")  # 121 s
    view.step(ROW | {"step": 60, "seconds": 120.0})
    made.clock.now = 124.0  # type: ignore[attr-defined]
    assert view.left() == pytest.approx((60 / 65 * 2 + 5 / 65 * 100 / 120) * 60 + 21)
    view.stage("eval")
    assert at(made, 130.0).endswith("about 2.7 min left")  # 15 s, and another trial of 145 s
    assert "15 s" in plain(made)[1]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_table_is_no_wider_than_the_terminal_and_cuts_no_number(width: int) -> None:
    made = shown(2, width=width)
    view = made.trial("a method with a very long name, " * 4)
    view.stage("train")
    view.step(ROW | {"memory_allocated": 2.5e9, "validation_loss": 1.5})
    lines = plain(made)
    assert all(len(line) <= width for line in lines)
    assert "30/120" in lines[1]
    assert "1.234" in lines[1]
    assert "3.0 min" in lines[1]
    assert lines[1].count("…") == 1  # in the name


def test_the_table_is_no_higher_than_the_terminal() -> None:
    made = shown(40, height=10)
    for number in range(40):
        made.trial(f"r={number}")
    lines = plain(made)
    assert len(lines) <= 10
    assert "and 34 more" in lines


def test_trials_that_ended_or_begin_again_later_leave_the_table() -> None:
    made = shown(2)
    first, second = made.trial("one"), made.trial("two")
    first.end(failed(Path("multirun/default/one")))
    second.drop()
    second.drop()  # as a worker that dies may say so twice
    assert made.running == []
    assert plain(made)[-1].startswith("1 of 2 trials done, 1 failed, 0.0 s")


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("place", [Path, Path.absolute])
def test_the_log_of_a_failed_trial_is_a_link_in_a_terminal_alone(place: Callable[[Path], Path], terminal: bool) -> None:
    folder = place(Path("multirun/default/one"))
    made = shown(1, terminal=terminal)
    with made.console.capture() as seen:
        made.trial("one").end(failed(folder))
    assert (f";{folder.absolute().as_uri()}\x1b\\" in seen.get()) is terminal
    last = re.sub(r"\x1b\]8;.*?\x1b\\|\x1b\[[0-9;]*m", "", seen.get()).splitlines()[-1]
    assert last == "    see multirun/default/one/trial.log"


def test_an_error_without_a_message_is_told_by_its_type_alone() -> None:
    error = {"type": "KeyboardInterrupt", "message": "", "stage": "eval", "traceback": ""}
    held = Result({"trial": "one", "status": "cancelled", "error": error}, {}, {})
    assert summary(held) == ["cancelled in eval: KeyboardInterrupt"]


def test_no_color_is_heeded() -> None:
    coloured = [shown(1, NO_COLOR=value) for value in ("", "1")]
    assert [made.console.no_color for made in coloured] == [False, True]


def test_a_pipe_gets_a_line_every_ten_seconds() -> None:
    made = shown(1, terminal=False)
    clock: Any = made.clock
    with made.console.capture() as seen:
        view = made.trial("one")
        for seconds in (1.0, 11.0, 12.0, 22.0):
            clock.now = seconds
            view.step(ROW | {"step": int(seconds)})
    assert [line.split()[:2] for line in seen.get().splitlines()] == [
        ["[1/1]", "one"],
        ["step", "11/120"],
        ["step", "22/120"],
    ]
    assert "\x1b" not in seen.get()
