"""The task function: one trial from its configuration to its record.

``run`` reads as the list of what happens; ``check`` is all that can be known without weights.
"""

from __future__ import annotations

import gc
import inspect
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peftsweep import compatibility, data, evaluate, model, record, study, train
from peftsweep import config as configuration
from peftsweep.attach import attach
from peftsweep.config import ROWS_KEYS, Trial, evaluation_identity, model_identity
from peftsweep.data import Example, Rows, Tokens
from peftsweep.display import Observer
from peftsweep.errors import InputError
from peftsweep.evaluate import Evaluation
from peftsweep.initialise import Setting
from peftsweep.measure import Meter, percentile
from peftsweep.record import Result, Status
from peftsweep.schema import Task

log = logging.getLogger(__name__)

WORTH_KEEPING = 5.0  # seconds of tokenising, after which its result is kept in the study's folder
OF_THE_ROWS = ("majority", "random")  # facts that are the same whatever the model says
REMEMBERED = 4  # tokenised training sets: training and validation rows of two datasets
RELOAD_TOLERANCE = 1e-4  # of a token's loss, in nats: above rounding, far below what an evaluation sees

Model = PreTrainedModel | PeftModel
Evaluate = Callable[[Model, PreTrainedTokenizerBase, list[Example]], Evaluation]


# ---- before ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Forecast:
    """What is known of a trial before anything is loaded."""

    trainable_parameters: int | None = None  # None where attaching failed; the trial itself will say why
    total_parameters: int | None = None
    adapter_bytes: int | None = None  # of the file that holds the adapter
    refused: str | None = None  # why it will not be trained


def check(trial: Trial) -> Forecast:
    """Attach the method to the base's skeleton, without weights, data or network (for presets).

    Raises:
        InputError: targets, method or device do not fit.
    """
    key = configuration.content_hash(
        [trial.tree[k] for k in ("device", "model", "method", "targets", "quant", "eval", "train")]
    )
    forecast = _FORECASTS.get(key) or _forecast(trial)
    if forecast.trainable_parameters is not None:
        _FORECASTS[key] = forecast
    return forecast


_FORECASTS: dict[str, Forecast] = {}  # of a sweep over seeds or data, one is enough


def _forecast(trial: Trial) -> Forecast:
    config = trial.config
    model.device(config.device)
    quantization(trial)
    for name in config.eval:
        evaluator(trial, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they come again, and go to the log, when the trial runs
        if reason := refusal(trial):
            bare = model.skeleton(config.model, classes=len(config.dataset.classes))
            return Forecast(0, model.count(bare).total, 0, reason)
        # Some methods begin with random numbers that the meta device lacks, some with the base's (SVD, masks),
        # of which any will do.
        for base, adapter in (("meta", "meta"), ("meta", "cpu"), ("cpu", "cpu")):
            try:
                bare = model.skeleton(config.model, base, len(config.dataset.classes))
                with torch.device(adapter):
                    adapted = _attach(trial, bare, config.train.steps)
                train.make_optimizer(adapted, config.train)  # which may freeze some of the parameters
                counts = model.count(adapted)
                size = model.saved_bytes(adapted) if isinstance(adapted, PeftModel) else counts.trainable_bytes
                return Forecast(counts.trainable, counts.total, size)
            except InputError:
                raise
            except Exception:
                log.debug("%s cannot be attached on the device %s", trial.slug, adapter, exc_info=True)
    return Forecast()


def refusal(trial: Trial) -> str | None:
    """Why the trial's method cannot be trained on its base; None where it can."""
    config = trial.config
    kinds = [compatibility.stored(config.quant)]
    if config.model.task is Task.seq_cls:
        kinds.append("classifier")
        forward = model.skeleton(config.model, classes=len(config.dataset.classes)).forward
        if "past_key_values" not in inspect.signature(forward).parameters:
            kinds.append("encoder")
    setup = {"method_setup": config.method_setup.get("_target_")}
    return compatibility.refusal(config.method | setup if config.method else {}, kinds)


def folder(trial: Trial) -> Path:
    """Where the trial's record is or will be."""
    return study.trial_folder(study.folder(trial.config.study), trial.slug, trial.identity)


def finished(trial: Trial) -> Result | None:
    """The trial's record, if it is done and not forced to run again; it then carries this trial's label too."""
    done = None if trial.config.force else study.result(folder(trial))
    if done is None or not done.status.done:
        return None
    if trial.label not in done.run_info["labels"]:
        done.run_info["labels"].append(trial.label)
        done.write(folder(trial))
    return done


# ---- the trial -------------------------------------------------------------------------------------


def run(trial: Trial, observer: Observer | None = None) -> Result:
    """Train and evaluate ``trial``, unless its study already holds it; the record is written in any case.

    A failure ends up in the record, with its stage and traceback, and not as an exception.

    Raises:
        KeyboardInterrupt: the user interrupted it; it is recorded as cancelled.
    """
    if done := finished(trial):
        return done
    place = folder(trial)
    start = time.perf_counter()
    meter = Meter(model.device(trial.config.device))
    result = _begin(trial, place)
    with _logged(place / "trial.log"):
        status, failure = Status.success, None
        try:
            _run(trial, place, result, meter, observer or Observer())
        except BaseException as error:
            status, failure = _status(error), record.failure(error, meter.current)
            log.log(logging.INFO if status is Status.refused else logging.ERROR, "%s", failure["traceback"])
            if not isinstance(error, Exception):
                _end(result, place, meter, start, status, failure)
                raise
        _end(result, place, meter, start, status, failure)
    if status is Status.success and trial.config.adapter.save:
        study.mark_trained(result)
    gc.collect()  # an exception's frames have held the model until now
    if meter.device.type == "cuda":
        torch.cuda.empty_cache()
    return result


class Refused(Exception):
    """The combination is known not to work."""


def _status(error: BaseException) -> Status:
    if isinstance(error, Refused):
        return Status.refused
    host = isinstance(error, RuntimeError) and evaluate.HOST_OUT_OF_MEMORY in str(error)
    if host or isinstance(error, torch.OutOfMemoryError | MemoryError):
        return Status.oom
    return Status.failed if isinstance(error, Exception) else Status.cancelled


def _run(trial: Trial, place: Path, result: Result, meter: Meter, observer: Observer) -> None:
    config = trial.config
    info = result.train_info

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        observer.stage(name)
        log.info("%s", name)
        with meter.stage(name):
            yield

    if reason := refusal(trial):
        raise Refused(reason)
    earlier = None if config.force else study.trained(place.parent, trial.training)

    with stage("load"):
        tokenizer = model.load_tokenizer(config.model)
        base = _load(trial, tokenizer, meter.device)
    info["base_parameters"] = model.count(base).total
    info["base_bytes"] = base.get_memory_footprint()

    with stage("data"):
        rows = trial.rows or data.load_rows(config.dataset, validation=config.train.eval_every is not None)
        tokens = _tokens(trial, tokenizer, rows.train)
        tests = {name: _test_examples(trial, name, rows, tokenizer) for name in config.eval}
    info["training_rows"] = len(tokens)
    info |= rows.left_out | {"long_rows": rows.left_out.get("long_rows", 0) + len(rows.train) - len(tokens)}
    longest = min(config.dataset.max_length, tokenizer.model_max_length)
    info["truncated_rows"] = sum(len(row.ids) >= longest for row in tokens)

    trained_on = data.questions(data.dataset_examples(config.dataset, rows.train))
    for name, test in tests.items():
        with stage("baseline"):
            scores = _base_scores(trial, name, test, base, tokenizer, place.parent)
        result.eval_info[name] = {f"base_{metric}": score for metric, score in scores.items()}
        result.eval_info[name]["seen_in_training"] = sum(bool(data.questions([one]) & trained_on) for one in test)

    if config.adapter.path is not None:
        with stage("attach"):
            adapted = _restore(trial, base, study.adapter(config.adapter.path))
        counts = model.count(adapted)
        info |= {"trainable_parameters": 0, "total_parameters": counts.total, "steps": 0, "train_seconds": 0.0}
    elif earlier:
        with stage("attach"):
            adapted = _restore(trial, base, (earlier.folder or place) / study.ADAPTER)
        info |= earlier.train_info | {"trained_by": earlier.trial}
        result.memory["train"] = earlier.memory["train"]
    else:
        with stage("attach"):
            torch.manual_seed(config.seed)  # the adapter's initial weights are drawn from here on
            steps = train.total_steps(config.train, len(tokens))
            adapted = _attach(trial, base, steps, _initialise(trial, place, base, tokens, tokenizer))
        with stage("train"), (place / record.STEPS).open("w", encoding="utf-8") as lines:
            trained = train.train(
                adapted,
                tokens,
                config.train,
                pad_id=int(tokenizer.pad_token_id),
                seed=config.seed,
                meter=meter,
                log=partial(_step, lines, observer),
                validate=_validation(trial, rows.validation, adapted, tokenizer) if rows.validation else None,
            )
        counts = model.count(adapted)
        info |= {"trainable_parameters": counts.trainable, "total_parameters": counts.total} | _train_info(trained)

    for name, test in tests.items():
        with stage("eval"):
            evaluation = evaluator(trial, name)(adapted, tokenizer, test)
        result.eval_info[name] |= record.plain(evaluation.scores) | evaluation.facts
        record.write_lines(place / "predictions" / f"{name}.jsonl", evaluation.predictions)

    if config.adapter.save:
        with stage("save"):
            info["adapter_bytes"] = model.save(adapted, place / study.ADAPTER)
    if config.adapter.save and config.adapter.check:
        probe = data.collate(tokens[: config.train.batch_size], int(tokenizer.pad_token_id)).to(meter.device)
        with torch.no_grad():
            losses = model.answer_losses(adapted, probe)
        del adapted, base  # two bases would not fit where one just does
        with stage("reload"):
            info |= _reload(trial, place, tokenizer, probe, losses)
        if config.adapter.merge and config.method:
            with stage("merge"):
                info |= _merge(trial, place, tokenizer, probe, losses)


# ---- its parts -------------------------------------------------------------------------------------


def quantization(trial: Trial) -> Any:
    """The transformers quantization config that ``quant`` names; None for none."""
    return _instantiate(trial.config.quant, "quant") if trial.config.quant else None


def evaluator(trial: Trial, name: str) -> Evaluate:
    """The evaluation ``eval.<name>`` as a function of model, tokenizer and examples."""
    node = trial.config.eval[name]
    options = {key: value for key, value in node.items() if key not in ROWS_KEYS}
    function: Evaluate = _instantiate(options | {"_partial_": True}, f"eval.{name}")
    return function


def _instantiate(node: dict[str, Any], key: str) -> Any:
    try:
        return instantiate(node, _convert_="all")
    except HydraException as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise InputError(f"{key}: {reason}") from error


def _attach(
    trial: Trial,
    base: PreTrainedModel,
    steps: int,
    initialise: Callable[[Any, Callable[..., PeftModel]], PeftModel] | None = None,
) -> Model:
    config = trial.config
    task = {"task_type": config.model.task.value.upper()}  # PEFT's names of them
    method: Any = _instantiate(task | config.method, "method") if config.method else None
    if method is not None and getattr(method, "total_step", None) and steps:
        # AdaLoRA plans its budget over the run, whose length in steps is known only with the data.
        method.tinit, method.tfinal = (round(n * steps / method.total_step) for n in (method.tinit, method.tfinal))
        method.total_step = steps
    if config.method_setup and initialise is None and hasattr(method, "init_lora_weights"):
        method.init_lora_weights = True  # a forecast, without data: as many weights, other numbers
    return attach(
        base,
        method,
        config.targets,
        config.model.roles,
        config.method_inputs,
        float32=config.train.autocast_adapter_dtype,
        initialise=initialise,
    )


def _initialise(
    trial: Trial, place: Path, base: PreTrainedModel, tokens: list[Tokens], tokenizer: PreTrainedTokenizerBase
) -> Callable[[Any, Callable[..., PeftModel]], PeftModel] | None:
    """What ``method_setup`` names, as ``attach`` calls it; None where the method needs no such thing."""
    config = trial.config
    if not config.method_setup:
        return None
    function = _instantiate(config.method_setup | {"_partial_": True}, "method_setup")
    classes = len(config.dataset.classes)

    def initialise(method: Any, put: Callable[..., PeftModel]) -> PeftModel:
        setting = Setting(
            base=base,
            method=method,
            attach=put,
            unquantised=lambda: model.load(config.model, None, base.device, classes, config.seed),
            rows=tokens,
            tokenizer=tokenizer,
            folder=place / study.ADAPTER if config.adapter.save else None,
            seed=config.seed,
        )
        adapted: PeftModel = function(setting)
        return adapted

    return initialise


def _restore(trial: Trial, base: PreTrainedModel, saved: Path) -> Model:
    config = trial.config
    return model.restore(base, saved, config.method_inputs, float32=config.train.autocast_adapter_dtype)


def _load(trial: Trial, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> PreTrainedModel:
    config = trial.config
    base = model.load(config.model, quantization(trial), device, len(config.dataset.classes), config.seed)
    if model.classifies(base):
        base.config.pad_token_id = tokenizer.pad_token_id  # a decoder's head looks at the last token before it
    return base


def _tokens(trial: Trial, tokenizer: PreTrainedTokenizerBase, rows: list[data.Row]) -> list[Tokens]:
    """The dataset's rows as the model is trained on them; remembered by their content.

    Those of the last trials are kept in memory, those that took long also in the study's folder.
    """
    own, task = trial.config.dataset, trial.config.model.task
    how = [own.prompt, own.answer, own.reader, own.classes, own.max_length, own.drop_long, own.chat, task]
    vocabulary = [tokenizer.name_or_path, trial.config.model.revision, tokenizer.model_max_length]
    key = configuration.content_hash([how, vocabulary, data.fingerprint(rows)])
    if key not in _TOKENS:
        file = study.folder(trial.config.study) / ".tokens" / f"{key}.parquet"
        if file.exists():
            _TOKENS[key] = data.read_tokens(file)
        else:
            start = time.perf_counter()
            _TOKENS[key] = _tokenize(trial, tokenizer, rows)
            if time.perf_counter() - start > WORTH_KEEPING:
                data.write_tokens(file, _TOKENS[key])
        while len(_TOKENS) > REMEMBERED:
            _TOKENS.pop(next(iter(_TOKENS)))
    return _TOKENS[key]


_TOKENS: dict[str, list[Tokens]] = {}


def _tokenize(trial: Trial, tokenizer: PreTrainedTokenizerBase, rows: list[data.Row]) -> list[Tokens]:
    own = trial.config.dataset
    examples = data.dataset_examples(own, rows)
    if trial.config.model.task is Task.seq_cls:
        return data.tokenize_for_classes(tokenizer, examples, own.max_length, own.classes)
    if own.chat:
        examples = data.through_chat_template(tokenizer, examples)
    tokens = data.tokenize(tokenizer, examples, own.max_length + own.drop_long)  # by one more, to see what is too long
    if own.drop_long:
        tokens = [row for row in tokens if len(row.ids) <= own.max_length]
    if not tokens:
        raise InputError(f"dataset.drop_long=true: no row has at most dataset.max_length={own.max_length} tokens")
    return tokens


def _test_examples(trial: Trial, name: str, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    test = data.evaluation_rows(configuration.evaluation_source(trial.config, name), f"eval.{name}", rows.test)
    return _asked(trial, name, test, tokenizer)


def _asked(trial: Trial, name: str, rows: list[data.Row], tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Rows as ``eval.<name>`` shows them to the model."""
    examples = configuration.test_examples(trial.config, name, rows)
    return data.through_chat_template(tokenizer, examples) if trial.config.dataset.chat else examples


def _base_scores(
    trial: Trial, name: str, test: list[Example], base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, root: Path
) -> dict[str, Any]:
    """The untouched base's scores and what it answers, kept in the study under everything that changes them."""
    device = base.device
    key = configuration.content_hash(
        {
            "model": model_identity(trial.config.model),
            "quant": trial.config.quant,
            "head": trial.config.seed if model.classifies(base) else None,  # a new one is drawn from the seed
            "eval": evaluation_identity(trial.config.eval[name]),
            "examples": data.fingerprint(example._asdict() for example in test),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "packages": record.environment()["packages"],
        }
    )
    file = root / ".base" / f"{name}-{key}.json"
    if not file.exists():
        found = evaluator(trial, name)(base, tokenizer, test)
        own = {fact: value for fact, value in found.facts.items() if fact not in OF_THE_ROWS}
        record.write_json(file, found.scores | own)
    scores: dict[str, Any] = record.read_json(file)
    return scores


def _reload(
    trial: Trial, place: Path, tokenizer: PreTrainedTokenizerBase, probe: data.Batch, losses: torch.Tensor
) -> dict[str, Any]:
    """Load what was saved onto a fresh base: does it answer a batch as the trained model does?"""
    try:
        base = _load(trial, tokenizer, losses.device)
        again = _restore(trial, base, place / study.ADAPTER)
        with torch.no_grad():
            difference = (model.answer_losses(again, probe) - losses).abs().max().item()
    except Exception as error:  # whatever PEFT raises; the trial itself has succeeded
        log.exception("the saved adapter cannot be loaded")
        return {"reloads": False, "reload_error": _first_line(error)}
    return {"reloads": difference < RELOAD_TOLERANCE, "reload_difference": difference}


def _merge(
    trial: Trial, place: Path, tokenizer: PreTrainedTokenizerBase, probe: data.Batch, losses: torch.Tensor
) -> dict[str, Any]:
    """Write the merged model: does it answer a batch as the base with its adapter does?

    A quantised base is dequantised first, exactly; 8-bit layers also round what flows through them, so
    their merged model differs by that.
    """
    try:
        merged = model.merge(_load(trial, tokenizer, losses.device), place / study.ADAPTER)
        with torch.no_grad():
            difference = (model.answer_losses(merged, probe) - losses).abs().max().item()
        merged.save_pretrained(place / study.MERGED)
        tokenizer.save_pretrained(place / study.MERGED)
    except Exception as error:  # whatever PEFT raises; the trial itself has succeeded
        log.exception("the adapter cannot be merged")
        return {"merges": False, "merge_error": _first_line(error)}
    return {"merges": True, "merge_difference": difference}


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0].removesuffix(": ")


def _validation(
    trial: Trial, rows: list[data.Row], adapted: Model, tokenizer: PreTrainedTokenizerBase
) -> Callable[[], dict[str, float]]:
    """Loss on the validation rows, and the evaluations that judge on the dataset's own rows, on them."""
    config = trial.config
    tokens = _tokens(trial, tokenizer, rows)
    sources = {name: configuration.evaluation_source(config, name) for name in config.eval}
    own = [name for name, source in sources.items() if not source.path and not source.hub]

    def validate() -> dict[str, float]:
        adapted.eval()
        scores = {"loss": evaluate.mean_loss(adapted, tokens, pad_id=int(tokenizer.pad_token_id))}
        for name in own:
            found = evaluator(trial, name)(adapted, tokenizer, _asked(trial, name, rows, tokenizer)).scores
            scores |= {f"{name}.{metric}": score.value for metric, score in found.items()}
        return scores

    return validate


def _step(lines: Any, observer: Observer, row: dict[str, Any]) -> None:
    lines.write(record.line(row))
    lines.flush()
    observer.step(row)


def _train_info(trained: train.Trained) -> dict[str, Any]:
    seconds = sum(trained.step_seconds)
    return {
        "steps": trained.steps,
        "epochs": trained.epochs,
        "tokens": trained.tokens,
        "padding_fraction": trained.padding_fraction,
        "final_loss": trained.final_loss,
        "best_loss": trained.best_loss,
        "best_step": trained.best_step,
        "train_seconds": seconds,
        "tokens_per_second": trained.tokens / seconds if seconds else None,
        **{f"step_seconds_p{p}": percentile(trained.steady_seconds, p) for p in (50, 95, 99)},
    }


# ---- the record ------------------------------------------------------------------------------------


def _begin(trial: Trial, place: Path) -> Result:
    """An empty folder but for the composed configuration, as Hydra writes it, and the record to be filled."""
    place.mkdir(parents=True, exist_ok=True)
    (place / record.RESULT).unlink(missing_ok=True)  # of a failed try
    record.write_text(place / ".hydra" / "config.yaml", OmegaConf.to_yaml(trial.tree))
    record.write_text(place / ".hydra" / "overrides.yaml", OmegaConf.to_yaml(trial.overrides))
    run_info = {
        "trial": place.name,
        "labels": [trial.label],
        "study": trial.config.study,
        "identity": trial.identity,
        "training": trial.training,
        "created_at": record.now(),
        "host": record.host(),
        **record.git(),
    }
    return Result(run_info, trial.choices, trial.tree, meta_info=record.environment())


def _end(
    result: Result, place: Path, meter: Meter, start: float, status: Status, failure: dict[str, str] | None
) -> None:
    result.run_info |= {"status": status.value, "error": failure, "total_seconds": time.perf_counter() - start}
    for name, stage in meter.stages.items():
        result.memory[name] = stage.memory()
        if name != "train":  # whose seconds are the sum of its steps
            result.train_info[f"{name}_seconds"] = stage.seconds
    result.write(place)


@contextmanager
def _logged(file: Path) -> Iterator[None]:
    """All logging and warnings of the block go to ``file``, and only there."""
    for name in ("transformers", "huggingface_hub", "datasets"):  # each prints to stderr by a handler of its own
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    transformers.utils.logging.disable_progress_bar()
    logging.captureWarnings(True)
    handler = logging.FileHandler(file, mode="w", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    root.handlers = [handler]
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.handlers = handlers
        root.setLevel(level)
        logging.captureWarnings(False)
        handler.close()
