"""Forecast a trial before anything is loaded: whether it is refused, its sizes, and the memory that it will need."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import multiprocessing
import pickle
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import connection
from typing import Any, TypeVar

import torch
from peft import PeftModel

from peftsweep.config import build, checks, identity
from peftsweep.config.compose import Trial
from peftsweep.config.identity import RATES, forecast_keys, model_key, sizes_key
from peftsweep.data.tokens import Tokens
from peftsweep.errors import InputError
from peftsweep.forecast.predict import Prediction, Shape, predict, shapes, skeleton, smaller
from peftsweep.models import compatibility, coverage, parts, probe, saved
from peftsweep.models import model as models_model
from peftsweep.models.quantised import libraries
from peftsweep.models.shapes import without_numbers
from peftsweep.observe import measure, streams
from peftsweep.observe.display import size
from peftsweep.schema import Config, Dtype, Task, TrainConfig
from peftsweep.study import store
from peftsweep.training import optimizer

log = logging.getLogger(__name__)

Found = TypeVar("Found")


@dataclass(frozen=True)
class Forecast:
    """The sizes of a trial, and why it is refused, before anything is loaded."""

    trainable_parameters: int | None = None  # None where attaching failed; the trial will then report the error
    total_parameters: int | None = None
    adapter_bytes: int | None = None  # of the file that holds the adapter
    refused: str | None = None  # why it will not be trained
    coverage: str | None = None  # the parts of the base that are adapted or quantised, in words
    attached: str | None = None  # a hash of the names and shapes of the trained parameters


ALL_ELSE = (  # keys of a configuration that change numbers, without those that choose the adapted modules
    *("seed", "device", "model", "method", "method_inputs", "method_setup", "quant", "dataset", "eval", "train"),
    *("inference", "profiler", "adapter", "halving", "memory_limit", "skip_oversized", "force", "repeat"),
)
AIMS = ("target_modules", "target_parameters", "exclude_modules")  # keys of a method that choose its modules
# Of base and adapter. Some methods begin with random numbers that the meta device lacks, some with the base's (SVD,
# masks), of which any will do.
PLACES = (("meta", "meta"), ("meta", "cpu"), ("cpu", "cpu"))
_FORECASTS: dict[str, Forecast] = {}  # trials that differ only in seed or data share one
_SIZES: dict[str, Forecast] = {}  # trials that differ in evaluations, quantisation or length of training share one
_PREDICTIONS: dict[str, Prediction | None] = {}
_SHAPES: dict[str, list[Shape]] = {}
_ROOMS: dict[str, int] = {}  # by model, its files and the virtual tokens of the method
_STORED: dict[str, str] = {}  # by model and quantisation
CACHES: tuple[dict[str, Any], ...] = (_FORECASTS, _PREDICTIONS, _SHAPES, _ROOMS)
MANY = 8  # number of forecasts from which on other processes compute them


def check(trial: Trial) -> Forecast:
    """Attach the method to the base's skeleton, without weights, data or network (for presets).

    Raises:
        InputError: targets, method or device do not fit.
    """
    key = _forecast_key(trial)
    if key not in _FORECASTS:
        try:
            _FORECASTS[key] = _forecast(trial)
        except InputError as error:
            raise InputError(_with_keys(trial, str(error))) from error
    return _FORECASTS[key]


def _forecast_key(trial: Trial) -> str:
    return identity.content_hash([*model_key(trial), forecast_keys(trial)])


def ahead(
    trials: Sequence[Trial], *others: Callable[[Trial], object], caches: Sequence[dict[str, Any]] = ()
) -> Iterator[Trial]:
    """Yield each of ``trials`` when the results of ``check`` and of the functions ``others`` for it are in the caches.

    ``caches`` are the caches of ``others``. If many results are missing, forked processes on all cores compute them at
    the same time. A process that may have initialised CUDA must not fork: on a host with a GPU the results are computed
    later in this process, by the functions themselves. So are results whose computation raised an error, or whose
    process died.
    """
    keys = [_forecast_key(trial) for trial in trials]
    new = {key: trial for key, trial in zip(keys, trials, strict=True) if key not in _FORECASTS}
    cores = measure.cores() if sys.platform == "linux" and not torch.cuda.device_count() else 1
    if cores < 2 or len(new) < MANY:
        yield from trials
        return
    cores = min(cores, len(new))
    all_caches = (*CACHES, *caches)
    context, started, waiting = multiprocessing.get_context("fork"), [], list(new)
    try:
        for first in range(cores):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_fill_caches, args=([*new.values()][first::cores], others, all_caches, sender), daemon=True
            )
            process.start()
            sender.close()
            started.append((process, receiver))
        for trial, key in zip(trials, keys, strict=True):
            while key in waiting:
                index = [*new].index(waiting.pop(0))
                with suppress(EOFError):
                    for cache, entries in zip(all_caches, started[index % cores][1].recv(), strict=True):
                        cache.update(entries)
            yield trial
    finally:
        for process, receiver in started:
            receiver.close()
            process.terminate()
            process.join()


def _fill_caches(
    trials: Sequence[Trial],
    others: Sequence[Callable[[Trial], object]],
    caches: Sequence[dict[str, Any]],
    channel: connection.Connection[Any, Any],
) -> None:
    """Compute the results of ``trials`` in a forked process; send the new entries of ``caches`` after each trial."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command ends this process
    torch.set_num_threads(1)  # a fork does not copy the other threads
    for trial in trials:
        before = [set(cache) for cache in caches]
        with suppress(Exception):  # the process of the command will get the same error, and report it
            check(trial)
            for other in others:
                other(trial)
        new_entries = [{k: cache[k] for k in cache.keys() - keys} for cache, keys in zip(caches, before, strict=True)]
        try:
            channel.send(new_entries)
        except (pickle.PicklingError, AttributeError, TypeError, RuntimeError):  # an argument of a rare operator
            log.debug("the cache entries of %s cannot be sent", trial.slug, exc_info=True)
            channel.send([{} for _ in caches])


def _with_keys(trial: Trial, message: str) -> str:
    """A library's ``message`` about a whole section, such as PEFT's about a method, with the keys that it may mean."""
    section = next(
        (name for name in ("method", "quant", "train.optimizer_kwargs") if message.startswith(f"{name}: ")),
        None,
    )
    words = [word.lstrip("+") for word in trial.overrides if word.lstrip("+").startswith(f"{section}.")]
    named = [word for word in words if word.partition("=")[0].removeprefix(f"{section}.") in message] or words
    return " ".join(named) + message.removeprefix(str(section)) if named else message


def _forecast(trial: Trial) -> Forecast:
    config = trial.config
    models_model.device(config.device)
    build.storage(trial)
    with streams.without_warnings():
        _check_reading(trial)
        if reason := refusal(trial):
            bare = models_model.skeleton(config.model, classes=len(config.dataset.classes))
            return Forecast(0, parts.count(bare).total, 0, reason)
        key = sizes_key(trial)
        foreseen = _SIZES.get(key) or on_skeleton(trial, None, lambda adapted: _sizes(adapted, config.train))
        if foreseen is None:
            return Forecast()
        _SIZES[key] = foreseen
        return dataclasses.replace(foreseen, coverage=foreseen.coverage and foreseen.coverage + _stored(trial))


def _stored(trial: Trial) -> str:
    """The share of the base that is really quantised, in words.

    Raises:
        InputError: no layer of it is quantised.
    """
    kept = build.storage(trial)
    if kept is None or not libraries.is_tried(kept):
        return ""
    key = identity.content_hash([*model_key(trial), trial.tree["quant"]])
    if key not in _STORED:
        base = skeleton(trial.config.model, kept, classes=len(trial.config.dataset.classes))
        weights = coverage.weights(base, trial.config.model.roles)
        total = sum(weight.size for weight in weights.values())
        found = coverage.quantised(weights)
        if not found:  # of Falcon, whose layers are of a class of its own
            kind = trial.config.model.name_or_path
            raise InputError(f"quant={trial.choices['quant']}: no layer of {kind} can be stored so; take quant=none")
        _STORED[key] = coverage.stored(found, total)
    return _STORED[key]


def _check_reading(trial: Trial) -> None:
    """Check that the base is causal if the task needs it, has a tokenizer, and has positions for the texts to write."""
    config = trial.config
    if config.model.task is Task.causal_lm:
        probe.check_causal(models_model.architecture(config.model), partial(models_model.made, config.model))
        models_model.check_weights(config.model)
    room = _room(trial)
    for name in config.eval:
        options = inspect.signature(build.evaluator(trial, name)).parameters
        new = options["max_new_tokens"].default if "max_new_tokens" in options else 0
        compatibility.check_generation(build.virtual_tokens(trial) if new else 0)
        if room is not None and new >= room:
            raise InputError(
                f"eval.{name}.max_new_tokens={new}: must be below {room}, the tokens the model sees at once"
            )


def _room(trial: Trial) -> int | None:
    """The most tokens that a row may have, for a local model also by its tokenizer; None without a limit."""
    config, virtual = trial.config.model, build.virtual_tokens(trial)
    if not models_model.is_local(config):
        limit = models_model.positions(config)
        return None if limit is None else limit - virtual
    key = identity.content_hash([identity.model_identity(config), virtual])
    if key not in _ROOMS:
        _ROOMS[key] = int(build.load_tokenizer(trial).model_max_length)
    return _ROOMS[key]


def _sizes(adapted: build.Model, config: TrainConfig) -> Forecast:
    optimizer.make_optimizer(adapted, config)  # may freeze some parameters
    counts, reach = parts.count(adapted), build.coverage_of(adapted)
    attached = [(name, list(p.shape), str(p.dtype)) for name, p in parts.trainable_parameters(adapted)]
    file_size = saved.saved_bytes(adapted) if isinstance(adapted, PeftModel) else counts.trainable_bytes
    return Forecast(
        counts.trainable,
        counts.total,
        file_size,
        coverage=reach["line"],
        attached=identity.content_hash(attached),
    )


def twin_key(trial: Trial, foreseen: Forecast) -> str:
    """A key that is equal for trials that train the same parameters, also if they name the modules in other ways."""
    if foreseen.attached is None:
        return trial.identity
    tree = {key: trial.tree[key] for key in ALL_ELSE}
    tree["method"] = {key: value for key, value in tree["method"].items() if key not in AIMS}
    tree["model"] = {key: value for key, value in tree["model"].items() if key != "roles"}
    rows = trial.rows.fingerprints if trial.rows else None
    return identity.content_hash([tree, rows, foreseen.attached])


def on_skeleton(
    trial: Trial,
    quantization: Any,
    work: Callable[[build.Model], Found],
    places: Sequence[tuple[str, str]] = PLACES,
    slots: Mapping[str, Trial] | None = None,
) -> Found | None:
    """``work`` of the method on a skeleton of the base; None where that cannot be done in any of the ``places``.

    With ``slots`` it is that of all these trials on one skeleton.
    """
    config = trial.config
    for base, adapter in places:
        try:
            bare = skeleton(config.model, quantization, base, len(config.dataset.classes))
            with without_numbers() if base == "meta" else nullcontext(), torch.device(adapter):
                adapted = build.attach_slots(slots, bare) if slots else _adapted(trial, bare)
            if isinstance(adapted, PeftModel) and not config.train.autocast_adapter_dtype:
                own = [(name, p) for name, p in adapted.named_parameters() if "lora_" in name]
                for _, parameter in own if slots else parts.trainable_parameters(adapted):
                    parameter.data = parameter.data.to(bare.dtype)  # as PEFT does, but not on the meta device
            return work(adapted)
        except InputError:
            raise
        except Exception:
            log.debug("%s cannot be attached on the device %s", trial.slug, adapter, exc_info=True)
    return None


def _adapted(trial: Trial, bare: Any) -> build.Model:
    """The trial's method on a skeleton; a saved adapter as PEFT reads it."""
    config = trial.config
    if config.adapter.path is not None and config.method:
        compatibility.check_tokens(config.method, bare)
        trainable = not build.virtual_tokens(trial)  # PEFT refuses to train these further
        return build.restore(trial, bare, store.adapter(config.adapter.path), trainable=trainable)
    return build.attach_method(trial, bare, config.train.steps)


def refusal(trial: Trial) -> str | None:
    """The reason why the trial's method cannot be trained on its base; None where it can."""
    config = trial.config
    kept = build.storage(trial)
    kinds = [libraries.kind({} if kept is None else kept.to_dict())]
    if config.model.dtype is not Dtype.float32:
        kinds.append(f"narrow {kinds[0]}")
    if config.model.task is Task.seq_cls:
        kinds.append("classifier")
        forward = models_model.skeleton(config.model, classes=len(config.dataset.classes)).forward
        if "past_key_values" not in inspect.signature(forward).parameters:
            kinds.append("encoder")
    if config.train.checkpointing:
        kinds.append("checkpointing")
        made = models_model.skeleton(config.model, classes=len(config.dataset.classes))
        if reason := compatibility.checkpointing_refusal(type(made)):
            return reason
    if config.train.autocast:
        kinds.append(f"{kinds[0]} autocast")
    if config.model.dtype is Dtype.float16 and config.train.autocast is Dtype.float16:
        kinds += ["float16"] if config.train.autocast_adapter_dtype else ["float16", "float16 adapter"]
    setup = {"method_setup": config.method_setup.get("_target_")}
    return compatibility.refusal(config.method | setup if config.method else {}, kinds)


# ---- memory ----------------------------------------------------------------------------------------


def prediction(trial: Trial, tokens: Sequence[Tokens] | None = None, *, own_order: bool = False) -> Prediction | None:
    """The memory that training will take, from ``tokens`` or as far as the rows are known; None if nobody can say.

    With a ``memory_limit`` it is that of a GPU, on which the trial may be meant to run. Without ``tokens`` it is that
    of the rows in the order of seed 0, which a sweep over seeds shares, or in the trial's ``own_order``.
    """
    config = trial.config
    where = _where(config)
    batches = _shapes(trial, tokens, config.seed if own_order else 0)
    key = _key(where, batches, [trial])
    if key not in _PREDICTIONS:
        _PREDICTIONS[key] = predicted(trial, batches, where)
    return _PREDICTIONS[key]


def _where(config: Config) -> str:
    """The type of the device that a prediction is for."""
    return "cuda" if config.memory_limit else models_model.device(config.device).type


def _key(where: str, batches: Sequence[Shape], trials: Sequence[Trial]) -> str:
    """The cache key of a prediction, from all that changes it."""
    parts: list[Any] = [where, [dataclasses.asdict(shape) for shape in batches]]
    parts += [[*model_key(trial), forecast_keys(trial)] for trial in trials]
    return identity.content_hash(parts)


def predicted(trial: Trial, batches: Sequence[Shape], where: str) -> Prediction | None:
    """The predicted memory of training on micro-batches of these shapes, for a device type "cuda" or "cpu"."""
    if trial.config.adapter.path is not None or refusal(trial):
        return None
    trial = without_initialisation(trial)
    with streams.without_warnings():
        return on_skeleton(
            trial,
            build.storage(trial),
            lambda adapted: predict(adapted, trial.config.train, batches, where),
            (("meta", "meta"), ("meta", "cpu")),
        )


def without_initialisation(trial: Trial) -> Trial:
    """The trial with LoRA's default initial weights: others change no shape, but some decompose the base's weights."""
    if "init_lora_weights" not in trial.config.method:
        return trial
    method = trial.config.method | {"init_lora_weights": True}
    return dataclasses.replace(trial, config=dataclasses.replace(trial.config, method=method))


def together(
    trials: Sequence[Trial], tokens: Sequence[Tokens] | None = None, where: str | None = None
) -> Prediction | None:
    """The predicted memory of training ``trials`` together in a pack, for a device type "cuda" or "cpu"."""
    config = trials[0].config
    where = where or _where(config)
    batches = _shapes(max(trials, key=lambda one: (one.config.train.epochs or 0, one.config.train.steps)), tokens)
    key = _key(where, batches, trials)
    if key not in _PREDICTIONS:
        slots = {f"slot{number}": one for number, one in enumerate(trials)}
        trained = {name: one.config.train for name, one in slots.items()}
        with streams.without_warnings():
            _PREDICTIONS[key] = on_skeleton(
                trials[0],
                build.storage(trials[0]),
                lambda adapted: predict(adapted, config.train, batches, where, trained),
                (("meta", "meta"), ("meta", "cpu")),
                slots,
            )
    return _PREDICTIONS[key]


def longest(trial: Trial) -> Shape:
    """A micro-batch of rows of the greatest length that ``dataset.max_length`` and the model allow, half answer."""
    rows, room = trial.config.train.batch_size, _room(trial)
    length = min(trial.config.dataset.max_length, room or trial.config.dataset.max_length)
    return Shape(rows, length, length // 2, rows * (length // 2))


def _shapes(trial: Trial, tokens: Sequence[Tokens] | None, seed: int = 0) -> list[Shape]:
    """Those of the micro-batches: of ``tokens``, of local rows, else as long as ``dataset.max_length`` allows.

    Without ``tokens`` they are those of the rows' order with ``seed``.
    """
    config = trial.config
    if tokens is not None:
        return shapes(tokens, config.train, config.seed) or [longest(trial)]
    if trial.rows is None or not models_model.is_local(config.model):
        return [longest(trial)]
    train = {key: value for key, value in trial.tree["train"].items() if key not in RATES}
    parts = [trial.tree["dataset"], trial.rows.fingerprints["train"], train, build.virtual_tokens(trial), seed]
    key = identity.content_hash([*model_key(trial), *parts])
    if key not in _SHAPES:
        rows = build.training_tokens(trial, build.load_tokenizer(trial), trial.rows.train)
        _SHAPES[key] = shapes(rows, config.train, seed) or [longest(trial)]
    return _SHAPES[key]


def oversized(trial: Trial, *, own_order: bool = False, at_once: int = 1) -> str | None:
    """The reason why the trial will not fit into the memory, by ``prediction``; None where it fits or is unknown.

    ``at_once`` trials run on the device at the same time, each with an equal share of it.
    """
    limit = memory_limit(trial, at_once)
    if limit is None or (found := prediction(trial, own_order=own_order)) is None or found.peak_bytes <= limit:
        return None
    shared = at_once > 1 and trial.config.memory_limit is None
    there = f"{size(limit)} for each of {at_once} trials on the device" if shared else size(limit)
    advice = smaller(trial.config, "train") + (", or fewer hydra.launcher.workers" if shared else "")
    return f"predicted to need {size(found.peak_bytes)}, there are {there}; {advice}"


def memory_limit(trial: Trial, at_once: int = 1) -> float | None:
    """The bytes of ``memory_limit`` if it is set, else a share of the device for ``at_once`` trials; None on a CPU."""
    if trial.config.memory_limit is not None:
        return checks.size_in_bytes(trial.config.memory_limit, "memory_limit")
    device = models_model.device(trial.config.device)
    return torch.cuda.get_device_properties(device).total_memory / at_once if device.type == "cuda" else None
