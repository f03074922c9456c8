"""Send a running trial's numbers to an external tool, through accelerate's trackers.

A tracker is optional and not part of a trial's identity: nothing is read back from it, and its errors never reach the
trial. Its files lie in the study's folder, under ``tracker/``.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout, suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker, TrackioTracker, WandBTracker
from accelerate.utils import clear_environment, patch_environment
from filelock import FileLock

from peftsweep.errors import InputError
from peftsweep.observe.display import Observer

log = logging.getLogger(__name__)


class Tracker(Observer):
    """Sends the progress of a trial to ``observer`` and, if there is one, to a tool.

    At its first exception the tool is dropped, with one warning in the log.
    """

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._tool: GeneralTracker | None = None
        self._step = 0

    def start(self, make: Callable[[], GeneralTracker], config: Mapping[str, Any]) -> None:
        """The trial begins: ``make`` is a function of this module with its options, ``config`` is flat."""
        self._try(lambda: self._begin(make))
        self._tell(lambda tool: tool.store_init_configuration(_simple(config)))

    def stage(self, name: str) -> None:
        """A stage begins."""
        self._observer.stage(name)

    def step(self, row: dict[str, Any]) -> None:
        """A line was added to steps.jsonl."""
        self._observer.step(row)
        self._step = row["step"]
        self._tell(lambda tool: tool.log(_numbers(row), step=row["step"]))

    def expects(self, seconds: Mapping[str, float]) -> None:
        """The predicted seconds of the trial's work, by kind."""
        self._observer.expects(seconds)

    def end(self, metrics: Mapping[str, Any], status: str) -> None:
        """The trial has ended: ``metrics`` are its flat results, sent as those of its last step."""
        self._tell(lambda tool: tool.log(_numbers(metrics), step=self._step))
        self._tell(lambda tool: _tell_status(tool, status, self._step))
        self._tell(_finish)
        self._tool = None

    def _begin(self, make: Callable[[], GeneralTracker]) -> None:
        _process_state()
        self._tool = make()
        self._tool.start()

    def _tell(self, action: Callable[[GeneralTracker], None]) -> None:
        if (tool := self._tool) is not None:
            self._try(lambda: action(tool))

    def _try(self, action: Callable[[], None]) -> None:
        printed = io.StringIO()  # some tools print, which would disturb the display
        try:
            with redirect_stdout(printed), redirect_stderr(printed):
                action()
        except Exception as error:  # a tool may raise anything
            log.warning("the tracker is dropped, the trial goes on: %s: %s", type(error).__name__, error)
            tool, self._tool = self._tool, None
            with suppress(Exception):
                if tool is not None:
                    _finish(tool)  # an open run would disturb that of the next trial
        if text := printed.getvalue().strip():
            log.info("%s", text)


def check(target: str) -> None:
    """Check that the package behind a tracker's ``_target_`` is installed, without importing it.

    Raises:
        InputError: it is not.
    """
    module, _, name = target.rpartition(".")
    spec = find_spec(name) if module == __name__ else None
    # A folder of the package's name in the working directory has a spec too, but no origin.
    if module == __name__ and (spec is None or spec.origin is None):
        raise InputError(f"tracker={name}: needs the package {name}; pip install 'peftsweep[{name}]'")


# ---- the tools of conf/tracker ---------------------------------------------------------------------


def tensorboard(*, folder: Path, name: str, study: str) -> GeneralTracker:
    """Event files under ``folder/tensorboard``, a run a trial; the study is the folder's own."""
    # purge_step: the lines of an earlier run of the same trial are no longer shown.
    return TensorBoardTracker(name, folder / "tensorboard", purge_step=0)


def wandb(
    *, folder: Path, name: str, study: str, project: str = "peftsweep", entity: str | None = None, mode: str = "offline"
) -> GeneralTracker:
    """A run a trial, grouped by study, kept under ``folder/wandb``; sent as ``mode`` says (wandb.init)."""
    folder.mkdir(parents=True, exist_ok=True)  # without it wandb takes another
    os.environ.setdefault("WANDB_CACHE_DIR", str((folder / "wandb" / "cache").resolve()))  # else in the home folder
    settings = {"silent": True, "console": "off", "x_disable_stats": True}
    return WandBTracker(project, entity=entity, group=study, name=name, mode=mode, dir=str(folder), settings=settings)


def mlflow(*, folder: Path, name: str, study: str, tracking_uri: str | None = None) -> GeneralTracker:
    """An experiment a study, a run a trial, in the database ``folder/mlflow.db`` or at ``tracking_uri``."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read as it is imported
    package = import_module("mlflow")
    package.set_tracking_uri(tracking_uri or f"sqlite:///{(folder / 'mlflow.db').resolve()}")
    artifacts = (folder / "mlflow").resolve().as_uri() if tracking_uri is None else None
    # The first call creates the database's tables, which two workers must not do at the same time.
    with FileLock(folder / "mlflow.lock"), suppress(package.MlflowException):  # the study has its experiment
        package.create_experiment(study, artifact_location=artifacts)
    return MLflowTracker(experiment_name=study, run_name=name)


def trackio(*, folder: Path, name: str, study: str, space: str | None = None) -> GeneralTracker:
    """A project a study, a run a trial, in the databases of ``folder/trackio`` or on the hub's ``space``.

    Raises:
        RuntimeError: the process has used trackio with another folder, which it reads once, on import.
    """
    place = (folder / "trackio").resolve()
    with patch_environment(TRACKIO_DIR=place):
        package = import_module("trackio.utils")
    if place != package.TRACKIO_DIR:
        raise RuntimeError(f"trackio writes to {package.TRACKIO_DIR} until the process ends")
    return TrackioTracker(study, name=name, space_id=space, embed=False, auto_log_gpu=False, auto_log_cpu=False)


# ---- helpers ---------------------------------------------------------------------------------------


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The numeric values of a row without its step, which is sent separately."""
    kept = {key: value for key, value in row.items() if isinstance(value, int | float) and key != "step"}
    return {key: float(value) for key, value in kept.items()}


def _simple(config: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """Values of types that every tool accepts; None and lists as text."""
    return {key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in config.items()}


def _tell_status(tool: GeneralTracker, status: str, step: int) -> None:
    if tool.name == "mlflow":  # mlflow accepts text only as a tag
        import_module("mlflow").set_tag("status", status)
    else:
        tool.log({"status": status}, step=step)


def _finish(tool: GeneralTracker) -> None:
    if tool.name == "trackio":  # otherwise trackio finishes the run again when the process ends
        import_module("trackio").finish()
    else:
        tool.finish()


def _process_state() -> None:
    """Create the process state that accelerate's trackers need, unless there is one.

    It is that of one process on the CPU, so that no device is used. It is created without the environment, because with
    a launcher's variables (LOCAL_RANK, WORLD_SIZE) it would wait for other processes.
    """
    if not PartialState._shared_state:
        with clear_environment():
            PartialState(cpu=True)
