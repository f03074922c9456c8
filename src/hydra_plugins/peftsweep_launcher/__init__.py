"""What Hydra must see of the launcher; the work is in peftsweep.sweep.

Hydra executes this module at every start, also for `--help`, so it imports nothing heavy.
"""

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
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
        from peftsweep.errors import SweepFailed
        from peftsweep.workers import Options

        placement = configuration.placement(self.options)

        points = []
        for number, overrides in enumerate(job_overrides, start=initial_job_idx):
            point = self.context.config_loader.load_sweep_config(self.config, list(overrides))
            with open_dict(point):
                point.hydra.job.id, point.hydra.job.num = str(number), number
            points.append(point)
        trials = [
            configuration.trial(point, point.hydra.runtime.choices, overrides)
            for point, overrides in zip(points, job_overrides, strict=True)
        ]
        results = sweep.run(trials, Options(**placement))
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
