"""Which point does Optuna try next, and which trial is stopped early?"""

__all__ = ["pruning", "search", "space"]
