"""Which trial does sweep=tune or sweep=league run next, and what does it decide?"""

__all__ = ["command"]
