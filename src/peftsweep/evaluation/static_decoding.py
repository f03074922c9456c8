"""Greedy decoding in static shapes, whose step CUDA captures as a graph and replays.

A step of decoding reads one token of each row. On a GPU the device is done with it long before the host has launched
the kernels of the next one. Here the cache has its final length from the beginning (transformers' ``StaticLayer``),
and tokens, positions and mask have fixed addresses, so that one graph serves all steps of all batches of an evaluation.

Nothing is assumed about an architecture: the first two forward passes of the first batch are also made with the usual
cache, and the first two replays are compared with eager steps: two, as a graph repeats the Python numbers of the step
that it was captured in, such as a position, which are right in that step. Where the logits of a row differ by more than
rounding, the host waits for the device in a step, memory lacks or the model raises another error, the batch is read
again with the usual cache.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import Cache, StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from peftsweep.errors import first_line
from peftsweep.models.losses import last_positions
from peftsweep.models.parts import base_of
from peftsweep.models.probe import same_logits
from peftsweep.models.quantised.layers import is_wrapper
from peftsweep.observe.measure import out_of_memory
from peftsweep.training import graphs

log = logging.getLogger(__name__)

MIN_NEW_TOKENS = 8  # with fewer, capturing costs more than the replays save


def next_logits(
    model: nn.Module, ids: torch.Tensor, attention: torch.Tensor, positions: torch.Tensor, cache: Any
) -> tuple[torch.Tensor, Any]:
    """The logits of the last token of each row, [rows, vocabulary], and the cache with the tokens ``ids`` in it.

    ``ids`` and ``positions`` are [rows, length]; ``attention`` covers the tokens in ``cache`` too. None: a new cache.
    """
    output = model(
        input_ids=ids,
        attention_mask=attention,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=last_positions(1, ids.device) if ids.shape[1] > 1 else 1,
    )
    return output.logits[:, -1], output.past_key_values


class Unfit(Exception):
    """Why the model cannot decode in static shapes."""


def static_decoder(model: nn.Module, slots: int, rows: int, length: int, new_tokens: int) -> StaticDecoder | None:
    """A decoder for batches of up to ``rows`` rows of each slot, and up to ``length`` tokens with the ``new_tokens``.

    None where it would not pay off, was not tried (torchao's and quanto's weights, several devices), or where the
    model's cache has other layers than attention.
    """
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1 or not graphs.allowed(*devices) or new_tokens < MIN_NEW_TOKENS or not may_suit(model):
        return None
    try:
        layers = StaticCache(config=base_of(model).config, max_cache_len=length).layers
    except Exception as error:  # whatever a configuration lacks
        log.info("decoding without graphs: no static cache: %s", first_line(error))
        return None
    if any(type(layer) not in (StaticLayer, StaticSlidingWindowLayer) for layer in layers):
        return None
    return StaticDecoder(model, slots, rows, length, len(layers))


def may_suit(model: nn.Module) -> bool:
    """Whether neither the model's weights nor its method rule out that it decodes in static shapes."""
    method: Any = model.active_peft_config if isinstance(model, PeftModel) else None
    if method is not None and method.is_prompt_learning:
        return False
    return not any(map(is_wrapper, model.parameters()))


class StaticDecoder:
    """The likeliest next tokens of each row; all tensors keep their shapes and addresses from batch to batch.

    A batch with fewer rows is filled up with copies of the last row of each slot.
    """

    def __init__(self, model: nn.Module, slots: int, rows: int, length: int, layers: int) -> None:
        self._model, self._slots, self._rows = model, slots, rows
        self._used = rows  # rows of each slot in this batch
        self._device = next(model.parameters()).device
        self.captures = self._device.type == "cuda"
        # A layer with a window keeps all tokens too, as the mask hides those before the window.
        self._layers = [StaticLayer(max_cache_len=length) for _ in range(layers)]
        self._cache = Cache(layers=[*self._layers])
        self._mask = torch.ones(slots * rows, length, dtype=torch.int64, device=self._device)
        self._ids = torch.zeros(slots * rows, 1, dtype=torch.int64, device=self._device)
        self._positions = torch.zeros_like(self._ids)
        self._passes = 0  # eager steps of all batches
        self._checked = False
        self._graph: torch.cuda.CUDAGraph | None = None

    def first(self, ids: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
        """The tokens after prompts ``ids``, padded on the left, [slots * rows, length]; shape [slots * rows].

        Raises:
            Unfit: the logits are not those of the usual cache, memory lacks, or the model raises an error.
        """
        self._used = len(ids) // self._slots
        if self._used < self._rows:
            filled = torch.arange(self._rows, device=ids.device).clamp(max=self._used - 1)
            ids, attention = (
                part.view(self._slots, self._used, -1)[:, filled].flatten(0, 1) for part in (ids, attention)
            )
        with unfit_for_errors(), graphs.on_stream(self._device):
            self._read_prompts(ids, attention)
        return self._tokens()

    def keep(self, places: list[int]) -> bool:
        """All rows stay, as shapes are static."""
        return False

    def _tokens(self) -> torch.Tensor:
        return self._ids.view(self._slots, self._rows)[:, : self._used].flatten()

    def _read_prompts(self, ids: torch.Tensor, attention: torch.Tensor) -> None:
        self._cache.reset()
        self._mask.fill_(1)
        self._mask[:, : ids.shape[1]] = attention
        positions = (attention.cumsum(-1) - 1).clamp(min=0)
        logits, _ = next_logits(self._model, ids, self._mask, positions, self._cache)
        self._ids.copy_(logits.argmax(-1, keepdim=True))
        self._positions.copy_(positions[:, -1:] + 1)
        if not self._checked:
            self._check(ids, attention, positions, logits)

    def following(self) -> torch.Tensor:
        """The tokens after those that were found last; shape [slots * rows].

        Raises:
            Unfit: the step cannot be captured, memory lacks, or the model raises an error.
        """
        if self._graph is None:
            self._passes += 1
            with unfit_for_errors():
                with graphs.on_stream(self._device):
                    self._step()
                if self._passes == graphs.WARMUP_PASSES and self.captures:
                    self._capture()
        else:
            self._graph.replay()
        return self._tokens()

    def _step(self) -> torch.Tensor:
        """Read the last tokens, and put those that follow in their place; the logits, [rows, vocabulary]."""
        logits, _ = next_logits(self._model, self._ids, self._mask, self._positions, self._cache)
        self._ids.copy_(logits.argmax(-1, keepdim=True))
        self._positions.add_(1)
        return logits

    def _check(self, ids: torch.Tensor, attention: torch.Tensor, positions: torch.Tensor, logits: torch.Tensor) -> None:
        """Compare the first logits, and those of a step, with those of the usual cache; the state is as before."""
        expected, cache = next_logits(self._model, ids, attention, positions, None)
        longer = torch.cat([attention, attention.new_ones(len(attention), 1)], dim=1)
        expected_next, _ = next_logits(self._model, self._ids, longer, self._positions, cache)
        before = self._copied_state()
        found = self._step()
        self._restore(before)
        if not (self._same(logits, expected) and self._same(found, expected_next)):
            raise Unfit("a static cache gives other logits")
        self._checked = True

    def _state(self) -> list[torch.Tensor]:
        """The tensors that a step changes, beside the entries of the cache that it fills."""
        return [self._ids, self._positions, *(layer.cumulative_length for layer in self._layers)]

    def _copied_state(self) -> list[torch.Tensor]:
        return [tensor.clone() for tensor in self._state()]

    def _restore(self, before: list[torch.Tensor]) -> None:
        for tensor, value in zip(self._state(), before, strict=True):
            tensor.copy_(value)

    def _same(self, logits: torch.Tensor, expected: torch.Tensor) -> bool:
        return same_logits(base_of(self._model), logits, expected)

    def _capture(self) -> None:
        """Capture a step; the state is as before."""
        before = self._copied_state()
        with graphs.on_stream(self._device):
            with graphs.error_if_host_waits(self._device):
                expected = self._step()
            between = self._copied_state()
            expected_next = self._step()
        self._restore(before)
        graph, logits = graphs.record(self._step, self._device, torch.cuda.graph_pool_handle())
        for state, right in ((before, expected), (between, expected_next)):
            self._restore(state)
            graph.replay()
            if not self._same(logits, right):
                raise Unfit("a replay gave other logits")
        self._restore(before)
        self._graph = graph


@contextmanager
def unfit_for_errors() -> Iterator[None]:
    """Any error in the block is raised as ``Unfit``: what decodes with the usual cache goes on, or raises it again."""
    try:
        yield
    except Unfit:
        raise
    except Exception as error:
        reason = "memory ran out" if out_of_memory(error) else f"{type(error).__name__}: {first_line(error)}"
        raise Unfit(reason) from error
