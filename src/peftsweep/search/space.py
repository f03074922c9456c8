"""The space of a search: what the words of a command line give several values, as distributions of Optuna.

The syntax is that of Hydra's own plugin: ``choice(8,16)`` or ``8,16`` are categories, ``range(1,9,step=2)`` numbers of
which the last one is left out, ``interval(0.0,0.1)`` all numbers between its ends, ``int(interval(1,64))`` whole ones;
``tag(log, interval(1e-5,1e-3))`` is searched by its logarithm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import IntervalSweep, Override, QuotedString, RangeSweep

from peftsweep.errors import InputError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

LOG = "log"
SWEEP_SECTIONS = ("hydra", "search", "halving")  # sections that one point cannot have of its own
SWEEP_KEYS = ("study", "dry_run", "quiet", "objective", "stop_on_failure", *SWEEP_SECTIONS)


@dataclass(frozen=True)
class Dimension:
    """A key with its distribution, and how its values are written on a command line."""

    key: str  # as it was given, ``+method.x`` too
    distribution: BaseDistribution
    texts: tuple[tuple[Any, str], ...] = ()  # each value of a finite one, as Optuna and the command line have it

    def word(self, value: Any) -> str:
        """The override that sets ``value``."""
        return f"{self.key}={self._text(value)}"

    def _text(self, value: Any) -> str:
        if not self.texts:
            return repr(value)
        if not isinstance(value, bool) and isinstance(value, float):  # which Optuna has calculated
            return min(self.texts, key=lambda one: abs(one[0] - value) if isinstance(one[0], float) else float("inf"))[
                1
            ]
        return next(text for known, text in self.texts if type(known) is type(value) and known == value)

    def ends(self) -> list[str]:
        """The overrides of all its categories, or of both its ends."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if isinstance(self.distribution, CategoricalDistribution):
            return [self.word(value) for value in self.distribution.choices]
        assert isinstance(self.distribution, FloatDistribution | IntDistribution)
        return [self.word(value) for value in (self.distribution.low, self.distribution.high)]


def split(words: Sequence[str], parsed: Sequence[Override]) -> tuple[dict[str, Dimension], list[str]]:
    """The dimensions by their keys, and the words that say the same for every point. The last word for a key counts.

    Raises:
        InputError: a word cannot be searched over, or none can.
    """
    dimensions: dict[str, Dimension] = {}
    fixed: dict[str, str] = {}
    for word, one in zip(words, parsed, strict=True):
        key = one.key_or_group
        dimensions.pop(key, None)
        fixed.pop(key, None)
        if not one.is_sweep_override():
            fixed[key] = word
        elif key.partition(".")[0] in SWEEP_KEYS or key.startswith("hydra/"):
            raise InputError(f"{word}: is of the search as a whole, and cannot be searched over")
        else:
            dimensions[key] = _dimension(word, one)
    if not dimensions:
        raise InputError(
            "hydra/sweeper=optuna_current: there is nothing to search; give a key several values, such as "
            "'method.r=choice(8,16)' or 'train.learning_rate=tag(log,interval(1e-5,1e-3))'"
        )
    return dimensions, list(fixed.values())


def described(dimensions: Mapping[str, Dimension]) -> list[list[str]]:
    """The space as plain values."""
    from optuna.distributions import distribution_to_json

    return [[key, distribution_to_json(one.distribution)] for key, one in sorted(dimensions.items())]


def points(dimensions: Mapping[str, Dimension]) -> list[list[str]]:
    """Points that between them have every category and both ends of every interval, each beside the others' first."""
    ends = {key: one.ends() for key, one in dimensions.items()}
    first = {key: found[0] for key, found in ends.items()}
    others = [list((first | {key: word}).values()) for key, found in ends.items() for word in found[1:]]
    return [list(first.values()), *others]


def _dimension(word: str, one: Override) -> Dimension:
    key, value = word.partition("=")[0], one.value()
    log = LOG in getattr(value, "tags", ())
    if isinstance(value, IntervalSweep):
        return Dimension(key, _interval(word, value, log))
    if isinstance(value, RangeSweep):
        numbers = list(one.sweep_iterator())
        return Dimension(key, _range(word, numbers, log), tuple((number, repr(number)) for number in numbers))
    if log:
        raise InputError(f"{word}: only an interval or a range can be searched by its logarithm")
    from optuna.distributions import CategoricalDistribution

    elements = {text: element for element, text in zip(one.sweep_iterator(), one.sweep_string_iterator(), strict=True)}
    texts = tuple((_native(element, text), text) for text, element in elements.items())
    if not texts:
        raise InputError(f"{word}: matches no option")
    return Dimension(key, CategoricalDistribution([value for value, _ in texts]), texts)


def _native(element: Any, text: str) -> Any:
    """The value as Optuna's storages can keep it; a list or a mapping is its text."""
    plain = element.text if isinstance(element, QuotedString) else element
    return plain if plain is None or isinstance(plain, str | bool | int | float) else text


def _interval(word: str, value: IntervalSweep, log: bool) -> BaseDistribution:
    from optuna.distributions import FloatDistribution, IntDistribution

    low, high = value.start, value.end
    if low is None or high is None or not low <= high:
        raise InputError(f"{word}: the first end of an interval must not be above the second")
    if log and low <= 0:
        raise InputError(f"{word}: an interval that is searched by its logarithm must begin above 0")
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high, log=log)
    return FloatDistribution(float(low), float(high), log=log)


def _range(word: str, numbers: Sequence[Any], log: bool) -> BaseDistribution:
    from optuna.distributions import FloatDistribution, IntDistribution

    low, high = min(numbers), max(numbers)
    step = abs(numbers[1] - numbers[0]) if len(numbers) > 1 else 1
    if log and (low <= 0 or step != 1 or not isinstance(low, int)):
        raise InputError(
            f"{word}: a range that is searched by its logarithm must be of whole numbers above 0, by steps of 1"
        )
    if all(isinstance(number, int) for number in numbers):
        return IntDistribution(low, high, log=log, step=1 if log else step)
    return FloatDistribution(float(low), float(high), step=float(step) if len(numbers) > 1 else None)
