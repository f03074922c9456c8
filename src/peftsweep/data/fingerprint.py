"""Hashes of the contents of files and tokenizers, for the identities of trials and the keys of caches.

docs/caches.md lists every cache and what its key covers.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftsweep.data import hub
from peftsweep.study import store
from peftsweep.study.atomic import make_way
from peftsweep.study.reading import Unreadable
from peftsweep.study.record import read_json, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

HASHES = ".hashes"  # under multirun/: the hashes of large files
LARGE = 32 * 2**20  # bytes from which a hash is kept on the disk
CHUNK = 2**20
HUB_TIMEOUT_SECONDS = 5.0  # seconds
# Suffixes of files in the folder of a model or adapter that neither transformers nor PEFT reads: texts, images, and
# weights of other frameworks.
IGNORED_FILES = {
    *(".md", ".pdf", ".html", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".log", ".lock"),
    *(".h5", ".msgpack", ".onnx", ".ot", ".tflite", ".pb", ".gguf", ".pt", ".pth"),
}
TEXTS = ("readme", "license", "licence", "notice", "use_policy", "changelog", "copying")
# Files that transformers' Trainer writes beside a model.
TRAINER = ("training_args.bin", "trainer_state.json", "all_results.json", "train_results.json", "eval_results.json")
# Weights in torch's own format, and the files that are read instead of them.
PREFERRED = {
    "pytorch_model": ("model.safetensors", "model.safetensors.index.json"),
    "adapter_model": ("adapter_model.safetensors",),
}
# Keys in a tokenizer's files that say where it came from or how it was last used, not what it does.
STATE_SETTINGS = ("truncation", "padding", "name_or_path", "is_local", "local_files_only")
TEMPLATES = "additional_chat_templates"  # a folder inside that of a tokenizer


def file_hash(file: Path) -> str:
    """A hash of every byte of ``file``.

    The hash is cached by the file's path, size and times of change: in this process, and for large files on the disk.
    """
    stat = file.stat()
    return _remembered(str(file.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


@lru_cache(maxsize=10_000)
def _remembered(path: str, size: int, modified: int, changed: int) -> str:
    if size <= LARGE:
        return _read_and_hash(path, size)
    known = {"path": path, "size": size, "modified": modified, "changed": changed}
    note = store.ROOT / HASHES / f"{hashlib.sha256(path.encode()).hexdigest()[:20]}.json"
    with suppress(Unreadable):
        kept: dict[str, Any] = read_json(note, {"sha256": str, "note": str})
        if kept == _file_note(known, kept["sha256"]):
            return str(kept["sha256"])
    found = _read_and_hash(path, size)
    with suppress(OSError):  # without permission to write, the file is hashed again next time
        make_way(note)
        write_json(note, _file_note(known, found))
    return found


def _file_note(known: dict[str, Any], found: str) -> dict[str, Any]:
    """The cached note of a file's hash, with a checksum of the note, so that a damaged note is detected."""
    return known | {"sha256": found, "note": of_values([known, found])}


def _read_and_hash(path: str, size: int) -> str:
    digest = hashlib.sha256(str(size).encode())
    with Path(path).open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def files_read(folder: Path) -> dict[str, Path]:
    """The files in the folder of a model, tokenizer or adapter that transformers and PEFT read, by name.

    Files of unknown kinds are included, because they may be read.
    """
    found = {file.name: file for file in sorted(folder.iterdir()) if file.is_file()}
    read = {name: file for name, file in found.items() if _may_be_read(name, found)}
    return read | {f"{TEMPLATES}/{file.name}": file for file in sorted((folder / TEMPLATES).glob("*.jinja"))}


def _may_be_read(name: str, beside: dict[str, Path]) -> bool:
    file = Path(name)
    if name.startswith(".") or name in TRAINER or file.suffix.lower() in IGNORED_FILES:
        return False
    if file.suffix in ("", ".txt") and name.lower().startswith(TEXTS):
        return False
    preferred = next((names for stem, names in PREFERRED.items() if name.startswith(stem)), ())
    return file.suffix != ".bin" or not any(other in beside for other in preferred)


def folder_hashes(folder: Path) -> dict[str, str]:
    """``file_hash`` of each of ``files_read``."""
    return {name: file_hash(file) for name, file in files_read(folder).items()}


def of_values(content: Any) -> str:
    """A hash of plain values and enums."""
    text = json.dumps(content, sort_keys=True, default=lambda value: value.name)
    return hashlib.sha256(text.encode()).hexdigest()


@lru_cache(maxsize=100)
def on_hub(repository: str, kind: str, revision: str | None) -> tuple[str | None, str | None]:
    """The commit of a hub repository (``kind`` is model or dataset) and its time of creation; None if unknown."""
    from huggingface_hub import HfApi

    if hub.problem() is not None:
        return None, None
    try:
        found = HfApi().repo_info(repository, revision=revision, repo_type=kind, timeout=HUB_TIMEOUT_SECONDS)
    except Exception as error:  # no network, no such repository, no access: the client raises many types
        log.info("the hub does not give the commit of %s: %s", repository, type(error).__name__)
        return None, None
    created = getattr(found, "created_at", None)
    return found.sha, None if created is None else created.isoformat()


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of everything that a saved tokenizer holds: vocabulary, added tokens, chat template, settings.

    Its origin and its last truncation and padding are left out: they are state, not settings.
    """
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for file in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            content = file.read_bytes()
            if file.suffix == ".json":
                settings = json.loads(content)
                for key in STATE_SETTINGS if isinstance(settings, dict) else ():
                    settings.pop(key, None)
                content = json.dumps(settings, sort_keys=True).encode()
            digest.update(f"{file.name} {len(content)} ".encode() + content)
    return digest.hexdigest()
