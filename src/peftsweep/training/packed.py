"""Several LoRA adapters trained at once on one frozen base, each to the numbers it would come to alone within rounding.

The slots of a pack see the same rows in the same order, in batches that hold them for all (slots.py); each has its
own loss, clipping, optimizer, schedule, dropout and end.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.utils._pytree import tree_map_only

from peftsweep.data.batches import Batch
from peftsweep.data.tokens import Tokens
from peftsweep.models.losses import answer_losses
from peftsweep.observe.measure import Laps, Meter, out_of_memory
from peftsweep.schema import TrainConfig
from peftsweep.study.claims import Claimed
from peftsweep.training.capture import WARM, WORTH, Size, StaticSteps, captures, sizes_of_run
from peftsweep.training.checkpoint import Checkpoints, Interruption, OptimizerState
from peftsweep.training.fused import as_trained
from peftsweep.training.length import checkpoint_due
from peftsweep.training.loop import batches
from peftsweep.training.optimizer import (
    ELEMENTWISE,
    autocast,
    enable_checkpointing,
    find_optimizer,
    make_optimizer,
)
from peftsweep.training.run import WARMUP_LAPS, Prune, Row, Run, Trained
from peftsweep.training.slots import Pack, adapter_weights

# ---- the loop --------------------------------------------------------------------------------------

PROBES = 3  # steps of each kind, twice
PROBED_BATCHES = 16
DEFAULT = "default"  # PEFT's name of an adapter that is alone


@dataclass(frozen=True)
class Slot:
    """One trial of a pack: its adapter's name in the model, and what ``train.train`` is told of it."""

    name: str
    config: TrainConfig
    log: Callable[[Row], None]
    validate: Callable[[], dict[str, float]] | None = None
    checkpoints: Checkpoints | None = None
    stop_at: int | None = None
    prune: Prune | None = None


@dataclass(frozen=True)
class Ended:
    """How a slot ended: what it did (its step times are those of the whole pack), and the error that ended it early."""

    trained: Trained
    error: Exception | None = None


def train_packed(
    model: PeftModel, rows: Sequence[Tokens], slots: Sequence[Slot], *, pad_id: int, seed: int, meter: Meter
) -> dict[str, Ended]:
    """Train the adapters of ``slots`` in one loop, each as ``train.train`` would alone; the rest as for that.

    How near the losses come to those of the trial alone is said in slots.py.

    What the slots' configurations say of batches, autocast, checkpointing and padding must be the same. A slot that
    has taken its steps, or whose loss is no longer finite, or that fails in its own part, leaves the pack. The slots
    go on from checkpoints of the same step, which each may have written in a pack or alone; where one is due, each
    writes one.

    Raises:
        ValueError: the checkpoints are of different steps.
    """
    laps, shared = Laps(meter.device), slots[0].config
    pack = Pack(model, [slot.name for slot in slots], seed)
    ended: dict[str, Ended] = {}
    enable_checkpointing(model, shared.checkpointing)
    model.train()
    narrowed = autocast(shared, meter.device)
    due = {slot.config.checkpoint_every: checkpoint_due(slot.config, len(rows)) for slot in slots if slot.checkpoints}
    fewer_operations = as_trained(model, shared, meter.device.type)
    with closing(pack), fewer_operations, Interruption(wanted=bool(due)) as interruption:
        running = [_SlotRun(slot, pack, rows, laps, meter) for slot in slots]
        static = _static_steps(model, pack, running, rows, seed, meter)
        step, *others = {one.step for one in running}
        if others:
            raise ValueError(f"slots cannot go on together from different steps: {sorted([step, *others])}")
        shaped = static.padded if static else lambda batch: batch
        numbered = partial(batches, rows, shared, pad_id=pad_id, seed=seed, device=meter.device)
        stream = numbered(first=step, shaped=shaped)
        while True:
            leaving = [one for one in running if one.over]
            running = [one for one in running if one not in leaving]
            if leaving:
                pack.leave([one.slot.name for one in leaving])
                ended |= {one.slot.name: one.end(static.facts() if static else {}) for one in leaving}
                if static:
                    static.begin(pack.gradients, slots=len(running))
            if not running:
                break
            interruption.deliver()  # when the weights of those that have left are on the disk
            laps.start()
            # ---- the step ----------------------------------------------------------------------
            micro_batches = next(stream)
            answer_tokens = sum(batch.answer_tokens for batch in micro_batches)
            losses = torch.zeros(len(running), device=meter.device)
            for number, batch in enumerate(micro_batches):
                captured = static(batch, answer_tokens, first=number == 0) if static else None
                if captured is None:
                    with narrowed:
                        parts = answer_losses(model, pack.for_all(batch)).view(len(running), -1).sum(1) / answer_tokens
                    _backward(running, parts)
                    captured = parts.detach()
                losses += captured
            for one in running:
                with one.isolated():
                    one.update()
            pack.zero_grad()
            # ------------------------------------------------------------------------------------
            laps.stop(static.end_step() if static else 0.0)
            meter.sample()
            step += 1
            pack.forget()
            for one, loss in zip(running, losses, strict=True):
                one.count(loss, micro_batches, len(running))
            as_slot = pack.asked if all(one.validation_due for one in running) else pack.alone
            for one in running:
                if one.error is None:
                    with one.isolated():
                        one.report(model, partial(as_slot, one.slot.name))
            now = [check(step) for check in due.values()]  # each of them, as they remember when they were asked
            for one in running:
                if any(now) or interruption.pending or one.over:
                    one.save()
    model.eval()
    return ended


def _backward(running: Sequence[_SlotRun], parts: torch.Tensor) -> None:
    """The backward of all slots, from the loss of each."""
    scaled = [one.scaler.scale(part) for one, part in zip(running, parts, strict=True)]
    torch.stack(scaled).sum().backward()


def _static_steps(
    model: PeftModel, pack: Pack, running: Sequence[_SlotRun], rows: Sequence[Tokens], seed: int, meter: Meter
) -> StaticSteps | None:
    """What takes the steps of the pack in static shapes; None where they are not."""
    longest = max(running, key=lambda one: one.steps).config
    found = sizes_of_run(rows, longest, seed, meter.device)
    return None if found is None else _static(model, pack, longest, found, meter)


def _static(model: PeftModel, pack: Pack, config: TrainConfig, found: Sequence[Size], meter: Meter) -> StaticSteps:
    def losses(batch: Batch) -> torch.Tensor:
        with autocast(config, meter.device):
            return answer_losses(model, pack.for_all(batch))

    reason = "the slots of a pack draw the numbers of their dropout by themselves" if pack.drops else None
    static = StaticSteps(model, config, losses, found, meter.device, reason)
    static.begin(pack.gradients, slots=len(pack.names))
    return static


def speedup(
    model: PeftModel, names: Sequence[str], rows: Sequence[Tokens], config: TrainConfig, *, pad_id: int, meter: Meter
) -> float:
    """How many times as fast the adapters ``names`` take a step together as one by one; afterwards none has changed.

    Whole steps, each slot's clipping and optimizer included, as these take as long together as one by one: on an H100
    a probe of forward and backward alone said 4.33 where steps were 1.67 times as fast. Where steps are captured, they
    are here. The batch is the longest of the first ones. Both sides are warmed up, and timed in turn, twice, by the
    device's clock.
    """
    steps = batches(rows, config, pad_id=pad_id, seed=0, device=meter.device)
    some = itertools.islice(itertools.chain.from_iterable(steps), PROBED_BATCHES)
    batch = max(some, key=lambda one: one.input_ids.numel())
    model.train()
    enable_checkpointing(model, config.checkpointing)
    weights = {name: weight for one in names for name, weight in adapter_weights(model, one).items()}
    kept = {name: weight.detach().clone() for name, weight in weights.items()}
    seconds: dict[int, list[float]] = {1: [], len(names): []}
    for slots, took in [*seconds.items()] * 2:
        took += (
            _alone(model, names[0], batch, config, meter)
            if slots == 1
            else _together(model, names, batch, config, meter)
        )
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(kept[name])
    alone, together = (min(took) for took in seconds.values())
    return len(names) * alone / together


def _alone(model: PeftModel, name: str, batch: Batch, config: TrainConfig, meter: Meter) -> list[float]:
    """The seconds of some warmed-up steps of this adapter, as it is trained without a pack."""
    model.set_adapter(name)
    weights = list(adapter_weights(model, name).values())
    slots = [(weights, make_optimizer(nn.Module(), config, weights))]
    with as_trained(model, config, meter.device.type):
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        static = None
        if captures(config, meter.device):
            static = StaticSteps(model, config, partial(answer_losses, model), _probed(batch), meter.device)
            static.begin(gradients)
        took = _timed(partial(answer_losses, model), static, slots, gradients, batch, config, meter)
    for weight in weights:
        weight.grad = None
    return took


def _together(model: PeftModel, names: Sequence[str], batch: Batch, config: TrainConfig, meter: Meter) -> list[float]:
    """The seconds of some warmed-up steps of these adapters as a pack."""
    with closing(Pack(model, names, seed=0)) as pack, as_trained(model, config, meter.device.type):
        trained = [optimized(pack, name, config) for name in names]
        slots = [(own, make_optimizer(nn.Module(), config, own)) for own in trained]
        static = _static(model, pack, config, _probed(batch), meter) if captures(config, meter.device) else None
        return _timed(
            lambda one: answer_losses(model, pack.for_all(one)), static, slots, pack.gradients, batch, config, meter
        )


def _probed(batch: Batch) -> list[Size]:
    """Of the micro-batches of a probe, which are all ``batch``, as many as are worth to be captured."""
    size = Size(batch.input_ids.shape[1], batch.tokens, batch.answer_tokens)
    return [size] * (WARM + WARMUP_LAPS + PROBES + WORTH)


def _timed(
    losses: Callable[[Batch], torch.Tensor],
    static: StaticSteps | None,
    slots: Sequence[tuple[list[nn.Parameter], torch.optim.Optimizer]],
    gradients: list[torch.Tensor],
    batch: Batch,
    config: TrainConfig,
    meter: Meter,
) -> list[float]:
    """The seconds of ``PROBES`` steps of ``slots``, their weights and optimizers, after ``WARMUP_LAPS`` others."""
    laps, warmup = Laps(meter.device), WARMUP_LAPS + (WARM if static else 0)
    batch = static.padded(batch) if static else batch
    for _ in range(warmup + PROBES):
        laps.start()
        if static is None or static(batch, batch.answer_tokens, first=True) is None:
            with autocast(config, meter.device):
                loss = losses(batch).sum()
            loss.backward()
            del loss
        for weights, optimizer in slots:
            if config.clip:
                nn.utils.clip_grad_norm_(weights, config.clip)
            optimizer.step()
        torch._foreach_zero_(gradients)
        laps.stop()
    return laps.seconds()[warmup:]


def optimized(pack: Pack, name: str, config: TrainConfig) -> list[nn.Parameter]:
    """What the optimizer of a slot steps: its weights, in one row where it treats each number alike."""
    row = pack.row(name) if find_optimizer(config.optimizer) in ELEMENTWISE else None
    return [*pack.weights(name).values()] if row is None else [row]


class _SlotRun(Run):
    """The training of one slot; what fails in its own part ends it alone."""

    def __init__(self, slot: Slot, pack: Pack, rows: Sequence[Tokens], laps: Laps, meter: Meter) -> None:
        weights = {
            name.replace(f".{slot.name}.", f".{DEFAULT}."): weight for name, weight in pack.weights(slot.name).items()
        }
        trained = optimized(pack, slot.name, slot.config)
        optimizer = make_optimizer(nn.Module(), slot.config, trained)
        own = _SlotLaps(laps)
        super().__init__(slot.config, len(rows), weights, optimizer, own, meter, slot.log, slot.validate, slot.prune)
        self.parameters = trained
        self.slot, self._pack = slot, pack
        in_a_row = trained[0] is pack.row(slot.name)
        state = _RowState(optimizer, [*weights.values()], pack) if in_a_row else _OptimizerState(optimizer)
        self._checkpointed = self.parts(_Weights(weights), state, _Dropout(pack.dropout(slot.name)))
        if slot.checkpoints:
            slot.checkpoints.restore(self._checkpointed)
        self.consider()
        self._stop_at = self.steps if slot.stop_at is None else min(slot.stop_at, self.steps)
        self.error: Exception | None = None

    @property
    def over(self) -> bool:
        """Whether it has no more steps to take, or has failed."""
        return self.error is not None or self.stopped or self.step >= self._stop_at

    @contextmanager
    def isolated(self) -> Iterator[None]:
        """What fails in the block ends this slot alone, unless it is the memory, which belongs to all."""
        try:
            yield
        except Exception as error:
            if out_of_memory(error) or isinstance(error, Claimed):
                raise
            self.error = error

    def save(self) -> None:
        """Write a checkpoint, as the trial alone would, unless it has come to its end."""
        if self.slot.checkpoints and not self.complete and self.error is None:
            with self.meter.stage("checkpoint"):
                self.slot.checkpoints.save(self.step, self._checkpointed)

    def end(self, facts: dict[str, Any]) -> Ended:
        """What it has come to, once it has left the pack; the weights of a whole training are on the disk.

        ``facts`` are those of capturing.
        """
        if self.error is None:
            self.restore_best()
        if self.stepped and self.error is None:
            with self.isolated(), self._pack.alone(self.slot.name):
                self.check(self._pack.model)
            self._pack.model.train()
        trained = self.trained(facts)
        if self.slot.checkpoints and self.stepped and self.complete and self.error is None:
            with self.meter.stage("save"):
                self.slot.checkpoints.save(self.step, {"weights": self._checkpointed["weights"]}, vars(trained))
        return Ended(trained, self.error)


# ---- its checkpoint, which is that of the trial alone ----------------------------------------------


class _SlotLaps(Laps):
    """The laps of a pack, after those that a slot brings along."""

    def __init__(self, laps: Laps) -> None:
        self._before: list[float] = []
        self._laps = laps

    def resume(self, seconds: list[float]) -> None:
        self._before = seconds

    def seconds(self) -> list[float]:
        return self._before + self._laps.seconds()


class _Weights:
    """What ``checkpoint.Weights`` keeps of a plain LoRA, of one slot."""

    def __init__(self, weights: dict[str, nn.Parameter]) -> None:
        self._weights = weights

    def state_dict(self) -> dict[str, Any]:
        parameters = {name: _apart(weight) for name, weight in self._weights.items()}
        return {"parameters": parameters, "trained": [*parameters], "buffers": {}, "attributes": {}}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, weight in self._weights.items():
            weight.copy_(state["parameters"][name])


class _OptimizerState(OptimizerState):
    """An optimizer's state in the order of the weights alone, while these lie in a pack in another."""

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = tree_map_only(torch.Tensor, _apart, super().state_dict())
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        for weight, own in self._optimizer.state.items():
            for name, value in own.items():
                if isinstance(value, torch.Tensor) and value.shape == weight.shape:
                    own[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)


class _RowState(OptimizerState):
    """The state of an optimizer that steps all ``weights`` in one row: that of one that steps each by itself."""

    def __init__(self, optimizer: torch.optim.Optimizer, weights: Sequence[nn.Parameter], pack: Pack) -> None:
        super().__init__(optimizer)
        self._weights, self._pack = weights, pack
        (self._row,) = optimizer.param_groups[0]["params"]

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        of_row: dict[str, Any] = state["state"].get(0, {})
        each = {
            number: {name: self._part(value, weight) for name, value in of_row.items()}
            for number, weight in enumerate(self._weights if of_row else ())
        }
        (group,) = state["param_groups"]
        return {"state": each, "param_groups": [group | {"params": [*range(len(self._weights))]}]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        (group,) = state["param_groups"]
        of_row: dict[str, Any] = {}
        for number, weight in enumerate(self._weights if state["state"] else ()):
            for name, value in state["state"][number].items():
                if not isinstance(value, torch.Tensor) or value.shape != weight.shape:
                    of_row[name] = value
                    continue
                if name not in of_row:
                    of_row[name] = torch.zeros_like(self._row, dtype=value.dtype, requires_grad=False)
                self._pack.part_of(of_row[name], weight).copy_(value)
        super().load_state_dict({"state": {0: of_row} if of_row else {}, "param_groups": [group | {"params": [0]}]})

    def _part(self, value: Any, weight: nn.Parameter) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return _apart(self._pack.part_of(value, weight) if value.shape == self._row.shape else value)


class _Dropout:
    """What ``checkpoint.Randomness`` keeps, with the numbers of one slot."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def state_dict(self) -> dict[str, Any]:
        state = self._generator.get_state()
        if self._generator.device.type == "cpu":
            return {"cpu": state, "cuda": []}
        return {"cpu": torch.get_rng_state(), "cuda": [state] * torch.cuda.device_count()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        on_cpu, number = self._generator.device.type == "cpu", self._generator.device.index or 0
        self._generator.set_state(state["cpu"] if on_cpu else state["cuda"][number])


def _apart(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that is no part of a larger tensor."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)
