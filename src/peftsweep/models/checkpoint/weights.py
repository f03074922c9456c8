"""Which weights a checkpoint holds, by the headers of its files, and what its model lacks of them or leaves out."""

from __future__ import annotations

import json
import logging
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import load_state_dict

from peftsweep.errors import InputError, some
from peftsweep.models.parts import classifies, text_config, weight_count
from peftsweep.observe.streams import without_warnings

log = logging.getLogger(__name__)

NEW_PARTS = "peftsweep_new_parts"  # the attribute of a classifier that names the modules its checkpoint lacks
# The files that transformers reads a model's weights from; of several the first.
FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
COMPARED = 256  # rows at either end of a weight
# Scales beside a layer's quantised weight: of FP8 and compressed-tensors, of bitsandbytes in 8 and 4 bits.
SCALES = re.compile(
    r"(?P<layer>.+)\.(weight_scale\w*|weight_zero_point|SCB|weight\.(absmax|quant_map|quant_state\..+))"
)


# ---- the files -------------------------------------------------------------------------------------


def files(folder: Path) -> list[Path]:
    """The files that transformers reads the weights in ``folder`` from; empty if there are none.

    Raises:
        OSError, ValueError, KeyError, TypeError, AttributeError: the index of several files cannot be read.
    """
    first = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if first is None or first.suffix != ".json":
        return [] if first is None else [first]
    return sorted({folder / name for name in json.loads(first.read_text(encoding="utf-8"))["weight_map"].values()})


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """The weights in ``folder`` by name, on the meta device; empty if their files, or the format, cannot be read.

    transformers, too, reads all weights of the files that an index names, whatever it says of their places.
    """
    found: dict[str, torch.Tensor] = {}
    try:
        for file in files(folder):
            found |= load_state_dict(str(file), "meta") if file.suffix == ".safetensors" else _unpickled(file, "meta")
    except Exception as error:  # loading says what is wrong with them: many types
        log.debug("%s: the weights cannot be listed: %s", folder, error)
        return {}
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, torch.Tensor)}


def _unpickled(file: Path, where: str) -> dict[str, torch.Tensor]:
    """The weights in torch's own format, of which only those that are used are read from the disk."""
    if not zipfile.is_zipfile(file):
        raise ValueError("the format of torch before 1.6, which has no header")
    return cast(dict[str, torch.Tensor], torch.load(file, map_location=where, weights_only=True, mmap=True))


def has_own_head(folder: Path, tied: Mapping[str, str]) -> bool:
    """Whether the checkpoint in ``folder`` holds another head than its embeddings, though its configuration ties them.

    ``tied`` are names of weights, each with the name of the weight that it would be. transformers then does not tie
    them. Of a large vocabulary only the first and the last tokens are compared.
    """
    rows = ((_first_and_last_rows(folder, one), _first_and_last_rows(folder, other)) for one, other in tied.items())
    return any(one is not None and other is not None and not torch.equal(one, other) for one, other in rows)


def _first_and_last_rows(folder: Path, name: str) -> torch.Tensor | None:
    """Some rows of a weight in the files of ``folder``; None if it is in none of them."""
    try:
        with torch.device("cpu"):  # also for a skeleton on the meta device
            return next((rows for file in files(folder) for rows in _rows(file, name)), None)
    except Exception as error:  # loading says what is wrong with them: many types
        log.debug("%s: %s cannot be read: %s", folder, name, error)
        return None


def _rows(file: Path, name: str) -> Iterator[torch.Tensor]:
    if file.suffix != ".safetensors":
        held = _unpickled(file, "cpu")
        if name in held:
            yield torch.cat([held[name][:COMPARED], held[name][-COMPARED:]]).float()
        return
    with safe_open(file, framework="pt") as weights:
        if name in weights.keys():  # noqa: SIM118
            found = weights.get_slice(name)
            count = found.get_shape()[0]
            yield torch.cat([found[:COMPARED], found[max(count - COMPARED, 0) :]]).float()


# ---- what a model lacks, or leaves out ---------------------------------------------------------------


def foreseen(bare: PreTrainedModel, folder: Path, key: str) -> list[str]:
    """``lacking`` of a model without weights, ``bare``, by the headers of the files in ``folder``.

    transformers itself loads them, on the meta device: it knows former names of weights, and how experts are put
    together. Empty where the files cannot be listed, or hold quantised weights.

    Raises:
        InputError: as ``lacking``.
    """
    quantised = [getattr(config, "quantization_config", None) for config in (bare.config, text_config(bare))]
    held = {} if any(quantised) else stored(folder)
    if not held:
        return []
    bars, make = transformers.utils.logging, cast(Any, type(bare))
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        with without_warnings(), torch.random.fork_rng(devices=[]):
            base, info = make.from_pretrained(
                None,
                config=bare.config,
                state_dict=held,
                dtype=bare.dtype,
                device_map={"": torch.device("meta")},
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:  # of a conversion that needs numbers, for example: loading will say whether it fails
        log.debug("%s: the weights cannot be foreseen: %s", folder, error, exc_info=True)
        return []
    finally:
        if shown:
            bars.enable_progress_bar()
    return lacking(base, info, key)


def lacking(base: PreTrainedModel, info: Mapping[str, Any], key: str) -> list[str]:
    """The names of a classifier's modules that its checkpoint lacks, by what transformers says of loading ``base``.

    Raises:
        InputError: the checkpoint lacks weights of a language model or most of a classifier, or ``base`` leaves out
            weights of the checkpoint. The message begins with ``key``.
    """
    if problem := left_out(base, info["unexpected_keys"]):
        raise InputError(f"{key}: {problem}")
    absent = sorted({*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])})
    if not absent:
        return []
    if not classifies(base):
        raise InputError(
            f"{key}: the checkpoint lacks weights of {type(base).__name__}, or has them in other shapes: {some(absent)}"
        )
    parts = sorted({name.rpartition(".")[0] for name in absent})
    bodies = [part for part in parts if part.partition(".")[0] == base.base_model_prefix]
    if 2 * sum(_own_size(base, part) for part in bodies) > sum(weight_count(p) for p in base.base_model.parameters()):
        raise InputError(f"{key}: the checkpoint belongs to another model; it lacks {some(absent)}")
    return parts


def _own_size(base: nn.Module, part: str) -> int:
    return sum(weight_count(parameter) for parameter in base.get_submodule(part).parameters(recurse=False))


def new_parts(base: nn.Module) -> list[str]:
    """The names of a classifier's modules that its checkpoint lacks, so that they are initialised anew and trained."""
    parts: list[str] = getattr(base, NEW_PARTS, [])
    return parts


def check_end_marks(marks: Any, key: str) -> None:
    """Refuse end marks of a model's generation settings that are no numbers of tokens.

    Raises:
        InputError: the message begins with ``key``.
    """
    try:
        [int(mark) for mark in (marks if isinstance(marks, list) else [marks]) if mark is not None]
    except (TypeError, ValueError):
        raise InputError(
            f"{key}: eos_token_id={marks!r} in its generation_config.json: must be the number of a token, several in a "
            "list, or null"
        ) from None


def left_out(base: nn.Module, unexpected: Iterable[str]) -> str | None:
    """What transformers left out of a checkpoint because its configuration makes ``base`` without it; None if nothing.

    ``unexpected`` are the names for which ``base`` has no place. It is layers beyond those of ``base`` (but for those
    that only predict further tokens, ``num_nextn_predict_layers``), or weights within its layers: a bias of a linear
    layer without one, a norm of queries, an adapter's factors; or the scales of quantised weights, which are read as
    if they were the weights themselves. What else a checkpoint may hold is no part of the function that it was made
    for: buffers such as masks, other heads, parts beside the text.
    """
    further = getattr(text_config(base), "num_nextn_predict_layers", None) or 0
    modules = dict(base.named_modules())
    stacks = {name: len(module) for name, module in modules.items() if isinstance(module, nn.ModuleList)}
    within = []
    if scales := sorted(key for key in unexpected if (one := SCALES.fullmatch(key)) and one["layer"] in modules):
        return (
            f"the checkpoint's weights are quantised, with their scales beside them ({some(scales)}), but its "
            "config.json has no quantization_config that says how; put it back, or dequantise the checkpoint"
        )
    for key in sorted(unexpected):
        found = ((key[: match.start()], int(match[1])) for match in re.finditer(r"\.(\d+)\.", key))
        for stack, number in ((stack, number) for stack, number in found if stack in stacks):
            if number >= stacks[stack] + further:
                return (
                    f"the checkpoint has layer {number} of {stack}, but its config.json has only {stacks[stack]} of "
                    "these layers"
                )
            owner, _, own = key.rpartition(".")
            whole = owner in modules and next(modules[owner].children(), None) is not None  # its bias would be a mask
            if number < stacks[stack] and own in ("weight", "bias") and not whole and key not in within:
                within.append(key)
    return f"its config.json leaves out weights that the checkpoint's layers have: {some(within)}" if within else None
