"""What this machine can do, in ten lines, and what to install for what is missing: ``peftsweep-doctor``.

The exit code is 0 if a trial can run here, else 1. Needs of some trials only are reported and do not change it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from peftsweep import __version__, command_line, options
from peftsweep.data import hub
from peftsweep.errors import InputError, check_working_folder, first_line
from peftsweep.observe import fast_dtype, streams
from peftsweep.observe.display import size

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate", "hydra-core")
LEAST_FREE_DISK = 1e9  # bytes, below which records and adapters may not find room
LEAST_FREE_MEMORY = 1e9  # bytes, which the imports alone nearly take
CGROUP = Path("/sys/fs/cgroup")  # where a container's limit of memory stands
BITSANDBYTES = "BitsAndBytesConfig"
NOT_EXTRAS = ("dev",)  # extras that bring no feature


@dataclass(frozen=True)
class Finding:
    """A line of the report."""

    name: str
    text: str
    fix: str | None = None  # what to do, where something is missing
    fatal: bool = False  # no trial can run
    facts: dict[str, Any] = field(default_factory=dict)  # the same for a program

    def __str__(self) -> str:
        return f"{self.name:13} {self.text}" + (f"; {self.fix}" if self.fix else "")


def versions() -> dict[str, str | None]:
    """The versions that matter, by package, without importing any; ``cuda`` is the version that torch is built for."""
    found: dict[str, str | None] = {"peftsweep": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    found["cuda"] = _cuda_of_torch()
    return found


def version_text() -> str:
    """What ``--version`` prints."""
    found = versions()
    others = [f"{name} {version or 'missing'}" for name, version in found.items() if name not in ("peftsweep", "cuda")]
    return f"peftsweep {found['peftsweep']}\n{', '.join(others)}, CUDA {found['cuda'] or 'none'}"


def _cuda_of_torch() -> str | None:
    spec = importlib.util.find_spec("torch")
    file = Path(spec.origin).with_name("version.py") if spec and spec.origin else None
    content = file.read_text(encoding="utf-8") if file and file.is_file() else ""
    found = re.search(r"^cuda\b[^=]*= *['\"]([\d.]+)['\"]", content, re.M)
    return found[1] if found else None


def main() -> None:
    """``peftsweep-doctor``: exit code 0 where a trial can run here, 1 where none can."""
    streams.settle()
    parser = command_line.OneLineParser(
        prog="peftsweep-doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="the same as one JSON object")
    try:
        words = parser.parse_args()
        check_working_folder()
    except InputError as error:
        print(f"peftsweep: {error}", file=sys.stderr)
        sys.exit(2)
    found = []
    for check in CHECKS:
        found.append(_finding_of(check))
        if not words.json:
            print(found[-1], flush=True)
    sound = not any(one.fatal for one in found)
    if words.json:
        print(json.dumps({"ok": sound, "checks": {one.name: asdict(one) for one in found}}, indent=1))
    sys.exit(0 if sound else 1)


def _finding_of(check: Callable[[], Finding]) -> Finding:
    """What a check finds; one that breaks is itself a finding, as a broken package raises whatever it likes."""
    try:
        return check()
    except Exception as error:
        name = check.__name__.strip("_")
        fatal = name in ("packages", "devices", "precision")
        return Finding(name, f"cannot be found out ({type(error).__name__}: {first_line(error)})", fatal=fatal)


# ---- checks ----------------------------------------------------------------------------------------


def _packages() -> Finding:
    found = versions()
    listed = ", ".join(f"{name} {version}" for name, version in found.items() if version and name != "cuda")
    missing = [name for name in PACKAGES if found[name] is None]
    fix = f"missing: {', '.join(missing)}; pip install peftsweep" if missing else None
    return Finding("packages", listed, fix, fatal=bool(missing), facts=found)


def _system() -> Finding:
    from peftsweep.observe import measure
    from peftsweep.study import record

    cores = measure.cores()
    text = f"{platform.system()} {platform.release()}, {record.processor()}, {cores} cores"
    tested = sys.platform == "linux"
    facts = {"system": platform.system(), "processor": record.processor(), "cores": cores}
    return Finding("system", text, None if tested else "tested on Linux only", sys.platform == "win32", facts)


def _devices() -> Finding:
    import torch

    count = torch.cuda.device_count()
    if not count:
        built = torch.version.cuda
        why = "torch is built for the CPU alone" if built is None else f"torch is built for CUDA {built}"
        driver = shutil.which("nvidia-smi") is not None
        fix = None
        if driver:
            fix = "nvidia-smi is there: " + (
                "CUDA_VISIBLE_DEVICES hides the GPUs, or the driver is older than torch's CUDA"
                if built
                else "pip install torch, in a build for CUDA (pytorch.org)"
            )
        return Finding("devices", f"no CUDA device ({why}): trials run on the CPU", fix, facts={"gpus": []})
    gpus = [torch.cuda.get_device_properties(number) for number in range(count)]
    listed = ", ".join(f"cuda:{n} {one.name} ({size(one.total_memory)})" for n, one in enumerate(gpus))
    return Finding("devices", listed, facts={"gpus": [{"name": g.name, "bytes": g.total_memory} for g in gpus]})


def _precision() -> Finding:
    import torch

    fast = fast_dtype.resolve("auto").value
    if torch.cuda.device_count() and not torch.cuda.is_bf16_supported(including_emulation=False):
        fix = "this GPU has no bfloat16: model.dtype=float16 train.autocast=float16, or float32"
        return Finding("precision", f"model.dtype=auto is {fast}", fix, facts={"auto": fast})
    return Finding("precision", f"float32, bfloat16; model.dtype=auto is {fast}", facts={"auto": fast})


def _quantisation() -> Finding:
    import torch
    from bitsandbytes.nn import modules

    where = "cuda" if torch.cuda.device_count() else "cpu"
    works: list[str] = []
    broken: dict[str, str] = {}
    rows = torch.zeros(1, 64, dtype=torch.float32 if where == "cpu" else torch.float16, device=where)
    for name, make in {"4bit": modules.Linear4bit, "8bit": modules.Linear8bitLt}.items():
        try:
            kept = {"has_fp16_weights": False} if name == "8bit" else {}
            make(64, 64, bias=False, **kept).to(where)(rows)
            works.append(name)
        except Exception as error:
            broken[name] = first_line(error)
    for name, reason in _other_quants(torch.cuda.device_count()).items():
        if reason is None:
            works.append(name)
        else:
            broken[name] = reason
    text = f"quant={','.join(works)} on {where}" if works else f"none on {where}"
    names: dict[str, list[str]] = {}
    for name, why in broken.items():
        names.setdefault(why, []).append(name)
    fix = "; ".join(f"not {', '.join(those)}: {why}" for why, those in names.items()) or None
    return Finding("quantisation", text, fix, facts={"works": works, "broken": broken})


def _other_quants(gpus: int) -> dict[str, str | None]:
    """The options of ``quant`` by other libraries than bitsandbytes, each with why it does not train here."""
    from peftsweep.models.quantised import libraries

    files = sorted((Path(options.conf_dir()) / "quant").glob("*.yaml"))
    nodes = {file.stem: yaml.safe_load(file.read_text(encoding="utf-8")) or {} for file in files}
    nodes = {name: node.get("quant", node) for name, node in nodes.items()}
    own = {name: node for name, node in nodes.items() if "_target_" in node and BITSANDBYTES not in node["_target_"]}
    return {name: libraries.problem(node, gpus) for name, node in own.items()}


def _kernels() -> Finding:
    import torch

    attention = ["eager", "sdpa"] + ["flash_attention_2"] * (importlib.util.find_spec("flash_attn") is not None)
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX") or "g++", "c++", "clang++"))), None)
    compiles = compiler is not None
    text = f"{torch.backends.cpu.get_cpu_capability()} on the CPU, attention {', '.join(attention)}"
    text += ", train.compile=inductor" if compiles else ""
    fix = None if compiles else "train.compile=inductor needs a C++ compiler: apt install g++"
    facts = {"cpu": torch.backends.cpu.get_cpu_capability(), "attention": attention, "compiles": compiles}
    return Finding("kernels", text, fix, facts=facts)


def _memory() -> Finding:
    import psutil
    import torch

    found = psutil.virtual_memory()
    free, total = _within_container(found.available, found.total)
    text = f"{size(free)} of {size(total)} free"
    gpus = []
    for number in range(torch.cuda.device_count()):
        there, whole = torch.cuda.mem_get_info(number)
        text += f", cuda:{number} {size(there)} of {size(whole)}"
        gpus.append(there)
    fix = "end other programs, or take another machine" if free < LEAST_FREE_MEMORY else None
    return Finding("memory", text, fix, facts={"free": free, "total": total, "gpus": gpus})


def _within_container(free: int, total: int) -> tuple[int, int]:
    """Bytes free and in all, within the limit of the container that this process is in, if it is."""
    try:
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
    except (OSError, ValueError):  # none, or "max"
        return free, total
    return min(free, max(0, limit - used)), min(total, limit)


def _disk() -> Finding:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    there = next(place.absolute() for place in (cache, *cache.parents) if os.path.exists(place))
    here, kept = shutil.disk_usage(Path.cwd()).free, shutil.disk_usage(there).free
    writable = os.access(Path.cwd(), os.W_OK)
    text = f"{size(here)} free here for multirun/, {size(kept)} for the models' cache {cache}"
    fix = None if writable else "nothing can be written here: take another folder"
    if writable and min(here, kept) < LEAST_FREE_DISK:
        fix = "make room: peftsweep-collect --prune lists what can go; HF_HOME=FOLDER moves the cache"
    cache_writable = there.is_dir() and os.access(there, os.W_OK)
    if writable and not cache_writable:
        fix = f"the cache cannot be written (see {there}), so nothing can be downloaded: HF_HOME=FOLDER moves it"
    facts = {"here": here, "cache": kept, "cache_folder": str(cache), "writable": writable}
    facts["cache_writable"] = cache_writable
    return Finding("disk", text, fix, fatal=not writable, facts=facts)


def _hub() -> Finding:
    began = time.monotonic()
    problem = hub.problem()
    took = time.monotonic() - began
    if problem is None:
        return Finding("hub", f"answers in {took:.1f} s", facts={"reachable": True, "seconds": took})
    fix = "models and data sets come from local folders and the cache: model=./FOLDER dataset=FILE"
    return Finding("hub", problem, fix, facts={"reachable": False, "problem": problem})


def _extras() -> Finding:
    """Which optional packages are installed, by the extras of this package's metadata."""
    from packaging.requirements import Requirement

    own = importlib.metadata.metadata("peftsweep")
    needs = [Requirement(line) for line in own.get_all("Requires-Dist") or []]
    extras = {name: _missing(needs, name) for name in own.get_all("Provides-Extra") or [] if name not in NOT_EXTRAS}
    present = [name for name, missing in extras.items() if not missing]
    absent = [name for name, missing in extras.items() if missing]
    fix = f"not here: {', '.join(absent)}: pip install 'peftsweep[{','.join(absent)}]'" if absent else None
    return Finding("extras", ", ".join(present) or "none", fix, facts={"present": present, "missing": absent})


def _missing(needs: list[Any], extra: str) -> list[str]:
    own = [one for one in needs if one.marker and "extra" in str(one.marker) and one.marker.evaluate({"extra": extra})]
    return [one.name for one in own if not _is_installed(one.name)]


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


CHECKS = (_packages, _system, _devices, _precision, _quantisation, _kernels, _memory, _disk, _hub, _extras)
