"""Stages of a trial after its evaluations: load the saved adapter again, merge it into the base."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peftsweep.config import build
from peftsweep.config.compose import Trial
from peftsweep.config.identity import model_identity
from peftsweep.data import batches, fingerprint
from peftsweep.data import rows as data_rows
from peftsweep.models import losses as models_losses
from peftsweep.models import model, saved
from peftsweep.schema import Dtype
from peftsweep.study import record, store

log = logging.getLogger(__name__)
RELOAD_TOLERANCE = 1e-4  # nats, for the loss of any token: above rounding, far below what changes a score
# Nats, for the loss of any token: merged weights round differently than two products, and so does a change that is
# saved as a LoRA for the untouched base after an initialisation that changed the base.
MERGE_TOLERANCE = 1e-3
# Nats, for the mean loss on a 16-bit base: another order of sums was seen to change it by 0.013 (one token by 0.3).
NARROW_TOLERANCE = 0.03


def row_sources(
    trial: Trial, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: data_rows.Rows
) -> dict[str, Any]:
    """The versions of model, tokenizer and rows: the hub's commits and dates, else hashes of their content."""
    config = trial.config
    model_sha, model_created = model.commit(base), None
    if model_sha is None:
        model_sha = fingerprint.of_values(model_identity(config.model))
    else:
        model_created = fingerprint.on_hub(config.model.name_or_path, "model", model_sha)[1]
    dataset_sha, dataset_created = None, None
    if config.dataset.hub and not config.dataset.path:
        revision = rows.commit or config.dataset.revision
        dataset_sha, dataset_created = fingerprint.on_hub(config.dataset.hub, "dataset", revision)
        dataset_sha = rows.commit or dataset_sha
    return {
        "model_sha": model_sha,
        "model_created_at": model_created,
        "tokenizer_sha": fingerprint.tokenizer_hash(tokenizer),
        "dataset_sha": dataset_sha or fingerprint.of_values(rows.fingerprints),
        "dataset_created_at": dataset_created,
        "rows_sha": rows.fingerprints,
    }


def reload_adapter(
    trial: Trial, place: Path, tokenizer: PreTrainedTokenizerBase, probe: batches.Batch, losses: torch.Tensor
) -> dict[str, Any]:
    """Load the saved adapter onto a fresh base, and compare its losses on a batch with those of the trained model.

    ``losses`` are those of the trained model on ``probe``, one for each answer token, in nats. Weights of a classifier
    that its checkpoint lacks are drawn from another seed here, so that losses only agree if the adapter holds them.
    """
    try:
        other = dataclasses.replace(trial.config, seed=trial.config.seed + 1)
        base = build.load_base(dataclasses.replace(trial, config=other), tokenizer, losses.device)
        again = build.restore(trial, base, place / store.ADAPTER)
        with torch.no_grad():
            answered = models_losses.answer_losses(again, probe)
    except Exception as error:  # PEFT may raise any error; the trial itself has succeeded
        store.raise_unwritable(error)
        log.exception("the saved adapter cannot be loaded")
        return {"reloads": False, "reload_error": record.one_line(error)}
    changed = (place / store.ADAPTER / saved.INITIAL).exists()
    same = _same(trial, answered, losses, MERGE_TOLERANCE if changed else RELOAD_TOLERANCE)
    if not same:
        log.warning("the saved adapter does not answer as the trained one does; no other trial will go on from it")
    return {"reloads": same, "reload_difference": (answered - losses).abs().max().item()}


def merge_adapter(
    trial: Trial, place: Path, tokenizer: PreTrainedTokenizerBase, probe: batches.Batch, losses: torch.Tensor
) -> dict[str, Any]:
    """Write the merged model, load it again, and compare its losses on a batch with those of base and adapter.

    ``losses`` are those of the trained model on ``probe``, one for each answer token, in nats. A quantised base is
    dequantised first, exactly. 8-bit layers also round their inputs; then the merged model must agree with the adapter
    on the dequantised base, and ``merge_difference`` is the difference from the trained model.
    """
    folder = place / store.MERGED
    try:
        adapted = saved.dequantised(build.load_base(trial, tokenizer, losses.device), place / store.ADAPTER)
        with torch.no_grad():
            expected = models_losses.answer_losses(adapted, probe) if _rounds(trial) else losses
        written = saved.merge(adapted)
        saved.save(written, folder)
        tokenizer.save_pretrained(folder)
        merged = saved.read(folder, written)
        with torch.no_grad():
            found = models_losses.answer_losses(merged, probe)
    except saved.NotMergeable as error:
        log.warning("adapter.merge=true: %s", error)
        return {"merges": False, "merge_error": str(error)}
    except Exception as error:  # PEFT may raise any error; the trial itself has succeeded
        shutil.rmtree(folder, ignore_errors=True)
        store.raise_unwritable(error)
        log.exception("the adapter cannot be merged")
        return {"merges": False, "merge_error": record.one_line(error)}
    merges = _same(trial, found, expected, MERGE_TOLERANCE)
    if not merges:
        log.warning("the merged model does not answer as the trained one does: %s is deleted", folder)
        shutil.rmtree(folder, ignore_errors=True)
    return {"merges": merges, "merge_difference": (found - losses).abs().max().item()}


def _rounds(trial: Trial) -> bool:
    """Whether the base's layers round their inputs, as 8-bit ones do."""
    return bool(getattr(build.storage(trial), "load_in_8bit", False))


def _same(trial: Trial, found: torch.Tensor, expected: torch.Tensor, exact: float = RELOAD_TOLERANCE) -> bool:
    """Whether losses of answer tokens are equal but for rounding; on a 32-bit base by less than ``exact`` nats."""
    differences = (found - expected).abs()
    if trial.config.model.dtype is Dtype.float32:
        return differences.max().item() < exact
    return differences.mean().item() < NARROW_TOLERANCE
