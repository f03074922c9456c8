"""Several LoRA adapters trained at once on one frozen base, each with the losses of training it alone, within rounding.

All slots of a pack train on the same rows in the same order. A batch holds the rows once for each slot (slots.py).
Each slot has its own loss, clipping, optimizer, schedule, dropout and last step.
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
from peftsweep.study import claims, store
from peftsweep.training.capture import MIN_BATCHES_TO_CAPTURE, Size, StaticSteps, captures, sizes_of_run
from peftsweep.training.checkpoint import Checkpoints, Interruption, OptimizerState
from peftsweep.training.fused import as_trained
from peftsweep.training.graphs import WARMUP_PASSES
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

PROBED_STEPS = 3  # timed steps, with and without a pack; both are timed twice
PROBED_BATCHES = 16  # first batches of a run, the longest of which is timed
DEFAULT = "default"  # the name that PEFT gives the adapter of a trial without a pack


@dataclass(frozen=True)
class Slot:
    """One trial of a pack: the name of its adapter in the model, and the arguments of ``loop.train`` for it."""

    name: str
    config: TrainConfig
    log: Callable[[Row], None]
    validate: Callable[[], dict[str, float]] | None = None
    checkpoints: Checkpoints | None = None
    stop_at: int | None = None
    prune: Prune | None = None


@dataclass(frozen=True)
class Ended:
    """How a slot ended: its training (step times are those of the whole pack), and the error that ended it, if any."""

    trained: Trained
    error: Exception | None = None


def train_packed(
    model: PeftModel, rows: Sequence[Tokens], slots: Sequence[Slot], *, pad_id: int, seed: int, meter: Meter
) -> dict[str, Ended]:
    """Train the adapters of ``slots`` in one loop, each as ``loop.train`` would alone; how each ended, by its name.

    ``pad_id``, ``seed`` and ``meter`` are those of ``loop.train``. slots.py says how near the losses come to those of
    the trial alone. The slots' configurations must agree in batches, autocast, checkpointing and padding. A slot leaves
    the pack when it has taken its steps, when its loss is no longer finite, or when an operation of this slot alone
    fails. All slots go on from checkpoints of the same step, each written in a pack or alone. When a checkpoint of one
    slot is due, every slot writes one.

    Raises:
        ValueError: the checkpoints are of different steps.
    """
    laps, shared = Laps(meter.device), slots[0].config
    pack = Pack(model, [slot.name for slot in slots], seed)
    ended: dict[str, Ended] = {}
    enable_checkpointing(model, shared.checkpointing)
    model.train()
    autocasting = autocast(shared, meter.device)
    due = {slot.config.checkpoint_every: checkpoint_due(slot.config, len(rows)) for slot in slots if slot.checkpoints}
    fewer_operations = as_trained(model, shared, meter.device.type)
    with closing(pack), fewer_operations, Interruption(wanted=bool(due)) as interruption:
        running = [_SlotRun(slot, pack, rows, laps, meter) for slot in slots]
        static = _static_steps(model, pack, running, rows, seed, meter)
        step, *others = {run.step for run in running}
        if others:
            raise ValueError(f"slots cannot go on together from different steps: {sorted([step, *others])}")
        shaped = static.padded if static else lambda batch: batch
        steps = batches(rows, shared, pad_id=pad_id, seed=seed, device=meter.device, first=step, shaped=shaped)
        while True:
            leaving = [run for run in running if run.over]
            running = [run for run in running if run not in leaving]
            if leaving:
                pack.leave([run.slot.name for run in leaving])
                ended |= {run.slot.name: run.end(static.facts() if static else {}) for run in leaving}
                if static:
                    static.begin(pack.gradients, slots=len(running))
            if not running:
                break
            interruption.deliver()  # only here, because the weights of slots that have left are now on the disk
            laps.start()
            # ---- the step ----------------------------------------------------------------------
            micro_batches = next(steps)
            answer_tokens = sum(batch.answer_tokens for batch in micro_batches)
            losses = torch.zeros(len(running), device=meter.device)
            for number, batch in enumerate(micro_batches):
                parts = static(batch, answer_tokens, first=number == 0) if static else None
                if parts is None:
                    with autocasting:
                        parts = answer_losses(model, pack.for_all(batch)).view(len(running), -1).sum(1) / answer_tokens
                    _backward(running, parts)
                losses += parts.detach()
            for run in running:
                with run.isolated():
                    run.update()
            pack.zero_grad()
            # ------------------------------------------------------------------------------------
            laps.stop(static.end_step() if static else 0.0)
            meter.sample()
            step += 1
            pack.forget()
            for run, loss in zip(running, losses, strict=True):
                run.count(loss, micro_batches, len(running))
            as_slot = pack.evaluated_together if all(run.validation_due for run in running) else pack.alone
            for run in running:
                if run.error is None:
                    with run.isolated():
                        run.report(model, partial(as_slot, run.slot.name))
            due_now = [is_due(step) for is_due in due.values()]  # not any(): each call also restarts its interval
            for run in running:
                if any(due_now) or interruption.pending or run.over:
                    run.save()
    model.eval()
    return ended


def _backward(running: Sequence[_SlotRun], losses: torch.Tensor) -> None:
    """The backward of all slots at once, from the loss of each, [slots]."""
    scaled = [run.scaler.scale(loss) for run, loss in zip(running, losses, strict=True)]
    torch.stack(scaled).sum().backward()


def _static_steps(
    model: PeftModel, pack: Pack, running: Sequence[_SlotRun], rows: Sequence[Tokens], seed: int, meter: Meter
) -> StaticSteps | None:
    """The static steps of the pack; None where its steps do not run in static shapes."""
    longest = max(running, key=lambda run: run.steps).config
    sizes = sizes_of_run(rows, longest, seed, meter.device)
    return None if sizes is None else _static(model, pack, longest, sizes, meter)


def _static(model: PeftModel, pack: Pack, config: TrainConfig, sizes: Sequence[Size], meter: Meter) -> StaticSteps:
    def losses(batch: Batch) -> torch.Tensor:
        with autocast(config, meter.device):
            return answer_losses(model, pack.for_all(batch))

    reason = "the slots of a pack draw the numbers of their dropout by themselves" if pack.drops else None
    static = StaticSteps(model, config, losses, sizes, meter.device, reason)
    static.begin(pack.gradients, slots=len(pack.names))
    return static


def speedup(
    model: PeftModel, names: Sequence[str], rows: Sequence[Tokens], config: TrainConfig, *, pad_id: int, meter: Meter
) -> float:
    """The seconds of one step of each adapter in ``names``, divided by the seconds of one step of their pack.

    All weights are restored afterwards. Whole steps are timed, with clipping and optimizer, because a pack saves
    nothing in these: on an H100 a probe of forward and backward alone gave 4.33 where steps were 1.67 times as fast.
    Steps are captured where the training captures them. The batch is the longest of the first ones. Each side is
    warmed up, and both are timed in turn, twice, by the device's clock.
    """
    steps = batches(rows, config, pad_id=pad_id, seed=0, device=meter.device)
    first_batches = itertools.islice(itertools.chain.from_iterable(steps), PROBED_BATCHES)
    longest = max(first_batches, key=lambda batch: batch.input_ids.numel())
    model.train()
    enable_checkpointing(model, config.checkpointing)
    weights = [weight for name in names for weight in adapter_weights(model, name).values()]
    originals = [weight.detach().clone() for weight in weights]
    alone, together = list[float](), list[float]()
    for _ in range(2):
        alone += _seconds_alone(model, names[0], longest, config, meter)
        together += _seconds_together(model, names, longest, config, meter)
    with torch.no_grad():
        for weight, original in zip(weights, originals, strict=True):
            weight.copy_(original)
    return len(names) * min(alone) / min(together)


def _seconds_alone(model: PeftModel, name: str, batch: Batch, config: TrainConfig, meter: Meter) -> list[float]:
    """The seconds of each of ``PROBED_STEPS`` warmed-up steps of the adapter ``name`` without a pack."""
    model.set_adapter(name)
    weights = list(adapter_weights(model, name).values())
    slots = [(weights, make_optimizer(nn.Module(), config, weights))]
    with as_trained(model, config, meter.device.type):
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        static = None
        if captures(config, meter.device):
            static = StaticSteps(model, config, partial(answer_losses, model), _probe_sizes(batch), meter.device)
            static.begin(gradients)
        seconds = _timed(partial(answer_losses, model), static, slots, gradients, batch, config, meter)
    for weight in weights:
        weight.grad = None
    return seconds


def _seconds_together(
    model: PeftModel, names: Sequence[str], batch: Batch, config: TrainConfig, meter: Meter
) -> list[float]:
    """The seconds of each of ``PROBED_STEPS`` warmed-up steps of the adapters ``names`` as a pack."""

    def losses(batch: Batch) -> torch.Tensor:
        return answer_losses(model, pack.for_all(batch))

    with closing(Pack(model, names, seed=0)) as pack, as_trained(model, config, meter.device.type):
        trained = [optimized(pack, name, config) for name in names]
        slots = [(weights, make_optimizer(nn.Module(), config, weights)) for weights in trained]
        static = _static(model, pack, config, _probe_sizes(batch), meter) if captures(config, meter.device) else None
        return _timed(losses, static, slots, pack.gradients, batch, config, meter)


def _probe_sizes(batch: Batch) -> list[Size]:
    """The sizes of the micro-batches of a probe, all of which are ``batch``; enough of them to have it captured."""
    size = Size(batch.input_ids.shape[1], batch.tokens, batch.answer_tokens)
    return [size] * (WARMUP_PASSES + WARMUP_LAPS + PROBED_STEPS + MIN_BATCHES_TO_CAPTURE)


def _timed(
    losses: Callable[[Batch], torch.Tensor],
    static: StaticSteps | None,
    slots: Sequence[tuple[list[nn.Parameter], torch.optim.Optimizer]],
    gradients: list[torch.Tensor],
    batch: Batch,
    config: TrainConfig,
    meter: Meter,
) -> list[float]:
    """The seconds of each of ``PROBED_STEPS`` steps, after the warm-up steps.

    ``losses`` returns the loss of each answer token; ``slots`` holds the weights and the optimizer of each slot.
    """
    laps, warmup = Laps(meter.device), WARMUP_LAPS + (WARMUP_PASSES if static else 0)
    batch = static.padded(batch) if static else batch
    for _ in range(warmup + PROBED_STEPS):
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
    """The parameters that a slot's optimizer steps: one row of all its weights if the optimizer is elementwise."""
    row = pack.row(name) if find_optimizer(config.optimizer) in ELEMENTWISE else None
    return [*pack.weights(name).values()] if row is None else [row]


class _SlotRun(Run):
    """The training of one slot; an error in an operation of this slot alone ends only this slot."""

    def __init__(self, slot: Slot, pack: Pack, rows: Sequence[Tokens], laps: Laps, meter: Meter) -> None:
        weights = {
            name.replace(f".{slot.name}.", f".{DEFAULT}."): weight for name, weight in pack.weights(slot.name).items()
        }
        trained = optimized(pack, slot.name, slot.config)
        optimizer = make_optimizer(nn.Module(), slot.config, trained)
        slot_laps = _SlotLaps(laps)
        super().__init__(
            slot.config, len(rows), weights, optimizer, slot_laps, meter, slot.log, slot.validate, slot.prune
        )
        self.parameters = trained
        self.slot, self._pack = slot, pack
        is_row = trained[0] is pack.row(slot.name)
        state = _RowState(optimizer, [*weights.values()], pack) if is_row else _OptimizerState(optimizer)
        self._checkpointed = self.parts(_Weights(weights), state, _DropoutState(pack.dropout(slot.name)))
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
        """In the block an error ends this slot alone, but for lack of memory or disk, or a trial that others took."""
        try:
            yield
        except Exception as error:
            if out_of_memory(error) or isinstance(error, claims.Claimed) or store.unwritable(error):
                raise
            self.error = error

    def save(self) -> None:
        """Write a checkpoint, as the trial alone would, unless the slot has taken its last step or has failed."""
        if self.slot.checkpoints and not self.complete and self.error is None:
            with self.meter.stage("checkpoint"):
                self.slot.checkpoints.save(self.step, self._checkpointed)

    def end(self, facts: dict[str, Any]) -> Ended:
        """How the slot ended, after it has left the pack; the weights of a complete training are on the disk then.

        ``facts`` are those of ``StaticSteps``.
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


# ---- the checkpoint of a slot, which has the format of the trial alone -----------------------------


class _SlotLaps(Laps):
    """The laps of a slot: those that its checkpoint holds, followed by the laps of the pack."""

    def __init__(self, laps: Laps) -> None:
        self._resumed: list[float] = []
        self._laps = laps

    def resume(self, seconds: list[float]) -> None:
        self._resumed = seconds

    def seconds(self) -> list[float]:
        return self._resumed + self._laps.seconds()


class _Weights:
    """The weights of one slot, in the format in which ``checkpoint.Weights`` keeps those of a plain LoRA."""

    def __init__(self, weights: dict[str, nn.Parameter]) -> None:
        self._weights = weights

    def state_dict(self) -> dict[str, Any]:
        parameters = {name: _copied(weight) for name, weight in self._weights.items()}
        return {"parameters": parameters, "trained": [*parameters], "buffers": {}, "attributes": {}}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, weight in self._weights.items():
            weight.copy_(state["parameters"][name])


class _OptimizerState(OptimizerState):
    """An optimizer's state, saved with contiguous tensors and loaded with the strides of the pack's weights."""

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = tree_map_only(torch.Tensor, _copied, super().state_dict())
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        for weight, values in self._optimizer.state.items():
            for name, value in values.items():
                if isinstance(value, torch.Tensor) and value.shape == weight.shape:
                    values[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)


class _RowState(OptimizerState):
    """The state of an optimizer that steps one row of all ``weights``.

    It is saved and loaded as the state of an optimizer that steps each of ``weights``, so that the trial alone can
    go on from it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, weights: Sequence[nn.Parameter], pack: Pack) -> None:
        super().__init__(optimizer)
        self._weights, self._pack = weights, pack
        (self._row,) = optimizer.param_groups[0]["params"]

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        row_state: dict[str, Any] = state["state"].get(0, {})
        weight_states = {
            number: {name: self._part(value, weight) for name, value in row_state.items()}
            for number, weight in enumerate(self._weights if row_state else ())
        }
        (group,) = state["param_groups"]
        return {"state": weight_states, "param_groups": [group | {"params": [*range(len(self._weights))]}]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        (group,) = state["param_groups"]
        row_state: dict[str, Any] = {}
        for number, weight in enumerate(self._weights if state["state"] else ()):
            for name, value in state["state"][number].items():
                if not isinstance(value, torch.Tensor) or value.shape != weight.shape:
                    row_state[name] = value
                    continue
                if name not in row_state:
                    row_state[name] = torch.zeros_like(self._row, dtype=value.dtype, requires_grad=False)
                self._pack.part_of(row_state[name], weight).copy_(value)
        states = {0: row_state} if row_state else {}
        super().load_state_dict({"state": states, "param_groups": [group | {"params": [0]}]})

    def _part(self, value: Any, weight: nn.Parameter) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return _copied(self._pack.part_of(value, weight) if value.shape == self._row.shape else value)


class _DropoutState:
    """The state of a slot's dropout generator, in the format of ``checkpoint.Randomness``."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def state_dict(self) -> dict[str, Any]:
        state = self._generator.get_state()
        if self._generator.device.type == "cpu":
            return {"cpu": state, "cuda": []}
        return {"cpu": torch.get_rng_state(), "cuda": [state] * torch.cuda.device_count()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        on_cpu, index = self._generator.device.type == "cpu", self._generator.device.index or 0
        self._generator.set_state(state["cpu"] if on_cpu else state["cuda"][index])


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy in memory of its own, so that a checkpoint does not hold the whole row."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)
