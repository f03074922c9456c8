"""What Hydra must see of the launchers; the work is in peftsweep.sweep.

Hydra executes this module at every start, also for `--help`, so it imports nothing heavy.
"""

from collections.abc import Callable, Sequence
from typing import Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict


class LocalLauncher(Launcher):
    """Runs the trials of a sweep in warm worker processes, after all of them have been checked."""

    def __init__(self, **options: Any) -> None:
        self.options = options

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Hydra hands over what `launch` needs."""
        self.context = hydra_context
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Compose every point, run the sweep, and answer with one JobReturn a point."""
        from peftsweep import config as configuration
        from peftsweep import sweep
        from peftsweep.workers import Options

        options = Options(**configuration.placement(self.options))
        return self._launch(job_overrides, initial_job_idx, lambda trials: sweep.run(trials, options))

    def _launch(
        self, job_overrides: Sequence[Sequence[str]], first: int, run: Callable[[list[Any]], list[Any]]
    ) -> list[JobReturn]:
        from peftsweep import config as configuration
        from peftsweep.errors import SweepFailed

        points = []
        for number, overrides in enumerate(job_overrides, start=first):
            point = self.context.config_loader.load_sweep_config(self.config, list(overrides))
            with open_dict(point):
                point.hydra.job.id, point.hydra.job.num = str(number), number
            points.append(point)
        trials = [
            configuration.trial(point, point.hydra.runtime.choices, overrides)
            for point, overrides in zip(points, job_overrides, strict=True)
        ]
        results = run(trials)
        if bad := [result for result in results if result is not None and not result.status.good]:
            # Raised here, not from JobReturn.return_value, which prints to stderr what is said already.
            raise SweepFailed(", ".join(f"{result.trial}: {result.status.name}" for result in bad))
        return [
            JobReturn(
                overrides=list(overrides),
                cfg=point,
                hydra_cfg=point.hydra,
                working_dir=str(result.folder) if result else None,
                task_name="peftsweep",
                status=JobStatus.COMPLETED,
                _return_value=result,
            )
            for point, overrides, result in zip(points, job_overrides, results, strict=True)
        ]


class EngineLauncher(LocalLauncher):
    """Gives another launcher what is missing of a sweep, after all of its trials have been checked here."""

    def __init__(self, engine: DictConfig) -> None:
        self.engine = engine

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Hydra hands over what `launch` needs, and what the other launcher does."""
        config = config.copy()
        config.hydra.launcher = self.engine
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Compose every point, have what is missing run, and answer with one JobReturn a point."""
        from peftsweep import sweep

        def place(trials: Sequence[Any]) -> list[BaseException | None]:
            jobs = self.launcher.launch([one.overrides for one in trials], initial_job_idx)
            return [one._return_value if one.status is JobStatus.FAILED else None for one in jobs]

        return self._launch(job_overrides, initial_job_idx, lambda trials: sweep.run(trials, launch=place))


class Engines(Callback):
    """Has every launcher but ours used through `EngineLauncher`, so that a sweep is the same everywhere."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Called by Hydra before it makes the launcher."""
        engine = config.hydra.launcher
        if not engine._target_.startswith(f"{__name__}."):
            target = f"{__name__}.{EngineLauncher.__name__}"
            config.hydra.launcher = {"_target_": target, "_recursive_": False, "engine": engine}
