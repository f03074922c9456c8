"""Imports that the process makes which workers are forked from.

A process that was forked from one that has initialised CUDA cannot use CUDA. bitsandbytes, which PEFT imports too,
initialises it when it is imported: it asks every GPU for its compute capability. So on a host with a GPU only libraries
that leave CUDA alone are imported here, and each worker imports the rest after the fork.
"""

import gc
import importlib
import os

LIBRARIES = (  # that every trial needs, take long to import and ask no GPU
    *("torch._inductor.compile_fx", "torch.utils.checkpoint", "accelerate", "sklearn.metrics"),
    *("hydra", "rich.console", "transformers.modeling_utils", "transformers.modeling_layers"),
    *("transformers.generation.utils", "transformers.masking_utils", "transformers.tokenization_utils_tokenizers"),
)
NVML_CHECK = "PYTORCH_NVML_BASED_CUDA_CHECK"  # has torch count GPUs through NVML, which initialises nothing


def _import() -> None:
    import torch

    if torch.cuda.device_count() == 0:
        importlib.import_module("peftsweep.sweep.everything")
        return
    for name in LIBRARIES:
        importlib.import_module(name)


before = os.environ.get(NVML_CHECK)
os.environ[NVML_CHECK] = "1"
gc.disable()  # see peftsweep.sweep.everything
try:
    _import()
finally:
    gc.enable()
    if before is None:
        del os.environ[NVML_CHECK]
    else:
        os.environ[NVML_CHECK] = before
gc.freeze()
