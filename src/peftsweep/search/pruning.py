"""Whether a trial of a search goes on after a validation, as Optuna's pruner says, in the process that trains it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftsweep.errors import InputError, first_line, suggest
from peftsweep.study import store
from peftsweep.study.scores import is_minimized

if TYPE_CHECKING:
    from optuna import Study
    from optuna.storages import BaseStorage

EXTRA = "pip install 'peftsweep[optuna]'"
JOURNAL = "optuna.journal"  # in the study's folder
NONE = "optuna.pruners.NopPruner"  # prunes nothing


@dataclass(frozen=True)
class Pruning:
    """Where a trial of a search reports its validations, and what decides on them."""

    storage: str  # a URL, or the file of a journal
    study: str  # Optuna's name of the search
    trial: int  # its number there
    metric: str  # of the validation
    pruner: dict[str, Any]  # a class of optuna.pruners as _target_, and its arguments


def trial_pruning(
    sweeper: Mapping[str, Any], study: str, name: str | None, number: int | None, metric: str
) -> Pruning | None:
    """The pruning that ``hydra.sweeper`` asks for of the trial ``number`` of the search ``name``; None where none.

    ``study`` is peftsweep's, in whose folder the journal is by default; ``metric`` the one of the validation.
    """
    if name is None or number is None:
        return None
    pruner = sweeper.get("pruner") or {}
    if pruner.get("_target_", NONE) == NONE:
        return None
    storage = sweeper.get("storage") or str(store.folder(study) / JOURNAL)
    return Pruning(str(storage), name, number, metric, dict(pruner))


def verdict(pruning: Pruning) -> Callable[[int, dict[str, float]], bool]:
    """A function that reports a validation, by its step and scores, and says whether the trial is pruned.

    Raises:
        InputError: the validation does not have the metric.
    """
    opened: list[Study] = []

    def prune(step: int, scores: dict[str, float]) -> bool:
        if pruning.metric not in scores:
            raise InputError(f"train.best_metric={pruning.metric}: the validation has {', '.join(scores)}")
        if not opened:
            opened.append(load(pruning))
        return report(opened[0], pruning.trial, pruning.metric, step, scores[pruning.metric])

    return prune


def load(pruning: Pruning) -> Study:
    """The search that a trial is of, with its pruner."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    pruner = make(pruning.pruner, "pruner", optuna.pruners.BasePruner)
    return optuna.load_study(study_name=pruning.study, storage=open_storage(pruning.storage), pruner=pruner)


def report(study: Study, number: int, metric: str, step: int, value: float) -> bool:
    """Report the value of trial ``number`` at a step; returns whether the trial is to be pruned.

    A pruner reads values in the direction of the objective; a metric whose better side is the other is negated.
    """
    import optuna

    frozen = study.get_trials(deepcopy=False)[number]
    trial = optuna.trial.Trial(study, frozen._trial_id)
    if step not in frozen.intermediate_values:  # as in a trial that goes on from an earlier checkpoint
        lower = is_minimized(metric)
        minimized = study.direction is optuna.study.StudyDirection.MINIMIZE
        trial.report(value if lower == minimized else -value, step)
    return bool(trial.should_prune())


def open_storage(place: str) -> BaseStorage:
    """Optuna's storage at a URL, or in the file of a journal.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    from optuna import storages
    from optuna.storages.journal import JournalFileBackend

    try:
        if "://" in place:
            return storages.get_storage(place)
        # Optuna's lock is a link to the journal. That of a killed process is taken away after 30 s, but one that leads
        # nowhere, as a relative path did in earlier versions, would be waited for without end.
        journal = Path(place).absolute()
        journal.parent.mkdir(parents=True, exist_ok=True)
        lock = Path(f"{journal}.lock")
        if lock.is_symlink() and not lock.exists():
            lock.unlink(missing_ok=True)
        return storages.JournalStorage(JournalFileBackend(str(journal)))
    except OSError:
        raise
    except Exception as error:  # whatever a database, its driver or a damaged journal raises
        name = "" if "://" in place else f"={place}"  # a URL may hold a password
        raise InputError(f"hydra.sweeper.storage{name}: cannot be read: {first_line(error)}") from error


def make(node: Mapping[str, Any], key: str, kind: type) -> Any:
    """The sampler or pruner that ``hydra.sweeper.<key>`` names.

    Raises:
        InputError: it cannot be made, or is none.
    """
    import optuna
    from hydra.utils import instantiate

    module, _, name = str(node.get("_target_")).rpartition(".")
    offered = getattr(optuna, f"{key}s")
    if module == offered.__name__ and not hasattr(offered, name):
        raise InputError(
            f"hydra.sweeper.{key}._target_={module}.{name}: no such class; {suggest(name, _classes(offered))}"
        )
    try:
        made = instantiate(dict(node), _convert_="all")
    except Exception as error:  # of Hydra, for what it cannot find, or of the class, for its arguments
        cause = error.__cause__ or error
        raise InputError(f"hydra.sweeper.{key}: {node.get('_target_')}: {first_line(cause)}") from error
    if not isinstance(made, kind):
        raise InputError(f"hydra.sweeper.{key}._target_={node.get('_target_')}: must be a class of optuna.{key}s")
    return made


def _classes(module: Any) -> list[str]:
    return [name for name in module.__all__ if isinstance(getattr(module, name), type)]
