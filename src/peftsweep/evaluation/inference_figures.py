"""The figures of the inference benchmark from its timed runs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from peftsweep.observe.measure import percentile

BASE, ADAPTED, MERGED = "base", "adapted", "merged"  # the variants
LEFT_OUT = "left_out"
OUT_OF_MEMORY = "out of memory"
TIMES = ("seconds", "time_to_first_token", "seconds_per_token")

Clock = Callable[[], float]
Row = dict[str, Any]


# ---- figures ---------------------------------------------------------------------------------------


def ratio(pairs: Sequence[tuple[float, float]]) -> dict[str, float | None]:
    """How many times as long the second of each pair takes as the first: the median ``value`` and its 95% interval.

    ``low`` and ``high`` are the order statistics between which the median lies with at least that confidence by the
    binomial distribution, whatever that of the times (Conover, Practical Nonparametric Statistics, 3.2); None for
    fewer than six pairs, which cannot tell.
    """
    ratios = [second / first for first, second in pairs]
    if not ratios:
        return {"value": None, "low": None, "high": None}
    from scipy.stats import quantile_test  # which takes longer to import than all of ours

    interval = quantile_test(ratios, p=0.5).confidence_interval(confidence_level=0.95)
    low, high = (None if bound != bound else float(bound) for bound in interval)
    return {"value": statistics.median(ratios), "low": low, "high": high}


def category_figures(prompts: Sequence[list[int]], rows: list[Row], footprints: Mapping[str, int]) -> dict[str, Any]:
    """Latency, speed and memory of one category of prompts."""
    lengths = [len(ids) for ids in prompts]
    figures: dict[str, Any] = {"prompts": len(prompts), "prompt_tokens": statistics.mean(lengths)}
    for name, footprint in footprints.items():
        figures[name] = _variant_figures(name, rows, footprint)
    return figures


def _variant_figures(name: str, rows: list[Row], footprint: int) -> dict[str, Any]:
    mine = [row for row in rows if row["variant"] == name]
    alone = [row for row in mine if row["batch_size"] == 1]
    batches = {f"batch_{size}": _batch_figures(name, rows, size) for size in sorted({r["batch_size"] for r in mine})}
    if any(LEFT_OUT in row for row in alone):
        return {LEFT_OUT: OUT_OF_MEMORY}
    figures: dict[str, Any] = {}
    for key in TIMES:
        figures |= spread_of(key, [row[key] for row in alone if row[key] is not None])
    figures["generated_tokens"] = statistics.mean(row["tokens"] for row in alone)
    generation = _largest(alone)
    figures["weights_bytes"] = footprint
    figures["generation_bytes"] = generation
    figures["peak_bytes"] = None if generation is None else footprint + generation
    return figures | _overheads(name, rows) | batches


def _batch_figures(name: str, rows: list[Row], size: int) -> dict[str, Any]:
    mine = [row for row in rows if row["variant"] == name and row["batch_size"] == size]
    if any(LEFT_OUT in row for row in mine):
        return {LEFT_OUT: OUT_OF_MEMORY}
    figures: dict[str, Any] = {
        "tokens_per_second": statistics.median(row["tokens"] / row["seconds"] for row in mine),
        "seconds_p50": statistics.median(row["seconds"] for row in mine),
        "time_to_first_token_p50": statistics.median(row["time_to_first_token"] for row in mine),
        "generation_bytes": _largest(mine),
    }
    if name != BASE and (pairs := _pairs(name, rows, "seconds", size)):
        figures["overhead"] = ratio(pairs)
    return figures


def _overheads(name: str, rows: list[Row]) -> dict[str, Any]:
    """The overheads of each of ``TIMES`` beside the base, one prompt at a time; nothing where there is no base."""
    names = {key: "overhead" if key == "seconds" else f"{key}_overhead" for key in TIMES}
    pairs = {key: _pairs(name, rows, key, 1) for key in TIMES if name != BASE}
    return {names[key]: ratio(found) for key, found in pairs.items() if found}


def _pairs(name: str, rows: list[Row], key: str, size: int) -> list[tuple[float, float]]:
    """The times of the base and of ``name`` in the same turn."""
    sides: dict[str, dict[Any, float]] = {BASE: {}, name: {}}
    for row in rows:
        if row["variant"] in sides and row["batch_size"] == size and row.get(key) is not None:
            sides[row["variant"]][row["category"], row["prompt"], row["run"]] = row[key]
    return [(sides[BASE][turn], mine) for turn, mine in sides[name].items() if turn in sides[BASE]]


def spread_of(key: str, values: list[float]) -> dict[str, float | None]:
    """Mean, standard deviation and percentiles of ``values``, each under its own key; None of too few."""
    return {
        f"{key}_mean": statistics.mean(values) if values else None,
        f"{key}_std": statistics.stdev(values) if len(values) > 1 else None,
        **{f"{key}_p{percent}": percentile(values, percent) for percent in (50, 95, 99)},
    }


def _largest(rows: list[Row]) -> int | None:
    return max((row["generation_bytes"] for row in rows if row["generation_bytes"] is not None), default=None)


def overall_figures(
    info: Mapping[str, Any], chosen: Mapping[str, Any], rows: list[Row], names: list[str]
) -> dict[str, Any]:
    """The figures of each variant over the categories in which every variant was measured."""
    whole = [
        category
        for category in chosen
        if LEFT_OUT not in info[category] and not any(LEFT_OUT in info[category][name] for name in names)
    ]
    inside = [row for row in rows if row["category"] in whole]
    figures = {name: _mean([info[c][name] for c in whole]) | _overheads(name, inside) for name in names if whole}
    return {"categories": whole, **figures}


def _mean(nodes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean of each number that all nodes hold; an interval has no mean."""
    mean: dict[str, Any] = {}
    for key, value in nodes[0].items():
        values = [node.get(key) for node in nodes]
        if isinstance(value, Mapping):
            if not key.endswith("overhead") and not any(found is None or LEFT_OUT in found for found in values):
                mean[key] = _mean(cast(Any, values))
        else:
            mean[key] = None if any(found is None for found in values) else statistics.mean(cast(Any, values))
    return mean
