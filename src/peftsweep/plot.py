"""Figures of a study: quality against what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

# metric -> (axis label, whether higher is better); the first one a study has is its quality
QUALITY = {
    "accuracy": ("accuracy", True),
    "perplexity": ("perplexity (lower is better)", False),
}
COSTS = {
    "adapter": ("train_info.adapter_bytes", "adapter on disk (MB)", 1e6),
    "memory": ("memory.train.allocated_peak", "training memory, peak allocated on the device (GB)", 1e9),
    "resident_memory": ("memory.train.rss_peak", "training memory, peak resident on the host (MB)", 1e6),
    "time": ("train_info.train_seconds", "training time (s)", 1.0),
}
MARKERS = "osD^vP*X"
INK, RULE = "#333333", "#dddddd"


def study(table: pd.DataFrame, folder: Path) -> list[Path]:
    """Write the figures that the successful trials of ``table`` allow; gives the files written."""
    good = table[table["run_info.status"] == "success"]
    quality = _quality(good)
    if quality is None:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    if "config.method.r" in good and good["config.method.r"].nunique() > 1:
        written.append(_against_rank(good, quality, folder / "quality_rank.png"))
    for name, (column, label, unit) in COSTS.items():
        if column in good and good[column].notna().any():
            written.append(_against_cost(good, quality, column, label, unit, folder / f"quality_{name}.png"))
    return written


def _quality(table: pd.DataFrame) -> str | None:
    """The column of the study's main score: the first accuracy, else the first perplexity."""
    for metric in QUALITY:
        for column in table.columns:
            if column.startswith("eval_info.") and column.endswith(f".{metric}.value") and table[column].notna().any():
                return str(column)
    return None


def _against_rank(table: pd.DataFrame, quality: str, file: Path) -> Path:
    figure, axes = _axes()
    table = table[table["config.method.r"].notna()]
    for marker, (name, group) in zip(MARKERS * 9, table.groupby(_series(table), sort=False), strict=False):
        group = group.sort_values("config.method.r")
        axes.errorbar(
            group["config.method.r"].astype(float),
            group[quality].astype(float),
            yerr=_interval(group, quality),
            marker=marker,
            markersize=5,
            capsize=3,
            linewidth=1.5,
            label=name,
        )
    axes.set_xscale("log", base=2)
    ranks = sorted(table["config.method.r"].unique())
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    axes.minorticks_off()
    axes.set_xlabel("rank")
    return _finish(figure, axes, table, quality, file)


def _against_cost(table: pd.DataFrame, quality: str, column: str, label: str, unit: float, file: Path) -> Path:
    figure, axes = _axes()
    table = table[table[column].notna()]
    for marker, (name, group) in zip(MARKERS * 9, table.groupby(_series(table), sort=False), strict=False):
        x = group[column].astype(float) / unit
        axes.errorbar(
            x,
            group[quality].astype(float),
            yerr=_interval(group, quality),
            fmt=marker,
            markersize=6,
            capsize=3,
            elinewidth=1,
            label=name,
        )
        if "config.method.r" in group:
            for place, value, rank in zip(x, group[quality].astype(float), group["config.method.r"], strict=True):
                if pd.notna(rank):
                    axes.annotate(f"r={rank}", (place, value), (6, 4), textcoords="offset points", fontsize=8)
    axes.set_xlabel(label)
    axes.margins(x=0.12)
    return _finish(figure, axes, table, quality, file)


def _series(table: pd.DataFrame) -> pd.Series[Any]:
    """What a point belongs to: the choices that differ between trials, besides the rank."""
    choices = [c for c in table.columns if c.startswith("choices.")]
    differing = [c for c in choices if table[c].nunique() > 1] or ["choices.method", "choices.quant"]
    return table[differing].astype(str).agg(", ".join, axis=1)


def _interval(table: pd.DataFrame, quality: str) -> pd.Series[Any] | None:
    """Half the width of the 95% interval over the test rows, 1.96 standard errors."""
    column = quality.removesuffix("value") + "stderr"
    return 1.96 * table[column].astype(float).fillna(0.0) if column in table else None


def _axes() -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")  # a figure is a file; no display is needed
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _finish(figure: Any, axes: Any, table: pd.DataFrame, quality: str, file: Path) -> Path:
    from matplotlib import pyplot

    name, metric = quality.removeprefix("eval_info.").removesuffix(".value").rsplit(".", 1)
    axes.set_ylabel(f"{name}: {QUALITY[metric][0]}", color=INK)
    base = f"eval_info.{name}.base_{metric}.value"
    if base in table and metric == "accuracy" and table[base].notna().any():
        value = float(table[base].astype(float).mean())
        axes.axhline(value, color=INK, linestyle=":", linewidth=1, label="untouched base")
        axes.set_ylim(-0.03, 1.03)
    bars = axes.get_figure().text(1, 0, "bars: 95% interval over test rows", fontsize=7, color="#777777", ha="right")
    bars.set_in_layout(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=150, bbox_inches="tight")
    pyplot.close(figure)
    return file
