"""The state of a training on the disk, from which an interrupted training continues with the same numbers.

On the same CPU with the same kernels, versions and thread count the rest of the training is the same to the bit; on
another, or on a GPU, within rounding. The state itself is kept to the bit.

A part of the training is whatever has torch's ``state_dict`` and ``load_state_dict``.
"""

from __future__ import annotations

import copy
import logging
import os
import shutil
import signal
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol, Self

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from peftsweep.models.parts import trainable_parameters
from peftsweep.observe.measure import out_of_memory
from peftsweep.study import record
from peftsweep.study.atomic import make_way, persistently, replacing, sync
from peftsweep.study.owner import left_to_parent
from peftsweep.study.reading import NUMBER, Unreadable, check

log = logging.getLogger(__name__)

FORMAT = 2
TRAINED = "trained.pt"  # in a folder of checkpoints: the weights that a whole training ended with
CONTENT = {
    **{"stamp": dict, "step": int, "rows": int, "state": {"*": object}},
    **{"seconds?": {"*": NUMBER}, "memory?": {"*": dict}, "trained?": dict},
}
# Classes of PEFT, and what beside parameters and buffers changes in them from step to step.
CHANGING = {
    "RankAllocator": ("ipt", "exp_avg_ipt", "exp_avg_unc"),
    "AdaLoraConfig": ("rank_pattern",),
    "AdamssLayer": ("exp_avg_ipt_A", "exp_avg_ipt_B", "exp_avg_unc_A", "exp_avg_unc_B"),
    "BufferedMontecloraSampler": ("buffer", "index"),
    "PveraLayer": ("pvera_generator",),
}
ALLOCATED = {"AdaLoraConfig": ("rank_pattern",)}  # attributes by which the forward, and the saved adapter, choose ranks


class Part(Protocol):
    """A part of the training whose state can be saved and restored."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and text, in dicts, lists and tuples."""

    def load_state_dict(self, state: dict[str, Any], /) -> Any:
        """Restore a state that ``state_dict`` returned."""


# ---- signals ---------------------------------------------------------------------------------------


class Interruption:
    """Delays signals that end a training until the running step is over and its checkpoint is written.

    It delays the signals in ``SECONDS`` that have a Python handler: Ctrl-C, a scheduler's SIGTERM, a hangup, and the
    signal before SLURM's preemption, whose handler puts the job back into the queue. A second signal is delivered at
    once. So is one that has waited as long as ``SECONDS`` allows.
    """

    SECONDS: Mapping[int, float] = {
        signal.SIGINT: 20.0,
        signal.SIGTERM: 20.0,
        signal.SIGHUP: 20.0,
        signal.SIGUSR1: 90.0,
        signal.SIGUSR2: 90.0,
    }

    def __init__(self, *, wanted: bool) -> None:
        self._wanted = wanted and threading.current_thread() is threading.main_thread()
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._overdue: threading.Timer | None = None
        self.pending: int | None = None  # the signal that is held

    def __enter__(self) -> Self:
        for number in self.SECONDS if self._wanted else ():
            if callable(handler := signal.getsignal(number)) and handler is not left_to_parent:
                self._handlers[number] = handler
                signal.signal(number, self._hold)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self.deliver()

    def _hold(self, number: int, frame: FrameType | None) -> None:
        if self.pending is not None:
            self.deliver()
            return
        self.pending = number
        self._overdue = threading.Timer(self.SECONDS[number], os.kill, (os.getpid(), number))
        self._overdue.daemon = True
        self._overdue.start()

    def deliver(self) -> None:
        """Call the handler of the delayed signal, if there is one; most handlers raise."""
        number, self.pending = self.pending, None
        if number is not None and self._overdue is not None:
            self._overdue.cancel()
            self._handlers[number](number, None)


# ---- the files -------------------------------------------------------------------------------------


def stamp(training: str, device: torch.device, since: int = 1) -> dict[str, Any]:
    """The values that must be equal for a training to continue: its identity, the device, the packages' versions.

    With ``since`` above 1, checkpoints of earlier versions of the identity's rule do not match.
    """
    values = {
        "format": FORMAT,
        "training": training,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "packages": record.packages(),
    }
    return values | ({"since": since} if since > 1 else {})


class Checkpoints:
    """The checkpoints of one training, of which ``folder`` keeps the newest.

    A checkpoint also holds the length of steps.jsonl (the file ``rows``) at that time. Once there is a checkpoint, a
    kill at any moment leaves a complete one. Checkpoints with one of the stamps ``also`` are usable too.
    """

    def __init__(self, folder: Path, stamp: dict[str, Any], rows: Path, also: Sequence[dict[str, Any]] = ()) -> None:
        self._folder, self._stamps, self._rows = folder, [stamp, *also], rows
        self.check: Callable[[], None] = lambda: None  # raises an error where no checkpoint may be written any more
        self.seconds: Callable[[], dict[str, float]] = dict  # the trial's seconds until now, by stage; saved
        self.memory: Callable[[], dict[str, dict[str, Any]]] = dict  # the memory of its stages until now; saved
        self.earlier: dict[str, float] = {}  # the seconds that the checkpoint found holds
        self.earlier_memory: dict[str, dict[str, Any]] = {}  # the memory that it holds
        self.trained: dict[str, Any] | None = None  # the fields of Trained, if it was written at the end of training
        self._found: dict[str, Any] | None = None
        self._file = folder  # the file of the checkpoint found

    def find(self) -> int:
        """The step of the newest usable checkpoint, which is kept for ``restore``; 0 without one.

        The lines that were appended to steps.jsonl after this checkpoint are cut off.
        """
        steps = sorted(self._folder.glob("step-*.pt"), key=lambda file: (len(file.name), file.name), reverse=True)
        for file in [*self._folder.glob(TRAINED), *steps]:
            try:
                found = self._read(file)
            except Exception as error:  # torch raises any type of error for a damaged file
                reason = (str(error).splitlines() or [""])[0]
                log.warning("the checkpoint %s is ignored: %s: %s", file.name, type(error).__name__, reason)
                continue
            os.truncate(self._rows, found["rows"])
            self._found, self._file, self.trained = found, file, found.get("trained")
            self.earlier, self.earlier_memory = found.get("seconds", {}), found.get("memory", {})
            return int(found["step"])
        return 0

    def _read(self, file: Path) -> dict[str, Any]:
        found: dict[str, Any] = torch.load(file, weights_only=True)  # every tensor on the device it was on
        check(found, CONTENT, file.name)
        if found["stamp"] not in self._stamps:
            raise ValueError("it is of another training, device or version of a package")
        if self._rows.stat().st_size < found["rows"]:
            raise ValueError(f"{self._rows.name} is shorter than it was then")
        return found

    def restore(self, parts: Mapping[str, Part]) -> None:
        """Load the state of the checkpoint found, if any, into ``parts``.

        Raises:
            Unreadable: the state does not fit these parts; the checkpoint is deleted, so that the next run starts anew.
        """
        found, self._found = self._found, None  # frees its memory before the training goes on
        if found is None:
            return
        try:
            for name, part in parts.items():
                part.load_state_dict(found["state"][name])
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:  # of torch or a part
            if out_of_memory(error):
                raise
            self.clear()
            reason = (str(error).splitlines() or [""])[0]
            raise Unreadable(
                f"{self._file}: {type(error).__name__}: {reason}; it is deleted, the same command begins anew"
            ) from error

    def save(self, step: int, parts: Mapping[str, Part], trained: dict[str, Any] | None = None) -> None:
        """Write a checkpoint and delete the previous one; the new one is on the disk when this returns.

        ``trained``: at the end of a training, the fields of ``Trained``; ``parts`` then needs the weights alone.
        """
        self.check()
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / (f"step-{step}.pt" if trained is None else TRAINED)
        make_way(file)
        sync(self._rows)
        content = {
            "stamp": self._stamps[0],
            "step": step,
            "seconds": self.seconds(),
            "memory": self.memory(),
            "rows": self._rows.stat().st_size,
            "state": {name: part.state_dict() for name, part in parts.items()},
        } | ({} if trained is None else {"trained": trained})

        def write() -> None:
            with replacing(file) as temporary, temporary.open("wb") as stream, _errors_of_the_disk():
                torch.save(content, stream)

        persistently(write)
        sync(self._folder)
        for other in self._folder.iterdir():
            if other.is_dir() and not other.is_symlink():
                shutil.rmtree(other)
            elif other != file:
                other.unlink()

    def clear(self) -> None:
        """Delete all checkpoints."""
        shutil.rmtree(self._folder, ignore_errors=True)


@contextmanager
def _errors_of_the_disk() -> Iterator[None]:
    """Raise the error of the disk that ended ``torch.save`` in the block.

    torch then fails to end the file that it has begun, and raises a RuntimeError about that instead.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


# ---- the parts -------------------------------------------------------------------------------------


class Weights:
    """The state of a model that training changes: trainable parameters, buffers and counters of the method."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._parameters = dict(trainable_parameters(model))
        self._buffers = {name: (weakref.ref(buffer), buffer._version) for name, buffer in model.named_buffers()}

    def state_dict(self) -> dict[str, Any]:
        """By name: the parameters and which of them still train, the changed buffers, the method's own attributes."""
        return {
            "parameters": {name: p.detach() for name, p in self._parameters.items()},
            "trained": [name for name, p in self._parameters.items() if p.requires_grad],  # AdaMSS drops subspaces
            "buffers": {name: buffer.detach() for name, buffer in self._changed_buffers()},
            "attributes": {name: _saved(getattr(holder, key)) for name, holder, key in _attributes(self._model)},
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state in a model that was built in the same way."""
        for name, parameter in self._parameters.items():
            parameter.copy_(state["parameters"][name])
            parameter.requires_grad_(name in state["trained"])
        buffers = dict(self._model.named_buffers())
        for name, value in state["buffers"].items():
            buffers[name].copy_(value)
        for name, holder, key in list(_attributes(self._model)):
            setattr(holder, key, _restored(getattr(holder, key), state["attributes"][name]))

    def _changed_buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The buffers that training has changed. All buffers of a quantised base or of BOFT would be gigabytes."""
        for name, buffer in self._model.named_buffers():
            first, version = self._buffers.get(name, (None, None))
            owner = self._model.get_submodule(name.rpartition(".")[0])
            # The statistics of a batch norm change without a new ``_version``.
            if first is not None and (
                first() is not buffer or buffer._version != version or isinstance(owner, _NormBase)
            ):
                yield name, buffer


class AllocatedRanks:
    """The ranks that a method has allocated to its modules. They are no parameters, but the forward depends on them."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def state_dict(self) -> dict[str, Any]:
        """The ranks by the names of their configurations; empty for other methods."""
        return {name: copy.deepcopy(getattr(holder, key)) for name, holder, key in _attributes(self._model, ALLOCATED)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Deal the ranks out as they were."""
        for name, holder, key in list(_attributes(self._model, ALLOCATED)):
            setattr(holder, key, state[name])


def _attributes(model: nn.Module, kinds: Mapping[str, Sequence[str]] = CHANGING) -> Iterator[tuple[str, Any, str]]:
    """Every attribute of ``kinds`` in ``model``: a name, the object that has it, the attribute's name."""
    holders = [(f"peft_config.{name}", config) for name, config in getattr(model, "peft_config", {}).items()]
    for name, module in model.named_modules():
        holders += [(name, module), *((f"{name}.{key}", value) for key, value in vars(module).items())]
    for name, holder in holders:
        for kind in type(holder).__mro__:
            for key in kinds.get(kind.__name__, ()):
                yield f"{name}.{key}", holder, key


def _saved(value: Any) -> Any:
    """``value`` with each random number generator replaced by its state, which can be saved."""
    if isinstance(value, dict):
        return {key: _saved(element) for key, element in value.items()}
    return value.get_state() if isinstance(value, torch.Generator) else value


def _restored(current: Any, saved: Any) -> Any:
    """The value that ``_saved`` was given; the generators are those in ``current``, set to the saved states."""
    if isinstance(saved, dict) and isinstance(current, dict):
        return {key: _restored(current.get(key), element) for key, element in saved.items()}
    return current.set_state(saved) if isinstance(current, torch.Generator) else saved


class OptimizerState:
    """An optimizer's state, restored to the bit: torch alone would round it to the parameters' dtype when loading."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """The state of the optimizer."""
        return self._optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state, and restore the values that torch has rounded."""
        self._optimizer.load_state_dict(state)
        parameters = list(chain.from_iterable(group["params"] for group in self._optimizer.param_groups))
        for key, values in state["state"].items():
            loaded = self._optimizer.state[parameters[key] if isinstance(key, int) else key]  # LoRA-FA's keys are names
            for name, value in values.items():
                rounded = loaded.get(name)
                both = isinstance(value, torch.Tensor) and isinstance(rounded, torch.Tensor)
                if both and rounded.dtype != value.dtype:
                    loaded[name] = value.to(rounded.device)


class Randomness:
    """The state of torch's random number generators: of the CPU, and of all CUDA devices if ``device`` is one."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"

    def state_dict(self) -> dict[str, Any]:
        """The generators' states."""
        return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if self._on_gpu else []}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the generators."""
        torch.set_rng_state(state["cpu"])
        if self._on_gpu:
            torch.cuda.set_rng_state_all(state["cuda"])
