"""Trials on another launcher of Hydra's: SLURM, Ray, joblib, whatever places jobs.

It is given what is missing and nothing else. How a trial comes along and how it ended is read from the
study, which the machines share, so that it does not matter what the launcher tells of its jobs, or that
it gives up when one of them dies.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from peftsweep.config.compose import Trial
from peftsweep.errors import InputError
from peftsweep.observe.display import Display, TrialView
from peftsweep.study import claims as study_claims
from peftsweep.study import record, store
from peftsweep.study.claims import Claim
from peftsweep.study.record import Result, Status
from peftsweep.sweep.workers import CLAIM_RETRY_SECONDS
from peftsweep.trial import done, task

POLL_SECONDS = 1.0  # seconds between two looks at the study
MAX_TRIES = 2  # of a trial whose process dies: where that ends others too, the second time shows whose fault it was
WAITING_NOTICE_SECONDS = 60.0  # seconds without a trial after which the display says so
LAST_LINE = 4096  # bytes at the end of steps.jsonl that surely hold it


class WorkerDied(Exception):
    """A job is over and left no record; the launcher may know the status of its trial."""

    def __init__(self, message: str, status: Status = Status.failed) -> None:
        super().__init__(message)
        self.status = status


Launch = Callable[[Sequence[Trial]], Sequence[BaseException | None]]  # runs ``job`` for each; what went wrong in it


def job(one: Trial) -> None:
    """Run the trial in this process, unless it is done or another process that is alive runs it.

    That of a machine that was lost is known by its silence, which is waited for.
    """
    end = time.monotonic() + study_claims.LEASE_SECONDS + 2 * study_claims.HEARTBEAT_SECONDS
    while True:
        try:
            task.run(one)
            return
        except study_claims.Claimed:
            if time.monotonic() > end:
                return
            time.sleep(CLAIM_RETRY_SECONDS)


def run(trials: Sequence[Trial], launch: Launch, display: Display) -> Iterator[tuple[Trial, Result]]:
    """Have ``trials`` run by ``launch``, again where processes die, and give each with its record.

    Raises:
        InputError: the launcher runs nothing; it says why.
        Unwritable: a job cannot write the study.
    """
    batches, tries = deque([list(trials)]), Counter[str]()
    while batches:
        left = batches.popleft()
        watch = _Watch(left, display)
        problems: Sequence[BaseException | None] = [None] * len(left)
        raised: Exception | None = None
        with watch.looking():
            try:
                problems = launch(left)
            except Exception as error:  # whatever a launcher raises when one of its jobs dies
                raised = error
            while watch.waits():  # for jobs that go on all the same, or were lost with their machine
                time.sleep(POLL_SECONDS)
        if full := next(filter(None, map(store.unwritable, filter(None, [raised, *problems]))), None):
            raise full
        claims = {one.identity: study_claims.claimed(done.folder(one).parent, one.identity) for one in left}
        if raised and not watch.results and not any(claims.values()):
            raise InputError(f"hydra/launcher: {record.one_line(raised)}") from raised
        again, suspects = list[Trial](), list[Trial]()
        for one, problem in zip(left, problems, strict=True):
            tries[one.identity] += claims[one.identity] is Claim.left or raised is None
            if result := watch.results.get(one.identity) or done.finished(one):
                yield one, result
            elif _is_final(problem) or tries[one.identity] >= MAX_TRIES:
                status = problem.status if isinstance(problem, WorkerDied) else Status.failed
                try:
                    died = task.died(one, status, _failure(problem or raised), 0.0)
                except study_claims.Claimed:  # another sweep has it now, and is waited for
                    again.append(one)
                else:
                    yield one, watch.end(one, died)
            else:
                (suspects if raised and tries[one.identity] else again).append(one)
        batches += [[one] for one in suspects]
        if again:
            batches.append(again)


def _is_final(problem: BaseException | None) -> bool:
    """Whether another try would end the same; false where the process died for an unknown reason."""
    return problem is not None and not (isinstance(problem, WorkerDied) and problem.status is Status.failed)


def _failure(error: BaseException | None) -> dict[str, str]:
    """The error in the record of a trial that could not write its record."""
    return record.failure(error or WorkerDied("its process ended without a record"), None)


class _Watch:
    """Shows the progress of trials by the files that they write."""

    def __init__(self, trials: Sequence[Trial], display: Display) -> None:
        self.results: dict[str, Result] = {}  # new ones, by identity
        self._display = display
        self._named = ""  # the trial whose name was printed last
        self._running = {one.identity: one for one in trials}
        # Absolute, as a launcher that runs jobs in this process may change its folder meanwhile.
        self._folders = {one.identity: done.folder(one).absolute() for one in trials}
        self._before = {identity: _written(folder) for identity, folder in self._folders.items()}
        self._views: dict[str, TrialView] = {}
        self._seen: dict[str, int] = {}  # bytes of steps.jsonl

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Read the study regularly during the block, and once after it."""
        over = threading.Event()
        begun = time.monotonic()

        def look() -> None:
            waiting = True
            while not over.wait(POLL_SECONDS):
                self._look()
                if waiting and not self._named and time.monotonic() - begun > WAITING_NOTICE_SECONDS:
                    waiting = False
                    self._display.say(
                        "no trial has begun yet: the launcher waits for a machine such as its keys ask for"
                    )

        looker = threading.Thread(target=look, daemon=True)
        looker.start()
        try:
            yield
        finally:
            over.set()
            looker.join()
            self._look(last=True)
            for identity in self._running.keys() & self._views.keys():
                self._views.pop(identity).drop()
                self._display.uncount()

    def waits(self) -> bool:
        """Whether a process that may be alive runs one of the trials."""
        running = list(self._running)
        return any(study_claims.claimed(self._folders[identity].parent, identity) is Claim.held for identity in running)

    def _look(self, *, last: bool = False) -> None:
        for identity, one in list(self._running.items()):
            folder = self._folders[identity]
            if _written(folder) not in (None, self._before[identity]):
                result = store.result(folder)
                # One that is interrupted writes its record, and may be in its launcher's queue again.
                if result and (last or result.status is not Status.cancelled):
                    del self._running[identity]
                    self.results[identity] = self.end(one, result)
            elif study_claims.claimed(folder.parent, identity):
                self._show(one, folder / record.STEPS)

    def _show(self, one: Trial, steps: Path) -> None:
        view = self._view(one)
        size = steps.stat().st_size if steps.exists() else 0
        if size != self._seen.setdefault(one.identity, size):
            self._seen[one.identity] = size
            with steps.open("rb") as lines:
                lines.seek(max(0, size - LAST_LINE))
                whole = [line for line in lines.read().splitlines(keepends=True) if line.endswith(b"\n")]
            if whole:
                view.step(json.loads(whole[-1]))

    def _view(self, one: Trial) -> TrialView:
        if one.identity not in self._views:
            self._named = one.identity
            self._views[one.identity] = self._display.trial(one.name)
        return self._views[one.identity]

    def end(self, one: Trial, result: Result) -> Result:
        """Show that the trial has ended; with its name, if lines of others stand between."""
        self._view(one).end(result, named=self._named != one.identity)
        self._named = one.identity
        return result


def _written(folder: Path) -> int | None:
    """When the record in ``folder`` was written; None where there is none."""
    try:
        return (folder / record.RESULT).stat().st_mtime_ns
    except OSError:
        return None
