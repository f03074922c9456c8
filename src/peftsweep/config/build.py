"""Make the objects that a trial's configuration names: base, method, tokenised rows, evaluations."""

from __future__ import annotations

import gc
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.tracking import GeneralTracker
from hydra.errors import HydraException
from hydra.utils import instantiate
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peftsweep.config import evaluations, identity
from peftsweep.config.compose import Trial
from peftsweep.config.evaluations import HARNESS, ROWS_KEYS
from peftsweep.config.identity import content_hash, model_identity
from peftsweep.data import fingerprint, templates
from peftsweep.data import rows as data_rows
from peftsweep.data import tokens as data_tokens
from peftsweep.data.rows import Rows
from peftsweep.data.templates import Example
from peftsweep.data.tokens import Tokens
from peftsweep.errors import InputError
from peftsweep.evaluation import harness
from peftsweep.evaluation.evaluate import Evaluation
from peftsweep.evaluation.inference import Benchmark, bare
from peftsweep.evaluation.isolation import ends_as_error, generators_kept, process_state_kept
from peftsweep.models import attach, coverage, model, parts, probe
from peftsweep.models import saved as models_saved
from peftsweep.models.coverage import COVERAGE, Coverage
from peftsweep.models.initialise import Setting, without_data
from peftsweep.models.probe import Abilities
from peftsweep.models.quantised import layers, libraries
from peftsweep.schema import DatasetConfig, Init, LossOn, RowsConfig, Task, ValidationConfig
from peftsweep.study import record, store
from peftsweep.study.atomic import make_way
from peftsweep.study.reading import usable
from peftsweep.study.trust import as_text

log = logging.getLogger(__name__)

MIN_CACHED_SECONDS = 5.0  # tokenising that takes longer is cached in the study's folder
MIN_ADALORA_STEPS = 2  # in the first step PEFT measures the importance of each rank
TOKENS_FORMAT = 5  # version of the cache of tokens; it rises when the same rows become other tokens
MODEL_OPTIONS = ("num_layers", "num_attention_heads", "token_dim")  # options that PEFT reads from the model by itself
MAX_CACHED_TOKENS = 4  # tokenised training sets: training and validation rows of two datasets

Model = PreTrainedModel | PeftModel
Evaluate = Callable[[Model, PreTrainedTokenizerBase, list[Example]], Evaluation]


def quantization(trial: Trial) -> Any:
    """The transformers quantization config that ``quant`` names, or None."""
    return _instantiate(trial.config.quant, "quant") if trial.config.quant else None


def storage(trial: Trial) -> Any:
    """The quantization config of the base: that of ``quant``, else that of the checkpoint, or None.

    Raises:
        InputError: ``quant`` is set for a checkpoint that is quantised already, or its library cannot run here.
    """
    name, device = trial.config.model.name_or_path, trial.config.device
    on_cpu = (model.device(device).type if device == "auto" else device) == "cpu"  # to plan, a GPU need not exist
    stored = libraries.checkpoint_quantization(model.architecture(trial.config.model), name)
    requested, key = quantization(trial), f"quant={trial.choices['quant']}"
    if stored and requested is not None:
        library = stored.get("quant_method", "a library that it does not name")
        raise InputError(f"{key}: the checkpoint {name} is quantised already, by {library}; take quant=none")
    if stored:
        return libraries.of_checkpoint(stored, name, on_cpu=on_cpu)
    if requested is not None:
        libraries.check_config(requested, key, loaded=False, on_cpu=on_cpu)
    return requested


def evaluator(trial: Trial, name: str) -> Evaluate:
    """The evaluation ``eval.<name>`` as a function of model, tokenizer and examples; it restores the process state."""
    node = trial.config.eval[name]
    options = {key: value for key, value in node.items() if key not in ROWS_KEYS}
    if options.get("classes"):
        options["classes"] = classes(trial, options["classes"])
    function: Evaluate = _instantiate(options | {"_partial_": True}, f"eval.{name}")
    return process_state_kept()(generators_kept()(ends_as_error()(function)))


def inference_benchmark(trial: Trial) -> Callable[..., Benchmark]:
    """The benchmark that ``inference`` names, as a function of models by name and a tokenizer."""
    function: Callable[..., Benchmark] = _instantiate(trial.config.inference | {"_partial_": True}, "inference")
    return function


def profiler(trial: Trial) -> Callable[..., dict[str, Any]]:
    """The profiler that ``profiler`` names: a function of a training run, a folder and a device."""
    function: Callable[..., dict[str, Any]] = _instantiate(trial.config.profiler | {"_partial_": True}, "profiler")
    return function


def tracker(trial: Trial, place: Path) -> GeneralTracker:
    """The tool that ``tracker`` names, for the trial in the folder ``place``."""
    given = {"folder": place.parent / "tracker", "name": place.name, "study": trial.config.study}
    tool: GeneralTracker = _instantiate(trial.config.tracker | given, "tracker")
    return tool


def _instantiate(node: dict[str, Any], key: str) -> Any:
    try:
        return instantiate(as_text(as_text(node)), _convert_="all")  # interpolations are resolved twice
    except HydraException as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise InputError(f"{key}: {reason}") from error


def load_tokenizer(trial: Trial) -> PreTrainedTokenizerBase:
    """The base's tokenizer, limited to the positions that the method's virtual tokens leave.

    Raises:
        InputError: as ``model.load_tokenizer``.
    """
    return model.load_tokenizer(trial.config.model, virtual_tokens(trial))


def virtual_tokens(trial: Trial) -> int:
    """The number of virtual tokens that the method puts before every row."""
    method = trial.config.method
    return int(method.get("num_virtual_tokens") or len(method.get("cpt_token_ids") or ()))


def classes(trial: Trial, names: Sequence[str] | None = None) -> list[str]:
    """The classes in the order of the head's outputs: the checkpoint's order if its head names them, else as given.

    ``names`` are ``dataset.classes`` by default. Names are compared without regard to capitals.
    """
    mine = list(trial.config.dataset.classes if names is None else names)
    if trial.config.model.task is not Task.seq_cls or trial.config.model.init is Init.random:
        return mine
    theirs = parts.head_classes(model.architecture(trial.config.model))
    if theirs is None:
        return mine
    by_name = {name.casefold(): name for name in mine}
    if sorted(by_name) == sorted(name.casefold() for name in theirs):
        return [by_name[name.casefold()] for name in theirs]
    if len(theirs) == len(mine):  # with another number of outputs the head is initialised anew
        log.warning(
            "dataset.classes=%s are not the names of the head's outputs, %s: output n is taken as the n-th class",
            mine,
            theirs,
        )
    return mine


def load_base(
    trial: Trial, tokenizer: PreTrainedTokenizerBase, device: torch.device, *, dropped: bool = False
) -> PreTrainedModel:
    """The frozen base on ``device``, with the trial's quantisation; if bases are kept, that of the last trial.

    From a kept base a trial gets new modules over the same weights, so that nothing is left of the adapter of the
    trial before; if a weight has changed, the base is loaded again. ``dropped``: ``drop_other_base`` was just called.
    How a language model treats padding and its cache has been probed.

    Raises:
        InputError: as ``model.load`` and ``probe.probe``.
    """
    config, key = trial.config, _base_key(trial, device)
    if not dropped:
        drop_other_base(trial, device)
    if _BASE_CACHE:
        return cast(PreTrainedModel, bare(_BASE_CACHE[0].base))
    base = model.load(config.model, quantization(trial), device, len(config.dataset.classes), config.seed)
    if parts.classifies(base):
        parts.text_config(base).pad_token_id = tokenizer.pad_token_id  # the head reads the token before the padding
        base.config.id2label = dict(enumerate(classes(trial)))
        base.config.label2id = {name: number for number, name in base.config.id2label.items()}
        probe.classifier_pads(base, tokenizer)
    else:
        _PROBED[key] = probe.abilities(base, _PROBED.get(key))
    if not _KEEP_BASES:
        return base
    _BASE_CACHE.append(_Base(key, base, _fingerprint(base)))
    return cast(PreTrainedModel, bare(base))


def drop_other_base(trial: Trial, device: torch.device) -> None:
    """Free a kept base of another trial before the memory of loading is measured."""
    kept = next(iter(_BASE_CACHE), None)
    if kept and (kept.key != _base_key(trial, device) or kept.weights != _fingerprint(kept.base)):
        _BASE_CACHE.clear()
        del kept  # the last reference, so that it is freed here
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _base_key(trial: Trial, device: torch.device) -> str:
    config = trial.config
    seed = config.seed if config.model.task is Task.seq_cls else 0  # a new head is initialised from it
    return content_hash([model_identity(config.model), config.quant, str(device), config.dataset.classes, seed])


@dataclass(frozen=True)
class _Base:
    key: str
    base: PreTrainedModel
    weights: int


_PROBED: dict[str, Abilities] = {}  # results of probing, for bases that are loaded again
_KEEP_BASES: list[bool] = []
_BASE_CACHE: list[_Base] = []  # at most one


def keep_bases() -> None:
    """Keep the last base between trials from now on, in a process that runs nothing else."""
    _KEEP_BASES.append(True)


def _fingerprint(base: PreTrainedModel) -> int:
    """A sum over all bits of the weights and buffers; a change of a weight changes it."""
    total = 0
    kept = [part for one in (*base.parameters(), *base.buffers()) for part in layers.plain_tensors(one)]
    for number, tensor in enumerate(kept, start=1):
        raw = tensor.detach().contiguous().flatten().view(torch.uint8)
        words = nn.functional.pad(raw, (0, -len(raw) % 8)).view(torch.int64)
        total += number * int(words.sum())
    return total


def attach_method(
    trial: Trial,
    base: PreTrainedModel,
    steps: int,
    initialise: Callable[[Any, Callable[..., PeftModel]], PeftModel] | None = None,
) -> Model:
    """``base`` with the trial's method on it, planned for ``steps`` steps; full fine-tuning trains the base itself."""
    config = trial.config
    before = coverage.weights(base, config.model.roles)
    method: Any = _method(trial) if config.method else None
    if method is not None and getattr(method, "total_step", None) and steps:
        # AdaLoRA plans its budget over all steps; their number is known only with the data.
        method.tinit, method.tfinal = (round(n * steps / method.total_step) for n in (method.tinit, method.tfinal))
        method.total_step = steps
        if steps - method.tfinal < MIN_ADALORA_STEPS:
            least = f"AdaLoRA needs at least {MIN_ADALORA_STEPS} steps after tfinal"
            raise InputError(f"method.tfinal={method.tfinal}: of {steps} steps; {least}; raise train.steps")
    if config.method_setup and initialise is None and hasattr(method, "init_lora_weights"):
        initialise = partial(without_data, base)
    adapted = attach.attach(
        base,
        method,
        config.targets,
        config.model.roles,
        config.method_inputs,
        float32=config.train.autocast_adapter_dtype,
        initialise=initialise,
    )
    setattr(adapted, COVERAGE, coverage.coverage(before, adapted))
    return adapted


def coverage_of(adapted: Model, slot: str | None = None) -> dict[str, Any]:
    """Which part of the base the method adapts, for the record; in a pack, the method of one slot."""
    found: Any = getattr(adapted, COVERAGE)
    reached: Coverage = found if slot is None else found[slot]
    return reached.facts()


def attach_slots(slots: Mapping[str, Trial], base: PreTrainedModel) -> PeftModel:
    """``base`` with the adapters of several trials of one seed, by their names in the model."""
    config = next(iter(slots.values())).config
    methods = {name: (_method(trial), trial.config.targets) for name, trial in slots.items()}
    float32 = config.train.autocast_adapter_dtype
    before = coverage.weights(base, config.model.roles)
    adapted = attach.attach_slots(base, methods, config.seed, config.model.roles, float32=float32)
    setattr(adapted, COVERAGE, {name: coverage.coverage(before, adapted, name) for name in slots})
    return adapted


def _method(trial: Trial) -> Any:
    """The PEFT config that ``method`` names."""
    task = {"task_type": trial.config.model.task.value.upper()}  # PEFT's names of the tasks
    options = task | trial.config.method
    if any(group.startswith("point") for group in trial.choices):  # an experiment that may be for another model
        named = {word.lstrip("+").partition("=")[0] for word in trial.overrides}
        options = {key: one for key, one in options.items() if key not in MODEL_OPTIONS or f"method.{key}" in named}
    if options.get("target_modules") != attach.ALL_LINEAR:
        return _instantiate(options, "method")
    # PEFT accepts method.layers_to_transform only with names of modules. ALL_LINEAR becomes names on attaching.
    method = _instantiate(options | {"target_modules": None}, "method")
    method.target_modules = attach.ALL_LINEAR
    return method


def initialisation(
    trial: Trial, place: Path, base: PreTrainedModel, tokens: list[Tokens], tokenizer: PreTrainedTokenizerBase
) -> Callable[[Any, Callable[..., PeftModel]], PeftModel] | None:
    """The initialisation that ``method_setup`` names, as ``attach`` calls it; None if there is none."""
    config = trial.config
    if not config.method_setup:
        return None
    function = _instantiate(config.method_setup | {"_partial_": True}, "method_setup")
    outputs = len(config.dataset.classes)

    def initialise(method: Any, put: Callable[..., PeftModel]) -> PeftModel:
        setting = Setting(
            base=base,
            method=method,
            attach=put,
            unquantised=lambda: model.load(config.model, None, base.device, outputs, config.seed),
            rows=tokens,
            tokenizer=tokenizer,
            folder=place / store.ADAPTER if config.adapter.save else None,
            seed=config.seed,
        )
        adapted: PeftModel = function(setting)
        return adapted

    return initialise


def restore(trial: Trial, base: PreTrainedModel, saved: Path, *, trainable: bool = False) -> Model:
    """``base`` with the adapter in the folder ``saved``, or the whole model there; frozen unless ``trainable``."""
    config = trial.config
    before = coverage.weights(base, config.model.roles)
    adapted = models_saved.restore(
        base,
        saved,
        config.method_inputs,
        float32=config.train.autocast_adapter_dtype,
        trainable=trainable or bool(config.profiler),  # the profiler trains further steps
    )
    setattr(adapted, COVERAGE, coverage.coverage(before, adapted))
    return adapted


def training_tokens(trial: Trial, tokenizer: PreTrainedTokenizerBase, rows: list[data_rows.Row]) -> list[Tokens]:
    """The dataset's rows in tokens, as the model is trained on them; cached by their content.

    The rows of the last trials are cached in memory; rows that took long are also cached in the study's folder.
    """
    own, task = asdict(trial.config.dataset) | {"classes": classes(trial)}, trial.config.model.task
    how = {key: value for key, value in own.items() if key not in identity.CHOOSES_ROWS}
    versions = [TOKENS_FORMAT, record.packages()]
    vocabulary = fingerprint.tokenizer_hash(tokenizer)
    key = identity.content_hash([how, task, vocabulary, data_rows.fingerprint(rows), versions])
    if key not in _TOKENS:
        file = store.folder(trial.config.study) / ".tokens" / f"{key}.parquet"
        held = os.path.lexists(file)
        if held and (kept := usable(partial(data_tokens.read_tokens, file, len(rows)))) is not None:
            _TOKENS[key] = kept
        else:
            start = time.perf_counter()
            _TOKENS[key] = _tokenize(trial, tokenizer, rows)
            if held or time.perf_counter() - start > MIN_CACHED_SECONDS:
                make_way(file)
                data_tokens.write_tokens(file, _TOKENS[key])
        while len(_TOKENS) > MAX_CACHED_TOKENS:
            _TOKENS.pop(next(iter(_TOKENS)))
    return _TOKENS[key]


_TOKENS: dict[str, list[Tokens]] = {}


def _tokenize(trial: Trial, tokenizer: PreTrainedTokenizerBase, rows: list[data_rows.Row]) -> list[Tokens]:
    own = trial.config.dataset
    examples = evaluations.rendered(own, templates.dataset_examples(own, rows), tokenizer, file="the training rows")
    tokens = [row for row in tokens_of(trial, tokenizer, examples) if not (own.drop_long and row.is_cut)]
    if not tokens:
        most = f"dataset.max_length={own.max_length} or the model's {tokenizer.model_max_length} positions"
        raise InputError(f"dataset.drop_long=true: all rows are longer than {most}")
    return tokens


def tokens_of(trial: Trial, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> list[Tokens]:
    """Rendered examples in tokens, as trained on; ``drop_long`` leaves out those that are cut."""
    own = trial.config.dataset
    if trial.config.model.task is Task.seq_cls:
        return data_tokens.tokenize_for_classes(tokenizer, examples, own.max_length, classes(trial))
    return data_tokens.tokenize(tokenizer, examples, own.max_length, whole=own.loss_on is LossOn.text)


def check_tokens(tokenizer: PreTrainedTokenizerBase, base: PreTrainedModel, tokens: Sequence[Tokens]) -> None:
    """Refuse rows with a token that the base has no embedding for.

    Raises:
        InputError: the message names the token.
    """
    embeddings: Any = base.get_input_embeddings()
    known = int(embeddings.weight.shape[0])
    outside = max((token for row in tokens for token in row.ids), default=0)
    if outside >= known:
        name = tokenizer.convert_ids_to_tokens(outside)
        raise InputError(
            f"model.name_or_path: token {outside} ({name!r}) of its tokenizer has no embedding; the model has {known}"
        )


def test_examples(trial: Trial, name: str, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """The test rows of ``eval.<name>`` as examples for the model."""
    return shown(trial, name, evaluations.test_rows(trial.config, name, rows), tokenizer)


def validation_examples(
    trial: Trial, name: str, rows: Rows, tokenizer: PreTrainedTokenizerBase
) -> list[Example] | None:
    """The validation rows of ``eval.<name>`` as examples for the model; None if it does not validate."""
    found = evaluations.validation_rows(trial.config, name, rows)
    return None if found is None else shown(trial, name, found, tokenizer)


def shown(trial: Trial, name: str, rows: list[data_rows.Row], tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """The examples of rows, with the prompts and answers of ``eval.<name>``."""
    examples = evaluations.test_examples(trial.config, name, rows)
    return evaluations.rendered(trial.config.dataset, examples, tokenizer, f"eval.{name}", "the test rows")


def check_available(trial: Trial) -> None:
    """Check that the base's files are complete, the harness knows its tasks, and hub or cache have the rest.

    Raises:
        InputError: something is missing.
    """
    config = trial.config
    models_saved.check_files(config.model)
    for node in config.eval.values():
        if node["_target_"] == HARNESS:
            harness.check_runnable(node["tasks"], node.get("include_path"))
    model.check_cached(config.model)
    sources: dict[str, DatasetConfig | ValidationConfig | RowsConfig] = {
        "dataset": config.dataset,
        "dataset.validation": config.dataset.validation,
    }
    sources |= {f"eval.{name}": evaluations.evaluation_source(config, name) for name in config.eval}
    for key, rows in sources.items():
        if rows.hub is not None and rows.path is None:
            data_rows.check_available(rows.hub, rows.hub_config, rows.revision, f"{key}.hub")
