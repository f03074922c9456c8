"""Whole commands whose output is cut off or closed, and collects beside a sweep and on a read-only disk (all slow)."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from peftsweep.study.record import Status
from tests.conftest import SMALL, records, start
from tests.study.test_damage import FIRST

pytestmark = pytest.mark.slow

SWEEP = [*SMALL, "method.r=2,4", "hydra.launcher.workers=1"]
HERE = [*SWEEP[:-1], "hydra.launcher.workers=0"]  # without a worker's start
COLLECT = "from peftsweep import cli; cli.collect()"


def through_a_shell(
    door: str, words: list[str], redirection: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """The command as a shell starts it with such output: its own exit code, and what reaches the test."""
    quoted = " ".join(f"'{word}'" for word in words)
    shell = f"set -o pipefail; '{sys.executable}' -c '{door}' {quoted} {redirection}"
    return subprocess.run(
        ["bash", "-c", shell], capture_output=True, text=True, env=os.environ | environment, timeout=900, check=False
    )


@pytest.mark.parametrize(
    ("redirection", "environment"),
    [
        ("", {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}),
        ("| head -1", {"TERM": "dumb"}),
        (">&-", {}),
        (">&- 2>&- <&-", {}),
        ("> /dev/full", {}),
    ],
)
def test_a_sweep_and_its_collection_come_to_their_end(redirection: str, environment: dict[str, str]) -> None:
    swept = through_a_shell("from peftsweep import cli; cli.main()", SWEEP, redirection, **environment)
    assert (swept.returncode, swept.stderr) == (0, "")
    assert [one.status for one in records().values()] == [Status.success] * 2
    collected = through_a_shell(COLLECT, [], redirection, **environment)
    assert (collected.returncode, collected.stderr) == (0, "")
    assert Path("multirun/default/report.html").stat().st_size
    if environment.get("PYTHONIOENCODING") == "ascii":
        assert (swept.stdout + collected.stdout).isascii()
        assert "+/-" in swept.stdout
        assert "+/-" not in Path("multirun/default/RESULTS.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("term", ["dumb", "xterm-256color"])
def test_a_terminal_that_can_do_little_gets_plain_lines(term: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", term)
    screen, side = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", "from peftsweep import cli; cli.main()", *HERE], stdin=side, stdout=side, stderr=side
    )
    os.close(side)
    seen = b""
    while True:
        try:
            part = os.read(screen, 65536)
        except OSError:  # the other side is closed
            part = b""
        if not part:
            break
        seen += part
    assert process.wait() == 0
    assert "2 trials: 2 success" in seen.decode()
    assert (b"\x1b" in seen) == (term != "dumb")


def test_collects_beside_a_running_sweep_read_what_is_there_and_disturb_nothing() -> None:
    process, seen = start(*SMALL, "train.steps=60", "method.r=2,4,8,16", "hydra.launcher.workers=0"), []
    while process.poll() is None:
        if records():
            done = subprocess.run([sys.executable, "-c", COLLECT, "--no-plots"], capture_output=True, text=True)
            assert (done.returncode, done.stderr) == (0, ""), done.stdout
            seen.append(len(pd.read_parquet("multirun/default/results.parquet")))
        time.sleep(0.5)
    out, err = process.communicate()
    assert (process.returncode, err) == (0, ""), out
    assert seen
    assert seen == sorted(seen)
    assert [one.status for one in records().values()] == [Status.success] * 4
    assert not list(Path("multirun").rglob("*.partial"))


@pytest.fixture
def read_only_study(tmp_path: Path) -> Iterator[Path]:
    """A real study of four trials, on a file system that may only be read."""
    shutil.copytree(FIRST, study := tmp_path / "multirun" / "ranks")
    mounted = ["mount", "--bind", "-o", "ro", str(study.parent), str(study.parent)]
    if subprocess.run(mounted, capture_output=True).returncode:
        pytest.skip("a file system can be mounted by root only")
    yield study
    subprocess.run(["umount", study.parent], check=True)


def test_a_study_on_a_disk_that_may_only_be_read_is_shown_and_written_elsewhere(read_only_study: Path) -> None:
    with pytest.raises(OSError, match="Read-only"):
        (read_only_study / "x").touch()
    done = subprocess.run([sys.executable, "-c", COLLECT, "--out", "table.csv"], capture_output=True, text=True)
    line = "multirun/ranks: nothing is written there: Read-only file system\n"
    assert (done.returncode, done.stderr) == (0, line)
    assert "4 trials: 4 success" in done.stdout
    assert len(pd.read_csv("table.csv")) == 4
    done = subprocess.run([sys.executable, "-c", COLLECT, "--status"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
