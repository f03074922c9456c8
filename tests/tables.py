"""Tables of trials that never ran, for what only reads tables: one function from factors to rows."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

STAGES = ("load", "attach", "train", "eval", "save")


def trials(
    factors: Mapping[str, Sequence[Any]],
    *,
    seeds: int = 1,
    evaluations: Sequence[str] = ("task",),
    statuses: Mapping[int, str] | None = None,
    generated: bool = False,
) -> pd.DataFrame:
    """A row for each combination of ``factors`` (column -> values) and seed; ``statuses`` of rows that are no success.

    The numbers are made up from the row's place, so that no two configurations have the same.
    """
    points = list(itertools.product(*factors.values(), range(seeds)))
    rows = [
        _trial(
            place, dict(zip(factors, values, strict=True)), seed, evaluations, (statuses or {}).get(place), generated
        )
        for place, (*values, seed) in enumerate(points)
    ]
    return pd.DataFrame(rows).convert_dtypes()


def _trial(
    place: int, choices: dict[str, Any], seed: int, evaluations: Sequence[str], status: str | None, generated: bool
) -> dict[str, Any]:
    name = f"trial-{place}"
    row: dict[str, Any] = {
        "run_info.trial": name,
        "run_info.labels": f'["{name}"]',
        "run_info.study": "default",
        "run_info.status": status or "success",
        "run_info.created_at": f"2026-01-01T00:{place // 60 % 60:02}:{place % 60:02}+00:00",
        "choices.method": "lora",
        "choices.quant": "none",
        "config.seed": seed,
        **choices,
    }
    if status:
        return row | {"run_info.error.stage": "train", "run_info.error.message": "broken"}
    wave = np.random.default_rng(place).uniform(0.9, 1.1)
    size = 20_000 * (1 + place // 2)
    row |= {
        "train_info.trainable_parameters": size,
        "train_info.total_parameters": 1_000_000 + size,
        "train_info.adapter_bytes": 4 * size,
        "train_info.train_seconds": 10.0 * wave + place / 10,
        "memory.predicted.peak_bytes": int(2e9 + 1e7 * place),
        "memory.predicted.error": wave - 1,
    }
    row |= {f"memory.{stage}.allocated_peak": int(1e9 * (1 + 0.2 * n) + 1e7 * place) for n, stage in enumerate(STAGES)}
    for evaluation in evaluations:
        low = evaluation.startswith("perplexity")
        metric = "perplexity" if low else "accuracy"
        value = 3.0 / wave if low else 0.5 * wave
        scores = {metric: value, f"base_{metric}": 20.0 if low else 0.1}
        for key, score in scores.items():
            row |= {f"eval_info.{evaluation}.{key}.{part}": v for part, v in _score(score, low).items()}
    return row | (_generation(wave) if generated else {})


def _score(value: float, low: bool) -> dict[str, float]:
    return {"value": value, "stderr": 0.05 if low else float(np.sqrt(value * (1 - value) / 199)), "n": 200}


def _generation(wave: float) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for category, seconds in (("overall", 0.4), ("short", 0.2), ("long", 0.8)):
        for variant, factor in (("base", 1.0), ("adapted", 1.2), ("merged", 1.01)):
            prefix = f"generation_info.{category}.{variant}."
            found[prefix + "seconds_p50"] = seconds * factor * wave
            if variant != "base":
                parts = {"value": factor, "low": factor - 0.02, "high": factor + 0.02}
                found |= {f"{prefix}overhead.{part}": value for part, value in parts.items()}
    return found


def steps(table: pd.DataFrame, *, validated: bool = True) -> pd.DataFrame:
    """Ten logged rows a trial that succeeded, and two validations."""
    rows: list[dict[str, Any]] = []
    for trial, status in zip(table["run_info.trial"], table["run_info.status"], strict=True):
        if status == "success":
            rows += [{"trial": trial, "label": trial, "step": 10 * n, "loss": 3.0 / n} for n in range(1, 11)]
            marks = [{"trial": trial, "label": trial, "step": n, "validation_loss": 40.0 / n} for n in (50, 100)]
            rows += marks if validated else []
    return pd.DataFrame(rows, columns=None if rows else ["trial", "label", "step"])
