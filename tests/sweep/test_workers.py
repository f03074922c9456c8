"""Worker processes: faults, time, claims, budgets, and numbers that depend on nothing of it."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing import connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import psutil
import pytest
from safetensors import SafetensorError

from peftsweep import InputError
from peftsweep.config import build, checks
from peftsweep.config import compose as config_compose
from peftsweep.config.compose import Trial
from peftsweep.models import model, saved
from peftsweep.observe.display import Display, TrialView
from peftsweep.study import claims, record, sweep_record
from peftsweep.study.record import Result, Status, host
from peftsweep.sweep import processes, workers
from peftsweep.trial import done as trial_done
from peftsweep.trial import outcome
from peftsweep.trial import session as trial_session
from tests.conftest import SMALL, UNWRITTEN, records, scores, start, wait_for

Command = Callable[..., tuple[int, str, str]]
Compose = Callable[..., Trial]
BAD = """
import os, signal, time, resource
from peftsweep.evaluate import perplexity as plain

def exits(model, tokenizer, examples, *, batch_size: int = 16, max_length: int = 768):
    if is_adapted(model):
        os._exit(7)
    return plain(model, tokenizer, examples, batch_size=batch_size, max_length=max_length)

def raises(model, tokenizer, examples, *, batch_size: int = 16, max_length: int = 768):
    if is_adapted(model):
        raise ValueError("no")
    return plain(model, tokenizer, examples, batch_size=batch_size, max_length=max_length)

def eats(model, tokenizer, examples, *, batch_size: int = 16, max_length: int = 768):
    if is_adapted(model):
        import torch
        before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (2**33, before[1]))
        try:
            torch.ones(2**34)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)
    return plain(model, tokenizer, examples, batch_size=batch_size, max_length=max_length)

def hangs(model, tokenizer, examples, *, batch_size: int = 16, max_length: int = 768):
    if is_adapted(model):
        time.sleep(3600)
    return plain(model, tokenizer, examples, batch_size=batch_size, max_length=max_length)

def starts_and_holds(model, tokenizer, examples, *, batch_size: int = 16, max_length: int = 768):
    if is_adapted(model):
        import ctypes, subprocess
        for own in (False, True):
            subprocess.Popen(["sleep", "4321.5"], start_new_session=own)
        open("started", "w").close()
        ctypes.PyDLL(None).sleep(3600)  # and lets no other thread run
    return plain(model, tokenizer, examples, batch_size=batch_size, max_length=max_length)

def ignores_interrupts(model, tokenizer, examples, *, batch_size: int = 16, max_length: int = 768):
    while is_adapted(model):
        try:
            open("reached", "w").close()
            time.sleep(3600)
        except KeyboardInterrupt:
            open("interrupted", "w").close()
    return plain(model, tokenizer, examples, batch_size=batch_size, max_length=max_length)

def is_adapted(model):
    return hasattr(model, "peft_config")
"""


@pytest.fixture
def bad(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Evaluations that go wrong in four ways, importable here and in workers."""
    (scratch / "bad_evaluations.py").write_text(BAD)
    monkeypatch.syspath_prepend(str(scratch))
    yield
    sys.modules.pop("bad_evaluations", None)


@pytest.mark.usefixtures("bad")
def test_four_ways_to_go_wrong_cost_one_trial_each(command: Command) -> None:
    targets = ",".join(f"bad_evaluations.{name}" for name in ("exits", "raises", "eats", "hangs"))
    code, out, _ = command(
        *UNWRITTEN,
        f"eval.perplexity._target_={targets},peftsweep.evaluation.evaluate.perplexity",
        "hydra.launcher.timeout=12",
        "hydra.launcher.workers=2",
    )
    assert code == 1
    ended = {one.config["eval"]["perplexity"]["_target_"].rpartition(".")[2]: one for one in records().values()}
    assert {name: one.status.name for name, one in ended.items()} == {
        "exits": "failed",
        "raises": "failed",
        "eats": "oom",
        "hangs": "failed",
        "perplexity": "success",
    }
    assert (ended["exits"].error or {})["message"] == "its process ended by exit code 7"
    assert (ended["raises"].error or {})["message"] == "no"
    assert (ended["hangs"].error or {})["type"] == "TimeoutError"
    assert {(one.error or {}).get("stage") for name, one in ended.items() if name != "perplexity"} == {"eval"}
    assert ended["hangs"].train_info["steps"] == 4  # what it had logged until then
    assert ended["perplexity"].meta_info["system"]["trials_at_once"] == 2
    assert out.splitlines()[-1] == "5 trials: 1 success, 3 failed, 1 oom  (multirun/default)"


def worker_of(process: subprocess.Popen[str]) -> psutil.Process | None:
    """The process that holds a claim, once there is one; None where the command ends without."""

    def holder() -> psutil.Process | None:
        for file in Path("multirun/default/.claims").glob("*.json"):
            with contextlib.suppress(ValueError, OSError, psutil.NoSuchProcess):
                return psutil.Process(json.loads(file.read_text())["pid"])
        return None

    return wait_for(holder, process)


def kill_a_worker() -> None:
    """Kill the first process that holds a claim."""
    end = time.monotonic() + 240
    while time.monotonic() < end:
        for file in Path("multirun/default/.claims").glob("*.json"):
            with contextlib.suppress(ValueError, OSError):
                return os.kill(json.loads(file.read_text())["pid"], signal.SIGKILL)
        time.sleep(0.01)


def test_a_killed_worker_costs_its_trial_and_a_retry_saves_it(command: Command) -> None:
    words = [*UNWRITTEN, "method.r=2,4"]
    for retries, statuses in ((0, ["failed", "success"]), (1, ["success", "success"])):
        killer = threading.Thread(target=kill_a_worker)
        killer.start()
        code, out, err = command(*words, f"hydra.launcher.retries={retries}")
        killer.join()
        assert (code, err) == (1 - retries, ""), out
        assert sorted(one.status.name for one in records().values()) == statuses
        if not retries:
            assert "its process ended by SIGKILL" in out
            for file in Path("multirun/default").glob("*/result.json"):  # the second time from the beginning
                if Result.read(file.parent).status is Status.success:
                    file.unlink()


@pytest.mark.slow
def test_a_retry_of_a_command_with_force_goes_on_from_the_checkpoint() -> None:
    words = [*UNWRITTEN, "train.steps=400", "train.log_every=10", "train.checkpoint_every=20"]
    process = start(*words, "force=true", "hydra.launcher.retries=1")
    worker = worker_of(process)
    assert worker is not None
    assert wait_for(lambda: [*Path("multirun/default").glob("*/checkpoints/step-*.pt")], process)
    worker.kill()
    out, err = process.communicate(timeout=240)
    assert (process.returncode, err) == (0, ""), out
    (ended,) = records().values()
    assert ended.run_info["resumed"] >= 20


@pytest.mark.slow  # starts a command; test_processes.py kills the parent of a guarded worker, which is cheap
def test_workers_end_with_their_parent_however_it_ends() -> None:
    process = start(*UNWRITTEN, "train.steps=2000")
    worker = worker_of(process)
    assert worker is not None
    family = [worker, *psutil.Process(process.pid).children(recursive=True)]
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.slow  # two starts of a process, and waits
@pytest.mark.usefixtures("bad")
def test_a_second_interrupt_does_not_wait_for_a_trial_that_ignores_the_first() -> None:
    target = "eval.perplexity._target_=bad_evaluations.ignores_interrupts"
    endless = (
        "from peftsweep import cli; from peftsweep.sweep import workers; workers.CANCEL_GRACE_SECONDS = 1e6; cli.main()"
    )
    process = start(*UNWRITTEN, target, door=endless)
    assert wait_for(Path("reached").exists, process)
    process.send_signal(signal.SIGINT)
    assert wait_for(Path("interrupted").exists, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=240)
    assert (process.returncode, err) == (130, "interrupted; the same command continues\n"), out
    assert not records()


@pytest.mark.slow  # starts a command; the fast tier interrupts one in this process, below
def test_ctrl_c_in_a_terminal_while_all_is_imported_is_one_line() -> None:
    process = start(*UNWRITTEN, terminal=True)
    assert wait_for(psutil.Process(process.pid).children, process)
    time.sleep(1.0)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=240)
    assert (process.returncode, out, err) == (130, "", "interrupted; the same command continues\n")


INTERRUPTED_TWICE = """
import atexit, os, signal, sys, time
from peftsweep import cli

@atexit.register
def exit_takes_a_while():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)

def command():
    signal.signal(signal.SIGINT, cli._interrupt)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)

sys.exit(cli._run_command(command))
"""


def test_an_interrupt_while_an_interrupted_command_ends_is_no_second_line() -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTED_TWICE], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted; the same command continues\n")


def full_for_safetensors(*_: Any) -> Any:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_a_trial_that_finds_the_disk_full_ends_the_sweep_in_one_line(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*UNWRITTEN, "train.steps=1", "eval.perplexity.samples=1", "method.r=2,4"]
    with monkeypatch.context() as context:
        context.setattr(saved, "save", full_for_safetensors)
        code, _, err = command(*words)
    line = "peftsweep: multirun: No space left on device; finished trials are kept, the same command continues\n"
    assert (code, err) == (2, line)
    assert [one.status for one in records().values()] == [Status.failed]  # the second was not trained for nothing
    assert command(*words)[0] == 0
    assert {one.status for one in records().values()} == {Status.success}


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder to run in is a file system of one megabyte."""
    (disk := tmp_path / "disk").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a file system can be mounted by root only")
    monkeypatch.chdir(disk)
    yield disk
    monkeypatch.chdir(tmp_path)
    subprocess.run(["umount", disk], check=True)


@pytest.mark.slow
def test_a_full_disk_and_one_that_is_read_only(small_disk: Path) -> None:
    words = [*SMALL, "method.r=2,8,32"]

    def run() -> tuple[str, int]:
        process = start(*words)
        return process.communicate(timeout=240)[1], process.returncode

    assert run() == (
        "peftsweep: multirun: No space left on device; finished trials are kept, the same command continues\n",
        2,
    )
    held = {name: one for name, one in records().items() if one.status is Status.success}
    assert held
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    err, code = run()
    assert code == 2
    assert err.endswith("Read-only file system; finished trials are kept, the same command continues\n")
    assert err.count("\n") == 1
    subprocess.run(["mount", "-o", "remount,rw,size=20m", small_disk], check=True)
    assert run() == ("", 0)
    assert {one.status for one in records().values()} == {Status.success}
    assert held.items() <= records().items()


def shoot(words: list[str], kills: int, chance: random.Random) -> int:
    """Run the command until it ends by itself; how often its parent or its worker was killed on the way."""
    shots, done = 0, set[tuple[str, str]]()
    while True:
        process = start(*words)
        while shots < kills and (worker := worker_of(process)) is not None:
            time.sleep(chance.uniform(0.0, 1.5))
            target = chance.choice(["parent", "worker"])
            shots += 1
            if target == "parent":
                process.kill()
                break
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.kill()
        _, err = process.communicate(timeout=600)
        assert not err
        found = {(name, one.run_info["created_at"]) for name, one in records().items() if one.status is Status.success}
        assert done <= found  # none is trained again
        done = found
        if process.returncode == 0:
            return shots


def final(name: str) -> dict[str, Any]:
    return {name: (one.status, scores(one), one.train_info["final_loss"]) for name, one in records(name).items()}


@pytest.mark.slow  # 12 trials twice, and a start of the command for each kill of it
@pytest.mark.parametrize("kills", [2, 50])
def test_killed_at_random_a_sweep_ends_with_the_table_of_an_undisturbed_one(kills: int, command: Command) -> None:
    length = [f"train.steps={max(20, 4 * kills)}", "train.checkpoint_every=10"]  # enough to be killed so often
    words = [*UNWRITTEN, "method.r=1,2,3,4,5,6", "seed=0,1", *length]
    assert command(*words, "study=undisturbed")[0] == 0
    assert shoot(words, kills, random.Random(kills)) == kills
    assert final("default") == final("undisturbed")
    assert len(records()) == 12
    for folder in Path("multirun/default").glob("tiny-*"):  # and none of them is half written
        assert record.read_lines(folder / "steps.jsonl")
        assert record.read_lines(folder / "predictions/perplexity.jsonl")
    assert not [
        one for one in psutil.process_iter(["cwd"]) if one.info["cwd"] == str(Path.cwd()) and one.pid != os.getpid()
    ]


@pytest.mark.slow
def test_two_sweeps_on_a_study_share_the_work() -> None:
    words = [*SMALL, "method.r=2,4,8,16"]
    both = [start(*words) for _ in range(2)]
    for process in both:
        out, err = process.communicate(timeout=240)
        assert (process.returncode, err) == (0, ""), out
        assert out.splitlines()[-1] == "4 trials: 4 success  (multirun/default)"
    assert len(records()) == 4
    times = sorted(one.run_info["created_at"] for one in records().values())
    assert len(list(Path("multirun/default").glob("*/trial.log"))) == len(times) == 4
    assert not list(Path("multirun/default/.claims").glob("*.json"))


def test_a_claim_is_held_by_one_and_ends_with_its_process(scratch: Path) -> None:
    with claims.claim(scratch, "x"):
        with pytest.raises(claims.Claimed), claims.claim(scratch, "x"):
            pass
        with claims.claim(scratch, "y"):
            pass
    with claims.claim(scratch, "x"):
        pass
    (file := scratch / ".claims/x.json").write_text(
        json.dumps({"host": host(), "pid": os.getpid(), "started": 0.0})  # a number that was given anew
    )
    with claims.claim(scratch, "x"):
        pass
    file.write_text("{")  # half written, as by a power loss
    with claims.claim(scratch, "x"):
        pass


def test_a_claim_of_another_machine_lapses_when_it_is_silent(scratch: Path) -> None:
    file = scratch / ".claims/x.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": 0.0}))
    with pytest.raises(claims.Claimed), claims.claim(scratch, "x"):
        pass
    silent = time.time() - claims.LEASE_SECONDS - 60
    os.utime(file, (silent, silent))
    with claims.claim(scratch, "x"):
        pass


@pytest.mark.parametrize("quant", ["none", pytest.param("4bit", marks=pytest.mark.slow)])
def test_numbers_do_not_depend_on_the_place_or_on_what_ran_before(quant: str, command: Command) -> None:
    words = [*UNWRITTEN, "method=pissa,lora", f"quant={quant}", "eval.perplexity.batch_size=8", "train.steps=2"]
    assert command(*words, "study=warm", "hydra.launcher.workers=1")[0] == 0
    assert command(*words, "study=here")[0] == 0
    if quant == "4bit":  # a third place, in the slow tier
        assert command(*words, "study=basic", "hydra/launcher=basic")[0] == 0
    warm, here, *others = (
        {name: (scores(one), one.train_info.get("final_loss")) for name, one in records(where).items()}
        for where in ("warm", "here", *(["basic"] if quant == "4bit" else []))
    )
    assert warm == here
    assert all(other == warm for other in others)
    assert len(warm) == 2


def test_a_base_that_a_method_changed_is_loaded_again(compose: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_BASE_CACHE", [])
    monkeypatch.setattr(build, "_KEEP_BASES", [True])
    loads: list[int] = []
    real = model.load
    monkeypatch.setattr(model, "load", lambda *a, **k: loads.append(1) or real(*a, **k))  # type: ignore[func-returns-value]
    one, tokenizer = compose(), model.load_tokenizer(compose().config.model)
    first, second = (build.load_base(one, tokenizer, model.device("cpu")) for _ in range(2))
    assert len(loads) == 1
    assert first is not second
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(first.parameters(), second.parameters(), strict=True))
    next(first.parameters()).data[0, 0] += 1e-7
    build.load_base(one, tokenizer, model.device("cpu"))
    assert len(loads) == 2
    build.load_base(compose("quant=4bit"), tokenizer, model.device("cpu"))
    assert len(loads) == 3


def test_a_kept_base_is_gone_before_the_memory_of_loading_another_is_measured(
    run_unwritten: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_BASE_CACHE", [])
    monkeypatch.setattr(build, "_KEEP_BASES", [True])
    real, held = model.load_tokenizer, list[int]()  # the first that is done in the stage
    monkeypatch.setattr(model, "load_tokenizer", lambda *a: held.append(len(build._BASE_CACHE)) or real(*a))  # type: ignore[func-returns-value]
    for words in (["method.r=2"], ["method.r=4"], ["quant=8bit"]):
        run_unwritten("train.steps=1", "eval.perplexity.samples=1", *words)
    assert held == [0, 1, 0]


def test_a_worker_whose_gpu_has_failed_takes_no_other_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    class Channel:
        sent: ClassVar[list[Any]] = []

        def recv(self) -> Any:
            return [], None

        def send(self, what: Any) -> None:
            self.sent.append(what)

    monkeypatch.setattr(build, "_KEEP_BASES", [])
    monkeypatch.setattr(workers, "_in_worker", lambda *_: ("done", ""))
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.synchronize", fails)
    workers.serve(Channel(), None)  # type: ignore[arg-type]
    assert Channel.sent == [("last", "done", "")]  # and says so: its end alone would bring it the next trial


LEAKY = """
from peftsweep.evaluate import perplexity as plain

held = []

def leaks(model, tokenizer, examples, *, batch_size: int = 16, max_length: int = 768):
    held.extend(open("/dev/null") for _ in range(100))
    return plain(model, tokenizer, examples, batch_size=batch_size, max_length=max_length)
"""


@pytest.mark.slow
def test_a_worker_that_gives_itself_up_costs_the_next_trial_nothing(
    scratch: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    (scratch / "leaky_evaluations.py").write_text(LEAKY)
    monkeypatch.syspath_prepend(str(scratch))
    words = [*UNWRITTEN, "eval.perplexity._target_=leaky_evaluations.leaks", "method.r=2,4"]
    code, out, _ = command(*words, "hydra.launcher.workers=1")
    assert (code, "2 trials: 2 success" in out) == (0, True)


def test_a_spent_worker_is_replaced_before_it_is_given_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def started_child(*_: Any) -> Any:
        own, other = connection.Pipe()
        process = SimpleNamespace(is_alive=lambda: True)

        def takes(message: Any) -> bool:
            own.send(message)
            return True

        started.append(SimpleNamespace(process=process, connection=own, other=other, takes=takes, end=lambda: None))
        return started[-1]

    monkeypatch.setattr(processes, "start", started_child)
    worker = workers._Worker("0", None)
    for kind, number in (("end", 1), ("last", 1), ("end", 2)):  # and how many processes have been started then
        worker.give([], [], workers.Options())
        assert len(started) == number
        assert started[-1].other.recv()[0] == []  # the job is with the newest
        started[-1].other.send((kind, "done", ""))
        assert worker.news() == ("done", "")


def test_a_limit_of_trials_and_of_time(command: Command) -> None:
    words = [*UNWRITTEN, "method.r=2,4"]
    code, out, _ = command(*words, "hydra.launcher.workers=0", "hydra.launcher.limit=1")
    assert (code, len(records())) == (3, 1)
    assert out.splitlines()[-1] == "1 trial: 1 success, 1 not run  (multirun/default)"
    assert (sweep_record.last(Path("multirun/default")) or {})["not_run"] == 1
    code, out, _ = command(*words, "hydra.launcher.workers=0", "hydra.launcher.deadline=0.001s", "study=late")
    assert (code, out.splitlines()[-1]) == (3, "0 trials, 2 not run  (multirun/late)")
    assert not records("late")


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_no_trial_of_another_command_is_waited_for_beyond_the_deadline(
    workers: int, compose: Compose, command: Command
) -> None:
    with claims.claim(Path("multirun/default"), compose(*UNWRITTEN).identity):
        code, out, _ = command(*UNWRITTEN, f"hydra.launcher.workers={workers}", "hydra.launcher.deadline=3s")
    assert (code, out.splitlines()[-1]) == (3, "0 trials, 1 not run  (multirun/default)")


def test_a_trial_that_failed_outweighs_those_that_a_limit_left(
    command: Command, fails_at_rank: Callable[[int], None]
) -> None:
    fails_at_rank(2)
    code, out, _ = command(*UNWRITTEN, "method.r=2,4", "hydra.launcher.limit=1", "hydra.launcher.workers=0")
    assert (code, out.splitlines()[-1]) == (1, "1 trial: 1 failed, 1 not run  (multirun/default)")


def test_an_interrupt_counts_what_was_done_and_what_was_not(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    real, done = trial_session.Session.adapt, list[str]()

    def adapt(session: trial_session.Session) -> None:
        if done:
            raise KeyboardInterrupt
        done.append(session.trial.identity)
        real(session)

    monkeypatch.setattr(trial_session.Session, "adapt", adapt)
    code, out, err = command(*UNWRITTEN, "method.r=2,4,8")
    assert (code, err) == (130, "interrupted; the same command continues\n")
    assert out.splitlines()[-1] == "2 trials: 1 success, 1 cancelled, 1 not run  (multirun/default)"


@pytest.mark.slow
@pytest.mark.usefixtures("bad")
@pytest.mark.parametrize("how", ["timeout", "kill", "group"])
def test_what_a_metric_has_started_ends_with_its_trial(how: str) -> None:
    target = "eval.perplexity._target_=bad_evaluations.starts_and_holds"
    words = [*UNWRITTEN, target, *(["hydra.launcher.timeout=90"] if how == "timeout" else [])]
    process = start(*words, terminal=True)
    assert wait_for(Path("started").exists, process)
    if how != "timeout":
        (os.kill if how == "kill" else os.killpg)(process.pid, signal.SIGKILL)
    process.communicate(timeout=300)
    end = time.monotonic() + 20
    while (
        left := [one for one in psutil.process_iter(["cmdline"]) if one.info["cmdline"] == ["sleep", "4321.5"]]
    ) and (time.monotonic() < end):
        time.sleep(0.1)
    assert not left


@pytest.mark.slow
def test_a_sigterm_to_all_processes_of_the_command_leaves_a_record_and_a_checkpoint() -> None:
    process = start(*SMALL, "train.steps=2000", terminal=True)
    worker = worker_of(process)
    assert worker is not None
    assert wait_for(lambda: [*Path("multirun/default").glob("*/steps.jsonl")], process)
    for one in (worker, *psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)):
        with contextlib.suppress(psutil.NoSuchProcess):
            one.terminate()
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 130, out
    (ended,) = records().values()
    assert ended.status is Status.cancelled
    assert list(Path("multirun/default").glob("*/checkpoints/step-*.pt"))


@pytest.mark.slow
def test_an_interrupt_of_one_worker_costs_its_trial_and_has_an_exit_code_of_its_own() -> None:
    process = start(*SMALL, "method.r=2,4", "train.steps=300")
    worker = worker_of(process)
    assert worker is not None
    worker.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=240)
    assert (process.returncode, err) == (3, ""), out
    assert out.splitlines()[-1] == "2 trials: 1 success, 1 cancelled  (multirun/default)"
    assert "its" not in (next(one for one in records().values() if one.error).error or {})["type"]


class _DeafWorker:
    """Of a pack it writes the first trial's record only, as one that was stopped in between."""

    def __init__(self) -> None:
        (self.connection, other), (sentinel, _) = connection.Pipe(), connection.Pipe()
        other.send("news")
        self.process = SimpleNamespace(sentinel=sentinel)
        self.job: list[Trial] = []
        self.views: list[TrialView] = []
        self.since = 0.0
        self.given: list[list[str]] = []

    def give(self, job: list[Trial], views: list[TrialView], options: workers.Options) -> None:
        self.job, self.views, self.before = job, views, trial_done.Before(job)
        self.given.append([one.label for one in job])
        result = outcome.begin(job[0], trial_done.folder(job[0]))
        error = {"type": "Refused", "message": "no", "stage": "setup", "traceback": ""}
        result.run_info |= {"status": "refused", "error": error, "total_seconds": 1.0}
        result.write(trial_done.folder(job[0]))

    def news(self) -> tuple[str, str]:
        return "done", ""

    def failure(self, kind: str, message: str) -> dict[str, str]:
        return {"type": kind, "message": message, "stage": "train", "traceback": ""}

    def take(self) -> list[Trial]:
        job, self.job = self.job, []
        return job


def test_no_member_of_a_pack_vanishes(compose: Compose) -> None:
    trials = [compose(*SMALL, f"method.r={r}", f"label=r{r}") for r in (2, 4, 8)]
    worker, options = _DeafWorker(), workers.Options(pack=3)
    with Display(3) as display:
        pool: Any = [worker]
        ended = list(workers._in_pool(deque([trials]), pool, workers.Budget(options), display, options))
    assert [one.label for one, _ in ended] == ["r2", "r4", "r8"]
    assert worker.given == [["r2", "r4", "r8"], ["r4"], ["r8"]]


def test_what_a_limit_takes_from_a_pack_may_run_where_another_member_did_not(compose: Compose) -> None:
    trials = [compose(*SMALL, f"method.r={r}", f"label=r{r}") for r in (2, 4, 8)]
    worker, options = _DeafWorker(), workers.Options(pack=3, limit=2)
    with Display(3) as display:
        pool: Any = [worker]
        ended = list(workers._in_pool(deque([trials]), pool, workers.Budget(options), display, options))
    assert len(ended) == 2  # as many as the limit says, though the first of them had to be given back once


def test_no_trial_starts_that_would_not_be_over_by_the_deadline() -> None:
    budget = workers.Budget(workers.Options(deadline=100.0))
    assert budget.take(1) == 1  # before the first one ends nobody knows how long it takes
    budget.spend(took(60.0))
    assert budget.take(2) == 2
    for _ in range(2):
        budget.spend(took(101.0))
    assert budget.take(1) == 0


def took(seconds: float) -> Result:
    return Result(run_info={"total_seconds": seconds}, choices={}, config={})


@pytest.mark.slow  # as what a failure left is run, in test_sweep.py, which the fast tier does
def test_what_a_limit_left_is_run_by_the_next_command(command: Command) -> None:
    words = [*UNWRITTEN, "method.r=2,4"]
    assert command(*words, "hydra.launcher.workers=0", "hydra.launcher.limit=1")[0] == 3
    assert command(*words)[0] == 0
    assert len(records()) == 2


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("hydra.launcher.workers=-1", "hydra.launcher.workers=-1: must be a whole number, at least 0"),
        ("hydra.launcher.limit=0", "hydra.launcher.limit=0: must be a whole number, at least 1"),
        ("hydra.launcher.timeout=soon", "hydra.launcher.timeout=soon: must be a time such as 90s, 30m, 2h or 1d"),
        *(
            (f"hydra.launcher.workers=0 hydra.launcher.{key}", f"hydra.launcher.{key}: only with workers")
            for key in ("timeout=90", "retries=1", "devices=[0]")
        ),
    ],
)
def test_a_wrong_placement_is_one_line(word: str, line: str, command: Command) -> None:
    code, out, err = command(*SMALL, *word.split())
    assert (code, out) == (2, "")
    assert line in err


@pytest.mark.parametrize(("text", "wanted"), [("90s", 90), ("30m", 1800), ("2h", 7200), ("1.5d", 129600), (7, 7)])
def test_times(text: str, wanted: float) -> None:
    assert checks.seconds(text, "key") == wanted


def test_rows_that_change_during_a_sweep_are_noticed(compose: Compose, questions: Path) -> None:
    words = ["dataset=file", f"dataset.path={questions}", 'dataset.prompt="{question} "', 'dataset.answer="{answer}"']
    one = config_compose.without_rows(compose(*words))
    assert config_compose.with_rows(one).rows is not None
    questions.write_text(questions.read_text().replace("plus", "and"))
    with pytest.raises(InputError, match="the files have changed since the sweep began"):
        config_compose.with_rows(one)


def test_workers_end_at_the_same_time(compose: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch) -> None:
    events = []

    class Idle:
        def __init__(self, place: str, _: int | None) -> None:
            self.place = place

        def let_go(self) -> None:
            events.append(f"{self.place} is let go")

        def end(self) -> None:
            events.append(f"{self.place} is waited for")

    monkeypatch.setattr(workers, "_Worker", Idle)
    monkeypatch.setattr(workers, "_in_pool", lambda *_: iter([]))
    monkeypatch.setattr(processes, "places", lambda *_: ["0", "1"])
    trials, options = [compose("seed=1"), compose("seed=2")], workers.Options()
    assert not list(workers.run(trials, options, workers.Budget(options), Display(2, quiet=True)))
    assert events == ["0 is let go", "1 is let go", "0 is waited for", "1 is waited for"]
