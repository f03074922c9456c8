"""What can be said of a table, and how surely."""

__all__ = ["comparisons", "effects", "frontier", "intervals", "measured", "rungs", "task", "trials"]
