"""peftsweep: sweep parameter-efficient fine-tuning configurations and learn which one to use.

>>> import peftsweep
>>> result = peftsweep.run(["method=lora", "method.r=8", "quant=4bit"])      # doctest: +SKIP
>>> result.eval_info["tiny_math"]["accuracy"]["value"]                       # doctest: +SKIP
>>> table = peftsweep.load("default")                                        # doctest: +SKIP
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from peftsweep import former_names
from peftsweep.errors import InputError

if TYPE_CHECKING:
    from os import PathLike

    from pandas import DataFrame

    from peftsweep.study.record import Result

# GNU OpenMP's threads spin while they wait for each other. Beside any other busy process on the same
# cores, small operations then take a hundred times as long; waiting asleep costs nothing measurable.
# It is read when torch is imported, so it stands here.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# torch's profiler prints "USDT:" lines to stderr at every start and stop (level 5); read at its first use.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

# bitsandbytes warns on import that an optional CPU kernel is missing; the kernel is never used here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# torchao warns of its CUDA kernels where there is no CUDA, and torch of an old call in it.
logging.getLogger("torchao").setLevel(logging.ERROR)
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)

former_names.install()

__version__ = "0.1.0"
__all__ = ["InputError", "load", "run"]


def run(overrides: Sequence[str] = ()) -> Result:
    """Train and evaluate one trial, or return its record if the study already holds it.

    ``overrides`` are the words of the command line: ``run(["method=lora", "method.r=16"])`` is
    ``peftsweep method=lora method.r=16``. The folders are the same too. A trial that fails returns
    its record, with ``result.status == "failed"`` and ``result.error``. With ``dry_run=true`` nothing is trained:
    the plan is printed and written, and of a new trial a record comes back, with ``result.status == "planned"``.
    With ``force=true`` a call that was killed or interrupted goes on when it is made again; after one that has come to
    its end everything is run again.

    Raises:
        InputError: the overrides do not describe a trial; nothing was loaded.
    """
    from peftsweep import cli  # imported late, as `import peftsweep` must stay instant

    return cli.run_one(list(overrides))


def load(study: str | PathLike[str] = "default") -> DataFrame:
    """One row a trial of ``study``, with dotted columns such as ``config.method.r``.

    ``study`` is the name of a study under ``multirun/`` or the path of its folder. The table is
    read from the trials' records, so it is current whether or not ``peftsweep-collect`` has run:

    >>> load("default")[["config.method.r", "eval_info.tiny_math.accuracy.value"]]  # doctest: +SKIP

    Raises:
        InputError: there is no such study.
    """
    from peftsweep.analysis.table import table
    from peftsweep.study import store as studies

    return table.trials(table.read(studies.find(Path(study))))
