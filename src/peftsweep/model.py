"""Load the base, quantise it, attach a method, count, save."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from peft import PeftConfig, PeftModel, TaskType, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from peftsweep.data import Batch
from peftsweep.errors import InputError
from peftsweep.schema import Init, ModelConfig, TargetsConfig

TINY = Path(__file__).parent / "tiny" / "weights"
METHOD_INPUTS = "peftsweep_method_inputs"  # the attribute of an adapted model that holds them
LINEAR = (nn.Linear, Conv1D)  # bitsandbytes' quantised layers are subclasses of nn.Linear


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
    """``auto`` is the first CUDA device, or the CPU where there is none.

    Raises:
        InputError: torch knows no such device, or it is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device={name}: {str(error).splitlines()[0]}") from None


def architecture(model: ModelConfig) -> transformers.PreTrainedConfig:
    """The model's transformers configuration, from its yaml for presets, else from its folder or the hub.

    Raises:
        InputError: it cannot be found, or ``model.architecture`` names no known one.
    """
    if model.architecture:
        fields = dict(model.architecture)
        try:
            return AutoConfig.for_model(fields.pop("model_type"), **fields)
        except (KeyError, ValueError, TypeError) as error:
            raise InputError(f"model.architecture: {str(error).splitlines()[0]}") from None
    if model.init is Init.random:
        raise InputError("model.init=random needs model.architecture (model_type and sizes), as the presets have")
    try:
        found = AutoConfig.from_pretrained(source(model), revision=model.revision or "main")
        return cast(transformers.PreTrainedConfig, found)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"model.name_or_path={model.name_or_path}: cannot be loaded ({reason})") from error


def skeleton(model: ModelConfig, where: str = "meta") -> PreTrainedModel:
    """The base without its weights: enough to attach a method and to count.

    On the meta device it takes no memory; on another its weights are random numbers.
    """
    config = architecture(model)
    try:
        with torch.device(where):
            return cast(
                PreTrainedModel, AutoModelForCausalLM.from_config(config, dtype=getattr(torch, model.dtype.value))
            )
    except ValueError as error:  # transformers has no causal model of this type
        raise InputError(
            f"model.name_or_path={model.name_or_path}: not a causal language model (model_type {config.model_type})"
        ) from error


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """The base's tokenizer; the embedded one where the weights are random. Pads with EOS if it must."""
    folder = str(TINY) if model.init is Init.random else source(model)
    tokenizer = cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(folder, revision=model.revision or "main"))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load(model: ModelConfig, quantization: Any, where: torch.device) -> PreTrainedModel:
    """The frozen base on ``where``, in eval mode; ``quantization`` is a transformers quantization config or None."""
    options: dict[str, Any] = {"dtype": getattr(torch, model.dtype.value)}
    if model.attn_implementation is not None:
        options["attn_implementation"] = model.attn_implementation
    if model.init is Init.random:
        base = _random(model, quantization, where, options)
    else:
        base = AutoModelForCausalLM.from_pretrained(
            source(model),
            revision=model.revision or "main",
            quantization_config=quantization,
            device_map={"": where},
            **options,
        )
    keep_weights_unpacked(base)
    base.requires_grad_(False)
    return cast(PreTrainedModel, base.eval())


def _random(model: ModelConfig, quantization: Any, where: torch.device, options: dict[str, Any]) -> PreTrainedModel:
    config = architecture(model)
    torch.manual_seed(0)  # the base is the same for every seed of a trial
    with where:
        base = AutoModelForCausalLM.from_config(config, **options)
    if quantization is None:
        return cast(PreTrainedModel, base)
    # Quantisation happens while weights are loaded, so the random ones are handed over as a checkpoint.
    weights = base.state_dict()
    return cast(
        PreTrainedModel,
        type(base).from_pretrained(
            None,
            config=config,
            state_dict=weights,
            quantization_config=quantization,
            device_map={"": where},
            **options,
        ),
    )


def keep_weights_unpacked(base: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights at the first evaluation on an AVX512-BF16 CPU.

    The packed form has no backward: every gradient after an evaluation would be silently wrong, and
    so would merging and saving.
    """
    module: Any
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


# ---- attaching -------------------------------------------------------------------------------------


def target_modules(base: nn.Module, targets: TargetsConfig, roles: dict[str, list[str]]) -> list[str] | None:
    """The names of the modules that ``targets`` means in ``base``; None leaves them to the method.

    Raises:
        InputError: a role or module that the model lacks; the line lists what it has.
    """
    if targets.all_linear:
        return linear_names(base)
    if targets.roles is not None:
        found = {role: [name for name in names if _has(base, name)] for role, names in roles.items()}
        for role in targets.roles:
            if not found.get(role):
                available = ", ".join(role for role, names in found.items() if names) or "none"
                raise InputError(f"targets.roles: the model has no '{role}'; it has: {available}")
        return [name for role in targets.roles for name in found[role]]
    if targets.modules is not None:
        check_modules(base, targets.modules, "targets.modules")
        return list(targets.modules)
    return None


def check_modules(base: nn.Module, names: list[str], key: str) -> None:
    """Refuse module names that ``base`` lacks, naming those that it has."""
    for name in names:
        if not _has(base, name):
            raise InputError(f"{key}: the model has no module '{name}'; it has: {', '.join(linear_names(base))}")


def linear_names(base: nn.Module) -> list[str]:
    """The last names of all linear layers but the output head, in order of appearance."""
    head = base.get_output_embeddings() if isinstance(base, PreTrainedModel) else None
    names = (name for name, module in base.named_modules() if isinstance(module, LINEAR) and module is not head)
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def _has(base: nn.Module, name: str) -> bool:
    return any(full == name or full.endswith(f".{name}") for full, _ in base.named_modules())


def attach(
    base: PreTrainedModel,
    method: PeftConfig | None,
    targets: TargetsConfig,
    roles: dict[str, list[str]],
    inputs: dict[str, int] | None = None,
) -> PreTrainedModel | PeftModel:
    """Attach ``method`` to ``base``, in place; None makes all of the base trainable (full fine-tuning).

    ``inputs`` are what the method's forward wants beside the tokens, such as ``{"task_ids": 0}``.

    Raises:
        InputError: the targets do not fit the model or the method, or PEFT refuses the options.
    """
    modules = target_modules(base, targets, roles)
    if method is None:
        if modules is not None:
            raise InputError("targets: full fine-tuning trains every module; leave targets=default")
        return base.requires_grad_(True)
    if modules is not None:
        if not hasattr(method, "target_modules"):
            raise InputError(f"targets: {type(method).__name__} has no target modules; leave targets=default")
        method.target_modules = modules
    elif isinstance(wanted := getattr(method, "target_modules", None), list | set):
        check_modules(base, sorted(wanted), "method.target_modules")
    if modules is not None and hasattr(method, "feedforward_modules"):
        # IA3 scales the input, not the output, of feed-forward layers, and must be told which those are.
        method.feedforward_modules = [name for name in modules if name in roles.get("mlp", [])]
    method.task_type = method.task_type or TaskType.CAUSAL_LM
    try:
        adapted = get_peft_model(base, method)
    except (ValueError, TypeError, ImportError) as error:
        raise InputError(f"method: {' '.join(str(error).split())}") from error
    setattr(adapted, METHOD_INPUTS, inputs or {})
    return adapted


# ---- using -----------------------------------------------------------------------------------------


def answer_losses(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Cross-entropy of every answer token of ``batch``, in float32: shape [batch.answer_tokens].

    Logits are asked for from the first answer on only: with a large vocabulary they are most of the
    memory. Methods that put virtual tokens before the input return longer logits; the last positions
    are those of the input.
    """
    positions = batch.input_ids.shape[1] - batch.answer_start + 1  # the one before the first answer predicts it
    output = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        use_cache=False,
        logits_to_keep=positions,
        **row_inputs(model, batch.input_ids),
    )
    mask = batch.answer_mask[:, batch.answer_start - 1 :]
    logits = output.logits[:, -positions:-1][mask]
    targets = batch.input_ids[:, batch.answer_start :][mask]
    return nn.functional.cross_entropy(logits.float(), targets, reduction="none")


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
        total=sum(_size(p) for p in model.parameters()),
        trainable_bytes=sum(p.numel() * p.element_size() for p in trainable),
    )


def _size(parameter: nn.Parameter) -> int:
    packed = getattr(parameter, "quant_state", None)
    return parameter.numel() if packed is None else int(torch.Size(packed.shape).numel())


def trainable_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters that training changes."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def save(model: PreTrainedModel | PeftModel, folder: Path) -> int:
    """Write the adapter (or, after full fine-tuning, the model) and return its size in bytes on disk."""
    if isinstance(model, PeftModel):
        # "auto" would ask the hub whether the base's vocabulary changed; nothing here changes it.
        model.save_pretrained(str(folder), save_embedding_layers=False)
    else:
        model.save_pretrained(str(folder))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def restore(base: PreTrainedModel, folder: Path, inputs: dict[str, int] | None = None) -> PreTrainedModel | PeftModel:
    """The trained model back from what ``save`` wrote, on the device of ``base``; ``inputs`` as for ``attach``."""
    if (folder / "adapter_config.json").exists():
        adapted = PeftModel.from_pretrained(base, str(folder))
        setattr(adapted, METHOD_INPUTS, inputs or {})
        return adapted.eval()
    trained = AutoModelForCausalLM.from_pretrained(folder, dtype=base.dtype, device_map={"": base.device})
    return cast(PreTrainedModel, trained.eval())
