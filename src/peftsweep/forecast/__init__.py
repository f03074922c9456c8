"""How much memory and time will a trial take?"""

__all__ = ["duration", "forecast", "guide", "history", "predict", "timing", "work"]
