"""Run trials with another launcher of Hydra: SLURM, Ray, joblib, or any other.

The launcher gets only the trials that are missing. The progress and the result of a trial are read from the study,
which the machines share. So it does not matter what the launcher reports of its jobs, or whether it stops when one
of them dies.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from peftsweep.config.compose import Trial
from peftsweep.errors import InputError
from peftsweep.observe.display import Display, TrialView
from peftsweep.study import claims as study_claims
from peftsweep.study import record, store, sweep_record
from peftsweep.study.claims import Claim
from peftsweep.study.record import Result, Status, trials_in_words
from peftsweep.sweep import processes
from peftsweep.sweep.workers import CLAIM_RETRY_SECONDS
from peftsweep.trial import done, outcome, task

POLL_SECONDS = 1.0  # seconds between two polls of the study
MAX_TRIES = 2  # of a trial whose process dies: if other trials died with it, the second try shows which one is faulty
WAITING_NOTICE_SECONDS = 60.0  # seconds without a trial after which the display says so
TRIAL = "PEFTSWEEP_TRIAL"  # the environment variable of a job with the identity of the trial that it was made for
LAST_LINE = 4096  # bytes at the end of steps.jsonl that always contain its last line


class WorkerDied(Exception):
    """A job has ended without a record; ``status`` is that of its trial, if the launcher knows it."""

    def __init__(self, message: str, status: Status = Status.failed) -> None:
        super().__init__(message)
        self.status = status


Launch = Callable[[Sequence[Trial]], Sequence[BaseException | None]]  # runs ``job`` for each trial; returns errors


Queued = Callable[[Sequence[Trial]], Mapping[str, str]]  # the jobs of trials that are in a queue already, by identity


def nothing_queued(_: Sequence[Trial]) -> Mapping[str, str]:
    """The jobs in the queue of a launcher that has none."""
    return {}


def job_words(trial: Trial) -> list[str]:
    """The words by which Hydra composes the trial in a job, with what the job must know of the command."""
    known = {sweep_record.COMMAND: sweep_record.command_token(), TRIAL: trial.identity}
    return [*trial.overrides, *(f"++hydra.job.env_set.{name}='{value}'" for name, value in known.items())]


def job(trial: Trial) -> None:
    """Run the trial in this process, unless it is done or another live process runs it.

    A process on a machine that was lost is taken for dead when its claim has not been renewed for some time. This
    function waits for that.

    Raises:
        InputError: the words compose another trial here than where the command has checked them.
    """
    if os.environ.get(TRIAL, trial.identity) != trial.identity:
        raise InputError(
            f"{trial.name}: its rows, its model or its settings have changed since the sweep began; "
            "run the same command again"
        )
    end = time.monotonic() + study_claims.LEASE_SECONDS + 2 * study_claims.HEARTBEAT_SECONDS
    while True:
        try:
            task.run(trial)
            return
        except study_claims.Claimed:
            if time.monotonic() > end:
                return
            time.sleep(CLAIM_RETRY_SECONDS)


def run(
    trials: Sequence[Trial], launch: Launch, display: Display, queued: Queued = nothing_queued
) -> Iterator[tuple[Trial, Result]]:
    """Run ``trials`` by ``launch``, again where a process dies, and yield each with its record.

    Trials that other processes run or that are ``queued``, such as by a command that was killed, are waited for and not
    launched.

    Raises:
        InputError: the launcher runs nothing; it says why.
        Unwritable: a job cannot write the study.
    """
    batches, tries = deque([list(trials)]), Counter[str]()
    while batches:
        left = batches.popleft()
        watch = _Watch(left, display)
        raised: Exception | None = None
        free = [trial for trial in left if _claimed(trial) is not Claim.held]
        jobs = queued(free)
        waiting = [trial for trial in free if trial.identity in jobs]
        given = [trial for trial in free if trial.identity not in jobs]
        launched, problems = {trial.identity for trial in given}, dict[str, BaseException | None]()
        oom_kills = processes.oom_kills()
        if len(free) < len(left):
            display.say(f"    waits for {trials_in_words(len(left) - len(free))} that other processes run")
        if waiting:
            arrays = " ".join(sorted({name.partition("_")[0] for name in jobs.values()}))
            display.say(
                f"    waits for {trials_in_words(len(waiting))} in the queue, submitted by an earlier command; "
                f"scancel {arrays} has them submitted anew"
            )
        with watch.looking():
            try:
                ended = launch(given) if given else []
                problems = {trial.identity: problem for trial, problem in zip(given, ended, strict=True)}
            except Exception as error:  # whatever a launcher raises when one of its jobs dies
                raised = error
            # For jobs that still run, or whose machine was lost, and for those of earlier commands.
            while watch.waits() or queued([one for one in waiting if one.identity not in watch.results]):
                time.sleep(POLL_SECONDS)
        if full := next(filter(None, map(store.unwritable, filter(None, [raised, *problems.values()]))), None):
            raise full
        claims = {trial.identity: _claimed(trial) for trial in left}
        if raised and not watch.results and not any(claims.values()):
            raise InputError(f"hydra/launcher: {record.one_line(raised)}") from raised
        again, suspects = list[Trial](), list[Trial]()
        for trial in left:
            problem = problems.get(trial.identity)
            if trial.identity in launched:
                if len(launched) == 1 and claims[trial.identity] is Claim.left and processes.oom_kills() > oom_kills:
                    problem = WorkerDied("its process was killed, as the host was out of memory", Status.oom)
                tries[trial.identity] += claims[trial.identity] is Claim.left or raised is None
            if result := watch.results.get(trial.identity) or done.finished(trial):
                yield trial, result
            elif _is_final(problem) or tries[trial.identity] >= MAX_TRIES:
                status = problem.status if isinstance(problem, WorkerDied) else Status.failed
                try:
                    begun = claims[trial.identity] is Claim.left
                    died = task.died(trial, status, _failure(problem or raised, trial, begun=begun), 0.0)
                except study_claims.Claimed:  # another sweep runs it now: wait for that one
                    again.append(trial)
                else:
                    yield trial, watch.end(trial, died)
            else:
                (suspects if raised and tries[trial.identity] else again).append(trial)
        batches += [[trial] for trial in suspects]
        if again:
            batches.append(again)


def _claimed(trial: Trial) -> Claim | None:
    return study_claims.claimed(done.folder(trial).parent, trial.identity)


def _is_final(problem: BaseException | None) -> bool:
    """Whether another try would end in the same way; False if the process died for an unknown reason."""
    return problem is not None and not (isinstance(problem, WorkerDied) and problem.status is Status.failed)


def _failure(error: BaseException | None, trial: Trial, *, begun: bool) -> dict[str, str]:
    """The error in the record of a trial that could not write its record; ``begun``: its process died while it ran."""
    stage = outcome.stage_so_far(done.folder(trial)) if begun else None
    return record.failure(error or WorkerDied("its process ended without a record"), stage)


class _Watch:
    """Shows the progress of trials, which is read from the files that they write."""

    def __init__(self, trials: Sequence[Trial], display: Display) -> None:
        self.results: dict[str, Result] = {}  # records that were written since the start, by identity
        self._display = display
        self._named = ""  # the trial whose name was printed last
        self._running = {one.identity: one for one in trials}
        # Absolute, because a launcher that runs jobs in this process may change the working directory.
        self._folders = {one.identity: done.folder(one).absolute() for one in trials}
        self._before = {identity: store.version(folder) for identity, folder in self._folders.items()}
        self._views: dict[str, TrialView] = {}
        self._seen: dict[str, int] = {}  # size of steps.jsonl in bytes when it was last read, by identity

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Read the study regularly during the block, and once after it."""
        over = threading.Event()
        begun = time.monotonic()

        def poll() -> None:
            waiting = True
            while not over.wait(POLL_SECONDS):
                with suppress(OSError, InputError):  # if it stays, the last look raises it
                    self._look()
                if waiting and not self._named and time.monotonic() - begun > WAITING_NOTICE_SECONDS:
                    waiting = False
                    self._display.say(
                        "no trial has begun yet: the launcher waits for a machine such as its keys ask for"
                    )

        thread = threading.Thread(target=poll, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self._look(last=True)
            for identity in self._running.keys() & self._views.keys():
                self._views.pop(identity).drop()
                self._display.uncount()

    def waits(self) -> bool:
        """Whether a process that may be alive runs one of the trials."""
        running = list(self._running)
        return any(study_claims.claimed(self._folders[identity].parent, identity) is Claim.held for identity in running)

    def _look(self, *, last: bool = False) -> None:
        for identity, trial in list(self._running.items()):
            place = self._folders[identity]
            if store.version(place) not in (None, self._before[identity]):
                result = store.result(place)
                # An interrupted trial writes a record too, but its launcher may have put it into the queue again.
                if result and (last or result.status is not Status.cancelled):
                    del self._running[identity]
                    self.results[identity] = self.end(trial, result)
            elif study_claims.claimed(place.parent, identity):
                self._show(trial, place / record.STEPS)

    def _show(self, trial: Trial, steps: Path) -> None:
        view = self._view(trial)
        with suppress(OSError, ValueError):  # another machine may write or delete it at this moment
            size = steps.stat().st_size if steps.exists() else 0
            if size != self._seen.setdefault(trial.identity, size):
                self._seen[trial.identity] = size
                with steps.open("rb") as lines:
                    lines.seek(max(0, size - LAST_LINE))
                    whole = [line for line in lines.read().splitlines(keepends=True) if line.endswith(b"\n")]
                if whole:
                    view.step(json.loads(whole[-1]))

    def _view(self, trial: Trial) -> TrialView:
        if trial.identity not in self._views:
            self._named = trial.identity
            self._views[trial.identity] = self._display.trial(trial.name)
        return self._views[trial.identity]

    def end(self, trial: Trial, result: Result) -> Result:
        """Show that the trial has ended; with its name, if lines of other trials were printed meanwhile."""
        self._view(trial).end(result, named=self._named != trial.identity)
        self._named = trial.identity
        return result
