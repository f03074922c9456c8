"""A trial is run by one process, whatever host names, containers, clocks and disks do."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import psutil
import pytest

from peftsweep.study import atomic, claims, owner, record
from peftsweep.study.record import Result
from peftsweep.trial import outcome

Run = Callable[..., Result]
TRIAL = "x"


@pytest.fixture
def other(scratch: Path) -> Callable[..., Path]:
    """Have another process claim the trial: one that has ended, as far as can be seen from here, or ``pid``."""

    def write(pid: int | None = None, **changes: Any) -> Path:
        if pid is None:
            (dead := subprocess.Popen(["true"])).wait()
            pid = dead.pid
        holder = owner.me() | {"pid": pid, "started": owner.started(pid) or 1.0, "token": "another"} | changes
        record.write_json(file := scratch / ".claims" / f"{TRIAL}.json", holder)
        return file

    return write


def is_claimed(scratch: Path) -> str | None:
    """Why the trial cannot be claimed; None if it can, and was for a moment."""
    try:
        with claims.claim(scratch, TRIAL):
            return None
    except claims.Claimed as claimed:
        return str(claimed)


def test_a_claim_that_is_gone_is_no_more_this_process_s(scratch: Path) -> None:
    """Another process took the trial over, ended it and let its claim go; or the study was moved."""
    with claims.claim(scratch, TRIAL):
        claims.check_claim(scratch, TRIAL)
        (scratch / ".claims" / f"{TRIAL}.json").unlink()
        with pytest.raises(claims.Claimed, match="another process took it"):
            claims.check_claim(scratch, TRIAL)


@pytest.mark.parametrize("error", [errno.EACCES, errno.ESTALE])
def test_a_claim_that_cannot_be_read_is_held(
    error: int, other: Callable[..., Path], scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one of another user, or on a network file system that fails for a moment."""

    def refused(file: Path) -> bytes:
        raise OSError(error, os.strerror(error), str(file))

    with claims.claim(scratch, "mine"), monkeypatch.context() as patch:
        other()
        patch.setattr(Path, "read_bytes", refused)
        assert claims.claimed(scratch, TRIAL) is claims.Claim.held
        assert "run by another process" in (is_claimed(scratch) or "")
        claims.check_claim(scratch, "mine")


@pytest.mark.parametrize("where", [{"namespace": "pid:[1]"}, {"boot": "another"}, {"host": "another"}])
def test_a_process_number_says_nothing_of_another_container_or_machine(
    where: dict[str, str], other: Callable[..., Path], scratch: Path
) -> None:
    file = other()
    assert is_claimed(scratch) is None  # dead, as is seen from here
    other(**where)
    assert "s if no heartbeat comes" in (is_claimed(scratch) or "")
    assert claims.claimed(scratch, TRIAL) is claims.Claim.held
    os.utime(file, (0, time.time() - 1.5 * claims.LEASE_SECONDS))
    assert (is_claimed(scratch) is None) == ("boot" in where)  # else one clock, which may be set, is that of both


def test_a_number_that_was_given_anew_is_no_sign_of_life(other: Callable[..., Path], scratch: Path) -> None:
    other(os.getpid(), started=1.0)
    assert is_claimed(scratch) is None


def test_a_process_that_cannot_be_seen_is_not_dead(
    other: Callable[..., Path], scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/proc hides those of other users (hidepid), or no file can be opened."""
    real = Path.read_text

    def no_more_files(self: Path, *given: Any, **options: Any) -> str:
        if self.match(f"/proc/{process.pid}/stat"):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(self))
        return real(self, *given, **options)

    with subprocess.Popen(["sleep", "60"]) as process:
        other(process.pid)
        tag = f"{process.pid}-{owner.started(process.pid):.0f}-{owner.tag().rpartition('-')[2]}"
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_text", no_more_files)
            assert "s if no heartbeat comes" in (is_claimed(scratch) or "")
            assert owner.gone(tag) is None
        assert owner.gone(tag) is False
        process.kill()

    def of_another_user(*_: Any) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    other()
    with monkeypatch.context() as patch:
        patch.setattr(os, "kill", of_another_user)
        assert "s if no heartbeat comes" in (is_claimed(scratch) or "")
        assert owner.gone(tag) is None
    assert owner.gone(tag) is True
    assert is_claimed(scratch) is None


def test_a_clock_that_is_set_takes_no_trial_from_a_living_process(
    other: Callable[..., Path], scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        other(process.pid)
        real = psutil.Process.create_time
        monkeypatch.setattr(psutil.Process, "create_time", lambda self: real(self) + 1)
        now = time.time
        monkeypatch.setattr(time, "time", lambda: now() + 86400)
        assert f"run by process {process.pid} on " in (is_claimed(scratch) or "")
        process.kill()


def test_a_claim_that_is_dated_ahead_is_waited_for_but_not_for_ever(
    other: Callable[..., Path], scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "LEASE_SECONDS", 0.5)
    ahead = time.time() + 3600
    os.utime(file := other(host="another"), (ahead, ahead))
    assert "dated 3,600 s ahead of this disk's clock" in (is_claimed(scratch) or "").replace("3,599", "3,600")
    for beat in range(3):  # it lives, and its clock is ahead
        time.sleep(0.3)
        os.utime(file, (ahead + beat, ahead + beat))
        assert is_claimed(scratch)
    time.sleep(0.6)
    assert claims.claimed(scratch, TRIAL) is claims.Claim.left
    assert file.stat().st_mtime == 0  # so that a process that has only begun to watch sees it too
    claims._watched.clear()
    assert is_claimed(scratch) is None


def test_a_holder_that_was_still_for_too_long_writes_nothing_more(
    run_unwritten: Run, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = outcome.log_step

    def stolen(lines: Any, observer: Any, row: dict[str, Any]) -> None:
        real(lines, observer, row)
        (file,) = Path("multirun/default/.claims").glob("*.json")
        file.write_text(json.dumps(owner.me() | {"token": "another's"}))

    monkeypatch.setattr("peftsweep.trial.session.log_step", stolen)
    with pytest.raises(claims.Claimed, match="another process took it"):
        run_unwritten("train.log_every=1")
    (steps,) = Path("multirun/default").glob("*/steps.jsonl")
    assert len(record.read_lines(steps)) == 1
    assert not (steps.parent / "result.json").exists()
    assert not (steps.parent / "checkpoints").exists()
    assert json.loads(next(Path("multirun/default/.claims").glob("*.json")).read_text())["token"] == "another's"


def test_a_disk_without_locks_is_no_reason_to_wait_or_to_run_twice(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(filelock.FileLock, "acquire", none)
    monkeypatch.setattr(claims, "SETTLE_SECONDS", 0.0)
    with claims.claim(scratch, TRIAL):
        assert is_claimed(scratch)
    real = record.write_json

    def beaten(file: Path, content: Any) -> None:
        real(file, content)
        real(file, content | {"token": "of one that wrote at the same moment"})

    monkeypatch.setattr(claims, "write_json", beaten)
    assert is_claimed(scratch) == "another process has just taken it"


def test_a_lock_that_fails_for_a_moment_is_tried_again(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "PAUSES", (0.0, 0.0))
    left, real = iter(range(2)), filelock.FileLock.acquire

    def stale(self: Any, *given: Any, **options: Any) -> Any:
        if next(left, None) is not None:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return real(self, *given, **options)

    monkeypatch.setattr(filelock.FileLock, "acquire", stale)
    assert is_claimed(scratch) is None


def test_a_tag_is_of_a_process_of_this_machine() -> None:
    assert owner.gone(owner.tag()) is False
    with subprocess.Popen(
        [sys.executable, "-c", "from peftsweep.study import owner; print(owner.tag())"], stdout=-1
    ) as one:
        assert one.stdout
        tag = one.stdout.read().decode().strip()
    assert owner.gone(tag) is True
    pid, begun, _ = tag.split("-")
    assert owner.gone(f"{pid}-{begun}-ffffffff") is None
    assert owner.gone("anything") is None


@pytest.mark.slow
def test_two_containers_with_one_host_name_train_a_trial_once(scratch: Path) -> None:
    """Two PID namespaces, in each of which the command has the same number."""
    apart = ["unshare", "--pid", "--fork", "--mount-proc"]
    if subprocess.run([*apart, "true"], capture_output=True).returncode:
        pytest.skip("a PID namespace can be made by root only")
    words = ["train.steps=60", "train.log_every=1", "dataset.samples=64", "eval=[perplexity]", "device=cpu"]
    words += ["eval.perplexity.samples=8", "hydra.launcher.workers=0"]
    door = [*apart, sys.executable, "-c", "from peftsweep import cli; cli.main()", *words]
    both = [subprocess.Popen(door, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    (steps,) = Path("multirun/default").glob("*/steps.jsonl")
    assert [row["step"] for row in record.read_lines(steps) if "loss" in row] == list(range(1, 61))
    assert sum("waits: run by process" in out or "done before" in out for out, _ in outputs) == 1
