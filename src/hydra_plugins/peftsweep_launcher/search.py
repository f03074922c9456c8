"""What Hydra must see of the search by Optuna; the work is in peftsweep.search.

Hydra executes this module at every start, so it imports nothing heavy.
"""

from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


class OptunaSweeper(Sweeper):
    """Has Optuna 4 or 5 choose the points, by any of its samplers, and end trials early by any of its pruners."""

    def __init__(self, **options: Any) -> None:
        self.options = options

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Hydra hands over what `sweep` needs."""
        self.hydra_context, self.config = hydra_context, config
        self.launcher: Any = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Sequence[JobReturn]:
        """Search over what the words give several values; a failure among the trials is raised at the end."""
        from peftsweep.errors import NotRun
        from peftsweep.search import search, space

        search.check_installed()
        assert self.config is not None
        assert self.hydra_context is not None
        given = {key: _plain(value) for key, value in self.options.items()}
        words = [*(f"{key}={value}" for key, value in (given.get("params") or {}).items()), *arguments]
        parsed = OverridesParser.create(config_loader=self.hydra_context.config_loader).parse_overrides(words)
        dimensions, fixed = space.split(words, parsed)
        ends = [[*fixed, *point] for point in space.points(dimensions)]
        # Wrong values are reported before the search begins; so are values that are wrong only with pruning.
        first, *_ = self.launcher.trials([[*point, "search.study=check", "search.trial=0"] for point in ends])
        searched = [first.identity, space.described(dimensions)]
        options = search.options(
            given, _plain(self.config.objective), self.config.study, searched, self.launcher.at_once(ends)
        )
        if self.config.dry_run:
            return self.launcher.launch(ends, initial_job_idx=0)  # type: ignore[no-any-return]
        under_way = search.Search(options, dimensions)
        jobs = search.run(under_way, self.launcher.launch, fixed, stop_on_failure=self.config.stop_on_failure)
        if not self.config.quiet:
            print("\n".join(under_way.lines()), flush=True)
        failures = [job._return_value for job in jobs if job.status is JobStatus.FAILED and not _stopped(job)]
        if failures:
            raise next((one for one in failures if not isinstance(one, NotRun)), failures[0])
        return jobs


def _stopped(job: Any) -> bool:
    """Whether the trial was ended early, which is no failure."""
    return job.result is not None and job.result.status.good


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
