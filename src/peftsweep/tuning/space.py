"""The search spaces of sweep=tune: check its keys, and make the space of each method from its configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peftsweep.config.compose import Trial
from peftsweep.errors import InputError
from peftsweep.study.scores import is_minimized
from peftsweep.training.length import total_steps
from peftsweep.tuning.search import Space, ladder

SIZES = ("r", "n_frequency", "num_virtual_tokens", "adapter_len")  # options that set the size of a method
TARGETS = ("qv", "all_linear")  # tried beside the method's own targets, unless tune.targets names others
FACTOR = 3  # steps of a whole training / steps to the first rung
SEARCHED = {  # keys that the search sets, and the key that lists the values that it tries
    "train.learning_rate": "tune.rates",
    "method.r": "tune.ranks",
    "targets": "tune.targets",
    "seed": "tune.seeds",
}
SEARCH_KEYS = ("budget", "tune", "league", "sweep")  # keys that no trial gets


@dataclass(frozen=True)
class Plan:
    """The settings that all trials of a tuning share."""

    metric: str  # of the validation
    rung: int | None  # steps to the first rung; None: trials go to their end at once
    eval_every: str
    total: int | None  # steps of a trial; None where its rows are not known yet

    @property
    def sign(self) -> int:
        """The factor that turns a value of the metric into a score for which lower is better."""
        return 1 if is_minimized(self.metric) else -1


def plan(one: Trial, metric: str | None) -> Plan:
    """The plan for trials like ``one``, whose configuration comes from the command line and conf/.

    Raises:
        InputError: a key of these trials does not fit a search.
    """
    train = one.config.train
    known = one.rows is not None or train.epochs is None
    total = total_steps(train, len(one.rows.train) if one.rows is not None else 1) if known else None
    if total == 0 or one.config.adapter.path is not None:
        raise InputError("sweep=tune: trains; it takes no train.steps=0 and no adapter.path")
    if one.config.objective is not None or one.config.halving.min_steps is not None:
        raise InputError("sweep=tune: takes no objective and no halving keys; tune.metric says what it goes by")
    every = train.eval_every
    rung = (
        None if total is None or not (every or "1").isdigit() else total // FACTOR // int(every or 1) * int(every or 1)
    )
    return Plan(
        metric or train.best_metric,
        rung or None,
        every or (str(rung) if rung else "1epoch" if total is None else str(total)),
        total,
    )


def space(one: Trial, tune: Mapping[str, Any], *, has_rate: bool) -> tuple[Space, str | None]:
    """The search space of the method of ``one``, and the name of its option that sets the size (None: it has none).

    ``has_rate``: whether its yaml or the command line names a learning rate.

    Raises:
        InputError: no rate is known from which a ladder of rates could start.
    """
    method, name = one.config.method, one.choices["method"]
    if tune["rates"] is None and not (has_rate and one.config.train.learning_rate > 0):
        raise InputError(
            f"method={name}: names no train.learning_rate above 0, around which rates are tried; give tune.rates=[...]"
        )
    key = next((key for key in SIZES if isinstance(method.get(key), int) and method[key] > 0), None)
    sizes: Sequence[int | None] = (None,)
    if key is not None:
        given = tune["ranks"] if key == "r" else None
        sizes = sorted(given or {factor * method[key] for factor in (1, 2, 4)})
    rates = tuple(tune["rates"] or ladder(one.config.train.learning_rate))
    return Space(name, rates, tune["rates"] is None, tuple(sizes), _targets(one, tune["targets"])), key


def _targets(one: Trial, given: Sequence[str] | None) -> tuple[str | None, ...]:
    if given is not None:
        return tuple(given)
    own = one.choices.get("targets", "default")
    reaches = "target_modules" in one.config.method and own == "default"
    return (None, *TARGETS) if reaches else (None,)


def check_lists(tune: Mapping[str, Any]) -> None:
    """Check the lists under ``tune``.

    Raises:
        InputError: a list is empty, or has a value twice.
    """
    for key in ("rates", "ranks", "targets"):
        values = tune[key]
        if values is not None and (not values or len(set(values)) < len(values)):
            raise InputError(f"tune.{key}={values}: must be at least one value, each once")


def base_words(words: Sequence[str]) -> list[str]:
    """The words of the command line that every trial gets."""
    own = {"method", "seed", "train.learning_rate", *(f"method.{size}" for size in SIZES)}
    keys = {word: word.lstrip("+~").partition("=")[0].strip() for word in words}
    return [word for word in words if keys[word] not in own and keys[word].partition(".")[0] not in SEARCH_KEYS]
