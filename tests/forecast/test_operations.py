"""FLOPs, bytes and launches of operations, against closed forms."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import architectures
from peft import LoraConfig
from torch import nn

from peftsweep.config import build
from peftsweep.config.compose import Trial
from peftsweep.data.batches import collate
from peftsweep.data.tokens import Tokens
from peftsweep.forecast import forecast, operations, predict
from peftsweep.forecast.allocator import Allocator
from peftsweep.forecast.operations import Ledger, TensorSpec
from peftsweep.forecast.predict import Prediction, Shape
from peftsweep.forecast.trace import Tracer
from peftsweep.models import attach, model, probe
from peftsweep.models.losses import regularised_loss
from peftsweep.observe.flops import count_flops
from peftsweep.schema import Dtype, ModelConfig, TargetsConfig, Task, TrainConfig

Compose = Callable[..., Trial]
M, K, N = 6, 10, 14
FLOAT = 4  # bytes of a number


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def counted(call: Callable[[], object]) -> Ledger:
    ledger = Ledger()
    with Allocator(1, 0, ledger):
        call()
    return ledger


def test_a_product_has_2_m_n_k_flops_and_moves_its_three_matrices() -> None:
    left, right = meta(M, K), meta(K, N)
    ledger = counted(lambda: left @ right)
    assert ledger.flops == 2 * M * N * K
    assert ledger.bytes == FLOAT * (M * K + K * N + M * N)
    assert (ledger.launches, ledger.other_bytes) == (1, 0)


def test_an_elementwise_operation_reads_its_arguments_and_writes_its_result() -> None:
    left, right = meta(M, N), meta(M, N)
    ledger = counted(lambda: left + right)
    assert (ledger.flops, ledger.bytes, ledger.launches) == (0, 3 * FLOAT * M * N, 1)


def test_a_dimension_that_is_expanded_is_read_once() -> None:
    left, row = meta(M, N), meta(1, N)
    wide = row.expand(M, N)
    assert counted(lambda: left + wide).bytes == FLOAT * (2 * M * N + N)
    assert TensorSpec(torch.float32, (M, N), (0, 1)).bytes == FLOAT * N


def test_a_view_is_dispatched_and_starts_no_kernel() -> None:
    tensor = meta(M, N)
    ledger = counted(lambda: tensor.t().unsqueeze(0))
    assert (ledger.launches, ledger.bytes, ledger.dispatches) == (0, 0, 2)


def test_an_embedding_reads_the_rows_that_it_returns_and_not_its_whole_weight() -> None:
    weight, ids = meta(1000, N), torch.zeros(M, dtype=torch.int64, device="meta")
    ledger = counted(lambda: nn.functional.embedding(ids, weight))
    assert ledger.bytes == 2 * FLOAT * M * N + 8 * M


@pytest.mark.parametrize("frozen", [False, True])
def test_a_step_of_two_linear_layers_has_its_closed_form(frozen: bool) -> None:
    """Forward 2 FLOPs a token and weight; backward as many for the input's gradient, and for the weight's, if any."""
    first, second = (nn.Linear(K, K, bias=False, device="meta") for _ in range(2))
    first.weight.requires_grad_(not frozen)
    tokens = meta(M, K)
    ledger = counted(lambda: second(first(tokens)).sum().backward())
    product = 2 * M * K * K
    # The layer's input has no gradient of its own; a frozen first layer lets nothing through to before it.
    assert ledger.flops == product * (2 + (1 if frozen else 3))


@pytest.mark.parametrize(
    ("kind", "task"),
    [
        ("phimoe", Task.causal_lm),  # whose routers add a number to a gradient
        pytest.param("qwen3_moe", Task.causal_lm, marks=pytest.mark.slow),  # the same kind, without the number
        pytest.param("qwen2", Task.seq_cls, marks=pytest.mark.slow),
    ],
)
def test_the_flops_of_a_step_are_those_of_the_step_that_is_run(kind: str, task: Task, tmp_path: Path) -> None:
    folder, classes = architectures.write(kind, task, tmp_path / kind), 2 * (task is Task.seq_cls)
    config = ModelConfig(name_or_path=str(folder), dtype=Dtype.float32, task=task)
    base: Any = model.load(config, None, torch.device("cpu"), classes)
    base.config.pad_token_id = 0
    if not classes:
        probe.abilities(base)
    rows = [Tokens(list(range(5, 29)), 24 if classes else 8, label=0 if classes else None)] * 4
    batch, targets = collate(rows, pad_id=0), TargetsConfig(all_linear=True)
    adapted = attach.attach(base, LoraConfig(r=4), targets, {}).train()

    def run(steps: int, after_step: Callable[[], None]) -> None:
        for _ in range(steps):
            regularised_loss(adapted, batch).backward()
            after_step()

    expected = sum(count_flops(run, settle=1, active=1).values())
    with torch.device("meta"):
        planned = attach.attach(predict.skeleton(config, None, classes=classes), LoraConfig(r=4), targets, {})
    shape = Shape(4, 24, 1 if classes else 16, batch.answer_tokens)
    assert Tracer(planned, TrainConfig(), "cpu").step(shape).ledger.flops == expected > 0


def test_calls_of_the_same_sizes_are_one_operation_and_others_are_not() -> None:
    left, right = meta(M, K), meta(K, N)
    ledger = counted(lambda: (left @ right, left @ right, right.t() @ left.t()))
    assert sorted(count for one, count in ledger.calls.items() if one.name == "aten::mm") == [1, 2]
    assert len({one.key for one in ledger.calls}) == len(ledger.calls)


def test_flops_are_told_by_number_format() -> None:
    wide, narrow = meta(M, M), meta(M, M, dtype=torch.bfloat16)
    found = counted(lambda: (wide @ wide, narrow @ narrow, narrow @ narrow)).flops_by_dtype
    assert found == {torch.float32: 2 * M**3, torch.bfloat16: 4 * M**3}


TRIALS = (
    "method=lora",
    "method=dora quant=4bit",
    "method=full train.checkpointing=true",
    "method=lora quant=8bit train.autocast=bfloat16",
    "method=prompt_tuning",
)
# In the fast tier the calls that checkpointing makes again; those of bitsandbytes' formats take up to twice as long.
FAST = {(TRIALS[2], "cuda")}
REMEMBERED = [
    (words, where) if (words, where) in FAST else pytest.param(words, where, marks=pytest.mark.slow)
    for words in TRIALS
    for where in ("cpu", "cuda")
]


@pytest.mark.parametrize(("words", "where"), REMEMBERED)
def test_a_call_that_is_remembered_gives_the_bytes_and_operations_of_one_that_is_made(
    words: str, where: str, compose: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = compose("train=quick", *words.split())
    shape = Shape(2, 12, 5, 10)

    def found() -> tuple[Prediction | None, list[tuple[str, int, int, int]]]:
        traced = forecast.on_skeleton(
            trial,
            build.storage(trial),
            lambda adapted: Tracer(adapted, trial.config.train, where).step(shape).ledger,
            (("meta", "meta"), ("meta", "cpu")),
        )
        assert traced is not None
        keys = {one: re.sub("0x[0-9a-f]+", "", one.key) for one in traced.calls}  # a generator's address
        calls = sorted((keys[one], count, one.flops, one.bytes) for one, count in traced.calls.items())
        return forecast.predicted(trial, [shape], where), calls

    found()
    remembered = found()
    with monkeypatch.context() as patch:
        patch.setattr(operations, "_key", lambda *_: None)
        made = found()
    assert remembered == made
    assert made[0] is not None
    assert made[1]


def test_a_number_and_the_same_number_of_another_type_are_not_one_call() -> None:
    whole = torch.empty(M, dtype=torch.int64, device="meta")
    with Allocator(1, 0):
        assert [(whole * 2).dtype, (whole * 2.0).dtype, (whole * 2).dtype] == [torch.int64, torch.float32, torch.int64]


def test_results_that_are_remembered_are_new_memory_and_are_freed() -> None:
    tensor = meta(M, N)
    with Allocator(1, 0) as allocator:
        first, second = tensor.exp(), tensor.exp()
        assert allocator.live == 2 * FLOAT * M * N
        assert first.untyped_storage()._cdata != second.untyped_storage()._cdata
        del first, second
        assert allocator.live == 0


def test_arguments_of_calls_are_ones_in_memory_of_their_own_but_for_those_that_a_call_changes() -> None:
    left, right = meta(M, N), meta(N, M).t()
    (added,) = counted(lambda: left + right).calls
    (changed,) = counted(lambda: left.add_(right)).calls
    arguments = operations.Arguments(torch.device("cpu"), 4096)
    given = [one for args, _ in arguments.made(added, 3) for one in args if isinstance(one, torch.Tensor)]
    assert [tuple(one.stride()) for one in given] == 3 * [(N, 1), (1, M)]
    assert all(bool((one == 1).all()) for one in given)
    assert len({one.data_ptr() for one in given}) == 6
    assert len({one.untyped_storage()._cdata for one in given}) == 1
    for args, _ in arguments.made(changed, 2):
        args[0].add_(args[1])
    assert all(
        bool((one == 1).all()) for args, _ in arguments.made(added, 3) for one in args if isinstance(one, torch.Tensor)
    )
