"""Several LoRA adapters trained at once on one frozen base, each to the numbers it would come to alone.

The lanes of a pack see the same rows in the same order, in batches that hold them for all (lanes.py); each has its
own loss, clipping, optimizer, schedule, dropout and end.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import cast

import torch
from peft import PeftModel
from torch import nn

from peftsweep.data import Batch, Tokens
from peftsweep.lanes import Pack
from peftsweep.measure import Laps, Meter, out_of_memory
from peftsweep.model import answer_logits, answer_losses
from peftsweep.schema import Dtype, TrainConfig
from peftsweep.train import (
    Best,
    Epoch,
    Progress,
    Row,
    Trained,
    badness,
    batches,
    check_finite,
    enable_checkpointing,
    in_epochs,
    interval,
    make_optimizer,
    make_scheduler,
    steps_per_epoch,
    total_steps,
)

# ---- the loop --------------------------------------------------------------------------------------

PROBES = 2  # steps of each kind
PROBED_BATCHES = 16
EPOCH_OF_A_LANE = ("epoch", "epoch_loss", "epoch_accuracy")  # the rest of an epoch's row is the pack's


@dataclass(frozen=True)
class Lane:
    """One trial of a pack: its adapter's name in the model, and what ``train.train`` is told of it."""

    name: str
    config: TrainConfig
    log: Callable[[Row], None]
    validate: Callable[[], dict[str, float]] | None = None
    stop: Callable[[int], bool] = lambda step: False  # asked after every step: whether the lane ends here


@dataclass(frozen=True)
class Ended:
    """How a lane ended: what it did (its step times are those of the whole pack), and the error that ended it early."""

    trained: Trained
    share_seconds: float  # of all step times, each divided by the lanes that took part
    error: Exception | None = None


def train_packed(
    model: PeftModel, rows: Sequence[Tokens], lanes: Sequence[Lane], *, pad_id: int, seed: int, meter: Meter
) -> dict[str, Ended]:
    """Train the adapters of ``lanes`` in one loop, each as ``train.train`` would alone; the rest as for that.

    What the lanes' configurations say of batches, autocast, checkpointing and padding must be the same. A lane that
    has taken its steps, or whose loss is no longer finite, or that fails in its own part, leaves the pack.
    """
    laps, shared = Laps(meter.device), lanes[0].config
    pack = Pack(model, [lane.name for lane in lanes], seed)
    running = [_Running(lane, pack, rows, laps, meter) for lane in lanes]
    ended: dict[str, Ended] = {}
    enable_checkpointing(model, shared.checkpointing)
    model.train()
    autocast = _autocast(shared, meter.device)
    stream = batches(rows, shared, pad_id=pad_id, seed=seed, device=meter.device)
    taking_part: list[int] = []  # of each step
    try:
        while True:
            leaving = [one for one in running if one.over or one.error is not None]
            running = [one for one in running if one not in leaving]
            if leaving:
                pack.leave([one.lane.name for one in leaving])
                ended |= {one.lane.name: one.end(laps, taking_part) for one in leaving}
            if not running:
                break
            laps.start()
            # ---- the step ----------------------------------------------------------------------
            micro_batches = list(itertools.islice(stream, shared.accumulation))
            answer_tokens = sum(batch.answer_tokens for batch in micro_batches)
            losses = torch.zeros(len(running), device=meter.device)
            for batch in micro_batches:
                with autocast:
                    logits, targets = answer_logits(model, pack.for_all(batch))
                    each = nn.functional.cross_entropy(logits, targets, reduction="none")
                    parts = each.view(len(running), -1).sum(1) / answer_tokens
                del logits, each
                scaled = [one.scaler.scale(part) for one, part in zip(running, parts, strict=True)]
                torch.stack(scaled).sum().backward()
                losses += parts.detach()
                del parts, scaled
            for one in running:
                one.update()
            pack.zero_grad()
            # ------------------------------------------------------------------------------------
            laps.stop()
            taking_part.append(len(running))
            meter.sample()
            pack.forget()
            for one, loss in zip(running, losses, strict=True):
                one.count(loss, micro_batches)
            alike = all(one.validates for one in running)
            for one in running:
                one.after_step(pack.asked if alike else pack.alone)
    finally:
        pack.close()
    model.eval()
    return ended


def speedup(
    model: PeftModel, names: Sequence[str], rows: Sequence[Tokens], config: TrainConfig, *, pad_id: int, meter: Meter
) -> float:
    """How many times as fast the adapters ``names`` take a step together as one by one; nothing is trained.

    Some steps of both kinds, in turn, on the longest of the first batches, forward and backward.
    """
    some = itertools.islice(batches(rows, config, pad_id=pad_id, seed=0, device=meter.device), PROBED_BATCHES)
    batch = max(some, key=lambda one: one.input_ids.numel())
    model.train()
    enable_checkpointing(model, config.checkpointing)
    seconds: dict[int, list[float]] = {1: [], len(names): []}
    for _ in range(PROBES + 1):  # the first ones allocate and tune
        for lanes, took in seconds.items():
            took.append(_probe(model, names[:lanes], batch, config, meter))
    alone, together = (min(took[1:]) for took in seconds.values())
    return len(names) * alone / together


def _probe(model: PeftModel, names: Sequence[str], batch: Batch, config: TrainConfig, meter: Meter) -> float:
    """The seconds of one forward and backward pass of these lanes."""
    pack, laps = Pack(model, names, seed=0), Laps(meter.device)
    try:
        laps.start()
        with _autocast(config, meter.device):
            losses = answer_losses(model, pack.for_all(batch))
        losses.sum().backward()
        laps.stop()
        return laps.seconds()[0]
    finally:
        pack.close()


def _autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    dtype = getattr(torch, (config.autocast or Dtype.bfloat16).value)
    return torch.autocast(device.type, dtype=dtype, enabled=bool(config.autocast))


class _Running:
    """A lane under way: its optimizer, schedule and books."""

    def __init__(self, lane: Lane, pack: Pack, rows: Sequence[Tokens], laps: Laps, meter: Meter) -> None:
        self.lane, self.config = lane, lane.config
        self._pack, self._meter, self._rows = pack, meter, len(rows)
        weights = pack.weights(lane.name)
        self._parameters = list(weights.values())
        self.optimizer = make_optimizer(nn.Module(), self.config, self._parameters)
        self._steps = total_steps(self.config, self._rows)
        self._every = interval(self.config, "eval_every", self._rows) if lane.validate else None
        self._scheduler = make_scheduler(self.optimizer, self.config, self._steps)
        self.scaler = torch.amp.GradScaler(meter.device.type, enabled=self.config.autocast is Dtype.float16)
        self._progress = Progress(laps)
        self._epoch = Epoch(steps_per_epoch(self.config, self._rows), laps, meter)
        self._best = Best(weights) if self.config.keep_best else None
        self._final_loss: float | None = None
        self.error: Exception | None = None
        self.over = not self._steps
        self.validates = False  # after this step

    def update(self) -> None:
        """The end of a step, from its gradients on."""
        with self._own():
            if self.config.clip:
                self.scaler.unscale_(self.optimizer)
                gradients = [cast(torch.Tensor, weight.grad) for weight in self._parameters]
                if self._meter.device.type == "cpu":  # summed up in the order of the trial alone, to the same bit
                    gradients = [gradient.contiguous() for gradient in gradients]
                norm = nn.utils.get_total_norm(gradients)
                nn.utils.clip_grads_with_norm_(self._parameters, self.config.clip, norm)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self._scheduler.step()

    def count(self, loss: torch.Tensor, batches: Sequence[Batch]) -> None:
        """See how far it has come."""
        with self._own():
            self._progress.add(loss, batches)
            self._epoch.add(loss, batches)
            step = self._progress.step
            self.over = step == self._steps or self.lane.stop(step)
            self.validates = bool(self._every) and (step % cast(int, self._every) == 0 or self.over)

    def after_step(self, as_lane: Callable[[str], AbstractContextManager[None]]) -> None:
        """Log and validate, in a block ``as_lane`` in which the model is that of this lane."""
        if self.error is not None:
            return
        with self._own():
            progress, config = self._progress, self.config
            step = progress.step
            numbers = {"step": step, "steps": self._steps}
            if step % config.log_every == 0 or self.over:
                self._final_loss = progress.mean_loss()
                check_finite(self._final_loss, step)
                self.lane.log(
                    numbers
                    | {
                        "epoch": in_epochs(step, config, self._rows),
                        "loss": self._final_loss,
                        "learning_rate": self._scheduler.get_last_lr()[0],
                        "tokens": progress.tokens,
                    }
                )
            if self._epoch.over(step):
                self.lane.log(numbers | {key: v for key, v in self._epoch.close().items() if key in EPOCH_OF_A_LANE})
            if self.validates and self.lane.validate:
                with self._meter.stage("validate"), as_lane(self.lane.name):
                    scores = self.lane.validate()
                self._note(scores, numbers)

    def _note(self, scores: dict[str, float], numbers: Row) -> None:
        self._pack.model.train()
        validations = self._progress.validations
        validations.append((badness(scores, self.config.best_metric), scores["loss"], numbers["step"]))
        self.lane.log(numbers | {f"validation_{name}": value for name, value in scores.items()})
        if self._best and min(validations)[-1] == numbers["step"]:
            self._best.keep()

    @contextmanager
    def _own(self) -> Iterator[None]:
        """What fails in the block ends this lane alone, unless it is the memory, which belongs to all."""
        try:
            yield
        except Exception as error:
            if out_of_memory(error):
                raise
            self.error = error

    def end(self, laps: Laps, taking_part: Sequence[int]) -> Ended:
        """What it has come to, once it has left the pack."""
        if self._best and self._progress.validations and self.error is None:
            self._best.restore()
        trained = self._progress.trained(self.config, self._rows, self._final_loss)
        seconds = laps.seconds()[: trained.steps]
        share = sum(took / lanes for took, lanes in zip(seconds, taking_part, strict=False))
        return Ended(replace(trained, step_seconds=seconds), share, self.error)
