"""``model.dtype=auto``: the dtype in which the device computes fastest."""

from __future__ import annotations

import functools
import json
import logging
import os
import platform
import time
from pathlib import Path

from peftsweep.schema import Dtype
from peftsweep.study.atomic import write_text

log = logging.getLogger(__name__)

ROWS, SIZE = 128, 1024  # tokens and width of the layer that is timed
ROUNDS = 20
FASTER = 1.1  # bfloat16 must be this many times as fast as float32 to be chosen


def resolve(device: str) -> Dtype:
    """The dtype for ``device``, a value of the key ``device``: bfloat16 on CUDA, the faster one on a CPU.

    For a CPU it is measured once and kept in the user's cache, by processor and version of torch, because trials with
    another dtype are other trials. If it cannot be kept, it is float32. CUDA is not initialised.
    """
    import torch

    if device.startswith("cuda") or (device == "auto" and torch.cuda.device_count()):
        return Dtype.bfloat16
    return _of_cpu(f"{_processor()}, torch {torch.__version__}")


def cache_folder() -> Path:
    """The folder of measurements of this machine: ``$XDG_CACHE_HOME/peftsweep``, else ``~/.cache/peftsweep``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peftsweep"


@functools.cache
def _of_cpu(key: str) -> Dtype:
    file = cache_folder() / "cpu_dtype.json"
    try:
        known: dict[str, str] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        if key not in known:
            known[key] = _faster().name
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps(known, indent=1))
        found = Dtype[known[key]]
    except (OSError, ValueError, KeyError) as error:
        log.warning("model.dtype=auto: the measured dtype of this CPU cannot be stored (%s); float32 is used", error)
        return Dtype.float32
    log.info("model.dtype=auto: %s on %s", found.name, key)
    return found


def _faster() -> Dtype:
    """The dtype in which forward and backward of a feed-forward layer are faster; the fastest round counts."""
    rounds = [(_seconds("bfloat16"), _seconds("float32")) for _ in range(ROUNDS)]
    narrow, wide = (min(took) for took in zip(*rounds, strict=True))
    return Dtype.bfloat16 if wide > FASTER * narrow else Dtype.float32


def _seconds(dtype: str) -> float:
    import torch
    from torch.nn import functional

    options = {"dtype": getattr(torch, dtype)}
    x = torch.ones(ROWS, SIZE, requires_grad=True, **options)
    weight = torch.ones(SIZE, SIZE, **options)
    start = time.perf_counter()
    functional.linear(functional.silu(functional.linear(x, weight)), weight).sum().backward()
    return time.perf_counter() - start


def _processor() -> str:
    """The processor's name and its bfloat16 features, which the name on a virtual machine does not show."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = {name.strip(): value.split() for name, _, value in (line.partition(":") for line in lines)}
    narrow = [flag for flag in facts.get("flags", facts.get("Features", [])) if "bf16" in flag]
    return " ".join([*facts.get("model name", [platform.machine()]), *narrow])
