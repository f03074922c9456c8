"""What Hydra must see of the launchers and the sweeper; the work is in peftsweep.sweep.

Hydra executes this module at every start, also for `--help`, so it imports nothing heavy.
"""

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, RunMode, TaskFunction
from omegaconf import DictConfig, OmegaConf

SWEEP = "sweep"  # the group whose options bring axes of their own


@dataclass
class PointReturn(JobReturn):
    """A point's result for a sweeper. Hydra's own class prints to stderr a failure that has been reported already."""

    result: Any = None  # the trial's record; None where it was not run

    @property  # type: ignore[misc]
    def return_value(self) -> Any:
        if self.status is JobStatus.FAILED:
            raise self._return_value
        return self._return_value


def _devices(config: DictConfig, points: Sequence[Sequence[str]]) -> set[str]:
    """What the points of a sweep say, or leave, of ``device``."""
    points_values = [
        {key: value.strip("'\"") for key, _, value in (word.partition("=") for word in words)} for words in points
    ]
    return {words.get("device", config.device) for words in points_values}


def _check_numbers(section: str, options: DictConfig) -> None:
    """Refuse a number of ``hydra.launcher`` or ``hydra.sweeper`` that another launcher or sweeper would trip over."""
    from peftsweep import limits

    limits.check({"hydra": {section: OmegaConf.to_container(options)}}, {})


class LocalLauncher(Launcher):
    """Runs the trials of a sweep in warm worker processes, after all of them have been checked."""

    def __init__(self, **options: Any) -> None:
        # Hydra hands over a list, such as that of devices, as one of its own.
        self.options = {
            key: OmegaConf.to_container(one) if OmegaConf.is_config(one) else one for key, one in options.items()
        }
        self.budget: Any = None
        self._sweep_record: Any = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Hydra hands over what `launch` needs."""
        _check_numbers("sweeper", config.hydra.sweeper)
        self.context = hydra_context
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Compose every point, run the sweep, and answer with one JobReturn a point.

        A sweeper may call it many times; the launcher's limit and deadline are those of all of them together.
        """
        from peftsweep.config import checks
        from peftsweep.sweep import processes

        job_overrides = self.spelled_out(job_overrides)
        placement = checks.placement(self.options)
        devices = _devices(self.config, job_overrides)
        if devices == {"cpu"}:
            processes.hide_gpus()
        places: list[processes.Place] = []
        if placement.get("workers") != 0 and not self.config.dry_run:
            processes.begin_to_import()
            places = processes.places(placement.get("workers"), placement.get("devices"), devices)
            processes.start_ahead(places[: len(job_overrides)])
        try:
            from peftsweep.sweep.everything import sweep
            from peftsweep.sweep.workers import Budget, Options

            options = Options(**placement)
            self.budget = self.budget or Budget(options)
            run = functools.partial(
                sweep.run, options=options, budget=self.budget, sweep_record=self._record(len(places) or 1)
            )
            return self._launch(job_overrides, run)
        finally:
            processes.end_ahead()

    def spelled_out(self, points: Sequence[Sequence[str]]) -> list[list[str]]:
        """The points with each path or hub id, of those that are swept, as the words that Hydra and jobs know."""
        from peftsweep import shorthand

        sources = self.config.hydra.runtime.config_sources
        folders = [Path(source.path) for source in sources if source.schema == "file"]
        return [shorthand.expanded(words, folders) for words in points]

    def _record(self, workers: int | None) -> Any:
        """That of all that this launcher launches."""
        from peftsweep.study import store
        from peftsweep.study.sweep_record import SweepRecord

        words = store.with_own_options(self.config.hydra.overrides.task)
        self._sweep_record = self._sweep_record or SweepRecord(store.folder(self.config.study), words, workers)
        return self._sweep_record

    def _launch(self, job_overrides: Sequence[Sequence[str]], run: Callable[[list[Any]], list[Any]]) -> list[JobReturn]:
        from peftsweep.sweep.everything import sweep

        trials = self.trials(job_overrides)
        results = run(trials)
        Path(self.config.hydra.sweep.dir).mkdir(parents=True, exist_ok=True)  # into which sweepers write at their end
        answers = [sweep.answer(one, result) for one, result in zip(trials, results, strict=True)]
        return [
            PointReturn(
                overrides=list(overrides),
                working_dir=str(result.folder) if result else None,
                task_name="peftsweep",
                status=JobStatus.FAILED if isinstance(answer, Exception) else JobStatus.COMPLETED,
                _return_value=answer,
                result=result,
            )
            for overrides, result, answer in zip(job_overrides, results, answers, strict=True)
        ]

    def trials(self, job_overrides: Sequence[Sequence[str]]) -> list[Any]:
        """The trials of the points, checked; none is run."""
        from peftsweep.config import compose as configuration
        from peftsweep.observe import streams
        from peftsweep.sweep.points import Points

        points = Points(self.context.config_loader, self.config)
        text, quiet = "checked {} points", self.config.quiet
        sweeper: Any = OmegaConf.to_container(self.config.hydra.sweeper)
        shown = streams.progress(job_overrides, text, len(job_overrides), quiet=quiet)
        return [configuration.with_pruning(points.trial(words), sweeper) for words in shown]

    def at_once(self, job_overrides: Sequence[Sequence[str]]) -> int:
        """How many of such points run at the same time."""
        from peftsweep.config import checks
        from peftsweep.sweep import processes

        placement = checks.placement(self.options)
        workers, devices = placement.get("workers"), placement.get("devices")
        places = 1 if workers == 0 else len(processes.places(workers, devices, _devices(self.config, job_overrides)))
        return places * (placement["pack"] or 1)


def _sweeps_sweeps(word: Override) -> bool:
    """Whether the word names several options of ``sweep``."""
    return bool(word.key_or_group == SWEEP and word.is_sweep_override())


class GridSweeper(BasicSweeper):
    """Runs every point of a grid: to its end, or with ``halving.min_steps`` only the best of them."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Hydra hands over what `sweep` needs."""
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)
        self._task_function = task_function

    def sweep(self, arguments: list[str]) -> list[JobReturn]:
        """Run the points of the words; a failure among them is raised when all of them have run."""
        assert self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        parsed = parser.parse_overrides(arguments)
        self._check(arguments, parsed)
        grids = self._joined(arguments, parsed) or [[*self._parse_config(), *arguments]]
        points = [point for grid in grids for point in self.split_arguments(parser.parse_overrides(grid), None)[0]]
        from peftsweep.errors import InputError, NotRun

        if not points:
            empty = [word for word, one in zip(arguments, parsed, strict=True) if isinstance(one._value, Glob)]
            raise InputError(f"{' '.join(empty)}: the sweep is empty: a glob in it matches no option")

        size = self.max_batch_size or max(len(points), 1)
        batches = [points[start : start + size] for start in range(0, len(points), size)] or [[]]
        jobs: list[JobReturn] = []
        for batch in batches:  # the launcher checks all points of each
            jobs += self._launch(batch, len(jobs), whole=len(batches) == 1)
        if failures := [job._return_value for job in jobs if job.status is JobStatus.FAILED]:
            raise next((one for one in failures if not isinstance(one, NotRun)), failures[0])
        return jobs

    def _check(self, arguments: list[str], parsed: Sequence[Override]) -> None:
        from peftsweep.config.checks import check_unused
        from peftsweep.errors import InputError

        assert self.config is not None
        check_unused(arguments)
        for word in (one.input_line for one in parsed if one.is_interval_sweep()):
            raise InputError(
                f"{word}: an interval is for a search, such as hydra/sweeper=optuna_current; a grid takes values after "
                "commas, or range(FIRST,END,STEP)"
            )
        size, params = self.max_batch_size, self.config.hydra.sweeper.params
        if size is not None and not (type(size) is int and size >= 1):
            raise InputError(f"hydra.sweeper.max_batch_size={size}: must be a whole number, at least 1, or null")
        if params is not None and not OmegaConf.is_dict(params):
            raise InputError(f"hydra.sweeper.params={params}: must be swept keys with their values")

    def _joined(self, arguments: list[str], parsed: Sequence[Override]) -> list[list[str]]:
        """For each of several options of ``sweep`` the words of its grid: its axes below those of the command line.

        What is of the sweep as a whole is what these options say of it. Without several options there is nothing.
        """
        from peftsweep.config import checks
        from peftsweep.errors import InputError

        swept = [word for word, one in zip(arguments, parsed, strict=True) if _sweeps_sweeps(one)]
        if not swept:
            return []
        assert self.hydra_context is not None
        assert self.config is not None
        others = [word for word in arguments if word not in swept]
        words, composed = {}, {}
        for option in [option for one in parsed if _sweeps_sweeps(one) for option in one.sweep_string_iterator()]:
            words[option] = [*others, f"{SWEEP}={option}"] if option != "null" else others
            composed[option] = self.hydra_context.config_loader.load_configuration(
                self.config.hydra.job.config_name,
                [*self.config.hydra.overrides.hydra, *words[option]],
                run_mode=RunMode.MULTIRUN,
            )
            Engines().on_multirun_start(composed[option])
        for option, one in composed.items():
            if one.hydra.sweeper._target_ != self.config.hydra.sweeper._target_:
                raise InputError(f"{swept[0]}: {option} is a search and no grid; give sweep={option} alone")
        checks.check_joinable(swept[0], composed)
        whole = next(iter(composed.values()))
        self.setup(hydra_context=self.hydra_context, task_function=self._task_function, config=whole)
        self.max_batch_size = whole.hydra.sweeper.max_batch_size
        axes = {option: one.hydra.sweeper.params.items() for option, one in composed.items()}
        return [[*(f"{key}={value}" for key, value in axes[option]), *words[option]] for option in composed]

    def _launch(self, points: list[list[str]], first: int, whole: bool) -> Sequence[JobReturn]:
        from peftsweep.errors import InputError
        from peftsweep.sweep import halving

        assert self.config is not None
        assert self.launcher is not None
        plan = halving.plan(self.config, points)
        if plan is None:
            return self.launcher.launch(points, initial_job_idx=first)
        if not whole:
            raise InputError("hydra.sweeper.max_batch_size: must be null, as halving compares all points of a sweep")
        return halving.run(self.launcher.launch, points, plan, quiet=self.config.quiet)


class TuneSweeper(GridSweeper):
    """sweep=tune: searches rate, size and modules of each method within a budget, and judges the best on test rows."""

    name = "tune"

    def sweep(self, arguments: list[str]) -> list[JobReturn]:
        """Search the methods of the words; each trial is launched as those of a grid are."""
        from peftsweep.tuning import command

        assert self.hydra_context is not None
        assert self.config is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        parsed = parser.parse_overrides([*self._parse_config(), *arguments])
        command.check_axes(parsed, self.name)
        points = self.split_arguments(parsed, None)[0]
        if not any(one.key_or_group == "method" for one in parsed):
            points = [[*point, f"method={self.config.hydra.runtime.choices.method}"] for point in points]
        loader = self.hydra_context.config_loader
        command.run(self.launcher, self.config, loader, points, league=self.name == "league")
        return []


class LeagueSweeper(TuneSweeper):
    """sweep=league: methods tuned with equal effort and ranked on test rows, LoRA twice among them."""

    name = "league"


class EngineLauncher(LocalLauncher):
    """Checks all trials of a sweep here, and runs the missing ones through another launcher."""

    def __init__(self, engine: DictConfig) -> None:
        super().__init__()
        self.engine = engine

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Hydra hands over what `launch` needs, and what the other launcher does."""
        _check_numbers("launcher", self.engine)
        config = config.copy()
        config.hydra.launcher = self.engine
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Compose every point, have what is missing run, and answer with one JobReturn a point."""
        from peftsweep.sweep import processes

        job_overrides = self.spelled_out(job_overrides)
        if _devices(self.config, job_overrides) == {"cpu"}:
            processes.hide_gpus()
        from peftsweep.sweep import engine, sweep

        def place(trials: Sequence[Any]) -> list[BaseException | None]:
            with self._watching(trials):
                jobs = self.launcher.launch([engine.job_words(one) for one in trials], initial_job_idx)
            return [one._return_value if one.status is JobStatus.FAILED else None for one in jobs]

        run = functools.partial(sweep.run, launch=place, sweep_record=self._record(None), **self._queue())
        return self._launch(job_overrides, run)

    def _watching(self, trials: Sequence[Any]) -> AbstractContextManager[None]:
        """What the other launcher needs around it to tell how each of its jobs, those of ``trials``, ends."""
        if "submitit" not in self.engine._target_:
            return nullcontext()
        from peftsweep.sweep import slurm

        return slurm.jobs_end_alone(trials)

    def _queue(self) -> dict[str, Any]:
        """The jobs of earlier commands in the queue of the other launcher, as an argument of ``sweep.run``."""
        if "submitit" not in self.engine._target_:
            return {}
        from peftsweep.sweep import slurm

        return {"queued": slurm.Queue().jobs}


class Engines(Callback):
    """Has every launcher but ours used through `EngineLauncher`, so that a sweep is the same everywhere."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Called by Hydra before it makes the launcher."""
        engine = config.hydra.launcher
        if not engine._target_.startswith(f"{__name__}."):
            target = f"{__name__}.{EngineLauncher.__name__}"
            config.hydra.launcher = {"_target_": target, "_recursive_": False, "engine": engine}
