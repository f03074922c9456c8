"""Which method fits which GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from peftsweep import cli
from peftsweep.config.compose import Trial
from peftsweep.errors import InputError
from peftsweep.forecast.forecast import longest, predicted
from peftsweep.forecast.guide import USABLE, guide

Compose = Callable[..., Trial]


@pytest.mark.slow  # plans a model of 1B parameters; `tests/forecast/test_predict.py` has predictions of small ones
def test_a_row_says_which_gpus_hold_it(compose: Compose) -> None:
    (row,) = guide("llama3.2_1b", compose, methods=["lora"], quants=["4bit"], words=["train.batch_size=1"])
    assert row.peak_bytes is not None
    assert row.fits == {size: row.peak_bytes <= USABLE * size * 10**9 for size in row.fits}
    assert row.smallest == min(size for size in row.fits if row.fits[size])
    assert row.smallest < 24 < max(row.fits)


@pytest.mark.slow
def test_quantisation_and_methods_are_told_apart(compose: Compose) -> None:
    rows = guide("llama3.2_1b", compose, methods=["lora", "full"], quants=["none", "4bit"])
    peaks = {(row.method, row.quant): row.peak_bytes or 0 for row in rows}
    assert 0 < peaks["lora", "4bit"] < peaks["lora", "none"] < peaks["full", "none"]


def test_a_refused_combination_fits_nowhere(compose: Compose) -> None:
    (row,) = guide("tiny", compose, methods=["loha"], quants=["4bit"])
    assert (row.peak_bytes, row.smallest, any(row.fits.values())) == (None, None, False)
    assert "which 4-bit storage packs" in (row.refused or "")


@pytest.mark.slow  # two plans; `tests/forecast/test_predict.py` has memory that grows with the rows
def test_longer_rows_take_more(compose: Compose) -> None:
    short, long = (compose("method=hira", f"dataset.max_length={n}") for n in (64, 128))
    peaks = [predicted(trial, [longest(trial)], "cuda") for trial in (short, long)]
    assert peaks[0] is not None
    assert peaks[1] is not None
    assert peaks[0].activation_bytes * 1.9 < peaks[1].activation_bytes


def test_a_wrong_word_is_one_line(compose: Compose) -> None:
    with pytest.raises(InputError, match="targets"):
        guide("tiny", compose, methods=["full"], quants=["none"], words=["targets=qv"])


@pytest.mark.slow
def test_the_command_prints_the_table_and_takes_further_words(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["peftsweep-collect", "--memory-guide", "tiny", "train.batch_size=2"])
    with pytest.raises(SystemExit) as ended:
        cli.collect()
    out = capfd.readouterr().out
    assert not ended.value.code
    assert "training memory of tiny: 2 rows of 512 tokens, float32" in out
    assert out.count("refused") == 3  # full fine-tuning of quantised weights, DoRA on 8 bits
    assert out.count("yes") == 8 * 15
