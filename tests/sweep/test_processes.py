"""Where worker processes run and how they start, on a host with a GPU too: one that a child process is made to see."""

from __future__ import annotations

import errno
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import psutil
import pytest
import torch

from peftsweep import InputError
from peftsweep.config.compose import Trial
from peftsweep.forecast import forecast
from peftsweep.sweep import processes
from tests.conftest import SMALL, records, wait_for
from tests.test_layers import imports

Command = Callable[..., tuple[int, str, str]]

# Python imports it at its start. It has torch say that there are GPUs, and CUDA behave as it does where they are:
# whatever initialises it is written to a log, and raises an error in a process that was forked after that.
GPU_HOST = """
import builtins, os, sys

initialised_by = None

def log(line):
    with open(os.environ["GPU_LOG"], "a") as file:
        file.write(f"{line}\\n")

def initialises(name, answer):
    def called(*_, **__):
        global initialised_by
        if initialised_by not in (None, os.getpid()):
            raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")
        if initialised_by is None:
            initialised_by = os.getpid()
            log(f"{os.getpid()} initialises CUDA: {name}, sees {os.environ.get('CUDA_VISIBLE_DEVICES')}")
        return answer
    return called

class Properties:
    total_memory, name, major, minor = 2**35, "fake", 9, 0

def patch(torch):
    torch._C._cuda_isInBadFork = lambda: initialised_by not in (None, os.getpid())
    torch._C._cuda_getCurrentRawStream = lambda *_: 0
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 2
    answers = {
        "init": None, "_lazy_init": None, "current_device": 0, "get_device_capability": (9, 0),
        "get_device_name": "fake", "get_device_properties": Properties(), "mem_get_info": (2**35, 2**35),
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, initialises(name, answer))

plain = builtins.__import__

def watched(name, *rest, **options):
    module = plain(name, *rest, **options)
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "compile") and not hasattr(torch, "gpu_host"):
        torch.gpu_host = True
        patch(torch)
        if os.environ.get("GPU_EAGER"):
            torch.cuda.init()
    return module

builtins.__import__ = watched
os.register_at_fork(before=lambda: log("forks") if initialised_by else None)
"""
# On a real GPU host the tests marked gpu do it without pretending.
pretended = pytest.mark.skipif(torch.version.cuda is not None, reason="pretends a GPU to a torch that has no CUDA")
TINY = [word for word in SMALL if "tiny_math" not in word and "device" not in word] + [
    "eval=[perplexity]",
    "method.r=2,4",
]


def on_gpu_host(scratch: Path, *words: str, **environment: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """`peftsweep` with these words on a host that seems to have two GPUs, and what initialised CUDA there."""
    (scratch / "site").mkdir(exist_ok=True)
    (scratch / "site" / "sitecustomize.py").write_text(GPU_HOST)
    log = scratch / "gpu.log"
    log.write_text("")
    path = os.pathsep.join(filter(None, [str(scratch / "site"), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", "from peftsweep import cli; cli.main()", *words],
        env=os.environ | environment | {"PYTHONPATH": path, "GPU_LOG": str(log)},
        capture_output=True,
        text=True,
    )
    return done, log.read_text().splitlines()


@pretended
@pytest.mark.slow  # starts a command
def test_workers_are_forked_before_cuda_is_initialised(scratch: Path) -> None:
    done, lines = on_gpu_host(scratch, *TINY, "device=cpu")
    assert "forks" not in lines
    assert {one.status.name for one in records().values()} == {"success"}, done.stdout
    assert done.returncode == 0


# What workers are forked from, with a program in place of a sweep's that says what it and its imports see.
WORKERS = """
from peftsweep.sweep import processes

processes.PRELOAD = "preloaded"
processes.begin_to_import()
for place in ("0", "1", ""):
    worker = processes.start(place, 2)
    print(worker.connection.recv(), flush=True)
    worker.end()
"""
SEES = """
import os, sys

seen = os.environ.get("CUDA_VISIBLE_DEVICES"), "torch" in sys.modules

class workers:
    def serve(channel, threads):
        channel.send((*seen, threads))
"""


def test_a_worker_has_its_gpu_named_before_it_imports_what_could_look_at_one(scratch: Path) -> None:
    (scratch / "sees.py").write_text(SEES)
    (scratch / "preloaded.py").write_text("from peftsweep.sweep import processes\n\nprocesses.PROGRAM = 'sees'\n")
    path = os.pathsep.join(filter(None, [str(scratch), os.environ.get("PYTHONPATH")]))
    words = [sys.executable, "-c", WORKERS]
    done = subprocess.run(words, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["('0', False, 2)", "('1', False, 2)", "('', False, 2)"], done.stderr


@pretended
@pytest.mark.slow  # starts a command whose two workers import all; those of the test above import nothing
def test_a_worker_names_its_gpu_before_anything_looks_at_one(scratch: Path) -> None:
    done, lines = on_gpu_host(scratch, *TINY)
    assert "forks" not in lines
    errors = {(one.error or {})["message"] for one in records().values()}
    assert len(records()) == 2, done.stderr
    assert all("compiled with" in error for error in errors), errors  # on it, as far as this torch goes
    seen = {re.sub(r"^\d+ initialises CUDA: \w+, ", "", line) for line in lines}
    assert {"sees 0", "sees 1"} <= seen


@pytest.mark.gpu
@pytest.mark.parametrize("workers", ["null", "2"])  # one a GPU, or two that share it
def test_the_local_launcher_trains_on_a_gpu(workers: str, scratch: Path) -> None:
    words = [*TINY, "quant=4bit", f"hydra.launcher.workers={workers}"]
    command = [sys.executable, "-c", "from peftsweep import cli; cli.main()", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert {one.status.name for one in records().values()} == {"success"}, done.stdout + done.stderr
    assert all(one.memory["train"]["allocated_peak"] > 0 for one in records().values())


@pretended
@pytest.mark.slow
def test_where_an_import_initialises_cuda_all_the_same_workers_are_spawned(scratch: Path) -> None:
    done, _ = on_gpu_host(scratch, *TINY, "device=cpu", GPU_EAGER="1")
    assert {one.status.name for one in records().values()} == {"success"}, done.stdout
    assert done.returncode == 0


@pretended
@pytest.mark.slow
@pytest.mark.parametrize(
    "place",
    ["hydra.launcher.workers=0", "hydra/launcher=basic", "hydra/launcher=joblib", "hydra/launcher=submitit_local"],
)
def test_every_launcher_runs_on_the_cpu_of_a_gpu_host(place: str, scratch: Path) -> None:
    done, lines = on_gpu_host(scratch, *TINY, "device=cpu", place)
    assert "forks" not in lines
    assert {one.status.name for one in records().values()} == {"success"}, done.stdout
    assert done.returncode == 0


def test_devices_are_dealt_out_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert processes.places(None, None, ["auto"]) == ["0", "1"]
    assert processes.places(3, None, ["cuda"]) == ["0", "1", "0"]
    assert processes.places(None, [1], ["auto"]) == ["1"]
    assert processes.places(None, None, ["cpu"]) == [processes.CPU]
    assert processes.places(3, None, ["cpu"]) == [processes.CPU] * 3
    assert processes.places(None, None, ["cpu", "auto"]) == ["0", "1"]
    assert processes.places(None, None, ["cuda:1"]) == [None]  # of all that are visible
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert processes.places(None, None, ["auto"]) == ["4", "7"]
    assert processes.places(None, ["1"], ["auto"]) == ["7"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert processes.places(2, None, ["auto"]) == [processes.CPU] * 2


@pytest.mark.parametrize(
    ("count", "devices", "requested", "line"),
    [
        (1, [9], "auto", "no CUDA device 9; there are: 0"),
        (2, [0, "x"], "auto", "no CUDA device x; there are: 0, 1"),
        (0, [0], "auto", "no CUDA device 0; there are: none"),
        (2, [0], "cpu", "no CUDA device 0; there are: none; device=cpu uses none"),
    ],
)
def test_a_device_that_is_not_there_is_refused(
    count: int, devices: list[object], requested: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    with pytest.raises(InputError, match=re.escape(f"hydra.launcher.devices: {line}")):
        processes.places(None, devices, [requested])


# ---- what a trial has started ends with its worker ---------------------------------------------------

GUARDED = """
import ctypes, os, subprocess, sys
from multiprocessing import Pipe
from peftsweep.sweep import processes

(held, leash), (channel, other) = Pipe(duplex=False), Pipe()
if (guard := os.fork()) == 0:
    leash.close()
    os.setpgid(0, 0)
    processes._go_on_guarded(channel, held)
    child = ["sleep", sys.argv[1]]
    subprocess.Popen(child)
    subprocess.Popen(child, start_new_session=True)
    subprocess.run(["sh", "-c", f"setsid sleep {sys.argv[1]} &"])  # whose parent has ended
    print("started", flush=True)
    exec(sys.argv[2])
held.close()
if sys.argv[3] == "lets go":
    sys.stdin.readline()
    leash.close()
print(os.waitstatus_to_exitcode(os.waitpid(guard, 0)[1]), flush=True)
"""
HOLDS_GIL = "ctypes.PyDLL(None).sleep(600)"


def left(seconds: str) -> list[psutil.Process]:
    return [one for one in psutil.process_iter(["cmdline"]) if one.info["cmdline"] == ["sleep", seconds]]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="orphans are found on Linux only")
@pytest.mark.parametrize(
    ("does", "how", "code"),
    [
        ("os._exit(7)", "waits", 7),
        ("os.abort()", "waits", -signal.SIGABRT),
        ("os.kill(os.getpid(), 9)", "waits", -signal.SIGKILL),
        (HOLDS_GIL, "lets go", -signal.SIGKILL),
        (HOLDS_GIL, "is killed", None),
    ],
)
def test_all_that_a_worker_started_ends_with_it(does: str, how: str, code: int | None) -> None:
    """Also what has left its group and session, also if the worker can do nothing about it any more."""
    seconds = f"600.{uuid.uuid4().int % 10**9:09}"
    words = [sys.executable, "-c", GUARDED, seconds, does, how]
    pipe = subprocess.PIPE
    command = subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True, start_new_session=True)
    assert command.stdin
    assert command.stdout
    assert command.stdout.readline() == "started\n"
    if how == "lets go":
        assert wait_for(lambda: len(left(seconds)) == 3, command)
        command.stdin.write("\n")
        command.stdin.flush()
    if how == "is killed":
        os.killpg(command.pid, signal.SIGKILL)
    out, _ = command.communicate(timeout=60)
    assert out.strip() == ("" if code is None else str(code))
    end = time.monotonic() + 20
    while left(seconds) and time.monotonic() < end:
        time.sleep(0.05)
    assert not left(seconds)


# A program of workers that imports nothing: it answers each message with the worker's own number.
ECHO = """
import os, time
from peftsweep.sweep import processes
processes.PROGRAM = "echo"
class workers:
    def serve(channel, threads):
        while True:
            message = channel.recv()
            if message == "hold":
                time.sleep(600)
            channel.send(os.getpid())
"""
WITH_WORKER = """
import multiprocessing, os, signal, sys, time
from peftsweep.sweep import processes
if __name__ == "__main__":
    multiprocessing.get_context("forkserver").set_forkserver_preload(["echo"])
    processes._have_temporary_folder()
    child = processes.start(processes.CPU, 1)
"""


def with_worker(scratch: Path, *lines: str) -> subprocess.CompletedProcess[str]:
    """Run ``lines`` in a process that has a worker, ``child``, which nothing ends but the exit of the process."""
    (scratch / "echo.py").write_text(ECHO)
    (scratch / "command.py").write_text(WITH_WORKER + "".join(f"    {line}\n" for line in lines))
    path = os.pathsep.join(filter(None, [str(scratch), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "command.py"]
    return subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False, timeout=120
    )


@pytest.mark.parametrize("message", ["idle", "hold"])
def test_an_exit_in_the_middle_of_the_end_waits_for_no_worker(message: str, scratch: Path) -> None:
    """As after a third Ctrl-C: the interpreter joins workers, and their guards ignore the SIGTERM that it sends."""
    done = with_worker(scratch, f"child.connection.send({message!r})", "print(child.pid, flush=True)", "time.sleep(1)")
    assert (done.returncode, done.stderr) == (0, "")
    assert not psutil.pid_exists(int(done.stdout))


def test_a_worker_that_was_killed_while_idle_takes_no_trial(scratch: Path) -> None:
    """Its guard may live on, as here where it is stopped."""
    done = with_worker(
        scratch,
        "assert child.takes('whose')",
        "assert child.connection.recv() == child.pid",
        "os.kill(child.process.pid, signal.SIGSTOP)",
        "os.kill(child.pid, signal.SIGKILL)",
        "time.sleep(0.5)",
        "print(child.process.is_alive(), child.takes('whose'), child.takes('whose'))",
        "os.kill(child.process.pid, signal.SIGCONT)",
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "True False False\n", "")


def test_a_worker_starts_though_the_socket_of_the_fork_server_was_deleted(scratch: Path) -> None:
    """As by a cleaner of /tmp, during a sweep of weeks."""
    done = with_worker(
        scratch,
        "import shutil; from multiprocessing import util; shutil.rmtree(util.get_temp_dir())",
        "print(processes.start(processes.CPU, 1).process._start_method)",
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "spawn\n", "")


def test_the_socket_of_workers_has_a_short_path_where_temporary_files_have_a_long_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (long := tmp_path / ("x" * 100)).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    own = vars(multiprocessing.current_process())["_config"]
    monkeypatch.setitem(own, "tempdir", None)
    processes._have_temporary_folder()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{own['tempdir']}/listener-12345678")


def test_where_no_socket_can_be_made_workers_are_spawned(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> None:
        raise OSError("AF_UNIX path too long")

    monkeypatch.setattr(processes, "_method", "forkserver")
    monkeypatch.setattr(forkserver, "ensure_running", refused)
    monkeypatch.setattr(resource_tracker, "ensure_running", lambda: None)
    processes.begin_to_import()
    assert processes._method == "spawn"


@pytest.mark.parametrize("error", [OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)), EOFError()])
def test_where_no_process_can_be_forked_one_line_says_so(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise error

    monkeypatch.setattr(ForkServerProcess, "start", refused)
    with pytest.raises(
        InputError, match=r"^hydra\.launcher\.workers: a worker process cannot be started \(.+\); ulimit"
    ):
        processes.start(processes.CPU, 1)


HAS_SOCKETS = """
import os, sys, tempfile
from multiprocessing import util
from peftsweep.sweep import processes
processes._have_temporary_folder()
log = tempfile.mkstemp(prefix=processes.LOG + processes.owner.tag() + "-")[1]
print(util.get_temp_dir(), log, flush=True)
if sys.argv[1] == "killed":
    os._exit(9)
os.unlink(log)
"""


def test_temporary_files_of_a_killed_command_are_deleted_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    (tmp_path / "pymp-abcdefgh").mkdir()  # of somebody else

    def run(how: str) -> list[Path]:
        done = subprocess.run([sys.executable, "-c", HAS_SOCKETS, how], capture_output=True, text=True, check=False)
        return [Path(path) for path in done.stdout.split()]

    left = run("killed")
    assert [path.exists() for path in left] == [True, True]
    run("ends")
    assert [path.name for path in tmp_path.iterdir()] == ["pymp-abcdefgh"]


def test_a_worker_leaves_sigterm_to_its_parent_and_its_children_do_not() -> None:
    script = """
import os, signal, subprocess, time
from multiprocessing import Pipe
from peftsweep.sweep import processes

class Told(Exception): pass
processes._go_on_guarded = lambda *_: None
processes._cuda_lost = lambda: True
(mine, theirs), held = Pipe(), Pipe(duplex=False)[0]
processes._work(theirs, held, os.devnull, None, None)
os.kill(os.getpid(), signal.SIGTERM)
assert mine.recv() == (processes.CUDA_LOST, os.getpid())
if (forked := os.fork()) == 0:
    time.sleep(60)
started = subprocess.Popen(["sleep", "60"])
time.sleep(0.5)
for pid in (forked, started.pid):
    os.kill(pid, signal.SIGTERM)
    assert os.waitpid(pid, 0)[1] == signal.SIGTERM
os._exit(5)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 5, done.stderr


# ---- systems other than Linux ----------------------------------------------------------------------


def test_windows_is_refused_in_one_line(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "win32")
    code, out, err = command(*TINY)
    assert (code, out) == (2, "")
    assert err == "peftsweep: Windows is not supported: workers need Unix processes and signals; use WSL\n"


def test_an_untested_system_is_named_once(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    code, _, err = command("method.r=2,4", "dry_run=true")
    assert code == 0
    assert err.count("not tested on darwin, only on Linux") == 1


def test_no_module_of_ours_imports_what_only_unix_has() -> None:
    only_unix = {"fcntl", "resource", "termios", "pwd", "grp", "posix"}
    for file in Path(processes.__file__).parents[1].rglob("*.py"):
        if any(name in file.read_text() for name in only_unix):  # parsing all takes seconds
            assert not imports(file) & only_unix, file


def test_devices_of_other_makers_are_refused(compose: Callable[..., Trial]) -> None:
    with pytest.raises(InputError, match=re.escape("device=mps: must be auto, cpu, cuda, or cuda:1")):
        forecast.check(compose("device=mps"))
