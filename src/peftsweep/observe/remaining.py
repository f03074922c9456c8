"""The remaining time of a trial and of a sweep: the expected time, corrected by the time so far. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

ORDER = ("load", "train", "evaluate", "save")  # kinds of work of a trial, in their order
KIND_OF_STAGE = {  # the stages that a trial reports
    **dict.fromkeys(("setup", "load", "data", "attach"), "load"),
    **dict.fromkeys(("train", "validate", "checkpoint", "compile", "warm", "probe"), "train"),
    **dict.fromkeys(("baseline", "eval", "scales", "inference", "profile"), "evaluate"),
    **dict.fromkeys(("save", "reload", "merge"), "save"),
}
ENOUGH_STEPS = 5  # after so many steps the trial's own times weigh as much as the expected ones


def remaining(
    expected: Mapping[str, float | None] | None,
    stage: str,
    in_stage: float = 0.0,
    step: int = 0,
    steps: int | None = None,
    step_seconds: float | None = None,
) -> float | None:
    """The remaining seconds of a trial; None if they cannot be estimated.

    ``expected`` are its seconds by kind (``load``, ``train``, ``evaluate``, ``save``), ``in_stage`` the seconds since
    its ``stage`` began, ``step_seconds`` the sum of its steps so far. Its own steps correct the expected seconds: the
    more steps, the larger their weight.
    """
    known = {kind: seconds for kind, seconds in (expected or {}).items() if seconds is not None}
    now = KIND_OF_STAGE.get(stage, "load")
    left = _training(known.get("train"), step, steps, step_seconds) if now == "train" else None
    if left is None:
        if now not in known:
            return None
        left = max(known[now] - in_stage, 0.0)
    later = ORDER[ORDER.index(now) + 1 :]
    if now != "train" and not known:
        return None
    return left + sum(known.get(kind, 0.0) for kind in later)


def _training(expected: float | None, step: int, steps: int | None, taken: float | None) -> float | None:
    if not steps or not step or taken is None:
        return None
    own = taken / step
    if expected is None:
        return own * (steps - step)
    weight = step / (step + ENOUGH_STEPS)
    return (weight * own + (1 - weight) * expected / steps) * (steps - step)


def remaining_of_sweep(running: Sequence[float | None], waiting: Sequence[float | None], workers: int) -> float | None:
    """The seconds until a sweep is done, from the remaining seconds of running trials and the seconds of waiting ones.

    A trial with None counts as the mean of the others; the result is None if all are None.
    """
    known = [seconds for seconds in (*running, *waiting) if seconds is not None]
    if not known:
        return None
    mean = sum(known) / len(known)
    free = sorted([mean if one is None else one for one in running] + [0.0] * (workers - len(running)))
    for one in waiting:
        free[0] += mean if one is None else one
        free.sort()
    return max(free, default=0.0)


def format_seconds(seconds: float) -> str:
    """A rough time, such as one that is left: ``0.4 s``, ``14 s``, ``3.2 min``, ``5.1 h``, ``2.3 days``."""
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    for unit, size, most in (("min", 60, 90), ("h", 3600, 48), ("days", 86400, float("inf"))):
        if seconds / size < most:
            return f"{seconds / size:.1f} {unit}"
    return "?"
