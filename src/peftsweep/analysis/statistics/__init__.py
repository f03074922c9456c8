"""Statistics of a table of trials: intervals, comparisons, effects."""

__all__ = ["comparisons", "effects", "frontier", "intervals", "measured", "rungs", "task", "trials"]
