"""Standard streams that are closed, are ASCII, or whose reader goes away."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

DOOR = """
import sys
from peftsweep.observe import streams
streams.settle()
kept = open("kept.txt", "w")  # which has a closed stream's number, were that left closed
for line in range(20_000):
    print(f"{line}: 0.5 \\u00b1 0.1, \\u2212{line} \\u4e00 \\ud800")
print("said", file=sys.stderr)
kept.write("whole")
kept.close()
print("end", flush=True)
"""
FULL = Path("/dev/full")


def outlives(redirection: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """The script with such output, as a shell starts it; it must come to its end."""
    Path("door.py").write_text(DOOR)
    command = f"'{sys.executable}' -W ignore door.py {redirection}"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, env=os.environ | environment)
    assert (done.returncode, Path("kept.txt").read_text()) == (0, "whole"), done.stderr
    return done


@pytest.mark.parametrize(
    "redirection", ["| head -1", "2>&1 | head -1", ">&-", "2>&-", "<&- >&- 2>&-", "> /dev/full", "2> /dev/full"]
)
def test_a_command_outlives_its_output(redirection: str) -> None:
    if "/dev/full" in redirection and not FULL.exists():
        pytest.skip("needs /dev/full")
    assert b"Error" not in outlives(redirection).stderr


def test_a_full_pipe_that_does_not_block_is_waited_for() -> None:
    Path("door.py").write_text(DOOR)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with subprocess.Popen([sys.executable, "door.py"], stdout=writing, stderr=subprocess.PIPE) as process:
        os.close(writing)
        time.sleep(1.0)  # in which the pipe gets full
        with open(reading, "rb") as pipe:
            lines = len(pipe.read().splitlines())
        _, err = process.communicate()
    assert (process.returncode, err, lines) == (0, b"said\n", 20_001)


def test_characters_that_an_encoding_lacks_are_written_in_ascii() -> None:
    done = outlives("", PYTHONIOENCODING="ascii")
    assert done.stdout.splitlines()[7] == rb"7: 0.5 +/- 0.1, -7 \u4e00 \ud800"
    assert outlives("").stdout.decode().splitlines()[7] == "7: 0.5 ± 0.1, −7 一 \\ud800"
