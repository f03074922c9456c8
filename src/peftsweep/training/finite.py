"""Detect losses and weights that are not finite, and propose a remedy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from peftsweep.data.batches import Batch
from peftsweep.models.losses import answer_losses
from peftsweep.schema import Dtype, TrainConfig
from peftsweep.training.optimizer import autocast

MAX_PROPOSED_RATE = 1e-3  # highest learning rate that is proposed; it is rarely too high for an adapter


def check_finite(loss: float, when: str, model: nn.Module, config: TrainConfig) -> None:
    """Check the training loss; ``when`` is the part of the message that names the step.

    Raises:
        FloatingPointError: ``loss`` is not finite.
    """
    if not math.isfinite(loss):
        raise FloatingPointError(f"the training loss is {loss} {when}; {_remedy(model, config)}")


@torch.no_grad()
def check_trained(
    model: nn.Module, weights: Sequence[torch.Tensor], batch: Batch, config: TrainConfig, step: int
) -> None:
    """Check the weights after the last step: the last logged loss is that of the weights before this step.

    Raises:
        FloatingPointError: one of ``weights`` is not finite after ``step`` steps, or the loss on ``batch`` is not.
    """
    if not all(bool(weight.isfinite().all()) for weight in weights):
        raise FloatingPointError(f"weights are not finite after step {step}; {_remedy(model, config)}")
    model.eval()
    with autocast(config, batch.input_ids.device):
        loss = answer_losses(model, batch).mean().item()
    check_finite(loss, f"after step {step}", model, config)


def _remedy(model: nn.Module, config: TrainConfig) -> str:
    """What to change after an overflow, as a sentence."""
    rate = config.learning_rate
    lower = "lower train.learning_rate" + (
        f", such as {min(rate / 10, MAX_PROPOSED_RATE):g}" if math.isfinite(rate) else ""
    )
    if config.autocast is Dtype.float16:
        key = "train.autocast"
    elif any(parameter.dtype == torch.float16 for parameter in model.parameters()):
        key = "model.dtype"
    else:
        return lower
    return f"{key}=float16 overflows above 65504: take bfloat16 or float32, or {lower}"
