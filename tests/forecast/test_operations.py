"""FLOPs, bytes and launches of operations, against closed forms."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from peftsweep.forecast.allocator import Allocator
from peftsweep.forecast.operations import Ledger, TensorSpec

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


def test_calls_of_the_same_sizes_are_one_operation_and_others_are_not() -> None:
    left, right = meta(M, K), meta(K, N)
    ledger = counted(lambda: (left @ right, left @ right, right.t() @ left.t()))
    assert sorted(count for one, count in ledger.calls.items() if one.name == "aten::mm") == [1, 2]
    assert len({one.key for one in ledger.calls}) == len(ledger.calls)


def test_flops_are_told_by_number_format() -> None:
    wide, narrow = meta(M, M), meta(M, M, dtype=torch.bfloat16)
    found = counted(lambda: (wide @ wide, narrow @ narrow, narrow @ narrow)).flops_by_dtype
    assert found == {torch.float32: 2 * M**3, torch.bfloat16: 4 * M**3}
