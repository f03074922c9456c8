"""Code of a user's leaves its process as it found it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import os
import random
import resource
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from peftsweep.config import build
from peftsweep.config.compose import Trial
from peftsweep.evaluation.evaluate import Evaluation
from peftsweep.evaluation.isolation import Resources, ends_as_error, generators_kept, process_state_kept
from peftsweep.study import record, store
from peftsweep.sweep import workers

CHANGES: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {  # what is done, and where it shows
    "folder": (lambda: os.chdir("/"), os.getcwd),
    "new variable": (lambda: os.environ.update(A_NEW_ONE="1"), lambda: os.environ.get("A_NEW_ONE")),
    "other value": (lambda: os.environ.update(PATH=""), lambda: os.environ["PATH"]),
    "umask": (lambda: os.umask(0o077), lambda: (found := os.umask(0o022), os.umask(found))[0]),
    "signals": (lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN), lambda: signal.getsignal(signal.SIGTERM)),
    "gradients": (lambda: torch.set_grad_enabled(False), torch.is_grad_enabled),
    "dtype": (lambda: torch.set_default_dtype(torch.float64), torch.get_default_dtype),
    "device": (lambda: torch.set_default_device("meta"), lambda: torch.ones(1).device),
    "threads": (lambda: torch.set_num_threads(torch.get_num_threads() + 1), torch.get_num_threads),
    "precision": (lambda: torch.set_float32_matmul_precision("medium"), torch.get_float32_matmul_precision),
    "children": (lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN), lambda: signal.getsignal(signal.SIGCHLD)),
    "alarm": (lambda: signal.alarm(1000), lambda: signal.getitimer(signal.ITIMER_REAL)[0] > 0),
    "limit of core files": (
        lambda: resource.setrlimit(resource.RLIMIT_CORE, (1, resource.getrlimit(resource.RLIMIT_CORE)[1])),
        lambda: resource.getrlimit(resource.RLIMIT_CORE),
    ),
    "limit of a file's size": (
        lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1])),
        lambda: resource.getrlimit(resource.RLIMIT_FSIZE),
    ),
    "recursion": (lambda: sys.setrecursionlimit(5000), sys.getrecursionlimit),
    "collection": (gc.disable, gc.isenabled),
    "logging": (lambda: logging.disable(logging.CRITICAL), lambda: logging.root.manager.disable),
    "warnings": (lambda: warnings.simplefilter("error", BytesWarning), lambda: list(warnings.filters)),
    "path": (lambda: sys.path.clear(), lambda: list(sys.path)),
    "hook": (lambda: setattr(sys, "excepthook", None), lambda: sys.excepthook),
    "output": (lambda: sys.stdout.close(), lambda: sys.stdout.closed),
    "no output": (lambda: setattr(sys, "stdout", None), lambda: sys.stdout is None),
    "descriptor": (lambda: os.close(2), lambda: Path("/dev/fd/2").exists()),
    "determinism": (lambda: torch.use_deterministic_algorithms(True), torch.are_deterministic_algorithms_enabled),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_a_block_changes_of_its_process_is_put_back(what: str) -> None:
    change, shown = CHANGES[what]
    before = shown()
    with process_state_kept():
        change()
        assert shown() != before or what == "output"  # which is not closed even there
    assert shown() == before


def test_random_numbers_go_on_as_if_a_block_had_drawn_none() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(1))

    def sown() -> None:
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)

    sown()
    expected = draw()
    sown()
    with generators_kept():
        draw()
    assert draw() == expected


@pytest.mark.parametrize("raised", [SystemExit(3), GeneratorExit(), asyncio.CancelledError()])
def test_a_metric_that_ends_the_process_fails_its_trial_alone(raised: BaseException) -> None:
    with pytest.raises(RuntimeError, match=f"it ended by {type(raised).__name__}"), ends_as_error():
        raise raised
    with pytest.raises(KeyboardInterrupt), ends_as_error():
        raise KeyboardInterrupt


@pytest.mark.parametrize("child_raises", [True, False])
def test_a_process_that_a_metric_has_forked_runs_no_rest_of_the_trial(child_raises: bool) -> None:
    own = os.getpid()
    with contextlib.suppress(ValueError), ends_as_error():
        child = os.fork()
        if not child and child_raises:
            raise ValueError
    if os.getpid() != own:
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


def test_a_job_that_is_taken_off_its_machine_during_an_evaluation_ends_as_its_scheduler_wants() -> None:
    """The handler of a scheduler's signal puts the job back into the queue and exits; the trial has not failed."""

    def requeued(*_: Any) -> None:
        sys.exit(144)

    before = signal.signal(signal.SIGUSR2, requeued)
    try:
        with pytest.raises(SystemExit, match="144"), process_state_kept(), ends_as_error():
            signal.raise_signal(signal.SIGUSR2)
        assert signal.getsignal(signal.SIGUSR2) is requeued

        def exits_by_a_signal_of_its_own() -> None:
            signal.signal(signal.SIGUSR2, lambda *_: sys.exit(3))
            signal.raise_signal(signal.SIGUSR2)

        with pytest.raises(RuntimeError, match="it ended by SystemExit: 3"), process_state_kept(), ends_as_error():
            exits_by_a_signal_of_its_own()
        assert signal.getsignal(signal.SIGUSR2) is requeued
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_a_file_that_a_metric_cannot_write_is_no_full_disk_of_the_study(tmp_path: Path) -> None:
    """Its own error ends its trial; an error of the study's files (store.unwritable) ends the sweep."""

    def writes() -> None:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
        (tmp_path / "large").write_bytes(bytes(100))

    with pytest.raises(OSError, match="File too large") as plain, process_state_kept():
        writes()
    assert store.unwritable(plain.value) is not None
    with pytest.raises(RuntimeError, match="File too large") as own, process_state_kept(), ends_as_error():
        writes()
    assert store.unwritable(own.value) is None
    with pytest.raises(FileNotFoundError), ends_as_error():
        (tmp_path / "missing").read_text()


def test_a_process_whose_limits_cannot_be_put_back_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a hard limit, which only root may raise again: then not the study's disk is full."""
    before = Resources.now()
    assert not before.are_lost()
    soft, hard = before.limits[resource.RLIMIT_CORE]
    other = before._replace(limits=before.limits | {resource.RLIMIT_CORE: (soft + 1, hard)})
    assert other.are_lost()
    assert before._replace(open_files=before.open_files - 1000).are_lost()

    def full(*_: Any) -> None:
        raise OSError(errno.EFBIG, "File too large", "multirun/default/x/result.json")

    monkeypatch.setattr(workers, "_run_job", full)
    channel: Any = None
    assert workers._in_worker([], workers.Options(), channel, before)[0] == "unwritable"
    assert workers._in_worker([], workers.Options(), channel, other)[0] == "broken"


class Speechless(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


def test_an_exception_that_cannot_be_written_is_recorded_by_its_type() -> None:
    assert record.failure(Speechless(), "evaluate") | {"traceback": ""} == {
        "type": "Speechless",
        "message": "",
        "stage": "evaluate",
        "traceback": "",
    }
    assert record.one_line(Speechless()) == "Speechless"


def test_it_is_put_back_after_an_error(tmp_path: Path) -> None:
    before = os.getcwd()

    def fail() -> None:
        with process_state_kept():
            os.chdir(tmp_path)
            raise ValueError("of a metric")

    with pytest.raises(ValueError, match="of a metric"):
        fail()
    assert os.getcwd() == before


def wanders(model: Any, tokenizer: Any, examples: Any, batch_size: int, max_length: int) -> Evaluation:
    """An evaluation that leaves by another folder and switches gradients off."""
    os.chdir("/")
    torch.set_grad_enabled(False)
    return Evaluation({}, [], {})


def test_an_evaluation_leaves_the_process_as_it_was(compose: Callable[..., Trial]) -> None:
    one = compose("eval=[perplexity]", f"eval.perplexity._target_={__name__}.wanders")
    here = os.getcwd()
    evaluate: Callable[..., Evaluation] = build.evaluator(one, "perplexity")
    evaluate(None, None, [])
    assert os.getcwd() == here
    assert torch.is_grad_enabled()
