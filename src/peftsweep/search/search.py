"""A search by Optuna: it asks for points, has them run as trials, and tells Optuna how each has ended.

All that decides is in Optuna's storage and in the study, so that the same command goes on where one was cut off: a
trial that had not ended is run again from its checkpoint, a point that the study holds is not trained again, and the
sampler is made anew for each point, seeded by the trial's number, so that it does not matter how often it began.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from peftsweep.data import fingerprint
from peftsweep.errors import InputError, suggest
from peftsweep.search import pruning
from peftsweep.search.space import Dimension
from peftsweep.study import claims, store
from peftsweep.study.record import Result, Status
from peftsweep.study.scores import is_maximized, is_minimized

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

NAME = "hydra/sweeper=optuna_current"
DIRECTIONS = ("minimize", "maximize")
NAME_LENGTH = 10  # hex digits
OLDEST = 4  # version of Optuna
# Samplers that go through one sequence, of which the storage says how far they have come.
SEQUENTIAL_SAMPLERS = ("GridSampler", "QMCSampler")
KEYS = ("n_trials", "n_jobs", "direction", "storage", "study_name", "sampler", "pruner", "params")


@dataclass(frozen=True)
class Options:
    """The keys of ``hydra.sweeper``, checked."""

    n_trials: int  # of the search, those of earlier commands included
    n_jobs: int  # trials that are chosen and run at the same time
    directions: tuple[str, ...]
    storage: str
    lock: Path  # the file that is locked while the search is read and changed: the journal, or one of the study
    study_name: str
    sampler: dict[str, Any]
    pruner: dict[str, Any]
    objectives: tuple[str, ...] = ()  # columns of the record


class Job(Protocol):
    """How a point has ended, as a launcher answers."""

    result: Result | None  # None where the trial was not run
    _return_value: Any  # of a trial that has succeeded the numbers of the objectives


Launch = Callable[[list[list[str]], int], Sequence[Any]]


def check_installed() -> None:
    """Say what to install where Optuna is missing, or too old.

    Raises:
        InputError: it is.
    """
    try:
        import optuna
    except ImportError:
        raise InputError(f"{NAME}: {pruning.EXTRA}") from None
    if int(optuna.__version__.partition(".")[0]) < OLDEST:
        raise InputError(f"{NAME}: Optuna is {optuna.__version__}, from {OLDEST}.2 on is needed: {pruning.EXTRA}")
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def options(given: Mapping[str, Any], objective: Any, study: str, searched: Any, at_once: int) -> Options:
    """The keys ``given`` of ``hydra.sweeper``, checked, with what follows from the sweep where they are null.

    ``searched`` are plain values that say what is searched: the search is called by a hash of them and of the
    objectives, so that the same command continues it.

    Raises:
        InputError: one is unknown or wrong.
    """
    if unknown := [key for key in given if key not in KEYS]:
        raise InputError(f"hydra.sweeper.{unknown[0]}: no such key; {suggest(str(unknown[0]), list(KEYS))}")
    n_trials, n_jobs = given.get("n_trials"), given.get("n_jobs")
    for key, number in (("n_trials", n_trials), ("n_jobs", at_once if n_jobs is None else n_jobs)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise InputError(f"hydra.sweeper.{key}={number}: must be a whole number, at least 1")
    objectives = (objective,) if isinstance(objective, str) else tuple(objective or ())
    if not objectives:
        raise InputError(
            "objective: must be given, a column of the record or a list of them, such as eval_info.EVAL.METRIC.value"
        )
    direction = given.get("direction")
    directions = (direction,) if isinstance(direction, str) else tuple(direction or ())
    if wrong := [one for one in directions if one not in DIRECTIONS]:
        raise InputError(f"hydra.sweeper.direction={wrong[0]}: must be one of {', '.join(DIRECTIONS)}")
    if len(directions) != len(objectives):
        raise InputError(
            f"hydra.sweeper.direction: has {len(directions)} for {len(objectives)} objectives; give one for each"
        )
    for column, one in zip(objectives, directions, strict=True):
        _check_direction(column, one)
    pruner = dict(given.get("pruner") or {"_target_": pruning.NONE})
    if len(directions) > 1 and pruner.get("_target_") != pruning.NONE:
        raise InputError("hydra.sweeper.pruner: Optuna prunes by one objective, not by several")
    named = fingerprint.of_values([searched, objectives, directions])
    journal = store.folder(study) / pruning.JOURNAL
    storage = str(given.get("storage") or journal)
    return Options(
        n_trials=n_trials,  # type: ignore[arg-type]
        n_jobs=at_once if n_jobs is None else n_jobs,
        directions=directions,
        storage=storage,
        lock=journal if "://" in storage else Path(storage),
        study_name=str(given.get("study_name") or f"peftsweep-{named[:NAME_LENGTH]}"),
        sampler=dict(given.get("sampler") or {}),
        pruner=pruner,
        objectives=objectives,
    )


def _check_direction(objective: str, direction: str) -> None:
    """Refuse to search for the worst value of a score; a score of which the better side is not known may have any.

    Raises:
        InputError: the direction is the wrong one.
    """
    if not objective.startswith("eval_info.") or not objective.endswith(".value"):
        return
    metric = objective.removesuffix(".value")
    better = "minimize" if is_minimized(metric) else "maximize" if is_maximized(metric) else direction
    if direction != better:
        side = "lower" if better == "minimize" else "higher"
        raise InputError(
            f"hydra.sweeper.direction={direction}: would search for the worst {objective}, of which {side} is better; "
            f"give hydra.sweeper.direction={better}"
        )


class Search:
    """A running search."""

    def __init__(self, options: Options, dimensions: Mapping[str, Dimension]) -> None:
        self.options = options
        self._dimensions = dict(dimensions)
        self._distributions = {key: one.distribution for key, one in dimensions.items()}
        self._exhausted = False
        self.study = self._opened()

    def _opened(self) -> Study:
        import optuna

        options = self.options
        self._sampler(0)  # so that a wrong sampler is reported before anything is written
        if "://" not in options.storage:
            _end_whole(Path(options.storage))
        study = optuna.create_study(
            storage=pruning.open_storage(options.storage),
            study_name=options.study_name,
            directions=list(options.directions),
            pruner=pruning.make(options.pruner, "pruner", optuna.pruners.BasePruner),
            load_if_exists=True,
        )
        held = tuple(one.name.lower() for one in study.directions)
        if held != options.directions:
            raise InputError(
                f"hydra.sweeper.direction: the search {options.study_name} has {', '.join(held)}; "
                "another hydra.sweeper.study_name begins another"
            )
        for trial in study.get_trials(deepcopy=False):
            if trial.params and trial.distributions != self._distributions:
                raise InputError(
                    f"hydra.sweeper.study_name={options.study_name}: its trials are of another space; "
                    "another hydra.sweeper.study_name begins another search"
                )
        return study

    def _sampler(self, number: int) -> Any:
        """The sampler for the trial of this number."""
        import optuna

        node = self.options.sampler
        target = getattr(optuna.samplers, str(node.get("_target_")).rpartition(".")[2], None)
        seed = node.get("seed")
        if target is not None and "seed" not in inspect.signature(target).parameters:
            node = {key: value for key, value in node.items() if key != "seed"}
        elif isinstance(seed, int) and target is not None and target.__name__ not in SEQUENTIAL_SAMPLERS:
            node = node | {"seed": seed + number}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return pruning.make(node, "sampler", optuna.samplers.BaseSampler)

    def next(self) -> list[FrozenTrial]:
        """The trials to run now: those that were cut off, and new ones, as many as are wanted at once.

        Of two commands at the same time one asks after the other, or the search would get more trials than it may have.
        """
        import optuna

        with self._alone():
            trials = self.trials()
            batch = [one for one in trials if one.state is optuna.trial.TrialState.RUNNING]
            for number in range(len(trials), self.options.n_trials):
                if len(batch) >= self.options.n_jobs or self._exhausted:
                    break
                self.study.sampler = self._sampler(number)
                new_trial = self.study.ask(self._distributions)
                batch.append(self.study.get_trials(deepcopy=False)[new_trial.number])
        return batch

    def trials(self) -> list[FrozenTrial]:
        """All trials but those that are enqueued."""
        import optuna

        waiting = optuna.trial.TrialState.WAITING
        return [one for one in self.study.get_trials(deepcopy=False) if one.state is not waiting]

    def point(self, trial: FrozenTrial) -> list[str]:
        """The overrides that set what Optuna has chosen."""
        return [one.word(trial.params[key]) for key, one in self._dimensions.items()]

    def tell(self, trial: FrozenTrial, job: Job) -> None:
        """Tell Optuna how the trial has ended, unless it was not run: then the same command goes on with it."""
        import optuna

        states, result = optuna.trial.TrialState, job.result
        if result is None or result.status is Status.cancelled:
            return
        values: list[float] | None = None
        state = states.PRUNED if result.status is Status.stopped else states.FAIL
        if result.status is Status.success:
            values = _numbers(job._return_value, self.options.objectives)
            state = states.FAIL if values is None else states.COMPLETE
        with self._alone():
            if self.study.get_trials(deepcopy=False)[trial.number].state.is_finished():
                return  # another command, which runs the same search at the same time, has told it
            if state is states.PRUNED:
                self._report_stop(trial, result)
            whole = optuna.trial.Trial(self.study, trial._trial_id)
            whole.set_user_attr("trial", result.trial)
            whole.set_user_attr("status", result.status.name)
            try:
                self.study.tell(trial.number, values, state=state, skip_if_finished=True)
            except RuntimeError as error:  # a sampler's word that its space is exhausted, meant for Optuna's own loop
                if "Study.stop" not in str(error):
                    raise
                self._exhausted = True

    def _alone(self) -> AbstractContextManager[None]:
        """In this context no other command of the study reads or changes the search, whatever its storage is."""
        self.options.lock.parent.mkdir(parents=True, exist_ok=True)
        return claims.deciding(self.options.lock)

    def _report_stop(self, trial: FrozenTrial, result: Result) -> None:
        """Report to Optuna the last value of a trial that was pruned before, at the same point."""
        stop = result.run_info.get("stopped")
        if stop and stop["value"] is not None and len(self.options.directions) == 1:
            pruning.report(self.study, trial.number, stop["metric"], stop["step"], stop["value"])

    def lines(self) -> list[str]:
        """The state of the search as lines: how its trials ended, and the best of them."""
        import optuna

        states = [one.state.name.lower() for one in self.trials()]
        counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(sorted(states)))
        lines = [f"search {self.options.study_name}: {len(states)} trials: {counts}"]
        if "complete" not in states:
            return lines
        if len(self.options.directions) == 1:
            return [*lines, f"best: {self._described(self.study.best_trial)}"]
        front = sorted(self.study.best_trials, key=lambda one: one.values)
        assert all(one.state is optuna.trial.TrialState.COMPLETE for one in front)
        return [*lines, f"on the Pareto front: {len(front)}", *(f"    {self._described(one)}" for one in front)]

    def _described(self, trial: FrozenTrial) -> str:
        found = [f"{name}={value:.6g}" for name, value in zip(self.options.objectives, trial.values, strict=True)]
        return f"{', '.join(found)} with {' '.join(self.point(trial))} ({trial.user_attrs.get('trial')})"


def run(search: Search, launch: Launch, fixed: Sequence[str], *, stop_on_failure: bool = False) -> list[Any]:
    """Run the search to its number of trials and give all jobs; ``launch`` runs points, numbered from its second
    argument on, and answers with a job for each. ``fixed`` are the words that all points share.
    """
    jobs: list[Any] = []
    name = search.options.study_name
    while batch := search.next():
        own = [[f"search.study={name}", f"search.trial={trial.number}"] for trial in batch]
        points = [[*fixed, *search.point(trial), *words] for trial, words in zip(batch, own, strict=True)]
        ended = launch(points, len(jobs))
        jobs += ended
        for trial, job in zip(batch, ended, strict=True):
            search.tell(trial, job)
        left = any(job.result is None or job.result.status is Status.cancelled for job in ended)
        if left or (stop_on_failure and not all(job.result.status.good for job in ended)):
            break
    return jobs


def _numbers(answer: Any, objectives: Sequence[str]) -> list[float] | None:
    """The objectives' values; None where one is no number, which is a failed trial to Optuna."""
    values = answer if isinstance(answer, tuple) else (answer,)
    for name, value in zip(objectives, values, strict=True):
        if value is not None and not isinstance(value, int | float):
            raise InputError(f"objective={name}: is {value!r}, which is no number")
    numbers = [math.nan if value is None else float(value) for value in values]
    return None if any(map(math.isnan, numbers)) else numbers


def _end_whole(journal: Path) -> None:
    """Remove an incomplete last line, which the next line would be appended to."""
    if journal.is_file() and (text := journal.read_bytes()) and not text.endswith(b"\n"):
        with journal.open("r+b") as file:
            file.truncate(text.rfind(b"\n") + 1)
