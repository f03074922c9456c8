"""Forward and backward of a step in a few static shapes, which CUDA captures as graphs and replays.

At the batch sizes of a sweep a step on a GPU is bound by the host, which starts thousands of small kernels. A CUDA
graph starts all of them at once, but its shapes and addresses are fixed. Batches are therefore padded to few lengths
(``ladder``), each of which has buffers for its tokens, for the places of its answers and for the weights of their
losses; places that a batch does not use have a weight of zero. Gradients are zeroed and not freed, so that graphs add
to them, and accumulation is a replay for each micro-batch. Clipping, optimizer and schedule stay outside of the graphs.

As PyTorch asks for, a length is first run as usual, on the stream that captures it (those are steps of the training);
its graph is kept only if a replay gives the loss of such a pass and gradients of the same norms. What cannot be
captured goes on uncaptured, and the reason stands in the record. A pass in which the host waits for the device, as for
routing in some mixtures of experts or for outliers in 8-bit layers, cannot; torch finds that out before it is captured.
A capture that fails all the same ends those of its process: before torch 2.12 the allocator then takes it to go on for
ever (github.com/pytorch/pytorch, pull requests 180395 and 190308), and a sweep's worker is replaced after the trial.

On an H100, with 1B parameters and one row of 305 tokens a step, a step takes 9 ms in place of 81 to 194
(docs/measured.md).
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules.dropout import _DropoutNd

from peftsweep.data.batches import Batch, micro_batches
from peftsweep.data.tokens import Tokens
from peftsweep.models.parts import base_of, classifies, text_config
from peftsweep.models.quantised.layers import is_wrapper
from peftsweep.observe.measure import out_of_memory, synchronise
from peftsweep.schema import Capture, Dtype, TrainConfig
from peftsweep.training.length import steps_of

log = logging.getLogger(__name__)

Found = TypeVar("Found")

DEVICES = ("cuda",)  # on which steps are taken in static shapes
EXTRA = 0.06  # of the tokens of a run: the most by which the ladder adds to its padding
LARGE = 2**31  # bytes of gradients
WARM = 2  # usual passes of a length, in which kernels are chosen and workspaces allocated, before it is captured
WORTH = 8  # batches of a length that must be to come, until it is known what a capture takes and what it saves
# Difference of a gradient's norm, relative to it: a few roundings of bfloat16, as sums are reordered.
SAME = 0.02


# ---- what a run needs ------------------------------------------------------------------------------


class Size(NamedTuple):
    """Of a micro-batch that holds all its rows."""

    length: int  # of its longest row, in tokens
    tokens: int  # without padding
    answers: int  # answer tokens of all rows


def sizes(order: Iterable[list[int]], rows: Sequence[Tokens], config: TrainConfig) -> list[Size]:
    """Those of the micro-batches of the steps of ``order``, without those of fewer rows than others."""
    found = []
    for step in micro_batches(order, config.batch_size):
        for batch in ([rows[n] for n in numbers] for numbers in step if len(numbers) == config.batch_size):
            lengths = [len(row.ids) for row in batch]
            found.append(Size(max(lengths), sum(lengths), sum(row.answer_tokens for row in batch)))
    return found


def sizes_of_run(
    rows: Sequence[Tokens],
    config: TrainConfig,
    seed: int,
    device: torch.device,
    order: Sequence[list[int]] | None = None,
) -> list[Size] | None:
    """The sizes of a run's micro-batches; None where its steps are not taken in static shapes."""
    if not captures(config, device):
        return None
    return sizes(order or steps_of(rows, config, seed), rows, config)


def ladder(found: Sequence[Size], rows: int) -> list[int]:
    """Few lengths to which batches of ``rows`` rows are padded, so that they add at most ``EXTRA`` of their tokens.

    The longest, and then one by one that which saves most.
    """
    counts = Counter(size.length for size in found)
    known, below, total = sorted(counts), {0: 0}, 0
    for length in known:
        total += counts[length]
        below[length] = total
    rungs = known[-1:]
    extra = sum((known[-1] - length) * count for length, count in counts.items())

    def saved(length: int) -> int:
        place = bisect_left(rungs, length)
        return (rungs[place] - length) * (below[length] - below[rungs[place - 1] if place else 0])

    while extra * rows > EXTRA * sum(size.tokens for size in found):
        best = max(known, key=saved)
        extra -= saved(best)
        insort(rungs, best)
    return rungs


def captures(config: TrainConfig, device: torch.device) -> bool:
    """Whether steps on ``device`` are taken in static shapes, if they can."""
    return config.capture is Capture.auto and device.type in DEVICES and config.compile == "none"


_FAILED: list[str] = []  # why captures of this process have failed


def has_failed() -> bool:
    """Whether a capture has failed in this process, whose memory may then not be freed any more."""
    return bool(_FAILED)


def unfit(model: Any, config: TrainConfig) -> str | None:
    """Why the step of ``model`` cannot be static; None where only trying it can tell."""
    reasons = {
        "it is a classifier": classifies(model),
        "the loss is scaled, for float16": config.autocast is Dtype.float16,
        "its method deals out ranks anew in the steps": hasattr(
            getattr(model, "base_model", None), "update_and_allocate"
        ),
        "its gradients, which would be kept, are large": _large(model),
        "it was not tried on torchao's or quanto's weights": any(map(is_wrapper, model.parameters())),
        "its layers are on several devices": len({p.device for p in model.parameters()}) > 1,
        "it leaves out layers at random": bool(getattr(text_config(base_of(model)), "layerdrop", 0)),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _large(model: nn.Module) -> bool:
    """Whether the gradients of the model's trained weights take much memory."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad) > LARGE


def drops(model: nn.Module) -> bool:
    """Whether a pass of the model draws random numbers."""
    of_attention = getattr(text_config(base_of(model)), "attention_dropout", 0)
    return bool(of_attention) or any(isinstance(m, _DropoutNd) and m.p > 0 for m in model.modules())


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all graphs of a process: for each stream that multiplies, torch keeps workspaces of 64 MiB."""
    return torch.cuda.Stream(device)


# ---- the step --------------------------------------------------------------------------------------


@dataclass
class _Static:
    """A length: the buffers of its batch, and its graph once it is captured."""

    batch: Batch  # with all places that a batch of this length may have, [places]
    weights: torch.Tensor  # of the loss at each place, [places]
    taken: int = 0
    graph: torch.cuda.CUDAGraph | None = None
    losses: torch.Tensor | None = None  # of the last replay

    def fill(self, batch: Batch, answer_tokens: int) -> None:
        """Take over ``batch``; the weighted sum of its losses is then a part of the mean of ``answer_tokens``."""
        count = batch.answer_tokens
        self.batch.input_ids.copy_(batch.input_ids)
        self.batch.attention_mask.copy_(batch.attention_mask)
        self.batch.places[:count].copy_(batch.places)
        self.batch.places[count:].zero_()
        self.weights[:count].fill_(1 / answer_tokens)
        self.weights[count:].zero_()
        self.taken += 1


class StaticSteps:
    """Takes the micro-batches of a run in static shapes; ``losses`` gives those of a batch's answer tokens.

    ``found`` are the sizes of the micro-batches that have all their rows, ``reason`` one not to take them so.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        losses: Callable[[Batch], torch.Tensor],
        found: Sequence[Size],
        device: torch.device,
        reason: str | None = None,
    ) -> None:
        self.off = reason or ("no micro-batch has all its rows" if not found else unfit(model, config))
        self.off = self.off or ("a capture has failed in this process" if has_failed() else None)
        self.rungs = ladder(found, config.batch_size) if not self.off else []
        self._rows, self._losses, self._device = config.batch_size, losses, device
        self._of_length: dict[int, _Static] = {}
        self._answers, self._left = dict[int, int](), Counter[int]()
        for size in found if self.rungs else ():
            length = self.rungs[bisect_left(self.rungs, size.length)]
            self._answers[length] = max(size.answers, self._answers.get(length, 0))
            self._left[length] += 1
        self._gradients: list[torch.Tensor] = []  # once it has begun
        self._slots = 1
        self._random = drops(model)
        self._stream: Any = None
        self._pool: Any = None
        self._pool_bytes = self._longest = 0  # of the captured lengths
        self._saved = self._cost = 0.0  # seconds of the last capture, and by which its replay is shorter than a pass
        self._graphs, self._seconds, self._told = 0, 0.0, 0.0
        if self.off:
            self.give_up(self.off)

    def _of_graphs(self) -> tuple[Any, Any]:
        """The stream on which graphs are captured, and the memory that they share."""
        if self._device.type != "cuda" or self.off:
            return None, None
        return _stream(self._device), torch.cuda.graph_pool_handle()

    @property
    def begun(self) -> bool:
        """Whether micro-batches are taken here."""
        return bool(self._gradients)

    def begin(self, gradients: Sequence[torch.Tensor | None], *, slots: int = 1, regularised: bool = False) -> None:
        """Take micro-batches from here on, whose passes add to ``gradients``; graphs of others are forgotten.

        ``losses`` gives those of ``slots``, one after the other, each with the answer tokens of the batch.
        """
        if self.off:
            return
        self._of_length.clear()
        self._stream, self._pool = self._of_graphs()  # that of graphs that are gone cannot be taken again
        self._pool_bytes = self._longest = 0
        if regularised:
            self.give_up("its method adds to the loss")
        elif any(gradient is None for gradient in gradients):
            self.give_up("some of its weights had no gradient in the first step")
        else:
            self._gradients, self._slots = [one for one in gradients if one is not None], slots

    def give_up(self, reason: str) -> None:
        """Go on without static shapes."""
        self.off = reason
        self._of_length.clear()
        self._gradients = []
        if self._stream is not None:
            torch.cuda.empty_cache()  # of the memory of graphs
        log.info("train.capture is off: %s", reason)

    def padded(self, batch: Batch) -> Batch:
        """``batch``, still on the host, padded to the next length of the ladder, if it has all its rows."""
        rows, length = batch.input_ids.shape
        place = bisect_left(self.rungs, length)
        if self.off or rows != self._rows or place == len(self.rungs):
            return batch
        fill = (0, self.rungs[place] - length)
        answers = functional.pad(batch.answer_mask, fill)
        return replace(
            batch,
            input_ids=functional.pad(batch.input_ids, fill),  # with any token: nothing sees it
            attention_mask=functional.pad(batch.attention_mask, fill),
            answer_mask=answers,
            places=answers.flatten().nonzero()[:, 0],
            answer_start=1,
        )

    def __call__(self, batch: Batch, answer_tokens: int, *, first: bool) -> torch.Tensor | None:
        """Forward and backward of ``batch``: its part of the step's loss, [slots]; None where it is taken as usual.

        ``first``: it is the first of its step, and gradients are zero.
        """
        static = self._static(batch) if self.begun else None
        if static is None:
            return None
        static.fill(batch, answer_tokens)
        length = batch.input_ids.shape[1]
        left = self._left[length]
        self._left[length] = left - 1
        if static.graph is not None:
            static.graph.replay()
            return static.losses
        try:
            if self._stream is None or static.taken <= WARM or not first or not self._worth(left):
                return self._aside(static)
            start = time.perf_counter()
            losses = self._capture(static)
            self._cost = time.perf_counter() - start
            self._seconds += self._cost
            return losses
        except RuntimeError as error:
            if not first or not out_of_memory(error):
                raise
            reason = "memory ran out, of which gradients that are kept and graphs take some"
        torch._foreach_zero_(self._gradients)
        self.give_up(reason)
        return None

    def _worth(self, left: int) -> bool:
        """Whether a capture takes less time than it saves in so many batches of its length.

        Where numbers are drawn at random, time decides nothing: a replay draws others than a usual pass.
        """
        return left >= WORTH if not self._graphs or self._random else left * self._saved > self._cost

    def _static(self, batch: Batch) -> _Static | None:
        """The buffers that ``batch`` fits into."""
        rows, length = batch.input_ids.shape
        if rows != self._rows or batch.answer_tokens > self._answers.get(length, 0):
            return None
        if length not in self._of_length:
            blank = replace(
                batch,
                input_ids=torch.zeros_like(batch.input_ids),
                attention_mask=torch.zeros_like(batch.attention_mask),
                places=batch.places.new_zeros(self._answers[length]),
                answer_tokens=self._answers[length],
            )
            weights = torch.zeros(self._answers[length], device=self._device)
            self._of_length[length] = _Static(blank, weights)
        return self._of_length[length]

    def _pass(self, static: _Static) -> torch.Tensor:
        weighted: torch.Tensor = self._losses(static.batch).view(self._slots, -1) * static.weights
        losses = weighted.sum(1)
        losses.sum().backward()
        return losses.detach()

    def _aside(self, static: _Static) -> torch.Tensor:
        """A usual pass, on CUDA on the stream of the graphs."""
        if self._stream is None:
            return self._pass(static)
        here = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            losses = self._pass(static)
        here.wait_stream(self._stream)
        return losses

    def _capture(self, static: _Static) -> torch.Tensor | None:
        """A usual pass, and then its capture; which of both counts, its losses are returned and its gradients left.

        None where the pass was refused, as the host waits in it.
        """
        try:
            with _without_waiting(self._device):
                usual, of_pass = self._timed(lambda: self._aside(static))
        except RuntimeError as error:
            if "synchronizing" not in str(error):
                raise
            torch._foreach_zero_(self._gradients)
            self.give_up("the host waits for the device in a pass")
            return None
        expected = [usual.norm(), *torch._foreach_norm(self._gradients)]
        try:
            graph, losses = self._recorded(static)
        except Exception as error:  # whatever an operation raises that a graph cannot hold, or for which memory lacks
            _FAILED.append((str(error).splitlines() or [""])[0] or type(error).__name__)
            self.give_up(_FAILED[-1])
            return usual
        if lack := self._lack():
            self.give_up(lack)
            return usual
        for _ in range(2):  # the first replay brings the graph to the device
            torch._foreach_zero_(self._gradients)
            _, of_replay = self._timed(graph.replay)
        if self._random or _same([losses.norm(), *torch._foreach_norm(self._gradients)], expected):
            static.graph, static.losses = graph, losses
            self._graphs += 1
            self._saved = of_pass - of_replay
            return losses
        torch._foreach_zero_(self._gradients)
        usual = self._aside(static)
        self.give_up("a replay gave another loss or other gradients")
        return usual

    def _timed(self, work: Callable[[], Found]) -> tuple[Found, float]:
        """What ``work`` gives, and its seconds."""
        synchronise(self._device)
        start = time.perf_counter()
        found = work()
        synchronise(self._device)
        return found, time.perf_counter() - start

    def _recorded(self, static: _Static) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        """The graph of a pass, whose memory is not that of usual passes."""
        torch.cuda.empty_cache()
        reserved = torch.cuda.memory_reserved(self._device)
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                losses = self._pass(static)
        finally:
            torch.cuda.set_stream(here)  # which torch leaves undone if the capture fails
        self._pool_bytes += torch.cuda.memory_reserved(self._device) - reserved
        self._longest = max(self._longest, static.batch.input_ids.shape[1])
        return graph, losses

    def _lack(self) -> str | None:
        """What is wrong if there is no room for a usual pass of the longest batches beside the graphs."""
        if self._device.type != "cuda":
            return None
        needed, free = self._pool_bytes * self.rungs[-1] / self._longest, torch.cuda.mem_get_info(self._device)[0]
        short = free < needed
        return f"beside the graphs {free / 1e9:.1f} GB are free, and a pass takes {needed / 1e9:.1f}" if short else None

    def end_step(self) -> float:
        """The seconds of capturing since the last call."""
        told, self._told = self._told, self._seconds
        return self._seconds - told

    def facts(self) -> dict[str, Any]:
        """For the record: the lengths that batches were padded to, those that were captured, or why none was."""
        if self.off:
            return {"capture_off": self.off}
        return {"capture_lengths": self.rungs, "capture_graphs": self._graphs, "capture_seconds": self._seconds}


@contextmanager
def _without_waiting(device: torch.device) -> Iterator[None]:
    """In the block torch raises a RuntimeError where the host would wait for a CUDA device."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _same(found: Sequence[torch.Tensor], usual: Sequence[torch.Tensor]) -> bool:
    """Whether these norms differ by rounding alone."""
    norms, expected = (torch.stack([norm.float() for norm in some]) for some in (found, usual))
    return bool((norms - expected).norm() <= SAME * expected.norm())
