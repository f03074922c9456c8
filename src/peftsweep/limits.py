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
LARGEST_SCALE = 1e18  # of options of a method: float32 holds it, and as a whole number 64 bits do


@dataclass(frozen=True)
class Range:
    """What a number may be, both ends included; ``above``, ``below`` and ``other_than`` are not."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    other_than: float = math.nan

    def __contains__(self, number: float) -> bool:
        inside = self.least <= number <= self.most and self.above < number < self.below
        return inside and number != self.other_than

    def __str__(self) -> str:
        ends = {"at least": self.least, "at most": self.most, "above": self.above, "below": self.below}
        ends["other than"] = self.other_than
        return " and ".join(f"{word} {end:.12g}" for word, end in ends.items() if math.isfinite(end))


SEED = Range(least=0, most=LARGEST_SEED)
COUNT = Range(least=1, most=LARGEST)
COUNT_OR_ZERO = Range(least=0, most=LARGEST)  # a count that may be 0
WHOLE = Range(least=-LARGEST, most=LARGEST)
FLOAT = Range(least=-LARGEST_SCALE, most=LARGEST_SCALE)
RATE = Range(least=0, most=LARGEST_FLOAT32)
NON_NEGATIVE = Range(least=0, most=LARGEST_SCALE)
POSITIVE = Range(above=0, most=LARGEST_SCALE)
BELOW_1 = Range(least=0, below=1)
SHARE = Range(least=0, most=1)
ANY = Range(least=-(2**63), most=2**63 - 1)
PATTERNS: dict[Range, tuple[str, ...]] = {  # where several patterns fit a key, the first counts
    SEED: ("seed", "dataset.split_seed", "method.*seed", "method.*prng_key", "hydra.sweeper.sampler.seed"),
    Range(above=0, below=1): (
        "dataset.train_fraction",
        "method.beta?",
        "adapter.scales.*",
        "tune.tie",
        "league.difference",
    ),
    Range(above=0, most=0.5): ("halving.min_fraction",),
    Range(above=0, most=LARGEST_FLOAT32): ("tune.rates.*",),
    Range(least=-LARGEST, most=LARGEST, other_than=0): ("hydra.launcher.n_jobs",),  # of joblib: -1 is all cores
    Range(least=2, most=1000): ("tune.seeds", "league.seeds"),
    Range(least=2, most=LARGEST): ("dataset.max_length", "eval.*.max_length", "halving.factor"),
    Range(least=1, most=LARGEST_SCALE): ("method.lora_alpha", "method.eva_config.rho"),
    Range(above=0, most=1): ("method.sparse_rate", "dataset.fraction"),
    Range(least=-1, most=LARGEST): ("method.decompose_factor",),
    Range(least=0, most=1e6): ("train.epochs", "method.*epsilon"),
    Range(least=1, most=5_256_000): ("hydra.launcher.timeout_min",),  # ten years
    BELOW_1: (
        *("method.*dropout*", "method.*_beta", "method.sparsity", "model.architecture.*dropout*"),
        *("train.optimizer_kwargs.betas.*", "train.optimizer_kwargs.momentum", "train.optimizer_kwargs.rho"),
    ),
    SHARE: (
        *("method.weight_tying", "method.svd_threshold", "method.eva_config.tau", "hydra.sweeper.max_failure_rate"),
        "model.architecture.partial_rotary_factor",
    ),
    POSITIVE: (
        *("method.softmax_temperature", "method.*.stable_gamma", "method.alpha_pattern.*", "method.effective_rank"),
        *("train.optimizer_kwargs.loraplus_lr_ratio", "model.architecture.*theta", "hydra.launcher.mem_gb"),
    ),
    RATE: ("train.learning_rate", "train.learning_rate_scale", "train.weight_decay", "train.clip", "train.warmup"),
    NON_NEGATIVE: (
        *("train.optimizer_kwargs.eps", "train.optimizer_kwargs.*_decay", "model.architecture.*eps*"),
        *("method.*eps", "method.*_bound", "method.*_std", "method.init_scale", "method.*_weight"),
        *("method.regularization_alpha", "method.*_decay_factor", "method.*_exponent", "method.kasa_config.*"),
        *("quant.llm_int8_threshold", "hydra.launcher.ray.remote.num_?pus"),
    ),
    COUNT_OR_ZERO: (
        "search.trial",
        *("train.steps", "inference.warmup", "profiler.wait", "profiler.warmup", "method_inputs.*"),
        *("method.oft_block_size", "method.boft_block_size", "method.*_warmup", "method.num_frozen_tokens"),
        *("method.psoft_svd_lowrank_niter", "method.*token_ids.*", "method.*token_indices*", "method.*_tokens.*"),
        *("method.layers_to_transform*", "method.layer_replication.*", "method.*mask.*", "eval.*.num_fewshot"),
        *("model.architecture.*_token_id", "hydra.launcher.ray.remote.max_retries", "hydra.launcher.max_num_timeout"),
        *("hydra.launcher.signal_delay_s", "hydra.launcher.gpus_per_node"),
    ),
    COUNT: (
        *("dataset.samples", "dataset.validation_samples", "dataset.max_characters"),
        *(f"model.architecture.{name}" for name in ("num_*", "n_*", "*_size", "*_dim", "max_*")),
        *("train.batch_size", "train.accumulation", "train.pad_to_multiple_of", "train.log_every"),
        "train.patience",
        *("method.r", "method.rank_pattern.*", "halving.min_steps", "halving.rung"),
        *("tune.ranks.*", "tune.finalists", "league.trials"),
        *(f"eval.*.{name}" for name in ("samples", "batch_size", "max_new_tokens", "num_beams", "stride", "limit")),
        *("inference.samples", "inference.runs", "inference.batch_sizes.*"),
        *("inference.categories.*.new_tokens", "inference.categories.*.prompt_tokens"),
        *("profiler.steps", "profiler.active", "profiler.top", "profiler.max_entries", "profiler.sizes.*"),
        *("hydra.launcher.array_parallelism", "hydra.launcher.cpus_per_task", "hydra.launcher.nodes"),
        *("hydra.launcher.tasks_per_node", "hydra.launcher.cpus_per_gpu"),
        *("hydra.sweeper.n_trials", "hydra.sweeper.n_jobs"),
    ),
}
RANGES = {pattern: span for span, patterns in PATTERNS.items() for pattern in patterns}


@dataclass(frozen=True)
class Option:
    """A number that the class or function of a section takes: its range by its type alone, and its default."""

    usual: Range
    default: Any = None

    @classmethod
    def of_type(cls, *, whole: bool, default: Any, known: bool) -> Option:
        """Of a number that may be ``whole`` alone; where its owner is ``known`` (PEFT, peftsweep) that is a count."""
        return cls((COUNT if known else WHOLE) if whole else FLOAT, default)


def allowed(key: str, option: Option | None = None) -> Range:
    """What the number ``key`` may be: by the table, else as an option of its type; its own default always may."""
    span = _range(key) or (option.usual if option else FLOAT if key.startswith("method.") else ANY)
    default = option.default if option else None
    if isinstance(default, int | float) and not isinstance(default, bool):
        return replace(span, least=min(span.least, default), most=max(span.most, default))
    return span


def check(tree: Mapping[str, Any], options: Mapping[str, Option]) -> None:
    """Refuse a number that is not finite or out of its key's range.

    ``options`` are the numbers that the classes and functions of the sections take, by their dotted keys.

    Raises:
        InputError: the line names the key, the number and its range.
    """
    for key, number in numbers(tree):
        if not math.isfinite(number):
            raise InputError(f"{key}={number}: must be a finite number")
        if number not in (span := allowed(key, options.get(key))):
            raise InputError(f"{key}={number}: must be {span}")


@functools.cache
def _range(key: str) -> Range | None:
    return next((span for pattern, span in RANGES.items() if fnmatchcase(key, pattern)), None)


def numbers(tree: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """Each dotted key that holds a number; of a list with the place in it."""
    if isinstance(tree, list | tuple):
        tree = {str(place): value for place, value in enumerate(tree)}
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            yield from numbers(value, f"{key}.{name}" if key else str(name))
    elif isinstance(tree, int | float) and not isinstance(tree, bool):
        yield key, tree
