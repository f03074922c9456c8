"""The training loop, with one fenced step."""

from __future__ import annotations

import inspect
import itertools
import math
import pydoc
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.profiler import record_function
from transformers import get_scheduler

from peftsweep.checkpoint import Checkpoints, Interruption, OptimizerState, Part, Randomness, Weights
from peftsweep.compiled import compiled
from peftsweep.data import Batch, Tokens, batch_order, collate, micro_batches
from peftsweep.errors import InputError
from peftsweep.measure import Laps, Meter
from peftsweep.metrics import LOWER_IS_BETTER
from peftsweep.model import answer_losses, auxiliary_loss, losses_and_hits, trainable_parameters
from peftsweep.schema import Dtype, Schedule, TrainConfig

SCHEDULES = {Schedule.cosine: "cosine", Schedule.linear: "linear", Schedule.constant: "constant_with_warmup"}
FUSED = ("cpu", "cuda")  # devices that have torch's fused optimizers
# Of a row of steps.jsonl, what is shared by trials that take their steps together.
OF_A_PACK = (
    *("seconds", "tokens_per_second", "memory_allocated"),
    *("epoch_seconds", "epoch_tokens_per_second", "epoch_memory_peak"),
)
SCALE = 2.0**16  # of the loss at first, with float16; torch's default
MOST_STEPS = 5_000  # of a run, among which typical ones are looked for
GOLDEN = (math.sqrt(5) - 1) / 2
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
    device = meter.device
    steps = total_steps(config, len(rows))
    every = interval(config, "eval_every", len(rows)) if validate else None
    due = checkpoint_due(config, len(rows))
    optimizer = make_optimizer(model, config)
    trained = dict(trainable_parameters(model))
    parameters = list(trained.values())
    scheduler = make_scheduler(optimizer, config, steps)
    narrowed = autocast(config, device)
    scaler = make_scaler(config, device)

    numbers = None if order is None else list(order)
    numbered = partial(batches, rows, config, pad_id=pad_id, seed=seed, device=device, order=numbers)

    def losses_of(called: nn.Module, batch: Batch) -> torch.Tensor:
        with narrowed:
            return answer_losses(called, batch)

    laps = Laps(device)
    epoch = Epoch(steps_per_epoch(config, len(rows)), laps, meter)
    span = record_function if after_step else nullcontext
    best = Best(trained) if config.keep_best else None
    progress = Progress(laps)
    final_loss = None
    taken: list[Batch] = []
    parts: dict[str, Part] = {}
    if checkpoints:
        parts = {"weights": Weights(model), "optimizer": OptimizerState(optimizer), "scheduler": scheduler}
        parts |= {"scaler": scaler, "random": Randomness(device), "progress": progress, "epoch": epoch}
        parts |= {"best": best} if best else {}
        if checkpoints.trained is not None:
            checkpoints.restore({"weights": parts["weights"]})
            model.eval()
            return Trained(**checkpoints.trained)

    enable_checkpointing(model, config.checkpointing)
    model.train()
    allocate = getattr(getattr(model, "base_model", None), "update_and_allocate", None)
    regularised: bool | None = None  # known after the first forward
    with (
        compiled(model, config, lambda: itertools.chain.from_iterable(numbered()), losses_of, meter) as compilation,
        Interruption(wanted=checkpoints is not None) as interruption,
    ):
        torch.manual_seed(seed)  # dropout does not depend on how many numbers the adapter's creation drew
        if checkpoints:
            checkpoints.restore(parts)
        stream = numbered(first=progress.step)
        last = steps if stop_at is None else min(stop_at, steps)
        for step in range(progress.step + 1, last + 1):
            laps.start()
            # ---- the step ----------------------------------------------------------------------
            taken = next(stream)
            answer_tokens = sum(batch.answer_tokens for batch in taken)
            loss = torch.zeros((), device=device)
            for batch in taken:
                with span("forward"), narrowed:
                    losses, hits = losses_and_hits(compilation.model, batch)
                    part = losses.sum() / answer_tokens
                    regulariser = auxiliary_loss(model, batch) if regularised is not False else None
                    regularised = regulariser is not None
                if hits is not None:
                    epoch.hits += hits
                del losses
                with span("backward"):
                    share = batch.answer_tokens / answer_tokens
                    scaler.scale(part if regulariser is None else part + regulariser * share).backward()
                loss += part.detach()
                del part, regulariser  # bitsandbytes' 8-bit layers keep activations as long as the graph is held
            with span("optimizer"):
                if config.clip:
                    scaler.unscale_(optimizer)
                    nn.utils.clip_grad_norm_(parameters, config.clip)
                scaler.step(optimizer)
                scaler.update()
                scheduler.step()
                if allocate:
                    allocate(step)  # AdaLoRA, AdaMSS: ranks are dealt out anew from this step's gradients
                optimizer.zero_grad(set_to_none=True)
            # ------------------------------------------------------------------------------------
            laps.stop(compilation.end_step())
            if after_step:
                after_step()
            meter.sample()
            progress.add(loss, taken)
            epoch.add(loss, taken)
            if step % config.log_every == 0 or step == steps:
                final_loss = progress.mean_loss()  # the only place where the host waits for the device
                check_finite(final_loss, f"at step {step}", model, config)
                seconds = sum(laps.seconds())
                log(
                    progress.own(
                        {
                            "step": step,
                            "steps": steps,
                            "epoch": in_epochs(step, config, len(rows)),
                            "loss": final_loss,
                            "learning_rate": scheduler.get_last_lr()[0],
                            "tokens": progress.tokens,
                            "seconds": seconds,
                            "tokens_per_second": progress.tokens / seconds,
                            "memory_allocated": torch.cuda.memory_allocated(device) if device.type == "cuda" else None,
                        }
                    )
                )
            if epoch.over(step):
                log({"step": step, "steps": steps} | progress.own(epoch.close()))
            if validate and every and (step % every == 0 or step == steps):
                with meter.stage("validate"), torch.compiler.set_stance("force_eager"):
                    scores = validate()
                model.train()
                progress.validations.append((badness(scores, config.best_metric), scores["loss"], step))
                log({"step": step, "steps": steps} | {f"validation_{name}": value for name, value in scores.items()})
                if best and min(progress.validations)[-1] == step:
                    best.keep()
            if checkpoints and step < steps and (due(step) or interruption.pending or step == last):
                with meter.stage("checkpoint"):
                    checkpoints.save(step, parts)
            if step < steps:  # else when the trained weights are on the disk
                interruption.deliver()
        if best and progress.validations and progress.step == steps:
            best.restore()
        if taken:
            with torch.compiler.set_stance("force_eager"):
                check_trained(model, parameters, taken[-1], config, progress.step)
            check_stepped(scaler, progress.step)
        model.eval()
        result = progress.trained(config, len(rows), final_loss, compilation.facts())
        if checkpoints and taken and progress.step == steps:
            with meter.stage("save"):
                checkpoints.save(steps, {"weights": parts["weights"]}, vars(result))
    return result


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


def padded_tokens(step: Sequence[int], rows: Sequence[Tokens], config: TrainConfig) -> int:
    """The tokens of a step, of its rows by their numbers, with what its micro-batches are padded by."""
    multiple, total = config.pad_to_multiple_of, 0
    for numbers in next(micro_batches([list(step)], config.batch_size)):
        total += len(numbers) * math.ceil(max(len(rows[n].ids) for n in numbers) / multiple) * multiple
    return total


def steps_of(rows: Sequence[Tokens], config: TrainConfig, seed: int) -> list[list[int]]:
    """The row numbers of each step of a run; of a long one those of its first ``MOST_STEPS``."""
    order = batch_order([len(row.ids) for row in rows], rows_per_step(config), seed)
    return list(itertools.islice(order, min(max(total_steps(config, len(rows)), 1), MOST_STEPS)))


def typical_steps(rows: Sequence[Tokens], config: TrainConfig, seed: int, count: int) -> list[list[int]]:
    """The row numbers of ``count`` steps of a run, of all sizes as these are distributed in it.

    They are chosen by their padded tokens, at quantiles that multiples of the golden ratio spread evenly, so that the
    last few of them are as typical as all: their median is near the whole run's, which that of the first steps need
    not be.
    """
    by_size = sorted(steps_of(rows, config, seed), key=lambda step: padded_tokens(step, rows, config))
    return [by_size[int((0.5 + n * GOLDEN) % 1 * len(by_size))] for n in reversed(range(count))]


def rows_per_step(config: TrainConfig) -> int:
    """Rows that an optimizer step takes, but for an epoch's last one."""
    return config.batch_size * config.accumulation


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


def total_steps(config: TrainConfig, rows: int) -> int:
    """Optimizer steps of the run: ``epochs`` over ``rows`` rows where given, else ``steps``."""
    if config.epochs is None:
        return config.steps
    return math.ceil(config.epochs * steps_per_epoch(config, rows))


def in_epochs(step: int, config: TrainConfig, rows: int) -> float:
    """How often the data has been gone through after ``step`` steps."""
    return step / steps_per_epoch(config, rows)


def rows_taken(rows: Sequence[Tokens], config: TrainConfig, seed: int) -> set[int]:
    """The numbers of the rows that a run with ``seed`` takes, of which a short one leaves some out."""
    steps = total_steps(config, len(rows))
    if steps >= steps_per_epoch(config, len(rows)):
        return set(range(len(rows)))
    order = batch_order([len(row.ids) for row in rows], rows_per_step(config), seed)
    return {number for step in itertools.islice(order, steps) for number in step}


def steps_per_epoch(config: TrainConfig, rows: int) -> int:
    """Optimizer steps to go through ``rows`` rows once."""
    return math.ceil(rows / rows_per_step(config))


def interval(config: TrainConfig, key: str, rows: int) -> int | None:
    """``eval_every`` or ``checkpoint_every`` in steps: ``"100"`` is steps, ``"0.5epochs"`` or ``"1epoch"`` is epochs.

    Raises:
        InputError: it is neither.
    """
    said: str | None = getattr(config, key)
    if said is None:
        return None
    number, epochs, rest = said.strip().partition("epoch")
    try:
        every = float(number) * (steps_per_epoch(config, rows) if epochs else 1)
        valid = every > 0 and math.isfinite(every) and rest in ("", "s")
    except ValueError:
        valid = False
    if not valid or not (epochs or every.is_integer()):
        others = " or minutes (10min)" if key == "checkpoint_every" else ""
        raise InputError(f"train.{key}={said}: a number of steps (100) or epochs (0.5epochs){others}")
    return max(1, round(every))


def checkpoint_due(
    config: TrainConfig, rows: int, clock: Callable[[], float] = time.monotonic
) -> Callable[[int], bool]:
    """Whether a checkpoint is due after a step: ``checkpoint_every`` is steps or epochs, or ``"10min"``.

    Raises:
        InputError: it is none of these.
    """
    timed = re.fullmatch(r"(\d+(?:\.\d+)?)\s*min", (config.checkpoint_every or "").strip())
    if timed is None:
        every = interval(config, "checkpoint_every", rows)
        return lambda step: every is not None and step % every == 0
    seconds, last = 60 * float(timed[1]), clock()

    def due(_: int) -> bool:
        nonlocal last
        if clock() - last < seconds:
            return False
        last = clock()
        return True

    return due


def find_optimizer(name: str) -> Callable[..., torch.optim.Optimizer]:
    """What ``train.optimizer`` names: ``AdamW`` is a class of torch.optim, others by their dotted path.

    Beside classes of optimizers it may be a function that makes one for a model, as PEFT's
    ``peft.optimizers.create_loraplus_optimizer``.

    Raises:
        InputError: there is no such optimizer.
    """
    try:
        found: Any = pydoc.locate(name if "." in name else f"torch.optim.{name}")
    except pydoc.ErrorDuringImport:
        found = None
    of_model = inspect.isfunction(found) and "model" in inspect.signature(found).parameters
    if not of_model and not (inspect.isclass(found) and issubclass(found, torch.optim.Optimizer)):
        raise InputError(
            f"train.optimizer={name}: no such optimizer; give a class of torch.optim (AdamW, SGD) or a dotted path"
        )
    if found is torch.optim.SparseAdam:
        raise InputError(f"train.optimizer={name}: takes sparse gradients only; those of a trial are dense")
    closure = inspect.signature(getattr(found, "step", found)).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise InputError(f"train.optimizer={name}: its steps want a closure that calculates the loss again")
    make: Callable[..., torch.optim.Optimizer] = found
    return make


def make_optimizer(
    model: nn.Module, config: TrainConfig, parameters: Sequence[nn.Parameter] | None = None
) -> torch.optim.Optimizer:
    """The optimizer of ``parameters`` at the scaled learning rate, fused where torch offers that.

    Without ``parameters`` it is that of all the model's trainable ones. Making it may freeze some of them, as
    LoRA-FA does with the A matrices.

    Raises:
        InputError: ``train.optimizer_kwargs`` does not fit it.
    """
    make = find_optimizer(config.optimizer)
    known = inspect.signature(make).parameters
    parameters = list(parameters or (p for _, p in trainable_parameters(model)))
    options: dict[str, Any] = {"lr": config.learning_rate * config.learning_rate_scale}
    if "weight_decay" in known or "optimizer_cls" in known:
        options["weight_decay"] = config.weight_decay
    if "optimizer_cls" in known:
        options["optimizer_cls"] = torch.optim.AdamW
    if "fused" in known and all(p.dtype.is_floating_point and p.device.type in FUSED for p in parameters):
        options["fused"] = True
    try:
        return make(model if "model" in known else parameters, **options | config.optimizer_kwargs)
    except (TypeError, ValueError, NotImplementedError) as error:  # as of bitsandbytes' SGD without momentum
        said = f"{config.optimizer} does not take {config.optimizer_kwargs}"
        raise InputError(f"train.optimizer_kwargs: {said} ({error})") from None


def make_scheduler(optimizer: torch.optim.Optimizer, config: TrainConfig, steps: int) -> Any:
    """The learning rate's schedule over ``steps`` steps, with its warm-up."""
    warmup = warmup_steps(config, steps)
    return get_scheduler(SCHEDULES[config.schedule], optimizer, num_warmup_steps=warmup, num_training_steps=steps)


def warmup_steps(config: TrainConfig, steps: int) -> int:
    """The steps of the warm-up of a training of ``steps`` steps."""
    return round(config.warmup * steps) if config.warmup < 1 else round(config.warmup)


def check_warmup(config: TrainConfig, steps: int) -> None:
    """Refuse a warm-up that never ends: no step of such a training would have the learning rate asked for.

    Raises:
        InputError: it is not shorter than the training of ``steps`` steps.
    """
    if steps and (warmup := warmup_steps(config, steps)) >= steps:
        raise InputError(
            f"train.warmup={config.warmup:g}: {warmup} steps, must be fewer than the {steps} of the training"
        )


def enable_checkpointing(model: Any, wanted: bool) -> None:
    """Switch gradient checkpointing on if it is ``wanted``: activations are calculated again in the backward."""
    if wanted:
        # Renamed in transformers 5.23; both names are in the supported range.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})


def check_finite(loss: float, when: str, model: nn.Module, config: TrainConfig) -> None:
    """Refuse to go on from a training loss that is no number; the message says ``when``.

    Raises:
        FloatingPointError: it is not finite.
    """
    if not math.isfinite(loss):
        raise FloatingPointError(f"the training loss is {loss} {when}; {_remedy(model, config)}")


@torch.no_grad()
def check_trained(
    model: nn.Module, weights: Sequence[torch.Tensor], batch: Batch, config: TrainConfig, step: int
) -> None:
    """Refuse a model that its last step has ruined: the loss that was logged is of the weights before it.

    Raises:
        FloatingPointError: one of ``weights`` is not finite after ``step`` steps, or the loss on ``batch`` is not.
    """
    if not all(bool(weight.isfinite().all()) for weight in weights):
        raise FloatingPointError(f"weights are not finite after step {step}; {_remedy(model, config)}")
    model.eval()
    with autocast(config, batch.input_ids.device):
        loss = answer_losses(model, batch).mean().item()
    check_finite(loss, f"after step {step}", model, config)


def make_scaler(config: TrainConfig, device: torch.device) -> torch.amp.GradScaler:
    """What scales the loss where ``train.autocast`` is float16, and skips steps whose gradients overflow."""
    return torch.amp.GradScaler(device.type, init_scale=SCALE, enabled=config.autocast is Dtype.float16)


def check_stepped(scaler: torch.amp.GradScaler, steps: int) -> None:
    """Refuse a training of which the scaler has skipped each of the ``steps``: nothing was trained.

    Raises:
        FloatingPointError: the scale was lowered as often as there were steps.
    """
    if scaler.is_enabled() and scaler.get_scale() <= SCALE * scaler.get_backoff_factor() ** steps:
        said = f"the gradients of all {steps} steps overflowed, and none was taken"
        raise FloatingPointError(f"{said}; take train.autocast=bfloat16, or more steps: the scale is halved in each")


def autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    """What ``train.autocast`` asks for."""
    dtype = getattr(torch, (config.autocast or Dtype.bfloat16).value)
    return torch.autocast(device.type, dtype=dtype, enabled=bool(config.autocast))


def _remedy(model: nn.Module, config: TrainConfig) -> str:
    """What to change where numbers have overflowed."""
    lower = "lower train.learning_rate"
    if config.autocast is Dtype.float16:
        key = "train.autocast"
    elif any(parameter.dtype == torch.float16 for parameter in model.parameters()):
        key = "model.dtype"
    else:
        return lower
    return f"{key}=float16 overflows above 65504: take bfloat16 or float32, or {lower}"


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
