"""Predictions and FLOPs in a trial's record: predicted memory and seconds, FLOPs, and MFU."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch

from peftsweep.config.compose import Trial
from peftsweep.data.rows import Rows
from peftsweep.data.tokens import Tokens
from peftsweep.forecast import duration, forecast, history, timing
from peftsweep.study import store
from peftsweep.study.record import Result
from peftsweep.study.sweep_record import trials_at_once

log = logging.getLogger(__name__)


def memory(trial: Trial, result: Result, tokens: Sequence[Tokens]) -> None:
    """Write the predicted memory of training on these rows into the record."""
    if predicted := forecast.prediction(trial, tokens):
        result.memory["predicted"] = predicted.facts()


def predict_time(
    trial: Trial, result: Result, rows: Rows, tokens: Sequence[Tokens], device: torch.device
) -> dict[str, Any]:
    """Write the predicted seconds, and the facts that they depend on, into the record; returns FLOPs by dtype.

    A prediction that ``dry_run=true`` or a deadline has made for this device is kept. Else the seconds are predicted
    now, if the speed of the device has been measured before. Nothing is timed here. If the prediction fails, the trial
    goes on without it.
    """
    try:
        speed = timing.device_of(device, torch.get_num_threads(), trials_at_once())
        has_speed = speed.take_kept()
        found = duration.estimate(
            dataclasses.replace(trial, rows=rows), speed, None, tokens, timed=has_speed, probe=False, judged=False
        )
        planned = _planned(trial, speed.key, speed.at_once)
        predicted = planned or (found.facts() if has_speed else None)
        if predicted:
            result.train_info["predicted"] = predicted
        result.meta_info[history.SECTION] = {history.DEVICE: speed.key, history.SHAPE: found.shape}
        return dict(found.flops_by_dtype)
    except Exception:
        log.info("the seconds of the trial cannot be predicted", exc_info=True)
        return {}


def flops_of_packed(trial: Trial, rows: Rows, tokens: Sequence[Tokens], device: torch.device) -> dict[str, float]:
    """The FLOPs by dtype of the training of a trial in a pack, as they are of the trial alone; empty if unknown."""
    try:
        where = timing.device_of(device, torch.get_num_threads(), trials_at_once())
        own = dataclasses.replace(trial, rows=rows)
        return dict(duration.estimate(own, where, None, tokens, timed=False, probe=False).flops_by_dtype)
    except Exception:
        log.info("the FLOPs of the trial cannot be counted", exc_info=True)
        return {}


def predicted_by_kind(result: Result) -> dict[str, float]:
    """The predicted seconds of each kind of a trial's work; kinds without a prediction are missing."""
    predicted = result.train_info.get("predicted") or {}
    return {kind: predicted[f"{kind}_seconds"] for kind in history.KINDS if f"{kind}_seconds" in predicted}


def _planned(trial: Trial, device: str, at_once: int) -> dict[str, Any] | None:
    """The prediction of the trial in the study's plan, if that was made for this device and as many trials at once."""
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        plan = json.loads((store.folder(trial.config.study) / store.PLAN).read_text(encoding="utf-8"))
        for row in plan:
            made_for = row["predicted_device"], row.get("predicted_at_once", 1)
            if row["trial"].endswith(f"-{trial.identity}") and made_for == (device, at_once):
                predicted = row["predicted"]
                return dict(predicted) if isinstance(predicted, dict) and "train_seconds" in predicted else None
    return None


def count_flops(result: Result, by_dtype: dict[str, Any], planned_steps: int, device: torch.device) -> None:
    """Write the FLOPs of the steps that were taken, and the MFU, into the record.

    MFU is the share of the device's fastest matrix products. It is left out if the device's speed was never measured,
    and for a trial in a pack, whose steps have no seconds of their own.
    """
    info = result.train_info
    if not by_dtype or not planned_steps or not info.get("steps"):
        return
    share = info["steps"] / planned_steps
    info["flops"] = round(sum(by_dtype.values()) * share)
    if not info.get("train_seconds"):
        return
    ideal = timing.device_of(device, torch.get_num_threads(), trials_at_once()).ideal(by_dtype)
    if ideal is not None:
        info["mfu"] = ideal * share / info["train_seconds"]
