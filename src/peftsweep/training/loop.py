"""The training loop, with one fenced step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
from torch import nn
from torch.profiler import record_function

from peftsweep.data.batches import Batch, batch_order, collate, micro_batches
from peftsweep.data.tokens import Tokens
from peftsweep.models.losses import answer_losses, auxiliary_loss, forward_losses
from peftsweep.models.parts import trainable_parameters
from peftsweep.observe.measure import Laps, Meter
from peftsweep.schema import TrainConfig
from peftsweep.training.capture import Size, StaticSteps, sizes_of_run
from peftsweep.training.checkpoint import AllocatedRanks, Checkpoints, Interruption, OptimizerState, Randomness, Weights
from peftsweep.training.compiled import compiled
from peftsweep.training.fused import as_trained
from peftsweep.training.length import checkpoint_due, rows_per_step
from peftsweep.training.optimizer import (
    autocast,
    enable_checkpointing,
    make_optimizer,
)
from peftsweep.training.run import Prune, Row, Run, Trained


def train(
    model: nn.Module,
    rows: Sequence[Tokens],
    config: TrainConfig,
    *,
    pad_id: int,
    seed: int,
    meter: Meter,
    log: Callable[[Row], None],
    validate: Callable[[], dict[str, float]] | None = None,
    after_step: Callable[[], None] | None = None,
    checkpoints: Checkpoints | None = None,
    stop_at: int | None = None,
    prune: Prune | None = None,
    order: Sequence[list[int]] | None = None,
) -> Trained:
    """Train the parameters of ``model`` that require gradients.

    A step takes ``batch_size * accumulation`` rows, and its loss is the mean over all their answer tokens, in nats. So
    accumulation changes the memory and not the results (but for rounding and the random numbers of dropout).

    ``log`` gets a row of steps.jsonl for each logged step and each epoch. ``validate`` returns at least ``loss`` and
    ``config.best_metric``. With ``after_step``, a profiler's, the trace names the parts of a step. ``checkpoints`` gets
    one every ``config.checkpoint_every`` and the trained weights at the end; training goes on from the one found.
    At ``stop_at``, a rung's step, training ends with a checkpoint, on the schedule of all steps; so it does after a
    validation if ``prune`` is true or ``config.patience`` used up. ``order`` holds the row numbers of each step.

    Raises:
        FloatingPointError: a loss is not finite, or at the end a weight is not.
    """
    laps, optimizer, weights = Laps(meter.device), make_optimizer(model, config), dict(trainable_parameters(model))
    run = Run(config, len(rows), weights, optimizer, laps, meter, log, validate, prune, AllocatedRanks(model))
    if checkpoints and checkpoints.trained is not None:
        checkpoints.restore({"weights": Weights(model)})
        model.eval()
        return Trained(**checkpoints.trained)
    sizes = None if after_step else sizes_of_run(rows, config, seed, meter.device, order)  # graphs hide a step's parts
    take_step = _Step(model, run, record_function if after_step else nullcontext, sizes)
    run_batches = partial(batches, rows, config, pad_id=pad_id, seed=seed, device=meter.device, order=order)
    due = checkpoint_due(config, len(rows))
    parts = run.parts(Weights(model), OptimizerState(optimizer), Randomness(meter.device)) if checkpoints else {}
    enable_checkpointing(model, config.checkpointing)
    model.train()
    with (
        compiled(model, config, lambda: chain.from_iterable(run_batches()), take_step.losses, meter) as compilation,
        Interruption(wanted=checkpoints is not None) as interruption,
        as_trained(model, config, meter.device.type),
    ):
        torch.manual_seed(seed)  # dropout does not depend on how many numbers the adapter's creation drew
        if checkpoints:
            checkpoints.restore(parts)
        steps = run_batches(first=run.step, shaped=take_step.shaped)
        last = run.steps if stop_at is None else min(stop_at, run.steps)
        run.consider()
        for step in range(run.step + 1, last + 1):
            if run.stopped:
                break
            laps.start()
            micro_batches = next(steps)
            loss = take_step(compilation.model, step, micro_batches)
            laps.stop(compilation.end_step() + take_step.end_capture())
            if after_step:
                after_step()
            meter.sample()
            run.count(loss, micro_batches)
            run.report(model, partial(torch.compiler.set_stance, "force_eager"))
            if checkpoints and not run.complete and (due(step) or interruption.pending or step == last or run.stopped):
                with meter.stage("checkpoint"):
                    checkpoints.save(step, parts)
            if not run.complete:  # after the last step a signal waits until the trained weights are on the disk
                interruption.deliver()
        run.restore_best()
        with torch.compiler.set_stance("force_eager"):
            run.check(model)
        model.eval()
        result = run.trained(compilation.facts() | take_step.end())
        if checkpoints and run.stepped and run.complete:
            with meter.stage("save"):
                checkpoints.save(run.steps, {"weights": parts["weights"]}, vars(result))
    return result


class _Step:
    """The step of a training: forward, backward and optimizer.

    With the ``sizes`` of its micro-batches it runs in static shapes, from the second step on. ``span`` makes the
    context that names a part of the step in a trace.
    """

    def __init__(
        self,
        model: nn.Module,
        run: Run,
        span: Callable[[str], AbstractContextManager[Any]],
        sizes: Sequence[Size] | None = None,
    ) -> None:
        self._model, self._run, self._span = model, run, span
        self._autocast = autocast(run.config, run.meter.device)
        self._allocate = getattr(getattr(model, "base_model", None), "update_and_allocate", None)
        self._regularised: bool | None = None  # known after the first forward
        self._static: StaticSteps | None = None
        if sizes is not None:
            self._static = StaticSteps(model, run.config, partial(self.losses, model), sizes, run.meter.device)

    def shaped(self, batch: Batch) -> Batch:
        """``batch``, still on the host, padded to the shape of its step."""
        return self._static.padded(batch) if self._static else batch

    def end_capture(self) -> float:
        """The seconds of capturing in the step that has just ended."""
        return self._static.end_step() if self._static else 0.0

    def end(self) -> dict[str, Any]:
        """Free the gradients, which static steps keep; return the facts of captures for the record."""
        self._run.optimizer.zero_grad(set_to_none=True)
        return self._static.facts() if self._static else {}

    def losses(self, called: nn.Module, batch: Batch) -> torch.Tensor:
        """The loss of each answer token, [answer tokens], under the training's autocast."""
        with self._autocast:
            return answer_losses(called, batch)

    def __call__(self, called: nn.Module, step: int, micro_batches: list[Batch]) -> torch.Tensor:
        """Take step number ``step``; its loss, a scalar on the device. ``called`` is the model, compiled or not."""
        run, static = self._run, self._static
        answer_tokens = sum(batch.answer_tokens for batch in micro_batches)
        loss = torch.zeros((), device=run.meter.device)
        for number, batch in enumerate(micro_batches):
            static_losses = static(batch, answer_tokens, first=number == 0) if static else None
            loss += self._pass(called, batch, answer_tokens) if static_losses is None else static_losses[0]
        with self._span("optimizer"):
            run.update()
            if self._allocate:
                self._allocate(step)  # AdaLoRA, AdaMSS: ranks are allocated anew from this step's gradients
            if static and not static.begun:  # the first step made the gradients to which graphs will add
                gradients = [p.grad for p in run.parameters if p.requires_grad]
                static.begin(gradients, regularised=bool(self._regularised))
            run.optimizer.zero_grad(set_to_none=not (static and static.begun))
        return loss

    def _pass(self, called: nn.Module, batch: Batch, answer_tokens: int) -> torch.Tensor:
        """Forward and backward of a micro-batch; its part of the loss of a step that has ``answer_tokens``."""
        run = self._run
        with self._span("forward"), self._autocast:
            losses, hits, routers = forward_losses(called, batch)
            part = losses.sum() / answer_tokens
            regulariser = auxiliary_loss(self._model, batch) if self._regularised is not False else None
            self._regularised = regulariser is not None
            added = [term for term in (regulariser, routers) if term is not None]
        if hits is not None:
            run.epoch.hits += hits
        del losses
        with self._span("backward"):
            share = batch.answer_tokens / answer_tokens
            run.scaler.scale(part if not added else part + sum(added) * share).backward()
        return part.detach()


def batches(
    rows: Sequence[Tokens],
    config: TrainConfig,
    *,
    pad_id: int,
    seed: int,
    device: torch.device,
    first: int = 0,
    order: Iterable[list[int]] | None = None,
    shaped: Callable[[Batch], Batch] = lambda batch: batch,
) -> Iterator[list[Batch]]:
    """The micro-batches of each step of a run with ``seed``, without end, from step number ``first`` (0-based) on.

    ``shaped`` is applied to each on the host, before it goes to the device. ``order`` holds the row numbers of each
    step, instead of those that follow from ``seed``.
    """
    order = order or batch_order([len(row.ids) for row in rows], rows_per_step(config), seed)
    for step in islice(micro_batches(order, config.batch_size), first, None):
        on_host = (collate([rows[n] for n in numbers], pad_id, config.pad_to_multiple_of) for numbers in step)
        yield [shaped(batch).to(device) for batch in on_host]
