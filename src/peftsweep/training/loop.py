"""The training loop, with one fenced step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.profiler import record_function

from peftsweep.data.batches import Batch, batch_order, collate, micro_batches
from peftsweep.data.tokens import Tokens
from peftsweep.errors import InputError
from peftsweep.models.losses import answer_losses, auxiliary_loss, losses_and_hits
from peftsweep.models.parts import trainable_parameters
from peftsweep.observe.measure import Laps, Meter
from peftsweep.schema import TrainConfig
from peftsweep.study.scores import LOWER_IS_BETTER
from peftsweep.training.checkpoint import Checkpoints, Interruption, OptimizerState, Part, Randomness, Weights
from peftsweep.training.compiled import compiled
from peftsweep.training.finite import check_finite, check_trained
from peftsweep.training.length import checkpoint_due, in_epochs, interval, rows_per_step, steps_per_epoch, total_steps
from peftsweep.training.optimizer import (
    autocast,
    check_stepped,
    enable_checkpointing,
    make_optimizer,
    make_scaler,
    make_scheduler,
)

# Of a row of steps.jsonl, what is shared by trials that take their steps together.
OF_A_PACK = (
    *("seconds", "tokens_per_second", "memory_allocated"),
    *("epoch_seconds", "epoch_tokens_per_second", "epoch_memory_peak"),
)
WARMUP_LAPS = 3  # first steps allocate and tune; they are trained on, but left out of the percentiles


@dataclass(frozen=True)
class Trained:
    """What a training run did. Losses are means over answer tokens, in nats."""

    steps: int
    epochs: float
    tokens: int  # without padding
    padding_fraction: float
    final_loss: float | None  # mean over the last logged window
    best_loss: float | None  # lowest validation loss, where validation was asked for
    best_step: int | None  # of the best validation by config.best_metric
    step_seconds: list[float]
    compilation: dict[str, Any] = field(default_factory=dict)  # facts of torch.compile
    lanes: list[int] = field(default_factory=list)  # how many trials took each step together

    @property
    def steady_seconds(self) -> list[float]:
        """Step times without the first few, unless there are no others."""
        return self.step_seconds[WARMUP_LAPS:] or self.step_seconds

    @property
    def packed(self) -> bool:
        """Whether steps were taken together with other trials, whose time they then are too."""
        return max(self.lanes, default=1) > 1

    @property
    def share_seconds(self) -> float:
        """Of all step times, each divided by the trials that took part."""
        return sum(seconds / lanes for seconds, lanes in zip(self.step_seconds, self.lanes, strict=True))


Row = dict[str, Any]


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
    order: Iterable[list[int]] | None = None,
) -> Trained:
    """Train the parameters of ``model`` that require gradients; ``log`` gets a row a logged step and a row an epoch.

    A step takes ``batch_size * accumulation`` rows, the same ones however they are parted into micro-batches, and its
    loss is the mean over all their answer tokens, so that accumulation changes memory and not results (to rounding,
    and but for what dropout draws). ``validate`` is called every
    ``config.eval_every``, must return at least ``loss`` and ``config.best_metric``, and is a stage of its
    own. With ``after_step``, a profiler's, the parts of a step carry names in its trace. ``checkpoints`` gets one
    every ``config.checkpoint_every`` and the trained weights at the end, and training goes on from what it has found;
    if that are the trained weights, nothing is trained. With ``stop_at``, a rung's
    step, it ends there with a checkpoint, on the schedule of its full length. ``order`` gives the row numbers of each
    step in place of those that the seed gives.

    Raises:
        FloatingPointError: the loss is no longer finite, or at the end the weights or the loss that they give.
    """
    run = _Run(model, rows, config, meter, log, validate, record_function if after_step else nullcontext)
    if checkpoints and checkpoints.trained is not None:
        checkpoints.restore({"weights": Weights(model)})
        model.eval()
        return Trained(**checkpoints.trained)
    numbers = None if order is None else list(order)
    numbered = partial(batches, rows, config, pad_id=pad_id, seed=seed, device=meter.device, order=numbers)
    due = checkpoint_due(config, len(rows))
    parts = run.parts() if checkpoints else {}
    enable_checkpointing(model, config.checkpointing)
    model.train()
    with (
        compiled(model, config, lambda: itertools.chain.from_iterable(numbered()), run.losses, meter) as compilation,
        Interruption(wanted=checkpoints is not None) as interruption,
    ):
        torch.manual_seed(seed)  # dropout does not depend on how many numbers the adapter's creation drew
        if checkpoints:
            checkpoints.restore(parts)
        stream = numbered(first=run.progress.step)
        last = run.steps if stop_at is None else min(stop_at, run.steps)
        for step in range(run.progress.step + 1, last + 1):
            run.laps.start()
            run.step(compilation.model, step, next(stream))
            run.laps.stop(compilation.end_step())
            if after_step:
                after_step()
            run.report(step)
            if checkpoints and step < run.steps and (due(step) or interruption.pending or step == last):
                with meter.stage("checkpoint"):
                    checkpoints.save(step, parts)
            if step < run.steps:  # else when the trained weights are on the disk
                interruption.deliver()
        result = run.end(compilation.facts())
        if checkpoints and run.taken and run.progress.step == run.steps:
            with meter.stage("save"):
                checkpoints.save(run.steps, {"weights": parts["weights"]}, vars(result))
    return result


class _Run:
    """A training under way: the step, and what is logged and validated after it."""

    def __init__(
        self,
        model: nn.Module,
        rows: Sequence[Tokens],
        config: TrainConfig,
        meter: Meter,
        log: Callable[[Row], None],
        validate: Callable[[], dict[str, float]] | None,
        span: Callable[[str], AbstractContextManager[Any]],
    ) -> None:
        self.model, self.config, self.meter, self._log = model, config, meter, log
        self._rows, self._validate, self._span = len(rows), validate, span
        self.steps = total_steps(config, len(rows))
        self._every = interval(config, "eval_every", len(rows)) if validate else None
        self._optimizer = make_optimizer(model, config)
        trained = dict(trainable_parameters(model))
        self._parameters = list(trained.values())
        self._scheduler = make_scheduler(self._optimizer, config, self.steps)
        self._narrowed = autocast(config, meter.device)
        self._scaler = make_scaler(config, meter.device)
        self.laps = Laps(meter.device)
        self._epoch = Epoch(steps_per_epoch(config, len(rows)), self.laps, meter)
        self._best = Best(trained) if config.keep_best else None
        self.progress = Progress(self.laps)
        self._final_loss: float | None = None
        self.taken: list[Batch] = []  # the micro-batches of the last step
        self._allocate = getattr(getattr(model, "base_model", None), "update_and_allocate", None)
        self._regularised: bool | None = None  # known after the first forward
        self._loss = torch.zeros(())  # of the last step, on the device

    def parts(self) -> dict[str, Part]:
        """What a checkpoint keeps."""
        parts: dict[str, Part] = {"weights": Weights(self.model), "optimizer": OptimizerState(self._optimizer)}
        parts |= {"scheduler": self._scheduler, "scaler": self._scaler, "random": Randomness(self.meter.device)}
        parts |= {"progress": self.progress, "epoch": self._epoch}
        return parts | ({"best": self._best} if self._best else {})

    def losses(self, called: nn.Module, batch: Batch) -> torch.Tensor:
        """The loss of each answer token, in the number format of the training."""
        with self._narrowed:
            return answer_losses(called, batch)

    def step(self, called: nn.Module, step: int, taken: list[Batch]) -> None:
        """Forward, backward and optimizer; ``called`` is the model, compiled or not."""
        self.taken = taken
        answer_tokens = sum(batch.answer_tokens for batch in taken)
        loss = torch.zeros((), device=self.meter.device)
        for batch in taken:
            with self._span("forward"), self._narrowed:
                losses, hits = losses_and_hits(called, batch)
                part = losses.sum() / answer_tokens
                regulariser = auxiliary_loss(self.model, batch) if self._regularised is not False else None
                self._regularised = regulariser is not None
            if hits is not None:
                self._epoch.hits += hits
            del losses
            with self._span("backward"):
                share = batch.answer_tokens / answer_tokens
                self._scaler.scale(part if regulariser is None else part + regulariser * share).backward()
            loss += part.detach()
            del part, regulariser  # bitsandbytes' 8-bit layers keep activations as long as the graph is held
        with self._span("optimizer"):
            if self.config.clip:
                self._scaler.unscale_(self._optimizer)
                nn.utils.clip_grad_norm_(self._parameters, self.config.clip)
            self._scaler.step(self._optimizer)
            self._scaler.update()
            self._scheduler.step()
            if self._allocate:
                self._allocate(step)  # AdaLoRA, AdaMSS: ranks are dealt out anew from this step's gradients
            self._optimizer.zero_grad(set_to_none=True)
        self._loss = loss

    def report(self, step: int) -> None:
        """Count the step; log it, its epoch and its validation, where they are due."""
        self.meter.sample()
        self.progress.add(self._loss, self.taken)
        self._epoch.add(self._loss, self.taken)
        numbers = {"step": step, "steps": self.steps}
        if step % self.config.log_every == 0 or step == self.steps:
            self._log(self.progress.own(numbers | self._figures(step)))
        if self._epoch.over(step):
            self._log(numbers | self.progress.own(self._epoch.close()))
        if self._validate and self._every and (step % self._every == 0 or step == self.steps):
            with self.meter.stage("validate"), torch.compiler.set_stance("force_eager"):
                scores = self._validate()
            self.model.train()
            self.progress.validations.append((badness(scores, self.config.best_metric), scores["loss"], step))
            self._log(numbers | {f"validation_{name}": value for name, value in scores.items()})
            if self._best and min(self.progress.validations)[-1] == step:
                self._best.keep()

    def _figures(self, step: int) -> Row:
        self._final_loss = self.progress.mean_loss()  # the only place where the host waits for the device
        check_finite(self._final_loss, f"at step {step}", self.model, self.config)
        seconds, device = sum(self.laps.seconds()), self.meter.device
        return {
            "epoch": in_epochs(step, self.config, self._rows),
            "loss": self._final_loss,
            "learning_rate": self._scheduler.get_last_lr()[0],
            "tokens": self.progress.tokens,
            "seconds": seconds,
            "tokens_per_second": self.progress.tokens / seconds,
            "memory_allocated": torch.cuda.memory_allocated(device) if device.type == "cuda" else None,
        }

    def end(self, compilation: dict[str, Any]) -> Trained:
        """Check the weights and say what the training did; the best weights are the model's then, where asked for."""
        if self._best and self.progress.validations and self.progress.step == self.steps:
            self._best.restore()
        if self.taken:
            with torch.compiler.set_stance("force_eager"):
                check_trained(self.model, self._parameters, self.taken[-1], self.config, self.progress.step)
            check_stepped(self._scaler, self.progress.step)
        self.model.eval()
        return self.progress.trained(self.config, self._rows, self._final_loss, compilation)


def batches(
    rows: Sequence[Tokens],
    config: TrainConfig,
    *,
    pad_id: int,
    seed: int,
    device: torch.device,
    first: int = 0,
    order: Iterable[list[int]] | None = None,
) -> Iterator[list[Batch]]:
    """The micro-batches of each step that a run with ``seed`` takes, without end, after the first ``first`` steps."""
    order = order or batch_order([len(row.ids) for row in rows], rows_per_step(config), seed)
    for step in itertools.islice(micro_batches(order, config.batch_size), first, None):
        yield [collate([rows[n] for n in numbers], pad_id, config.pad_to_multiple_of).to(device) for numbers in step]


@dataclass
class Progress:
    """How far the loop has come."""

    laps: Laps
    step: int = 0
    tokens: int = 0  # without padding
    positions: int = 0  # with it
    losses: list[torch.Tensor] = field(default_factory=list)  # since the last logged step
    validations: list[tuple[float, float, int]] = field(default_factory=list)  # how bad, its loss, its step
    lanes: list[int] = field(default_factory=list)  # how many trials took each step together

    def add(self, loss: torch.Tensor, batches: Sequence[Batch], lanes: int = 1) -> None:
        self.step += 1
        self.lanes.append(lanes)
        self.losses.append(loss)
        self.tokens += sum(batch.tokens for batch in batches)
        self.positions += sum(batch.input_ids.numel() for batch in batches)

    def mean_loss(self) -> float:
        """Of the steps since it was last asked for."""
        mean = torch.stack(self.losses).mean().item()
        self.losses.clear()
        return mean

    def own(self, row: Row) -> Row:
        """A row of steps.jsonl without what is a pack's, if steps were taken in one."""
        return {key: value for key, value in row.items() if max(self.lanes) == 1 or key not in OF_A_PACK}

    def trained(
        self, config: TrainConfig, rows: int, final_loss: float | None, compilation: dict[str, Any] | None = None
    ) -> Trained:
        """What the run over ``rows`` rows has done, now that it has ended."""
        return Trained(
            steps=self.step,
            epochs=in_epochs(self.step, config, rows),
            tokens=self.tokens,
            padding_fraction=1 - self.tokens / self.positions if self.positions else 0.0,
            final_loss=final_loss,
            best_loss=min((loss for _, loss, _ in self.validations if not math.isnan(loss)), default=None),
            best_step=min(self.validations, default=[None])[-1],
            step_seconds=self.laps.seconds(),
            compilation=compilation or {},
            lanes=self.lanes,
        )

    def state_dict(self) -> dict[str, Any]:
        return vars(self) | {"laps": self.laps.seconds()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.laps.resume(state["laps"])
        vars(self).update(state | {"laps": self.laps})


class Epoch:
    """Sums up the steps of an epoch; only its end makes the host wait for the device."""

    def __init__(self, steps: int, laps: Laps, meter: Meter) -> None:
        self._steps, self._laps, self._meter = steps, laps, meter
        self._number = 1
        self._seconds = 0.0  # until the last epoch's end
        self._reset()

    def _reset(self) -> None:
        self.hits = torch.zeros((), dtype=torch.int64, device=self._meter.device)
        self._loss = torch.zeros((), device=self._meter.device)
        self._count = self._tokens = self._rows = 0

    def add(self, loss: torch.Tensor, batches: Sequence[Batch]) -> None:
        self._loss += loss
        self._count += 1
        self._tokens += sum(batch.tokens for batch in batches)
        self._rows += sum(len(batch.labels) for batch in batches if batch.labels is not None)

    def over(self, step: int) -> bool:
        return step >= self._number * self._steps

    def close(self) -> Row:
        """The finished epoch's row of steps.jsonl; memory in bytes, on the device where there is one."""
        total = sum(self._laps.seconds())
        seconds, self._seconds = total - self._seconds, total
        row = {
            "epoch": self._number,
            "epoch_loss": self._loss.item() / self._count,
            "epoch_accuracy": self.hits.item() / self._rows if self._rows else None,  # a classifier's
            "epoch_seconds": seconds,
            "epoch_tokens_per_second": self._tokens / seconds,
            "epoch_memory_peak": self._meter.split(),
        }
        self._number += 1
        self._reset()
        return row

    def state_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_steps", "_laps", "_meter")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def badness(scores: dict[str, float], metric: str) -> float:
    """The value of ``metric``, turned so that less is better; what is no number is worst."""
    if metric not in scores:
        raise InputError(f"train.best_metric={metric}: the validation has {', '.join(scores)}")
    value = scores[metric] if metric.rpartition(".")[2] in LOWER_IS_BETTER else -scores[metric]
    return math.inf if math.isnan(value) else value


class Best:
    """The trainable weights of the best validation so far, kept on the host."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        self._parameters = parameters
        self._weights: dict[str, torch.Tensor] = {}

    def keep(self) -> None:
        self._weights = {name: p.detach().to("cpu", copy=True) for name, p in self._parameters.items()}

    @torch.no_grad()
    def restore(self) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(self._weights[name])

    def state_dict(self) -> dict[str, Any]:
        return self._weights

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._weights = state
