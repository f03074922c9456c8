"""The memory of single steps of autograd, and of results that depend on numbers, beside what a CPU allocates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from benchmarks.memory_prediction import _most
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.profiler import ProfilerActivity, profile

from peftsweep.forecast.allocator import META, Allocator, Kernels, as_on_device

WIDE, TOKENS = 1024, 120


class FeedForward(nn.Module):
    """The layer whose input, in the backward pass, gets a gradient from the layer and one from its adapter."""

    def __init__(self, *, gated: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, WIDE), nn.Linear(WIDE, 32)
        self.gate = nn.Linear(32, WIDE, bias=False) if gated else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = nn.functional.gelu(self.up(x))
        found: torch.Tensor = self.down(wide if self.gate is None else wide * self.gate(x))
        return found


def adapted(*, gated: bool) -> Any:
    layer: Any = FeedForward(gated=gated)
    return get_peft_model(layer, LoraConfig(r=4, target_modules=["up", "down", "gate"])).train()


def loss(model: Any, rows: torch.Tensor) -> torch.Tensor:
    return model(rows).square().mean()  # type: ignore[no-any-return]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", [(3, 40), (TOKENS,)])
def test_gradients_that_meet_take_the_memory_that_autograd_takes(shape: tuple[int, ...], gated: bool) -> None:
    """Of rows of tokens the gradients are views, to which autograd does not add in place: a third one is made."""
    model, rows = adapted(gated=gated), torch.randn(*shape, 32)
    loss(model, rows).backward()
    model.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as watch:
        loss(model, rows).backward()
    with META:
        bare, same = adapted(gated=gated), torch.randn(*shape, 32)
    kernels = Kernels("cpu", None)
    with as_on_device("cpu", None), Allocator(1, 0) as allocator:
        held = allocator.hold([*bare.parameters(), same])
        with kernels.forward():
            found = loss(bare, same)
        allocator.mark()
        allocator.in_backward = True
        kernels.backward(found)
    assert allocator.peak - held == pytest.approx(_most(watch), abs=2000)


@pytest.mark.parametrize("experts", [4, 6])
def test_experts_that_are_gone_through_have_equal_shares_of_the_tokens(experts: int) -> None:
    """As in LongCat-Flash, whose own loop was counted as if every answer token were an expert with all of them."""
    with Allocator(1, 35) as allocator:
        chosen = torch.zeros(TOKENS, 2, dtype=torch.int64, device=META)
        mask = nn.functional.one_hot(chosen, num_classes=experts).permute(2, 1, 0)
        hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
        shares = [len(torch.where(mask[int(expert)])[1]) for expert in hit]
        assert shares == [2 * TOKENS // experts] * experts
        assert allocator.live > 0
    with Allocator(1, 35):
        assert len(torch.zeros(3, 40, dtype=torch.bool, device=META).nonzero()) == 35  # answers of a padded batch
