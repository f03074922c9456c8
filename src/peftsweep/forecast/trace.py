"""Trace the operations of a training step, of a forward and of a decoding step, by running them on the meta device."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from peft import LoraConfig, PeftModel
from torch import nn
from torch.nn import functional

from peftsweep.data.tokens import Tokens
from peftsweep.forecast.allocator import META, Allocator, Kernels, as_on_device
from peftsweep.forecast.operations import Ledger, Operation
from peftsweep.forecast.predict import Shape, meta_batch, skeleton, to_meta
from peftsweep.models import attach, model, probe
from peftsweep.models.losses import answer_losses, regularised_loss, row_inputs
from peftsweep.models.parts import base_of, classifies, text_config, trainable_parameters
from peftsweep.models.shortcuts import SHORTCUTS
from peftsweep.observe import measure
from peftsweep.schema import Capture, Init, ModelConfig, TargetsConfig, TrainConfig
from peftsweep.training import loop
from peftsweep.training import optimizer as training_optimizer
from peftsweep.training.fused import as_trained

REFERENCE_STEPS = 12  # the first three are left out
Sizes = tuple[tuple[tuple[int, ...], torch.dtype], ...]


@dataclass(frozen=True)
class Step:
    """The operations of forward and backward of one micro-batch, and the weights that the optimizer changes."""

    ledger: Ledger
    trained: Sizes  # shape and dtype of each trained weight


class Tracer:
    """Traces parts of a trial with an adapted model on the meta device; ``device`` is "cpu" or "cuda"."""

    def __init__(self, adapted: Any, config: TrainConfig, device: str) -> None:
        self._adapted, self._config, self._device = adapted, config, device
        to_meta(adapted)
        text = text_config(adapted)
        if getattr(text, "pad_token_id", None) is None:
            text.pad_token_id = 0
        if not classifies(adapted):
            with self._run(Ledger(), 0) as kernels, kernels.forward():
                setattr(base_of(adapted), SHORTCUTS, probe.known_shortcuts(base_of(adapted)))

    @contextmanager
    def _run(self, ledger: Ledger, answers: int) -> Iterator[Kernels]:
        with as_on_device(self._device, self._config.autocast), Allocator(1, answers, ledger) as allocator:
            kernels = Kernels(self._device, self._config.autocast)
            self._allocator = allocator
            yield kernels

    def step(self, shape: Shape) -> Step:
        """The operations of a micro-batch of training."""
        adapted, batch, ledger = self._adapted, meta_batch(self._adapted, shape), Ledger()
        training_optimizer.enable_checkpointing(adapted, self._config.checkpointing)
        training_optimizer.make_optimizer(adapted, self._config)  # may freeze some of the weights
        adapted.train()
        with self._run(ledger, batch.answer_tokens) as kernels, as_trained(adapted, self._config, self._device):
            with kernels.forward():
                loss = regularised_loss(adapted, batch)
            self._allocator.in_backward = True
            kernels.backward(loss)
        weights = tuple((tuple(p.shape), p.dtype) for _, p in trainable_parameters(adapted) if p.grad is not None)
        adapted.zero_grad(set_to_none=True)
        return Step(ledger, weights)

    def read(self, shape: Shape) -> Ledger:
        """The operations of a forward that scores its answer tokens, as in an evaluation by likelihood."""
        return self._evaluated(
            lambda: answer_losses(self._adapted, meta_batch(self._adapted, shape)), shape.answer_tokens
        )

    def decode(self, rows: int, context: int) -> Ledger:
        """The operations of decoding one token for each row of a batch, after ``context`` tokens."""
        adapted, found = self._adapted, list[Any]()
        ids = torch.zeros(rows, context, dtype=torch.int64, device=META)
        options = {"use_cache": True, **row_inputs(adapted, ids)}

        def prompt() -> None:
            found.append(adapted(input_ids=ids, attention_mask=torch.ones_like(ids), **options).past_key_values)

        prompt_learning = isinstance(adapted, PeftModel) and adapted.active_peft_config.is_prompt_learning
        virtual = adapted.active_peft_config.num_virtual_tokens if prompt_learning else 0
        after = untouched(adapted) if prompt_learning else adapted  # virtual tokens are read with the prompt alone

        def token() -> None:
            longer = torch.ones(rows, virtual + context + 1, dtype=torch.int64, device=META)
            after(input_ids=ids[:, :1], attention_mask=longer, past_key_values=found[0], **options)

        self._evaluated(prompt, rows)
        return self._evaluated(token, rows)

    def _evaluated(self, call: Callable[[], object], answers: int) -> Ledger:
        ledger = Ledger()
        self._adapted.eval()
        with torch.no_grad(), self._run(ledger, answers) as kernels, kernels.forward():
            call()
        return ledger


def untouched(adapted: Any) -> Any:
    """The base of a trace without the method, if the method can be taken off it."""
    return adapted.get_base_model() if isinstance(adapted, PeftModel) else adapted


def reference_step(
    clock: Callable[[], float], device: torch.device, width: int, rows: int, tokens: int, *, captured: bool
) -> tuple[Step, Callable[[], float]]:
    """A LoRA step of a small random model: its operations, and a function that runs it and returns its seconds.

    ``captured``: on a GPU it is replayed as a CUDA graph; the seconds are NaN where it cannot be captured.
    """
    sizes: dict[str, Any] = {"model_type": "llama", "vocab_size": 512, "hidden_size": width}
    sizes |= {"intermediate_size": 4 * width, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape_of = ModelConfig("random", init=Init.random, architecture=sizes)
    method = LoraConfig(r=8, target_modules="all-linear")
    way = Capture.auto if captured else Capture.off
    config = TrainConfig(steps=REFERENCE_STEPS, batch_size=rows, log_every=REFERENCE_STEPS, capture=way)
    draw = random.Random(0)
    data = [Tokens([draw.randrange(3, 512) for _ in range(tokens)], tokens // 2) for _ in range(rows * config.steps)]
    shape = Shape(rows, tokens, tokens - tokens // 2, rows * (tokens - tokens // 2))
    with torch.device("meta"):
        bare = attach.attach(skeleton(shape_of, None), method, TargetsConfig(), {})
    step = Tracer(bare, config, device.type).step(shape)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        base = model.load(shape_of, None, device)
        probe.abilities(base)
        adapted = attach.attach(base, dataclasses.replace(method), TargetsConfig(), {})

    def run() -> float:
        with torch.random.fork_rng(devices), patch.object(loop, "Laps", partial(measure.Laps, clock=clock)):
            options: dict[str, Any] = {"pad_id": 0, "seed": 0, "log": lambda row: None}
            done = loop.train(adapted, data, config, meter=measure.Meter(device), **options)
        if captured and device.type == "cuda" and not done.compilation.get("capture_graphs"):
            return math.nan
        return measure.lower_quartile(done.steady_seconds)  # as operations are timed

    return step, run


def layer_operations(dtypes: Sequence[str], ranks: Sequence[int]) -> Iterator[Operation]:
    """The products of a LoRA layer, and the dequantisation of a layer that is stored in 4 and in 8 bits."""
    import bitsandbytes  # noqa: F401  (it names its operators)

    ledger = Ledger()
    with Allocator(1, 0, ledger):
        for name in dtypes:
            wide, layer = (torch.empty(512, 1024, dtype=getattr(torch, name), device="meta") for _ in range(2))
            for rank in ranks:
                low = torch.empty(rank, 1024, dtype=wide.dtype, device="meta")
                functional.linear(functional.linear(wide, low), low.new_empty(1024, rank))
            torch.ops.bitsandbytes.dequantize_4bit(  # 64 numbers to a scale, two to a byte
                layer.new_empty(layer.numel() // 2, 1, dtype=torch.uint8),
                layer.new_empty(layer.numel() // 64, dtype=torch.float32),
                *(64, "nf4", list(layer.shape), layer.dtype),
            )
            layer.new_empty(layer.shape, dtype=torch.int8) * layer.new_empty(512, 1)
    yield from ledger.calls


def made_optimizer(trained: Sizes, config: TrainConfig, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer of weights of these shapes, with gradients."""
    weights = [nn.Parameter(torch.zeros(shape, dtype=dtype, device=device)) for shape, dtype in trained]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    return training_optimizer.make_optimizer(nn.Module(), config, weights)
