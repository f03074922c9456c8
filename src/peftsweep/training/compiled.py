"""torch.compile around the training step, with its cost, its graphs, and the reason where it is off.

Compiling is tried on real batches before the first step, so that its seconds stand apart from the
steps; what is compiled anew in a step, for a shape not seen before, is taken out of that step's time.
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
from peftsweep.errors import InputError, suggest
from peftsweep.observe.measure import Meter
from peftsweep.schema import TrainConfig

log = logging.getLogger(__name__)

NONE = "none"
PROBED_BATCHES = 200  # batches, for one of another length and one of fewer rows
TOLERANCE = 0.05  # of the loss: dropout draws other numbers when compiled, rounding differs


@dataclass
class Compilation:
    """The compiled ``model``, or the model itself where compiling is off, and the reason then."""

    model: nn.Module
    off: str | None = None
    _spent: float = 0.0  # seconds of compiling in this process, at the last look
    _recompiling: float = 0.0  # of them in the steps
    _before: int = 0  # graphs when the steps began

    def begin_steps(self) -> None:
        """Count every graph that is compiled from here on as a recompilation."""
        self._before, self._spent = _graphs(), _seconds()

    def end_step(self) -> float:
        """The seconds of compiling in the step that has just ended."""
        if self.off is not None:
            return 0.0
        before, self._spent = self._spent, _seconds()
        self._recompiling += self._spent - before
        return self._spent - before

    def facts(self) -> dict[str, Any]:
        """For the record: graphs, the breaks between them, and what was compiled only in the steps."""
        if self.off is not None:
            return {} if self.off == NONE else {"compile_off": self.off}
        from torch._dynamo.utils import counters

        return {
            "recompile_seconds": self._recompiling,
            "compile_graphs": _graphs(),
            "compile_graph_breaks": sum(counters["graph_break"].values()),
            "compile_recompiles": _graphs() - self._before,
        }


def check(config: TrainConfig) -> None:
    """Refuse a ``train.compile`` that names no backend.

    Raises:
        InputError: the line lists those that torch has.
    """
    if config.compile == NONE:
        return
    known = [NONE, "eager", "aot_eager", *torch.compiler.list_backends()]
    if config.compile not in known:
        raise InputError(f"train.compile={config.compile}: no such backend; {suggest(config.compile, known)}")


_HELD: list[dict[tuple[int, str, bool | None], Compilation]] = []  # what is kept in a block of `once`; empty outside


@contextmanager
def compile_once() -> Iterator[None]:
    """In this block a model is compiled at its first training; later trainings (a profiler's) use the same graphs."""
    if _HELD:  # within another such block
        yield
        return
    _HELD.append({})
    try:
        yield
    finally:
        if _HELD.pop():
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
    """The model as ``train.compile`` wants it, tried on batches of unlike shapes; the gradients are as before.

    ``losses`` is the step's own forward. Where compiling fails, or the compiled model has
    another loss, it is off, and the reason said.
    """
    if config.compile == NONE:
        yield Compilation(model, off=NONE)
        return
    key = id(model), config.compile, config.compile_dynamic
    if _HELD and (held := _HELD[0].get(key)):
        held.begin_steps()
        yield held
        return
    import torch._dynamo.utils

    torch._dynamo.reset()  # what another trial of this process compiled has its own guards and counts
    torch._dynamo.utils.counters.clear()
    called: Any = torch.compile(model, backend=config.compile, dynamic=config.compile_dynamic)
    compilation = Compilation(called)
    with meter.stage("compile"):
        try:
            for batch in _unlike(batches):
                _try(model, called, batch, losses)
        except Exception as error:  # whatever dynamo, a backend or a C++ compiler raises
            log.warning("train.compile=%s is off: %s", config.compile, error)
            compilation = Compilation(model, off=(str(error).splitlines() or [""])[0] or type(error).__name__)
        finally:
            model.zero_grad(set_to_none=True)
    compilation.begin_steps()
    if _HELD:
        _HELD[0][key] = compilation
    try:
        yield compilation
    finally:
        if not _HELD:
            torch._dynamo.reset()


def _try(model: nn.Module, called: nn.Module, batch: Batch, losses: Callable[[nn.Module, Batch], torch.Tensor]) -> None:
    """Compile for ``batch``, forward and backward, and compare the loss with the eager one."""
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        wanted = losses(model, batch).mean().item()
    loss = losses(called, batch).mean()
    loss.backward()
    if not abs(loss.item() - wanted) <= TOLERANCE * abs(wanted):
        raise ArithmeticError(f"the compiled model's loss is {loss.item():.4f}, the eager one's {wanted:.4f}")


def _unlike(batches: Callable[[], Iterator[Batch]]) -> list[Batch]:
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
