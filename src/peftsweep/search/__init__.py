"""Which point is tried next, and which trial is not worth going on with? A search by Optuna."""

__all__ = ["pruning", "search", "space"]
