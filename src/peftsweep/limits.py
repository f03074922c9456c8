"""Which numbers a configuration may hold: the range of each numeric key, in one table."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from peftsweep.errors import InputError

LARGEST_SEED = 2**32 - 1  # numpy takes no larger one
LARGEST = 2**31 - 1  # of sizes and counts: what indices of 32 bits can tell apart
LARGEST_FLOAT32 = 3.4e38


@dataclass(frozen=True)
class Range:
    """What a number may be, both ends included; ``above`` and ``below`` are not."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def __contains__(self, number: float) -> bool:
        return self.least <= number <= self.most and self.above < number < self.below

    def __str__(self) -> str:
        ends = {"at least": self.least, "at most": self.most, "above": self.above, "below": self.below}
        return " and ".join(f"{word} {end:.12g}" for word, end in ends.items() if math.isfinite(end))


COUNT = Range(least=1, most=LARGEST)
OR_NONE = Range(least=0, most=LARGEST)  # a count that may be 0
RATE = Range(least=0, most=LARGEST_FLOAT32)
RANGES: dict[str, Range] = {  # the first pattern that fits a key counts
    "seed": Range(least=0, most=LARGEST_SEED),
    "dataset.split_seed": Range(least=0, most=LARGEST_SEED),
    "dataset.train_fraction": Range(above=0, below=1),
    "dataset.fraction": Range(above=0, most=1),
    "dataset.max_length": Range(least=2, most=LARGEST),
    **dict.fromkeys(("dataset.samples", "dataset.validation_samples", "dataset.max_characters"), COUNT),
    **dict.fromkeys([f"model.architecture.{name}" for name in ("num_*", "n_*", "*_size", "*_dim", "max_*")], COUNT),
    **dict.fromkeys(("train.learning_rate", "train.learning_rate_scale", "train.weight_decay", "train.clip"), RATE),
    "train.steps": OR_NONE,
    "train.epochs": Range(least=0, most=1e6),
    "train.warmup": RATE,
    **dict.fromkeys(
        ("train.batch_size", "train.accumulation", "train.pad_to_multiple_of", "train.log_every", "train.patience"),
        COUNT,
    ),
    "method.*dropout*": Range(least=0, below=1),
    "method.r": COUNT,
    "method.lora_alpha": Range(least=1, most=LARGEST_FLOAT32),
    "adapter.scales.*": Range(above=0, below=1),
    "halving.factor": Range(least=2, most=LARGEST),
    "halving.min_steps": COUNT,
    "halving.min_fraction": Range(above=0, most=0.5),
    "halving.rung": COUNT,
    "search.trial": OR_NONE,
    "eval.*.max_length": Range(least=2, most=LARGEST),
    **dict.fromkeys([f"eval.*.{name}" for name in ("samples", "batch_size", "max_new_tokens", "num_beams")], COUNT),
    "inference.warmup": OR_NONE,
    **dict.fromkeys([f"inference.{name}" for name in ("samples", "runs", "batch_sizes.*")], COUNT),
    **dict.fromkeys([f"inference.categories.*.{name}" for name in ("new_tokens", "prompt_tokens")], COUNT),
    **dict.fromkeys(("profiler.wait", "profiler.warmup"), OR_NONE),
    **dict.fromkeys([f"profiler.{name}" for name in ("steps", "active", "top", "max_entries", "sizes.*")], COUNT),
    "method.*": Range(least=-LARGEST_FLOAT32, most=LARGEST_FLOAT32),
    "*": Range(least=-(2**63), most=2**63 - 1),
}


def check(tree: Mapping[str, Any], least_of_method: Mapping[str, float]) -> None:
    """Refuse a number that is not finite or out of its key's range.

    ``least_of_method`` are lower ends of options whose own default, in the method that is chosen, lies below the
    usual one.

    Raises:
        InputError: the line names the key, the number and its range.
    """
    for key, number in numbers(tree):
        allowed = _range(key)
        if not math.isfinite(number):
            raise InputError(f"{key}={number}: must be a finite number")
        allowed = replace(allowed, least=min(allowed.least, least_of_method.get(key, math.inf)))
        if number not in allowed:
            raise InputError(f"{key}={number}: must be {allowed}")


@functools.cache
def _range(key: str) -> Range:
    return next(span for pattern, span in RANGES.items() if fnmatchcase(key, pattern))


def numbers(tree: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """Each dotted key that holds a number; of a list with the place in it."""
    if isinstance(tree, list | tuple):
        tree = {str(place): value for place, value in enumerate(tree)}
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            yield from numbers(value, f"{key}.{name}" if key else str(name))
    elif isinstance(tree, int | float) and not isinstance(tree, bool):
        yield key, tree
