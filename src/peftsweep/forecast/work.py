"""The work of a trial: the micro-batches of its training and of its evaluations, and the operations of both."""

from __future__ import annotations

import inspect
import itertools
import logging
import math
import pydoc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from peftsweep.config import build, identity
from peftsweep.config.compose import Trial
from peftsweep.data.batches import batch_order, micro_batches
from peftsweep.data.rows import Rows
from peftsweep.data.templates import Example
from peftsweep.data.tokens import Tokens, prompt_ids, tokenize
from peftsweep.errors import InputError
from peftsweep.evaluation import evaluate, likelihood
from peftsweep.evaluation.static_decoding import may_suit
from peftsweep.evaluation.text import overlap
from peftsweep.forecast import forecast
from peftsweep.forecast.operations import Ledger
from peftsweep.forecast.predict import Shape
from peftsweep.forecast.trace import Step, Tracer
from peftsweep.observe import streams
from peftsweep.schema import TrainConfig
from peftsweep.training import length as training_length
from peftsweep.training.capture import unfit

log = logging.getLogger(__name__)

Found = TypeVar("Found")

MOST_SECONDS = 10.0  # CPU seconds of traces in a process; after them the traces of similar trials are used
RANKS = ("r", "lora_alpha", "lora_dropout", "init_r", "target_r")  # keys in which similar methods may differ
MOST_BATCHES = 2_000  # steps of a run from which the mean batch size is computed
# Keys of train that change the number of steps, but not the time of a step.
LENGTHS = (
    *identity.RATES,
    "steps",
    "epochs",
    "eval_every",
    "keep_best",
    "best_metric",
    "checkpoint_every",
    "log_every",
)


@dataclass(frozen=True)
class Batches:
    """The micro-batches of a run or an evaluation: the mean shape, and their number."""

    shape: Shape
    count: float
    scale: float = 1.0  # mean tokens / tokens of ``shape``, whose sizes are rounded to whole numbers

    @property
    def tokens(self) -> float:
        """The mean tokens of a micro-batch, with padding."""
        return self.shape.tokens * self.scale


@dataclass(frozen=True)
class EvaluationWork:
    """The work of an evaluation: forward passes over batches, decoding steps, and how often it is done."""

    read: Batches
    tokens: tuple[float, float] = (0.0, 0.0)  # decoding steps of a batch: (lowest, highest) number
    of_base: int = 1  # number of times with the untouched base
    of_trained: int = 1  # number of times with the trained model: after training, or in validations

    @property
    def key(self) -> tuple[Shape, float]:
        """Equal for evaluations with the same operations."""
        return self.read.shape, self.tokens[1]


@dataclass(frozen=True)
class Traced:
    """The operations of a trial's parts."""

    step: Step | None
    # by EvaluationWork.key: the operations of a forward pass and of a decoding step
    evaluations: Mapping[tuple[Shape, float], tuple[Ledger, Ledger | None]]
    never_captured: str | None = None  # why the steps of its training are not captured as CUDA graphs, also on a GPU
    decodes_captured: bool = True  # whether a GPU captures its decoding steps
    step_from_similar: bool = False  # whether ``step`` is that of a similar trial
    evaluations_from_similar: bool = False  # whether ``evaluations`` are those of a similar trial


_TRACED: dict[str, Traced | None] = {}
_SIMILAR: dict[str, Traced] = {}
_EVALUATIONS: dict[str, Traced] = {}  # by a hash of model, quantisation and evaluations, without the method
_ONCE: dict[str, Any] = {}  # results of ``once``
CACHES = (_TRACED, _SIMILAR, _EVALUATIONS, _ONCE)
_SPENT = [0.0]


def once(key: Any, make: Callable[[], Found]) -> Found:
    """The result of ``make()``, cached in this process by the content of ``key``."""
    digest = identity.content_hash(key)
    if digest not in _ONCE:
        _ONCE[digest] = make()
    result: Found = _ONCE[digest]
    return result


def number_of_steps(trial: Trial, run: Batches | None) -> int | None:
    """The number of optimizer steps; None where it depends on rows that are not on this machine."""
    config = trial.config
    if config.adapter.path is not None or (config.train.epochs is None and config.train.steps == 0):
        return 0
    if config.train.epochs is None:
        return config.train.steps
    return None if run is None else round(run.count / config.train.accumulation)


# ---- what is run -------------------------------------------------------------------------------------


def run_of(
    trial: Trial, tokenizer: PreTrainedTokenizerBase | None, tokens: Sequence[Tokens] | None
) -> tuple[Batches | None, str | None]:
    """The micro-batches of the training; or None and the reason why they are unknown.

    If the rows are not on this machine, each micro-batch is as long as ``dataset.max_length`` allows.
    """
    config = trial.config.train
    if number_of_steps(trial, None) == 0:
        return None, None
    rows = trial.rows
    if not tokens and rows is not None and tokenizer is not None:

        def read() -> Batches:
            return _batches(build.training_tokens(trial, tokenizer, rows.train), config, 0)

        train = {key: value for key, value in trial.tree["train"].items() if key not in identity.RATES}
        of_rows = [trial.tree["dataset"], rows.fingerprints["train"], train, build.virtual_tokens(trial)]
        return once(["run", identity.model_key(trial), *of_rows], read), None
    if tokens:  # the mean batch of seed 0, scaled, so that trials of all seeds share its operations and its records
        usual = _batches(tokens, config, 0)
        own = _batches(tokens, config, trial.config.seed) if trial.config.seed else usual
        return Batches(usual.shape, own.count, own.tokens / usual.shape.tokens), None
    if config.epochs is not None:
        return None, "train.epochs is a number of steps only with the rows, which are not here yet"
    return Batches(forecast.longest(trial), config.steps * config.accumulation), None


def _batches(rows: Sequence[Tokens], config: TrainConfig, seed: int) -> Batches:
    order = batch_order([len(row.ids) for row in rows], training_length.rows_per_step(config), seed)
    total = training_length.total_steps(config, len(rows))
    steps = list(itertools.islice(micro_batches(order, config.batch_size), min(total, MOST_BATCHES)))
    batches = [[rows[number] for number in numbers] for step in steps for numbers in step]
    mean = _mean(batches, config.pad_to_multiple_of)
    return replace(mean, count=mean.count * total / max(len(steps), 1))


def _mean(batches: Sequence[Sequence[Tokens]], multiple: int = 1) -> Batches:
    """The batch of mean sizes; each batch is padded to its longest row, rounded up to ``multiple``."""
    widths = [math.ceil(max(len(row.ids) for row in batch) / multiple) * multiple for batch in batches]
    tokens = statistics.fmean(len(batch) * width for batch, width in zip(batches, widths, strict=True))
    rows = max(round(statistics.fmean(map(len, batches))), 1)
    length = max(round(tokens / rows), 2)
    starts = [max(min(row.answer_start for row in batch), 1) for batch in batches]
    behind = statistics.fmean(width - start for width, start in zip(widths, starts, strict=True))
    answers = statistics.fmean(sum(row.answer_tokens for row in batch) for batch in batches)
    shape = Shape(rows, length, min(max(round(behind), 1), length - 1), max(round(answers), 1))
    return Batches(shape, len(batches), tokens / (rows * length))


def evaluations(
    trial: Trial, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[dict[str, EvaluationWork], str | None]:
    """The work of each evaluation and validation, by name; or an empty dict and the reason why it is unknown."""
    if tokenizer is None or trial.rows is None:
        return {}, "the test rows or the model's tokenizer are not here yet"
    rows, work_by_name = trial.rows, dict[str, EvaluationWork]()
    validate = partial(_validations, trial, rows, tokenizer)
    own = [identity.model_key(trial), trial.tree["dataset"], rows.fingerprints, build.virtual_tokens(trial)]
    for name in trial.config.eval:
        try:
            read = partial(_read_evaluation, trial, name, rows, tokenizer)
            work = once(["evaluation", name, trial.tree["eval"][name], own], read)
        except Exception as error:
            log.debug("the rows of eval.%s", name, exc_info=True)
            kind = "" if isinstance(error, InputError) else f" ({type(error).__name__})"
            return {}, f"eval.{name}: its rows are not here yet{kind}"
        if work is None:
            return {}, f"eval.{name}: what it does with the model is not known"
        work_by_name[name] = work
    return work_by_name | once(["validations", trial.tree["train"], trial.tree["eval"], own], validate), None


def _validations(trial: Trial, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> dict[str, EvaluationWork]:
    """The work of all validations of a training, under names that no evaluation has."""
    config = trial.config.train
    every = training_length.interval(config, "eval_every", len(rows.train))
    if every is None or not rows.validation or number_of_steps(trial, None) == 0:
        return {}
    size = int(inspect.signature(likelihood.log_likelihoods).parameters["batch_size"].default)
    read = _mean(_in_batches(build.training_tokens(trial, tokenizer, rows.validation), size))
    work_by_name: dict[str, EvaluationWork | None] = {"validation loss": EvaluationWork(read)}
    for name in trial.config.eval:
        if examples := build.validation_examples(trial, name, rows, tokenizer):
            work_by_name[f"validation {name}"] = _work_of_examples(trial, name, examples, tokenizer)
    times = math.ceil(training_length.total_steps(config, len(rows.train)) / every)
    return {name: replace(work, of_base=0, of_trained=times) for name, work in work_by_name.items() if work}


def _read_evaluation(trial: Trial, name: str, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> EvaluationWork | None:
    return _work_of_examples(trial, name, build.test_examples(trial, name, rows, tokenizer), tokenizer)


def _work_of_examples(
    trial: Trial, name: str, examples: list[Example], tokenizer: PreTrainedTokenizerBase
) -> EvaluationWork | None:
    function, evaluator = pydoc.locate(str(trial.config.eval[name].get("_target_"))), build.evaluator(trial, name)
    defaults = {key: one.default for key, one in inspect.signature(evaluator).parameters.items()}
    size, limit = int(defaults.get("batch_size", 16)), int(defaults.get("max_length", 768))
    new = int(defaults.get("max_new_tokens", 0))
    if not examples:
        return None
    if function in (evaluate.generation, overlap.generated_text) or (
        function is evaluate.instruction and "generation" in defaults["ways"]
    ):
        prompts = [Tokens(ids, len(ids) - 1) for ids in prompt_ids(tokenizer, examples, limit)]
        answers = tokenizer([one.answer for one in examples], add_special_tokens=False).input_ids
        least = min(max(map(len, answers)) + 1, new)
        return EvaluationWork(_mean(_in_batches(prompts, size)), (float(least), float(new)))
    if function in (evaluate.multiple_choice, evaluate.instruction) or (
        function is evaluate.classification and not trial.config.dataset.classes
    ):
        return EvaluationWork(
            _mean(_in_batches(_questions(examples, tokenizer, limit), max(1, size // _most(examples))))
        )
    if function in (evaluate.perplexity, evaluate.classification):
        return EvaluationWork(_mean(_in_batches(tokenize(tokenizer, examples, limit), size)))
    if function is evaluate.text_perplexity:
        whole = [len(ids) for ids in tokenizer([one.prompt + one.answer for one in examples]).input_ids]
        windows = sum(math.ceil(count / (limit - 1)) for count in whole)
        length = max(round(min(limit, sum(whole) / windows)), 2)
        return EvaluationWork(Batches(Shape(size, length, length - 1, size * (length - 1)), windows / size))
    return None


def _most(examples: Sequence[Example]) -> int:
    return max(max(len(row.choices) for row in examples), 1)


def _questions(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, limit: int) -> list[Tokens]:
    """Each question followed by all its choices, because the question is read once for all of them."""
    texts = [(row.choices[0].prompt if row.choices else row.prompt) for row in examples]
    choices = ["".join(choice.answer for choice in row.choices) or row.answer for row in examples]
    prompts, answers = (tokenizer(part, add_special_tokens=False).input_ids for part in (texts, choices))
    joined = [(first[:limit], second) for first, second in zip(prompts, answers, strict=True)]
    return [Tokens([*first, *second], max(len(first), 1)) for first, second in joined]


def _in_batches(rows: Sequence[Tokens], size: int) -> list[list[Tokens]]:
    """The batches of an evaluation: the longest rows first, so that the rows of a batch have similar lengths."""
    ordered = sorted(rows, key=lambda row: -len(row.ids))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


# ---- its operations ----------------------------------------------------------------------------------


def step_key(trial: Trial, run: Batches | None, where: str) -> list[Any]:
    """The values that decide the seconds of a step, except for the device; their hash identifies the step."""
    tree = {key: trial.tree[key] for key in identity.FORECAST_KEYS if key not in ("device", "eval", "train")}
    tree["train"] = {key: value for key, value in trial.tree["train"].items() if key not in LENGTHS}
    return [where, *identity.model_key(trial), tree, asdict(run.shape) if run else None]


def trace(
    trial: Trial, run: Batches | None, evaluations: Sequence[EvaluationWork], where: str, *, own: bool = False
) -> Traced | None:
    """The operations of a micro-batch and of the evaluations on a device type ``where`` ("cpu" or "cuda").

    Without ``own`` those of a similar trial are used, after many traces in this process. None if the method cannot be
    attached on the meta device.
    """
    key_parts = step_key(trial, run, where)
    sizes = [[asdict(work.read.shape), work.tokens[1]] for work in evaluations]
    key = identity.content_hash([*key_parts, sizes])
    if key in _TRACED:
        return _TRACED[key]
    *of_the_model, tree, shape = key_parts
    quantised = trial.config.quant
    method = {key: value for key, value in trial.tree["method"].items() if key not in (*forecast.AIMS, *RANKS)}
    # Trials that differ only in the rank and the targets of the method count as similar.
    similar_key = identity.content_hash([of_the_model, quantised, method, tree["train"], shape, sizes])
    many = _SPENT[0] > MOST_SECONDS and not own
    if many and similar_key in _SIMILAR:
        return replace(_SIMILAR[similar_key], step_from_similar=True, evaluations_from_similar=True)
    base_key = identity.content_hash([where, of_the_model, trial.tree["quant"], sizes])
    similar = _EVALUATIONS.get(base_key) if many else None
    begun = time.process_time()
    with streams.without_warnings():
        traced = forecast.on_skeleton(
            forecast.without_initialisation(trial),
            build.storage(trial),
            lambda adapted: _trace_parts(
                adapted, trial.config.train, run, evaluations if similar is None else (), where
            ),
            (("meta", "meta"), ("meta", "cpu")),
        )
    _SPENT[0] += time.process_time() - begun
    if traced and similar is not None:
        traced = replace(traced, evaluations=similar.evaluations, evaluations_from_similar=True)
    _TRACED[key] = traced
    if traced:
        _SIMILAR[similar_key] = traced
        _EVALUATIONS.setdefault(base_key, traced)
    return traced


def _trace_parts(
    adapted: build.Model, config: TrainConfig, run: Batches | None, evaluations: Sequence[EvaluationWork], where: str
) -> Traced:
    tracer = Tracer(adapted, config, where)
    ledgers = {}
    for work in evaluations:
        shape = work.read.shape
        decode = tracer.decode(shape.rows, shape.length + int(work.tokens[1]) // 2) if work.tokens[1] else None
        ledgers[work.key] = tracer.read(shape), decode
    step, off = tracer.step(run.shape) if run else None, unfit(adapted, config)
    return Traced(step, ledgers, off, decodes_captured=may_suit(adapted))
