"""One training run, alone or in a pack: the optimizer's step, counts, and what is logged and validated after it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from peftsweep.data.batches import Batch
from peftsweep.errors import InputError
from peftsweep.models.losses import answer_losses
from peftsweep.observe.measure import Laps, Meter
from peftsweep.schema import Dtype, TrainConfig
from peftsweep.study.rungs import PATIENCE, PRUNED
from peftsweep.study.scores import is_minimized
from peftsweep.training.checkpoint import Part
from peftsweep.training.length import in_epochs, interval, steps_per_epoch, total_steps
from peftsweep.training.optimizer import autocast, check_stepped, make_scaler, make_scheduler

# Keys of a row of steps.jsonl that belong to the whole pack: a packed trial's own steps.jsonl leaves them out.
PACK_KEYS = (
    *("seconds", "tokens_per_second", "memory_allocated"),
    *("epoch_seconds", "epoch_tokens_per_second", "epoch_memory_peak"),
)
RANKS = "allocated ranks"  # a key beside the names of parameters
MAX_PROPOSED_RATE = 1e-3  # highest learning rate that is proposed; it is rarely too high for an adapter
WARMUP_LAPS = 3  # the first steps allocate memory and choose kernels; percentiles of step times leave them out


@dataclass(frozen=True)
class Trained:
    """The result of a training run. Losses are means over answer tokens, in nats."""

    steps: int
    epochs: float
    tokens: int  # without padding
    padding_fraction: float  # padding tokens / all tokens
    final_loss: float | None  # mean over the steps since the last but one logged step
    best_loss: float | None  # lowest validation loss; None without validation
    best_step: int | None  # step of the best validation by config.best_metric
    step_seconds: list[float]
    compilation: dict[str, Any] = field(default_factory=dict)  # facts of torch.compile and of CUDA graphs
    # For each step the number of trials that took it together (checkpoints on disk name this field "lanes").
    lanes: list[int] = field(default_factory=list)
    stopped: str | None = None  # why it ended before its last step: PATIENCE or PRUNED

    @property
    def steady_seconds(self) -> list[float]:
        """The step times without the ``WARMUP_LAPS`` first ones; all of them if there are no others."""
        return self.step_seconds[WARMUP_LAPS:] or self.step_seconds

    @property
    def packed(self) -> bool:
        """Whether a step was taken together with other trials; its time is then that of all of them."""
        return max(self.lanes, default=1) > 1

    @property
    def share_seconds(self) -> float:
        """The sum of the step times, each divided by the number of trials that took the step together."""
        return sum(seconds / slots for seconds, slots in zip(self.step_seconds, self.lanes, strict=True))


Row = dict[str, Any]  # one line of steps.jsonl
Prune = Callable[[int, dict[str, float]], bool]  # (step, scores of its validation) -> whether the run ends there


class Run:
    """A running training on ``rows`` rows.

    ``trained`` are the parameters that ``optimizer`` steps, by their names in the model; ``validate`` returns the
    scores of the model as it is now. The caller does forward and backward. ``ranks`` are those that the method
    has allocated to its modules.
    """

    def __init__(
        self,
        config: TrainConfig,
        rows: int,
        trained: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        laps: Laps,
        meter: Meter,
        log: Callable[[Row], None],
        validate: Callable[[], dict[str, float]] | None,
        prune: Prune | None = None,
        ranks: Part | None = None,
    ) -> None:
        self.config, self.meter, self.optimizer = config, meter, optimizer
        self._rows, self._laps, self._log, self._validate, self._prune = rows, laps, log, validate, prune
        self.steps = total_steps(config, rows)
        self._every = interval(config, "eval_every", rows) if validate else None
        self.parameters = list(trained.values())
        self._scheduler = make_scheduler(optimizer, config, self.steps)
        self.scaler = make_scaler(config, meter.device)
        self.progress = Progress(laps)
        self.epoch = Epoch(steps_per_epoch(config, rows), laps, meter)
        self._best = Best(trained, ranks) if config.keep_best else None
        self._final_loss: float | None = None
        self._last: Batch | None = None  # micro-batch of the last step

    @property
    def step(self) -> int:
        """The steps taken."""
        return self.progress.step

    @property
    def complete(self) -> bool:
        """Whether all steps of the configuration have been taken."""
        return self.step == self.steps

    @property
    def validation_due(self) -> bool:
        """Whether the model is validated after the step that has just been counted."""
        return self._every is not None and (self.step % self._every == 0 or self.complete)

    def parts(self, weights: Part, optimizer: Part, random: Part) -> dict[str, Part]:
        """The parts of the run that a checkpoint keeps."""
        parts: dict[str, Part] = {"weights": weights, "optimizer": optimizer, "scheduler": self._scheduler}
        parts |= {"scaler": self.scaler, "random": random, "progress": self.progress, "epoch": self.epoch}
        return parts | ({"best": self._best} if self._best else {})

    def update(self) -> None:
        """Clip the gradients, and step the optimizer and the schedule."""
        if self.config.clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._scheduler.step()

    def count(self, loss: torch.Tensor, batches: Sequence[Batch], slots: int = 1) -> None:
        """Count a step of ``slots`` trials together; ``loss`` is this one's, on the device."""
        self.progress.add(loss, batches, slots)
        self.epoch.add(loss, batches)
        self._last = batches[-1]

    def report(self, model: nn.Module, alone: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
        """Log the step, its epoch and its validation where they are due.

        The validation runs in the context ``alone()``, in which the model computes as this trial's alone.
        """
        numbers = {"step": self.step, "steps": self.steps}
        if self.step % self.config.log_every == 0 or self.complete:
            self._log(self.progress.without_pack_keys(numbers | self._step_row(model)))
        if self.epoch.over(self.step):
            self._log(numbers | self.progress.without_pack_keys(self.epoch.close()))
        if self._validate and self.validation_due:
            with self.meter.stage("validate"), alone():
                scores = self._validate()
            model.train()
            validations = self.progress.validations
            self.progress.validated(scores, self.step, self.config)
            self._log(numbers | {f"validation_{name}": value for name, value in scores.items()})
            if self._best and min(validations)[-1] == self.step:
                self._best.keep()
            self.consider(scores)

    def consider(self, scores: dict[str, float] | None = None) -> None:
        """Decide whether the run ends after the validations so far; ``scores`` are those of the last one.

        Call it without ``scores`` for a restored run: its process may have died between the last checkpoint and the
        decision to stop.
        """
        patience = self.config.patience
        if self.complete:
            return
        if patience is not None and validations_without_gain(self.progress.validations) >= patience:
            self.progress.stopped = PATIENCE
        elif scores is not None and self._prune is not None and self._prune(self.step, scores):
            self.progress.stopped = PRUNED

    @property
    def stopped(self) -> bool:
        """Whether a validation has ended the run before its last step."""
        return self.progress.stopped is not None

    def _step_row(self, model: nn.Module) -> Row:
        """The row of steps.jsonl for a logged step; times in seconds, memory in bytes."""
        self._final_loss = self.progress.mean_loss()  # the only place where the host waits for the device
        check_finite(self._final_loss, f"at step {self.step}", model, self.config)
        seconds, device = sum(self._laps.seconds()), self.meter.device
        return {
            "epoch": in_epochs(self.step, self.config, self._rows),
            "loss": self._final_loss,
            "learning_rate": self._scheduler.get_last_lr()[0],
            "tokens": self.progress.tokens,
            "seconds": seconds,
            "tokens_per_second": self.progress.tokens / seconds,
            "memory_allocated": torch.cuda.memory_allocated(device) if device.type == "cuda" else None,
        }

    def restore_best(self) -> None:
        """Load the weights of the best validation into the model, if they were kept and all steps were taken."""
        if self._best and self.progress.validations and self.complete:
            self._best.restore()

    def check(self, model: nn.Module) -> None:
        """Check the trained weights.

        Raises:
            FloatingPointError: a weight or the loss is not finite, or the gradient scaler has skipped every step.
        """
        if self._last is not None:
            check_trained(model, self.parameters, self._last, self.config, self.step)
            check_stepped(self.scaler, self.step)

    @property
    def stepped(self) -> bool:
        """Whether a step was taken since the run was begun or restored."""
        return self._last is not None

    def trained(self, compilation: dict[str, Any] | None = None) -> Trained:
        """The result of the run so far; ``compilation`` are the facts of torch.compile and of CUDA graphs."""
        return self.progress.trained(self.config, self._rows, self._final_loss, compilation)


@dataclass
class Progress:
    """The counters and sums of a run so far."""

    laps: Laps
    step: int = 0
    tokens: int = 0  # without padding
    positions: int = 0  # with padding
    losses: list[torch.Tensor] = field(default_factory=list)  # since the last logged step
    # For each validation: best_metric as a loss (lower is better), the loss itself, the step.
    validations: list[tuple[float, float, int]] = field(default_factory=list)
    lanes: list[int] = field(default_factory=list)  # for each step: the number of trials that took it together
    stopped: str | None = None  # why it ends before its last step

    def validated(self, scores: dict[str, float], step: int, config: TrainConfig) -> None:
        self.validations.append((as_loss(scores, config.best_metric), scores["loss"], step))

    def add(self, loss: torch.Tensor, batches: Sequence[Batch], slots: int = 1) -> None:
        self.step += 1
        self.lanes.append(slots)
        self.losses.append(loss)
        self.tokens += sum(batch.tokens for batch in batches)
        self.positions += sum(batch.input_ids.numel() for batch in batches)

    def mean_loss(self) -> float:
        """The mean loss of the steps since the last call."""
        mean = torch.stack(self.losses).mean().item()
        self.losses.clear()
        return mean

    def without_pack_keys(self, row: Row) -> Row:
        """``row`` of steps.jsonl; if the trial was in a pack, without the values that belong to the whole pack."""
        return {key: value for key, value in row.items() if max(self.lanes) == 1 or key not in PACK_KEYS}

    def trained(
        self, config: TrainConfig, rows: int, final_loss: float | None, compilation: dict[str, Any] | None = None
    ) -> Trained:
        """The result of the run over ``rows`` rows so far."""
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
            stopped=self.stopped,
        )

    def state_dict(self) -> dict[str, Any]:
        # "stopped" is not kept: the next attempt decides it again, perhaps with another patience.
        return vars(self) | {"laps": self.laps.seconds(), "stopped": None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.laps.resume(state["laps"])
        vars(self).update(state | {"laps": self.laps})


class Epoch:
    """The sums over the steps of an epoch; only ``close`` makes the host wait for the device."""

    def __init__(self, steps: int, laps: Laps, meter: Meter) -> None:
        self._steps, self._laps, self._meter = steps, laps, meter
        self._number = 1
        self._seconds = 0.0  # of all epochs that have ended
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


def as_loss(scores: dict[str, float], metric: str) -> float:
    """The value of ``metric``, negated if higher is better, so that lower is always better; NaN becomes infinity.

    Raises:
        InputError: ``scores`` has no such metric.
    """
    if metric not in scores:
        raise InputError(f"train.best_metric={metric}: the validation has {', '.join(scores)}")
    value = scores[metric] if is_minimized(metric) else -scores[metric]
    return math.inf if math.isnan(value) else value


def validations_without_gain(validations: Sequence[tuple[float, float, int]]) -> int:
    """The number of validations since the best one; of equal ones the first is the best."""
    values = [as_loss for as_loss, *_ in validations]
    return len(values) - 1 - values.index(min(values)) if values else 0


class Best:
    """The trainable weights of the best validation so far, kept on the host, and the ``ranks`` allocated then."""

    def __init__(self, parameters: dict[str, nn.Parameter], ranks: Part | None = None) -> None:
        self._parameters, self._ranks = parameters, ranks
        self._weights: dict[str, Any] = {}  # and the allocated ranks

    def keep(self) -> None:
        self._weights = {name: p.detach().to("cpu", copy=True) for name, p in self._parameters.items()}
        if self._ranks is not None and (state := self._ranks.state_dict()):
            self._weights[RANKS] = state

    @torch.no_grad()
    def restore(self) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(self._weights[name])
        if self._ranks is not None and RANKS in self._weights:
            self._ranks.load_state_dict(self._weights[RANKS])

    def state_dict(self) -> dict[str, Any]:
        return self._weights

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._weights = state


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
