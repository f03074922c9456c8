"""Predict which method with which quantisation fits which GPU, without weights and without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from peftsweep.config import fill
from peftsweep.config.compose import Trial
from peftsweep.forecast import forecast
from peftsweep.observe.display import show_table, size

METHODS = ("lora", "dora", "ia3", "hira", "prompt_tuning", "full")
QUANTS = ("none", "8bit", "4bit")
SIZES = (8, 12, 16, 24, 40, 48, 80, 141)  # GB of memory of common GPUs
USUAL = ("dataset.max_length=512", "train.batch_size=4")  # defaults, which words of the command line override
USABLE = 0.9  # share of a GPU's memory; the driver and gaps between blocks take the rest (chosen, not measured)


@dataclass(frozen=True)
class Row:
    """A method with a quantisation, and the GPUs whose memory is large enough for its training step."""

    method: str
    quant: str
    peak_bytes: int | None  # None: refused, or unknown without weights
    fits: dict[int, bool]  # GB of a GPU -> whether the peak fits
    refused: str | None = None  # why it cannot be trained

    @property
    def smallest(self) -> int | None:
        """The memory of the smallest GPU that fits, in GB."""
        return min((size for size, enough in self.fits.items() if enough), default=None)


def main(model: str, compose: Callable[..., Trial], words: Sequence[str]) -> int:
    """``peftsweep-collect --memory-guide MODEL``: print the guide of a preset, a folder or a hub id."""
    rows = guide(model, compose, words=words)
    config = compose(*_words(model, "lora", "none", words)).config
    batch = f"{config.train.batch_size} rows of {config.dataset.max_length} tokens, {config.model.dtype.value}"
    shown = [
        {
            "method": row.method,
            "quant": row.quant,
            "needs": "refused" if row.refused else size(row.peak_bytes),
            **{f"{gigabytes} GB": "yes" if enough else "-" for gigabytes, enough in row.fits.items()},
        }
        for row in rows
    ]
    show_table(f"training memory of {model}: {batch}, half of each row the answer", shown)
    print(
        f"predicted; a GPU is taken to be full at {USABLE:.0%}. Any key of a trial may follow: train.checkpointing=true"
    )
    return 0


def guide(
    model: str,
    compose: Callable[..., Trial],
    *,
    words: Sequence[str] = (),
    methods: Sequence[str] = METHODS,
    quants: Sequence[str] = QUANTS,
) -> list[Row]:
    """One row a method and quantisation of ``model``; ``words`` are further overrides of each trial.

    ``compose`` makes a trial of the words of a command line. Rows are as long as ``dataset.max_length``
    allows, their answers a half of that.

    Raises:
        InputError: there is no such model, or a word is wrong.
    """
    rows = []
    for method in methods:
        for quant in quants:
            trial = compose(*_words(model, method, quant, words))
            refused = forecast.refusal(trial)
            found = None if refused else forecast.predicted(trial, [forecast.longest(trial)], "cuda")
            peak = found.peak_bytes if found else None
            fits = {size: peak is not None and peak <= USABLE * size * 10**9 for size in SIZES}
            rows.append(Row(method, quant, peak, fits, refused))
    return rows


def _words(model: str, method: str, quant: str, words: Sequence[str]) -> list[str]:
    preset = (Path(fill.conf_dir()) / "model" / f"{model}.yaml").is_file()
    base = [f"model={model}"] if preset else ["model=causal_lm", f"model.name_or_path={model}"]
    return [*base, "device=cuda", f"method={method}", f"quant={quant}", *USUAL, *words]
