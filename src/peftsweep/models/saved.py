"""Save adapters and models, read them back, merge them."""

from __future__ import annotations

import copy
import json
import logging
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import torch
from peft import PeftModel, get_peft_model_state_dict, load_peft_weights
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import transformers_weight_conversion
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from peftsweep.errors import InputError, first_line, some
from peftsweep.models.checkpoint.weights import check_end_marks
from peftsweep.models.losses import METHOD_INPUTS, READS_PADDING
from peftsweep.models.model import WITH_ADAPTER, is_local, source
from peftsweep.models.parts import as_configured, text_config
from peftsweep.models.quantised.layers import dequantise, is_quantised, patch_layers
from peftsweep.models.shapes import at_target_rank
from peftsweep.schema import Init, ModelConfig, Task
from peftsweep.study.atomic import sync_tree
from peftsweep.study.store import RESIDUAL, WEIGHTS

# PEFT reads the attribute by its old name whenever it puts an adapter on a model.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)

log = logging.getLogger(__name__)

INITIAL = "initial"  # a folder in a saved adapter: the initial adapter, if its initialisation changed the base
STEMS = ("model", "pytorch_model")  # the names of weight files that transformers reads begin so
POINTER = b"version https://git-lfs"  # the first bytes of files that a clone without git-lfs leaves
SHARED = ("vblora_vector_bank", "prompt_encoder")  # weights of an adapter that are saved once, under other names
EXPERT_PARTS = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")  # names of experts' layers in transformers 4
NOT_MERGEABLE = "what the method adds cannot be merged into the weights"


def check_files(model: ModelConfig) -> None:
    """Check that the folder of a model holds whole weight files and no adapter, without reading the weights.

    Raises:
        InputError: the folder does not.
    """
    if model.init is Init.random or not is_local(model):
        return
    folder, key = Path(source(model)), f"model.name_or_path={model.name_or_path}"
    if (folder / "adapter_config.json").is_file():
        raise InputError(f"{key}: {WITH_ADAPTER}")
    if model.task is Task.causal_lm:
        _check_generation(folder / "generation_config.json", key)
    found = {file.name: file for file in folder.iterdir() if file.suffix in WEIGHTS}
    if not found:
        raise InputError(f"{key}: holds no weights, such as model.safetensors")
    for index in sorted(folder.glob("*.index.json")):
        try:
            shards = {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{key}: {index.name} cannot be read ({first_line(error)})") from None
        if index.name.startswith(STEMS) and (missing := sorted(shards - found.keys())):
            raise InputError(f"{key}: lacks {missing[0]} ({len(missing)} of {len(shards)} files of {index.name})")
    for name, file in found.items():
        if name.startswith(STEMS) and (problem := _problem(file, file.stat().st_size, file.stat().st_mtime_ns)):
            raise InputError(f"{key}: {name} is not a complete file of weights ({problem}); copy or download it again")


def _check_generation(file: Path, key: str) -> None:
    """Refuse generation settings that cannot be read, or whose end marks are no tokens."""
    if not file.is_file():
        return
    try:
        marks = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{key}: {file.name} cannot be read ({first_line(error)})") from None
    check_end_marks(marks, key)


@lru_cache(maxsize=10_000)
def _problem(file: Path, size: int, modified: int) -> str | None:
    """What is wrong with a file of weights, by its first bytes and its ``size``; None if nothing is."""
    with file.open("rb") as stream:
        beginning = stream.read(len(POINTER))
    if beginning == POINTER:
        return "a pointer of git-lfs; git lfs pull downloads the file"
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt"):
                return None
        except (SafetensorError, OSError) as error:
            return first_line(error)
    return "cut off" if beginning.startswith(b"PK") and not zipfile.is_zipfile(file) else None


def keep_dtype(adapted: PeftModel) -> None:
    """Make adapters on quantised layers return the dtype of their input.

    Adapters of several methods (IA3, RoAd, RandLora, PVeRA, AdaLoRA on 8 bits) return 32 bits, so on a 16-bit base
    attention would get queries, keys and values of two dtypes.
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
        if isinstance(module, BaseTunerLayer) and is_quantised(module.get_base_layer()):
            module.register_forward_hook(cast_back)


def saved_bytes(model: PeftModel) -> int:
    """The exact size in bytes of the safetensors file that ``save`` writes, without writing it.

    The format (github.com/huggingface/safetensors): eight bytes of length, a JSON header with each tensor's type,
    shape and offsets, padded to a multiple of eight, then the tensors, wide types first. For AdaLoRA it is the file
    after training with equal ranks in all layers, see ``shapes.at_target_rank``.
    """
    if hasattr(model, "prompt_encoder"):  # PEFT saves the output of the prompt encoder, so it must be on a real device
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
    """Save the active adapter, or the model after full fine-tuning, and return the size of its weights in bytes.

    If the initial adapter was kept (``INITIAL``), the change since then is saved, as a LoRA of twice the rank for the
    untouched base.
    """
    if isinstance(model, PeftModel):
        initial = folder / INITIAL
        name = model.active_adapter
        # "auto" would query the hub whether the base's vocabulary changed; peftsweep never changes it.
        model.save_pretrained(
            str(folder),
            selected_adapters=[name],
            save_embedding_layers=False,
            path_initial_model_for_weight_conversion=str(initial) if initial.exists() else None,
        )
        for file in (folder / name).glob("*"):  # PEFT saves one of several adapters in a folder of its name
            file.replace(folder / file.name)
        if name != "default":
            (folder / name).rmdir()
    else:
        with as_configured(model):
            model.save_pretrained(str(folder))
    for file in folder.rglob("*.safetensors"):  # version 0.8 writes them for their owner alone, whatever the umask is
        with suppress(OSError):  # a disk without permissions
            file.chmod(file.parent.stat().st_mode & 0o666)
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
    """Read the trained model that ``save`` wrote, on the device of ``base``; other arguments as for ``attach``.

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
    """``PeftModel.from_pretrained``, with an InputError for missing and unexpected weights, which PEFT ignores."""
    other = f"it belongs to another model than {type(base).__name__}"
    if base.device.type == "meta":  # of a plan; later the numbers are not looked at again
        _check_numbers(folder)
    with _load_results() as results, names_as_written() if _written_now(folder) else nullcontext():
        where = "cpu" if base.device.type == "meta" else str(base.device)  # PEFT would use the first GPU
        try:
            adapted = PeftModel.from_pretrained(base, str(folder), torch_device=where, **options)
        except RuntimeError as error:
            shapes = re.search(r"size mismatch for (\S+): .*?Size\((.*?)\).*?Size\((.*?)\)", str(error))
            if shapes is None:
                raise
            raise InputError(
                f"adapter {folder}: {other}, or to another adapter_config.json: {shapes[1]} has the shape {shapes[2]} "
                f"in the file, and {shapes[3]} in the model"
            ) from error
        except KeyError as error:  # of a module that is saved whole
            raise InputError(f"adapter {folder}: {other}: the file lacks {error.args[0]}") from error
        except (ValueError, TypeError, IndexError) as error:  # of a value in adapter_config.json
            raise InputError(f"adapter {folder}: PEFT cannot read it ({first_line(error)})") from error
    missing = [key for result in results for key in result.missing_keys if not any(name in key for name in SHARED)]
    unknown = [key for result in results for key in result.unexpected_keys if "." in key]  # keys of prompts have no dot
    for what, keys in (("the model has no such weights:", unknown), ("the file lacks", missing)):
        if keys:
            raise InputError(f"adapter {folder}: {other}: {what} {some(keys)}")
    return adapted


def _check_numbers(folder: Path) -> None:
    """Refuse an adapter with a weight that is NaN or infinite.

    Raises:
        InputError: the message names the weights.
    """
    try:
        weights = load_peft_weights(str(folder), device="cpu")
    except Exception as error:  # a file that is missing or damaged: loading will say so
        log.debug("%s: its weights cannot be read: %s", folder, error)
        return
    if broken := [name for name, one in weights.items() if one.is_floating_point() and not one.isfinite().all()]:
        raise InputError(f"adapter {folder}: {some(broken)} holds NaN or infinite numbers: its training diverged")


def _written_now(folder: Path) -> bool:
    """Whether the file has no weights of single experts, which transformers 4 had."""
    file = folder / "adapter_model.safetensors"
    if not file.exists():
        return False
    with safe_open(file, framework="pt") as weights:
        return not any(re.search(r"experts\.\d+\.", key) for key in weights.keys())  # noqa: SIM118


@contextmanager
def names_as_written() -> Iterator[None]:
    """In the body PEFT attaches LoRA to exactly the modules that are named.

    Otherwise, in many mixtures of experts, PEFT reads ``gate_proj``, ``up_proj`` and ``down_proj``, also of dense
    layers and shared experts, as names of experts in transformers 4, and adapts the experts instead.
    """
    convert = transformers_weight_conversion.convert_peft_adapter_state_dict_for_transformers

    def where_needed(model: PeftModel, peft_config: Any, adapter_state_dict: Any, adapter_name: str) -> Any:
        own = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
        if adapter_state_dict.keys() <= own.keys():  # names that need no change; those of Laguna would get a wrong one
            return adapter_state_dict
        return convert(model, peft_config, adapter_state_dict, adapter_name)

    with (
        patch.object(transformers_weight_conversion, "convert_peft_config_for_transformers", lambda *_, **__: None),
        patch.object(transformers_weight_conversion, "convert_peft_adapter_state_dict_for_transformers", where_needed),
    ):
        yield


def warn_of_misread(method: Any, base: PreTrainedModel) -> None:
    """Log a warning that names target modules that PEFT without ``names_as_written`` takes for experts, or refuses.

    Such a saved adapter is right in peftsweep, and another one where PEFT itself loads it.
    """
    targets = getattr(method, "target_modules", None)
    if not targets or isinstance(targets, str):
        return
    converted = copy.deepcopy(method)
    try:
        transformers_weight_conversion.convert_peft_config_for_transformers(converted, base, None)
        taken = set(targets) - set(converted.target_modules)
    except ValueError:  # it fuses the parts of experts, and only some of them are named
        taken = {name for name in targets if name.rpartition(".")[2] in EXPERT_PARTS}
    if taken:
        names = ", ".join(sorted({name.rpartition(".")[2] for name in taken}))
        log.warning(
            "targets: in %s PEFT itself takes %s of a saved adapter for experts; load it with peftsweep, or merge it "
            "(adapter.merge=true)",
            base.config.model_type,
            names,
        )


@contextmanager
def _load_results() -> Iterator[list[Any]]:
    """Collect the missing and unexpected keys that PEFT finds while it loads adapters."""
    results: list[Any] = []
    load = PeftModel.load_adapter

    def noted(self: PeftModel, *args: Any, **options: Any) -> Any:
        results.append(load(self, *args, **options))
        return results[-1]

    with patch.object(PeftModel, "load_adapter", noted):
        yield results


def _base_of(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The base of the adapter in ``folder``: the one saved beside it, else ``base``."""
    if base.device.type == "meta" or not (folder / RESIDUAL).exists():
        return base
    residual = read(folder / RESIDUAL, base)
    patch_layers(residual)
    return residual


def read(folder: Path, like: PreTrainedModel) -> PreTrainedModel:
    """The model saved in ``folder``, of the class and dtype and on the device of ``like``."""
    found = type(like).from_pretrained(folder, dtype=like.dtype, device_map={"": like.device})
    setattr(found, READS_PADDING, getattr(like, READS_PADDING, False))
    return found


def dequantised(base: PreTrainedModel, folder: Path) -> PeftModel:
    """The adapter saved in ``folder`` on ``base``, which is dequantised first and consumed."""
    base = _base_of(base, folder)
    if getattr(base, "is_quantized", False):
        base = dequantise(base)
        vars(base)["_weight_conversions"] = None  # else saving the base would pack its weights again
        vars(base).update(is_loaded_in_4bit=False, is_loaded_in_8bit=False)  # else PEFT refuses to merge IA3
        _as_made(base)
    return _with_adapter(base, folder).eval()


def _as_made(base: Any) -> None:
    """Restore the Conv1D layers of a dequantised model, which have weights [in, out] in place of [out, in]."""
    with torch.device("meta"):
        made = type(base)(base.config)
    for name, module in made.named_modules():
        plain = base.get_submodule(name) if isinstance(module, Conv1D) else None
        if isinstance(plain, nn.Linear):
            module.weight = nn.Parameter(plain.weight.detach().T.contiguous(), requires_grad=False)
            module.bias = plain.bias if plain.bias is not None else nn.Parameter(plain.weight.new_zeros(module.nf))
            base.set_submodule(name, module)


class NotMergeable(Exception):
    """The method adds something, such as prompt tokens, that the base's weights cannot hold."""

    def __str__(self) -> str:
        return f"not mergeable: {NOT_MERGEABLE}"


def mergeable(adapted: PeftModel) -> bool:
    """Whether PEFT can merge the method."""
    can = callable(getattr(adapted.base_model, "merge_and_unload", None))
    return can and not adapted.active_peft_config.is_prompt_learning


def merge(adapted: PeftModel) -> PreTrainedModel:
    """The base of ``adapted`` with the adapter merged into its weights; both are consumed.

    If the method changes one of two tied weights (embeddings and head), they are untied.

    Raises:
        NotMergeable: the method cannot be merged into weights.
        Exception: any error of PEFT for a method that it cannot merge.
    """
    if not mergeable(adapted):
        raise NotMergeable
    _untie(adapted.get_base_model())
    unwrap_heads(adapted)
    return cast(PreTrainedModel, cast(Any, adapted).merge_and_unload(safe_merge=True).eval())


def unwrap_heads(adapted: PeftModel) -> None:
    """Put heads of several layers (a pooler, RoBERTa's classifier) in the place of PEFT's wrappers around them.

    All methods but LoRA merge only wrappers around one layer: PEFT asks for the weight of what it unwraps.
    """
    base = adapted.get_base_model()
    for name, module in [*base.named_modules()]:
        if isinstance(module, ModulesToSaveWrapper) and module.active_adapters:
            trained = module.modules_to_save[module.active_adapters[0]]
            if not hasattr(trained, "weight"):
                base.set_submodule(name, trained)


def _untie(base: Any) -> None:
    """Give the head its own weight if it shares that of the embeddings and one of the two has an adapter."""
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
