"""multirun/<study>/sweeps/: a file for each command that ran trials, with the seconds in which no trial ran.

These seconds are the overhead of a sweep: imports, checks of all points, the start of workers, waiting, the end.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from peftsweep.study import owner, record
from peftsweep.study.reading import Unreadable, read_text, usable
from peftsweep.study.record import Result

FOLDER = "sweeps"
COMMAND = "PEFTSWEEP_COMMAND"  # the environment variable with the token of the command that a trial is run by
AT_ONCE = "PEFTSWEEP_TRIALS_AT_ONCE"  # the environment variable of a worker for the result of ``trials_at_once``
AT_ONCE_KEY = "trials_at_once"  # the key of a record's ``meta_info.system`` for it
DURATION_FIELDS = {"seconds": (int, float), "seconds_outside_trials": (int, float)}  # the fields that are read again
FORCED = ".forced"  # suffix of a file: the token of a command with force=true that has not run all of its trials
PLACING = re.compile(r"(dry_run|quiet|hydra[./]launcher)\b")  # words that say how and where a command runs its trials
_began: list[float] = []
_forced: list[Path] = []  # the files of suffix FORCED of this command
_not_run: list[int] = []  # the number of trials not run, for each sweep of the command
plans: list[Path] = []  # the plans that the command has written with dry_run=true


def command_begins() -> None:
    """Note that a command has just started, in this process; the processes that it starts inherit its token."""
    _began[:] = [time.perf_counter()]
    for noted in (_not_run, _forced, plans):
        noted.clear()
    os.environ[COMMAND] = uuid.uuid4().hex


def command_ends() -> None:
    """Note that the command has come to its end. If it has run all of its trials, the next one forces them again."""
    for file in [] if not_run() or plans else _forced:
        with suppress(OSError):
            file.unlink()


def command_token() -> str:
    """The token of the command by which this process runs trials; empty where no command of peftsweep does."""
    return os.environ.get(COMMAND, "")


def trials_at_once() -> int:
    """The number of trials that run at the same time on the device of this process, at most."""
    return int(os.environ.get(AT_ONCE) or 1)


def not_run() -> int:
    """The number of trials that this command did not run because of a limit, a deadline or an interrupt."""
    return sum(_not_run)


def last_attempt_seconds(result: Result) -> float:
    """The seconds of the last attempt of a trial; its total includes attempts before a checkpoint.

    Those of a packed trial are the seconds of its whole pack.
    """
    return float(result.run_info.get("sitting_seconds", result.run_info["total_seconds"]))


def pack_size(result: Result) -> int:
    """The number of trials that were trained together with this one, itself included."""
    return 1 + len(result.run_info.get("packed_with") or ())


class SweepRecord:
    """What one command did in a study. A command may run trials several times, as halving does."""

    def __init__(self, study: Path, words: Sequence[str], workers: int | None) -> None:
        self._began = _began.pop() if _began else time.perf_counter()
        self._file = study / FOLDER / f"{time.strftime('%Y%m%d-%H%M%S')}-{owner.tag()}.json"
        self._words = list(words)
        self._facts = {
            "command": self._words,
            "created_at": record.now(),
            "host": record.host(),
            "workers": workers,  # on this machine; null: another launcher ran the trials
        }
        self._spans: list[tuple[float, float]] = []  # begin and end of each trial, by time.perf_counter
        self._ended: Counter[str] = Counter()
        self._left = 0

    def resume_forced(self) -> str | None:
        """With ``force=true``: take the token of the same command that was cut off; a line about it, None without one.

        The trials that it has run are then done, and those that it has begun go on, as after any other cut. Other
        versions of the packages run all trials again.
        """
        words = sorted(word for word in self._words if not PLACING.match(word))
        about = json.dumps([words, record.packages()], sort_keys=True)
        file = self._file.with_name(hashlib.sha256(about.encode()).hexdigest()[:16] + FORCED)
        if file in _forced or not command_token():
            return None
        _forced.append(file)
        try:
            token, since = read_text(file), time.localtime(file.stat().st_mtime)
        except (Unreadable, OSError):
            return None
        os.environ[COMMAND] = token
        date = time.strftime("%Y-%m-%d %H:%M", since)
        return f"goes on with the same command of {date}: trials that it has forced are not run once more"

    def begin_forced(self) -> None:
        """Write the token for ``resume_forced``, before the first trial runs."""
        for file in _forced:
            record.write_text(file, command_token())

    def add(self, result: Result) -> None:
        """Note a trial that has just ended."""
        now = time.perf_counter()
        self._spans.append((max(self._began, now - last_attempt_seconds(result)), now))
        self._ended[result.status.name] += 1

    def leave(self, count: int) -> None:
        """Count trials that this command did not finish because of a limit, a deadline or an interrupt."""
        self._left += count
        _not_run.append(count)

    def write(self) -> None:
        """Write the file with all that is known so far, if a trial has run."""
        if not self._spans:
            return
        seconds = time.perf_counter() - self._began
        trials = covered(self._spans)
        first, last = min(begin for begin, _ in self._spans), max(end for _, end in self._spans)
        times = {"seconds": seconds, "seconds_in_trials": trials, "seconds_outside_trials": seconds - trials}
        # Parts of the seconds outside: before the first trial, and between trials. The rest is after the last trial.
        times |= {"seconds_before_trials": first - self._began, "seconds_between_trials": last - first - trials}
        ended = {"trials": dict(self._ended), "not_run": self._left}
        record.write_json(self._file, self._facts | ended | times)


def last(study: Path) -> dict[str, Any] | None:
    """The file of the newest command that ran trials in this study; unreadable files are named on stderr."""
    for file in sorted((study / FOLDER).glob("*.json"), reverse=True):
        found: dict[str, Any] | None = usable(partial(record.read_json, file, DURATION_FIELDS))
        if found is not None:
            return found
    return None


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """The seconds in which at least one of the spans (begin, end) runs."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total
