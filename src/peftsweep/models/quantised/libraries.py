"""The libraries that quantise a base: what each needs, and the formats that were tested.

A library has the name that transformers uses as ``quant_method`` in quantization configs and in the configs of
checkpoints. transformers' quantizer checks the requirements of a library, before anything is loaded.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peftsweep.errors import InputError, first_line
from peftsweep.schema import value_at

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Library:
    """A library that quantises while transformers loads a model."""

    name: str  # transformers' quant_method
    config: str  # transformers' class of its options
    module: str  # the module that must be importable
    install: str  # what pip installs
    tried: tuple[str, ...] = ()  # formats with which training was tested; for others the memory is not predicted
    gpu: bool = False  # whether it needs a GPU


FORMATS_OF_TORCHAO = ("Int8WeightOnlyConfig", "Float8WeightOnlyConfig")
LIBRARIES = (
    Library("bitsandbytes", "BitsAndBytesConfig", "bitsandbytes", "peftsweep", ("4bit", "8bit")),
    Library("torchao", "TorchAoConfig", "torchao", "peftsweep[torchao]", FORMATS_OF_TORCHAO),
    Library("quanto", "QuantoConfig", "optimum.quanto", "peftsweep[quanto]", ("int8", "float8", "int4")),
    Library("hqq", "HqqConfig", "hqq", "hqq"),
    Library("fp8", "FineGrainedFP8Config", "kernels", "kernels", gpu=True),
)
INFERENCE_ONLY = "transformers and PEFT support such weights for inference only"
BY_NAME = {one.name: one for one in LIBRARIES}
BY_CONFIG = {one.config: one for one in LIBRARIES}


@dataclass(frozen=True)
class Untested:
    """Stands for the quantization config of a checkpoint whose library was not tested."""

    library: str

    def to_dict(self) -> dict[str, Any]:
        """The fields, as ``to_dict`` of transformers' configs."""
        return {"quant_method": self.library}


def kind(config: Mapping[str, Any]) -> str:
    """The kind of base for a quantization config, one of ``compatibility.KINDS``."""
    if config.get("load_in_4bit") or config.get("load_in_8bit"):
        return "4bit" if config.get("load_in_4bit") else "8bit"
    method = config.get("quant_method")
    if method is None or method == "bitsandbytes":
        return "none"
    library = BY_NAME.get(str(getattr(method, "value", method)))
    stored = value_at(config, "quant_type.default._type") or config.get("weights")  # of torchao, of quanto
    tried = library is not None and stored in library.tried and not config.get("include_input_output_embeddings")
    return library.name if library is not None and tried else "untested"


def is_tried(quantization: Any) -> bool:
    """Whether training with a quantization config was tested, so that its memory can be predicted."""
    return kind(quantization.to_dict()) != "untested"


def is_installed(module: str) -> bool:
    """Whether a module can be imported, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def problem(quant: Mapping[str, Any], gpus: int) -> str | None:
    """Why a base with the keys of ``quant`` cannot be trained on this machine; None if it can.

    ``gpus`` is the number of GPUs. The library is not imported.
    """
    library = BY_CONFIG.get(str(quant.get("_target_")).rpartition(".")[2])
    if library is None:
        return None
    if "Int4" in str(value_at(quant, "quant_type._target_")):
        return INFERENCE_ONLY
    import transformers
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
    from transformers.quantizers.base import HfQuantizer

    quantizer: Any = AUTO_QUANTIZER_MAPPING.get(library.name)
    if quantizer is not None and quantizer.get_quantize_ops is HfQuantizer.get_quantize_ops:
        return f"transformers {transformers.__version__} cannot quantise with {library.name} while it loads a model"
    if library.gpu and not gpus:
        return "needs a GPU; without one use quant=fp8_torchao"
    if not is_installed(library.module):
        return f"needs the package {library.module}: pip install '{library.install}'"
    return None


def check_config(quantization: Any, key: str, *, loaded: bool, on_cpu: bool) -> None:
    """Refuse a quantization config that transformers' quantizer refuses here, or that does not support training.

    ``loaded``: the weights of the checkpoint are stored in this format. Messages begin with ``key``. Requirements for a
    GPU are checked only on loading, because the check would initialise CUDA in a process that forks workers.

    Raises:
        InputError: the message gives the reason.
    """
    from transformers.quantizers.auto import AutoHfQuantizer

    if quantization.quant_method == "bitsandbytes":  # its requirements are those of every trial
        return
    try:
        quantizer: Any = AutoHfQuantizer.from_config(quantization, pre_quantized=loaded)
        if on_cpu:
            quantizer.validate_environment(device_map={"": "cpu"}, weights_only=True)
        trains = bool(quantizer.is_trainable)
    except Exception as error:  # a missing package, a wrong version or device: many types
        raise InputError(f"{key}: {first_line(error)}") from error
    if not trains:
        raise InputError(f"{key}: {INFERENCE_ONLY}")
    if not loaded and not is_tried(quantization):
        log.warning("%s: untested; its memory is not predicted", key)


def checkpoint_quantization(shape: Any, name: str) -> Mapping[str, Any] | None:
    """The quantization config in the config.json of checkpoint ``name``, or of its text part; None if there is none.

    Raises:
        InputError: it is empty or not an object, which transformers would refuse while it loads the weights.
    """
    configs = (shape, shape.get_text_config(decoder=True))
    held = next((one for config in configs if (one := getattr(config, "quantization_config", None)) is not None), None)
    stated = held.to_dict() if held is not None and hasattr(held, "to_dict") else held
    if stated is not None and not (isinstance(stated, Mapping) and stated):
        raise InputError(
            f"model.name_or_path={name}: quantization_config={stated} in its config.json names no library; delete it "
            "if the checkpoint is not quantised"
        )
    return stated


def of_checkpoint(config: Mapping[str, Any], name: str, *, on_cpu: bool) -> Any:
    """The quantization config of a checkpoint ``name`` from its config.json; ``Untested`` for other libraries.

    Raises:
        InputError: as ``check_config``.
    """
    from transformers.quantizers.auto import AutoQuantizationConfig

    library = str(config.get("quant_method", "a library that it does not name"))
    known = BY_NAME.get(library)
    key = f"model.name_or_path={name}: is quantised by {library}"
    if known is not None and not is_installed(known.module):
        raise InputError(f"{key}, which needs the package {known.module}: pip install '{known.install}'")
    try:
        quantization: Any = AutoQuantizationConfig.from_dict(dict(config))
    except Exception as error:
        raise InputError(f"{key}: {first_line(error)}") from error
    check_config(quantization, key, loaded=True, on_cpu=on_cpu)
    if is_tried(quantization):
        return quantization
    log.warning("%s is quantised by %s: untested; its memory is not predicted", name, library)
    return Untested(library)
