"""Jobs on SLURM: the states of those that end badly, and (slow) a real SLURM on this host."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from peftsweep.config.compose import Trial
from peftsweep.study.record import Status
from tests.conftest import records, start, wait_for

slurm = pytest.importorskip("peftsweep.sweep.slurm", reason="needs submitit")


# ---- the queue, as squeue and sacct tell of it -----------------------------------------------------


def answers(monkeypatch: pytest.MonkeyPatch, **outputs: str | Exception) -> list[str]:
    """Have the programs of SLURM answer so; gives the names of those that are run."""
    programs = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        programs.append(command[0])
        answer = outputs[command[0]]
        if isinstance(answer, Exception):
            raise answer
        return subprocess.CompletedProcess(command, 0, answer)

    monkeypatch.setattr(subprocess, "run", run)
    return programs


NO_ACCOUNTING = subprocess.CalledProcessError(1, "sacct", stderr="Slurm accounting storage is disabled")


def is_over(watcher: Any, job: str) -> bool:
    time.sleep(0.002)  # sooner than after a millisecond the watcher does not ask again
    return bool(watcher.is_done(job, mode="force"))


def states(watcher: Any, *jobs: str) -> dict[str, bool]:
    for job in jobs:
        watcher.register_job(job)
    return {job: is_over(watcher, job) for job in jobs}


@pytest.mark.parametrize(
    ("state", "over"),
    [
        *((name, False) for name in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED")),
        *((name, True) for name in ("FAILED", "CANCELLED", "OUT_OF_MEMORY", "NODE_FAIL", "TIMEOUT", "COMPLETED")),
    ],
)
def test_a_job_is_over_in_no_state_from_which_it_may_run_on(
    state: str, over: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(monkeypatch, squeue=f"7_0|{state}\n", sacct=NO_ACCOUNTING)
    assert states(slurm.QueueWatcher(), "7_0") == {"7_0": over}


def test_a_job_that_the_queue_lists_no_more_is_over_without_accounting(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    watcher = slurm.QueueWatcher()
    answers(monkeypatch, squeue="7_0|RUNNING\n7_1|PENDING\n", sacct=NO_ACCOUNTING)
    assert states(watcher, "7_0", "7_1") == {"7_0": False, "7_1": False}
    answers(monkeypatch, squeue="7_1|RUNNING\n", sacct=NO_ACCOUNTING)
    for _ in range(3):
        assert is_over(watcher, "7_0")
    assert not is_over(watcher, "7_1")
    assert capsys.readouterr().err.count("Slurm accounting storage is disabled") == 1


def test_with_accounting_it_says_how_the_job_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    watcher = slurm.QueueWatcher()
    answers(monkeypatch, squeue="7_0|RUNNING\n", sacct="")
    states(watcher, "7_0")
    answers(monkeypatch, squeue="", sacct="JobID|State|NodeList\n7_0|OUT_OF_MEMORY|one\n7_0.batch|FAILED|one\n")
    assert is_over(watcher, "7_0")
    assert watcher.get_state("7_0", mode="cache") == "OUT_OF_MEMORY"


@pytest.mark.parametrize("told", ["PREEMPTED", "RUNNING", "REQUEUED"])
def test_a_job_that_the_queue_lists_no_more_is_over_whatever_accounting_says(
    told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of a preempted job on a cluster that cancels instead of requeuing, and one that accounting missed."""
    watcher = slurm.QueueWatcher()
    answers(monkeypatch, squeue="7_0|RUNNING\n", sacct="")
    assert states(watcher, "7_0") == {"7_0": False}
    answers(monkeypatch, squeue="", sacct=f"JobID|State|NodeList\n7_0|{told}|one\n")
    assert is_over(watcher, "7_0")
    assert watcher.get_state("7_0", mode="cache") == f"GONE {told}"


def test_a_controller_that_does_not_answer_ends_no_job(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    watcher = slurm.QueueWatcher()
    answers(monkeypatch, squeue="7_0|RUNNING\n")
    states(watcher, "7_0")
    answers(monkeypatch, squeue=subprocess.TimeoutExpired("squeue", 60))
    for _ in range(2):
        assert not is_over(watcher, "7_0")
    assert capsys.readouterr().err.count("squeue does not answer") == 1


def test_a_job_that_was_just_submitted_may_not_be_listed_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    watcher = slurm.QueueWatcher()
    answers(monkeypatch, squeue="", sacct=NO_ACCOUNTING)
    assert states(watcher, "7_0") == {"7_0": False}
    monkeypatch.setattr(slurm, "UNLISTED_SECONDS", 0.0)
    assert is_over(watcher, "7_0")


@pytest.mark.parametrize(
    ("state", "told", "status"),
    [
        ("FAILED", "slurmstepd-n1: error: StepId=3.0 exceeded memory limit (11 > 10), being killed", Status.oom),
        (
            "FAILED",
            "slurmstepd: error: Detected 1 oom_kill event in StepId=3.0. Some tasks were OOM Killed.",
            Status.oom,
        ),
        ("OUT_OF_MEMORY", "", Status.oom),
        ("FAILED", "a warning of a library about out of memory", Status.failed),
        ("CANCELLED by 1000", "slurmstepd: error: *** STEP 3.0 CANCELLED ***", Status.cancelled),
    ],
)
def test_a_job_that_is_killed_for_its_memory_says_so_whatever_its_state(state: str, told: str, status: Status) -> None:
    watcher = SimpleNamespace(get_state=lambda *_, **__: state)
    log = f"{told}\nsrun: error: n1: task 0: Killed\n"
    found = slurm._death(SimpleNamespace(job_id="3", watcher=watcher, stderr=lambda: log))
    assert found.status is status
    assert ("; try a larger hydra.launcher.mem_gb" in str(found)) == (status is Status.oom)
    assert (told in str(found)) == (status is Status.oom)


def test_an_interrupt_names_the_jobs_that_it_leaves_in_the_queue(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers(monkeypatch, squeue="7_0|RUNNING\n7_1|PENDING\n8|COMPLETED\n")

    def interrupted() -> None:
        states(slurm.SlurmJob.watcher, "7_0", "7_1", "8")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), slurm.jobs_end_alone():
        interrupted()
    said = "peftsweep: the jobs of 7 go on, and the same command waits for them; scancel 7 ends them\n"
    assert capsys.readouterr().err == said
    with pytest.raises(KeyboardInterrupt), slurm.jobs_end_alone():
        raise KeyboardInterrupt
    assert capsys.readouterr().err == ""


def test_a_job_that_waits_in_the_queue_is_found_by_a_later_command(
    compose: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = [compose(f"method.r={r}") for r in (2, 4, 8)]
    facts: list[dict[str, Any]] = [{"job_id": name, "_cancel_at_deletion": False} for name in ("7_0", "7_1")]
    jobs = [slurm.SlurmJob.__new__(type("Job", (slurm.SlurmJob,), one)) for one in facts]
    monkeypatch.setattr(slurm.AutoExecutor, "map_array", lambda *_: jobs)

    def interrupted() -> None:
        slurm.AutoExecutor.map_array(None, "words")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), slurm.jobs_end_alone(trials[:2]):
        interrupted()
    first, second, _ = (one.identity for one in trials)
    programs = answers(monkeypatch, squeue="7_0|PENDING\n7_1|CANCELLED\n8_0|RUNNING\n")
    assert slurm.Queue().jobs(trials) == {first: "7_0"}
    assert slurm.Queue().jobs(trials[1:]) == {}
    assert len(programs) == 1  # not asked about the second, whose note is gone
    answers(monkeypatch, squeue=subprocess.TimeoutExpired("squeue", 60))
    assert slurm.Queue().jobs(trials) == {first: "7_0"}  # it may be there still
    answers(monkeypatch, squeue=FileNotFoundError())
    assert slurm.Queue().jobs(trials) == {}
    with slurm.jobs_end_alone(trials[:2]):
        slurm.AutoExecutor.map_array(None, "words")
    programs = answers(monkeypatch, squeue="7_0|PENDING\n")
    assert slurm.Queue().jobs(trials) == {}  # all of them have ended
    assert not programs
    assert second != first


# ---- a real SLURM ----------------------------------------------------------------------------------


@cache
def answers_here() -> bool:
    """Asked when the first test needs it: where the programs are and no controller, each call waits for 9 seconds."""
    return bool(shutil.which("sinfo")) and subprocess.run(["sinfo"], capture_output=True).returncode == 0


SLURM = ["hydra/launcher=slurm", "hydra.launcher.gpus_per_node=null", "hydra.launcher.cpus_per_task=1"]
SLURM += ["hydra.launcher.mem_gb=3", "hydra.launcher.array_parallelism=2", "device=cpu"]
WORDS = ["dataset.samples=64", "eval=[perplexity]", "eval.perplexity.samples=8", "train.batch_size=4"]
LONG = [*WORDS, "train.steps=800", "train.log_every=10", "train.checkpoint_every=100"]


Run = Callable[..., subprocess.Popen[str]]


def told(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Start `peftsweep` on SLURM, its jobs with one thread; after the test neither it nor a job of it is left."""
    if not answers_here():
        pytest.skip("needs a SLURM that answers on this host")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    started: list[subprocess.Popen[str]] = []

    def begin(*words: str) -> subprocess.Popen[str]:
        started.append(start(*words, *SLURM))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()
    subprocess.run(["scancel", "--me"], check=False)


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=1500)
    return process.returncode, out, err


def training() -> dict[str, tuple[int, str]]:
    """Of each trial that has written a checkpoint its process and its SLURM job."""
    found = {}
    for claim in Path("multirun/default/.claims").glob("*.json"):
        if next(Path("multirun/default").glob(f"*-{claim.stem}/checkpoints/*.pt"), None):
            try:
                pid = int(json.loads(claim.read_text())["pid"])
                words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            except (OSError, ValueError):  # it has just ended
                continue
            told = dict(word.decode().partition("=")[::2] for word in words)
            array, job = told.get("SLURM_ARRAY_JOB_ID"), told.get("SLURM_JOB_ID", "")
            found[claim.stem] = (pid, f"{array}_{told['SLURM_ARRAY_TASK_ID']}" if array else job)
    return found


def one_of(found: dict[str, tuple[int, str]] | None) -> tuple[str, tuple[int, str]]:
    assert found
    return next(iter(found.items()))


def statuses() -> list[str]:
    return sorted(one.status.name for one in records().values())


@pytest.mark.slow
def test_a_job_whose_process_is_killed_costs_that_process(run: Run) -> None:
    process = run(*LONG, "method.r=2,4")
    killed, (pid, _) = one_of(wait_for(training, process))
    os.kill(pid, signal.SIGKILL)
    code, out, _ = end(process)
    assert (code, statuses()) == (0, ["success", "success"]), out
    went_on = [one for one in records().values() if one.run_info["identity"] == killed]
    assert went_on[0].run_info["resumed"] >= 100


@pytest.mark.slow
def test_a_job_that_is_cancelled_is_recorded_and_the_others_end(run: Run) -> None:
    process = run(*LONG, "train.steps=6000", "method.r=2,4")  # longer than the seconds from SIGTERM to SIGKILL
    _, (_, job) = one_of(wait_for(training, process))
    subprocess.run(["scancel", job], check=True)
    code, out, _ = end(process)
    assert statuses() == ["cancelled", "success"], out
    assert code != 0


@pytest.mark.slow
def test_a_parent_that_is_killed_leaves_its_jobs_and_the_same_command_ends_with_all(run: Run) -> None:
    process = run(*LONG, "method.r=2,4,8")
    wait_for(training, process)
    process.kill()
    process.communicate()
    code, out, _ = end(run(*LONG, "method.r=2,4,8"))
    assert (code, statuses()) == (0, ["success"] * 3), out


@pytest.mark.slow
def test_jobs_that_wait_when_their_command_is_killed_are_not_submitted_again(run: Run) -> None:
    blocker = told("sbatch", "--parsable", "--output=/dev/null", "--exclusive", "--wrap=sleep 1500").strip()
    process = run(*WORDS, "train.steps=4", "method.r=2,4")
    assert wait_for(lambda: told("squeue", f"--jobs={blocker}", "--noheader", "--states=running"), process)
    queue = ["squeue", "--me", "--array", "--noheader", "--states=pending"]
    wait_for(lambda: len(told(*queue).splitlines()) == 2, process)
    time.sleep(1)
    process.kill()
    process.communicate()
    again = run(*WORDS, "train.steps=4", "method.r=2,4")
    assert again.stdout is not None
    lines = iter(again.stdout.readline, "")
    assert any("waits for 2 trials in the queue" in line for line in lines)
    assert len(told(*queue).splitlines()) == 2
    subprocess.run(["scancel", blocker], check=True)
    code, out, _ = end(again)
    assert (code, statuses()) == (0, ["success"] * 2), out


def change(job: str, *settings: str) -> None:
    subprocess.run(["scontrol", "update", f"jobid={job}", *settings], check=True)


@pytest.mark.slow
def test_a_time_limit_sends_a_trial_to_the_queue_and_on_from_its_checkpoint(run: Run) -> None:
    limits = ["hydra.launcher.timeout_min=30", "hydra.launcher.signal_delay_s=100"]
    process = run(*LONG, "train.steps=2000", "method.r=2", *limits)
    _, (_, job) = one_of(wait_for(training, process))
    minutes = int(told("squeue", "--jobs", job, "--noheader", "--format=%M").split(":")[-2])  # that it has run
    change(job, f"timelimit={minutes + 2}")  # it has less than two minutes left, and is told so at once
    wait_for(lambda: "BeginTime" in told("squeue", "--jobs", job, "--noheader", "--format=%r"), process)
    change(job, "timelimit=30", "starttime=now")  # SLURM would hold a requeued job for two minutes
    code, out, _ = end(process)
    assert (code, statuses()) == (0, ["success"]), out
    assert next(iter(records().values())).run_info["resumed"] >= 100


@pytest.mark.slow
@pytest.mark.parametrize("state", ["drain", "down"])
def test_a_node_that_is_lost_for_a_while_loses_nothing(state: str, run: Run) -> None:
    [node] = told("sinfo", "-h", "-o", "%n").split()[:1]
    process = run(*LONG, "method.r=2,4,8")
    wait_for(training, process)
    subprocess.run(["scontrol", "update", f"nodename={node}", f"state={state}", "reason=test"], check=True)
    time.sleep(20)
    # With ReturnToService=2 a node that is down is back as soon as its slurmd registers, and cannot be resumed.
    subprocess.run(["scontrol", "update", f"nodename={node}", "state=resume"], check=state == "drain")
    code, out, _ = end(process)
    assert (code, statuses()) == (0, ["success"] * 3), out
    if state == "down":  # its jobs were put into the queue again
        assert any(one.run_info["resumed"] for one in records().values())


@pytest.mark.slow
def test_an_array_of_twenty_with_two_at_once(run: Run) -> None:
    ranks = ",".join(map(str, range(1, 21)))
    process, most = run(*WORDS, "train.steps=4", f"method.r={ranks}"), 0
    while process.poll() is None:
        most = max(most, len(told("squeue", "--me", "--noheader", "--states=running").splitlines()))
        time.sleep(0.5)
    code, out, _ = end(process)
    assert (code, statuses()) == (0, ["success"] * 20), out
    assert most == 2
