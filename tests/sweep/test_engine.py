"""Other launchers of Hydra's: the same trials, words and numbers, whatever happens to their jobs."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins

from peftsweep import InputError
from peftsweep.config.compose import Trial
from peftsweep.errors import Unwritable
from peftsweep.observe.display import Display, TrialView
from peftsweep.study import claims, record, store
from peftsweep.study.record import Result, Status
from peftsweep.sweep import engine, processes, workers
from peftsweep.trial import done, outcome, task
from peftsweep.trial.session import Session
from tests.conftest import SMALL, UNWRITTEN, records, scores, start, wait_for

Command = Callable[..., tuple[int, str, str]]
Compose = Callable[..., Trial]
COST = ("seconds", "tokens_per_second", "epoch_seconds", "epoch_tokens_per_second", "epoch_memory_peak")


def needs(launcher: str) -> pytest.MarkDecorator:
    package = f"hydra_plugins.hydra_{launcher}_launcher"
    return pytest.mark.skipif(find_spec(package) is None, reason=f"hydra-{launcher}-launcher is not installed")


def numbers(name: str) -> dict[str, Any]:
    return {name: (one.status, scores(one), one.train_info["final_loss"]) for name, one in records(name).items()}


def trained(process: subprocess.Popen[str], rows: int) -> int:
    """The process that trains, once it has logged so many rows."""

    def trainer() -> int | None:
        for claim in Path("multirun/default/.claims").glob("*.json"):
            folder = next(Path("multirun/default").glob(f"*-{claim.stem}"), Path())
            if len(record.read_lines(folder / "steps.jsonl")) >= rows:
                return int(json.loads(claim.read_text())["pid"])
        return None

    found = wait_for(trainer, process)
    assert found, process.communicate()
    return found


def logged(name: str) -> list[dict[str, Any]]:
    (file,) = Path("multirun", name).glob("*/steps.jsonl")
    return [{key: value for key, value in row.items() if key not in COST} for row in record.read_lines(file)]


@needs("submitit")
@pytest.mark.slow
def test_a_preempted_job_writes_a_checkpoint_and_goes_on_to_the_bit(command: Command) -> None:
    words = [*SMALL, "train.steps=30", "train.log_every=1"]
    process = start(*words, "hydra/launcher=submitit_local")
    os.kill(trained(process, 5), signal.SIGUSR2)  # as SLURM tells a job before it takes the machine away
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, ""), out
    assert command(*words, "study=undisturbed")[0] == 0
    (ended,) = records().values()
    assert 5 <= ended.run_info["resumed"] < 30
    assert logged("default") == logged("undisturbed")
    assert numbers("default") == numbers("undisturbed")
    saved = [next(Path("multirun", name).glob("*/adapter/*.safetensors")) for name in ("default", "undisturbed")]
    assert saved[0].read_bytes() == saved[1].read_bytes()


SLOW_AT_FIRST = """
import pathlib, time
from peftsweep.evaluate import perplexity

def waits(model, tokenizer, examples, *, batch_size: int = 16, max_length: int = 768):
    if hasattr(model, "peft_config") and not pathlib.Path("evaluating").exists():
        pathlib.Path("evaluating").touch()
        time.sleep(600)
    return perplexity(model, tokenizer, examples, batch_size=batch_size, max_length=max_length)
"""


@needs("submitit")
@pytest.mark.slow
def test_a_job_that_is_preempted_during_an_evaluation_goes_on(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (scratch / "slow_at_first.py").write_text(SLOW_AT_FIRST)
    monkeypatch.setenv("PYTHONPATH", f"{scratch}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    words = [*UNWRITTEN, "eval.perplexity._target_=slow_at_first.waits", "hydra/launcher=submitit_local"]
    process = start(*words)
    assert wait_for(Path("evaluating").exists, process), process.communicate()
    os.kill(trained(process, 1), signal.SIGUSR2)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, ""), out
    (ended,) = records().values()
    assert (ended.status, ended.run_info["resumed"]) == (Status.success, 4)


# ---- what a launcher may do to its jobs ------------------------------------------------------------


def left_behind(one: Trial, host: str = "") -> None:
    """A claim such as a killed process leaves."""
    dead = subprocess.Popen(["true"])
    dead.wait()
    file = done.folder(one).parent / ".claims" / f"{one.identity}.json"
    record.write_json(file, {"host": host or record.host(), "pid": dead.pid, "started": 0.0})


def record_success(one: Trial) -> Path:
    """The folder of the trial, as if it had succeeded."""
    folder = done.folder(one)
    about = outcome.run_info(one, folder) | {"status": "success", "total_seconds": 1.0}
    ended = Result(about, one.choices, one.tree)
    ended.train_info = {"trainable_parameters": 1, "total_parameters": 1, "steps": 1, "train_seconds": 1.0}
    folder.mkdir(parents=True, exist_ok=True)
    ended.write(folder)
    return folder


def run(trials: list[Trial], launch: engine.Launch) -> dict[str, Result]:
    with Display(len(trials)) as display:
        return {one.label: result for one, result in engine.run(trials, launch, display)}


@pytest.fixture
def three(compose: Compose) -> list[Trial]:
    return [compose(*UNWRITTEN, f"method.r={r}", f"label=r{r}") for r in (2, 4, 8)]


@pytest.mark.slow  # the one below gives up too, and its trials are given again
def test_a_launcher_that_gives_up_loses_no_trial(three: list[Trial]) -> None:
    given = []

    def launch(trials: Sequence[Trial]) -> list[None]:
        given.append([one.label for one in trials])
        engine.job(trials[0])
        if len(trials) > 1:
            raise RuntimeError("a worker was terminated")
        return [None]

    ended = run(three[:2], launch)
    assert [one.status for one in ended.values()] == [Status.success] * 2
    assert given == [["r2", "r4"], ["r4"]]


def test_a_trial_whose_process_dies_twice_is_recorded_and_costs_no_other(three: list[Trial]) -> None:
    given = []

    def launch(trials: Sequence[Trial]) -> list[None]:
        given.append([one.label for one in trials])
        for one in trials:
            if one.label == "r4":  # and ends those that run beside it
                for other in trials[trials.index(one) :]:
                    left_behind(other)
                raise RuntimeError("a worker was terminated")
            engine.job(one)
        return [None] * len(trials)

    ended = run(three, launch)
    assert {label: one.status.name for label, one in ended.items()} == {
        "r2": "success",
        "r4": "failed",
        "r8": "success",
    }
    assert (ended["r4"].error or {})["message"] == "a worker was terminated"
    assert given == [["r2", "r4", "r8"], ["r4"], ["r8"]]


def test_a_process_that_the_host_killed_for_its_memory_is_found_among_those_that_ended_with_it(
    three: list[Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with joblib, which ends all of its processes when one is killed."""
    killed: list[str] = []
    monkeypatch.setattr(processes, "oom_kills", lambda: len(killed))

    def launch(trials: Sequence[Trial]) -> list[None]:
        for one in trials:
            if one.label == "r4":
                killed.append(one.label)
                for other in trials[trials.index(one) :]:
                    left_behind(other)
                raise RuntimeError("a worker was terminated")
            record_success(one)
        return [None] * len(trials)

    ended = run(three, launch)
    assert {label: one.status for label, one in ended.items()} == {
        "r2": Status.success,
        "r4": Status.oom,
        "r8": Status.success,
    }
    assert (ended["r4"].error or {})["message"] == "its process was killed, as the host was out of memory"


def test_a_job_that_ends_without_a_record_is_tried_twice(three: list[Trial]) -> None:
    ended = run(three[:1], lambda trials: [None])
    assert (ended["r2"].error or {})["message"] == "its process ended without a record"


def test_the_stage_in_which_a_process_died_is_that_of_its_log(
    three: list[Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "POLL_SECONDS", 600.0)  # the record must not be seen before it is deleted

    def launch(trials: Sequence[Trial]) -> list[None]:
        engine.job(trials[0])
        (done.folder(trials[0]) / "result.json").unlink()  # as if it had been killed in its last stage
        left_behind(trials[0])
        return [None]

    (failed,) = run(three[:1], launch).values()
    assert (failed.status, (failed.error or {})["stage"]) == (Status.failed, "eval")


def test_what_a_job_could_not_even_begin_is_its_trials_failure(three: list[Trial]) -> None:
    ended = run(three[:1], lambda trials: [InputError("dataset.path=x: no such file")])
    assert (ended["r2"].error or {})["message"] == "dataset.path=x: no such file"


def test_a_disk_that_takes_no_more_ends_the_sweep(three: list[Trial]) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "multirun/default")
    with pytest.raises(Unwritable, match="No space left"):
        run(three[:1], lambda trials: [full])
    assert not records()


def test_a_launcher_that_runs_nothing_says_why(three: list[Trial]) -> None:
    def launch(trials: Sequence[Trial]) -> list[None]:
        raise RuntimeError("no sbatch here\nand more")

    with pytest.raises(InputError, match=r"^hydra/launcher: RuntimeError: no sbatch here$"):
        run(three, launch)
    assert not records()


def test_a_job_waits_until_the_claim_of_a_lost_machine_lapses(
    three: list[Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "LEASE_SECONDS", 1.0)
    left_behind(three[0], host="elsewhere")
    begun = time.monotonic()
    engine.job(three[0])
    assert time.monotonic() - begun >= 1
    assert [one.status for one in records().values()] == [Status.success]


def test_a_trial_that_others_run_is_waited_for(three: list[Trial]) -> None:
    """The job gives up, and the record comes later."""
    claim = claims.claim(Path("multirun/default"), three[0].identity)

    def launch(trials: Sequence[Trial]) -> list[None]:
        claim.__enter__()
        threading.Timer(2.0, end).start()
        return [None]

    def end() -> None:
        record_success(three[0])
        claim.__exit__(None, None, None)

    assert run(three[:1], launch)["r2"].status is Status.success


def test_a_trial_that_others_run_is_not_launched_unless_they_leave_it(three: list[Trial]) -> None:
    """As after a command was killed whose jobs run on: a second job would hold a machine to wait for the first."""
    held, given = contextlib.ExitStack(), []
    for one in three[:2]:
        held.enter_context(claims.claim(Path("multirun/default"), one.identity))

    def launch(trials: Sequence[Trial]) -> list[None]:
        given.append([one.label for one in trials])
        for one in trials:
            engine.job(one)
        held.close()  # the others end, and leave no record
        return [None] * len(trials)

    ended = run(three, launch)
    assert given == [["r8"], ["r2", "r4"]]
    assert [one.status for one in ended.values()] == [Status.success] * 3


def test_a_trial_in_the_queue_is_not_launched_unless_its_job_leaves_no_record(three: list[Trial]) -> None:
    """As after a command was killed whose jobs still wait for a machine."""
    given, asked = list[list[str]](), list[int]()

    def queued(trials: Sequence[Trial]) -> dict[str, str]:
        asked.append(len(trials))
        if len(asked) == 2:
            record_success(three[0])  # by its job
        return {one.identity: "7_0" for one in trials if one.label != "r8" and len(asked) < 3}

    def launch(trials: Sequence[Trial]) -> list[None]:
        given.append([one.label for one in trials])
        for one in trials:
            record_success(one)
        return [None] * len(trials)

    with Display(3) as display:
        ended = {one.label: result for one, result in engine.run(three, launch, display, queued)}
    assert given == [["r8"], ["r4"]]
    assert [one.status for one in ended.values()] == [Status.success] * 3


def test_what_is_read_while_others_write_it_ends_no_display(
    three: list[Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that are half written or deleted, and a record of a later version that is deleted again."""
    monkeypatch.setattr(engine, "POLL_SECONDS", 0.02)
    lost: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", lost.append)
    shown: list[int] = []
    monkeypatch.setattr(TrialView, "step", lambda self, row: shown.append(row["step"]))
    folder = done.folder(three[0])
    steps, result = folder / "steps.jsonl", folder / "result.json"

    def launch(trials: Sequence[Trial]) -> list[None]:
        folder.mkdir(parents=True)
        with claims.claim(folder.parent, three[0].identity):
            for text in ('{"step": 1}\n', '{"step": 1}\n"step": \n'):
                steps.write_text(text)
                time.sleep(0.5)
            result.write_text('{"schema_version": 999}')
            time.sleep(0.5)
            result.unlink()
            steps.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n')
            time.sleep(0.5)
        engine.job(trials[0])
        return [None]

    assert run(three[:1], launch)["r2"].status is Status.success
    assert not lost
    assert 3 in shown


def test_a_record_of_the_same_second_is_another_one(three: list[Trial]) -> None:
    """On a file system that keeps times in seconds."""
    folder = done.folder(three[0])
    folder.mkdir(parents=True)
    versions = []
    for text in ("{}", "{ }"):
        record.write_text(folder / "result.json", text)
        os.utime(folder / "result.json", (1e9, 1e9))
        versions.append(store.version(folder))
    assert versions[0] != versions[1]


FAILURE = {"type": "KeyboardInterrupt", "message": "interrupted", "stage": "train", "traceback": ""}


def ends_in_a_pool(
    one: Trial, how: str, monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[], object] = lambda: None
) -> Result:
    """The record of a trial whose worker ends so, after ``meanwhile`` has happened."""
    here = {"job": [one], "views": [TrialView(Display(1), "r2")], "before": done.Before([one])}
    taken = SimpleNamespace(**here, connection=None, process=SimpleNamespace(sentinel=None))
    taken.take = lambda: taken.__dict__.update(job=[]) or [one]
    taken.death = lambda: (Status.failed, FAILURE | {"message": "its process ended by SIGKILL"})
    taken.failure = lambda kind, message: FAILURE | {"type": kind, "message": message}
    monkeypatch.setattr("multiprocessing.connection.wait", lambda *_: [])
    monkeypatch.setattr(workers, "_ended", lambda *_: (how, ""))
    taken.since = time.monotonic()
    meanwhile()
    options = workers.Options(timeout=1.0)
    with Display(1) as display:
        ended = [*workers._in_pool(deque(), [taken], workers.Budget(options), display, options)]  # type: ignore[list-item]
    ((_, result),) = ended
    return result


def test_the_record_of_an_earlier_attempt_is_not_that_of_a_worker_that_dies_before_it_begins(
    three: list[Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    task.died(three[0], Status.cancelled, FAILURE, 1.0)
    result = ends_in_a_pool(three[0], "died", monkeypatch)
    assert (result.status, (result.error or {})["message"]) == (Status.failed, "its process ended by SIGKILL")


def test_a_trial_that_wrote_its_record_before_its_time_was_over_is_no_timeout(
    three: list[Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the GPU, or a metric's thread, keeps the process after that."""
    result = ends_in_a_pool(three[0], "timeout", monkeypatch, lambda: record_success(three[0]))
    assert result.status is Status.success
    assert ends_in_a_pool(three[1], "timeout", monkeypatch).error == FAILURE | {
        "type": "TimeoutError",
        "message": "it took longer than hydra.launcher.timeout, 1 seconds",
    }


@pytest.mark.parametrize(("how", "status"), [("died", Status.failed), ("cancelled", Status.cancelled)])
def test_a_finished_trial_whose_profile_is_cut_off_keeps_its_record(
    how: str, status: Status, compose: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = compose(*UNWRITTEN, "profiler=memory", "label=r2")
    folder = record_success(one)
    before = (folder / "result.json").read_bytes()
    assert ends_in_a_pool(one, how, monkeypatch).status is status
    assert (folder / "result.json").read_bytes() == before


def test_base_scores_that_cannot_be_made_again_cost_no_record(
    three: list[Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: Any) -> None:
        raise MemoryError

    before = (record_success(three[0]) / "result.json").read_bytes()
    monkeypatch.setattr(task, "lacks_answers_of_base", lambda *_: True)
    monkeypatch.setattr(done, "lacks_answers_of_base", lambda *_: True)
    monkeypatch.setattr(Session, "score_base_again", fails)
    result = task.run(three[0])
    assert result.status is Status.oom
    assert (done.folder(three[0]) / "result.json").read_bytes() == before


# ---- what a user sees ------------------------------------------------------------------------------


def test_a_wrong_point_stops_a_sweep_before_any_launcher_has_it(command: Command) -> None:
    code, out, err = command(*SMALL, "method.r=2,0", "hydra/launcher=basic")
    assert (code, out) == (2, "")
    assert "method.r=0: must be at least 1" in err
    assert not records()


def test_rows_that_change_before_a_job_begins_are_noticed(
    command: Command, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the hours for which a job may wait in a queue."""
    job_words = engine.job_words

    def edited(trial: Trial) -> list[str]:
        questions.write_text(questions.read_text().replace("plus", "and"))
        return job_words(trial)

    words = [*UNWRITTEN[:2], "train.batch_size=4", "dataset=file", f"dataset.path={questions}", "eval=[perplexity]"]
    words += ['dataset.prompt="{question} "', 'dataset.answer="{answer}"', "hydra/launcher=basic"]
    with monkeypatch.context() as patch:
        patch.setattr(engine, "job_words", edited)
        assert command(*words)[0] == 1
    (failed,) = records().values()
    assert (failed.error or {})["type"] == "InputError"
    assert "have changed since the sweep began; run the same command again" in (failed.error or {})["message"]
    assert command(*words)[0] == 0
    assert sorted(one.status.name for one in records().values()) == ["failed", "success"]


def test_a_dry_run_is_one_list_whatever_the_launcher(command: Command) -> None:
    code, out, _ = command(*SMALL, "method.r=2,4", "dry_run=true", "hydra/launcher=basic")
    assert (code, out.splitlines()[-1]) == (0, "2 trials, 2 new; nothing was trained (multirun/default/plan.json)")


@pytest.mark.slow
def test_a_failing_trial_is_told_in_the_same_words(command: Command) -> None:
    words = [*SMALL, "train.learning_rate=1e-3,1e30"]
    stdout = {}
    for place in ("hydra.launcher.workers=0", "hydra/launcher=basic"):
        code, out, err = command(*words, place, "force=true")
        assert (code, err) == (1, "")
        stdout[place] = [line for line in out.splitlines() if "trained 4 steps" not in line]
    assert stdout["hydra/launcher=basic"] == stdout["hydra.launcher.workers=0"]


def test_a_sweep_that_is_to_stop_at_a_failure_wants_our_launcher(command: Command) -> None:
    code, _, err = command(*SMALL, "stop_on_failure=true", "hydra/launcher=basic")
    assert (code, len(err.splitlines())) == (2, 1)
    assert err.startswith("peftsweep: stop_on_failure=true: only with hydra/launcher=local")


@pytest.mark.parametrize(
    ("launcher", "missing", "line"),
    [
        ("slurm", "submitit_slurm", "hydra/launcher=slurm: pip install 'peftsweep[slurm]'"),
        ("ray_cluster", "ray", "hydra/launcher=ray_cluster: pip install 'peftsweep[ray]'"),
        ("joblib", "joblib", "hydra/launcher=joblib: pip install 'hydra-joblib-launcher'"),
    ],
)
def test_a_launcher_that_is_not_installed_is_one_line(
    launcher: str, missing: str, line: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    Plugins.instance()  # has those that are installed tell what they have
    monkeypatch.delitem(ConfigStore.instance().repo["hydra"]["launcher"], f"{missing}.yaml", raising=False)
    assert command(*SMALL, f"hydra/launcher={launcher}") == (2, "", f"peftsweep: {line}\n")


@needs("submitit")
def test_what_slurm_is_asked_for(command: Command, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A queue that refuses everything, as with a wrong partition."""
    programs = scratch / "bin"
    programs.mkdir()
    (programs / "srun").write_text("#!/bin/sh\n")
    (programs / "sbatch").write_text(f"#!/bin/sh\ncp $1 {scratch}/sbatch_options\necho no such partition >&2\nexit 1\n")
    for program in programs.iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    code, _, err = command(*SMALL, "method.r=2,4,8", "hydra/launcher=slurm", "hydra.launcher.partition=gpu")
    assert (code, err.splitlines()[-1]) == (2, "peftsweep: hydra/launcher: FailedJobError: no such partition")
    sbatch_options = {line.removeprefix("#SBATCH ") for line in (scratch / "sbatch_options").read_text().splitlines()}
    assert {"--partition=gpu", "--time=240", "--gpus-per-node=1", "--requeue"} <= sbatch_options
    assert "--signal=USR2@120" in sbatch_options
    assert any(line.startswith("--array=0-2") for line in sbatch_options)


# ---- the launchers themselves ----------------------------------------------------------------------

EXITS = """
import os
from peftsweep.evaluate import perplexity

def exits(model, tokenizer, examples, *, batch_size: int = 16, max_length: int = 768):
    if hasattr(model, "peft_config"):
        os._exit(7)
    return perplexity(model, tokenizer, examples, batch_size=batch_size, max_length=max_length)
"""
PLACES = {
    "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
    "submitit": ["hydra/launcher=submitit_local"],
    "ray": ["hydra/launcher=ray_cluster", "hydra.launcher.ray.remote.num_gpus=0"],
}


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process calculates with one, as sums in several threads are sums in another order."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # else Ray writes a token for this machine's user


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("place", [pytest.param(name, marks=needs(name)) for name in PLACES])
def test_the_same_numbers_on_every_launcher(place: str) -> None:
    words = [*SMALL, "method=pissa,lora", "quant=none,4bit", "train.steps=10"]
    for study_name, placing in (("local", []), (place, PLACES[place])):
        out, err = (process := start(*words, f"study={study_name}", *placing)).communicate(timeout=1800)
        assert (process.returncode, err) == (0, ""), out
    assert numbers(place) == numbers("local")
    assert len(records(place)) == 4
    assert {one.meta_info["torch"]["threads"] for name in (place, "local") for one in records(name).values()} == {1}


@pytest.mark.slow
@pytest.mark.parametrize("place", [pytest.param(name, marks=needs(name)) for name in PLACES])
def test_a_process_that_dies_costs_its_trial_on_every_launcher(
    place: str, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (scratch / "exiting.py").write_text(EXITS)
    monkeypatch.setenv("PYTHONPATH", f"{scratch}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    words = [*SMALL[:3], "train.batch_size=4", "eval=[perplexity]", "eval.perplexity.samples=8", "method.r=2,4"]
    words.append("eval.perplexity._target_=exiting.exits,peftsweep.evaluation.evaluate.perplexity")
    process = start(*words, *PLACES[place])
    out, _ = process.communicate(timeout=1800)
    assert process.returncode == 1, out
    assert out.splitlines()[-1] == "4 trials: 2 success, 2 failed  (multirun/default)"
    for one in records().values():
        exits = "exits" in one.config["eval"]["perplexity"]["_target_"]
        assert one.status is (Status.failed if exits else Status.success)


@pytest.mark.slow
@needs("ray")
@pytest.mark.usefixtures("one_thread")
def test_a_ray_cluster_that_loses_a_machine_ends_with_the_whole_table() -> None:
    from ray.cluster_utils import Cluster

    words = [*SMALL, "method.r=1,2,3,4", "train.steps=40", "train.log_every=1", "train.checkpoint_every=10"]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        other = cluster.add_node(num_cpus=1)
        process = start(*words, *PLACES["ray"], f"hydra.launcher.ray.init.address={cluster.address}")
        while not (victim := next((pid for pid in training() if parent(pid) == raylet(other)), None)):
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        cluster.remove_node(other, allow_graceful=False)
        out, err = process.communicate(timeout=1800)
        assert (process.returncode, err) == (0, ""), out
    finally:
        cluster.shutdown()
    assert not psutil.pid_exists(victim)
    undisturbed = start(*words, "study=undisturbed")
    assert undisturbed.wait(1800) == 0
    assert numbers("default") == numbers("undisturbed")
    assert len(records()) == 4
    assert max(one.run_info["resumed"] for one in records().values()) >= 10  # the lost one went on


RAY = [*SMALL, "method.r=2,4", "train.steps=400", "train.log_every=10", "train.checkpoint_every=20", *PLACES["ray"]]
# Runs the command, and cancels the task of the first trial when it has written a checkpoint.
CANCELS = """
import threading, time
from pathlib import Path
import ray
from ray.remote_function import RemoteFunction

tasks, submit = [], RemoteFunction._remote

def submitted(*args, **options):
    tasks.append(submit(*args, **options))
    return tasks[-1]

def cancel():
    while not list(Path("multirun/default").glob("*-r2-*/checkpoints/*.pt")):
        time.sleep(0.05)
    ray.cancel(tasks[0])

RemoteFunction._remote = submitted
threading.Thread(target=cancel, daemon=True).start()
from peftsweep import cli
cli.main()
"""


@pytest.mark.slow
@needs("ray")
@pytest.mark.usefixtures("one_thread")
def test_a_worker_of_ray_that_is_killed_costs_that_process() -> None:
    process = start(*RAY)
    found = wait_for(training, process)
    assert found, process.communicate()
    os.kill(found[0], signal.SIGKILL)
    out, _ = process.communicate(timeout=1800)
    assert process.returncode == 0, out
    assert sorted(one.status.name for one in records().values()) == ["success", "success"]
    assert max(one.run_info["resumed"] for one in records().values()) >= 20


@pytest.mark.slow
@needs("ray")
@pytest.mark.usefixtures("one_thread")
def test_a_task_of_ray_that_is_cancelled_is_recorded_and_the_others_end() -> None:
    process = start(*RAY, door=CANCELS)
    out, err = process.communicate(timeout=1800)
    ended = {one.config["method"]["r"]: one.status.name for one in records().values()}
    assert ended == {2: "cancelled", 4: "success"}, (out, err)
    assert process.returncode != 0
    assert "2 trials: 1 success, 1 cancelled" in out.splitlines()[-1]
    again = start(*RAY)
    out, _ = again.communicate(timeout=1800)
    assert (again.returncode, len(records())) == (0, 2), out
    assert max(one.run_info["resumed"] for one in records().values()) >= 20


@pytest.mark.slow
@needs("ray")
@pytest.mark.usefixtures("one_thread")
def test_a_parent_of_ray_that_is_killed_is_gone_on_from_by_the_same_command() -> None:
    process = start(*RAY)
    found = wait_for(training, process)
    assert found, process.communicate()
    process.kill()
    process.communicate()
    again = start(*RAY)
    out, _ = again.communicate(timeout=1800)
    assert again.returncode == 0, out
    assert sorted(one.status.name for one in records().values()) == ["success", "success"]
    assert max(one.run_info["resumed"] for one in records().values()) >= 20
    assert not psutil.pid_exists(found[0])


def training() -> list[int]:
    """The processes of trials that have written a checkpoint."""
    found = []
    for claim in Path("multirun/default/.claims").glob("*.json"):
        folder = next(Path("multirun/default").glob(f"*-{claim.stem}"), Path("none"))
        with contextlib.suppress(OSError, ValueError):  # it has just ended
            found += [int(json.loads(claim.read_text())["pid"])] if list(folder.glob("checkpoints/*.pt")) else []
    return found


def parent(pid: int) -> int | None:
    with contextlib.suppress(psutil.NoSuchProcess):
        return int(psutil.Process(pid).ppid())
    return None


def raylet(node: Any) -> int:
    """The process of a Ray node that starts its workers."""
    return int(node.all_processes["raylet"][0].process.pid)
