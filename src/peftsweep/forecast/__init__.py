"""What is known before anything runs? Memory, refusals, size."""

__all__ = ["duration", "forecast", "guide", "history", "predict", "timing", "work"]
