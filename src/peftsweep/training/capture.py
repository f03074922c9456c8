"""Forward and backward of a step in a few static shapes, which CUDA captures as graphs and replays.

At the batch sizes of a sweep the host limits the speed of a step on a GPU, because it launches thousands of small
kernels. A CUDA graph launches all of them at once, but its shapes and addresses are fixed. Batches are therefore padded
to a few lengths (``ladder``). Each length has buffers for its tokens, for the positions of its answer tokens and for
the weights of their losses; positions that a batch does not use have a weight of zero. Gradients are zeroed and not
freed, so that graphs add to them; gradient accumulation is one replay for each micro-batch. Clipping, optimizer and
schedule stay outside of the graphs.

The eager passes before a capture (graphs.py) are steps of the training. A graph is kept only if a replay gives the same
loss as an eager pass, and gradients of the same norms. A model that cannot be captured is trained eagerly, and the
record holds the reason. docs/measured.md has the times of steps with and without graphs.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules.dropout import _DropoutNd

from peftsweep.data.batches import Batch, micro_batches
from peftsweep.data.tokens import Tokens
from peftsweep.models.parts import ROUTER_LOSS, base_of, classifies, text_config
from peftsweep.models.quantised.layers import is_wrapper
from peftsweep.observe.measure import out_of_memory, synchronise
from peftsweep.schema import Capture, Dtype, TrainConfig
from peftsweep.training import graphs
from peftsweep.training.length import steps_of

log = logging.getLogger(__name__)
Result = TypeVar("Result")

MAX_EXTRA_PADDING = 0.06  # padding that the ladder may add, as a share of the run's tokens
MAX_GRADIENT_BYTES = 2**31  # larger gradients would take too much memory, as static steps keep them
MIN_BATCHES_TO_CAPTURE = 8  # remaining batches of a length, while the cost and the gain of a capture are unknown
NORM_TOLERANCE = 0.02  # relative difference of a gradient's norm: a few roundings of bfloat16 in another order


# ---- what a run needs ------------------------------------------------------------------------------


class Size(NamedTuple):
    """The size of a micro-batch of ``batch_size`` rows."""

    length: int  # of its longest row, in tokens
    tokens: int  # of all rows, without padding
    answers: int  # answer tokens of all rows


def sizes(order: Iterable[list[int]], rows: Sequence[Tokens], config: TrainConfig) -> list[Size]:
    """The sizes of the micro-batches of the steps in ``order``; micro-batches with fewer rows are left out."""
    result = []
    for step in micro_batches(order, config.batch_size):
        for batch in ([rows[n] for n in numbers] for numbers in step if len(numbers) == config.batch_size):
            lengths = [len(row.ids) for row in batch]
            result.append(Size(max(lengths), sum(lengths), sum(row.answer_tokens for row in batch)))
    return result


def sizes_of_run(
    rows: Sequence[Tokens],
    config: TrainConfig,
    seed: int,
    device: torch.device,
    order: Sequence[list[int]] | None = None,
) -> list[Size] | None:
    """The sizes of a run's micro-batches; None where its steps do not run in static shapes.

    ``order`` holds the row numbers of each step; without it they follow from ``seed``.
    """
    if not captures(config, device):
        return None
    return sizes(order or steps_of(rows, config, seed), rows, config)


def ladder(sizes: Sequence[Size], rows: int) -> list[int]:
    """The few lengths, in tokens and ascending, to which batches of ``rows`` rows are padded.

    The longest batch gives the first length. Lengths that save most padding follow, until ``MAX_EXTRA_PADDING`` holds.
    """
    counts = Counter(size.length for size in sizes)
    lengths, up_to, total = sorted(counts), {0: 0}, 0
    for length in lengths:
        total += counts[length]
        up_to[length] = total  # batches that are no longer than this
    rungs = lengths[-1:]
    extra = sum((lengths[-1] - length) * count for length, count in counts.items())

    def saved(length: int) -> int:
        index = bisect_left(rungs, length)
        return (rungs[index] - length) * (up_to[length] - up_to[rungs[index - 1] if index else 0])

    while extra * rows > MAX_EXTRA_PADDING * sum(size.tokens for size in sizes):
        best = max(lengths, key=saved)
        extra -= saved(best)
        insort(rungs, best)
    return rungs


def captures(config: TrainConfig, device: torch.device) -> bool:
    """Whether steps on ``device`` run in static shapes, unless the model rules that out."""
    return config.capture is Capture.auto and device.type in graphs.DEVICES and config.compile == "none"


def unfit(model: Any, config: TrainConfig) -> str | None:
    """Why the step of ``model`` cannot run in static shapes; None where only a capture can tell."""
    reasons = {
        "it is a classifier": classifies(model),
        "the loss is scaled, for float16": config.autocast is Dtype.float16,
        "its method deals out ranks anew in the steps": hasattr(
            getattr(model, "base_model", None), "update_and_allocate"
        ),
        "its gradients, which would be kept, are large": _gradient_bytes(model) > MAX_GRADIENT_BYTES,
        "it was not tried on torchao's or quanto's weights": any(map(is_wrapper, model.parameters())),
        "its layers are on several devices": len({p.device for p in model.parameters()}) > 1,
        "its routers add to the loss": hasattr(base_of(model), ROUTER_LOSS),
        "it leaves out layers at random": bool(getattr(text_config(base_of(model)), "layerdrop", 0)),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _gradient_bytes(model: nn.Module) -> int:
    """The bytes of the gradients of the model's trained weights."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def drops(model: nn.Module) -> bool:
    """Whether a pass of the model in training draws random numbers for dropout."""
    attention_dropout = getattr(text_config(base_of(model)), "attention_dropout", 0)
    return bool(attention_dropout) or any(isinstance(m, _DropoutNd) and m.p > 0 for m in model.modules())


# ---- the step --------------------------------------------------------------------------------------


@dataclass
class _StaticBatch:
    """The buffers for batches of one length, and the graph of that length once it is captured."""

    batch: Batch  # with as many answer positions as any batch of this length has, [positions]
    weights: torch.Tensor  # of the loss at each answer position, [positions]
    passes: int = 0
    graph: torch.cuda.CUDAGraph | None = None
    losses: torch.Tensor | None = None  # of the last replay, [slots]

    def fill(self, batch: Batch, answer_tokens: int) -> None:
        """Copy ``batch`` into the buffers; ``answer_tokens``, those of the whole step, give the weights of the mean."""
        count = batch.answer_tokens
        self.batch.input_ids.copy_(batch.input_ids)
        self.batch.attention_mask.copy_(batch.attention_mask)
        self.batch.places[:count].copy_(batch.places)
        self.batch.places[count:].zero_()
        self.weights[:count].fill_(1 / answer_tokens)
        self.weights[count:].zero_()
        self.passes += 1


class StaticSteps:
    """Runs forward and backward of the micro-batches of a run in static shapes.

    ``losses`` returns the loss of each answer token of a batch, [answer tokens]. ``sizes`` are the sizes of the
    micro-batches that have all their rows. With a ``reason`` nothing runs in static shapes, and the record holds it.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        losses: Callable[[Batch], torch.Tensor],
        sizes: Sequence[Size],
        device: torch.device,
        reason: str | None = None,
    ) -> None:
        self.off = reason or ("no micro-batch has all its rows" if not sizes else unfit(model, config))
        self.off = self.off or ("a capture has failed in this process" if graphs.has_failed() else None)
        self.rungs = ladder(sizes, config.batch_size) if not self.off else []
        self._rows, self._losses, self._device = config.batch_size, losses, device
        self._static_batches: dict[int, _StaticBatch] = {}  # by length
        self._max_answers, self._remaining = dict[int, int](), Counter[int]()  # by length: answer tokens, batches
        for size in sizes if self.rungs else ():
            length = self.rungs[bisect_left(self.rungs, size.length)]
            self._max_answers[length] = max(size.answers, self._max_answers.get(length, 0))
            self._remaining[length] += 1
        self._gradients: list[torch.Tensor] = []  # empty until ``begin``
        self._slots = 1
        self._random = drops(model)
        self._pool: Any = None  # of the graphs; None on a CPU
        self._pool_bytes = self._longest = 0  # of the captured lengths
        self._capture_cost = 0.0  # seconds of the last capture
        self._replay_gain = 0.0  # seconds by which a replay of the last graph is shorter than an eager pass
        self._graphs, self._seconds, self._reported_seconds = 0, 0.0, 0.0
        if self.off:
            self.give_up(self.off)

    @property
    def begun(self) -> bool:
        """Whether micro-batches run in static shapes now."""
        return bool(self._gradients)

    def begin(self, gradients: Sequence[torch.Tensor | None], *, slots: int = 1, regularised: bool = False) -> None:
        """Run micro-batches in static shapes from here on; their passes add to ``gradients``.

        Graphs that add to other gradients are dropped. ``losses`` then returns [slots * answer tokens], slot after
        slot. ``regularised``: the method adds a term to the loss, which rules out static shapes.
        """
        if self.off:
            return
        self._static_batches.clear()
        # The pool of dropped graphs cannot be used again.
        self._pool = torch.cuda.graph_pool_handle() if self._device.type == "cuda" else None
        self._pool_bytes = self._longest = 0
        if regularised:
            self.give_up("its method adds to the loss")
        elif any(gradient is None for gradient in gradients):
            self.give_up("some of its weights had no gradient in the first step")
        else:
            self._gradients, self._slots = [gradient for gradient in gradients if gradient is not None], slots

    def give_up(self, reason: str) -> None:
        """Go on without static shapes; the record holds the ``reason``."""
        self.off = reason
        self._static_batches.clear()
        self._gradients = []
        if self._pool is not None:
            torch.cuda.empty_cache()  # frees the memory of the graphs
        log.info("train.capture is off: %s", reason)

    def padded(self, batch: Batch) -> Batch:
        """``batch``, still on the host, padded to the next length of the ladder, if it has all its rows."""
        rows, length = batch.input_ids.shape
        rung = bisect_left(self.rungs, length)
        if self.off or rows != self._rows or rung == len(self.rungs):
            return batch
        padding = (0, self.rungs[rung] - length)
        answer_mask = functional.pad(batch.answer_mask, padding)
        return replace(
            batch,
            input_ids=functional.pad(batch.input_ids, padding),  # with any token: the attention mask hides it
            attention_mask=functional.pad(batch.attention_mask, padding),
            answer_mask=answer_mask,
            places=answer_mask.flatten().nonzero()[:, 0],
            answer_start=1,
        )

    def __call__(self, batch: Batch, answer_tokens: int, *, first: bool) -> torch.Tensor | None:
        """Run forward and backward of ``batch``; its part of the step's loss, [slots], or None if nothing was run.

        ``answer_tokens`` are those of the whole step. ``first``: the batch is the step's first, all gradients are zero.
        """
        static = self._static_batch(batch) if self.begun else None
        if static is None:
            return None
        static.fill(batch, answer_tokens)
        length = batch.input_ids.shape[1]
        remaining = self._remaining[length]
        self._remaining[length] = remaining - 1
        if static.graph is not None:
            static.graph.replay()
            return static.losses
        try:
            if (
                self._pool is None
                or static.passes <= graphs.WARMUP_PASSES
                or not first
                or not self._pays_off(remaining)
            ):
                return self._eager_pass(static)
            start = time.perf_counter()
            losses = self._capture(static)
            self._capture_cost = time.perf_counter() - start
            self._seconds += self._capture_cost
            return losses
        except RuntimeError as error:
            if not first or not out_of_memory(error):
                raise
            reason = "memory ran out, of which gradients that are kept and graphs take some"
        torch._foreach_zero_(self._gradients)
        self.give_up(reason)
        return None

    def _pays_off(self, remaining: int) -> bool:
        """Whether a capture takes less time than its replays save in the ``remaining`` batches of its length."""
        # With dropout, measured times must not decide: replays draw other random numbers than eager passes do.
        if not self._graphs or self._random:
            return remaining >= MIN_BATCHES_TO_CAPTURE
        return remaining * self._replay_gain > self._capture_cost

    def _static_batch(self, batch: Batch) -> _StaticBatch | None:
        """The buffers for ``batch``; None where it has fewer rows, or more answer tokens than were counted before."""
        rows, length = batch.input_ids.shape
        if rows != self._rows or batch.answer_tokens > self._max_answers.get(length, 0):
            return None
        if length not in self._static_batches:
            blank = replace(
                batch,
                input_ids=torch.zeros_like(batch.input_ids),
                attention_mask=torch.zeros_like(batch.attention_mask),
                places=batch.places.new_zeros(self._max_answers[length]),
                answer_tokens=self._max_answers[length],
            )
            weights = torch.zeros(self._max_answers[length], device=self._device)
            self._static_batches[length] = _StaticBatch(blank, weights)
        return self._static_batches[length]

    def _pass(self, static: _StaticBatch) -> torch.Tensor:
        """Forward and backward on the current stream; the weighted losses, [slots]."""
        weighted: torch.Tensor = self._losses(static.batch).view(self._slots, -1) * static.weights
        losses = weighted.sum(1)
        losses.sum().backward()
        return losses.detach()

    def _eager_pass(self, static: _StaticBatch) -> torch.Tensor:
        """A pass without a graph; on CUDA it runs on the stream of the graphs. The weighted losses, [slots]."""
        with graphs.on_stream(self._device):
            return self._pass(static)

    def _capture(self, static: _StaticBatch) -> torch.Tensor | None:
        """Run an eager pass, capture it and compare a replay with it; the losses, [slots].

        Losses and gradients are the replay's if the graph is kept, else the eager pass's; None if the host waits.
        """
        try:
            with graphs.error_if_host_waits(self._device):
                eager_losses, eager_seconds = self._timed(lambda: self._eager_pass(static))
        except RuntimeError as error:
            if not graphs.is_wait(error):
                raise
            torch._foreach_zero_(self._gradients)
            self.give_up("the host waits for the device in a pass")
            return None
        eager_norms = [eager_losses.norm(), *torch._foreach_norm(self._gradients)]
        try:
            graph, losses = self._record_graph(static)
        except RuntimeError as error:
            self.give_up(str(error))
            return eager_losses
        if shortage := self._memory_shortage():
            self.give_up(shortage)
            return eager_losses
        for _ in range(2):  # the first replay also uploads the graph to the device
            torch._foreach_zero_(self._gradients)
            _, replay_seconds = self._timed(graph.replay)
        if self._random or _same_norms([losses.norm(), *torch._foreach_norm(self._gradients)], eager_norms):
            static.graph, static.losses = graph, losses
            self._graphs += 1
            self._replay_gain = eager_seconds - replay_seconds
            return losses
        torch._foreach_zero_(self._gradients)
        eager_losses = self._eager_pass(static)
        self.give_up("a replay gave another loss or other gradients")
        return eager_losses

    def _timed(self, work: Callable[[], Result]) -> tuple[Result, float]:
        """The result of ``work``, and its seconds."""
        synchronise(self._device)
        start = time.perf_counter()
        result = work()
        synchronise(self._device)
        return result, time.perf_counter() - start

    def _record_graph(self, static: _StaticBatch) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        """The graph of a pass, and its losses, [slots]."""
        torch.cuda.empty_cache()
        reserved = torch.cuda.memory_reserved(self._device)
        graph, losses = graphs.record(lambda: self._pass(static), self._device, self._pool)
        self._pool_bytes += torch.cuda.memory_reserved(self._device) - reserved
        self._longest = max(self._longest, static.batch.input_ids.shape[1])
        return graph, losses

    def _memory_shortage(self) -> str | None:
        """A message where an eager pass of the longest batches no longer fits beside the graphs; else None."""
        if self._device.type != "cuda":
            return None
        needed, free = self._pool_bytes * self.rungs[-1] / self._longest, torch.cuda.mem_get_info(self._device)[0]
        message = f"beside the graphs {free / 1e9:.1f} GB are free, and a pass takes {needed / 1e9:.1f} GB"
        return message if free < needed else None

    def end_step(self) -> float:
        """The seconds of capturing since the last call."""
        reported, self._reported_seconds = self._reported_seconds, self._seconds
        return self._seconds - reported

    def facts(self) -> dict[str, Any]:
        """For the record: the lengths of the ladder, the number of graphs and the seconds of captures, or why none."""
        if self.off:
            return {"capture_off": self.off}
        return {"capture_lengths": self.rungs, "capture_graphs": self._graphs, "capture_seconds": self._seconds}


def _same_norms(replayed: Sequence[torch.Tensor], eager: Sequence[torch.Tensor]) -> bool:
    """Whether the norms of a replay and of an eager pass differ by rounding alone."""
    norms, expected = (torch.stack([norm.float() for norm in some]) for some in (replayed, eager))
    return bool((norms - expected).norm() <= NORM_TOLERANCE * expected.norm())
