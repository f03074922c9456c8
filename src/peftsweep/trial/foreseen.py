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
        speed = timing.device_of(device, torch.get_num_threads())
        has_speed = speed.take_kept()
        found = duration.estimate(
            dataclasses.replace(trial, rows=rows), speed, None, tokens, timed=has_speed, probe=False, judged=False
        )
        planned = _planned(trial, speed.key)
        predicted = planned or (found.facts() if has_speed else None)
        if predicted:
            result.train_info["predicted"] = predicted
        result.meta_info[history.SECTION] = {history.DEVICE: speed.key, history.SHAPE: found.shape}
        return dict(found.flops_by_dtype)
    except Exception:
        log.info("the seconds of the trial cannot be predicted", exc_info=True)
        return {}


def predicted_by_kind(result: Result) -> dict[str, float]:
    """The predicted seconds of each kind of a trial's work; kinds without a prediction are missing."""
    predicted = result.train_info.get("predicted") or {}
    return {kind: predicted[f"{kind}_seconds"] for kind in history.KINDS if f"{kind}_seconds" in predicted}


def _planned(trial: Trial, device: str) -> dict[str, Any] | None:
    """The row of the trial in the study's plan, if the plan was made for this device."""
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        plan = json.loads((store.folder(trial.config.study) / store.PLAN).read_text(encoding="utf-8"))
        for row in plan:
            if row["trial"].endswith(f"-{trial.identity}") and row["predicted_device"] == device:
                predicted = row["predicted"]
                return dict(predicted) if isinstance(predicted, dict) and "train_seconds" in predicted else None
    return None


def count_flops(result: Result, by_dtype: dict[str, Any], planned_steps: int, device: torch.device) -> None:
    """Write the FLOPs of the steps that were taken, and the MFU, into the record.

    MFU is the share of the device's fastest matrix products. It is left out if the device's speed was never measured.
    """
    info = result.train_info
    if not by_dtype or not planned_steps or not info.get("steps"):
        return
    share = info["steps"] / planned_steps
    info["flops"] = round(sum(by_dtype.values()) * share)
    if not info.get("train_seconds"):
        return
    ideal = timing.device_of(device, torch.get_num_threads()).ideal(by_dtype)
    if ideal is not None:
        info["mfu"] = ideal * share / info["train_seconds"]
