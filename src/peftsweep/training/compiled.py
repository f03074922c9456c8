"""torch.compile for the training step: its seconds, its graphs, and the reason where it is off.

The model is compiled on real batches before the first step, so that the seconds of compiling are apart from those of
the steps. Where a step compiles again, for a new shape, the seconds of that are subtracted from the step's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import nn

from peftsweep.data.batches import Batch
from peftsweep.errors import InputError, first_line, suggest
from peftsweep.observe.measure import Meter
from peftsweep.schema import TrainConfig

log = logging.getLogger(__name__)

NONE = "none"
PROBED_BATCHES = 200  # first batches that are searched for one of another length and one with fewer rows
TOLERANCE = 0.05  # relative difference of the loss: a compiled model rounds, and draws for dropout, in another way


@dataclass
class Compilation:
    """The compiled ``model``; or the model itself, and ``off``, the reason why it is not compiled."""

    model: nn.Module
    off: str | None = None
    _total_seconds: float = 0.0  # of compiling in this process, when last read
    _step_seconds: float = 0.0  # of compiling within steps
    _first_graphs: int = 0  # graphs that were compiled before the first step

    def begin_steps(self) -> None:
        """Count every graph that is compiled from here on as a recompilation."""
        self._first_graphs, self._total_seconds = _graphs(), _seconds()

    def end_step(self) -> float:
        """The seconds of compiling in the step that has just ended."""
        if self.off is not None:
            return 0.0
        before, self._total_seconds = self._total_seconds, _seconds()
        self._step_seconds += self._total_seconds - before
        return self._total_seconds - before

    def facts(self) -> dict[str, Any]:
        """For the record: the graphs, the breaks between them, and the recompilations within steps."""
        if self.off is not None:
            return {} if self.off == NONE else {"compile_off": self.off}
        from torch._dynamo.utils import counters

        return {
            "recompile_seconds": self._step_seconds,
            "compile_graphs": _graphs(),
            "compile_graph_breaks": sum(counters["graph_break"].values()),
            "compile_recompiles": _graphs() - self._first_graphs,
        }


def check(config: TrainConfig) -> None:
    """Refuse a ``train.compile`` that names no backend.

    Raises:
        InputError: torch has no such backend; the message lists those that it has.
    """
    if config.compile == NONE:
        return
    known = [NONE, "eager", "aot_eager", *torch.compiler.list_backends()]
    if config.compile not in known:
        raise InputError(f"train.compile={config.compile}: no such backend; {suggest(config.compile, known)}")


# In a block of `compile_once`: its compilations, by model and options. Empty outside of such a block.
_KEPT: list[dict[tuple[int, str, bool | None], Compilation]] = []


@contextmanager
def compile_once() -> Iterator[None]:
    """In this block a model is compiled at its first training; later trainings (a profiler's) use the same graphs."""
    if _KEPT:  # within another such block
        yield
        return
    _KEPT.append({})
    try:
        yield
    finally:
        if _KEPT.pop():
            import torch._dynamo

            torch._dynamo.reset()


@contextmanager
def compiled(
    model: nn.Module,
    config: TrainConfig,
    batches: Callable[[], Iterator[Batch]],
    losses: Callable[[nn.Module, Batch], torch.Tensor],
    meter: Meter,
) -> Iterator[Compilation]:
    """``model`` compiled as ``train.compile`` says, after a try on batches of different shapes; it has no gradients.

    ``batches`` starts the run's micro-batches from the first; ``losses`` is the step's own forward. Where compiling
    fails, or the compiled model has another loss, the model is not compiled, and ``Compilation.off`` is the reason.
    """
    if config.compile == NONE:
        yield Compilation(model, off=NONE)
        return
    key = id(model), config.compile, config.compile_dynamic
    if _KEPT and (kept := _KEPT[0].get(key)):
        kept.begin_steps()
        yield kept
        return
    import torch._dynamo.utils

    torch._dynamo.reset()  # drops the graphs and counters of earlier trials of this process
    torch._dynamo.utils.counters.clear()
    called: Any = torch.compile(model, backend=config.compile, dynamic=config.compile_dynamic)
    compilation = Compilation(called)
    with meter.stage("compile"):
        try:
            for batch in _different_shapes(batches):
                _try(model, called, batch, losses)
        except Exception as error:  # dynamo, a backend and a C++ compiler raise errors of any type
            log.warning("train.compile=%s is off: %s", config.compile, error)
            compilation = Compilation(model, off=first_line(error))
        finally:
            model.zero_grad(set_to_none=True)
    compilation.begin_steps()
    if _KEPT:
        _KEPT[0][key] = compilation
    try:
        yield compilation
    finally:
        if not _KEPT:
            torch._dynamo.reset()


def _try(model: nn.Module, called: nn.Module, batch: Batch, losses: Callable[[nn.Module, Batch], torch.Tensor]) -> None:
    """Compile for ``batch``, forward and backward, and compare the loss with the eager one."""
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        eager = losses(model, batch).mean().item()
    loss = losses(called, batch).mean()
    loss.backward()
    if not abs(loss.item() - eager) <= TOLERANCE * abs(eager):
        raise ArithmeticError(f"the compiled model's loss is {loss.item():.4f}, the eager one's {eager:.4f}")


def _different_shapes(batches: Callable[[], Iterator[Batch]]) -> list[Batch]:
    """The first batch, and the first ones of another length and of another number of rows."""
    shape = next(batches()).input_ids.shape
    others = (
        next(
            (batch for batch in islice(batches(), PROBED_BATCHES) if batch.input_ids.shape[axis] != shape[axis]),
            None,
        )
        for axis in (1, 0)
    )
    return [next(batches()), *(batch for batch in others if batch is not None)]


def _graphs() -> int:
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def _seconds() -> float:
    from torch._dynamo.utils import calculate_time_spent

    return float(calculate_time_spent().get("total_wall_time", 0.0))
