"""Worker processes that run trials, so that a crash costs one trial and imports are paid once.

A worker runs one trial after the other on its device and keeps the frozen base between those that share it. It ends
when its parent ends. Results are written to the study; the messages that a worker sends meanwhile are for the display.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from statistics import median
from typing import Any, TypeAlias

import torch
from tqdm import tqdm

from peftsweep.config import build
from peftsweep.config import compose as configuration
from peftsweep.config.compose import Trial
from peftsweep.errors import Unwritable
from peftsweep.evaluation.isolation import Resources, process_state_kept
from peftsweep.observe import measure
from peftsweep.observe.display import Display, Observer, TrialView
from peftsweep.study import claims, store, sweep_record
from peftsweep.study.record import Result, Status
from peftsweep.sweep import pack as sweep_pack
from peftsweep.sweep import packing, processes
from peftsweep.training import graphs
from peftsweep.trial import done, task

POLL_SECONDS = 1.0  # seconds between two polls of the workers, if none sends a message
CLAIM_RETRY_SECONDS = 1.0  # seconds until a trial that another process runs is tried again
CANCEL_GRACE_SECONDS = 30.0  # seconds that an interrupted trial has to write its record
Job = list[Trial]  # one, or several that are trained together
Channel: TypeAlias = "connection.Connection[Any, Any]"
TAIL_BYTES = 4000  # last bytes of a dead worker's output that its trial's record keeps


@dataclass(frozen=True)
class Options:
    """How trials are placed; the keys of ``hydra.launcher``."""

    workers: int | None = None  # null: one a device; 0: in this process
    devices: Sequence[str] | None = None  # of CUDA, by their numbers; null: all that are visible
    retries: int = 0  # further tries of a trial whose worker has died
    timeout: float | None = None  # most seconds of a trial
    limit: int | None = None  # most trials that are run
    deadline: float | None = None  # seconds after which no trial should be running any more
    pack: int | None = None  # most trials that are trained together on one base; null: each alone
    probe: bool = False  # time some steps first, and train together only if that is faster
    measure: bool = False  # afterwards take some steps of each packed trial alone, to measure its speed and memory
    at_once: int = 1  # workers on one device, at most; no key, but what follows from workers and devices
    command: str = ""  # no key, but the token of the command


def run(trials: Sequence[Trial], options: Options, budget: Budget, display: Display) -> Iterator[tuple[Trial, Result]]:
    """Run ``trials`` and give each with its record as it ends; those that ``budget`` leaves no room for are left out.

    Raises:
        KeyboardInterrupt: the user interrupted it; running trials are recorded as cancelled.
        Unwritable: the study cannot be written; running trials end as if they were killed.
    """
    budget.begin()
    places: list[processes.Place] = [processes.CPU]
    if options.workers != 0:
        places = processes.places(options.workers, options.devices, [one.config.device for one in trials])
    fits = partial(packing.fits_memory, at_once=max(Counter(places).values()))
    jobs = packing.plan(trials, options.pack, fits) if options.pack else [[one] for one in trials]
    if options.workers == 0:
        yield from _inline(deque(jobs), budget, display, options)
        return
    threads = measure.threads_each(len(places)) if places[0] == processes.CPU else None
    used, pool = places[: len(jobs)], list[_Worker]()
    at_once, command = max(Counter(used).values(), default=1), sweep_record.command_token()
    options = replace(options, at_once=at_once, command=command)
    try:
        pool += [_Worker(place, threads) for place in used]
        yield from _in_pool(deque(jobs), pool, budget, display, options)
    except KeyboardInterrupt:
        _cancel(pool)
        raise
    finally:
        for worker in pool:  # all end at the same time
            worker.let_go()
        for worker in pool:
            worker.end()


# ---- in this process -------------------------------------------------------------------------------


def _inline(queue: deque[Job], budget: Budget, display: Display, options: Options) -> Iterator[tuple[Trial, Result]]:
    while queue and (room := budget.take(len(queue[0]), queue[0])):
        whole = queue.popleft()
        job = whole[:room]
        if rest := whole[room:]:
            queue.appendleft(rest)
        views = [display.trial(one.name) for one in job]
        try:
            results = _run_in_turn(job, views, display, budget) if len(job) == 1 else _run_job(job, views, options)
        except claims.Claimed:  # one of several, so that the others go on alone, or one until after the deadline
            _retract(views, display, budget)
            queue.extendleft([one] for one in reversed(job))
            continue
        for one, view, result in zip(job, views, results, strict=True):
            budget.spend(result)
            view.end(result)
            yield one, result


def _retract(views: Sequence[TrialView], display: Display, budget: Budget) -> None:
    """Undo the start of trials that have not run."""
    for view in views:
        view.drop()
        display.uncount()
        budget.give_back(1)


def _run_in_turn(job: Job, views: Sequence[TrialView], display: Display, budget: Budget) -> list[Result]:
    announced = False
    while True:
        try:
            with process_state_kept():
                return [task.run(job[0], views[0])]
        except claims.Claimed as claimed:
            if budget.late(job):
                raise
            if not announced:
                display.say(f"    waits: {claimed}")
            announced = True
            views[0].stage("run by another process")
            time.sleep(CLAIM_RETRY_SECONDS)


def _run_job(job: Job, observers: Sequence[Observer], options: Options) -> list[Result]:
    if len(job) == 1:
        return [task.run(job[0], observers[0])]
    return sweep_pack.run(job, observers, probe=options.probe, measure=options.measure)


class Budget:
    """What is left of ``limit`` and ``deadline`` of one command, which may run several batches of trials."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._begun = time.monotonic()
        self._started = 0
        self._took: list[float] = []  # seconds of the trials that have ended
        self._off: list[float] = []  # measured seconds / predicted seconds of these trials
        self.expected: dict[str, float] = {}  # predicted seconds by identity of a trial

    def begin(self) -> None:
        """Start another batch of trials, whose seconds may differ from those of the last one."""
        self._took, self._off = [], []

    def take(self, wanted: int, job: Sequence[Trial] = ()) -> int:
        """The number of the ``wanted`` trials of ``job`` that may start now; they are counted as started."""
        limit = self._options.limit
        room = 0 if self.late(job) else wanted if limit is None else min(wanted, limit - self._started)
        self._started += room
        return room

    def late(self, job: Sequence[Trial] = ()) -> bool:
        """Whether ``job`` would end after the deadline, if it started now."""
        elapsed = time.monotonic() - self._begun
        return self._options.deadline is not None and elapsed + self.estimate(job) > self._options.deadline

    def give_back(self, count: int) -> None:
        """Uncount trials that have not run."""
        self._started -= count

    def spend(self, result: Result) -> None:
        """Note the seconds of a trial that has ended; those of a pack are divided among its trials."""
        self._took.append(seconds := sweep_record.last_attempt_seconds(result) / sweep_record.pack_size(result))
        if expected := self.expected.get(result.run_info.get("identity", "")):
            self._off.append(seconds / expected)

    def estimate(self, job: Sequence[Trial] = ()) -> float:
        """The expected seconds of a job: predicted seconds times the median ratio of measured to predicted ones.

        If a trial was not predicted, the median seconds of the trials that have ended; 0 before the first has ended.
        """
        known = [self.expected[one.identity] for one in job if one.identity in self.expected]
        if known and len(known) == len(job):
            return sum(known) * (median(self._off) if self._off else 1.0)
        return max(1, len(job)) * median(self._took) if self._took else 0.0


# ---- the parent's side -----------------------------------------------------------------------------


class _Worker:
    """A worker process as its parent sees it."""

    def __init__(self, place: processes.Place, threads: int | None) -> None:
        self._place, self._threads, self._spent = place, threads, False
        self.job: Job = []
        self._child = processes.start(place, threads)

    @property
    def process(self) -> BaseProcess:
        return self._child.process

    @property
    def connection(self) -> Channel:
        return self._child.connection

    def give(self, job: Job, views: list[TrialView], options: Options) -> None:
        message, self.before = ([configuration.without_rows(one) for one in job], options), done.Before(job)
        if self._spent or not self._child.takes(message):
            self.replace()
            processes.must_take(self._child, message)
        self.job, self.views, self.stage, self._spent = job, views, "setup", False
        self.since, self._oom_kills = time.monotonic(), processes.oom_kills()

    def take(self) -> Job:
        """The job that the worker ran; the worker is free again."""
        job, self.job = self.job, []
        return job

    def news(self) -> tuple[str, str] | None:
        """Pass the worker's messages to the display; returns (outcome, message) of its job, None while it runs."""
        try:
            while self.connection.poll():
                kind, number, content = self.connection.recv()
                if kind in ("end", "last"):
                    self._spent = kind == "last"
                    return number, content
                if kind == "stage":
                    self.stage = content
                getattr(self.views[number], kind)(content)
        except (EOFError, OSError):
            pass
        return None if self.process.is_alive() else ("died", "")

    def death(self) -> tuple[Status, dict[str, str]]:
        """The status and the error of a worker that died, for the record of its trial."""
        self.process.join()
        code = self.process.exitcode or 0
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        starved = code == -signal.SIGKILL and processes.oom_kills() > self._oom_kills
        message = f"its process ended by {name}" + (", as the host was out of memory" if starved else "")
        return Status.oom if starved else Status.failed, self.failure("WorkerDied", message)

    def failure(self, kind: str, message: str) -> dict[str, str]:
        output = self._child.output
        printed = os.pread(output, TAIL_BYTES, max(0, os.fstat(output).st_size - TAIL_BYTES)).decode(errors="replace")
        return {"type": kind, "message": message, "stage": self.stage, "traceback": printed}

    def interrupt(self) -> None:
        if self.process.is_alive():
            self._child.interrupt()

    def kill(self) -> None:
        self._child.kill()

    def replace(self) -> None:
        self._child.end()
        self._child = processes.start(self._place, self._threads)

    def let_go(self) -> None:
        self._child.let_go()

    def end(self) -> None:
        self._child.end(0.0 if self.job else processes.EXIT_SECONDS)


def _in_pool(
    queue: deque[Job], pool: list[_Worker], budget: Budget, display: Display, options: Options
) -> Iterator[tuple[Trial, Result]]:
    tries: dict[str, int] = {}
    later: list[tuple[float, Job]] = []  # postponed jobs, each with the time from which it may be tried again
    waiting = set[str]()  # identities of trials that other processes run

    def postpone(worker: _Worker, seconds: float) -> None:
        _retract(worker.views, display, budget)
        later.extend((time.monotonic() + seconds, [one]) for one in worker.take())

    def wait_for(trial: Trial, worker: _Worker, reason: str) -> None:
        if trial.identity not in waiting:
            display.say(f"    waits: {reason}")
        waiting.add(trial.identity)
        postpone(worker, CLAIM_RETRY_SECONDS)

    while True:
        now = time.monotonic()
        due = [one for when, one in later if when <= now]
        later = [(when, one) for when, one in later if when > now]
        for job in due:
            held = [one for one in job if claims.claimed(done.folder(one).parent, one.identity) is claims.Claim.held]
            if not held or waiting.isdisjoint(one.identity for one in job):
                queue.append(job)
            elif not budget.late(job):
                later.append((now + CLAIM_RETRY_SECONDS, job))
        _assign_jobs(queue, pool, budget, display, options)
        busy = [worker for worker in pool if worker.job]
        if not busy and not later:
            return
        channels = [channel for worker in busy for channel in (worker.connection, worker.process.sentinel)]
        connection.wait(channels, POLL_SECONDS) if busy else time.sleep(POLL_SECONDS)
        for worker in busy:
            if (ended := _ended(worker, options)) is None or not worker.job:
                continue
            outcome, message = ended
            if len(worker.job) > 1:
                if outcome not in ("done", "cancelled"):  # run each trial alone, to find the one that fails
                    postpone(worker, 0.0)
                    continue
                members = list(zip(worker.take(), worker.views, strict=True))
                for one, view in members:
                    if (found := worker.before.record(one, new=outcome != "done")) is None:  # it had not begun
                        _retract([view], display, budget)
                        later.append((now, [one]))
                        continue
                    budget.spend(found)
                    view.end(found, named=True)
                    yield one, found
                continue
            (one,) = worker.job
            tries[one.identity] = tries.get(one.identity, 0) + (outcome == "died")
            if outcome == "unwritable":
                raise Unwritable(message)
            if outcome == "claimed":
                wait_for(one, worker, message)
            elif outcome == "died" and tries[one.identity] <= options.retries:
                postpone(worker, 0.0)
            else:
                result = worker.before.record(one, new=outcome != "done")  # it may have been written just before
                try:
                    result = result or _record(worker, one, outcome, message, options)
                except claims.Claimed as claimed:  # another sweep took the trial when this sweep's worker had died
                    wait_for(one, worker, str(claimed))
                    continue
                budget.spend(result)
                worker.take()
                worker.views[0].end(result, named=len(pool) > 1)
                yield one, result


def _assign_jobs(queue: deque[Job], pool: list[_Worker], budget: Budget, display: Display, options: Options) -> None:
    """Give each idle worker the next job of the queue, with as many of its trials as the budget allows."""
    for worker in pool:
        if not worker.job and queue and (room := budget.take(len(queue[0]), queue[0])):
            whole = queue.popleft()
            job = whole[:room]
            if rest := whole[room:]:
                queue.appendleft(rest)
            worker.give(job, [display.trial(one.name) for one in job], options)


def _ended(worker: _Worker, options: Options) -> tuple[str, str] | None:
    """(outcome, message) of the worker's job, None while it runs; a job over its timeout is killed here."""
    if ended := worker.news():
        return ended
    if options.timeout is not None and time.monotonic() - worker.since > options.timeout * len(worker.job):
        worker.kill()
        return "timeout", ""
    return None


def _record(worker: _Worker, trial: Trial, outcome: str, message: str, options: Options) -> Result:
    """Write and return the record of a trial whose own process could not write it."""
    if outcome == "died":
        status, failure = worker.death()
    elif outcome == "timeout":
        text = f"it took longer than hydra.launcher.timeout, {options.timeout:g} seconds"
        status, failure = Status.failed, worker.failure("TimeoutError", text)
    elif outcome == "cancelled":
        status, failure = Status.cancelled, worker.failure("KeyboardInterrupt", "its process was interrupted")
    else:
        lines = message.strip().splitlines() or ["unknown"]
        status, failure = Status.failed, worker.failure("WorkerFailed", lines[-1]) | {"traceback": message}
    return task.died(trial, status, failure, time.monotonic() - worker.since)


def _cancel(pool: list[_Worker]) -> None:
    """Let running trials write what they have; a second interrupt ends them at once."""
    running = [worker for worker in pool if worker.job]
    for worker in running:
        worker.interrupt()
    end = time.monotonic() + CANCEL_GRACE_SECONDS
    while running and time.monotonic() < end:
        connection.wait([worker.connection for worker in running], 0.5)
        running = [worker for worker in running if worker.news() is None]


# ---- the worker's side -----------------------------------------------------------------------------


class _Reporter(Observer):
    """Sends the progress of a trial to the parent."""

    def __init__(self, channel: Channel, number: int) -> None:
        self._channel, self._number = channel, number

    def stage(self, name: str) -> None:
        self._channel.send(("stage", self._number, name))

    def step(self, row: dict[str, Any]) -> None:
        self._channel.send(("step", self._number, row))

    def expects(self, seconds: Mapping[str, float]) -> None:
        self._channel.send(("expects", self._number, dict(seconds)))


def serve(channel: Channel, threads: int | None) -> None:
    """Run the jobs that come through ``channel``, one after the other, until it is closed."""
    if threads is not None:
        torch.set_num_threads(threads)
    tqdm.set_lock(threading.RLock())  # tqdm's own lock is a system semaphore, which a killed process would leave behind
    build.keep_bases()
    resources = Resources.now()
    while True:
        try:
            job, options = channel.recv()
            outcome = _in_worker(job, options, channel, resources)
            spent = graphs.device_is_broken() or resources.are_lost()
            channel.send(("last" if spent else "end", *outcome))  # else the parent would give it the next trial
        except (EOFError, OSError, KeyboardInterrupt):
            return
        if spent:
            return


def _in_worker(job: Job, options: Options, channel: Channel, resources: Resources) -> tuple[str, str]:
    """Run a job; returns "done" if its records were written, else the reason for a missing record, and a message."""
    reporters = [_Reporter(channel, number) for number in range(len(job))]
    try:
        with process_state_kept():
            os.environ |= {sweep_record.AT_ONCE: str(options.at_once), sweep_record.COMMAND: options.command}
            _run_job([configuration.with_rows(one) for one in job], reporters, options)
    except claims.Claimed as claimed:
        return "claimed", str(claimed)
    except KeyboardInterrupt:
        return "cancelled", ""
    except BaseException as error:
        if (reason := store.unwritable(error)) and not resources.limits_are_lost():
            return "unwritable", str(reason)
        return "broken", traceback.format_exc()
    return "done", ""
