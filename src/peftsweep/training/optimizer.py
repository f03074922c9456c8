"""Optimizers, schedules, gradient scaling and autocast of a training."""

from __future__ import annotations

import inspect
import pydoc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import get_scheduler

from peftsweep.errors import InputError
from peftsweep.models.parts import trainable_parameters
from peftsweep.schema import Dtype, Schedule, TrainConfig

SCHEDULES = {Schedule.cosine: "cosine", Schedule.linear: "linear", Schedule.constant: "constant_with_warmup"}
FUSED = ("cpu", "cuda")  # device types for which torch has fused optimizers
# Optimizers that step each number independently, so that several parameters can be stepped as one.
ELEMENTWISE = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)
INITIAL_SCALE = 2.0**16  # of the loss with float16; torch's default


def find_optimizer(name: str) -> Callable[..., torch.optim.Optimizer]:
    """The class or function that ``train.optimizer`` names: a class of torch.optim (``AdamW``), or a dotted path.

    The path may name an optimizer class, or a function that makes an optimizer for a model, such as PEFT's
    ``peft.optimizers.create_loraplus_optimizer``.

    Raises:
        InputError: there is no such optimizer.
    """
    try:
        found: Any = pydoc.locate(name if "." in name else f"torch.optim.{name}")
    except pydoc.ErrorDuringImport:
        found = None
    takes_model = inspect.isfunction(found) and "model" in inspect.signature(found).parameters
    if not takes_model and not (inspect.isclass(found) and issubclass(found, torch.optim.Optimizer)):
        raise InputError(
            f"train.optimizer={name}: no such optimizer; give a class of torch.optim (AdamW, SGD) or a dotted path"
        )
    if found is torch.optim.SparseAdam:
        raise InputError(f"train.optimizer={name}: takes sparse gradients only; those of a trial are dense")
    closure = inspect.signature(getattr(found, "step", found)).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise InputError(
            f"train.optimizer={name}: its steps need a closure that computes the loss again; "
            "take an optimizer whose step() needs none (AdamW, SGD)"
        )
    make: Callable[..., torch.optim.Optimizer] = found
    return make


# What constructors of optimizers raise for wrong arguments (bitsandbytes' SGD without momentum: the last one).
REFUSALS = (TypeError, ValueError, LookupError, NotImplementedError)


def make_optimizer(
    model: nn.Module, config: TrainConfig, parameters: Sequence[nn.Parameter] | None = None
) -> torch.optim.Optimizer:
    """The optimizer of ``parameters`` at ``learning_rate * learning_rate_scale``, fused where torch has that.

    Without ``parameters`` it steps all trainable parameters of ``model``. Some optimizers freeze parameters when they
    are made, as LoRA-FA does with the A matrices.

    Raises:
        InputError: the optimizer does not accept ``train.optimizer_kwargs``, or lacks the weight decay that is wanted.
    """
    make = find_optimizer(config.optimizer)
    known = inspect.signature(make).parameters
    parameters = list(parameters or (p for _, p in trainable_parameters(model)))
    options: dict[str, Any] = {"lr": config.learning_rate * config.learning_rate_scale}
    if "weight_decay" in known or "optimizer_cls" in known:
        options["weight_decay"] = config.weight_decay
    if "loraplus_lr_ratio" in known:  # whose groups of parameters override weight_decay
        options["loraplus_weight_decay"] = config.weight_decay
    if "optimizer_cls" in known:
        options["optimizer_cls"] = torch.optim.AdamW
    if "fused" in known and all(p.dtype.is_floating_point and p.device.type in FUSED for p in parameters):
        options["fused"] = True
    try:
        made = make(model if "model" in known else parameters, **options | config.optimizer_kwargs)
    except REFUSALS as error:
        reason = f"{config.optimizer} does not take {config.optimizer_kwargs}"
        raise InputError(f"train.optimizer_kwargs: {reason} ({error})") from None
    if config.weight_decay and not any(group.get("weight_decay") for group in made.param_groups):
        raise InputError(
            f"train.weight_decay={config.weight_decay:g}: {config.optimizer} has no weight decay; must be 0 with it"
        )
    return made


def make_scheduler(optimizer: torch.optim.Optimizer, config: TrainConfig, steps: int) -> Any:
    """The learning rate's schedule over ``steps`` steps, with its warm-up."""
    warmup = warmup_steps(config, steps)
    return get_scheduler(SCHEDULES[config.schedule], optimizer, num_warmup_steps=warmup, num_training_steps=steps)


def warmup_steps(config: TrainConfig, steps: int) -> int:
    """The steps of the warm-up of a training of ``steps`` steps."""
    return round(config.warmup * steps) if config.warmup < 1 else round(config.warmup)


def check_warmup(config: TrainConfig, steps: int) -> None:
    """Refuse a warm-up that does not end before the training: no step would have the configured learning rate.

    Raises:
        InputError: ``train.warmup`` is neither a share nor a whole number, or not shorter than ``steps``.
    """
    if config.warmup >= 1 and config.warmup != round(config.warmup):
        raise InputError(f"train.warmup={config.warmup:g}: must be a share below 1, or a whole number of steps")
    if steps and (warmup := warmup_steps(config, steps)) >= steps:
        raise InputError(
            f"train.warmup={config.warmup:g}: {warmup} steps, must be fewer than the {steps} of the training"
        )


def enable_checkpointing(model: Any, wanted: bool) -> None:
    """Enable gradient checkpointing if it is ``wanted``: activations are then computed again in the backward."""
    if wanted:
        # Renamed in transformers 5.23; both names are in the supported range.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        # Which has what the embeddings give require a gradient, that only reentrant checkpoints need. It is then a leaf
        # of autograd, which models that add positions to it in place (git) cannot change.
        model.disable_input_require_grads()


def make_scaler(config: TrainConfig, device: torch.device) -> torch.amp.GradScaler:
    """The gradient scaler for ``train.autocast=float16``, which skips steps whose gradients overflow."""
    return torch.amp.GradScaler(device.type, init_scale=INITIAL_SCALE, enabled=config.autocast is Dtype.float16)


def check_stepped(scaler: torch.amp.GradScaler, steps: int) -> None:
    """Refuse a training in which the gradient scaler has skipped all ``steps``, so that nothing was trained.

    Raises:
        FloatingPointError: the scale was lowered as often as there were steps.
    """
    if scaler.is_enabled() and scaler.get_scale() <= INITIAL_SCALE * scaler.get_backoff_factor() ** steps:
        reason = f"the gradients of all {steps} steps overflowed, and none was taken"
        raise FloatingPointError(f"{reason}; take train.autocast=bfloat16, or more steps: each step halves the scale")


def autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    """The autocast context of ``train.autocast``."""
    dtype = getattr(torch, (config.autocast or Dtype.bfloat16).value)
    return torch.autocast(device.type, dtype=dtype, enabled=bool(config.autocast))
