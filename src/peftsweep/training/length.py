"""The number of steps of a training, and the steps at which validations and checkpoints are due."""

from __future__ import annotations

import itertools
import math
import re
import time
from collections.abc import Callable, Sequence

from peftsweep.data.batches import batch_order, micro_batches
from peftsweep.data.tokens import Tokens
from peftsweep.errors import InputError
from peftsweep.limits import LARGEST
from peftsweep.schema import TrainConfig

MAX_SCANNED_STEPS = 5_000  # steps of a run that are counted or searched; a longer run repeats their sizes
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


def padded_tokens(step: Sequence[int], rows: Sequence[Tokens], config: TrainConfig) -> int:
    """The tokens of a step, padding included; ``step`` holds the numbers of its rows."""
    multiple, total = config.pad_to_multiple_of, 0
    for numbers in next(micro_batches([list(step)], config.batch_size)):
        total += len(numbers) * math.ceil(max(len(rows[n].ids) for n in numbers) / multiple) * multiple
    return total


def steps_of(rows: Sequence[Tokens], config: TrainConfig, seed: int) -> list[list[int]]:
    """The row numbers of each step of a run; of a long one those of its first ``MAX_SCANNED_STEPS``."""
    order = batch_order([len(row.ids) for row in rows], rows_per_step(config), seed)
    return list(itertools.islice(order, min(max(total_steps(config, len(rows)), 1), MAX_SCANNED_STEPS)))


def typical_steps(rows: Sequence[Tokens], config: TrainConfig, seed: int, count: int) -> list[list[int]]:
    """The row numbers of ``count`` steps whose sizes are distributed as those of the whole run.

    They are chosen at quantiles of the padded tokens. Multiples of the golden ratio spread these quantiles evenly, so
    that the last few steps are as typical as all of them: their median is near that of the run, unlike the median of
    the run's first steps.
    """
    by_size = sorted(steps_of(rows, config, seed), key=lambda step: padded_tokens(step, rows, config))
    return [by_size[int((0.5 + n * GOLDEN_RATIO) % 1 * len(by_size))] for n in reversed(range(count))]


def rows_per_step(config: TrainConfig) -> int:
    """The rows of an optimizer step; the last step of an epoch may have fewer."""
    return config.batch_size * config.accumulation


def total_steps(config: TrainConfig, rows: int) -> int:
    """Optimizer steps of the run: ``epochs`` over ``rows`` rows where given, else ``steps``."""
    if config.epochs is None:
        return config.steps
    return math.ceil(config.epochs * steps_per_epoch(config, rows))


def in_epochs(step: int, config: TrainConfig, rows: int) -> float:
    """The number of epochs after ``step`` steps."""
    return step / steps_per_epoch(config, rows)


def rows_taken(rows: Sequence[Tokens], config: TrainConfig, seed: int) -> set[int]:
    """The numbers of the rows that a run with ``seed`` trains on; a run shorter than an epoch leaves some out."""
    steps = total_steps(config, len(rows))
    if steps >= steps_per_epoch(config, len(rows)):
        return set(range(len(rows)))
    order = batch_order([len(row.ids) for row in rows], rows_per_step(config), seed)
    return {number for step in itertools.islice(order, steps) for number in step}


def steps_per_epoch(config: TrainConfig, rows: int) -> int:
    """Optimizer steps to go through ``rows`` rows once."""
    return math.ceil(rows / rows_per_step(config))


def interval(config: TrainConfig, key: str, rows: int) -> int | None:
    """``eval_every`` or ``checkpoint_every`` in steps: ``"100"`` is steps, ``"0.5epochs"`` or ``"1epoch"`` is epochs.

    Raises:
        InputError: it is neither.
    """
    text: str | None = getattr(config, key)
    if text is None:
        return None
    number, epochs, rest = text.strip().partition("epoch")
    try:
        every = float(number) * (steps_per_epoch(config, rows) if epochs else 1)
        valid = 0 < every <= LARGEST and rest in ("", "s")
    except ValueError:
        valid = False
    if not valid or not (epochs or every.is_integer()):
        others = " or minutes (10min)" if key == "checkpoint_every" else ""
        raise InputError(f"train.{key}={text}: must be a number of steps (100) or epochs (0.5epochs){others}")
    return max(1, round(every))


def checkpoint_due(
    config: TrainConfig, rows: int, clock: Callable[[], float] = time.monotonic
) -> Callable[[int], bool]:
    """A function that says whether a checkpoint is due after a step; to be called once after each step.

    ``checkpoint_every`` is a number of steps or of epochs, or minutes (``"10min"``) by ``clock``, which is in seconds.

    Raises:
        InputError: it is none of these.
    """
    timed = re.fullmatch(r"(\d+(?:\.\d+)?)\s*min", (config.checkpoint_every or "").strip())
    if timed is None:
        every = interval(config, "checkpoint_every", rows)
        return lambda step: every is not None and step % every == 0
    seconds, last = 60 * float(timed[1]), clock()

    def due(_: int) -> bool:
        nonlocal last
        if clock() - last < seconds:
            return False
        last = clock()
        return True

    return due
