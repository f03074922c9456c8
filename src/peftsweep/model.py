"""Load the base, quantise it, use it, count, save, merge."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import torch
import transformers
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from huggingface_hub import snapshot_download
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.adalora import AdaLoraModel
from peft.tuners.poly import PolyModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import transformers_weight_conversion
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import safe_open
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from peftsweep import hub, shortcuts
from peftsweep.atomic import sync_tree
from peftsweep.data import Batch
from peftsweep.errors import InputError, suggest
from peftsweep.schema import Init, ModelConfig, Task
from peftsweep.shapes import at_target_rank
from peftsweep.shortcuts import SHORTCUTS, Shortcuts
from peftsweep.study import RESIDUAL

TINY = Path(__file__).parent / "tiny" / "weights"
INITIAL = "initial"  # beside a saved adapter: as it began, where the base was changed by its initialisation
QUANTISED = (Linear4bit, Linear8bitLt)
METHOD_INPUTS = "peftsweep_method_inputs"  # the attribute of an adapted model that holds them
CALL_THE_BASE_ONCE = (BaseTuner.forward, AdaLoraModel.forward, PolyModel.forward)
NEW_PARTS = "peftsweep_new_parts"  # the attribute of a classifier that names the modules its checkpoint lacked
WEIGHTS = (".safetensors", ".bin")  # endings of files of them
ROTARY = ("rope_theta", "rope_scaling", "partial_rotary_factor")  # that transformers moves into rope_parameters
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")  # names of a configuration's longest sequence
SHARED = ("vblora_vector_bank", "prompt_encoder")  # of an adapter's weights, saved once and under other names
NOT_MERGEABLE = "what the method adds cannot be merged into the weights"
NAMED = 5  # of many parameters, so many are named in a message
CLASSES: dict[Task, Any] = {
    Task.causal_lm: AutoModelForCausalLM,
    Task.seq_cls: AutoModelForSequenceClassification,
}


def source(model: ModelConfig) -> str:
    """The hub id or the local folder that ``model.name_or_path`` means.

    Raises:
        InputError: it is a path, and there is no such folder.
    """
    if model.name_or_path == "tiny":
        return str(TINY)
    looks_local = model.name_or_path.startswith((".", "/", "~")) or model.name_or_path.count("/") > 1
    if looks_local and not Path(model.name_or_path).expanduser().is_dir():
        raise InputError(f"model.name_or_path={model.name_or_path}: no such folder")
    return str(Path(model.name_or_path).expanduser()) if looks_local else model.name_or_path


def device(name: str) -> torch.device:
    """``auto`` is the first CUDA device, or the CPU where there is none. CUDA is not initialised.

    Raises:
        InputError: it is another kind of device, or not there.
    """
    found = re.fullmatch(r"auto|cpu|cuda(?::(\d+))?", name)
    if found is None:
        raise InputError(f"device={name}: must be auto, cpu, cuda, or cuda:1 for the second CUDA device")
    count = torch.cuda.device_count()
    if name == "cpu" or (name == "auto" and not count):
        return torch.device("cpu")
    number = int(found[1] or 0)
    if number >= count:
        there = ", ".join(f"cuda:{n}" for n in range(count)) or "none"
        raise InputError(f"device={name}: no such CUDA device; there are: {there}")
    return torch.device("cuda", number)


def architecture(model: ModelConfig) -> transformers.PreTrainedConfig:
    """The model's transformers configuration, from its yaml for presets, else from its folder or the hub.

    Raises:
        InputError: it cannot be found, or ``model.architecture`` names no known one.
    """
    if model.architecture:
        return _described(dict(model.architecture))
    if model.init is Init.random:
        raise InputError("model.init=random needs model.architecture (model_type and sizes), as the presets have")
    with _loading(model):
        found = AutoConfig.from_pretrained(source(model), revision=model.revision or "main")
    return cast(transformers.PreTrainedConfig, found)


@contextmanager
def _loading(model: ModelConfig, part: str = "") -> Iterator[None]:
    """Load ``part`` of the model (all of it by default) from its folder or the hub in the body.

    Raises:
        InputError: it cannot be loaded.
    """
    key = f"model.name_or_path={model.name_or_path}"
    with nullcontext() if is_local(model) else hub.loading(key, "a local folder"):
        try:
            yield
        except hub.UNREADABLE as error:
            if isinstance(error, InputError) or not is_local(model):
                raise
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{key}: {part + ' ' if part else ''}cannot be loaded ({reason})") from error


def is_local(model: ModelConfig) -> bool:
    """Whether nothing of the model is on the hub: it is a folder, or has random weights."""
    return model.init is Init.random or Path(source(model)).is_dir()


def check_cached(model: ModelConfig) -> None:
    """Where the hub does not answer: that its files of the model are in the local cache.

    Raises:
        InputError: they are not.
    """
    if is_local(model) or hub.problem() is None:
        return
    with _loading(model):
        folder = Path(snapshot_download(source(model), revision=model.revision or "main", local_files_only=True))
        if not any(file.suffix in WEIGHTS for file in folder.iterdir()):
            raise OSError("no weights")
    load_tokenizer(model)


def _described(fields: dict[str, Any]) -> transformers.PreTrainedConfig:
    if "model_type" not in fields:
        raise InputError("model.architecture.model_type: must be given, such as llama")
    kind = str(fields.pop("model_type"))
    if kind not in CONFIG_MAPPING:
        known = suggest(kind, list(CONFIG_MAPPING))
        raise InputError(f"model.architecture.model_type={kind}: transformers has no such architecture; {known}")
    default = AutoConfig.for_model(kind)
    for name in fields:
        if not hasattr(default, name) and name not in ROTARY:
            raise InputError(f"model.architecture.{name}: no such key; {suggest(name, sorted(default.to_dict()))}")
    try:
        return type(default)(**fields)
    except Exception as error:  # of any kind: transformers checks types, and calculates sizes from sizes
        reason = re.sub(r".*\b\w+Error: ", "", " ".join(str(error).split()))
        raise InputError(f"model.architecture: {reason}") from None


def skeleton(model: ModelConfig, where: str = "meta", classes: int = 0) -> PreTrainedModel:
    """The base without its weights: enough to attach a method and to count.

    On the meta device it takes no memory; on another its weights are random numbers. A classifier
    has ``classes`` outputs.
    """
    with torch.device(where):
        return made(model, _shape(model, classes), dtype=getattr(torch, model.dtype.value))


def made(model: ModelConfig, config: transformers.PreTrainedConfig, **options: Any) -> PreTrainedModel:
    """A model of the configuration ``config``, of random weights, for the task of ``model``.

    Raises:
        InputError: the architecture is of another kind.
    """
    try:
        return cast(PreTrainedModel, CLASSES[model.task].from_config(config, **options))
    except ValueError as error:  # transformers has no such model of this type
        what = "causal language model" if model.task is Task.causal_lm else "classifier"
        raise InputError(
            f"model.task={model.task.value}: {model.name_or_path} is no {what} (model_type {config.model_type})"
        ) from error
    except Exception as error:
        if not model.architecture:
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(f"model.architecture: describes no model that transformers can make ({reason})") from error


def _shape(model: ModelConfig, classes: int) -> transformers.PreTrainedConfig:
    config = architecture(model)
    if model.task is Task.seq_cls:
        config.num_labels = classes
    return config


def commit(base: PreTrainedModel) -> str | None:
    """The hub's commit that the base was loaded from; None for a local folder."""
    return getattr(base.config, "_commit_hash", None)


def text_config(model: Any) -> Any:
    """The part of a configuration (or of a model's) that is about text; all of it, where the model reads only text."""
    config = getattr(model, "config", model)
    return config.get_text_config(decoder=True)


def token_limit(model: nn.Module) -> int | None:
    """How many tokens the model may see at once, without virtual ones; None where there is no limit.

    It is the least of what the text configuration says and the rows of learned position embeddings, of which
    some architectures use none for the first positions (OPT's ``offset``, RoBERTa's padding).
    """
    config = text_config(base_of(model))
    limits = [getattr(config, name, None) for name in POSITIONS]
    for name, module in text_part(base_of(model)).named_modules():
        leaf = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and re.search("^wpe$|pos", leaf) and "rel" not in leaf:
            unused = 0 if module.padding_idx is None else module.padding_idx + 1
            limits.append(module.num_embeddings - int(getattr(module, "offset", 0)) - unused)
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=None)


def positions(model: ModelConfig) -> int | None:
    """``token_limit`` of a model that is not loaded, by its configuration alone."""
    config = architecture(model)
    key = f"{model.task.name} {config.to_json_string(use_diff=False)}"
    if key not in _LIMITS:
        with torch.device("meta"):
            _LIMITS[key] = token_limit(made(model, copy.deepcopy(config)))
    return _LIMITS[key]


_LIMITS: dict[str, int | None] = {}  # by all that a configuration says


def load_tokenizer(model: ModelConfig, virtual_tokens: int = 0) -> PreTrainedTokenizerBase:
    """The base's tokenizer; the embedded one where the weights are random. Pads with EOS if it must.

    Its ``model_max_length`` is what is left of the model's positions beside ``virtual_tokens``, which a method
    puts before every row.

    Raises:
        InputError: there is none, or its marks do not fit the model.
    """
    folder = str(TINY) if model.init is Init.random else source(model)
    key = f"model.name_or_path={model.name_or_path}"
    with _loading(model, "its tokenizer"):
        found: Any = AutoTokenizer.from_pretrained(folder, revision=model.revision or "main")
    tokenizer = cast(PreTrainedTokenizerBase, found)
    limit = positions(model)
    if model.init is Init.random:
        tokenizer.model_max_length = limit or tokenizer.model_max_length
    if limit is not None:
        tokenizer.model_max_length = min(tokenizer.model_max_length, limit) - virtual_tokens
    if tokenizer.model_max_length < 2:
        raise InputError(f"method: {virtual_tokens} virtual tokens leave no room in the model's {limit} positions")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    _check_marks(tokenizer, model, getattr(text_config(architecture(model)), "vocab_size", math.inf), key)
    return tokenizer


def _check_marks(tokenizer: PreTrainedTokenizerBase, model: ModelConfig, vocabulary: float, key: str) -> None:
    """Refuse a tokenizer without the marks that rows end and are padded with, or with some that the model lacks."""
    if model.task is Task.causal_lm and tokenizer.eos_token_id is None:
        raise InputError(f"{key}: its tokenizer has no eos_token, with which an answer ends")
    if tokenizer.pad_token_id is None:
        raise InputError(f"{key}: its tokenizer has neither a pad_token nor an eos_token to pad with")
    for name in ("pad_token", "eos_token", "bos_token", "cls_token", "sep_token"):
        number = getattr(tokenizer, f"{name}_id")
        if number is not None and number >= vocabulary:
            raise InputError(
                f"{key}: the {name} {getattr(tokenizer, name)!r} of its tokenizer is number {number}, "
                f"outside of the model's {vocabulary:,} embeddings"
            )


def load(
    model: ModelConfig, quantization: Any, where: torch.device, classes: int = 0, seed: int = 0
) -> PreTrainedModel:
    """The frozen base on ``where``, in eval mode; ``quantization`` is a transformers quantization config or None.

    A classifier gets ``classes`` outputs. A head that the checkpoint lacks is drawn from ``seed``, as is whatever
    else it lacks (``new_parts``), and neither is ever quantised.

    Raises:
        InputError: the checkpoint lacks weights of the model, or has them in other shapes.
    """
    options: dict[str, Any] = {"dtype": getattr(torch, model.dtype.value), "config": _shape(model, classes)}
    if model.attn_implementation is not None:
        options["attn_implementation"] = model.attn_implementation
    if model.task is Task.seq_cls and hasattr(quantization, "llm_int8_skip_modules"):
        # bitsandbytes would quantise an encoder's head too, and then it could not be trained.
        skipped = quantization.llm_int8_skip_modules or []
        quantization.llm_int8_skip_modules = [*skipped, *head_names(skeleton(model, classes=classes))]
    if model.init is Init.random:
        base = _random(model, quantization, where, options)
    else:
        options |= {"revision": model.revision or "main", "device_map": model.device_map or {"": where}}
        base = _pretrained(model, quantization, options, seed)
        if any(isinstance(base.get_submodule(name), QUANTISED) for name in new_parts(base)):
            quantization.llm_int8_skip_modules = [*quantization.llm_int8_skip_modules, *new_parts(base)]
            base = _pretrained(model, quantization, options, seed)  # what is trained is never quantised
    keep_weights_unpacked(base)
    base.requires_grad_(False)
    return cast(PreTrainedModel, base.eval())


def _pretrained(model: ModelConfig, quantization: Any, options: dict[str, Any], seed: int) -> PreTrainedModel:
    """The model with the weights of its checkpoint, which must have them all, but for parts of a classifier."""
    torch.manual_seed(seed)
    if not is_local(model):
        hub.problem()
    base, info = CLASSES[model.task].from_pretrained(
        source(model),
        quantization_config=quantization,
        ignore_mismatched_sizes=True,  # so that the line below names them
        output_loading_info=True,
        **options,
    )
    lacking = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if not lacking:
        return cast(PreTrainedModel, base)
    names = ", ".join(lacking[:NAMED]) + (f" and {len(lacking) - NAMED} more" if len(lacking) > NAMED else "")
    if model.task is Task.causal_lm:
        raise InputError(
            f"model.name_or_path={model.name_or_path}: the checkpoint lacks weights of {type(base).__name__}, "
            f"or has them in other shapes: {names}"
        )
    parts = sorted({key.rpartition(".")[0] for key in lacking})
    bodies = [part for part in parts if part.partition(".")[0] == base.base_model_prefix]
    if 2 * sum(_own_size(base, part) for part in bodies) > sum(weight_count(p) for p in base.base_model.parameters()):
        raise InputError(
            f"model.name_or_path={model.name_or_path}: the checkpoint is of another model; it lacks {names}"
        )
    setattr(base, NEW_PARTS, parts)
    return cast(PreTrainedModel, base)


def _own_size(base: nn.Module, part: str) -> int:
    return sum(weight_count(parameter) for parameter in base.get_submodule(part).parameters(recurse=False))


def new_parts(base: nn.Module) -> list[str]:
    """The names of the modules whose weights the checkpoint of a classifier lacked, so that they were drawn anew."""
    parts: list[str] = getattr(base, NEW_PARTS, [])
    return parts


def _random(model: ModelConfig, quantization: Any, where: torch.device, options: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(0)  # the base is the same for every seed of a trial
    with where:
        base = CLASSES[model.task].from_config(**options)
    if quantization is None:
        return cast(PreTrainedModel, base)
    # Quantisation happens while weights are loaded, so the random ones are handed over as a checkpoint.
    weights = base.state_dict()
    return cast(
        PreTrainedModel,
        type(base).from_pretrained(
            None,
            state_dict=weights,
            quantization_config=quantization,
            device_map={"": where},
            **options,
        ),
    )


def base_of(model: Any) -> Any:
    """The model that an adapter is attached to; without an adapter the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def text_part(base: Any) -> nn.Module:
    """The submodule that reads text, without the head: in models that also take images or sound, one of several."""
    config = text_config(base)
    if config is base.config:
        return cast(nn.Module, base)
    parts = (m for m in base.modules() if isinstance(m, PreTrainedModel) and m.config is config)
    return next(parts, cast(nn.Module, base))


def head_names(base: PreTrainedModel) -> list[str]:
    """The names of the parts beside the model's body that hold weights: ``lm_head``, ``score``, ``classifier``."""
    parts = base.named_children()
    return [name for name, part in parts if name != base.base_model_prefix and any(True for _ in part.parameters())]


def head_classes(config: transformers.PreTrainedConfig) -> list[str] | None:
    """The names of the outputs of a checkpoint's head over classes; None where it has none, or only numbers them."""
    made_for = (getattr(config, "architectures", None) or [""])[0]
    names = [name for _, name in sorted((config.id2label or {}).items(), key=lambda item: int(item[0]))]
    numbered = all(re.fullmatch(r"(?i)(label|class)?_?\d+", str(name)) for name in names)
    return None if numbered or not made_for.endswith("ForSequenceClassification") else [str(name) for name in names]


def classifies(model: nn.Module) -> bool:
    """Whether the model has a head over classes in place of one over the vocabulary."""
    return type(base_of(model)).__name__.endswith("ForSequenceClassification")


def keep_weights_unpacked(base: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights at the first evaluation on an AVX512-BF16 CPU.

    The packed form has no backward: every gradient after an evaluation would be silently wrong, and
    so would merging and saving.
    """
    module: Any
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def keep_dtype(adapted: PeftModel) -> None:
    """Have adapters on quantised layers answer in the number format they are asked in.

    Those of several methods (IA3, RoAd, RandLora, PVeRA, on 8 bits AdaLoRA) calculate in 32 bits and stay
    there, so that on a 16-bit base attention meets queries, keys and values of two formats.
    """

    def cast_back(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: Any) -> Any:
        wanted = inputs[0].dtype
        device = inputs[0].device.type
        autocast = device != "meta" and torch.is_autocast_enabled(device)
        if autocast or not isinstance(output, torch.Tensor):
            return output
        return output.to(wanted)

    if adapted.get_base_model().dtype == torch.float32:
        return
    for module in adapted.modules():
        if isinstance(module, BaseTunerLayer) and isinstance(module.get_base_layer(), QUANTISED):
            module.register_forward_hook(cast_back)


# ---- using -----------------------------------------------------------------------------------------


def answer_losses(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Cross-entropy of every answer token (a classifier: class) of ``batch``, in float32: [batch.answer_tokens]."""
    return losses_and_hits(model, batch)[0]


def losses_and_hits(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``answer_losses``, and of a classifier the number of rows of which the right class is the likeliest.

    Logits of the answer tokens alone are computed where the output head allows it (shortcuts.py), else those from
    the first answer token of any row on. Methods that put virtual tokens before the input return longer logits; the
    last positions are those of the input.
    """
    if batch.labels is not None:
        logits = class_logits(model, batch)
        hits = (logits.argmax(-1) == batch.labels).sum()
        return nn.functional.cross_entropy(logits, batch.labels, reduction="none"), hits
    short = allowed_shortcuts(model)
    kept = batch.input_ids.shape[1] - batch.answer_start + 1  # the one before the first answer predicts it
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
    inputs |= {"attention_mask": None if short.no_mask else batch.attention_mask}
    inputs |= row_inputs(model, batch.input_ids)
    unmasked = shortcuts.causal_only(text_config(base_of(model))) if short.no_mask else nullcontext()
    if not short.answers_only:
        with unmasked:
            keep = last_positions(kept, batch.input_ids.device)
            logits = (
                model(**inputs, logits_to_keep=keep).logits[:, -kept:-1].flatten(0, 1).index_select(0, batch.places)
            )
        return nn.functional.cross_entropy(logits.float(), batch.targets, reduction="none"), None
    head = base_of(model).get_output_embeddings()
    with unmasked, shortcuts.gathered(head, batch, skip=short.bare_head and shortcuts.is_frozen(head)) as found:
        logits = model(**inputs, logits_to_keep=kept).logits
    if not found.skipped:
        return nn.functional.cross_entropy(logits[0].float(), batch.targets, reduction="none"), None
    if logits is not found.hidden:
        raise RuntimeError(f"{type(model).__name__} changes what its output head returns")
    return shortcuts.linear_cross_entropy(logits[0], head, batch.targets), None


def allowed_shortcuts(model: nn.Module) -> Shortcuts:
    """Those of the model's base (none where it was not probed) that the method on it and torch.compile allow."""
    found: Shortcuts = getattr(base_of(model), SHORTCUTS, Shortcuts())
    tuner: Any = getattr(model, "base_model", None) if isinstance(model, PeftModel) else None
    if isinstance(tuner, BaseTuner) and type(tuner).forward not in CALL_THE_BASE_ONCE:
        return Shortcuts()  # X-LoRA and Shadow read the logits of a pass of their own
    if hasattr(model, "_orig_mod"):  # compiled: a head whose forward changes would be compiled anew in every step
        return replace(found, answers_only=False)
    prompted = isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning
    head = base_of(model).get_output_embeddings() if found.answers_only else None
    return replace(
        found,
        answers_only=found.answers_only and shortcuts.is_linear(head),
        no_mask=found.no_mask and not prompted,  # such a method lengthens the mask that it is given
    )


def last_positions(count: int, device: torch.device) -> torch.Tensor:
    """The last ``count`` positions for ``logits_to_keep``, which so gives the head a contiguous tensor.

    Told a number, transformers slices the hidden states; the product of such a slice in bfloat16 takes torch on a CPU
    10 to 180 times as long.
    """
    return torch.arange(-count, 0, device=device)


def class_logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    """What a classifier says of each row, in float32: shape [rows, classes]."""
    inputs = row_inputs(model, batch.input_ids)
    logits: torch.Tensor = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **inputs).logits
    return logits.float()


def row_inputs(model: nn.Module, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the method wants beside the tokens, such as ``task_ids``: one number a row, shape [rows]."""
    wanted: dict[str, int] = getattr(model, METHOD_INPUTS, {})
    return {name: input_ids.new_full((len(input_ids),), value) for name, value in wanted.items()}


def auxiliary_loss(model: nn.Module, batch: Batch) -> torch.Tensor | None:
    """The regularisers that the attached method adds to the loss of the task; None where it has none.

    AdaLoRA keeps its factors orthogonal (PEFT adds that only to a loss of its own making), KaSA and
    MonteCLoRA offer theirs to the caller, Shadow trains its own path on the same labels.
    """
    base: Any = getattr(model, "base_model", None)
    config: Any = next(iter(getattr(model, "peft_config", {}).values()), None)
    terms = []
    for name in ("_get_kasa_loss", "_get_monteclora_loss"):
        if offered := getattr(base, name, None):
            terms.append(offered())
    if weight := getattr(config, "orth_reg_weight", 0):
        factors = [p for name, p in trainable_parameters(model) if "lora_A" in name or "lora_B" in name]
        squares = [p @ p.T if p.shape[0] <= p.shape[1] else p.T @ p for p in factors]
        norms = [torch.linalg.matrix_norm(s - torch.eye(len(s), device=s.device, dtype=s.dtype)) for s in squares]
        terms.append(weight * torch.stack(norms).mean())
    if shadow := getattr(base, "shadow_auxiliary_loss", None):
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
        labels[:, 1:] = labels[:, 1:].masked_fill(~batch.answer_mask, -100)
        term = shadow(labels, attention_mask=batch.attention_mask)
        terms.append(0.0 if term is None else config.auxiliary_loss_weight * term)
    tensors = [term for term in terms if isinstance(term, torch.Tensor)]
    return torch.stack(tensors).sum() if tensors else None


# ---- counting and saving ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters, each weight of a quantised base counted as one."""

    trainable: int
    total: int
    trainable_bytes: int


def count(model: nn.Module) -> Counts:
    """Count the parameters of ``model``; packed 4-bit weights by the shape they stand for."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return Counts(
        trainable=sum(p.numel() for p in trainable),
        total=sum(weight_count(p) for p in model.parameters()),
        trainable_bytes=sum(p.numel() * p.element_size() for p in trainable),
    )


def weight_count(parameter: nn.Parameter) -> int:
    """How many numbers the parameter stands for; 4-bit ones are packed."""
    packed = getattr(parameter, "quant_state", None)
    return parameter.numel() if packed is None else int(torch.Size(packed.shape).numel())


def trainable_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters that training changes."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def saved_bytes(model: PeftModel) -> int:
    """The size of the safetensors file that ``save`` writes, to the byte, without writing it.

    Eight bytes of length, a JSON header of each tensor's type, shape and place, padded to a multiple of
    eight, then the tensors, those of wide types first (github.com/huggingface/safetensors, its format). Of
    AdaLoRA it is the file after training, with as many ranks in each layer, see ``shapes.at_target_rank``.
    """
    if hasattr(model, "prompt_encoder"):  # what is saved is what it says, so that it must be there to be asked
        model.prompt_encoder.to_empty(device="cpu")
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    state = at_target_rank(state, model.active_peft_config)
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64", torch.int32: "I32"}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor in sorted(state.items(), key=lambda item: (-item[1].element_size(), item[0])):
        end = start + tensor.numel() * tensor.element_size()
        kind = names.get(tensor.dtype, "U8")
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + (length + 7) // 8 * 8 + start


def save(model: PreTrainedModel | PeftModel, folder: Path) -> int:
    """Write the active adapter (or, after full fine-tuning, the model), to the disk, and return its size in bytes.

    Where its beginning was kept, what it has learned is written as a LoRA of twice the rank that
    belongs to the untouched base.
    """
    if isinstance(model, PeftModel):
        initial = folder / INITIAL
        name = model.active_adapter
        # "auto" would ask the hub whether the base's vocabulary changed; nothing here changes it.
        model.save_pretrained(
            str(folder),
            selected_adapters=[name],
            save_embedding_layers=False,
            path_initial_model_for_weight_conversion=str(initial) if initial.exists() else None,
        )
        for file in (folder / name).glob("*"):  # where PEFT puts one of several
            file.replace(folder / file.name)
        if name != "default":
            (folder / name).rmdir()
    else:
        model.save_pretrained(str(folder))
    sync_tree(folder)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def restore(
    base: PreTrainedModel,
    folder: Path,
    inputs: dict[str, int] | None = None,
    *,
    float32: bool = True,
    trainable: bool = False,
) -> PreTrainedModel | PeftModel:
    """The trained model back from what ``save`` wrote, on the device of ``base``; the rest as for ``attach``.

    Raises:
        InputError: the adapter does not fit the base.
    """
    base = _base_of(base, folder)
    if (folder / "adapter_config.json").exists():
        adapted = _with_adapter(base, folder, is_trainable=trainable, autocast_adapter_dtype=float32)
        setattr(adapted, METHOD_INPUTS, inputs or {})
        keep_dtype(adapted)
        return adapted.eval()
    return cast(PreTrainedModel, read(folder, base).eval())


def _with_adapter(base: PreTrainedModel, folder: Path, **options: Any) -> PeftModel:
    """``PeftModel.from_pretrained``, which is silent about weights that it has no place for, as an error."""
    with _load_results() as results, names_as_written() if _written_now(folder) else nullcontext():
        where = str(base.device)  # PEFT would take the first GPU there is
        adapted = PeftModel.from_pretrained(base, str(folder), torch_device=where, **options)
    missing = [key for result in results for key in result.missing_keys if not any(name in key for name in SHARED)]
    unknown = [key for result in results for key in result.unexpected_keys if "." in key]  # a prompt's have no dot
    for what, keys in (("the model has no place for", unknown), ("the file lacks", missing)):
        if keys:
            more = f" and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
            raise InputError(
                f"adapter {folder}: it is of another model than {type(base).__name__}: {what} "
                f"{', '.join(keys[:NAMED])}{more}"
            )
    return adapted


def _written_now(folder: Path) -> bool:
    """Whether no weight in the file is of a single expert, as transformers 4 named them."""
    file = folder / "adapter_model.safetensors"
    if not file.exists():
        return False
    with safe_open(file, framework="pt") as weights:
        return not any(re.search(r"experts\.\d+\.", key) for key in weights.keys())  # noqa: SIM118


@contextmanager
def names_as_written() -> Iterator[None]:
    """PEFT attaches LoRA to the modules that are named.

    Without this it takes ``gate_proj``, ``up_proj`` and ``down_proj`` of many mixtures of experts, those of dense
    layers and of shared experts too, for the names of experts in transformers 4, and adapts the experts instead.
    """
    with patch.object(transformers_weight_conversion, "convert_peft_config_for_transformers", lambda *_, **__: None):
        yield


@contextmanager
def _load_results() -> Iterator[list[Any]]:
    """What PEFT finds out while it loads adapters and does not tell."""
    results: list[Any] = []
    load = PeftModel.load_adapter

    def noted(self: PeftModel, *args: Any, **options: Any) -> Any:
        results.append(load(self, *args, **options))
        return results[-1]

    with patch.object(PeftModel, "load_adapter", noted):
        yield results


def _base_of(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The base that the adapter in ``folder`` belongs to: the one kept beside it, else ``base``."""
    if not (folder / RESIDUAL).exists():
        return base
    residual = read(folder / RESIDUAL, base)
    keep_weights_unpacked(residual)
    return residual


def read(folder: Path, like: PreTrainedModel) -> PreTrainedModel:
    """The model saved in ``folder``, of the class and dtype and on the device of ``like``."""
    return type(like).from_pretrained(folder, dtype=like.dtype, device_map={"": like.device})


def dequantised(base: PreTrainedModel, folder: Path) -> PeftModel:
    """The adapter saved in ``folder`` on ``base``, which is dequantised first and consumed."""
    base = _base_of(base, folder)
    if getattr(base, "is_quantized", False):
        base = cast(Any, base).dequantize()
        vars(base)["_weight_conversions"] = None  # by which transformers would pack a saved base's weights again
        vars(base).update(is_loaded_in_4bit=False, is_loaded_in_8bit=False)  # by which PEFT refuses to merge IA3
    return _with_adapter(base, folder).eval()


class NotMergeable(Exception):
    """What the method adds, such as tokens of a prompt, has no place in the base's weights."""

    def __str__(self) -> str:
        return f"not mergeable: {NOT_MERGEABLE}"


def mergeable(adapted: PeftModel) -> bool:
    """Whether PEFT merges the method at all."""
    can = callable(getattr(adapted.base_model, "merge_and_unload", None))
    return can and not adapted.active_peft_config.is_prompt_learning


def merge(adapted: PeftModel) -> PreTrainedModel:
    """The base of ``adapted`` with the adapter merged into its weights; both are consumed.

    Where the method changes one of two tied weights (embeddings and head), they are untied.

    Raises:
        NotMergeable: the method adds what cannot be merged into weights.
        Exception: whatever PEFT raises for a method that it cannot merge.
    """
    if not mergeable(adapted):
        raise NotMergeable
    _untie(adapted.get_base_model())
    return cast(PreTrainedModel, cast(Any, adapted).merge_and_unload(safe_merge=True).eval())


def _untie(base: Any) -> None:
    """Give the head a weight of its own, where it is the embeddings' and one of the two has an adapter."""
    ends: list[Any] = [base.get_input_embeddings(), base.get_output_embeddings()]
    layers: list[Any] = [end.get_base_layer() if isinstance(end, BaseTunerLayer) else end for end in ends]
    touched = any(isinstance(end, (BaseTunerLayer, AuxiliaryTrainingWrapper)) for end in ends)
    if None in ends or not touched:
        return
    first, last = (layer.original_module if hasattr(layer, "original_module") else layer for layer in layers)
    if first.weight is last.weight:
        last.weight = nn.Parameter(last.weight.detach().clone(), requires_grad=False)
    for config in (base.config, text_config(base)):
        config.tie_word_embeddings = False
