"""The states of the jobs of submitit's launchers: of each job by itself, and also where SLURM keeps no accounting.

submitit reads a job's state from ``sacct`` alone. Without accounting ``sacct`` fails: a job whose process was killed
stays UNKNOWN, and submitit waits for it forever. Here ``squeue`` is called first, which every SLURM has. A job that
it no longer lists has ended.

Each job is noted beside the claim of its trial, so that a later command finds those that wait in the queue.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

from hydra.core.utils import JobReturn, JobStatus
from submitit.auto.auto import AutoExecutor
from submitit.core import core
from submitit.slurm.slurm import SlurmInfoWatcher, SlurmJob

from peftsweep.config.compose import Trial
from peftsweep.study.reading import Unreadable, read_text
from peftsweep.study.record import Status, write_text
from peftsweep.sweep.engine import WorkerDied
from peftsweep.trial import done

# The states of https://slurm.schedmd.com/squeue.html#lang-job-state after which a job writes nothing more.
ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT", "GONE"}
STATUSES = {"OUT_OF_MEMORY": Status.oom, "CANCELLED": Status.cancelled}
# What SLURM writes into the log of a job that it kills for its memory; its state may be FAILED or CANCELLED.
STARVED = re.compile(r"(?i)slurmstepd.*(exceeded (job )?memory limit|oom[-_ ]kill)")
SQUEUE = ("squeue", "--me", "--array", "--states=all", "--noheader", "--format=%i|%T")
UNLISTED_SECONDS = 60.0  # seconds after which a job that squeue has never listed is taken for lost
POLL_SECONDS = 30  # most seconds between two calls of squeue
COMMAND_SECONDS = 60.0  # seconds that squeue or sacct may take


class QueueWatcher(SlurmInfoWatcher):  # type: ignore[misc]
    """The states of jobs from ``squeue``; of jobs that it no longer lists from ``sacct``, if there is accounting."""

    def __init__(self) -> None:
        super().__init__(delay_s=POLL_SECONDS)
        self._registered_at: dict[str, float] = {}
        self._listed: set[str] = set()
        self._printed: set[str] = set()

    def register_job(self, job_id: str) -> None:
        """Watch this job too."""
        super().register_job(job_id)
        self._registered_at.setdefault(job_id, time.monotonic())

    def is_done(self, job_id: str, mode: str = "standard") -> bool:
        """Whether the job has ended; one that is requeued has not."""
        words = self.get_state(job_id, mode=mode).upper().split()  # sacct: CANCELLED by 1000
        return bool(words) and words[0] in ENDED

    def left(self) -> list[str]:
        """The arrays, or single jobs, of which a job is not known to have ended."""
        return sorted({job.partition("_")[0] for job in self._registered - self._finished})

    def update(self) -> None:
        """Read the states of all jobs that have not ended."""
        self._num_calls += 1
        self._last_status_check = time.time()
        queue = self._queue()
        if queue is None:
            return  # the controller does not answer; jobs run without it, too
        self._listed |= queue.keys()
        jobs = self._registered - self._finished
        self._info_dict.update({job: {"State": queue[job]} for job in jobs & queue.keys()})
        if unlisted := {job for job in jobs - queue.keys() if self._is_over(job)}:
            states = self._accounting()
            for job in unlisted:
                told = states.get(job, {}).get("State", "").partition(" ")[0].upper()
                # The queue decides: PREEMPTED may be the last state of a job, and accounting may know no end of one.
                self._info_dict[job] = states[job] if told in ENDED else {"State": f"GONE {told}".strip()}
        self._finished |= {job for job in jobs if self.is_done(job, mode="cache")}

    def _is_over(self, job: str) -> bool:
        return job in self._listed or time.monotonic() - self._registered_at[job] > UNLISTED_SECONDS

    def _queue(self) -> dict[str, str] | None:
        """The state of each job of this user that SLURM still lists; None if SLURM does not answer."""
        try:
            return _squeue()
        except (OSError, subprocess.SubprocessError) as error:
            self._say(f"squeue does not answer ({_cause(error)}); jobs are waited for until it does")
            return None

    def _accounting(self) -> dict[str, dict[str, str]]:
        """The states of the jobs from ``sacct``; empty if accounting is off."""
        command = self._make_command()
        if command is None:
            return {}
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=True).stdout
        except (OSError, subprocess.SubprocessError) as error:
            self._say(f"sacct does not answer ({_cause(error)}): how a job ended is known from its record alone")
            return {}
        return {job: facts for job, facts in self.read_info(answer).items() if facts.get("State", "").split()}

    def _say(self, line: str) -> None:
        """Print ``line`` to stderr, once."""
        if line not in self._printed:
            self._printed.add(line)
            print(f"peftsweep: {line}", file=sys.stderr)


def _squeue() -> dict[str, str]:
    answer = subprocess.run(SQUEUE, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=True).stdout
    return dict(line.strip().split("|", 1) for line in answer.splitlines() if "|" in line)


class Queue:
    """The jobs that commands have submitted for trials, by what they have noted of them."""

    def __init__(self) -> None:
        self._states: dict[str, str] = {}
        self._asked: float | None = None

    def jobs(self, trials: Sequence[Trial]) -> dict[str, str]:
        """The job of each of ``trials``, by its identity, that waits in the queue or runs; others are forgotten.

        The queue is asked every ``POLL_SECONDS`` at most, and only if a job is noted. While SLURM does not answer, the
        jobs count as before.
        """
        noted = dict[Path, tuple[str, str]]()
        for one in trials:
            with suppress(Unreadable):
                noted[_note(one)] = one.identity, read_text(_note(one)).strip()
        if noted and (self._asked is None or time.monotonic() - self._asked >= POLL_SECONDS):
            try:
                self._states = _squeue()
            except subprocess.SubprocessError:
                unknown = {job: "UNKNOWN" for _, job in noted.values()} if self._asked is None else {}
                self._states = self._states | unknown
            except OSError:  # there is no SLURM here, which submitting will tell
                self._states = {}
            self._asked = time.monotonic()
        found = dict[str, str]()
        for note, (identity, job) in noted.items():
            if self._states.get(job, "GONE") in ENDED:
                note.unlink(missing_ok=True)
            else:
                found[identity] = job
        return found


def _note(trial: Trial) -> Path:
    return done.folder(trial).parent / ".claims" / f"{trial.identity}.slurm"


def _cause(error: Exception) -> str:
    output = str(getattr(error, "stderr", None) or error).strip()
    return output.splitlines()[-1] if output else type(error).__name__


@contextmanager
def jobs_end_alone(trials: Sequence[Trial] = ()) -> Iterator[None]:
    """In this context a launcher of submitit returns the result of each of its jobs, which are those of ``trials``.

    Without it the launcher raises the error of the first job that has failed, while other jobs of the array still wait.
    Jobs in a queue outlive an interrupted command; a line on stderr names those that do.
    """
    results, submit, watcher = core.Job.results, AutoExecutor.map_array, QueueWatcher()

    def submit_and_note(executor: Any, *arguments: Any) -> list[Any]:
        jobs = list(submit(executor, *arguments))
        for trial, job in zip(trials, jobs, strict=False):
            if isinstance(job, SlurmJob):
                with suppress(OSError):  # a full disk, which the job will report
                    write_text(_note(trial), job.job_id)
        return jobs

    def results_or_failure(job: Any) -> list[Any]:
        try:
            return list(results(job))
        except Exception as error:  # the error of the job, or that it wrote no result
            failed = JobReturn(status=JobStatus.FAILED)
            failed._return_value = error if job.paths.result_pickle.exists() else _death(job)
            return [failed]

    with (
        patch.object(SlurmJob, "watcher", watcher),
        patch.object(core.Job, "results", results_or_failure),
        patch.object(AutoExecutor, "map_array", submit_and_note),
    ):
        try:
            yield
            for trial in trials:
                _note(trial).unlink(missing_ok=True)
        except KeyboardInterrupt:
            if arrays := " ".join(watcher.left()):
                print(
                    f"peftsweep: the jobs of {arrays} go on, and the same command waits for them; "
                    f"scancel {arrays} ends them",
                    file=sys.stderr,
                )
            raise


def _death(job: Any) -> WorkerDied:
    """The error of a job that wrote no result, with its state and the line of its log that says most."""
    state = str(job.watcher.get_state(job.job_id, mode="cache"))
    lines = [line.strip() for line in (job.stderr() or "").splitlines() if line.strip()]
    starved = [line for line in lines if STARVED.search(line)]
    status = Status.oom if starved else STATUSES.get(state.partition(" ")[0], Status.failed)
    message = ": ".join([f"its job {job.job_id} ended ({state}) without a record", *(starved or lines)[-1:]])
    return WorkerDied(message + ("; try a larger hydra.launcher.mem_gb" if status is Status.oom else ""), status)
