"""The one call on a GPU host: all that is wanted is run within its time, whatever fails."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from benchmarks import gpu, method_matrix
from benchmarks.gpu import Step

TOP = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "GRACE_SECONDS", 0.3)
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 0.5)


def step(name: str, seconds: float, code: str) -> Step:
    return Step(name, seconds, f"-c {shlex.quote(code)}", "-c pass")


DEAF = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('begun', flush=True); time.sleep(60)"


def test_what_fails_or_takes_too_long_ends_nothing_else(scratch: Path, capfd: pytest.CaptureFixture[str]) -> None:
    checks = [
        step("fails", 20, "print('seen'); raise SystemExit(3)"),
        step("deaf", 4, DEAF),
        step("long", 4, "import time; print('begun', flush=True); time.sleep(60)"),
    ]
    measured = [step("last", 20, "print('figures'); print('a test PASSED here')")]
    found = gpu.run(checks, measured, 60, scratch / "out")
    assert {name: one["ended"] for name, one in found.items()} == {
        **{"fails": "exit code 3", "deaf": "over its limit", "long": "over its limit"},
        "last": "ok",
    }
    printed = capfd.readouterr().out
    assert "fails         seen" in printed
    assert "deaf          begun" in printed
    assert printed.index("#### long: over its limit") < printed.index("last          figures")
    assert "last          a test PASSED here" not in printed
    assert "PASSED" in (scratch / "out" / "last.log").read_text()
    assert json.loads((scratch / "out" / "steps.json").read_text())["steps"] == found


def test_what_has_no_time_left_is_not_begun(scratch: Path) -> None:
    measured = [step(name, 60, "import time; time.sleep(60)") for name in ("one", "two")]
    found = gpu.run([], measured, 2.0, scratch)
    assert {name: one["ended"] for name, one in found.items()} == {"one": "over its limit", "two": "not begun"}


def test_a_rehearsal_takes_the_commands_for_a_cpu(scratch: Path) -> None:
    assert gpu.run([step("one", 9, "raise SystemExit(1)")], [], 20, scratch, rehearse=True)["one"]["ended"] == "ok"


def test_every_script_is_there_and_names_are_unique() -> None:
    steps = [*gpu.CHECKS, *gpu.MEASUREMENTS]
    assert len({one.name for one in steps}) == len(steps)
    for one in steps:
        for command in (one.command, one.rehearsal):
            first = shlex.split(command)[0]
            assert first in ("-c", "-m") or (TOP / first).is_file(), command


def test_a_step_that_there_is_not_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--only", "packs,pax"])
    with pytest.raises(SystemExit, match="2"):
        gpu.main()
    assert "no step pax; there are doctor, " in capsys.readouterr().err


PAGE = """| method | what it is | trainable | none | 8bit | 4bit | seq-cls |
|---|---|--:|--:|--:|--:|--:|
| lora | LoRA | 81,920 | 1.80 RM | 1.80 Rm | 1.79 RM | 0.69 RM |
| dora | DoRA | 87,552 | 1.41 RM | refused (8) | 1.37 RM | 0.69 RM |
"""


def test_cells_of_the_matrix_that_are_others_here_are_named(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def row(method: str, quant: str, status: str = "success", loss: float = 1.8, message: str | None = None) -> Any:
        return {
            **{"choices.method": method, "choices.quant": quant, "run_info.status": status},
            **{"eval_info.perplexity.loss.value": loss, "train_info.final_loss": loss},
            **{"train_info.reloads": True, "train_info.merges": True, "train_info.merge_difference": 1e-6},
            "run_info.error.message": message,
        }

    rows = [row("lora", "none", loss=1.85), row("lora", "4bit", loss=2.5), row("lora", "8bit", "cancelled")]
    rows += [row("dora", "8bit", "refused", message="not on an 8-bit base: no")]
    rows += [row("dora", "4bit", "failed", message="x")]
    asked = list[Any]()

    def run(words: tuple[str, ...], seconds: float) -> pd.DataFrame:
        asked.append((words, seconds))
        return pd.DataFrame(rows)

    monkeypatch.setattr(method_matrix, "run", run)
    (scratch / "methods.md").write_text(PAGE)
    assert method_matrix.print_differences(scratch / "methods.md", 9.0, ["quant=none,4bit", "seed=1"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "lora 4bit: 2.50 RM, on the page 1.79 RM",
        "dora 4bit: failed, on the page 1.37 RM: x",
        "5 trials",
    ]
    ((words, seconds),) = asked
    assert seconds == 9.0
    assert [word for word in words if word.startswith(("quant", "seed"))] == ["quant=none,4bit", "seed=1"]
