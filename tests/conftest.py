"""Shared fixtures: a scratch folder to run in, and trials small enough for a test."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
from filelock import FileLock

from peftsweep import cli
from peftsweep.config.compose import Trial
from peftsweep.config.compose import trial as make_trial
from peftsweep.study import record
from peftsweep.study.record import Result
from tests.composing import fingerprint, keep_compositions

if TYPE_CHECKING:
    import torch  # imported where it is used: the process of pytest-xdist that only deals out tests goes without it

SMALL = ["train.steps=4", "train.log_every=2", "dataset.samples=64", "eval.tiny_math.samples=8"]
SMALL += ["eval.perplexity.samples=8", "train.batch_size=4", "device=cpu"]
SMALL += ["adapter.check=false"]  # a sixth of such a trial; tests of what is saved say adapter.check=true
# For tests that count trials or end them: without the evaluation that generates text, a fifth of such a trial, and with
# one adapted projection a layer in place of seven, a quarter of it.
ALL_TARGETS = [*(word for word in SMALL if "tiny_math" not in word), "eval=[perplexity]"]
UNWRITTEN = [*ALL_TARGETS, "targets=q"]
Found = TypeVar("Found")


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test runs in a folder of its own, offline."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


@pytest.fixture(scope="session")
def compositions(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what Hydra composes of conf/ as it is now, which processes share and later runs find again."""
    cache = getattr(pytestconfig, "cache", None)  # not there with -p no:cacheprovider
    kept = cache.mkdir("compositions") if cache else tmp_path_factory.mktemp("compositions")
    folder = kept / fingerprint()
    for other in folder.parent.glob("*"):
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(autouse=True)
def without_folders_of_earlier_tests(scratch: Path) -> Iterator[None]:
    """Each command adds the working directory to where Python looks for modules: after the test it is gone again.

    Otherwise each import, and each worker process at its start, looks through the folders of hundreds of tests.
    """
    yield
    sys.path[:] = [folder for folder in sys.path if not Path(folder).is_relative_to(scratch)]


@pytest.fixture(scope="session", autouse=True)
def composing(compositions: Path) -> Iterator[pytest.MonkeyPatch]:
    """Hydra composes a choice of options once, see tests/composing.py."""
    with pytest.MonkeyPatch.context() as patch:
        keep_compositions(patch, compositions)
        yield patch


@pytest.fixture(scope="session", autouse=True)
def without_waiting_for_the_disk() -> Iterator[None]:
    """Each record of a trial is written through to the disk, which no test can tell."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def without_model_cards() -> Iterator[None]:
    """PEFT renders a README.md beside each adapter, which no test reads: a twentieth of a small trial."""
    import peft

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peft.PeftModel, "create_or_update_model_card", lambda *_: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def without_stacks_of_seeds() -> Iterator[None]:
    """No stack is kept of a call that sets a seed, as torch does for devices that are not used yet: 2% of the time."""
    import torch

    with pytest.MonkeyPatch.context() as patch:
        for device in () if torch.cuda.is_available() else (torch.cuda, torch.xpu, torch.mtia):
            patch.setattr(device, "manual_seed_all", lambda _: None, raising=False)
        yield


@pytest.fixture(autouse=True)
def without_times(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The speed of this machine is measured by no test but those that are about it (tests/forecast).

    A trial or a command predicts memory, by tracing a step, only there and where ``memory_foreseen`` is asked for.
    """
    if "forecast" in request.path.parts:
        return
    from peftsweep.forecast import timing
    from peftsweep.forecast.duration import Estimate
    from peftsweep.trial import foreseen

    nothing = Estimate(unknown={"train": "not asked for"})
    monkeypatch.setattr(timing.Timing, "estimate", lambda self, one: nothing)
    monkeypatch.setattr(timing.Timing, "measure", lambda self: None)
    monkeypatch.setattr(foreseen, "predict_time", lambda *_: {})
    monkeypatch.setattr(foreseen, "flops_of_packed", lambda *_: {})
    if "memory_foreseen" not in request.fixturenames:
        monkeypatch.setattr(foreseen, "memory", lambda *_: None)


@pytest.fixture
def memory_foreseen() -> None:
    """Have the trials and commands of this test predict memory, see ``without_times``."""


@pytest.fixture(autouse=True)
def with_coarse_figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures have a sixth of their dots an inch, as most of the time of drawing goes into these."""
    if "figures_as_published" not in request.fixturenames:
        from peftsweep.analysis.figures import plot

        monkeypatch.setitem(plot.STYLE, "savefig.dpi", 50)


@pytest.fixture
def figures_as_published() -> None:
    """Have the figures of this test the dots that users get, see ``with_coarse_figures``."""


def unpredicted(*_: Any, **__: Any) -> None:
    """In place of ``forecast.prediction``."""


def pytest_configure(config: pytest.Config) -> None:
    """Tests mean the CPU, also where there is a GPU; those of the GPU are chosen by their mark (`make gpu`)."""
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    gc.disable()  # until all is imported, none of which is garbage: a quarter of the time of collecting tests


def pytest_collection_finish() -> None:
    """Let garbage be collected from now on, but for what was imported."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    """Have pytest, which collects garbage five times when it ends, look through nothing that is still alive."""
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def without_old_objects() -> None:
    """What is alive before the tests of a file, such as all modules, no garbage collection of theirs looks through.

    Each trial collects garbage. Without this it takes more time with each file that has left objects behind.
    """
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests of a GPU are skipped where there is none."""
    import torch

    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs CUDA")


@pytest.fixture
def compose(request: pytest.FixtureRequest) -> Callable[..., Trial]:
    """Words of the command line -> a checked trial, on the CPU unless they say otherwise or the test is a GPU's."""
    on_cpu = [] if request.node.get_closest_marker("gpu") else ["device=cpu"]

    def build(*overrides: str) -> Trial:
        overrides = (*on_cpu, *overrides)
        cfg = cli.compose(list(overrides))
        return make_trial(cfg, cfg.hydra.runtime.choices, overrides)

    return build


@pytest.fixture
def run_small() -> Callable[..., Result]:
    """Run one small trial on the embedded model."""
    return lambda *overrides: cli.run_one([*SMALL, *overrides])


@pytest.fixture
def run_unwritten() -> Callable[..., Result]:
    """Run one small trial on the embedded model that generates no text: half the time of ``run_small``.

    Unless the words choose a method or targets, it adapts one projection a layer.
    """

    def run(*overrides: str) -> Result:
        chosen = any(word.startswith(("method=", "targets=")) for word in overrides)
        return cli.run_one([*(ALL_TARGETS if chosen else UNWRITTEN), *overrides])

    return run


@pytest.fixture(scope="session")
def trained_studies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which ``trained`` runs its trials, the same in all processes of this run of pytest."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    (folder / "trained").mkdir(exist_ok=True)
    return folder / "trained"


@pytest.fixture
def trained(trained_studies: Path) -> Callable[..., Result]:
    """The record of one small trial and its study, run once for all tests and copied into this one's folder.

    For tests that need a trial and are not about running it.
    """

    def of(*overrides: str) -> Result:
        folder = trained_studies / hashlib.sha256(repr(overrides).encode()).hexdigest()[:16]
        with FileLock(f"{folder}.lock"):  # where another process runs it, this one waits for it
            if not folder.exists():
                begun = folder.with_suffix(".begun")
                shutil.rmtree(begun, ignore_errors=True)  # of a test that was interrupted
                begun.mkdir()
                with contextlib.chdir(begun):
                    cli.run_one([*SMALL, *overrides])
                begun.rename(folder)
        shutil.copytree(folder / "multirun", "multirun", dirs_exist_ok=True)
        (file,) = folder.glob("multirun/*/*/result.json")
        return Result.read(file.parent.relative_to(folder))

    return of


@pytest.fixture
def command(
    request: pytest.FixtureRequest, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Run `peftsweep` with the given words: exit code, stdout, stderr. Its plans are ``without_times`` too."""
    from peftsweep.forecast import forecast

    foreseen = "forecast" in request.path.parts or "memory_foreseen" in request.fixturenames

    def run(*words: str) -> tuple[int, str, str]:
        if not any("hydra/launcher" in word or "hydra.launcher" in word for word in words):
            words = (*words, "hydra.launcher.workers=0")  # in this process: no imports, and mocks are seen
        if not any("device=" in word for word in words):
            words = (*words, "device=cpu")
        monkeypatch.setattr("sys.argv", ["peftsweep", *words])
        capfd.readouterr()
        with monkeypatch.context() as patch:
            if not foreseen:
                patch.setattr(forecast, "prediction", unpredicted)
            with pytest.raises(SystemExit) as ended:
                cli.main()
        out, err = capfd.readouterr()
        return int(ended.value.code or 0), out, err

    return run


@pytest.fixture
def fails_at_rank(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Have every training of this rank, in this process, raise an error that says ``broken``."""
    from peftsweep.training import loop

    real = loop.train

    def arrange(rank: int) -> None:
        def broken(model: Any, *args: Any, **options: Any) -> Any:
            if model.peft_config["default"].r == rank:
                raise RuntimeError("broken")
            return real(model, *args, **options)

        monkeypatch.setattr(loop, "train", broken)

    return arrange


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """A local file of 40 rows with the columns question and answer."""
    rows = [{"question": f"What is {n} plus {n}?", "answer": f"It is {2 * n}.\n#### {2 * n}"} for n in range(40)]
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def records(name: str = "default") -> dict[str, Result]:
    """The study's records, by the names of their trials."""
    found = [Result.read(file.parent) for file in Path("multirun", name).glob("*/result.json")]
    return {result.trial: result for result in found}


def scores(result: Result) -> dict[str, dict[str, object]]:
    """What the evaluations found, without what they took."""
    return {
        name: {key: value for key, value in found.items() if isinstance(value, dict)}
        for name, found in result.eval_info.items()
    }


# The same weights after training with sums in another order. An optimizer that divides by the gradient's size moves a
# weight whose gradient is all rounding by a whole learning rate, so that single weights can be further apart.
SAME_WEIGHTS = 5e-5


def apart(weights: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor]) -> float:
    """How far the weights are from the others, relative to the norm of all of these."""
    import torch

    assert weights.keys() == others.keys()
    one, other = (torch.cat([tensors[name].detach().flatten() for name in others]) for tensors in (weights, others))
    return float((one - other).norm() / other.norm())


SAME = 1e-5  # relative: of numbers that rounding alone may change, in the few steps of a test


def check_row(row: dict[str, Any], other: dict[str, Any]) -> None:
    """The same texts and counts, and the same numbers within rounding."""
    assert row.keys() == other.keys()
    for key, value in other.items():
        assert row[key] == (pytest.approx(value, rel=SAME) if isinstance(value, float) else value)


def check_scores(one: Result, other: Result) -> None:
    """The same evaluations, each score within a standard error of the other's."""
    found, expected = record.flat(scores(one)), record.flat(scores(other))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if key.endswith(".value"):
            stderr = expected[key.removesuffix("value") + "stderr"] or 0.0
            assert abs(found[key] - value) <= max(stderr, SAME * abs(value))


def start(
    *words: str, door: str = "from peftsweep import cli; cli.main()", terminal: bool = False
) -> subprocess.Popen[str]:
    """`peftsweep` with the given words, in a process of its own, which hears Ctrl-C even if this one does not.

    As in a ``terminal`` it leads a group, so that one signal can be sent to it and all that it has started.
    """
    return subprocess.Popen(
        [sys.executable, "-c", door, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ,
        start_new_session=terminal,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


def wait_for(what: Callable[[], Found], process: subprocess.Popen[str]) -> Found | None:
    """What the process brings about, None if it ends without; a start takes a minute where many want the cores."""
    end = time.monotonic() + 240
    while time.monotonic() < end:
        over = process.poll() is not None
        if found := what():
            return found
        if over:
            return None
        time.sleep(0.05)
    raise AssertionError("waited in vain")
