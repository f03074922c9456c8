"""Several LoRA adapters trained at once on one frozen base, each to the numbers it would come to alone.

The lanes of a pack see the same rows in the same order. A batch holds these rows once for each lane, lane after
lane; the base is multiplied with all of them at once (quantised weights are unpacked once for all), each
adapter with its own. PEFT's adapters stay the storage: while they are packed, their weights are
parts of larger tensors.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from bitsandbytes.nn.modules import Linear8bitLt
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from peftsweep.data import Batch, Tokens
from peftsweep.measure import Laps, Meter, out_of_memory
from peftsweep.model import QUANTISED, answer_logits, answer_losses
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

# ---- the layer -------------------------------------------------------------------------------------


@dataclass
class _Bank:
    """The adapters of one layer, ranks filled up with zeros to the largest, R.

    Shapes: ``a`` [adapters, R, in], ``b`` [adapters, R, out], ``scale`` [adapters, 1, 1]. A filled-up part has no
    gradient that anybody takes, and stays zero.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: torch.Tensor
    lanes: torch.Tensor | None  # the places in the pack of those that have an adapter here; None: all have
    dropout: list[tuple[float, torch.Generator]]


class Pack:
    """The adapters ``names`` of ``model``, trained together from here to ``close``; some may ``leave`` before.

    A forward pass then takes a batch made by ``for_all``. ``seed`` is that of every lane's dropout.
    """

    def __init__(self, model: PeftModel, names: Sequence[str], seed: int) -> None:
        self.names = list(names)
        self.model = model
        device = next(model.parameters()).device
        self._generators = {name: torch.Generator(device).manual_seed(seed) for name in names}
        self._layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
        self._banks: dict[Any, _Bank] = {}
        self._gradients: list[torch.Tensor] = []
        self._packed = True
        self._rows = 0  # of each lane, in this forward pass
        self._fill()
        for layer in self._layers:
            vars(layer)["forward"] = partial(self._forward, layer)
        self._patched: list[Any] = [*self._layers]
        if device.type == "cuda":
            self._patched += [self._apart(module) for module in model.modules() if isinstance(module, Linear8bitLt)]
        self._hooks = self._share_first_layers()

    def for_all(self, batch: Batch) -> Batch:
        """``batch`` once for each lane, lane after lane, as the model takes it."""
        lanes, self._rows = len(self.names), len(batch.input_ids)
        return replace(
            batch,
            input_ids=batch.input_ids.repeat(lanes, 1),
            attention_mask=batch.attention_mask.repeat(lanes, 1),
            answer_mask=batch.answer_mask.repeat(lanes, 1),
        )

    def weights(self, name: str) -> dict[str, nn.Parameter]:
        """The parameters of an adapter by their names in the model, in their order there."""
        parts = ("lora_A", "lora_B")
        return {
            parameter: weight
            for parameter, weight in self.model.named_parameters()
            if parameter.rsplit(".", 3)[1] in parts and parameter.rsplit(".", 3)[2] == name
        }

    def leave(self, names: Sequence[str]) -> None:
        """Let these adapters go, as PEFT had them; the rest is packed anew."""
        self._free()
        self.names = [name for name in self.names if name not in names]
        self._fill()

    def zero_grad(self) -> None:
        """Forget all gradients."""
        if self._gradients:
            torch._foreach_zero_(self._gradients)

    @contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """In the block the model is that of one adapter, and takes any number of rows."""
        self._packed = False
        self.model.set_adapter(name)
        try:
            yield
        finally:
            self._packed = True

    def close(self) -> None:
        """Make the model again what PEFT made it."""
        self._free()
        for module in self._patched:
            del vars(module)["forward"]
        for hook in self._hooks:
            hook.remove()

    def _fill(self) -> None:
        for layer in self._layers:
            if names := [name for name in self.names if name in layer.lora_A]:
                self._banks[layer] = self._bank(layer, names)
        tensors = [tensor for bank in self._banks.values() for tensor in (bank.a, bank.b)]
        self._gradients = [tensor.grad for tensor in tensors if tensor.grad is not None]

    def _bank(self, layer: Any, names: list[str]) -> _Bank:
        like = layer.lora_A[names[0]].weight
        rank = max(layer.r[name] for name in names)
        a = like.new_zeros(len(names), rank, layer.in_features)
        b = like.new_zeros(len(names), rank, layer.out_features)
        a.grad, b.grad = torch.zeros_like(a), torch.zeros_like(b)
        for place, name in enumerate(names):
            own = slice(layer.r[name])
            for weight, part, gradient in (
                (layer.lora_A[name].weight, a[place, own], a.grad[place, own]),
                (layer.lora_B[name].weight, b[place, own].T, b.grad[place, own].T),
            ):
                part.copy_(weight.data)
                weight.data, weight.grad = part, gradient
        scale = torch.tensor([layer.scaling[name] for name in names], device=like.device)
        places = [self.names.index(name) for name in names]
        return _Bank(
            a.requires_grad_(),
            b.requires_grad_(),
            scale[:, None, None],
            None if len(places) == len(self.names) else torch.tensor(places, device=like.device),
            [(getattr(layer.lora_dropout[name], "p", 0.0), self._generators[name]) for name in names],
        )

    def _free(self) -> None:
        for layer in self._banks:
            for name in self.names:
                for weights in (layer.lora_A, layer.lora_B):
                    if name in weights:
                        weight = weights[name].weight
                        weight.grad, weight.data = None, weight.data.clone(memory_format=torch.contiguous_format)
        self._banks.clear()
        self._gradients = []

    def _forward(self, layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The layer's output for the rows of all lanes: [lanes * rows, ..., out]."""
        if not self._packed:
            output: torch.Tensor = type(layer).forward(layer, x, *args, **kwargs)
            return output
        result: torch.Tensor = layer.base_layer(x, *args, **kwargs)
        bank = self._banks.get(layer)
        if bank is None:
            return result
        lanes = len(self.names)
        if x.ndim != 3 or len(x) != lanes * self._rows:
            raise ValueError(f"a layer that is given {list(x.shape)} in place of all rows cannot be packed")
        mine = x.reshape(lanes, -1, x.shape[-1])
        mine = (mine if bank.lanes is None else mine[bank.lanes]).to(bank.a.dtype)
        if layer.training and any(p for p, _ in bank.dropout):
            mine = mine * _noise(mine, bank.dropout)
        update = torch.bmm(torch.bmm(mine, bank.a.mT), bank.b) * bank.scale
        if isinstance(layer.base_layer, QUANTISED):
            update = update.to(result.dtype)  # PEFT adds in the base's format there, elsewhere in the adapter's
        flat = result.reshape(lanes, -1, result.shape[-1])
        added = flat + update if bank.lanes is None else flat.to(update.dtype).index_add(0, bank.lanes, update)
        return added.reshape(result.shape).to(result.dtype)

    def _apart(self, module: Linear8bitLt) -> Linear8bitLt:
        """Have an 8-bit layer of CUDA look at each lane by itself.

        Which columns it takes for outliers, and so how it rounds, depends on all rows that it is given at once.
        """

        def forward(x: torch.Tensor) -> torch.Tensor:
            lanes = len(self.names) if self._packed and len(x) == len(self.names) * self._rows else 1
            return torch.cat([Linear8bitLt.forward(module, part) for part in x.chunk(lanes)])

        vars(module)["forward"] = forward
        return module

    def _share_first_layers(self) -> list[Any]:
        """Have the layers before the first adapted one see the rows once, as all lanes are the same there."""
        before = _before_the_adapters(self.model)

        def once(_: nn.Module, args: Any, kwargs: Any) -> Any:
            every = len(self.names) * self._rows
            return _each(lambda t: t[: self._rows] if self._packed and len(t) == every else t, (args, kwargs))

        def for_all(_: nn.Module, args: Any, kwargs: Any) -> Any:
            lanes = len(self.names)
            return _each(
                lambda t: torch.cat([t] * lanes) if self._packed and len(t) == self._rows else t, (args, kwargs)
            )

        hooks = [layer.register_forward_pre_hook(once, with_kwargs=True) for layer in before[:-1]]
        return [*hooks, *(layer.register_forward_pre_hook(for_all, with_kwargs=True) for layer in before[-1:])]


def _noise(x: torch.Tensor, dropout: Sequence[tuple[float, torch.Generator]]) -> torch.Tensor:
    """What dropout multiplies ``x`` with, [adapters, rows, in]: on a CPU each lane's numbers are those of torch's own.

    Every lane draws from its own generator, so that its numbers do not depend on the other lanes.
    """
    noise = torch.ones_like(x)
    for mine, (p, generator) in zip(noise, dropout, strict=True):
        if p:
            mine.bernoulli_(1 - p, generator=generator).div_(1 - p)
    return noise


def _before_the_adapters(model: nn.Module) -> list[nn.Module]:
    """The layers of the model's stack up to and with the first adapted one; none if there is nothing to share."""
    adapted = {module for module in model.modules() if isinstance(module, LoraLayer)}
    for stack in model.modules():
        if isinstance(stack, nn.ModuleList) and adapted <= set(stack.modules()):
            first = next(n for n, layer in enumerate(stack) if adapted & set(layer.modules()))
            return list(stack)[: first + 1] if first else []
    return []


def _each(change: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """``value`` with every tensor in it that has rows changed."""
    if isinstance(value, torch.Tensor):
        return change(value) if value.ndim > 1 else value
    if isinstance(value, tuple | list):
        return type(value)(_each(change, one) for one in value)
    if isinstance(value, dict):
        return {key: _each(change, one) for key, one in value.items()}
    return value


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
            for one, loss in zip(running, losses, strict=True):
                one.after_step(loss, micro_batches)
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

    def after_step(self, loss: torch.Tensor, batches: Sequence[Batch]) -> None:
        """Log, validate, see whether it is over."""
        if self.error is not None:
            return
        with self._own():
            progress, config = self._progress, self.config
            progress.add(loss, batches)
            self._epoch.add(loss, batches)
            step = progress.step
            self.over = step == self._steps or self.lane.stop(step)
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
            if self.lane.validate and self._every and (step % self._every == 0 or self.over):
                self._validate(self.lane.validate, numbers)

    def _validate(self, validate: Callable[[], dict[str, float]], numbers: Row) -> None:
        with self._meter.stage("validate"), self._pack.alone(self.lane.name):
            scores = validate()
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
