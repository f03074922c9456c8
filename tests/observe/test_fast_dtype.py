"""``model.dtype=auto`` is one format before a trial has an identity, and the same in every process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from peftsweep import InputError
from peftsweep.config.compose import Trial
from peftsweep.observe import fast_dtype
from peftsweep.schema import Dtype

Compose = Callable[..., Trial]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    fast_dtype._of_cpu.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "peftsweep" / "cpu_dtype.json"


def seconds(monkeypatch: pytest.MonkeyPatch, bfloat16: float, float32: float) -> list[str]:
    dtypes: list[str] = []
    took = {"bfloat16": bfloat16, "float32": float32}

    def timed(dtype: str) -> float:
        dtypes.append(dtype)
        return took[dtype]

    monkeypatch.setattr(fast_dtype, "_seconds", timed)
    return dtypes


@pytest.mark.parametrize(("bfloat16", "expected"), [(0.5, Dtype.bfloat16), (0.97, Dtype.float32), (3.0, Dtype.float32)])
def test_a_cpu_takes_bfloat16_where_its_products_are_faster(
    bfloat16: float, expected: Dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds(monkeypatch, bfloat16, 1.0)
    assert fast_dtype.resolve("cpu") is expected


def test_what_a_cpu_takes_is_measured_once_and_read_in_other_processes(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds(monkeypatch, 0.5, 1.0)
    assert fast_dtype.resolve("cpu") is Dtype.bfloat16
    fast_dtype._of_cpu.cache_clear()  # as in another process
    dtypes = seconds(monkeypatch, 1.0, 0.5)
    assert fast_dtype.resolve("cpu") is Dtype.bfloat16
    assert dtypes == []
    (key,) = json.loads(cache.read_text())
    assert torch.__version__ in key


def test_a_cpu_whose_measurement_cannot_be_kept_takes_float32(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds(monkeypatch, 0.5, 1.0)
    cache.parent.parent.write_text("a file in the folder's place")
    assert fast_dtype.resolve("cpu") is Dtype.float32


@pytest.mark.parametrize(("device", "count"), [("cuda:1", 0), ("cuda", 0), ("auto", 2)])
def test_cuda_takes_bfloat16(device: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "init", lambda: pytest.fail("CUDA was initialised"))
    assert fast_dtype.resolve(device) is Dtype.bfloat16


def test_the_timing_itself_runs() -> None:
    assert fast_dtype._seconds("bfloat16") > 0


def test_the_identity_is_that_of_the_format_itself(compose: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds(monkeypatch, 0.5, 1.0)
    found, explicit = (compose("quant=4bit", f"model.dtype={dtype}") for dtype in ("auto", "bfloat16"))
    assert found.identity == explicit.identity
    assert found.tree == explicit.tree
    assert found.config.quant["bnb_4bit_compute_dtype"] == "bfloat16"


def test_causal_lm_takes_what_is_fast(compose: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds(monkeypatch, 2.0, 1.0)
    assert compose("model=llama3.2_1b", "model.init=random").config.model.dtype is Dtype.float32


@pytest.mark.parametrize("key", ["train.autocast", "quant=4bit quant.bnb_4bit_compute_dtype"])
def test_only_the_base_has_an_automatic_format(key: str, compose: Compose) -> None:
    with pytest.raises(InputError, match=r"=auto: must be one of float32, bfloat16, float16"):
        compose(*f"{key}=auto".split())
