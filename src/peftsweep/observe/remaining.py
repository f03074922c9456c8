"""The time that is left, of a trial and of a sweep: what was expected, corrected by what has happened. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

ORDER = ("load", "train", "evaluate", "save")  # kinds of a trial's seconds, as they come
KIND_OF_STAGE = {  # of the stages that a trial reports
    **dict.fromkeys(("setup", "load", "data", "attach"), "load"),
    **dict.fromkeys(("train", "validate", "checkpoint", "compile", "warm", "probe"), "train"),
    **dict.fromkeys(("baseline", "eval", "scales", "inference", "profile"), "evaluate"),
    **dict.fromkeys(("save", "reload", "merge"), "save"),
}
ENOUGH_STEPS = 5  # after which a trial's own steps say more than what was expected


def remaining(
    expected: Mapping[str, float | None] | None,
    stage: str,
    in_stage: float = 0.0,
    step: int = 0,
    steps: int | None = None,
    step_seconds: float | None = None,
) -> float | None:
    """The seconds that a trial has left; None if they cannot be estimated.

    ``expected`` are its seconds by kind (``load``, ``train``, ``evaluate``, ``save``), ``in_stage`` those since its
    ``stage`` began, ``step_seconds`` the sum of its steps so far. Its own steps correct what was expected: the more
    of them there are, the more they count.
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
    """The seconds until a sweep is done: ``running`` trials have so much left, ``waiting`` ones will take so much.

    A trial of which nothing is known counts as the mean of the others; None where nothing is known of any.
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
    """``0.4 s``, ``14 s``, ``3.2 min``, ``5.1 h``, ``2.3 days``."""
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    for unit, size, most in (("min", 60, 90), ("h", 3600, 48), ("days", 86400, float("inf"))):
        if seconds / size < most:
            return f"{seconds / size:.1f} {unit}"
    return "?"
